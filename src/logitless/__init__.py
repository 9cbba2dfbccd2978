"""Train language models without logits: loss and gradients straight from hidden states, head weight and targets.

``linear_cross_entropy`` replaces ``F.cross_entropy(F.linear(hidden, weight), target)``; ``token_statistics`` gives
per-token likelihood, entropy and more; ``plan`` says beforehand what memory a call needs.
"""

from importlib.metadata import PackageNotFoundError, version

from logitless.functional import TokenStatistics as TokenStatistics
from logitless.functional import check_targets as check_targets
from logitless.functional import count_tokens as count_tokens
from logitless.functional import linear_cross_entropy as linear_cross_entropy
from logitless.functional import token_statistics as token_statistics
from logitless.integrations.causal_lm import Patched as Patched
from logitless.integrations.causal_lm import patch as patch
from logitless.integrations.causal_lm import unpatch as unpatch
from logitless.module import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from logitless.options import Sampled as Sampled
from logitless.planning import Plan as Plan
from logitless.planning import plan as plan
from logitless.report import SamplingReport as SamplingReport
from logitless.report import sampling_report as sampling_report

__all__ = [
    "LinearCrossEntropyLoss",
    "Patched",
    "Plan",
    "Sampled",
    "SamplingReport",
    "TokenStatistics",
    "check_targets",
    "count_tokens",
    "linear_cross_entropy",
    "patch",
    "plan",
    "sampling_report",
    "token_statistics",
    "unpatch",
]

try:
    __version__ = version("logitless")
except PackageNotFoundError:  # a source tree on the path, of which nothing is installed
    __version__ = "0+unknown"
