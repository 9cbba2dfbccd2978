"""What transforms a program instead of running it is refused in one line of ours, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import logitless

TOKENS, HIDDEN, VOCABULARY = 4, 8, 11

# Of TorchScript, which forward-mode differentiation compiles its own rules with.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(VOCABULARY, HIDDEN, generator=generator)


def loss_of(hidden, weight):
    return logitless.linear_cross_entropy(hidden, weight, torch.arange(TOKENS))


def entropy_of(hidden, weight):
    return logitless.token_statistics(hidden, weight, torch.arange(TOKENS), outputs=("entropy",)).entropy.sum()


@pytest.mark.parametrize("function", [loss_of, entropy_of])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f),
        lambda f: torch.func.jacrev(f),
        lambda f: torch.func.hessian(f),
        lambda f: lambda *given: torch.func.vjp(f, *given),
        lambda f: lambda *given: torch.func.jvp(f, given, given),
        lambda f: lambda hidden, weight: torch.func.vmap(f, (0, None))(torch.stack((hidden, hidden)), weight),
        lambda f: lambda hidden, weight: torch.func.vmap(f, (None, 0))(hidden, torch.stack((weight, weight))),
    ],
    ids=["grad", "jacrev", "hessian", "vjp", "jvp", "vmap of input", "vmap of weight"],
)
def test_function_transforms_are_refused(function, transform):
    with pytest.raises(NotImplementedError, match=r"^logitless: torch\.func transforms .* use torch\.autograd\.grad"):
        transform(function)(*operands())


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "token_weight", "weight", "normalizer"])
def test_forward_mode_is_refused(name):
    """Also for what the loss is not differentiable in: a tangent would be lost without a word."""
    hidden, weight = operands()
    ones = {"linear_bias": torch.ones(VOCABULARY), "token_weight": torch.ones(TOKENS), "normalizer": torch.ones(())}
    given = {"input": hidden, "linear_weight": weight, "weight": torch.ones(VOCABULARY), **ones}
    with forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError, match=f"forward-mode differentiation is not supported, and {name} has"):
            logitless.linear_cross_entropy(**given, target=torch.arange(TOKENS))


def test_forward_mode_is_refused_when_compiled():
    """A compiler shows tensors without their tangents."""
    hidden, weight = operands()
    compiled = torch.compile(loss_of, backend="aot_eager")
    assert compiled(hidden, weight).isfinite()
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported, and input"):
            compiled(tangent, weight)
    assert compiled(hidden, weight).isfinite()


def test_forward_mode_of_something_else_is_allowed():
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert loss_of(*operands()).isfinite()


def test_batched_upstream_gradients_are_refused():
    hidden, weight = operands()
    hidden.requires_grad_()
    losses = logitless.linear_cross_entropy(hidden, weight, torch.arange(TOKENS), reduction="none")
    with pytest.raises(NotImplementedError, match="batched upstream gradients"):
        torch.autograd.grad(losses, hidden, torch.eye(TOKENS), is_grads_batched=True)


class Model(torch.nn.Module):
    """With the loss in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY)
        self.loss = logitless.LinearCrossEntropyLoss()

    def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(hidden, self.head.weight, target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(Model()),
        lambda: torch.jit.script(logitless.LinearCrossEntropyLoss()),
        lambda: torch.jit.script(logitless.linear_cross_entropy),
        lambda: torch.jit.script(logitless.token_statistics),
        lambda: torch.jit.script(loss_of),
        lambda: torch.jit.trace(Model(), (torch.ones(TOKENS, HIDDEN), torch.arange(TOKENS))),
        lambda: torch.jit.trace(loss_of, operands()),
    ],
    ids=[
        "script a model",
        "the module",
        "the loss",
        "the statistics",
        "a function",
        "trace a model",
        "trace a function",
    ],
)
def test_torch_script_is_refused(make):
    with pytest.raises(NotImplementedError, match=r"TorchScript .* use torch\.compile or torch\.export"):
        make()
