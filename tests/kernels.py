"""Problems for kernels: made by hand, without the planner, on the device on which kernels run here.

Without a GPU that is the CPU, where Triton's interpreter runs them in tiles of 16 x 128.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitless.backends.contract import Coefficients, Problem, Shape, Statistics
from logitless.backends.triton.launch import Launcher
from logitless.options import HeadOptions
from problems import coarse, generator
from tolerance import FACTOR, floor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter misreads bf16 operands of TMA descriptors.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
STATISTICS = frozenset({"mean_gap", "smooth_logit", "prediction", "target_rank"})
LOG2 = 0.6931471805599453


def _set_matmul(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def _set_everywhere(precision: str) -> None:
    torch.backends.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


# What scripts set, by each of PyTorch's interfaces, and whether products of fp32 operands may take them as TF32 then.
FP32_PRECISIONS: dict[str, tuple[Callable[[], None], bool]] = {
    "untouched": (lambda: None, False),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), True),
    "allow_tf32": (lambda: _allow_tf32(True), True),
    "allow_tf32 = False": (lambda: _allow_tf32(False), False),
    "matmul tf32": (lambda: _set_matmul("tf32"), True),
    "matmul ieee": (lambda: _set_matmul("ieee"), False),
    "matmul none": (lambda: _set_matmul("none"), False),
    "everywhere tf32": (lambda: _set_everywhere("tf32"), True),
    "everywhere ieee": (lambda: _set_everywhere("ieee"), False),
    "everywhere bf16": (lambda: _set_everywhere("bf16"), False),  # which CUDA devices do not know
    "everywhere tf32, matmul ieee": (lambda: (_set_everywhere("tf32"), _set_matmul("ieee")), False),
    "high, matmul ieee": (lambda: (torch.set_float32_matmul_precision("high"), _set_matmul("ieee")), False),
}


@contextlib.contextmanager
def fp32_precision(setting: str) -> Iterator[None]:
    """Within, one of the settings above."""
    FP32_PRECISIONS[setting][0]()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")  # first, since it sets the others
        _set_matmul("none")
        _set_everywhere("none")


@dataclass(frozen=True)
class Head:
    """What a kernel's problem can vary in besides its sizes."""

    name: str
    dtype: torch.dtype = torch.float32
    bias: bool = False
    shift: float = 0.0  # added to the bias
    masked: tuple[int, ...] = ()  # blocks of 128 columns whose bias is -inf
    span: float = 2.0  # factor of the weight
    scale: float = 1.0
    softcap: float | None = None
    vector: bool = False  # whether the smoothing is one number for each column
    valid_mask: str = "all"  # or "some", "one", "none"
    coarse: bool = False  # operands of few digits, so that products are exact and some logits equal

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def problem(self, tokens: int, hidden: int, vocabulary: int, statistics: frozenset = STATISTICS) -> Problem:
        bias = None
        if self.bias or self.masked:
            bias = self._numbers(vocabulary, seed=3) + self.shift
            for block in self.masked:
                bias[128 * block : 128 * (block + 1)] = -torch.inf
            bias = bias.to(DEVICE, torch.float32)
        smoothing = coarse(vocabulary, low=0.5, high=2, seed=4).to(DEVICE, torch.float32) / vocabulary
        weight = self._numbers(vocabulary, hidden, seed=2) * (1 if self.coarse else self.span / hidden**0.5)
        return Problem(
            shape=Shape(
                tokens=tokens,
                hidden=hidden,
                vocabulary=vocabulary,
                hidden_dtype=self.dtype,
                weight_dtype=self.dtype,
                compute_dtype=self.dtype,
                device_type=DEVICE,
                hidden_gradient=True,
                weight_gradient=True,
                bias_gradient=bias is not None,
                statistics=statistics,
                biased=bias is not None,
                softcapped=self.softcap is not None,
                threshold=None,
                scan="input",
                compacted=False,
                weight_layout="rows",
                main_grad=False,
                functional=False,
            ),
            hidden=self._numbers(tokens, hidden, seed=1).to(DEVICE, self.dtype),
            weight=weight.to(DEVICE, self.dtype),
            bias=bias,
            target=torch.randint(vocabulary, (tokens,), generator=generator(5)).to(DEVICE),
            head=HeadOptions(self.scale, self.softcap),
            valid_mask=self._mask(tokens),
            smoothing=smoothing if self.vector else 1 / vocabulary,
            main_grad=None,
            uniforms=None,
        )

    def _numbers(self, *size: int, seed: int) -> Tensor:
        if self.coarse:
            return coarse(*size, low=-2, high=2, seed=seed)
        return torch.randn(*size, generator=generator(seed), dtype=torch.float64)

    def _mask(self, tokens: int) -> Tensor | None:
        if self.valid_mask == "all":
            return None
        mask = torch.zeros(tokens, dtype=torch.bool)
        if self.valid_mask == "some":
            mask = torch.rand(tokens, generator=generator(6)) < 0.6
        if self.valid_mask == "one":
            mask[tokens // 2] = True
        return mask.to(DEVICE)


def counting(problem: Problem) -> Tensor:
    """[N] bool rows that count."""
    everything = torch.ones(problem.shape.tokens, dtype=torch.bool, device=DEVICE)
    return everything if problem.valid_mask is None else problem.valid_mask


def only_counting(problem: Problem) -> Problem:
    """The problem of the rows that count alone."""
    mask = counting(problem)
    shape = replace(problem.shape, tokens=int(mask.sum()))
    return replace(problem, shape=shape, hidden=problem.hidden[mask], target=problem.target[mask], valid_mask=None)


def logits(problem: Problem, dtype: torch.dtype, narrow: torch.dtype | None = None) -> Tensor:
    """[N, V] by plain operations in one dtype; with ``narrow``, each result is rounded to that."""

    def rounded(values: Tensor) -> Tensor:
        return values if narrow is None else values.to(narrow).to(dtype)

    z = rounded(problem.hidden.to(dtype) @ problem.weight.to(dtype).T)
    if problem.head.logit_scale != 1:
        z = rounded(problem.head.logit_scale * z)
    if problem.bias is not None:
        z = rounded(z + problem.bias.to(dtype))
    if problem.head.softcap is not None:
        z = rounded(problem.head.softcap * torch.tanh(z / problem.head.softcap))
    return z


def smoothing(problem: Problem, dtype: torch.dtype) -> Tensor | float:
    return problem.smoothing.to(dtype) if isinstance(problem.smoothing, Tensor) else problem.smoothing


def statistic(problem: Problem, name: str, dtype: torch.dtype, narrow: torch.dtype | None = None) -> Tensor:
    """[N] one of the fields of ``Statistics``, formed as plain PyTorch forms it: relative to the largest logit."""
    z = logits(problem, dtype, narrow)
    at_target = z.gather(1, problem.target[:, None])
    peak = z.amax(1)
    peak = torch.where(peak == -torch.inf, 0, peak)
    below = z - peak[:, None]
    log_sum = below.exp().sum(1).log()
    if name == "mean_gap":
        p = (below - log_sum[:, None]).exp()
        return -torch.where(p == 0, 0.0, p * below).sum(1)
    return {
        "peak": lambda: peak,
        "log_sum": lambda: log_sum,
        "target_logit": lambda: at_target[:, 0],
        "smooth_logit": lambda: (below * smoothing(problem, dtype)).sum(1),
        "prediction": lambda: (z == z.amax(1, keepdim=True)).to(torch.uint8).argmax(1),  # the first of equal ones
        "target_rank": lambda: (z > at_target).sum(1),
    }[name]()


def random_coefficients(tokens: int, *, b: bool = True, d: bool = True) -> Coefficients:
    a, b_values, c, d_values = coarse(4, tokens, low=-2, high=2, seed=7).to(DEVICE, torch.float32)
    return Coefficients(a=a, b=b_values if b else None, c=c, d=d_values if d else None)


def logits_gradient(
    problem: Problem, coefficients: Coefficients, dtype: torch.dtype, narrow: torch.dtype | None = None
) -> Tensor:
    """[N, V] the one form of every gradient, with the derivative of the cap and without the scale.

    With ``narrow``, logits and gradient are rounded to that dtype, as plain operations in it do.
    """
    z = logits(problem, dtype, narrow)
    p = z.log_softmax(1).exp()
    dz = coefficients.a.to(dtype)[:, None] * p
    if coefficients.b is not None:
        dz = dz + coefficients.b.to(dtype)[:, None] * torch.where(p == 0, 0.0, p * (z - z.amax(1, keepdim=True)))
    dz = dz.scatter_add(1, problem.target[:, None], -coefficients.c.to(dtype)[:, None])
    if coefficients.d is not None:
        dz = dz - coefficients.d.to(dtype)[:, None] * smoothing(problem, dtype)
    if problem.head.softcap is not None:
        dz = dz * (1 - (z / problem.head.softcap).square())
    return dz if narrow is None else dz.to(narrow)


def gathered(launcher: Launcher, rows: slice) -> Tensor:
    """[R, D] hidden states of places in the packed order."""
    return launcher.gather(rows, launcher.hidden_buffer(rows.stop - rows.start))


def exact_statistics(problem: Problem) -> Statistics:
    """Statistics of all rows, from fp64, rounded; NaN for rows that do not count, which nothing may read."""
    counts = counting(problem)
    values = {
        name: statistic(problem, name, torch.float64).float().masked_fill(~counts, torch.nan)
        for name in ("peak", "log_sum", "target_logit")
    }
    return Statistics(**values)


def check(name: str, ours: Tensor, formula: Callable[[torch.dtype], Tensor], plain: Tensor | None = None) -> None:
    """Assert that a result is as near to the formula in fp64 as the same formula in fp32, or ``plain``, is.

    Entries that are not finite must be the same.
    """
    exact, accumulated = formula(torch.float64), formula(torch.float32)
    plain = accumulated if plain is None else plain
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    finite = exact.isfinite()
    infinite, expected = ours[~finite].double(), exact[~finite]
    same = (infinite == expected) | (infinite.isnan() & expected.isnan())
    assert same.all(), f"{name}: not the same entries are infinite or NaN"
    ours, exact, accumulated, plain = (tensor[finite] for tensor in (ours, exact, accumulated, plain))
    error = (ours.double() - exact).norm().item()
    allowed = FACTOR * (plain.double() - exact).norm().item() + floor(exact, accumulated, ours)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, size {exact.norm():.3e}"
