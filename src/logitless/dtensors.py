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
        tokens_apart: whether ranks that are not of the group have tokens of their own.
    """

    tensors: dict[str, Any]
    group: ProcessGroup | None
    sequence_parallel: bool
    sharded_dimension: int = 0
    tokens_apart: bool = False

    def local(self) -> Arguments:
        """The same with local tensors in the place of DTensors.

        Raises:
            TypeError: the weight is a DTensor and it is not said what the hidden states are, or the other way round.
            ValueError: placements or meshes that do not go together.
        """
        if not any(is_dtensor(tensor) for tensor in self.tensors.values()):
            return self
        return _localised(self)

    def moved_back(self, result: torch.Tensor) -> torch.Tensor:
        """A result for each token, in the shape of the target that was given."""
        return result.movedim(0, self.sharded_dimension)


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether it is a DTensor; the module is not imported for that, since it takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def arrived(tensor: torch.Tensor) -> torch.Tensor:
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
    sharded = [d for d in dimensions if weight.placements[d].is_shard(0) and tokens[d] != "own" and mesh.size(d) > 1]
    vocabulary = sharded[-1] if sharded else None

    def placed(placement: Placement) -> list[Placement]:
        return [placement if dimension == vocabulary else Replicate() for dimension in dimensions]

    def gradient(at_vocabulary: Placement) -> list[Placement]:
        kinds = {"own": Partial(), "same": Replicate()}
        return [at_vocabulary if d == vocabulary else kinds[tokens[d]] for d in dimensions]

    tensors = dict(given.tensors)
    for name in ("linear_weight", *VOCABULARY_FIRST):
        tensor = tensors.get(name)
        if is_dtensor(tensor):
            spread = tensor.redistribute(placements=placed(Shard(0)))
            tensors[name] = spread.to_local(grad_placements=gradient(Shard(0)))
    sequence_parallel, moved = given.sequence_parallel, 0
    if is_dtensor(hidden):
        # The operator itself gathers the hidden states and sums their gradient, so that it is rounded once.
        tensors["input"] = hidden.to_local(grad_placements=hidden.placements)
        place = Replicate() if vocabulary is None else hidden.placements[vocabulary]
        sequence_parallel = isinstance(place, Shard)
        moved = place.dim % hidden.ndim if isinstance(place, Shard) else 0
    for name in TOKENS_FIRST:
        tensor = tensors.get(name)
        if is_dtensor(tensor):
            places = [Replicate() if d == vocabulary else place for d, place in enumerate(tensor.placements)]
            tensors[name] = tensor.redistribute(placements=places).to_local()
    if moved:
        for name in ("input", *TOKENS_FIRST):
            tensor = tensors.get(name)
            if isinstance(tensor, torch.Tensor) and moved < tensor.ndim:  # of other shapes: they are refused later
                tensors[name] = tensor.movedim(moved, 0)
    group = None if vocabulary is None else mesh.get_group(vocabulary)
    return replace(
        given,
        tensors=tensors,
        group=group,
        sequence_parallel=sequence_parallel and group is not None,
        sharded_dimension=moved,
        tokens_apart=any(kind == "own" and mesh.size(d) > 1 for d, kind in enumerate(tokens)),
    )


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
            same = place.is_replicate() or given.sequence_parallel
        kinds.append("same" if same else "own")
    if given.group is not None and not is_dtensor(hidden) and "same" not in kinds:
        raise ValueError(f"group must be that of a dimension of the mesh of linear_weight, {mesh}")
    return kinds
