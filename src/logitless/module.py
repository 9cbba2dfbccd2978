"""``LinearCrossEntropyLoss``: the options of ``linear_cross_entropy``, held by a module."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch

from logitless import validation
from logitless.calls import Adapter, Normalizer
from logitless.functional import linear_cross_entropy
from logitless.transforms import refuse_script

_TENSORS_OF_A_CALL = {
    "input",
    "linear_weight",
    "target",
    "linear_bias",
    "token_weight",
    "normalizer",
    "main_grad",
    "adapter",
}
_PARAMETERS = [
    parameter
    for name, parameter in inspect.signature(linear_cross_entropy).parameters.items()
    if name not in _TENSORS_OF_A_CALL
]
_OPTIONS = {parameter.name: parameter.default for parameter in _PARAMETERS}


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of a linear head, as a module; see ``linear_cross_entropy`` for every option.

    The head's weight stays with the model and is given to each call, so that tied weights and sharding stay what they
    are. ``weight``, the class weights, is a buffer and moves with the module.

    Args:
        **options: keyword options of ``linear_cross_entropy`` but for ``linear_bias``, ``token_weight``,
            ``normalizer``, ``main_grad`` and ``adapter``, which belong to a call.

    Raises:
        TypeError, ValueError: an unknown option, or as ``linear_cross_entropy`` for one that it would refuse whatever
            its tensors are.
    """

    weight: torch.Tensor | None
    __signature__ = inspect.Signature(_PARAMETERS)

    def __init__(self, **options: Any) -> None:
        """Hold the options."""
        super().__init__()
        unknown = sorted(options.keys() - _OPTIONS.keys())
        if unknown:
            raise TypeError(f"LinearCrossEntropyLoss has no option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}")
        validation.check_options(options)
        weight = options.pop("weight", None)
        self.register_buffer("weight", None if weight is None else validation.check_class_weight(weight))
        self.options = options

    def forward(
        self,
        input: torch.Tensor,  # [..., D]
        linear_weight: torch.Tensor,  # [V, D]
        target: torch.Tensor,  # [...]
        linear_bias: torch.Tensor | None = None,  # [V]
        token_weight: torch.Tensor | None = None,  # [...]
        normalizer: Normalizer = None,
        main_grad: torch.Tensor | None = None,  # [V, D]
        adapter: Adapter | None = None,
    ) -> torch.Tensor:
        """The loss; arguments as in ``linear_cross_entropy``."""
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            normalizer=normalizer,
            main_grad=main_grad,
            adapter=adapter,
            **self.options,
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """Say that TorchScript is not supported."""
        refuse_script()

    def extra_repr(self) -> str:
        """The options that differ from the default."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value != _OPTIONS[name])
