"""``sampling_report`` against what it is defined by."""

from __future__ import annotations

import pytest
import torch

import logitless
from logitless.options import BLOCK
from problems import generator, make_problem, random_problem

VOCABULARY = BLOCK * 8 + 20
BLOCKS = 9


def report(problem, **options) -> logitless.SamplingReport:
    return problem.call(logitless.sampling_report, **{"draws": 16, **options})


def sampled(threshold: float) -> logitless.Sampled:
    return logitless.Sampled(threshold, generator=generator(1))


def test_blocks_are_those_of_the_softmax():
    problem = random_problem(20, 16, VOCABULARY).to(torch.float32)
    problem.target[::5] = -100
    given = report(problem, gradient=sampled(1 / 4))
    counts = problem.target != -100
    scores = problem.input.detach()[counts] @ problem.linear_weight.detach().T
    mass = torch.stack([block.sum(1) for block in scores.softmax(1).split(BLOCK, 1)], 1)
    kept = (mass * 4).clamp(max=1).scatter(1, problem.target[counts][:, None] // BLOCK, 1.0).sum(1)
    assert (given.tokens, given.blocks, given.bound, given.draws, given.threshold) == (16, BLOCKS, 6, 16, 1 / 4)
    assert given.kept == pytest.approx(kept.mean().item(), rel=1e-5)
    assert given.kept_most == pytest.approx(kept.max().item(), rel=1e-5)
    assert given.certain_mass == pytest.approx((mass * (mass >= 1 / 4)).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.25, "softcap": 3.0, "z_loss": 0.1}], ids=["bare", "busy"]
)
def test_noise_is_measured(options):
    """It falls with the threshold and with the number of draws, and is small beside a minibatch's."""
    problem = random_problem(64, 16, VOCABULARY).to(torch.float32)
    problem = problem.with_options(linear_bias=torch.zeros(VOCABULARY, requires_grad=True), **options)
    coarse, fine = report(problem, gradient=sampled(1 / 2)), report(problem, gradient=sampled(1 / 8))
    assert list(coarse.noise) == ["input", "linear_weight", "linear_bias"]
    for name, noise in coarse.noise.items():
        assert noise.one_draw > fine.noise[name].one_draw > 0
        # A mean of 16 lies at a quarter of the distance of one, within what chance leaves of that.
        assert 0.15 < noise.mean / noise.one_draw < 0.4
        assert (noise.minibatch is None) == (name == "input")
        if noise.minibatch is not None:
            assert noise.added == pytest.approx((noise.one_draw / noise.minibatch) ** 2)


def test_nothing_is_random_where_everything_is_kept():
    problem = make_problem("flat", 12, 16, VOCABULARY).to(torch.float32)
    given = report(problem, gradient=sampled(1e-30))
    assert given.kept == BLOCKS
    assert all(noise.one_draw < 1e-5 for noise in given.noise.values())


def test_minibatch_noise_is_that_of_halves():
    """Tokens that are all alike have none; tokens with gradients against each other have much."""
    problem = random_problem(1, 16, VOCABULARY).to(torch.float32)
    alike = logitless.sampling_report(
        problem.input.detach().expand(32, 16).contiguous(), problem.linear_weight, problem.target.expand(32), draws=2
    )
    assert alike.noise["linear_weight"].minibatch < 1e-5
    different = report(random_problem(32, 16, VOCABULARY).to(torch.float32))
    assert different.noise["linear_weight"].minibatch > 0.5


def test_inputs_are_left_alone():
    problem = random_problem(8, 16, VOCABULARY).to(torch.float32)
    report(problem, draws=2)
    assert problem.input.grad is None
    assert problem.linear_weight.grad is None


def test_text():
    text = str(report(random_problem(8, 16, VOCABULARY).to(torch.float32)))
    for fragment in ("8 tokens", f"{BLOCKS} blocks of {BLOCK}", "bound 9", "input", "linear_weight", "%"):
        assert fragment in text
    assert max(map(len, text.splitlines())) <= 100


def test_refusals():
    problem = random_problem(8, 16, VOCABULARY).to(torch.float32)
    with pytest.raises(TypeError, match=r"gradient must be a logitless\.Sampled or None, got str"):
        report(problem, gradient="exact")
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        report(problem, draws=1)
    with pytest.raises(ValueError, match="softcap"):
        report(problem, softcap=0.0)
    stray = problem.target.clone()
    stray[3] = VOCABULARY
    with pytest.raises(ValueError, match=str(VOCABULARY)):
        logitless.sampling_report(problem.input, problem.linear_weight, stray)
    problem.target[1:] = -100
    with pytest.raises(ValueError, match="at least two tokens that count, got 1"):
        report(problem)


def test_loss_is_exact_or_its_error_is_measured():
    """Rounded logits: those of the inputs' dtype. The estimate's error falls with the threshold."""
    problem = random_problem(48, 16, VOCABULARY).to(torch.bfloat16)
    problem.target[::5] = -100
    assert report(problem, gradient=sampled(1 / 4)).loss is None
    coarse, fine = (
        report(problem, gradient=logitless.Sampled(threshold, scan="fp8", generator=generator(1))).loss
        for threshold in (1 / 2, 1 / 64)
    )
    hidden, weight = problem.input.detach(), problem.linear_weight.detach()
    scores = hidden @ weight.T
    losses, exact = (
        torch.nn.functional.cross_entropy(z.double(), problem.target, reduction="none", ignore_index=-100)
        for z in (scores, hidden.double() @ weight.double().T)
    )
    rounding = (losses - exact)[problem.target != -100]
    assert coarse.rounded_rms == pytest.approx(rounding.square().mean().sqrt().item(), rel=1e-3)
    assert coarse.rounded_bias == pytest.approx(rounding.mean().item(), rel=1e-2, abs=1e-6)
    assert coarse.rounded_rms == fine.rounded_rms
    assert 0 < fine.rms < coarse.rms / 2
    assert abs(coarse.bias) < coarse.rms / 2


def test_printed_error_of_the_loss():
    problem = random_problem(8, 16, VOCABULARY).to(torch.float32)
    text = str(report(problem, gradient=logitless.Sampled(1 / 4, scan="fp8"), draws=2))
    assert "loss of a token: error" in text
    assert "with rounded logits" in text
