"""The surface of the package: its names, its signature, what it imports and which way its modules point."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import logitless
from logitless.cli import main

PACKAGE = Path(logitless.__file__).parent

PUBLIC_FUNCTIONS = [
    logitless.check_targets,
    logitless.count_tokens,
    logitless.linear_cross_entropy,
    logitless.patch,
    logitless.plan,
    logitless.sampling_report,
    logitless.token_statistics,
    logitless.unpatch,
]
PUBLIC = [
    "LinearCrossEntropyLoss",
    "Patched",
    "Plan",
    "Sampled",
    "SamplingReport",
    "TokenStatistics",
    "check_targets",
    "count_tokens",
    "linear_cross_entropy",
    "patch",
    "plan",
    "sampling_report",
    "token_statistics",
    "unpatch",
]


def test_public_names():
    assert sorted(logitless.__all__) == PUBLIC
    for name in logitless.__all__:
        assert hasattr(logitless, name)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_objects_are_documented(name):
    public = getattr(logitless, name)
    assert (inspect.getdoc(public) or "").strip()
    assert not inspect.getdoc(public).startswith(f"{name}("), "the signature dataclass writes is no documentation"


@pytest.mark.parametrize("function", PUBLIC_FUNCTIONS)
def test_every_argument_is_documented(function):
    """Each has an entry of its own, in order: ``weight`` is not found in ``linear_weight``."""
    documentation = inspect.getdoc(function)
    arguments = documentation.partition("\nArgs:\n")[2].partition("\n\n")[0]
    documented = [
        name for names in re.findall(r"^    (\**\w[\w, *]*):", arguments, re.MULTILINE) for name in names.split(", ")
    ]
    parameters = inspect.signature(function).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    assert documented == [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]


def test_version_is_that_of_the_package(capsys):
    """As installed; a source tree that is not installed has none."""
    try:
        expected = importlib.metadata.version("logitless")
    except importlib.metadata.PackageNotFoundError:
        expected = "0+unknown"
    assert logitless.__version__ == expected
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"logitless {expected}\n"


def test_signature_begins_with_that_of_pytorch():
    theirs = inspect.signature(torch.nn.functional.linear_cross_entropy).parameters
    # `options` is PyTorch's choice of chunks, for which ours are `workspace` and `backend`.
    shared = [parameter for name, parameter in theirs.items() if name != "options"]
    ours = list(inspect.signature(logitless.linear_cross_entropy).parameters.values())
    assert [p.name for p in ours[: len(shared)]] == [p.name for p in shared]
    assert [p.kind for p in ours[: len(shared)]] == [p.kind for p in shared]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(shared) :])


def test_defaults():
    parameters = inspect.signature(logitless.linear_cross_entropy).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "linear_bias": None,
        "weight": None,
        "reduction": "mean",
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "token_weight": None,
        "normalizer": None,
        "z_loss": 0.0,
        "softcap": None,
        "logit_scale": 1.0,
        "gradient": "exact",
        "workspace": None,
        "backend": "auto",
        "group": None,
        "sequence_parallel": False,
        "main_grad": None,
        "adapter": None,
    }


def test_module_has_the_options_of_the_function():
    """All that is not a tensor of the call is fixed when the module is made, and nothing else is."""
    call = {"input", "linear_weight", "target", "linear_bias", "token_weight", "normalizer", "main_grad", "adapter"}
    function = inspect.signature(logitless.linear_cross_entropy).parameters
    logitless.LinearCrossEntropyLoss(**{name: p.default for name, p in function.items() if name not in call})
    for name in call:
        with pytest.raises(TypeError, match=name):
            logitless.LinearCrossEntropyLoss(**{name: None})
    forward = inspect.signature(logitless.LinearCrossEntropyLoss.forward).parameters
    assert set(forward) - {"self"} == call


def test_types_are_public():
    assert (importlib.resources.files("logitless") / "py.typed").is_file()


def test_frozen_dataclasses():
    statistics = logitless.token_statistics(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64))
    for public, field in ((statistics, "nll"), (logitless.Sampled(), "threshold")):
        with pytest.raises(AttributeError):
            setattr(public, field, None)


def test_module_repr_shows_options():
    assert "label_smoothing=0.125" in repr(logitless.LinearCrossEntropyLoss(label_smoothing=0.125))


# --- imports ----------------------------------------------------------------------------------------------------------

OPTIONAL = ("triton", "transformers", "rich", "matplotlib", "psutil", "mistral_common")


def modules_loaded_by(statement: str) -> set[str]:
    script = f"import sys, torch; before = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


def test_import_is_light():
    """In a fresh process, importing the package loads no optional dependency."""
    loaded = modules_loaded_by("import logitless")
    assert "logitless" in loaded
    assert not loaded & set(OPTIONAL)


def test_optional_imports_are_seen():
    """The check above can fail."""
    assert "psutil" in modules_loaded_by("import psutil")


# Modules in the order of their arrows: each may import from its own rank and from those after it.
RANKS = (
    {"__main__"},
    {"cli"},
    {"bench", "doctor"},
    {"integrations"},
    {"functional", "module", "report"},
    {"calls"},
    {"compiled"},
    {"validation", "objective", "planning", "operators"},
    {"schedules", "sharding", "dtensors"},
    {"backends", "sampling", "fp8"},
    {"options", "precision"},
    {"arguments", "transforms", "errors"},
)

ABOVE = (
    "__main__",
    "cli",
    "bench",
    "doctor",
)  # which use the package as anybody does, by its public names where these do


def top_of(module: str) -> str:
    """``logitless.backends.torch`` is part of ``backends``."""
    return module.split(".")[1]


def rank_of(module: str) -> int:
    return next(rank for rank, names in enumerate(RANKS) if top_of(module) in names)


def imports_of(module: str, source: str, is_package: bool) -> Iterator[str]:
    """Absolute names of all that a source imports, in functions too; ``a.b`` for ``from a import b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Imports against the arrows, in sources by module name."""
    found = []
    for module, source in sources.items():
        if module == "logitless":
            continue
        for imported in imports_of(module, source, module in packages):
            if wrong := wrong_import(module, imported):
                found.append(f"{module} imports {imported}: {wrong}")
    return found


def wrong_import(module: str, imported: str) -> str | None:
    in_backends = module.startswith("logitless.backends.")
    if in_backends and imported.startswith("torch.distributed"):
        return "a backend knows nothing of ranks"
    if imported == "logitless" or not imported.startswith("logitless."):
        return "the package itself" if imported == "logitless" and top_of(module) not in ABOVE else None
    if top_of(module) in ABOVE and top_of(imported) in PUBLIC:
        return None
    if rank_of(imported) < rank_of(module):
        return "against the arrows"
    if in_backends and imported.startswith("logitless.backends."):
        own, other = module.split(".")[2], imported.split(".")[2]
        if own != "contract" and other not in (own, "contract"):
            return "backends know nothing of one another"
    return None


def package_sources(package: Path = PACKAGE) -> tuple[dict[str, str], frozenset[str]]:
    sources, packages = {}, set()
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        name = ".".join(part for part in parts if part != "__init__")
        if path.name == "__init__.py":
            packages.add(name)
        sources[name] = path.read_text()
    return sources, frozenset(packages)


def circle(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Modules that import one another in a circle, the first that is found; a package's root imports all of them."""

    def imported(module: str) -> Iterator[str]:
        for name in imports_of(module, sources[module], module in packages):
            found = name if name in sources else name.rpartition(".")[0]
            if found in sources and "." in found and found != module:
                yield found

    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        if path[-1] in path[:-1]:
            return path[path.index(path[-1]) :]
        if path[-1] not in done:
            for name in imported(path[-1]):
                if found := search([*path, name]):
                    return found
            done.add(path[-1])
        return []

    return next((found for module in sources if "." in module and (found := search([module]))), [])


def test_import_arrows():
    sources, packages = package_sources()
    assert len(sources) > 5
    assert not violations(sources, packages)


DEMONSTRATION = Path(__file__).parents[1] / "demo" / "logitless_demo"


@pytest.mark.parametrize("package", [PACKAGE, DEMONSTRATION], ids=lambda package: package.name)
def test_no_circles(package):
    """Of imports within functions and for types neither."""
    sources, packages = package_sources(package)
    assert len(sources) > 5
    assert not circle(sources, packages)


def test_a_circle_is_found():
    sources = {"a.b": "from a import c", "a.c": "def later():\n    from a.d import e", "a.d": "import a.b"}
    assert circle(sources) == ["a.b", "a.c", "a.d", "a.b"]


def test_demonstration_uses_public_names():
    sources, packages = package_sources(DEMONSTRATION)
    for module, source in sources.items():
        for name in imports_of(module, source, module in packages):
            assert not name.startswith("logitless.") or name.split(".", 1)[1] in PUBLIC, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("logitless.backends.torch", "from logitless.backends.reference import forward"),
        ("logitless.backends.torch", "from . import reference"),
        ("logitless.backends.torch.chunked", "from ..reference import forward"),
        ("logitless.backends.torch", "def later():\n    from logitless.functional import linear_cross_entropy"),
        ("logitless.backends.reference", "import torch.distributed as dist"),
        ("logitless.backends.reference", "from torch import distributed"),
        ("logitless.options", "from logitless.validation import check"),
        ("logitless.planning", "from .functional import linear_cross_entropy"),
        ("logitless.operators", "import logitless"),
        ("logitless.functional", "import logitless.cli"),
    ],
)
def test_import_against_the_arrows_is_found(module, source):
    assert len(violations({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("logitless.functional", "from logitless.options import Sampled"),
        ("logitless.operators", "from logitless.backends import contract"),
        ("logitless.backends.torch", "from .contract import Statistics\nimport torch"),
        ("logitless.backends.torch.chunked", "from . import windowed"),
        ("logitless.cli", "import logitless\nfrom logitless import plan"),
    ],
)
def test_import_along_the_arrows_is_allowed(module, source):
    assert not violations({module: source})
