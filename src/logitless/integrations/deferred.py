"""Logits that are not computed until somebody needs one: what a patched head hands to its model's own code.

``DeferredLogits`` remembers what they would be, ``bound * tanh(sum_i factor_i (hidden_i W_i^T + bias_i) / bound)``, or
the sum alone where nothing bounds it, and follows the model through what models do between head and loss: casts,
scales, a softcap, the shift by a token, flattening, the sum of a head and its low-rank adapter. Cross-entropy of them
is ``linear_cross_entropy``. Anything else gets the real logits, computed then, so that results are never wrong; only
the memory is spent after all.

N tokens of any leading shape, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitless.functional import linear_cross_entropy
from logitless.integrations.moment import Moment


@dataclass(frozen=True)
class Term:
    """One product that logits are the sum of.

    Attributes:
        hidden: [..., D].
        head: a linear layer, weight [V, D] and perhaps a bias [V].
        vocabulary: V, of the weight when the logits were deferred; it may be sharded since.
        factor: of the product and of the bias.
    """

    hidden: Tensor
    head: nn.Linear
    vocabulary: int
    factor: float = 1.0


@dataclass
class Record:
    """What became of the deferred logits of a call of a model.

    Attributes:
        losses: the scale and the bound of the logits of each cross-entropy that was computed without them.
        computed: the operation that each time needed the real ones.
    """

    losses: list[tuple[float, float | None]] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)


class DeferredLogits:
    """[..., V] logits, not computed; see the module.

    Any attribute, operator or torch function that is not among the ones followed computes the real logits, once, and
    goes on with these.
    """

    def __init__(
        self,
        terms: tuple[Term, ...],
        dtype: torch.dtype,
        options: dict[str, Any],
        record: Record,
        moment: Moment,
        bound: float | None = None,
    ) -> None:
        """Logits of the terms as a tensor of ``dtype``, deferred at ``moment``.

        ``options`` are those of ``linear_cross_entropy``; what becomes of the logits is written down in ``record``.
        """
        self._terms, self._bound = terms, bound
        self._options, self._record, self._moment = options, record, moment
        self._tensor: Tensor | None = None
        self._shared = False  # rows taken from these, or these from others
        self.dtype = dtype

    # --- what they would be -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """[..., V]."""
        first = self._terms[0]
        return torch.Size((*first.hidden.shape[:-1], first.vocabulary))

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self._terms[0].hidden.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._terms[0].hidden.ndim

    @property
    def bound(self) -> float | None:
        """The softcap, or None."""
        return self._bound

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        """As of a tensor."""
        return self.shape[0]

    def __repr__(self) -> str:
        """Says that they are not computed."""
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    # --- what models do with them -------------------------------------------------------------------------------------

    def _like(self, **changes: Any) -> DeferredLogits:
        known: dict[str, Any] = {"terms": self._terms, "dtype": self.dtype, "bound": self._bound}
        known |= {"options": self._options, "record": self._record, "moment": self._moment}
        return type(self)(**(known | changes))

    def _rows(self, change: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """The same change of all leading dimensions of the hidden states."""
        rows = self._like(terms=tuple(replace(term, hidden=change(term.hidden)) for term in self._terms))
        self._shared = rows._shared = True
        return rows

    def _scaled(self, factor: float) -> DeferredLogits:
        if self._bound is not None:
            return self._like(bound=self._bound * factor)
        return self._like(terms=tuple(replace(term, factor=term.factor * factor) for term in self._terms))

    def float(self) -> Any:
        """In fp32."""
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """To another dtype, or to the device where they are; else the real ones. Themselves where nothing changes."""
        wanted = [*args, *kwargs.values()]
        dtypes = [value for value in wanted if isinstance(value, torch.dtype)]
        others = [value for value in wanted if not isinstance(value, (torch.dtype, bool)) and value is not None]
        here = all(isinstance(value, (str, torch.device)) and torch.device(value) == self.device for value in others)
        if self._tensor is not None or not here or len(dtypes) > 1:
            return self.tensor("to").to(*args, **kwargs)
        return self._like(dtype=dtypes[0]) if dtypes and dtypes[0] != self.dtype else self

    def contiguous(self, **options: Any) -> Any:
        """Themselves."""
        return self if self._tensor is None and not options else self.tensor("contiguous").contiguous(**options)

    def view(self, *size: Any, **named: Any) -> Any:
        """Another leading shape; the real ones where V changes."""
        if named or (size and isinstance(size[0], torch.dtype)):
            return self.tensor("view").view(*size, **named)
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        vocabulary = self.shape[-1]
        if self._tensor is not None or not shape or not all(isinstance(n, int) for n in shape):
            return self.tensor("view").reshape(*size)
        if shape[-1] != vocabulary and not (shape[-1] == -1 and math.prod(shape[:-1]) == math.prod(self.shape[:-1])):
            return self.tensor(f"view{shape}").reshape(*size)
        return self._rows(lambda hidden: hidden.reshape(*shape[:-1], hidden.shape[-1]))

    def reshape(self, *shape: Any, **named: Any) -> Any:
        """As ``view``."""
        return self.tensor("reshape").reshape(*shape, **named) if named else self.view(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """Leading dimensions into one; the real ones where V is among them."""
        if self._tensor is not None or end_dim in (-1, self.ndim - 1):
            return self.tensor("flatten").flatten(start_dim, end_dim)
        return self._rows(lambda hidden: hidden.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Any:
        """Some of the rows; the real ones where entries of the vocabulary are picked."""
        if self._tensor is None:
            rows = _index_of_rows(index, self.ndim)
            if rows is not None:
                return self._rows(lambda hidden: hidden[rows])
        return self.tensor(f"__getitem__({_described(index)})")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Into the real ones, which these are from then on.

        Raises:
            RuntimeError: rows were taken from these before, or these are such rows; the others would not see it.
        """
        self._check_unshared("__setitem__")
        self.tensor("__setitem__")[index] = real(value)

    def __mul__(self, other: Any) -> Any:
        """By a number: a scale."""
        if self._tensor is not None or not _is_number(other) or other == 0:
            return self.tensor("*") * real(other)
        return self._scaled(float(other))

    __rmul__ = __mul__

    def __imul__(self, other: Any) -> Any:
        """In place, so that whoever else has these sees it."""
        return self._become(self * other, "*=")

    def __itruediv__(self, other: Any) -> Any:
        """In place, as above."""
        return self._become(self / other, "/=")

    def __iadd__(self, other: Any) -> Any:
        """In place, as above."""
        return self._become(self + other, "+=")

    def __isub__(self, other: Any) -> Any:
        """In place, as above."""
        return self._become(self - other, "-=")

    def _become(self, changed: Any, name: str) -> Any:
        self._check_unshared(name)
        if isinstance(changed, DeferredLogits):
            self._terms, self._bound, self._moment = changed._terms, changed._bound, changed._moment
        else:
            self._tensor = changed
        return self

    def _check_unshared(self, name: str) -> None:
        if self._shared:
            raise RuntimeError(
                f"logits: {name} cannot be followed, for it would not reach the rows taken before, or "
                "the whole that these are rows of; change them first, or work with logits.tensor()"
            )

    def __truediv__(self, other: Any) -> Any:
        """By a number: a scale."""
        if self._tensor is not None or not _is_number(other) or other == 0:
            return self.tensor("/") / real(other)
        return self._scaled(1 / float(other))

    def __add__(self, other: Any) -> Any:
        """Of a head and its adapter: another term."""
        if self._tensor is None and isinstance(other, DeferredLogits) and self._goes_with(other):
            moment = replace(self._moment, parameters=self._moment.parameters + other._moment.parameters)
            dtype = torch.promote_types(self.dtype, other.dtype)
            return self._like(terms=self._terms + other._terms, dtype=dtype, moment=moment)
        return self.tensor("+") + real(other)

    def __radd__(self, other: Any) -> Any:
        """As ``__add__``."""
        return self + other

    def _goes_with(self, other: DeferredLogits) -> bool:
        """Whether the two add up to logits of the same rows with no cap in them."""
        uncapped = self._bound is None and other._bound is None and other._tensor is None
        return uncapped and self.shape == other.shape

    def tanh(self) -> Any:
        """The cap, once."""
        if self._tensor is not None or self._bound is not None:
            return self.tensor("tanh").tanh()
        return self._like(bound=1.0)

    # --- what needs them ----------------------------------------------------------------------------------------------

    def tensor(self, reason: str = "tensor") -> Tensor:
        """The real logits [..., V], differentiable; computed the first time."""
        if self._tensor is None:
            self._record.computed.append(reason)
            with torch.inference_mode(self._moment.inference), torch.set_grad_enabled(self._moment.recording):
                self._tensor = self._within_heads(self._compute)
        return self._tensor

    def _within_heads(self, work: Callable[[], Tensor]) -> Tensor:
        """The work on the heads' parameters, which must be what they were.

        Asked before the heads' ``forward``, where they may be sharded, and within it, where they are gathered.
        """
        if torch.compiler.is_compiling():
            return _within(self._terms, work)

        def checked() -> Tensor:
            self._moment.check(self._heads())
            self._check_gathered()
            result = work()
            self._moment.since.backward.watch(result, self._heads())
            return result

        self._moment.check(self._heads())
        return _within(self._terms, checked)

    def _heads(self) -> Iterator[nn.Linear]:
        return (term.head for term in self._terms)

    def _check_gathered(self) -> None:
        for head in self._heads():
            if head.weight.ndim != 2:
                raise ValueError(
                    f"the head's weight must be [V, D] in its forward, got shape {tuple(head.weight.shape)}: what "
                    "gathers it is around the head, as FSDP1 as a module of its own is; wrap the head with the rest of "
                    "the model, or use fully_shard"
                )

    def _compute(self) -> Tensor:
        logits: Tensor | None = None
        with torch.autocast(self.device.type, enabled=False):
            for term in self._terms:
                weight, bias = term.head.weight, term.head.bias
                hidden = term.hidden.to(torch.promote_types(term.hidden.dtype, weight.dtype))
                product = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
                product = product if term.factor == 1 else product * term.factor
                logits = product if logits is None else logits + product
            assert logits is not None
            if self._bound is not None:
                logits = logits.tanh() * self._bound
        return logits.to(self.dtype)

    def cross_entropy(
        self,
        target: Tensor,  # [N]
        *,
        weight: Tensor | None,  # [V]
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        """As ``F.cross_entropy`` of [N, V] logits; in fp32 without the logits."""
        self._record.losses.append((_scale(self._terms, self._bound), self._bound))
        smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
        given = {
            **self._options,
            **smoothing,
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "softcap": self._bound,
        }

        def loss() -> Tensor:
            first, head = self._terms[0], _head(self._terms, self._bound)
            return linear_cross_entropy(first.hidden, first.head.weight, target, **head, **given)

        if torch.compiler.is_compiling():
            return self._within_heads(loss)
        modes = torch.inference_mode() if self._moment.inference else nullcontext()
        with modes, torch.set_grad_enabled(self._moment.recording and torch.is_grad_enabled()):
            return self._within_heads(loss)

    def __getattr__(self, name: str) -> Any:
        """What is not followed: of the real logits."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            self._check_unshared(name)
        return getattr(self.tensor(name), name)

    def __iter__(self) -> Any:
        """Over the real logits."""
        return iter(self.tensor("__iter__"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files get the real logits."""
        return self.tensor("pickle").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of the real logits."""
        return copy.deepcopy(self.tensor("deepcopy"), memo)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch functions of these: those that models use before the loss, and the loss; else of the real logits."""
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if func is torch.tanh and isinstance(args[0], DeferredLogits):
            return args[0].tanh()
        name = getattr(func, "__name__", str(func))
        return func(*(real(value, name) for value in args), **{key: real(v, name) for key, v in kwargs.items()})


def _forwarded(name: str) -> Callable[..., Any]:
    """An operator of the real logits."""

    def operator(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.tensor(name), name)(*(real(other) for other in others))

    operator.__doc__ = "Of the real logits."
    return operator


for _name in (
    *("__sub__", "__rsub__", "__rtruediv__", "__pow__", "__rpow__", "__mod__", "__floordiv__", "__matmul__"),
    *("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__invert__", "__float__"),
):
    setattr(DeferredLogits, _name, _forwarded(_name))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]


def weight_size(head: nn.Linear) -> tuple[int, int]:
    """[V, D] of a head's weight.

    A weight that was replaced, by hand or to tie it to another, need not have the numbers of features that the layer
    was made with. Of one that is flattened or emptied while it is sharded those are all that is known, but for
    DeepSpeed's.
    """
    shape = getattr(head.weight, "ds_shape", head.weight.shape)
    return (shape[0], shape[1]) if len(shape) == 2 else (head.out_features, head.in_features)


def _scale(terms: tuple[Term, ...], bound: float | None) -> float:
    """``logit_scale`` of the first term's product."""
    return terms[0].factor * (1.0 if bound is None else bound)


def _head(terms: tuple[Term, ...], bound: float | None) -> dict[str, Any]:
    """Options of ``linear_cross_entropy`` for logits, but for the first term's product and the bound.

    Other terms are one low-rank adapter of the first. To be called within the ``forward`` of the heads.
    """
    first, *others = terms
    scale = _scale(terms, bound)
    biases = [term.head.bias * (scale * (term.factor / first.factor)) for term in terms if term.head.bias is not None]
    head = {"logit_scale": scale, "linear_bias": sum(biases[1:], biases[0]) if biases else None}
    if not others:
        return head
    hidden = torch.cat([term.hidden * (term.factor / first.factor) for term in others], -1)
    return {**head, "adapter": (hidden, torch.cat([term.head.weight for term in others], 1))}


def real(value: Any, reason: str = "an operand") -> Any:
    """Deferred logits computed, also within lists; anything else as it is."""
    if isinstance(value, DeferredLogits):
        return value.tensor(reason)
    if isinstance(value, (list, tuple)):
        return type(value)(real(item, reason) for item in value)
    return value


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``, whose parameters these are."""
    indices = isinstance(target, Tensor) and not target.is_floating_point()
    plain = size_average is None and reduce is None and isinstance(input, DeferredLogits) and input._tensor is None
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    if plain and indices and input.ndim == 2 and target.ndim == 1 and (input.bound is None or input.bound > 0):
        return input.cross_entropy(target, weight=weight, **options)
    options |= {"size_average": size_average, "reduce": reduce}
    return F.cross_entropy(real(input, "cross_entropy"), real(target), weight, **options)


def _within(terms: tuple[Term, ...], work: Callable[[], Tensor]) -> Tensor:
    """Do the work within the ``forward`` of each term's head, or as it is where the model is no longer patched.

    FSDP and ZeRO gather a layer's parameters before its ``forward``, and before its backward pass, and free them after.
    What hooks make of the result is taken where it is the same memory, a tensor that calls them in the backward pass;
    hooks that change a head's output have changed the logits, and are not to change the loss too. Hooks are shown the
    hidden states without their history: what they do to an input, or count of its gradients, they did when the logits
    were deferred.
    """
    if not terms or "forward" not in terms[0].head.__dict__:
        return work()
    done: list[Tensor] = []

    def kept() -> Tensor:
        done.append(_within(terms[1:], work))
        return done[0]

    returned = terms[0].head(terms[0].hidden.detach(), work=kept)
    return returned if _is_same(returned, done[0]) else done[0]


def _is_same(one: Any, other: Tensor) -> bool:
    """Whether it is the other tensor, or one of the same memory."""
    if one is other:
        return True
    if torch.compiler.is_compiling() or not isinstance(one, Tensor):
        return False
    return (one.data_ptr(), one.shape, one.dtype) == (other.data_ptr(), other.shape, other.dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _index_of_rows(index: Any, dimensions: int) -> Any:
    """The index as one of leading dimensions, or None where it reaches the last or adds dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(map(_picks_rows, parts)):
        return None
    used = sum(_dimensions_of(part) for part in parts if part is not Ellipsis)
    last = parts[-1]
    if used < dimensions and (last is Ellipsis or not any(part is Ellipsis for part in parts)):
        return index
    reaches_last = used == dimensions or any(part is Ellipsis for part in parts)
    return index if reaches_last and isinstance(last, slice) and last == slice(None) else None


def _picks_rows(part: Any) -> bool:
    """Whether it is known what this part of an index does; arrays of others and masks of bytes are left to PyTorch."""
    if isinstance(part, Tensor):
        return part.dtype in (torch.bool, torch.int32, torch.int64)
    return part is Ellipsis or isinstance(part, slice) or (isinstance(part, int) and not isinstance(part, bool))


def _dimensions_of(part: Any) -> int:
    """How many dimensions one part of an index takes up."""
    return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _described(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(f"tensor{list(part.shape)}" if isinstance(part, Tensor) else repr(part) for part in parts)
