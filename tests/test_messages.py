"""Every mistake a caller can make gives an exception that names the argument, what is expected and what came."""

from __future__ import annotations

import inspect
import re
from enum import Enum
from fractions import Fraction

import numpy as np
import pytest
import torch

import logitless
import logitless.schedules
from logitless import validation

TOKENS, HIDDEN, VOCABULARY = 4, 8, 11


def arguments(**changes) -> dict[str, object]:
    """A valid call with some arguments changed."""
    valid = {
        "input": torch.ones(TOKENS, HIDDEN),
        "linear_weight": torch.ones(VOCABULARY, HIDDEN),
        "target": torch.zeros(TOKENS, dtype=torch.int64),
    }
    return {**valid, **changes}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def assert_names(error: pytest.ExceptionInfo, *fragments: str) -> None:
    """Each fragment stands in the message as a word, or number, of its own."""
    message = str(error.value)

    def stands(fragment: str) -> bool:
        before = r"(?<![\w.-])" if fragment[0].isdigit() else r"(?<!\w)"
        return re.search(rf"{before}{re.escape(fragment)}(?!\w)", message) is not None

    missing = [fragment for fragment in fragments if not stands(fragment)]
    assert not missing, f"{missing} not in {message!r}"


HEAD_OPTIONS = ("ignore_index", "softcap", "logit_scale", "gradient", "workspace", "backend")
LOSS_OPTIONS = (*HEAD_OPTIONS, "reduction", "label_smoothing", "z_loss")

# Changes to a valid call that both functions refuse: exception, and what its message must name.
HEAD = {
    "input not a tensor": ({"input": [[1.0]]}, TypeError, ["input", "list"]),
    "input of integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, ["input", "int64"]),
    "input complex": ({"input": torch.ones(4, 8, dtype=torch.complex64)}, TypeError, ["input", "complex64"]),
    "input without dimensions": ({"input": torch.tensor(1.0)}, ValueError, ["input"]),
    "linear_weight not a tensor": ({"linear_weight": None}, TypeError, ["linear_weight", "NoneType"]),
    "linear_weight of integers": (
        {"linear_weight": torch.ones(11, 8, dtype=torch.int32)},
        TypeError,
        ["linear_weight", "int32"],
    ),
    "linear_weight with one dimension": ({"linear_weight": torch.ones(8)}, ValueError, ["linear_weight", "8"]),
    "linear_weight with three dimensions": ({"linear_weight": torch.ones(11, 8, 2)}, ValueError, ["linear_weight"]),
    "hidden sizes differ": ({"linear_weight": torch.ones(11, 7)}, ValueError, ["linear_weight", "7", "8"]),
    "no vocabulary": ({"linear_weight": torch.ones(0, 8)}, ValueError, ["linear_weight", "0"]),
    "target not a tensor": ({"target": [0, 0, 0, 0]}, TypeError, ["target", "list"]),
    "target of floats": ({"target": torch.zeros(4)}, TypeError, ["target", "float32"]),
    "target of booleans": ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, ["target", "bool"]),
    "target too short": ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, ["target", "3", "4"]),
    "target with a dimension too many": (
        {"target": torch.zeros(4, 5, dtype=torch.int64)},
        ValueError,
        ["target", "4", "5"],
    ),
    "target too large": ({"target": torch.tensor([0, 10, 11, -1])}, ValueError, ["target", "11", "2"]),
    "target negative": ({"target": torch.tensor([0, -3, 0, 11])}, ValueError, ["target", "-3", "1", "11"]),
    "target out of range and not ignored": (
        {"target": torch.tensor([-100, 0, 0, -100]), "ignore_index": 5},
        ValueError,
        ["target", "-100", "0"],
    ),
    "linear_bias not a tensor": ({"linear_bias": 1.0}, TypeError, ["linear_bias", "float"]),
    "linear_bias too long": ({"linear_bias": torch.ones(12)}, ValueError, ["linear_bias", "11", "12"]),
    "linear_bias with two dimensions": ({"linear_bias": torch.ones(1, 11)}, ValueError, ["linear_bias", "11"]),
    "linear_bias of integers": (
        {"linear_bias": torch.ones(11, dtype=torch.int64)},
        TypeError,
        ["linear_bias", "int64"],
    ),
    "linear_weight on another device": ({"linear_weight": meta(11, 8)}, ValueError, ["linear_weight", "meta", "cpu"]),
    "target on another device": (
        {"target": meta(4, dtype=torch.int64)},
        ValueError,
        ["target", "meta", "cpu"],
    ),
    "linear_bias on another device": ({"linear_bias": meta(11)}, ValueError, ["linear_bias", "meta", "cpu"]),
    "ignore_index not an integer": ({"ignore_index": 0.5}, TypeError, ["ignore_index", "float"]),
    "softcap negative": ({"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
    "softcap zero": ({"softcap": 0.0}, ValueError, ["softcap", "0.0"]),
    "softcap not a number": ({"softcap": float("nan")}, ValueError, ["softcap", "nan"]),
    "softcap text": ({"softcap": "30"}, TypeError, ["softcap", "str"]),
    "logit_scale not a number": ({"logit_scale": float("nan")}, ValueError, ["logit_scale", "nan"]),
    "logit_scale infinite": ({"logit_scale": float("inf")}, ValueError, ["logit_scale", "inf"]),
    "logit_scale text": ({"logit_scale": "1"}, TypeError, ["logit_scale", "str"]),
    "gradient unknown": ({"gradient": "rough"}, ValueError, ["gradient", "rough", "exact"]),
    "gradient of another type": ({"gradient": 0.5}, (TypeError, ValueError), ["gradient", "0.5", "exact"]),
    "backend unknown": ({"backend": "fortran"}, ValueError, ["backend", "fortran", "reference", "torch", "auto"]),
    "workspace zero": ({"workspace": 0}, ValueError, ["workspace", "0"]),
    "workspace negative": ({"workspace": -5}, ValueError, ["workspace", "-5"]),
    "workspace unreadable": ({"workspace": "plenty"}, ValueError, ["workspace", "plenty"]),
    "workspace of an unknown unit": ({"workspace": "5 parsecs"}, ValueError, ["workspace", "5 parsecs"]),
    "workspace without a number": ({"workspace": "MiB"}, ValueError, ["workspace", "MiB"]),
    "workspace negative text": ({"workspace": "-1MiB"}, ValueError, ["workspace", "-1MiB"]),
    "workspace a float": ({"workspace": 1.5}, TypeError, ["workspace", "float"]),
    "workspace a boolean": ({"workspace": True}, TypeError, ["workspace", "bool"]),
    "workspace beyond all memory": ({"workspace": "9" * 30}, ValueError, ["workspace", "2**63"]),
    "workspace of too many digits": ({"workspace": "9" * 400}, ValueError, ["workspace", "100 digits"]),
    "ignore_index beyond int64": ({"ignore_index": 2**63}, ValueError, ["ignore_index", "9223372036854775808"]),
    "ignore_index below int64": ({"ignore_index": -(2**63) - 1}, ValueError, ["ignore_index", "64 bits"]),
    "ignore_index a tensor": ({"ignore_index": torch.tensor(3)}, TypeError, ["ignore_index", "Tensor"]),
    "softcap beyond a float": ({"softcap": 10**400}, ValueError, ["softcap", "1329 bits"]),
    "softcap of no precision": ({"softcap": 1e-39}, ValueError, ["softcap", "1e-39"]),
    "logit_scale beyond fp32": ({"logit_scale": -1e39}, ValueError, ["logit_scale", "-1e+39"]),
    "backend of no text": ({"backend": ["torch"]}, TypeError, ["backend", "torch"]),
    "sequence_parallel a number": ({"sequence_parallel": 1}, TypeError, ["sequence_parallel", "int"]),
}

LOSS = {
    "reduction unknown": ({"reduction": "average"}, ValueError, ["reduction", "average", "mean", "sum", "none"]),
    "label_smoothing negative": ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1"]),
    "label_smoothing above one": ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5"]),
    "label_smoothing not a number": ({"label_smoothing": float("nan")}, ValueError, ["label_smoothing", "nan"]),
    "label_smoothing text": ({"label_smoothing": "0.1"}, TypeError, ["label_smoothing", "str"]),
    "z_loss negative": ({"z_loss": -0.5}, ValueError, ["z_loss", "-0.5"]),
    "z_loss not a number": ({"z_loss": float("nan")}, ValueError, ["z_loss", "nan"]),
    "z_loss beyond fp32": ({"z_loss": 10**60}, ValueError, ["z_loss", "3.4e+38"]),
    "z_loss a tensor": ({"z_loss": torch.tensor(0.1)}, TypeError, ["z_loss", "Tensor"]),
    "z_loss text": ({"z_loss": "0.1"}, TypeError, ["z_loss", "str"]),
    "weight not a tensor": ({"weight": [1.0] * 11}, TypeError, ["weight", "list"]),
    "weight of integers": ({"weight": torch.ones(11, dtype=torch.int64)}, TypeError, ["weight", "int64"]),
    "weight too short": ({"weight": torch.ones(10)}, ValueError, ["weight", "10", "11"]),
    "weight with two dimensions": ({"weight": torch.ones(11, 1)}, ValueError, ["weight", "11", "1"]),
    "weight requires a gradient": (
        {"weight": torch.ones(11, requires_grad=True)},
        ValueError,
        ["weight", "not differentiable"],
    ),
    "weight on another device": ({"weight": meta(11)}, ValueError, ["weight", "meta", "cpu"]),
    "token_weight not a tensor": ({"token_weight": 2.0}, TypeError, ["token_weight", "float"]),
    "token_weight of integers": (
        {"token_weight": torch.ones(4, dtype=torch.int64)},
        TypeError,
        ["token_weight", "int64"],
    ),
    "token_weight too short": ({"token_weight": torch.ones(3)}, ValueError, ["token_weight", "3", "4"]),
    "token_weight a column": ({"token_weight": torch.ones(4, 1)}, ValueError, ["token_weight", "4", "1"]),
    "token_weight requires a gradient": (
        {"token_weight": torch.ones(4, requires_grad=True)},
        ValueError,
        ["token_weight", "not differentiable"],
    ),
    "token_weight on another device": ({"token_weight": meta(4)}, ValueError, ["token_weight", "meta", "cpu"]),
    "normalizer with sum": ({"normalizer": 4, "reduction": "sum"}, ValueError, ["normalizer", "mean", "sum"]),
    "normalizer with none": ({"normalizer": 4, "reduction": "none"}, ValueError, ["normalizer", "mean", "none"]),
    "normalizer negative": ({"normalizer": -2.0}, ValueError, ["normalizer", "-2.0"]),
    "normalizer not a number": ({"normalizer": float("nan")}, ValueError, ["normalizer", "nan"]),
    "normalizer with a dimension": ({"normalizer": torch.ones(2)}, ValueError, ["normalizer", "2"]),
    "normalizer beyond fp32": ({"normalizer": 10**400}, ValueError, ["normalizer", "1329 bits"]),
    "normalizer of no precision": ({"normalizer": 1e-60}, ValueError, ["normalizer", "1e-60"]),
    "normalizer text": ({"normalizer": "4"}, TypeError, ["normalizer", "str"]),
}

STATISTICS = {
    "output unknown": ({"outputs": ("nll", "perplexity")}, ValueError, ["outputs", "perplexity", "nll", "entropy"]),
    "output unhashable": ({"outputs": (["nll"],)}, TypeError, ["outputs", "nll"]),
    "output twice": ({"outputs": ("nll", "nll")}, ValueError, ["outputs", "twice"]),
    "no output": ({"outputs": ()}, ValueError, ["outputs", "at least one"]),
}


def refusals(table: dict) -> list:
    return [pytest.param(*values, id=name) for name, values in table.items()]


@pytest.mark.parametrize(("changes", "exception", "fragments"), refusals(HEAD | LOSS))
def test_loss_refuses(changes, exception, fragments):
    with pytest.raises(exception) as error:
        logitless.linear_cross_entropy(**arguments(**changes))
    assert_names(error, *fragments)


@pytest.mark.parametrize(("changes", "exception", "fragments"), refusals(HEAD | STATISTICS))
def test_statistics_refuse(changes, exception, fragments):
    with pytest.raises(exception) as error:
        logitless.token_statistics(**arguments(**changes))
    assert_names(error, *fragments)


CALL_ARGUMENTS = ("input", "linear_weight", "target", "linear_bias", "token_weight", "normalizer")


@pytest.mark.parametrize(("changes", "exception", "fragments"), refusals(HEAD | LOSS))
def test_module_refuses(changes, exception, fragments):
    """What the function refuses, the module refuses, when it is made or when it is called."""
    every = arguments(**changes)
    call = {name: value for name, value in every.items() if name in CALL_ARGUMENTS}
    options = {name: value for name, value in every.items() if name not in CALL_ARGUMENTS}

    def make_and_call():
        return logitless.LinearCrossEntropyLoss(**options)(**call)

    with pytest.raises(exception) as error:
        make_and_call()
    assert_names(error, *fragments)


OPTIONS = {
    name: case
    for name, case in (HEAD | LOSS).items()
    if not case[0].keys() & {"target", *CALL_ARGUMENTS} and not name.endswith(("too short", "another device"))
}


@pytest.mark.parametrize(("changes", "exception", "fragments"), refusals(OPTIONS))
def test_module_refuses_options_when_it_is_made(changes, exception, fragments):
    """What is wrong whatever the tensors are is not left to the first call."""
    with pytest.raises(exception) as error:
        logitless.LinearCrossEntropyLoss(**changes)
    assert_names(error, *fragments)


@pytest.mark.parametrize("function", [logitless.linear_cross_entropy, logitless.token_statistics])
def test_what_is_no_group(function):
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup or None, got object"):
        function(**arguments(group=object()))
    with pytest.raises(ValueError, match="sequence_parallel=True needs group="):
        function(**arguments(sequence_parallel=True))


def test_unknown_option_of_the_module():
    with pytest.raises(TypeError, match="temperature"):
        logitless.LinearCrossEntropyLoss(temperature=2.0)


def test_valid_arguments_are_valid():
    """The table above changes a call that is accepted as it stands."""
    logitless.linear_cross_entropy(**arguments())
    logitless.token_statistics(**arguments())


def test_every_token_out_of_range_but_ignored():
    """An ``ignore_index`` outside the vocabulary is no target out of range."""
    loss = logitless.linear_cross_entropy(**arguments(target=torch.full((TOKENS,), 99), ignore_index=99))
    assert loss == 0


@pytest.mark.parametrize("where", ["input", "linear_weight"])
def test_first_bad_target_of_many(where):
    """The index is that of the first bad token, whichever strategy would run."""
    call = arguments(target=torch.tensor([3, -100, 12, 57]))
    call[where].requires_grad_()
    with pytest.raises(ValueError, match="target") as error:
        logitless.linear_cross_entropy(**call)
    assert_names(error, "12", "2", "11")


@pytest.mark.parametrize(
    "text",
    [
        *("64MiB", "64mib", "64 MiB", "67108864", "0.0625GiB", "67108.864KB", 2**26, np.int32(2**26), "64M", "65536K"),
        *("65536k", "0.0625G", "0.00006103515625T", "0.00006103515625TiB", "67.108864MB", "0.000067108864TB"),
    ],
)
def test_spellings_of_a_workspace(text):
    """A letter alone is a power of 1024, with a B behind it one of 1000."""
    plan = logitless.plan(tokens=64, hidden=8, vocabulary=515, dtype="float32", workspace=text)
    assert plan.budget == 2**26


def test_large_units_of_a_workspace():
    sizes = {"1K": 2**10, "1M": 2**20, "1G": 2**30, "1T": 2**40, "1GB": 10**9, "1TB": 10**12, "1TiB": 2**40}
    assert {text: validation.check_workspace(text) for text in sizes} == sizes


def test_workspace_too_small():
    call = arguments(input=torch.ones(TOKENS, HIDDEN, requires_grad=True), workspace=1)
    with pytest.raises(ValueError, match="needs at least") as error:
        logitless.linear_cross_entropy(**call)
    assert_names(error, "workspace", "1")


def test_workspace_too_small_says_what_is_enough():
    """To paste, in bytes, and to read, rounded up: both are enough."""
    sizes = {"tokens": 4096, "hidden": 64, "vocabulary": 5000, "dtype": "bfloat16", "device": "cpu"}
    with pytest.raises(ValueError, match="is too small") as error:
        logitless.plan(**sizes, workspace="1.5MiB")
    assert "workspace=1572864 bytes (1.5 MiB) is too small" in str(error.value)
    enough = re.search(r"needs at least (\d+) bytes \((\S+ MiB)\)", str(error.value))
    for workspace in (int(enough[1]), enough[2]):
        logitless.plan(**sizes, workspace=workspace)
    with pytest.raises(ValueError, match="is too small"):
        logitless.plan(**sizes, workspace=int(enough[1]) - 1)


PLAN = {
    "tokens negative": ({"tokens": -1}, ValueError, ["tokens", "-1"]),
    "tokens a float": ({"tokens": 1.5}, TypeError, ["tokens", "float"]),
    "hidden zero": ({"hidden": 0}, ValueError, ["hidden", "0"]),
    "vocabulary zero": ({"vocabulary": 0}, ValueError, ["vocabulary", "0"]),
    "dtype unknown": ({"dtype": "bfloat17"}, ValueError, ["dtype", "bfloat17"]),
    "dtype of integers": ({"dtype": torch.int64}, (TypeError, ValueError), ["dtype", "int64"]),
    "workspace unreadable": ({"workspace": "plenty"}, ValueError, ["workspace", "plenty"]),
    "workspace too small": ({"workspace": 1}, ValueError, ["workspace", "at least"]),
    "device unknown": ({"device": "tpu"}, ValueError, ["device", "tpu"]),
    "device a number": ({"device": 3.5}, TypeError, ["device", "float"]),
    "frozen_weight text": ({"frozen_weight": "no"}, TypeError, ["frozen_weight", "str"]),
    "frozen_input a number": ({"frozen_input": 1}, TypeError, ["frozen_input", "int"]),
    "main_grad a tensor": ({"main_grad": torch.ones(2)}, TypeError, ["main_grad", "Tensor"]),
}


@pytest.mark.parametrize(("changes", "exception", "fragments"), refusals(PLAN))
def test_plan_refuses(changes, exception, fragments):
    valid = {"tokens": 64, "hidden": 8, "vocabulary": 515, "dtype": "bfloat16"}
    logitless.plan(**valid)
    with pytest.raises(exception) as error:
        logitless.plan(**{**valid, **changes})
    assert_names(error, *fragments)


@pytest.mark.parametrize("sizes", [{"vocabulary": 2**62}, {"tokens": 2**62}, {"hidden": 2**62}], ids=str)
def test_plan_of_absurd_sizes_is_found(sizes):
    """Rather than searched for window by window."""
    plan = logitless.plan(**{"tokens": 64, "hidden": 8, "vocabulary": 515, **sizes})
    assert plan.two_stage > 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32), ("fp64", torch.float64)),
        *(("bfloat16", torch.bfloat16), ("torch.float32", torch.float32)),
    ],
)
def test_names_of_dtypes(name, dtype):
    sizes = {"tokens": 64, "hidden": 8, "vocabulary": 515}
    assert logitless.plan(**sizes, dtype=name, weight_dtype=name) == logitless.plan(**sizes, dtype=dtype)


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_plan_is_for_the_device_that_is_there(monkeypatch, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    plan = logitless.plan(tokens=64, hidden=8, vocabulary=515)
    assert plan.device_type == expected
    assert f"on {expected} " in str(plan)
    assert logitless.plan(tokens=64, hidden=8, vocabulary=515, device="cpu").device_type == "cpu"


SAMPLED = {
    "threshold zero": ({"threshold": 0.0}, ValueError, ["threshold", "0.0"]),
    "threshold above one": ({"threshold": 1.5}, ValueError, ["threshold", "1.5"]),
    "threshold not a number": ({"threshold": float("nan")}, ValueError, ["threshold", "nan"]),
    "threshold text": ({"threshold": "0.1"}, TypeError, ["threshold", "str"]),
    "scan unknown": ({"scan": "int3"}, ValueError, ["scan", "int3", "input"]),
    "generator a seed": ({"generator": 17}, TypeError, ["generator", "int"]),
    "threshold beyond a float": ({"threshold": 10**400}, ValueError, ["threshold", "1329 bits"]),
    "threshold of no precision": ({"threshold": 5e-324}, ValueError, ["threshold", "1.2e-38"]),
    "threshold a tensor": ({"threshold": torch.tensor(0.5)}, TypeError, ["threshold", "Tensor"]),
    "scan a list": ({"scan": ["fp8"]}, TypeError, ["scan", "fp8"]),
}


@pytest.mark.parametrize(("options", "exception", "fragments"), refusals(SAMPLED))
def test_sampled_refuses(options, exception, fragments):
    with pytest.raises(exception) as error:
        logitless.Sampled(**options)
    assert_names(error, *fragments)


def force(strategy: str, **options) -> None:
    with logitless.schedules.force_strategy(strategy):
        logitless.linear_cross_entropy(**arguments(input=torch.ones(4, 8, requires_grad=True), **options))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("chunked", {"reduction": "none"}),
        ("sampled", {}),
        ("stored", {"gradient": logitless.Sampled()}),
        ("loss_only", {}),
        ("telepathic", {}),
    ],
    ids=["chunked without reduction", "sampled without Sampled", "stored with Sampled", "loss_only", "unknown"],
)
def test_forced_strategy_that_cannot_serve(strategy, options):
    with pytest.raises(ValueError, match=strategy):
        force(strategy, **options, backend="torch")


@pytest.mark.parametrize("target", [(3, 4), (4, 3), (12,)], ids=str)
def test_tokens_sharded_elsewhere_than_along_the_first_dimension(target):
    """Half of four positions of three sequences, whose rows are not consecutive in the target's order."""
    input, weight = torch.ones(3, 2, 5), torch.ones(7, 5)
    with pytest.raises(ValueError, match=r"target must have the leading shape of input but for the first dimension"):
        validation.check_head(input, weight, torch.zeros(target, dtype=torch.long), None, sharded_rows=True)


def test_tokens_sharded_along_the_first_dimension():
    target = torch.zeros(6, 2, dtype=torch.long)
    validation.check_head(torch.ones(3, 2, 5), torch.ones(7, 5), target, None, sharded_rows=True)


# --- values of every kind for every argument --------------------------------------------------------------------------


class Names(str, Enum):
    """Strings of a class of their own."""

    MEAN = "mean"
    NLL = "nll"
    NONESUCH = "nonesuch"


class Word(str):
    """Likewise."""


HOSTILE = [
    *(sign * 10**power for power in (19, 60, 400, 5000) for sign in (1, -1)),
    *(2**63, -(2**63) - 1, 2**70, 1e300, -1e300, 5e-324, 1e-39, float("nan"), float("inf"), -float("inf"), True, False),
    *(np.float16(0.5), np.float32(0.25), np.float64("nan"), np.longdouble("1e400"), np.int64(3), np.uint64(2**64 - 1)),
    *(np.bool_(True), np.array([1, 2]), np.array("nll"), Fraction(1, 3), Fraction(10**400), 1j, b"1", "9" * 400),
    *("9" * 5000, "1e400MiB", "-1", "", Word("sum"), *Names, [], (), {}, (["nll"],), ["nll", Names.NLL], [10**5000]),
    *(torch.tensor(1), torch.tensor(0.5), torch.tensor([1.0, 2.0]), object(), torch.float32, logitless.Sampled),
]
ON_CALL = ("linear_bias", "main_grad", "adapter", "group", "sequence_parallel")
ARGUMENTS = {
    logitless.linear_cross_entropy: (*LOSS_OPTIONS, *ON_CALL, "weight", "token_weight", "normalizer"),
    logitless.token_statistics: (*HEAD_OPTIONS, *ON_CALL, "outputs"),
    logitless.LinearCrossEntropyLoss: (*LOSS_OPTIONS, "weight", "group", "sequence_parallel"),
    logitless.sampling_report: (*HEAD_OPTIONS, "draws", "label_smoothing", "z_loss", "weight", "token_weight"),
    logitless.plan: tuple(inspect.signature(logitless.plan).parameters),
    logitless.check_targets: ("vocabulary", "ignore_index", "target"),
    logitless.count_tokens: ("ignore_index", "target", "weight", "group"),
    logitless.Sampled: ("threshold", "scan", "generator"),
}
VALID = {
    logitless.plan: {"tokens": 64, "hidden": 8, "vocabulary": 515},
    logitless.check_targets: {"target": torch.zeros(4, dtype=torch.int64), "vocabulary": 11},
    logitless.count_tokens: {"target": torch.zeros(4, dtype=torch.int64)},
    logitless.sampling_report: arguments(draws=2),
    logitless.LinearCrossEntropyLoss: {},
    logitless.Sampled: {},
}


@pytest.mark.parametrize(
    ("function", "name"),
    [pytest.param(f, name, id=f"{f.__name__}-{name}") for f, names in ARGUMENTS.items() for name in names],
)
def test_values_of_every_kind(function, name):
    """Each is taken, or refused by an error of one line, not a long one, that names the argument."""
    for value in HOSTILE:
        message = refusal(function, {**VALID.get(function, arguments()), name: value})
        assert message is None or re.search(rf"(?<!\w){name}(?!\w)", message), message
        assert message is None or ("\n" not in message and len(message) < 600)


def refusal(function, given: dict[str, object]) -> str | None:
    """The message of a ``TypeError`` or ``ValueError``, None where there is none."""
    try:
        function(**given)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def test_numbers_of_numpy_are_numbers():
    loss = logitless.linear_cross_entropy(
        **arguments(
            label_smoothing=np.float32(0.5),
            z_loss=np.float64(0.25),
            softcap=np.int8(3),
            logit_scale=Fraction(1, 2),
            normalizer=np.int16(5),
            ignore_index=np.int64(7),
            workspace=np.int64(2**20),
            reduction=Names.MEAN,
        )
    )
    plain = {"label_smoothing": 0.5, "z_loss": 0.25, "softcap": 3, "logit_scale": 0.5, "normalizer": 5}
    assert loss == logitless.linear_cross_entropy(**arguments(**plain, ignore_index=7, workspace="1MiB"))
