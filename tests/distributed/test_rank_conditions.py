"""What surrounds a call on ranks: autocast, another default device, another default dtype."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import workers
from torch import Tensor
from workers import Member

import logitless
from problems import generator
from tolerance import FACTOR, upstream_for

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

TOKENS, HIDDEN, VOCABULARY, ADAPTER = 13, 16, 60, 3
ROWS, ENTRIES = (3, 10), (15, 45)  # by rank
CAP, SMOOTHING = 5.0, 0.125
LIMIT = 600
NARROW = (torch.bfloat16, torch.float16)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Called:
    """Losses of tokens and their gradients on two ranks with unlike numbers of rows and of entries, or in one process.

    Attributes:
        dtypes: of hidden states and weight.
        autocast: its dtype, None without; backward passes run under it as well.
        way: ``"group"``, ``"sequence"`` for hidden states that are sharded, ``"again"`` where these are gathered once
            more for the backward pass.
        adapter: whether the head has one.
        device: the default device.
        default: the default dtype.
    """

    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    autocast: torch.dtype | None = None
    way: str = "sequence"
    adapter: bool = False
    device: str = "cpu"
    default: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in (*self.dtypes, self.autocast, self.default))
        return f"{dtypes} {self.way} {self.device}{' adapter' if self.adapter else ''}"

    def tensors(self) -> dict[str, Tensor]:
        random = generator(1)
        sizes = {
            "input": (TOKENS, HIDDEN),
            "linear_weight": (VOCABULARY, HIDDEN),
            "low": (TOKENS, ADAPTER),
            "appended": (VOCABULARY, ADAPTER),
            "linear_bias": (VOCABULARY,),
            "weight": (VOCABULARY,),
        }
        made = {name: torch.randn(*size, generator=random) / 2 for name, size in sizes.items()}
        made["weight"] = made["weight"].abs()
        hidden, weight = self.dtypes
        dtypes = {"input": hidden, "low": hidden, "linear_weight": weight, "appended": weight}
        target = torch.randint(VOCABULARY, (TOKENS,), generator=random)
        target[::4] = -100
        return {**{name: tensor.to(dtypes.get(name, torch.float32)) for name, tensor in made.items()}, "target": target}

    def __call__(self, member: Member) -> Results:
        tensors = self.tensors()
        per_token = ("input", "low") if self.way != "group" else ()
        for name, tensor in tensors.items():
            sizes = ROWS if name in per_token else None if name in ("input", "low", "target") else ENTRIES
            tensors[name] = tensor if sizes is None else tensor.split(sizes)[member.rank].clone()
        options = {"group": member.group, "sequence_parallel": self.way != "group"}
        if self.way == "again":
            options["workspace"] = self.least_workspace(tensors, **options)
        return self.results(tensors, **options)

    def least_workspace(self, tensors: dict[str, Tensor], **options: Any) -> int:
        """With which there is no room for the hidden states of all ranks."""
        try:
            self.results(tensors, workspace=1, **options)
        except ValueError as error:
            return int(re.findall(r"at least (\d+)", str(error))[0])
        raise AssertionError("a workspace of one byte serves")

    def leaves(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is differentiated."""
        others = ("target", "weight") if self.adapter else ("target", "weight", "low", "appended")
        return {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in others}

    def results(self, tensors: dict[str, Tensor], **options: Any) -> Results:
        leaves = self.leaves(tensors)
        arguments = {**leaves, "target": tensors["target"], "weight": tensors["weight"]}
        adapter = tuple(arguments.pop(name) for name in ("low", "appended") if name in arguments) or None
        with surroundings(self), torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            loss = logitless.linear_cross_entropy(
                **arguments, adapter=adapter, reduction="none", label_smoothing=SMOOTHING, softcap=CAP, **options
            )
            gradients = torch.autograd.grad(loss, list(leaves.values()), upstream_for(loss))
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    def plain(self, dtype: torch.dtype) -> Results:
        """By plain operations of one process, products and what follows on them in one dtype."""
        tensors = self.tensors()
        if dtype == torch.float64:
            tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        leaves = self.leaves(tensors)
        cast = {name: leaf.to(dtype) for name, leaf in leaves.items()}
        hidden, weight = cast["input"], cast["linear_weight"]
        if self.adapter:
            hidden, weight = torch.cat((hidden, cast["low"]), 1), torch.cat((weight, cast["appended"]), 1)
        z = CAP * torch.tanh(F.linear(hidden, weight, cast["linear_bias"]) / CAP)
        wide = torch.promote_types(dtype, torch.float32)
        class_weight = tensors["weight"].to(wide)
        loss = F.cross_entropy(z.to(wide), tensors["target"], class_weight, reduction="none", label_smoothing=SMOOTHING)
        gradients = torch.autograd.grad(loss, list(leaves.values()), upstream_for(loss))
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


@contextmanager
def surroundings(called: Called) -> Iterator[None]:
    """Another default device and dtype."""
    torch.set_default_device(called.device)
    torch.set_default_dtype(called.default)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Unlike:
    """Autocast that ranks do not have alike."""

    by_rank: tuple[torch.dtype | None, torch.dtype | None]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"unlike {self.by_rank} {self.dtype}"

    def __call__(self, member: Member) -> Results:
        return Called((self.dtype, self.dtype), self.by_rank[member.rank])(member)


UNDER_AUTOCAST = [
    *(
        Called((hidden, weight), autocast, way, adapter)
        for hidden, weight in (
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.float16),
            (torch.float32, torch.bfloat16),
            (torch.float64, torch.float16),
        )
        for autocast in NARROW
        for way, adapter in (("group", True), ("sequence", False), ("sequence", True), ("again", False))
    )
]
ELSEWHERE = [
    Called((dtype, dtype), None, way, adapter, device, default)
    for device, default in (("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16)
    for way, adapter in (("group", False), ("sequence", True), ("again", False))
]
USUAL = [Called(called.dtypes, None, called.way, called.adapter) for called in ELSEWHERE[:6]]
UNLIKE = [
    Unlike(by_rank, dtype)
    for by_rank in ((None, torch.bfloat16), (torch.float16, None), (torch.float16, torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[workers.Outcome]]:
    """The outcomes of all cases by name and rank."""
    cases = {str(case): case for case in (*UNDER_AUTOCAST, *USUAL, *ELSEWHERE, *UNLIKE)}
    folder: Path = tmp_path_factory.mktemp("conditions")
    return workers.run(cases, 2, folder, LIMIT)


def joined(case: Called, outcomes: list[workers.Outcome]) -> Results:
    """The whole gradients, from ranks that have the same loss bit for bit."""
    first, second = workers.values(outcomes)
    assert torch.equal(first["loss"], second["loss"])
    whole = {}
    for name, value in first.items():
        if name == "loss" or (case.way == "group" and name in ("input", "low")):
            assert torch.equal(value, second[name]), name
            whole[name] = value
        else:
            whole[name] = torch.cat((value, second[name]))
    return whole


@pytest.mark.parametrize("case", UNDER_AUTOCAST, ids=str)
def test_autocast(ran, case):
    """No rank fails, and the errors are at most those of plain operations in autocast's dtype, or in fp64."""
    dtype = torch.float64 if torch.float64 in case.dtypes else case.autocast
    found, exact = joined(case, ran[str(case)]), case.plain(torch.float64)
    given = case.tensors()
    for name, value in case.plain(dtype).items():
        assert found[name].dtype == (torch.promote_types(dtype, torch.float32) if name == "loss" else given[name].dtype)
        error, allowed = ((of.double() - exact[name]).norm().item() for of in (found[name], value))
        rounding = 16 * torch.finfo(found[name].dtype).eps * exact[name].norm().item() if dtype == torch.float64 else 0
        assert error <= FACTOR * allowed + rounding, name


@pytest.mark.parametrize("case", UNLIKE, ids=str)
def test_ranks_agree_on_autocast(ran, case):
    """Also where products would have the same dtype without it."""
    for outcome in ran[str(case)]:
        assert "ValueError" in outcome.kinds, outcome.trace or "no error"
        assert "differ in autocast: rank 0: " in outcome.message


@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_defaults_change_nothing(ran, case):
    usual = Called(case.dtypes, None, case.way, case.adapter)
    expected, found = joined(usual, ran[str(usual)]), joined(case, ran[str(case)])
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
