"""When logits were deferred, and whether they can still be computed: whether the head's weight is what it was then.

Two things tell. Parameters are tensors that count in a version how often they were written to. That misses what is
written through ``.data``, by kernels that PyTorch does not know, or to the shards that FSDP gathers from; so no logits
are computed once a backward pass through a trained head has begun, which any step has before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Tensors, each with its version; None where none is kept.
Parameters = tuple[tuple[Tensor, int | None], ...]


@dataclass
class Backward:
    """Backward passes through the heads of a model that are trained.

    Attributes:
        begun: how many.
    """

    begun: int = 0

    def watch(self, result: Tensor, heads: Iterable[nn.Linear]) -> None:
        """Count those through this result of heads.

        Under torch.compile none are: it would compile anew for each number.
        """
        if torch.compiler.is_compiling() or result.grad_fn is None:
            return
        if any(parameter.requires_grad for parameter in _tensors_of(heads)):
            result.grad_fn.register_prehook(self._count)

    def _count(self, gradients: Any) -> None:
        self.begun += 1


@dataclass
class Since:
    """The backward passes since a call of a model returned; those while it runs are not its own.

    Attributes:
        backward: of the model.
        begun: how many had begun then; None before, and under torch.compile.
    """

    backward: Backward
    begun: int | None = None

    def close(self) -> None:
        """The call has returned."""
        self.begun = self.backward.begun

    def any(self) -> bool:
        """Whether there was one."""
        return self.begun is not None and self.begun != self.backward.begun


@dataclass(frozen=True)
class Moment:
    """When logits were deferred.

    Attributes:
        recording: whether gradients were recorded.
        inference: whether in inference mode.
        parameters: tensors that the heads' parameters may be when the logits are computed, each with its version.
        since: backward passes since the call returned that they are of.
    """

    recording: bool
    inference: bool
    parameters: Parameters
    since: Since

    @classmethod
    def now(cls, parameters: Parameters, since: Since) -> Moment:
        """This one."""
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        return cls(torch.is_grad_enabled(), inference, parameters, since)

    def check(self, heads: Iterable[nn.Linear]) -> None:
        """Raise unless the heads' parameters are what they were.

        Raises:
            RuntimeError: they are others, or may be.
        """
        if self.since.any():
            raise RuntimeError(
                "logits: a backward pass through the head has begun since they were deferred, and a step after it may "
                "have changed its weight, so that they cannot be computed any more; use them before the backward pass, "
                "or call the model without labels"
            )
        for parameter, version in parameters_of(heads):
            if not any(parameter is other and version == then for other, then in self.parameters):
                raise RuntimeError(
                    "logits: the head's weight has changed since they were deferred (by a step, a new parameter, or "
                    "FSDP, which frees it), so that they cannot be computed any more; use them before, or call the "
                    "model without labels"
                )


def parameters_of(heads: Iterable[nn.Linear]) -> Parameters:
    """Those of linear layers, as they are now."""
    return tuple((parameter, _version(parameter)) for parameter in _tensors_of(heads))


def _tensors_of(heads: Iterable[nn.Linear]) -> Iterator[Tensor]:
    return (parameter for head in heads for parameter in (head.weight, head.bias) if parameter is not None)


def _version(tensor: Tensor) -> int | None:
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return None
    return tensor._version
