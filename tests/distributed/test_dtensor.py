"""DTensors, FSDP2 and parallelize_module: the results of one process, gradients placed like what was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import workers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from workers import CPU, Member, Outcome

import logitless
from problems import generator

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

BATCH, LENGTH, HIDDEN, VOCABULARY = 4, 6, 16, 301
TOKENS = BATCH * LENGTH
LIMIT = 120
OPTIONS = {"label_smoothing": 0.125, "z_loss": 2.0**-7, "softcap": 5.0}

Results = dict[str, Tensor]


def whole_problem(device: torch.device = CPU) -> dict[str, Tensor]:
    problem = {
        "input": torch.randn(TOKENS, HIDDEN, generator=generator(1)),
        "linear_weight": torch.randn(VOCABULARY, HIDDEN, generator=generator(2)),
        "target": torch.randint(VOCABULARY, (TOKENS,), generator=generator(3)),
        "linear_bias": torch.randn(VOCABULARY, generator=generator(4)),
        "weight": torch.rand(VOCABULARY, generator=generator(5)) + 0.5,
    }
    return {name: tensor.to(device) for name, tensor in problem.items()}


def alone(ignored: bool = False) -> Results:
    """The loss, over its sum of class weights, and gradients of one process in fp64; some tokens ignored, or none."""
    problem = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in whole_problem().items()
    }
    if ignored:
        problem["target"][::5] = -100
    leaves = {name: problem[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")}
    loss = logitless.linear_cross_entropy(**problem, **OPTIONS)
    loss.backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def placed(words: str) -> list[Placement]:
    """Placements by dimension: ``"0R"`` is sharded by rows over the first, the same on all ranks of the second."""
    return [Replicate() if letter == "R" else Shard(int(letter)) for letter in words]


@dataclass(frozen=True)
class Placed:
    """A call with DTensors: how hidden states and weight are placed on a mesh."""

    sizes: tuple[int, ...]
    hidden: str
    weight: str
    sequence_parallel: bool = False

    def __str__(self) -> str:
        kind = " sequence parallel" if self.sequence_parallel else ""
        return f"mesh {self.sizes}, hidden {self.hidden}, weight {self.weight}{kind}"

    def __call__(self, member: Member) -> Results:
        mesh = init_device_mesh(member.device.type, self.sizes)
        problem = whole_problem(member.device)
        total = logitless.count_tokens(problem["target"], weight=problem["weight"])
        # Targets go with the tokens, but are the same where hidden states are to be gathered.
        tokens = self.hidden
        if self.sequence_parallel and "0" in self.weight:
            gathered = self.weight.rindex("0")
            tokens = self.hidden[:gathered] + "R" + self.hidden[gathered + 1 :]
        vectors = dict.fromkeys(("linear_bias", "weight"), self.weight.replace("1", "R"))
        layouts = {"input": self.hidden, "target": tokens, "linear_weight": self.weight, **vectors}
        tensors = {name: distribute_tensor(tensor, mesh, placed(layouts[name])) for name, tensor in problem.items()}
        leaves = {name: tensors[name].detach().requires_grad_() for name in ("input", "linear_weight", "linear_bias")}
        loss = logitless.linear_cross_entropy(
            **{**tensors, **leaves}, normalizer=total, sequence_parallel=self.sequence_parallel, **OPTIONS
        )
        loss.backward()
        for name, leaf in leaves.items():
            assert isinstance(leaf.grad, DTensor)
            assert leaf.grad.placements == leaf.placements, name
        loss = loss.detach().clone()
        for dimension, letter in enumerate(tokens):
            if letter != "R":
                dist.all_reduce(loss, group=mesh.get_group(dimension))
        return {"loss": loss, **{name: leaf.grad.full_tensor() for name, leaf in leaves.items()}}


PLACED = {
    2: [
        Placed((2,), "R", "0"),
        Placed((2,), "R", "R"),
        Placed((2,), "0", "0"),
        Placed((2,), "0", "R"),
        Placed((2,), "0", "0", sequence_parallel=True),
        Placed((2,), "R", "1"),
        Placed((2,), "0", "R", sequence_parallel=True),  # with nothing to gather for
    ],
    4: [
        Placed((4,), "R", "0"),
        Placed((2, 2), "RR", "00"),
        Placed((2, 2), "0R", "00"),
        Placed((2, 2), "0R", "R0"),
        Placed((2, 2), "00", "00"),
        Placed((2, 2), "0R", "0R"),
        # The second dimension shards the vocabulary, over the first tokens are apart.
        Placed((2, 2), "00", "R0", sequence_parallel=True),
        Placed((2, 2), "00", "00", sequence_parallel=True),
        Placed((2, 2), "R0", "00", sequence_parallel=True),
        # The first does, and the second cuts its parts of the tokens again.
        Placed((2, 2), "00", "0R", sequence_parallel=True),
    ],
}


@dataclass(frozen=True)
class Rounded:
    """Hidden states [B, T, D] in bf16, sharded along a dimension and gathered: losses and statistics of each token.

    ``autocast`` is a narrow dtype that theirs is not; operands are rounded to it as in one process.
    """

    dimension: int
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return f"rounded {self.dimension}, autocast {self.autocast}"

    def tensors(self) -> dict[str, Tensor]:
        problem = whole_problem()
        weight = problem["linear_weight"] / 4
        shaped = {"input": (BATCH, LENGTH, HIDDEN), "target": (BATCH, LENGTH)}
        tensors = {name: problem[name].view(shape) for name, shape in shaped.items()}
        return {"input": tensors["input"].bfloat16(), "linear_weight": weight.bfloat16(), "target": tensors["target"]}

    def once(self, input: Any, linear_weight: Any, target: Any, device: str, **options: Any) -> Results:
        input = input.detach().requires_grad_()
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            nll = logitless.linear_cross_entropy(input, linear_weight, target, reduction="none", **options)
            statistics = logitless.token_statistics(input, linear_weight, target, **options)
        upstream = (torch.arange(nll.numel(), device=nll.device) % 5 - 2.0).view(nll.shape)  # tells tokens apart
        nll.backward(upstream)
        return {"nll": nll.detach(), "statistics": statistics.nll.detach(), "input": input.grad}

    def __call__(self, member: Member) -> Results:
        device = member.device.type
        mesh = init_device_mesh(device, (member.size,))
        tensors = {name: tensor.to(member.device) for name, tensor in self.tensors().items()}
        input = distribute_tensor(tensors["input"], mesh, [Shard(self.dimension)])
        weight = distribute_tensor(tensors["linear_weight"], mesh, [Shard(0)])
        found = self.once(input, weight, tensors["target"], device, sequence_parallel=True)
        return {**found, "input": found["input"].full_tensor()}

    def alone(self) -> Results:
        return self.once(**self.tensors(), device="cpu")

    def exact(self) -> Results:
        tensors = {name: t.double() if t.is_floating_point() else t for name, t in self.tensors().items()}
        return replace(self, autocast=None).once(**tensors, device="cpu")


ROUNDED = [Rounded(dimension, autocast) for dimension in (0, 1) for autocast in (None, torch.float16)]


class Model(nn.Module):
    """A block with a norm and a head, tied to the embedding or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor, **options: Any) -> Tensor:
        x = self.embedding(tokens)
        hidden = self.norm(x + self.down(torch.relu(self.up(x))))
        return logitless.linear_cross_entropy(hidden, self.head.weight, target, **options)


def text(device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator(8)).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients(model: nn.Module, loss: Tensor) -> Results:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    return {"loss": loss.detach(), **full}


def trained_alone(tied: bool) -> Results:
    model = Model(tied).double()
    loss = model(*text())
    loss.backward()
    return gradients(model, loss)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    """The plans of users: hidden states as plain tensors, the same on all ranks, or DTensors along the sequence."""
    layout = Shard(1) if sequence else Replicate()
    local = {"use_local_output": not sequence}
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=layout, **local),
        "up": ColwiseParallel(input_layouts=layout, **local),
        "down": RowwiseParallel(output_layouts=layout, **local),
        "head": ColwiseParallel(input_layouts=layout),
    }
    parallelize_module(model, mesh, {**plan, "norm": SequenceParallel()} if sequence else plan)


@dataclass(frozen=True)
class Trained:
    """A step of the model under tensor parallelism, FSDP2 or both."""

    data: int
    tensor: int
    tied: bool = False
    sequence: bool = False

    def __str__(self) -> str:
        words = [f"data {self.data}, tensor {self.tensor}", *(n for n in ("tied", "sequence") if getattr(self, n))]
        return ", ".join(words)

    def __call__(self, member: Member) -> Results:
        mesh = init_device_mesh(member.device.type, (self.data, self.tensor), mesh_dim_names=("data", "tensor"))
        model, (tokens, target) = Model(self.tied).to(member.device), text(member.device)
        if self.tensor > 1:
            tensor_parallel(model, mesh["tensor"], self.sequence)
            if self.tied:
                model.head.weight = model.embedding.weight
        options: dict[str, Any] = {"sequence_parallel": self.sequence}
        if self.tensor > 1 and not self.sequence:
            options["group"] = mesh.get_group("tensor")
        if self.data > 1:
            fully_shard(model, mesh=mesh["data"])
            here = mesh.get_local_rank("data")
            rows = slice(here * BATCH // self.data, (here + 1) * BATCH // self.data)
            tokens, target = tokens[rows], target[rows]
        # FSDP averages gradients over its ranks, so a mean over local tokens becomes one over all.
        loss = model(tokens, target, **options)
        loss.backward()
        mean = loss.detach().clone()
        if self.data > 1:
            dist.all_reduce(mean, group=mesh.get_group("data"))
        return gradients(model, mean / self.data)


TRAINED = {
    2: [Trained(1, 2), Trained(1, 2, tied=True), Trained(1, 2, sequence=True), Trained(2, 1), Trained(2, 1, tied=True)],
    4: [Trained(2, 2), Trained(2, 2, tied=True), Trained(2, 2, sequence=True)],
}


@dataclass(frozen=True)
class Arriving:
    """Hidden states straight from a layer whose all-reduce may still run, as a plain tensor and as a DTensor."""

    def __call__(self, member: Member) -> list[Results]:
        mesh = init_device_mesh(member.device.type, (member.size,))
        return [self.once(mesh, plain_output) for plain_output in (True, False)]

    def once(self, mesh: DeviceMesh, plain_output: bool) -> Results:
        device = torch.device(mesh.device_type)
        body, weight = self.body().to(device), whole_problem(device)["linear_weight"]
        last = RowwiseParallel(output_layouts=Replicate(), use_local_output=plain_output)
        parallelize_module(body, mesh, {"0": ColwiseParallel(), "1": last})
        weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        tokens = {name: whole_problem(device)[name] for name in ("input", "target")}
        group = mesh.get_group() if plain_output else None
        loss = logitless.linear_cross_entropy(body(tokens["input"]), weight, tokens["target"], group=group)
        loss.backward()
        inner = body[0].weight.grad.full_tensor()
        return {"loss": loss.detach(), "linear_weight": weight.grad.full_tensor(), "inner": inner}

    def body(self) -> nn.Sequential:
        torch.manual_seed(9)
        return nn.Sequential(nn.Linear(HIDDEN, 32, bias=False), nn.Linear(32, HIDDEN, bias=False))

    def alone(self) -> Results:
        body, problem = self.body().double(), whole_problem()
        weight = problem["linear_weight"].double().requires_grad_()
        loss = logitless.linear_cross_entropy(body(problem["input"].double()), weight, problem["target"])
        loss.backward()
        return {"loss": loss.detach(), "linear_weight": weight.grad, "inner": body[0].weight.grad}


@dataclass(frozen=True)
class Refused:
    """Calls that do not say what they mean."""

    def __call__(self, member: Member) -> list[str]:
        mesh = init_device_mesh(member.device.type, (member.size,))
        problem = whole_problem(member.device)
        weight = distribute_tensor(problem["linear_weight"], mesh, [Shard(0)])
        hidden = distribute_tensor(problem["input"], mesh, [Replicate()])
        across = distribute_tensor(problem["input"], mesh, [Shard(1)])
        apart, target = (distribute_tensor(problem[name], mesh, [Shard(0)]) for name in ("input", "target"))
        calls = [
            (problem["input"], weight, problem["target"]),
            (hidden, problem["linear_weight"], problem["target"]),
            (across, weight, problem["target"]),
            (apart, weight, target),
        ]
        messages = [message_of(lambda call=call: logitless.linear_cross_entropy(*call)) for call in calls]
        return [*messages, message_of(lambda: logitless.count_tokens(target))]


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@dataclass(frozen=True)
class Counting:
    """Tokens that ranks have of their own, counted together, and micro-batches accumulated."""

    def __call__(self, member: Member) -> Results:
        problem = whole_problem(member.device)
        problem["target"][::5] = -100
        leaves = {name: problem[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")}
        own = slice(member.rank * TOKENS // member.size, (member.rank + 1) * TOKENS // member.size)
        target = problem["target"][own]
        total = logitless.count_tokens(target, weight=problem["weight"], group=member.group)
        others = {name: problem[name] for name in ("linear_weight", "linear_bias", "weight")}
        loss = torch.zeros((), device=member.device)
        for rows in (slice(0, 3), slice(3, None)):
            part = logitless.linear_cross_entropy(
                leaves["input"][own][rows], target=target[rows], normalizer=total, **others, **OPTIONS
            )
            part.backward()
            loss += part.detach()
        results = {"loss": loss, **{name: leaf.grad for name, leaf in leaves.items()}}
        for tensor in results.values():
            dist.all_reduce(tensor, group=member.group)
        return results


def cases_of(size: int) -> dict[str, Callable[[Member], Any]]:
    cases = [*PLACED[size], *TRAINED[size], *ROUNDED, Arriving(), Refused(), Counting()]
    return {str(case) if isinstance(case, (Placed, Trained, Rounded)) else type(case).__name__: case for case in cases}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Outcome]]]:
    """The outcomes of one world's cases by name and rank."""

    @lru_cache
    def run(size: int) -> dict[str, list[Outcome]]:
        return workers.run(cases_of(size), size, tmp_path_factory.mktemp(f"dtensor{size}"), LIMIT)

    return run


def check(found: Results, expected: Results) -> None:
    """Within fp32's rounding of sums of some hundred terms; a gradient counted twice or not at all is far beyond."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error <= 64 * torch.finfo(torch.float32).eps, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", [case for size in PLACED for case in PLACED[size]], ids=str)
def test_placements(ran, case):
    size = 2 if case in PLACED[2] else 4
    for found in workers.values(ran(size)[str(case)]):
        check(found, alone())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_gathered_hidden_states_in_bf16(ran, size, case):
    """Each token has its own numbers, and gradients are rounded once, after the sum: the error is one process's."""
    exact, alone = case.exact(), case.alone()
    results = workers.values(ran(size)[str(case)])
    for found in results:
        for name, value in exact.items():
            error, allowed = ((of[name].double() - value).norm().item() for of in (found, alone))
            # Of numbers in fp32, whose own error is that of an order of additions, by the size of the logits.
            rounding = 0.0 if name == "input" else 4 * torch.finfo(torch.float32).eps * value.norm().item()
            assert error <= 1.1 * allowed + rounding, f"{name}: {error:.2e}, alone {allowed:.2e}"
            assert torch.equal(found[name], results[0][name]), name


@pytest.mark.parametrize("case", [case for size in TRAINED for case in TRAINED[size]], ids=str)
def test_training(ran, case):
    size = 2 if case in TRAINED[2] else 4
    for found in workers.values(ran(size)[str(case)]):
        check(found, trained_alone(case.tied))


def test_hidden_states_on_their_way(ran):
    for both in workers.values(ran(2)["Arriving"]):
        for found in both:
            check(found, Arriving().alone())


def test_what_is_refused(ran):
    for plain_hidden, plain_weight, across, apart, counted in workers.values(ran(2)["Refused"]):
        assert plain_hidden.startswith("TypeError: input must be a DTensor where linear_weight is one")
        assert "group=mesh.get_group" in plain_hidden
        assert plain_weight.startswith("TypeError: linear_weight must be a DTensor where another argument is one")
        assert across.startswith("ValueError: input must not be sharded along D")
        assert apart.startswith("ValueError: normalizer must be given for reduction='mean'")
        assert "logitless.count_tokens(target, group=mesh.get_group(dimension))" in apart
        assert counted.startswith("TypeError: target and weight must be plain tensors, got a DTensor")


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_counted_together(ran, size):
    """Losses and gradients of parts, each over the count of all tokens, add up to those of one call."""
    for found in workers.values(ran(size)["Counting"]):
        check(found, alone(ignored=True))
