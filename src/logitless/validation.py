"""Every message a caller can cause. Each names the argument, what was expected, what was given, and what to do."""

from __future__ import annotations

import math
import re

import torch

from logitless.dtensors import is_dtensor
from logitless.options import BACKENDS, ESTIMATED_OUTPUTS, REDUCTIONS, TOKEN_OUTPUTS, Sampled

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """The value is one of the names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_reduction(value: object) -> None:
    """A reduction."""
    check_choice("reduction", value, REDUCTIONS)


def check_backend(value: object) -> None:
    """A backend."""
    check_choice("backend", value, BACKENDS)


def check_outputs(outputs: object) -> tuple[str, ...]:
    """Names of per-token outputs, at least one, none twice."""
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list)):
        raise TypeError(f"outputs must be a tuple of names such as ('nll', 'entropy'), got {outputs!r}")
    if not outputs or len(set(outputs)) != len(outputs):
        raise ValueError(f"outputs must name at least one output and none twice, got {outputs!r}")
    for name in outputs:
        check_choice("each of outputs", name, TOKEN_OUTPUTS)
    return tuple(outputs)


def check_gradient(value: object) -> Sampled | None:
    """``"exact"`` as None, or the ``Sampled`` given."""
    if isinstance(value, Sampled):
        return value
    if value != "exact":
        hint = "; write Sampled()" if value is Sampled or value == "sampled" else ""
        raise ValueError(f"gradient must be 'exact' or a logitless.Sampled, got {value!r}{hint}")
    return None


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


def check_number(
    name: str, value: object, *, least: float = -math.inf, most: float = math.inf, above: float | None = None
) -> None:
    """A finite Python number within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    if not least <= value <= most:
        expected = f"at least {least}" if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_index(name: str, value: object) -> None:
    """An integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_size(name: str, value: int, *, least: int) -> None:
    """An integer size."""
    check_index(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_dtype(name: str, value: object) -> torch.dtype:
    """A floating dtype, given as such or by name."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in FLOATING:
        raise ValueError(f"{name} must be one of {', '.join(map(str, FLOATING))}, got {value!r}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_workspace(value: object) -> int | None:
    """Bytes: an int, text such as ``"512MiB"``, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", value.lower())
        unit = UNITS.get(match[2] or "b") if match else None
        if match is None or unit is None:
            raise ValueError(f"workspace must be bytes as an int or text such as '512MiB' or '2GB', got {value!r}")
        count = int(float(match[1]) * unit)
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        raise TypeError(f"workspace must be an int, text such as '512MiB', or None, got {type(value).__name__}")
    if count <= 0:
        raise ValueError(f"workspace must be greater than 0 bytes, got {value!r}; leave it None for the default policy")
    return count


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
    if weight.ndim != 2 or weight.shape[0] != linear_weight.shape[0]:
        expected = f"({linear_weight.shape[0]}, R)"
        raise ValueError(f"adapter[1] must have shape {expected}, rows as linear_weight, got {tuple(weight.shape)}")
    expected = (*input.shape[:-1], weight.shape[1])
    _shaped("adapter[0]", hidden, expected, "the leading shape of input, columns as adapter[1]")
    if main_grad is not None:
        raise ValueError("main_grad must be None with adapter, for it is a buffer of linear_weight's gradient alone")


def check_group(group: object, sequence_parallel: bool) -> None:
    """A process group that this rank is in, or None."""
    if group is None:
        if sequence_parallel:
            raise ValueError("sequence_parallel=True needs group=, the ranks that the rows of input are sharded over")
        return
    if not isinstance(group, torch.distributed.ProcessGroup):
        expected = "a torch.distributed.ProcessGroup or None"
        raise TypeError(f"group must be {expected}, got {type(group).__name__}; of a DeviceMesh take get_group()")
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


def _same_device(name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on the device of input, {input.device}, got {tensor.device}; move it there")


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


def check_weighting(name: str, value: object, input: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Class or token weights: floating, of that shape, not differentiated."""
    tensor = _tensor(name, value)
    _floating(name, tensor)
    _shaped(name, tensor, expected, meaning)
    _same_device(name, tensor, input)
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require grad, for the loss is not differentiable in it; pass {name}.detach()"
        )


def check_normalizer(value: object, reduction: str, input: torch.Tensor, *, tokens_apart: bool) -> None:
    """A number or scalar tensor, not negative, for the mean only.

    Where DTensors shard the tokens gradients are summed over the ranks, and a mean needs the number of all.
    """
    if value is None:
        if tokens_apart and reduction == "mean":
            raise ValueError(
                "normalizer must be given for reduction='mean' where DTensors shard the tokens, of which this rank "
                "knows its own: pass logitless.count_tokens(target, group=mesh.get_group(dimension)) of local targets"
            )
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer must be None with reduction={reduction!r}, got {value!r}; it replaces the count in 'mean'"
        )
    if isinstance(value, torch.Tensor):
        _shaped("normalizer", value, (), "a scalar")
        if value.requires_grad:
            raise ValueError("normalizer must not require grad; pass normalizer.detach()")
        if value.device.type != "cpu":  # asking an accelerator would stop the host
            _same_device("normalizer", value, input)
            return
        value = value.item()
    check_number("normalizer", value, least=0)


def check_target_type(target: object) -> None:
    """A tensor of integers."""
    if _tensor("target", target).dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(
            f"target must have an integer dtype (vocabulary indices), got {_tensor('target', target).dtype}"
        )


def check_targets_in_range(
    target: torch.Tensor,  # [N]
    vocabulary: int,
    ignore_index: int,
) -> None:
    """Every target lies in [0, V) or is ignored. Waits for the device of the targets."""
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target must lie in [0, {vocabulary}) or equal ignore_index={ignore_index}, got {int(target[first])} at "
            f"token {first} (of {target.shape[0]}, in row-major order)"
        )
