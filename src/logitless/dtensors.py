"""DTensors as arguments: local tensors for the operator, gradients back in the placements of what was given.

Of a mesh's dimensions one at most shards the vocabulary: where the weight is ``Shard(0)`` and every rank has the same
hidden states, or has a part of them that is to be gathered (``sequence_parallel``). Over the others the weight is
gathered, once a call, and its gradient summed back into the weight's own placement, if the ranks have tokens of
their own there, as under FSDP.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup, get_process_group_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs

# Arguments whose first dimension is the vocabulary, and those whose leading ones are tokens.
VOCABULARY_FIRST = ("linear_bias", "weight", "main_grad")
TOKENS_FIRST = ("target", "token_weight")


@dataclass(frozen=True)
class Arguments:
    """The tensors of a call, and how they are sharded.

    Attributes:
        tensors: by name, not yet checked; None where not given.
        group: over which the vocabulary is sharded, or None.
        sequence_parallel: whether the hidden states are sharded over it.
        sharded_dimension: of the hidden states' leading shape, along which a DTensor has them sharded over the group;
            it was moved to the front.
        tokens_sharded: whether ranks that are not of the group have tokens of their own.
    """

    tensors: dict[str, Any]
    group: ProcessGroup | None
    sequence_parallel: bool
    sharded_dimension: int = 0
    tokens_sharded: bool = False

    def local(self) -> Arguments:
        """The same with local tensors in the place of DTensors.

        Raises:
            TypeError: the weight is a DTensor and it is not said what the hidden states are, or the other way round.
            ValueError: placements or meshes that do not go together.
        """
        if not any(is_dtensor(tensor) for tensor in self.tensors.values()):
            return self
        return _localised(self)

    def moved(self, adapter: Any) -> Any:
        """An adapter, not yet checked, whose hidden states are laid out as those of the call."""
        if not self.sharded_dimension or not isinstance(adapter, (tuple, list)) or len(adapter) != 2:
            return adapter
        hidden, weight = adapter
        return _to_front(hidden, self.sharded_dimension), weight

    def moved_back(self, result: torch.Tensor) -> torch.Tensor:
        """A result for each token, in the shape of the target that was given."""
        return result.movedim(0, self.sharded_dimension)


def _to_front(tensor: Any, dimension: int) -> Any:
    """The tensor with that dimension first; what has none is refused later."""
    return tensor.movedim(dimension, 0) if isinstance(tensor, torch.Tensor) and dimension < tensor.ndim else tensor


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether it is a DTensor; the module is not imported for that, since it takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def wait_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, once the collective that it comes from is done.

    What `torch.distributed.tensor` hands on may be a tensor in name, whose memory another object holds and whose
    collective still runs: operations of PyTorch wait for it, a kernel that is given its pointer would not.
    """
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is not None and isinstance(tensor, module.AsyncCollectiveTensor):
        return tensor.trigger_wait()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def _localised(given: Arguments) -> Arguments:
    from torch.distributed.tensor import Partial, Replicate, Shard

    hidden, weight = given.tensors["input"], given.tensors["linear_weight"]
    if not is_dtensor(weight):
        raise TypeError("linear_weight must be a DTensor where another argument is one, got a torch.Tensor")
    mesh = weight.device_mesh
    for name, tensor in given.tensors.items():
        if is_dtensor(tensor) and tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of linear_weight, {mesh}, got {tensor.device_mesh}")
    if not is_dtensor(hidden) and given.group is None and mesh.size() > 1:
        raise TypeError(
            "input must be a DTensor where linear_weight is one, so that it says whether ranks have the same tokens, "
            "got a torch.Tensor; if the ranks of one dimension of the mesh do, pass group=mesh.get_group(dimension)"
        )
    dimensions = range(mesh.ndim)
    tokens = _tokens_by_dimension(given, hidden, mesh)
    gathers = given.sequence_parallel and is_dtensor(hidden)
    sharded = [
        dimension
        for dimension in dimensions
        if weight.placements[dimension].is_shard(0)
        and (gathers or tokens[dimension] == "same")
        and mesh.size(dimension) > 1
    ]
    vocabulary = sharded[-1] if sharded else None

    def placed(placement: Placement) -> list[Placement]:
        return [placement if dimension == vocabulary else Replicate() for dimension in dimensions]

    def gradient(at_vocabulary: Placement) -> list[Placement]:
        kinds = {"own": Partial(), "same": Replicate()}
        return [at_vocabulary if d == vocabulary else kinds[tokens[d]] for d in dimensions]

    def whole(tensor: DTensor) -> DTensor:
        """What the ranks of the vocabulary's dimension have of it, all of it on each."""
        places = [Replicate() if d == vocabulary else place for d, place in enumerate(tensor.placements)]
        return tensor.redistribute(placements=places)

    tensors = dict(given.tensors)
    sequence_parallel, moved = given.sequence_parallel, 0
    # Redistribution concatenates, which autocast takes over, and it knows one narrow dtype.
    with torch.autocast(mesh.device_type, enabled=False):
        for name in ("linear_weight", *VOCABULARY_FIRST):
            tensor = tensors.get(name)
            if is_dtensor(tensor):
                spread = tensor.redistribute(placements=placed(Shard(0)))
                tensors[name] = spread.to_local(grad_placements=gradient(Shard(0)))
        if is_dtensor(hidden):
            # The operator gathers the hidden states itself and sums their gradient, so that it is rounded once.
            rows = None if vocabulary is None else _consecutive(hidden, vocabulary)
            sequence_parallel, moved = rows is not None, rows or 0
            given_hidden = whole(hidden) if rows is None else hidden
            tensors["input"] = given_hidden.to_local(grad_placements=given_hidden.placements)
        for name in TOKENS_FIRST:
            tensor = tensors.get(name)
            if is_dtensor(tensor):
                tensors[name] = whole(tensor).to_local()
    for name in ("input", *TOKENS_FIRST) if moved else ():
        tensors[name] = _to_front(tensors.get(name), moved)
    group = None if vocabulary is None else mesh.get_group(vocabulary)
    return replace(
        given,
        tensors=tensors,
        group=group,
        sequence_parallel=sequence_parallel and group is not None,
        sharded_dimension=moved,
        tokens_sharded=any(kind == "own" and mesh.size(d) > 1 and d != vocabulary for d, kind in enumerate(tokens)),
    )


def _consecutive(hidden: DTensor, dimension: int) -> int | None:
    """Which of its dimensions a dimension of the mesh shards, so that its ranks' parts are consecutive; else None.

    They are not where a later dimension of the mesh cuts the same one again, or where parts are strided, as FSDP's are.
    """
    from torch.distributed.tensor import Shard

    place = hidden.placements[dimension]
    if type(place) is not Shard:  # nor a subclass
        return None
    cut_again = any(
        hidden.device_mesh.size(later) > 1 and hidden.placements[later].is_shard(place.dim)
        for later in range(dimension + 1, hidden.device_mesh.ndim)
    )
    return None if cut_again else place.dim % hidden.ndim


def _ranks(group: ProcessGroup) -> list[int]:
    """Groups of the same ranks serve alike; meshes that are cut from one another may have several."""
    return get_process_group_ranks(group)


def _tokens_by_dimension(given: Arguments, hidden: object, mesh: DeviceMesh) -> list[str]:
    """For each dimension of the mesh whether its ranks have the ``"same"`` tokens or their ``"own"``."""
    kinds = []
    for dimension in range(mesh.ndim):
        if not is_dtensor(hidden):
            same = given.group is not None and _ranks(mesh.get_group(dimension)) == _ranks(given.group)
        else:
            place = hidden.placements[dimension]
            if place.is_partial():
                raise ValueError("input must not be a DTensor of partial sums: redistribute it, got " + str(place))
            if place.is_shard(hidden.ndim - 1):
                raise ValueError("input must not be sharded along D: redistribute it, got " + str(place))
            same = place.is_replicate()
        kinds.append("same" if same else "own")
    if given.group is not None and not is_dtensor(hidden) and "same" not in kinds:
        raise ValueError(f"group must be that of a dimension of the mesh of linear_weight, {mesh}")
    return kinds
