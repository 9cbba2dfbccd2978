"""The triton backend in shards: in Triton's interpreter on the CPU, with gloo; on one GPU there is one shard only."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
import workers
from comparison import check
from sharded import Call
from workers import Outcome

pytest.importorskip("triton")

from test_vocabulary_parallel import BUSY

from implementations import Implementation
from problems import Case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter"),
]

LIMIT = 150
SHARES = (2, 0, 3)
KERNELS = tuple(
    Implementation(f"triton-{strategy}", "triton", strategy, sampled=strategy == "sampled", **sizes)
    for strategy, sizes in (
        ("stored", {}),
        ("windowed", {"window": 1, "kept": 1}),
        ("sampled", {"rows": 5}),
    )
)
WIDE = Case(dtype=torch.float32, vocabulary=700, bias=True, ignored=True)
CALLS = {
    **{
        f"{kernels}, {name}": Call(case, SHARES, kernels)
        for kernels in KERNELS
        for name, case in (("plain", WIDE), ("busy", BUSY))
    },
    "statistics": Call(WIDE, SHARES, Implementation("triton-stored", "triton", "stored"), "statistics"),
    "sequence parallel": Call(WIDE, SHARES, KERNELS[0], token_shares=(1, 2, 1)),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, list[Outcome]]]:
    """The outcomes of all calls by name and rank."""

    @lru_cache
    def run() -> dict[str, list[Outcome]]:
        return workers.run(CALLS, len(SHARES), tmp_path_factory.mktemp("kernels"), LIMIT)

    return run


@pytest.mark.parametrize("name", CALLS)
def test_shards(ran, name):
    check(CALLS[name], ran()[name])
