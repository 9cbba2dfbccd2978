"""Targets of every integer dtype: values that int64 cannot hold are out of range, whatever its bits would be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import logitless

UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", UNSIGNED, ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_unsigned_targets(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*shape, 8, generator=generator), torch.randn(11, 8, generator=generator)
    target = torch.tensor([0, 3, 10, 5, 7, 5]).view(shape)
    given, names = target.to(dtype), ("nll", "logsumexp", "entropy", "prediction", "target_rank")
    for ignored in (5, -100):
        loss = logitless.linear_cross_entropy(hidden, weight, given, ignore_index=ignored)
        expected = F.cross_entropy((hidden @ weight.T).view(-1, 11), target.view(-1), ignore_index=ignored)
        torch.testing.assert_close(loss, expected)
        logitless.check_targets(given, 11, ignore_index=ignored)
        for class_weight in (None, torch.arange(11.0)):
            counts = (logitless.count_tokens(t, ignore_index=ignored, weight=class_weight) for t in (given, target))
            assert next(counts) == next(counts)
        ours, theirs = (
            logitless.token_statistics(hidden, weight, t, outputs=names, ignore_index=ignored) for t in (given, target)
        )
        for name in names:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        reports = (logitless.sampling_report(hidden, weight, t, ignore_index=ignored, draws=2) for t in (given, target))
        assert next(reports).kept == next(reports).kept
    with pytest.raises(ValueError, match=r"target must lie in \[0, 7\).*got 10 at token 2"):
        logitless.check_targets(given, 7)


@pytest.mark.parametrize(
    ("value", "ignored"),
    [(2**64 - 100, -100), (2**64 - 1, -1), (2**64 - 2, -2), (2**63, -100), (2**64 - 1, 3)],
    ids=str,
)
def test_targets_beyond_int64_are_out_of_range(value, ignored):
    """Whatever int64 makes of their bits, the ``ignore_index`` among it."""
    target = torch.tensor([1, value, 2, 3], dtype=torch.uint64)
    call = {"input": torch.ones(4, 8), "linear_weight": torch.ones(11, 8), "target": target, "ignore_index": ignored}
    for refuse in (
        lambda: logitless.linear_cross_entropy(**call),
        lambda: logitless.token_statistics(**call),
        lambda: logitless.sampling_report(**call),
        lambda: logitless.check_targets(target, 11, ignore_index=ignored),
    ):
        with pytest.raises(ValueError, match=f"target must lie in .*got {value} at token 1"):
            refuse()
    counted = 4 - (ignored == 3)
    assert logitless.count_tokens(target, ignore_index=ignored) == counted
    assert logitless.count_tokens(target, ignore_index=ignored, weight=torch.ones(11)).isnan()
