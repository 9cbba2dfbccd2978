"""Watches tensors and memory that a call creates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that PyTorch implements itself; all others are opened so that what they call is seen.
BUILT_IN = ("aten", "prim", "prims")


class LargestTensor(TorchDispatchMode):
    """Counts the elements of every tensor that any operation returns, inside custom operators too.

    Elements are those of the memory behind the tensor: an expanded tensor counts as what it occupies, a view of one of
    the tensors ``known`` from before counts as nothing.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0
        self.operation = "nothing"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in BUILT_IN:
            result = func(*args, **(kwargs or {}))
        else:
            kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:
                result = func.redispatch(kernel, *args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.operation = elements, str(func)
        return result


def _walk(events: Iterable) -> Iterable:
    for event in events:
        yield event
        yield from _walk(event.children)


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of CPU memory that PyTorch holds during a call, above what it holds before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = [event for event in _walk(tree) if event.name == "[memory]"]
    events.sort(key=lambda event: event.start_time_ns)
    if not events:
        return 0
    before = events[0].extra_fields.total_allocated - events[0].extra_fields.alloc_size
    return max(0, max(event.extra_fields.total_allocated for event in events) - before)
