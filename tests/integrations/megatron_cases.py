"""Megatron-core's own layers, models and data parallelism, with its loss and with ours: what processes run.

Megatron-core wants a GPU in a few places. Here it runs on the CPU, with these stand-ins:

- ``torch.cuda.current_device`` is the CPU, where its buffers and reduce-scatters are then allocated.
- Its tracker of CUDA's random state does nothing: all dropout is 0.
- ``Norm`` is PyTorch's layer norm: Megatron's own, without its fused kernels, refuses sequence parallelism.
- ``Fused`` is the CUDA extension that adds a weight's gradient to ``main_grad``: the same product, in two steps.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sharded import part
from torch import Tensor
from workers import Member

import logitless
import plain
from logitless.integrations import megatron as recipe
from problems import Problem, coarse, generator, make_problem
from test_sampled import DRAWS, THRESHOLD
from tolerance import Results, gradients, upstream_for

# Vocabulary entries with the padding, and without.
VOCABULARY, TOKENS_BELOW = 256, 203
BATCH, SEQUENCE, HIDDEN = 2, 8, 32


# --- Megatron-core on a CPU -------------------------------------------------------------------------------------------


class Norm(torch.nn.LayerNorm):
    """As Megatron's layer specs call for one."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class Fused:
    """The extension that ``gradient_accumulation_fusion`` needs."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        main_grad.add_(gradient.t().float() @ input.float())


@functools.cache
def stand_ins() -> None:
    """Once in a process."""
    warnings.simplefilter("ignore")
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core.tensor_parallel import layers, random

    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = Fused


def tensor_parallel(ranks: int) -> Any:
    """Megatron's tensor-parallel group of so many ranks; the others are data parallel."""
    stand_ins()
    from megatron.core import parallel_state

    if not parallel_state.is_initialized() or parallel_state.get_tensor_model_parallel_world_size() != ranks:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    return parallel_state.get_tensor_model_parallel_group()


def configuration(ranks: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=ranks,
        params_dtype=dtype,
        init_method=functools.partial(torch.nn.init.normal_, std=0.2),
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        **settings,
    )


# --- the head alone ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """``ColumnParallelLinear`` and loss, by Megatron and by us, with all gradients."""

    ranks: int
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    tied: bool = False
    bias: bool = False
    frozen: tuple[str, ...] = ()
    fusion: bool = False  # of gradient accumulation
    ignored: bool = False
    data: str = "random"
    options: tuple[tuple[str, Any], ...] = ()

    def problem(self) -> Problem:
        """The whole problem, [B, S] as labels are; V has padding, which is no label."""
        problem = make_problem(self.data, BATCH * SEQUENCE, HIDDEN, VOCABULARY)
        target = problem.target % TOKENS_BELOW
        if self.ignored:
            target = target.masked_fill(torch.arange(len(target)) % 3 == 1, -100)
        options: dict[str, Any] = {"reduction": "none", **dict(self.options)}
        if self.bias:
            options["linear_bias"] = torch.randn(
                VOCABULARY, generator=generator(2), dtype=torch.float64
            ).requires_grad_()
        shaped = replace(
            problem,
            input=problem.input.detach().view(BATCH, SEQUENCE, HIDDEN).requires_grad_(),
            target=target.view(BATCH, SEQUENCE),
            options=options,
        )
        return shaped.freeze(*self.frozen).to(self.dtype)

    def shard(self, rank: int) -> Problem:
        """What a rank has of it, hidden states as [S, B, D] or [S / T, B, D]."""
        problem, even = self.problem(), (1,) * self.ranks
        hidden = problem.input.detach().transpose(0, 1).contiguous().requires_grad_(problem.input.requires_grad)
        bias = {"linear_bias": part(problem.options["linear_bias"], even, rank)} if self.bias else {}
        return replace(
            problem,
            input=part(hidden, even, rank) if self.sequence_parallel else hidden,
            linear_weight=torch.nn.Parameter(
                part(problem.linear_weight, even, rank), requires_grad=problem.linear_weight.requires_grad
            ),
            options={**problem.options, **bias},
        )

    def layer(self, problem: Problem) -> Any:
        """Megatron's, with the weight of the problem, and its bias."""
        from megatron.core.tensor_parallel import ColumnParallelLinear

        settings = {"sequence_parallel": self.sequence_parallel, "gradient_accumulation_fusion": self.fusion}
        layer = ColumnParallelLinear(
            HIDDEN,
            VOCABULARY,
            config=configuration(self.ranks, self.dtype, **settings),
            init_method=torch.nn.init.zeros_,
            bias=self.bias,
            skip_weight_param_allocation=self.tied,
            tp_group=tensor_parallel(self.ranks),
        )
        if not self.tied:
            layer.weight = problem.linear_weight
        if self.bias:
            layer.bias = torch.nn.Parameter(problem.options["linear_bias"])
        return layer

    def megatron(self, layer: Any, hidden: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        logits, _ = layer(hidden, weight=weight)
        return vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous()).transpose(0, 1)

    def ours(self, layer: Any, hidden: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        return recipe.language_model_loss(layer, hidden, labels, weight=weight, **dict(self.options))

    def results(self, loss_of: Callable[..., Tensor], rank: int) -> Results:
        """Losses and gradients by name; those in ``main_grad`` under the weight's name."""
        problem = self.shard(rank)
        layer, weight = self.layer(problem), problem.linear_weight
        if self.fusion and weight.requires_grad:
            weight.main_grad = torch.ones(weight.shape)
            weight.grad_added_to_main_grad = False
        losses = loss_of(layer, problem.input, problem.target, weight if self.tied else None)
        leaves = {"input": problem.input, "linear_weight": weight, "linear_bias": layer.bias}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        losses.backward(upstream_for(losses))
        found = {name: leaf.grad for name, leaf in leaves.items()}
        if self.fusion and weight.requires_grad:
            assert weight.grad_added_to_main_grad
            found["linear_weight"] = weight.main_grad - 1
        return {"loss": losses.detach(), **found}

    def __call__(self, member: Member) -> dict[str, Results]:
        return {name: self.results(getattr(self, name), member.rank) for name in ("megatron", "ours")}


@dataclass(frozen=True)
class Draws:
    """Sampled gradients, one draw after another, on a vocabulary of a dozen blocks."""

    ranks: int
    sequence_parallel: bool = False
    tokens: int = 16
    hidden: int = 16
    vocabulary: int = 1574

    def head(self) -> Head:
        return Head(self.ranks, self.sequence_parallel, torch.float64)

    def problem(self) -> Problem:
        """[B, S] tokens, with B = 2."""
        problem = make_problem("random", self.tokens, self.hidden, self.vocabulary)
        hidden = problem.input.detach().view(BATCH, -1, self.hidden).requires_grad_()
        return replace(problem, input=hidden, target=problem.target.view(BATCH, -1)).with_options(reduction="none")

    def __call__(self, member: Member) -> Results:
        """DRAWS losses and gradients; those of the weight and of sharded hidden states are this rank's parts."""
        from megatron.core.tensor_parallel import ColumnParallelLinear

        problem, even = self.problem(), (1,) * self.ranks
        group = tensor_parallel(self.ranks)
        hidden = problem.input.detach().transpose(0, 1).contiguous().requires_grad_()
        hidden = part(hidden, even, member.rank) if self.sequence_parallel else hidden
        layer = ColumnParallelLinear(
            self.hidden,
            self.vocabulary,
            config=configuration(self.ranks, torch.float64, sequence_parallel=self.sequence_parallel),
            init_method=torch.nn.init.zeros_,
            bias=False,
            tp_group=group,
        )
        layer.weight = torch.nn.Parameter(part(problem.linear_weight, even, member.rank))
        sampled = logitless.Sampled(threshold=THRESHOLD, generator=generator(7 + member.rank))
        shard = Problem(hidden, layer.weight, problem.target, {})

        def draw() -> Results:
            losses = recipe.language_model_loss(layer, hidden, problem.target, gradient=sampled)
            return {"loss": losses.detach(), **gradients([losses], [upstream_for(losses)], shard)}

        drawn = [draw() for _ in range(DRAWS)]
        return {name: torch.stack([results[name] for results in drawn]) for name in drawn[0]}


@dataclass(frozen=True)
class SameDraw:
    """One draw through the recipe and one by a call of the library, from the same seeds."""

    ranks: int
    sequence_parallel: bool = False

    def __call__(self, member: Member) -> dict[str, Results]:
        head = Head(self.ranks, self.sequence_parallel)
        problem = head.shard(member.rank)
        layer = head.layer(problem)

        def sampled() -> logitless.Sampled:
            return logitless.Sampled(threshold=THRESHOLD, generator=generator(3 + member.rank))

        ours = recipe.language_model_loss(layer, problem.input, problem.target, gradient=sampled())
        direct = logitless.linear_cross_entropy(
            problem.input,
            layer.weight,
            problem.target.transpose(0, 1),
            reduction="none",
            gradient=sampled(),
            group=layer.tp_group,
            sequence_parallel=self.sequence_parallel,
        ).transpose(0, 1)
        upstream = upstream_for(direct)
        return {
            name: {"loss": losses.detach(), **gradients([losses], [upstream], problem)}
            for name, losses in (("recipe", ours), ("direct", direct))
        }


# --- a whole model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A ``GPTModel`` of one layer, forward and backward."""

    ranks: int
    sequence_parallel: bool = False
    tied: bool = False
    mtp: bool = False  # multi-token prediction
    fusion: bool = False
    data_parallel: str = ""  # Megatron's DistributedDataParallel: "plain", or "overlapping" its reductions
    micro_batches: int = 1

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The same numbers for any number of ranks, up to rounding."""
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

        tensor_parallel(self.ranks)
        settings = {"gradient_accumulation_fusion": self.fusion, "mtp_num_layers": 1 if self.mtp else None}
        settings |= {"mtp_loss_scaling_factor": 0.5} if self.mtp else {}
        config = configuration(self.ranks, dtype, sequence_parallel=self.sequence_parallel, **settings)
        layer = get_gpt_layer_local_spec()
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        heads = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if self.mtp else None
        if heads is not None:
            for head in heads.layer_specs:
                head.submodules.enorm = head.submodules.hnorm = head.submodules.layer_norm = Norm
        torch.manual_seed(0)
        return GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer], layer_norm=Norm),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            share_embeddings_and_output_weights=self.tied,
            position_embedding_type="rope",
            mtp_block_spec=heads,
        )

    def batch(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the model, and the loss mask, which leaves out some tokens and weighs the others."""
        tokens = torch.randint(TOKENS_BELOW, (BATCH, SEQUENCE + 1), generator=generator(number))
        arguments = {
            "input_ids": tokens[:, :-1],
            "position_ids": torch.arange(SEQUENCE).expand(BATCH, SEQUENCE),
            "attention_mask": torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None],
            "labels": tokens[:, 1:],
        }
        return arguments, coarse(BATCH, SEQUENCE, low=0, high=1, seed=50 + number).float()

    def trained(self, model: Any, first: int = 0) -> Results:
        """Losses and gradients of all micro-batches by name, of the parameters' shards."""
        wrapped = self.wrapped(model) if self.data_parallel else model
        losses = []
        for number in range(first, first + self.micro_batches):
            arguments, mask = self.batch(number)
            last = number == first + self.micro_batches - 1
            waiting = (
                wrapped.no_sync() if self.data_parallel == "overlapping" and not last else contextlib.nullcontext()
            )
            with waiting:
                losses.append(wrapped(**arguments))
                (losses[-1] * mask).sum().backward()
        if self.data_parallel:
            wrapped.finish_grad_sync()
        found = {name: self.gradient(parameter) for name, parameter in model.named_parameters()}
        return {"loss": torch.stack(losses).detach(), **found}

    def wrapped(self, model: Any) -> Any:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        overlapping = self.data_parallel == "overlapping"
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlapping)
        return DistributedDataParallel(model.config, settings, model)

    def gradient(self, parameter: Tensor) -> Tensor:
        if not self.data_parallel:
            return parameter.grad
        assert parameter.grad is None
        return parameter.main_grad.clone()

    def __call__(self, member: Member) -> dict[str, Any]:
        """By Megatron and by us, and how parameters are sharded."""
        first = member.rank * self.micro_batches if self.ranks < member.size else 0
        patched = recipe.patch(self.model())
        return {
            "megatron": self.trained(self.model(), first),
            "ours": self.trained(patched, first),
            "dimensions": {name: getattr(p, "partition_dim", -1) for name, p in patched.named_parameters()},
            "summed": [n for n, p in patched.named_parameters() if getattr(p, "sequence_parallel", False)],
        }


@dataclass(frozen=True)
class Single:
    """The same model on one rank with a loss of plain PyTorch, in fp64 and in fp32: what the others are held to.

    With several replicas their batches come one after another, and gradients are divided by their number.
    """

    case: Model
    replicas: int = 1

    def __call__(self, member: Member) -> dict[str, Results]:
        alone = replace(
            self.case,
            ranks=1,
            sequence_parallel=False,
            fusion=False,
            data_parallel="",
            micro_batches=self.case.micro_batches * self.replicas,
        )
        return {
            "exact": self.results(alone, torch.float64, "two_stage"),
            "accumulated": self.results(alone, torch.float32, "statistics"),
        }

    def results(self, alone: Model, dtype: torch.dtype, form: plain.Form) -> Results:
        model = alone.model(dtype)

        def loss(labels: Tensor, logits: Tensor) -> Tensor:
            scores, flat = logits.transpose(0, 1).flatten(0, 1), labels.flatten()
            if form == "two_stage":
                return F.cross_entropy(scores, flat, reduction="none").view(labels.shape)
            return (scores.logsumexp(1) - scores.gather(1, flat[:, None])[:, 0]).view(labels.shape)

        model.compute_language_model_loss = loss
        found = alone.trained(model)
        return {name: value if name == "loss" else value / self.replicas for name, value in found.items()}


@dataclass(frozen=True)
class Untouched:
    """What a patched model does without labels, and what its output layer and its hooks do with them."""

    ranks: int

    def __call__(self, member: Member) -> dict[str, Any]:
        case = Model(self.ranks)
        theirs, patched = case.model(), recipe.patch(case.model(), softcap=2.0)
        arguments, _ = case.batch(0)
        unlabelled = {name: value for name, value in arguments.items() if name != "labels"}
        layer, has_logits = patched.output_layer, []
        layer.register_forward_hook(lambda _, given, result: has_logits.append(isinstance(result[0], Tensor)))
        results = {"theirs": theirs(**unlabelled), "loss": theirs(**arguments), "before": patched(**unlabelled)}
        attributes = list(vars(layer))
        results["capped"] = patched(**arguments)
        results["uncapped"] = recipe.patch(patched)(**arguments)
        kept = list(vars(layer)) == attributes
        results["after"] = patched(**unlabelled)
        return {
            **{name: tensor.detach() for name, tensor in results.items()},
            "has logits": has_logits,
            "layer is as it was": kept,
            "same state": list(patched.state_dict()) == list(theirs.state_dict()),
        }


def evaluated(member: Member) -> dict[str, Tensor]:
    """Losses of an evaluation: there is no ``main_grad`` yet, and none is needed."""
    case = Head(member.size, fusion=True)
    problem = case.shard(member.rank)
    layer = case.layer(problem)
    with torch.no_grad():
        return {name: getattr(case, name)(layer, problem.input, problem.target, None) for name in ("megatron", "ours")}


@dataclass(frozen=True)
class SampledModel:
    """A patched model, with the exact gradient and with a sampled one from two seeds."""

    ranks: int
    sequence_parallel: bool

    def __call__(self, member: Member) -> list[Results]:
        case = Model(self.ranks, self.sequence_parallel, tied=True)

        def options(seed: int) -> dict[str, Any]:
            return {"gradient": logitless.Sampled(threshold=1 / 4, generator=generator(seed))}

        return [
            case.trained(recipe.patch(case.model(), **given))
            for given in ({}, options(1 + member.rank), options(1 + member.rank), options(11 + member.rank))
        ]


# --- mistakes ---------------------------------------------------------------------------------------------------------


class Lookalike(torch.Tensor):
    """A tensor that keeps its numbers in some other form, for all one knows."""


def head(change: Callable[..., Any] | None = None, **settings: Any) -> None:
    """A call for the loss of a layer, with one thing changed: an attribute, or an argument that it returns."""
    case = Head(1, **settings)
    problem = case.shard(0)
    layer = case.layer(problem)
    given = {"hidden": problem.input, "labels": problem.target, "weight": None}
    given.update((change(layer, problem) if change else None) or {})
    recipe.language_model_loss(given.pop("output_layer", layer), **given)


def with_attribute(name: str, value: Any) -> Callable[[Any, Problem], None]:
    def change(layer: Any, problem: Problem) -> None:
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, layer), last, value)

    return change


def with_main_grad(dtype: torch.dtype) -> Callable[[Any, Problem], None]:
    def change(layer: Any, problem: Problem) -> None:
        layer.weight.main_grad = torch.zeros(layer.weight.shape, dtype=dtype)

    return change


def of_fsdp(layer: Any, problem: Problem) -> None:
    layer.weight.__fsdp_param__ = True


def row_parallel(layer: Any, problem: Problem) -> dict[str, Any]:
    from megatron.core.tensor_parallel import RowParallelLinear

    options = {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
    other = RowParallelLinear(HIDDEN, VOCABULARY, config=layer.config, init_method=torch.nn.init.zeros_, **options)
    return {"output_layer": other}


def derived(layer: Any, problem: Problem) -> dict[str, Any]:
    layer.__class__ = type("LoRALinear", (type(layer),), {})
    return {}


def model(change: Callable[[Any], Any] | None = None, act: Callable[[Any], Any] | None = None, **options: Any) -> None:
    """A patched model, changed before, and used after."""
    stand_ins()
    built = Model(1).model()
    built = (change(built) if change else None) or built
    patched = recipe.patch(built, **options)
    if act:
        act(patched)


def configured(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


def own_loss(model: Any) -> None:
    def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        raise NotImplementedError

    model.__class__ = type("Own", (type(model),), {"compute_language_model_loss": compute_language_model_loss})


def hooked(model: Any) -> Any:
    """Logits that a hook scales, before the loss."""
    model.output_layer.register_forward_hook(lambda layer, given, result: (result[0] * 0.5, None))
    return model(**Model(1).batch(0)[0])


def looked_at(model: Any) -> Any:
    model.output_layer.register_forward_hook(lambda layer, given, result: (result[0].div(2), None))
    return model(**Model(1).batch(0)[0])


MISTAKES: dict[str, Callable[[], Any]] = {
    "another layer": lambda: head(row_parallel),
    "a layer derived": lambda: head(derived),
    "a plain layer": lambda: head(lambda layer, problem: {"output_layer": torch.nn.Linear(2, 3)}),
    "no group": lambda: head(lambda layer, problem: delattr(layer, "tp_group")),
    "experts": lambda: head(with_attribute("is_expert", True)),
    "no reduction": lambda: head(with_attribute("disable_grad_reduce", True)),
    "bias left to the caller": lambda: head(with_attribute("skip_bias_add", True), bias=True),
    "deferred": lambda: head(with_attribute("config.defer_embedding_wgrad_compute", True)),
    "no weight": lambda: head(lambda layer, problem: {"weight": None}, tied=True),
    "shape of the weight": lambda: head(lambda layer, problem: {"weight": problem.linear_weight[:-1]}),
    "kind of weight": lambda: head(lambda layer, p: {"weight": p.linear_weight.detach().as_subclass(Lookalike)}),
    "Megatron-FSDP": lambda: head(of_fsdp),
    "no main_grad": lambda: head(fusion=True),
    "bf16 main_grad": lambda: head(with_main_grad(torch.bfloat16), fusion=True),
    "labels not transposed": lambda: head(lambda layer, problem: {"labels": problem.target.t()}),
    "hidden flattened": lambda: head(lambda layer, problem: {"hidden": problem.input.flatten(0, 1)}),
    "unknown option": lambda: head(lambda layer, problem: {"zloss": 1.0}),
    "decided option": lambda: head(lambda layer, problem: {"reduction": "mean"}),
    "label outside": lambda: head(lambda layer, problem: {"labels": problem.target.fill_(VOCABULARY)}),
    "patch, unknown option": lambda: model(zloss=1.0),
    "patch, decided option": lambda: model(group=None),
    "patch, another model": lambda: recipe.patch(torch.nn.Linear(2, 3)),
    "patch, wrapped": lambda: model(lambda model: Model(1, data_parallel="plain").wrapped(model)),
    "patch, its own loss": lambda: model(own_loss),
    "patch, its own forward": lambda: model(lambda model: setattr(model, "forward", model.forward)),
    "patch, layer's own forward": lambda: model(lambda m: setattr(m.output_layer, "forward", m.output_layer.forward)),
    "patch, mup": lambda: model(configured("use_mup", True)),
    "patch, overlap": lambda: model(configured("overlap_moe_expert_parallel_comm", True)),
    "patch, logger": lambda: model(configured("config_logger_dir", "logged")),
    "patch, graph": lambda: model(configured("cuda_graph_scope", "full_iteration")),
    "patch, deferred": lambda: model(configured("defer_embedding_wgrad_compute", True)),
    "patched, inference": lambda: model(act=lambda m: m(**Model(1).batch(0)[0], inference_context=object())),
    "patched, logits": lambda: model(
        act=lambda m: m.compute_language_model_loss(torch.zeros(2, 3).long(), torch.ones(3))
    ),
    "patched, arithmetic": lambda: model(act=hooked),
    "patched, method": lambda: model(act=looked_at),
}


@dataclass(frozen=True)
class Mistake:
    name: str

    def __call__(self, member: Member) -> None:
        tensor_parallel(1)
        MISTAKES[self.name]()


@dataclass(frozen=True)
class OneRankErrs:
    """One rank's labels are not those of the others in shape."""

    sequence_parallel: bool

    def __call__(self, member: Member) -> None:
        case = Head(2, self.sequence_parallel)
        problem = case.shard(member.rank)
        labels = problem.target[:, :-1] if member.rank == 1 else problem.target
        recipe.language_model_loss(case.layer(problem), problem.input, labels)


def stages(member: Member) -> bool:
    """A pipeline's stage without an output layer is left alone."""
    tensor_parallel(member.size)
    model = Model(member.size).model()
    model.post_process = False
    return recipe.patch(model) is model and "forward" not in vars(model)
