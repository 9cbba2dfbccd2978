"""Every message a caller can cause. Each names the argument, what was expected, what was given, and what to do."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch

from logitless.arguments import INT64_MOST, check_choice, check_flag, check_index, check_number, shown
from logitless.dtensors import is_dtensor
from logitless.options import BACKENDS, ESTIMATED_OUTPUTS, REDUCTIONS, TOKEN_OUTPUTS, Reduction, Sampled
from logitless.transforms import check_differentiation, check_transforms

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHORT_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, *UNSIGNED)
# A letter alone is a binary unit, as it is to Docker, Slurm and the Java machine.
UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{unit: 1024**power for power, letter in enumerate("kmgt", 1) for unit in (letter, f"{letter}ib")},
}


# Digits of a number of bytes, leading zeros and those after the point included.
LONGEST_NUMBER = 100


def check_reduction(value: object) -> Reduction:
    """A reduction."""
    return check_choice("reduction", value, REDUCTIONS)


def check_backend(value: object) -> str:
    """A backend."""
    return check_choice("backend", value, BACKENDS)


def check_outputs(outputs: object) -> tuple[str, ...]:
    """Names of per-token outputs, at least one, none twice."""
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"outputs must be a tuple of names such as ('nll', 'entropy'), got {shown(outputs)}")
    names = tuple(check_choice("each of outputs", name, TOKEN_OUTPUTS) for name in outputs)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"outputs must name at least one output and none twice, got {shown(outputs)}")
    return names


def check_gradient(value: object) -> Sampled | None:
    """``"exact"`` as None, or the ``Sampled`` given."""
    if isinstance(value, Sampled):
        return value
    if not isinstance(value, str) or value != "exact":
        hint = "; write Sampled()" if value is Sampled or (isinstance(value, str) and value == "sampled") else ""
        raise ValueError(f"gradient must be 'exact' or a logitless.Sampled, got {shown(value)}{hint}")
    return None


def check_group_type(value: object) -> None:
    """A process group, or None."""
    if value is not None and not isinstance(value, torch.distributed.ProcessGroup):
        expected = "a torch.distributed.ProcessGroup or None"
        raise TypeError(f"group must be {expected}, got {type(value).__name__}; of a DeviceMesh take get_group()")


def check_scan(gradient: Sampled | None, outputs: tuple[str, ...], *, sharded: bool) -> None:
    """Refuse what a scan in fewer bits does not know: some per-token outputs, and other ranks' shards."""
    if gradient is None or gradient.scan == "input":
        return
    if sharded:
        raise ValueError(f"Sampled(scan={gradient.scan!r}) is not supported with group=: use Sampled(scan='input')")
    unknown = [name for name in outputs if name not in ESTIMATED_OUTPUTS]
    if unknown:
        raise ValueError(
            f"outputs={unknown[0]!r} needs every logit in full, and Sampled(scan={gradient.scan!r}) computes those of "
            "the blocks it keeps: use Sampled(scan='input')"
        )


def check_softcap(value: object) -> float | None:
    """The bound of the logits, or None."""
    return None if value is None else check_number("softcap", value, above=0, underflows=False)


def check_logit_scale(value: object) -> float:
    """The factor of the products."""
    return check_number("logit_scale", value)


def check_ignore_index(value: object) -> int:
    """The target of tokens that do not count."""
    return check_index("ignore_index", value)


def check_label_smoothing(value: object) -> float:
    """The share of the labels that is spread over the vocabulary."""
    return check_number("label_smoothing", value, least=0, most=1)


def check_z_loss(value: object) -> float:
    """The coefficient of the squared logsumexp."""
    return check_number("z_loss", value, least=0)


def check_dtype(name: str, value: object) -> torch.dtype:
    """A floating dtype, given as such or by name."""
    dtype = value
    if isinstance(value, str):
        dtype = SHORT_NAMES.get(value) or getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise ValueError(f"{name} must be one of {', '.join(map(str, FLOATING))}, got {shown(value)}")
    return dtype


def dtype_name(name: str) -> str:
    """PyTorch's name of a dtype that may have been given by its short one."""
    return str(SHORT_NAMES.get(name, name)).removeprefix("torch.")


def check_device(name: str, value: object) -> torch.device:
    """A device of PyTorch, given as such or by name; whether it is there is another question."""
    if isinstance(value, torch.device):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a torch.device or its name, got {type(value).__name__}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must be a device such as 'cpu' or 'cuda:0', got {shown(value)}") from error


def check_workspace(value: object) -> int | None:
    """Bytes: an int, text such as ``"512MiB"``, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        count = _bytes(value)
    elif isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"workspace must be an int, text such as '512MiB', or None, got {type(value).__name__}")
    else:
        count = int(value)
    if count <= 0:
        raise ValueError(
            f"workspace must be greater than 0 bytes, got {shown(value)}; leave it None for the default policy"
        )
    if count > INT64_MOST:
        raise ValueError(f"workspace must be less than 2**63 bytes, got {shown(value)}")
    return count


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)\s*", text.lower())
    unit = UNITS.get(match[2] or "b") if match else None
    if match is None or unit is None:
        raise ValueError(f"workspace must be bytes as an int or text such as '512MiB' or '2GB', got {shown(text)}")
    if len(match[1]) > LONGEST_NUMBER:
        raise ValueError(f"workspace must be a number of at most {LONGEST_NUMBER} digits, got {shown(text)}")
    return int(Fraction(match[1]) * unit)


# Options that say all by themselves, whatever tensors a call has.
OPTIONS: dict[str, Callable[[Any], object]] = {
    "reduction": check_reduction,
    "ignore_index": check_ignore_index,
    "label_smoothing": check_label_smoothing,
    "z_loss": check_z_loss,
    "softcap": check_softcap,
    "logit_scale": check_logit_scale,
    "gradient": check_gradient,
    "workspace": check_workspace,
    "backend": check_backend,
    "group": check_group_type,
    "sequence_parallel": lambda value: check_flag("sequence_parallel", value),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Those of ``linear_cross_entropy``'s options that are there, before there is a call."""
    for name, value in options.items():
        if name in OPTIONS:
            OPTIONS[name](value)
    check_scan(check_gradient(options.get("gradient", "exact")), (), sharded=options.get("group") is not None)


def check_main_grad(main_grad: object, linear_weight: torch.Tensor) -> None:
    """An fp32 tensor in the weight's shape, on its device."""
    if not isinstance(main_grad, torch.Tensor):
        raise TypeError(f"main_grad must be a torch.Tensor or None, got {type(main_grad).__name__}")
    expected = tuple(linear_weight.shape)
    if tuple(main_grad.shape) != expected:
        raise ValueError(f"main_grad must have shape {expected}, that of linear_weight, got {tuple(main_grad.shape)}")
    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad must be torch.float32, got {main_grad.dtype}; it accumulates many steps")
    if main_grad.device != linear_weight.device:
        raise ValueError(f"main_grad must be on {linear_weight.device} like linear_weight, got {main_grad.device}")
    if not main_grad.is_contiguous():
        raise ValueError("main_grad must be contiguous, got strides " + str(main_grad.stride()))


def check_adapter(
    adapter: object, input: torch.Tensor, linear_weight: torch.Tensor, main_grad: torch.Tensor | None
) -> None:
    """Hidden states and weight of a low-rank adapter, or None."""
    if adapter is None:
        return
    if not isinstance(adapter, (tuple, list)) or len(adapter) != 2:
        raise TypeError(f"adapter must be a pair of tensors, hidden states and weight, got {type(adapter).__name__}")
    hidden, weight = adapter
    for name, tensor in (("adapter[0]", hidden), ("adapter[1]", weight)):
        _floating(name, _tensor(name, tensor))
        if is_dtensor(tensor):
            raise TypeError(f"{name} must be a plain tensor, got a DTensor; pass its to_local()")
        _same_device(name, tensor, input)
        check_differentiation(name, tensor)
    if weight.ndim != 2 or weight.shape[0] != linear_weight.shape[0]:
        expected = f"({linear_weight.shape[0]}, R)"
        raise ValueError(f"adapter[1] must have shape {expected}, rows as linear_weight, got {tuple(weight.shape)}")
    expected = (*input.shape[:-1], weight.shape[1])
    _shaped("adapter[0]", hidden, expected, "the leading shape of input, columns as adapter[1]")
    if main_grad is not None:
        raise ValueError("main_grad must be None with adapter, for it is a buffer of linear_weight's gradient alone")


def check_group(group: torch.distributed.ProcessGroup | None, sequence_parallel: bool) -> None:
    """A process group that this rank is in, or None."""
    check_group_type(group)
    check_flag("sequence_parallel", sequence_parallel)
    if group is None:
        if sequence_parallel:
            raise ValueError("sequence_parallel=True needs group=, the ranks that the rows of input are sharded over")
        return
    if group.rank() < 0:
        raise ValueError("group must be one that this rank is in")
    if torch.compiler.is_compiling():
        raise NotImplementedError("group= is not supported under torch.compile; call this loss outside of it")


def _tensor(name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def _floating(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must have dtype {', '.join(map(str, FLOATING))}, got {tensor.dtype}")


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Two tensors on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}; move it there"
        )


def _same_device(name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    check_same_device(name, tensor, "input", input)


def _shaped(name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} ({meaning}), got {tuple(tensor.shape)}")


def check_head(
    input: object,
    linear_weight: object,
    target: object,
    linear_bias: object,
    *,
    least_vocabulary: int = 1,
    sharded_rows: bool = False,
) -> None:
    """Types, dtypes, devices and shapes of hidden states, head and targets."""
    check_transforms()
    input, linear_weight, target = (
        _tensor("input", input),
        _tensor("linear_weight", linear_weight),
        _tensor("target", target),
    )
    _floating("input", input)
    _floating("linear_weight", linear_weight)
    if input.ndim < 1 or linear_weight.ndim != 2:
        name, tensor, expected = (
            ("input", input, "[..., D]") if input.ndim < 1 else ("linear_weight", linear_weight, "[V, D]")
        )
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input and linear_weight must agree in their last dimension D, got input {tuple(input.shape)} and "
            f"linear_weight {tuple(linear_weight.shape)}"
        )
    if linear_weight.shape[0] < least_vocabulary or linear_weight.shape[1] == 0:
        raise ValueError(f"linear_weight must have V >= 1 rows and D >= 1 columns, got {tuple(linear_weight.shape)}")
    check_target_type(target)
    if not sharded_rows:
        _shaped("target", target, tuple(input.shape[:-1]), "the leading shape of input")
    elif target.ndim != input.ndim - 1 or target.shape[1:] != input.shape[1:-1]:
        raise ValueError(
            "target must have the leading shape of input but for the first dimension, along which input is sharded "
            f"with sequence_parallel=True, got target {tuple(target.shape)} and input {tuple(input.shape)}; bring the "
            "sharded dimension to the front, or flatten both in rank order"
        )
    _same_device("linear_weight", linear_weight, input)
    _same_device("target", target, input)
    if linear_bias is not None:
        linear_bias = _tensor("linear_bias", linear_bias)
        _floating("linear_bias", linear_bias)
        _shaped("linear_bias", linear_bias, (linear_weight.shape[0],), "the rows of linear_weight")
        _same_device("linear_bias", linear_bias, input)
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None:
            check_differentiation(name, tensor)


def check_weighting(name: str, value: object, input: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Class or token weights: floating, of that shape, not differentiated."""
    tensor = _tensor(name, value)
    _floating(name, tensor)
    _shaped(name, tensor, expected, meaning)
    _same_device(name, tensor, input)
    _constant(name, tensor)


def _constant(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require grad, for the loss is not differentiable in it; pass {name}.detach()"
        )
    check_differentiation(name, tensor)


def check_class_weight(value: object) -> torch.Tensor:
    """Class weights [V] of a head that is not known yet."""
    tensor = _tensor("weight", value)
    _floating("weight", tensor)
    if tensor.ndim != 1:
        raise ValueError(f"weight must have shape [V], got {tuple(tensor.shape)}")
    _constant("weight", tensor)
    return tensor


def check_normalizer(
    value: object, reduction: str, input: torch.Tensor, *, tokens_sharded: bool
) -> torch.Tensor | float | None:
    """A number or scalar tensor, not negative, for the mean only.

    Where DTensors shard the tokens gradients are summed over the ranks, and a mean needs the number of all.
    """
    if value is None:
        if tokens_sharded and reduction == "mean":
            raise ValueError(
                "normalizer must be given for reduction='mean' where DTensors shard the tokens, of which this rank "
                "knows its own: pass logitless.count_tokens(target, group=mesh.get_group(dimension)) of local targets"
            )
        return None
    if reduction != "mean":
        raise ValueError(
            f"normalizer must be None with reduction={reduction!r}, got {shown(value)}; it replaces the count in 'mean'"
        )
    if not isinstance(value, torch.Tensor):
        return check_number("normalizer", value, least=0, underflows=False)
    _shaped("normalizer", value, (), "a scalar")
    if value.requires_grad:
        raise ValueError("normalizer must not require grad; pass normalizer.detach()")
    check_differentiation("normalizer", value)
    if value.device.type != "cpu":  # a value read from an accelerator would be a host-device synchronization
        _same_device("normalizer", value, input)
    elif not torch.compiler.is_compiling():  # a graph knows no values
        check_number("normalizer", value.item(), least=0)
    return value


def check_target_type(target: object) -> torch.Tensor:
    """A tensor of integers."""
    target = _tensor("target", target)
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must have an integer dtype (vocabulary indices), got {target.dtype}")
    return target


def indices(
    target: torch.Tensor,  # [...]
    ignore_index: int,
) -> torch.Tensor:
    """[N] int64, contiguous, in row-major order; what int64 cannot hold becomes an index out of range, not ignored."""
    flat = target.detach().reshape(-1).long().contiguous()
    if target.dtype != torch.uint64:
        return flat
    return flat.masked_fill(flat < 0, -1 if ignore_index != -1 else -2)


def check_targets_in_range(
    target: torch.Tensor,  # [...]
    vocabulary: int,
    ignore_index: int,
) -> None:
    """Every target lies in [0, V) or is ignored. Waits for the device of the targets."""
    flat = indices(target, ignore_index)
    wrong = ((flat < 0) | (flat >= vocabulary)) & (flat != ignore_index)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target must lie in [0, {vocabulary}) or equal ignore_index={ignore_index}, got "
            f"{target.detach().reshape(-1)[first].item()} at token {first} (of {flat.shape[0]}, in row-major order)"
        )
