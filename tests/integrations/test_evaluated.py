"""Logits of an evaluated, patched model in the hands of whatever takes a tensor: as those of the model's own."""

from __future__ import annotations

import copy
import functools
import io
import multiprocessing
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import data, dlpack

transformers = pytest.importorskip("transformers")

from small_models import MODELS, VOCABULARY, batch, computed, llama  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import logitless  # noqa: E402
from logitless.integrations.evaluated import EvaluatedLogits  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

Way = Callable[[Tensor], Any]


class Doubling(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(logits, factor)
        return logits * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, factor = ctx.saved_tensors
        return gradients[0] * factor, (gradients[0] * logits).sum()


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def within(mode: Any) -> Way:
    def way(x: Tensor) -> Any:
        with mode():
            return [x * 2, x.float(), x[:, :-1], torch.tensor(x)]

    return way


def through_a_file(x: Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"logits": x}, file)
    file.seek(0)
    return torch.load(file)["logits"]


def through_a_queue(x: Tensor) -> Any:
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(x)
    return queue.get()


def kept_by_a_graph(x: Tensor) -> Any:
    """What a graph in C++ holds stays the object that it is."""
    factor = torch.tensor(2.0, requires_grad=True)
    with torch.enable_grad():
        result = Doubling.apply(x, factor)
    result.sum().backward()
    return [result.detach(), factor.grad, torch.as_tensor(x.numpy()), x.tolist(), x[:, 1:], copy.deepcopy(x)]


def held_by_a_weak_reference(x: Tensor) -> Any:
    reference = weakref.ref(x)
    x[0] = 3.0
    array = x.numpy()
    x.mul_(2)
    x[1].fill_(9)
    ways = (torch.tensor, torch.as_tensor, torch.asarray, through_a_file, copy.deepcopy, dlpack.from_dlpack)
    return [torch.from_numpy(array), reference() is x, *(way(x) for way in ways), x[:, :-1]]


def as_a_parameter(x: Tensor) -> Any:
    parameter = nn.Parameter(x)
    with torch.enable_grad():
        parameter.square().sum().backward()
    torch.optim.SGD([parameter], 0.1).step()
    return [parameter.grad, parameter.detach(), isinstance(parameter, nn.Parameter), x]


def as_a_leaf(x: Tensor) -> Any:
    x.requires_grad_()
    with torch.enable_grad():
        loss = Doubling.apply(x, torch.tensor(3.0)).sum() + F.log_softmax(x, -1)[..., 0].sum()
    return torch.autograd.grad(loss, x)


def written_through_a_view(x: Tensor) -> Any:
    rows = x[:, :-1]
    x[0, 0, 0] = 7.0
    rows[1] = 2.0
    return [x, rows]


def written_through_a_view_that_was_read(x: Tensor) -> Any:
    rows, shape = x[:, :-1], x.view(-1, VOCABULARY)
    total = rows.sum()
    rows.mul_(2)
    shape[3] = 0
    return [x, rows, shape, total]


def copies_and_views_of_what_is_scaled_in_place(x: Tensor) -> Any:
    rows, same, cast, scaled = x[:, 1:].contiguous().view(-1, VOCABULARY), x.float(), x.double(), x / 2
    picked, copied = x[torch.tensor([1, 0])], x.to(x.dtype, copy=True)
    x *= 2
    return [x, rows, same, cast, scaled, picked, copied]


def detached(x: Tensor) -> Any:
    other = x.detach()
    x *= 2
    other[0] = 1.0
    return [x, other, other.data_ptr() == x.data_ptr()]


def scaled_in_place_first(x: Tensor) -> Any:
    x *= 2
    x /= 4
    scaled = x * 3
    x.zero_()
    return [x, scaled]


def written_through_numpy(x: Tensor) -> Any:
    x.numpy()[0] = 5
    return x


def read_by_threads(x: Tensor) -> Any:
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(x[:, :-1].sum().item())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def with_an_attribute(x: Tensor) -> Any:
    x.name = "mine"  # type: ignore[attr-defined]
    return [x.sum(), x.name]  # type: ignore[attr-defined]


def accelerated(x: Tensor) -> Any:
    utils = pytest.importorskip("accelerate").utils
    results = [utils.gather(x), utils.pad_across_processes(x, dim=1), utils.concatenate([x, x])]
    return [*results, utils.send_to_device({"x": x}, "cpu"), utils.recursively_apply(lambda y: y * 1, (x,))]


def gathered_by_trainer(x: Tensor) -> Any:
    from transformers.trainer_pt_utils import EvalLoopContainer, nested_concat, nested_detach, nested_numpify

    batches = EvalLoopContainer(True, -100)
    batches.add(x)
    batches.add(x[:, :5])
    return [nested_concat(x, x[:, :5]), nested_detach((x,)), nested_numpify(x), batches.get_arrays()]


def gathered_by_processes(x: Tensor) -> Any:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        others, objects = [torch.zeros_like(x)], [None]
        dist.all_gather(others, x)
        dist.all_gather_object(objects, x)
        dist.broadcast(x, 0)
        dist.all_reduce(x)
    finally:
        dist.destroy_process_group()
    return [others, objects, x]


def traced(x: Tensor) -> Any:
    return torch.jit.trace(lambda y: y * 2, (x,))(x)


WAYS: dict[str, Way] = {
    "as_tensor": torch.as_tensor,
    "as_tensor of a view": lambda x: torch.as_tensor(x[:, :-1]),
    "as_tensor, then NumPy": lambda x: torch.as_tensor(x).numpy(),
    "as_tensor of a dtype": lambda x: torch.as_tensor(x, dtype=torch.float64),
    "tensor": torch.tensor,
    "tensor of a view": lambda x: torch.tensor(x[:, :-1]),
    "tensor of entries": lambda x: torch.tensor([x[0, 0, 0], x[1, 0, 1]]),
    "asarray": torch.asarray,
    "asarray, copied": lambda x: torch.asarray(x, copy=True),
    "asarray, not copied": lambda x: torch.asarray(x, copy=False),
    "asarray of a scaled view": lambda x: torch.asarray(x[0] * 2, dtype=torch.float64),
    "new_tensor": lambda x: x.new_tensor(x),
    "Tensor": lambda x: torch.Tensor(x),
    "from_dlpack": dlpack.from_dlpack,
    "from_dlpack of a view": lambda x: torch.from_dlpack(x[:, :-1]),
    "__dlpack__": lambda x: dlpack.from_dlpack(x.__dlpack__()),
    "NumPy's from_dlpack": np.from_dlpack,
    "NumPy's asarray": np.asarray,
    "NumPy's array of a dtype": lambda x: np.array(x[:, 1:], dtype="float64"),
    "NumPy's functions": np.exp,
    "NumPy's stack": lambda x: np.stack([x, x]),
    "from_numpy": lambda x: torch.from_numpy(x.numpy()),
    "forced to NumPy": lambda x: x.numpy(force=True),
    "first in C++, then in Python": lambda x: [torch.tensor(x), torch.from_numpy(x.numpy()), dlpack.from_dlpack(x)],
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "file": through_a_file,
    "queue": through_a_queue,
    "shared memory": lambda x: x.share_memory_(),
    "parameter": as_a_parameter,
    "buffer": nn.Buffer,
    "leaf": as_a_leaf,
    "graph": kept_by_a_graph,
    "weak reference": held_by_a_weak_reference,
    "collate": lambda x: data.default_collate([{"x": x}, {"x": x}]),
    "convert": data.default_convert,
    "data loader": lambda x: next(iter(data.DataLoader([x, x], batch_size=2))),
    "workers of a data loader": lambda x: next(
        iter(
            data.DataLoader(
                [x, x], batch_size=2, num_workers=1, multiprocessing_context=multiprocessing.get_context("fork")
            )
        )
    ),
    "padded": lambda x: nn.utils.rnn.pad_sequence([x[0], x[1, :4]]),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]])[0],
    "joined": lambda x: [torch.cat([x, x], 1), torch.stack((x, x[:])), torch.vstack([x, x])],
    "accelerate": accelerated,
    "Trainer": gathered_by_trainer,
    "processes": gathered_by_processes,
    "trace": traced,
    "vmap": torch.vmap(torch.sum),
    "func.grad": torch.func.grad(lambda x: x.square().sum()),
    "in a mode of operators": within(Operators),
    "in a mode of functions": within(Functions),
    "foreach": lambda x: torch._foreach_add([x, x[0]], 1),
    "out": lambda x: torch.add(x, x, out=x),
    "copy_": lambda x: [x.copy_(torch.ones_like(x)), torch.ones_like(x).copy_(x)],
    "resize_": lambda x: x.resize_(2, 2),
    "another type": lambda x: [x.type(), x.type(torch.float64), x.view(torch.int32), x.half(), x.to("cpu")],
    "text": lambda x: [repr(x), str(x), f"{x.sum():.4f}"],
    "lists": lambda x: [x.tolist(), list(x), x.sum().item()],
    "layout": lambda x: [
        *(f(y) for y in (x, x[:, :-1], x[:, 1:], x[:, 1:].contiguous()) for f in (Tensor.stride, Tensor.is_contiguous)),
        *(x[:, 1:].storage_offset(), x.data_ptr() == x.untyped_storage().data_ptr(), x.nbytes, len(x), x.numel()),
    ],
    "loss": lambda x: [
        F.cross_entropy(x.flatten(0, 1), torch.arange(24)),
        nn.CrossEntropyLoss()(x[0], torch.arange(12)),
    ],
    "arithmetic": lambda x: [1 / x, 1 - x, x - 1, x**2, -x, abs(x), x % 2, x == x, x > 0, x @ x.mT, x + x, 2 * x],
    "identity": lambda x: [x in [x], {x: 1}[x], torch.is_tensor(x), isinstance(x, torch.FloatTensor), x.grad_fn],
    "attribute": with_an_attribute,
    "threads": read_by_threads,
    "written through a view": written_through_a_view,
    "written through a view that was read": written_through_a_view_that_was_read,
    "copies and views of what is scaled in place": copies_and_views_of_what_is_scaled_in_place,
    "detached": detached,
    "scaled in place first": scaled_in_place_first,
    "written through NumPy": written_through_numpy,
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@functools.cache
def models() -> tuple[nn.Module, nn.Module]:
    ours, plain = llama().eval(), llama().eval()
    logitless.patch(ours)
    return ours, plain


def evaluated(model: nn.Module, mode: Any) -> Tensor:
    with mode():
        return model(**batch()).logits


def outcome(way: Way, model: nn.Module, mode: Any, inside: bool) -> Any:
    """What it gives, or the type of what it raises."""
    logits = evaluated(model, mode)
    torch.manual_seed(0)
    try:
        with mode() if inside else nullcontext():
            return tree_leaves(way(logits))
    except Exception as error:
        return type(error)


def assert_same(ours: Any, plain: Any) -> None:
    if not isinstance(plain, list):
        assert ours == plain
        return
    assert len(ours) == len(plain)
    for mine, theirs in zip(ours, plain, strict=True):
        if isinstance(theirs, Tensor):
            for fact in (Tensor.stride, Tensor.is_inference, lambda x: (x.requires_grad, isinstance(x, nn.Parameter))):
                assert fact(mine) == fact(theirs)
            theirs, mine = theirs.detach().clone(), torch.tensor(mine)
        if isinstance(theirs, (Tensor, np.ndarray, float)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        elif not isinstance(theirs, str):  # digits of texts may differ in the last place
            assert mine == theirs
        else:
            assert len(mine) == len(theirs)


@pytest.mark.parametrize("inside", [True, False], ids=["there", "afterwards"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WAYS)
def test_as_of_a_tensor(name, mode, inside):
    """Values, layouts and types of exceptions; whether in the mode of the evaluation or after it."""
    ours, plain = (outcome(WAYS[name], model, MODES[mode], inside) for model in models())
    if isinstance(plain, list):
        assert isinstance(ours, list), ours
    assert_same(ours, plain)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_address_of_what_is_not_computed(mode):
    """An exception of PyTorch's from what takes an address in C++ alone, and no crash."""
    logits = evaluated(models()[0], mode)
    with pytest.raises(RuntimeError, match="Cannot access data pointer of Tensor"):
        dlpack.to_dlpack(logits)
    logits.sum()
    assert dlpack.from_dlpack(dlpack.to_dlpack(logits)).shape == logits.shape


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_ordinary_once_it_was_read(mode):
    logits = evaluated(models()[0], mode)
    assert type(logits) is EvaluatedLogits
    other = logits
    logits.argmax(-1)
    assert type(logits) is Tensor
    assert other is logits


def test_what_reads_no_value_computes_none():
    with computed() as reasons, torch.no_grad():
        model = models()[0]
        output = model(**batch())
        logits = output.logits
        assert isinstance(logits, Tensor)
        assert logits.shape == (2, 12, VOCABULARY)
        assert logits.dtype == torch.float32
        assert logits.device.type == "cpu"
        assert logits[:, :-1].contiguous().view(-1, VOCABULARY).shape == (22, VOCABULARY)
        assert not logits.requires_grad
        assert logits.float() is logits
        assert type(logits.detach()[0]) is EvaluatedLogits
        assert torch.as_tensor(logits) is logits
        assert logits.numel() == logits.stride(0) * len(logits)
        for name in ("gemma2", "cohere", "phi", "t5"):
            other = MODELS[name]().eval()
            logitless.patch(other)
            other(**batch())
    assert reasons == []


def test_memory_of_a_view_is_that_of_what_it_is_of():
    logits = evaluated(models()[0], torch.no_grad)
    rows = logits[:, 1:]
    assert rows.sum() == logits[:, 1:].sum()
    assert rows.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


@pytest.mark.parametrize("way", [torch.tensor, lambda x: x.sum(), dlpack.from_dlpack], ids=["C++", "Python", "DLPack"])
def test_after_the_weight_has_changed(way):
    """An error, from wherever it is asked."""
    model = llama().eval()
    logitless.patch(model)
    logits = evaluated(model, torch.no_grad)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weight has changed since they were deferred"):
        way(logits)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_function_of_logits(fullgraph):
    """One that was read is an argument as any other; one that was not is read outside of the graph."""
    torch._dynamo.reset()
    logits = evaluated(models()[0], torch.no_grad)
    expected = evaluated(models()[1], torch.no_grad).argmax(-1) * 2
    if fullgraph:
        logits.sum()
    function = torch.compile(lambda x: x.argmax(-1) * 2, backend="aot_eager", fullgraph=fullgraph)
    assert torch.equal(function(logits), expected)
    torch._dynamo.reset()
