"""What the convergence study trains: its runs by name, and the settings they share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from logitless_demo.config import HeadKind, ModelConfig, Optimizer, Scan, TrainConfig

STUDY = TrainConfig(
    model=ModelConfig(hidden=1024, layers=2, heads=8),
    steps=960,
    batch=64,
    sequence=512,
    learning_rate=1e-3,
    warmup=100,
    eval_tokens=131_072,
)
# Settings that differ between runs or have no meaning here.
FIXED = ("text", "head", "threshold", "scan", "optimizer", "checkpoint_every")
SGD_LEARNING_RATE = 0.5
TIMED_STEPS = 100
# What the exact gradient gets done, at least, while the sampled one does all steps.
SHORT = 0.625
# Of the steps and of the highest learning rate, for runs that go on with a trained model.
TUNED_STEPS, TUNED_RATE = 0.25, 0.1


@dataclass(frozen=True)
class Run:
    """How one run differs from the others.

    Attributes:
        head: which head it trains with.
        seed: added to the study's seed.
        threshold: of the sampled head.
        scan: of the sampled head.
        optimizer: sgd takes the study's rate for it, and no weight decay.
        share: of the study's steps, which its learning rate comes down in.
        start: the run whose last weights it starts from, at a lower rate and with a new optimiser.
        timed: a short run for the time of a step alone, whose loss is compared with nothing.
    """

    head: HeadKind
    seed: int = 0
    threshold: float = 1 / 64
    scan: Scan = "input"
    optimizer: Optimizer = "adamw"
    share: float = 1.0
    start: str | None = None
    timed: bool = False

    def config(self, base: TrainConfig, sgd_learning_rate: float) -> TrainConfig:
        """Returns the run's settings, made of those all runs share and the learning rate of SGD."""
        config = replace(
            base,
            head=self.head,
            threshold=self.threshold,
            scan=self.scan,
            optimizer=self.optimizer,
            seed=base.seed + self.seed,
            steps=max(1, round(base.steps * self.share)),
        )
        if self.optimizer == "sgd":
            # Coupled decay shrinks weights by rate * decay / (1 - momentum) a step: by half at 0.5, 0.1 and 0.9.
            config = replace(config, learning_rate=sgd_learning_rate, weight_decay=0.0)
        if self.start is not None:
            rate, warmup = TUNED_RATE * config.learning_rate, round(config.warmup * self.share)
            config = replace(config, learning_rate=rate, warmup=warmup)
        return replace(config, steps=min(config.steps, TIMED_STEPS)) if self.timed else config


# In the order they run: what is compared most comes first.
RUNS = {
    "exact-0": Run("exact"),
    "sampled-64-0": Run("sampled"),
    "exact-1": Run("exact", seed=1),
    "sampled-64-1": Run("sampled", seed=1),
    "compiled-0": Run("compiled", timed=True),
    "exact-short-0": Run("exact", share=SHORT),
    "sampled-16-0": Run("sampled", threshold=1 / 16),
    "sampled-32-0": Run("sampled", threshold=1 / 32),
    "sampled-128-0": Run("sampled", threshold=1 / 128),
    "sgd-exact-0": Run("exact", optimizer="sgd"),
    "sgd-sampled-64-0": Run("sampled", optimizer="sgd"),
    "sgd-exact-1": Run("exact", seed=1, optimizer="sgd"),
    "fp8-64-0": Run("sampled", scan="fp8"),
    "fp8-64-1": Run("sampled", seed=1, scan="fp8"),
    # Seeds of their own, so that the text comes in another order than the weights have seen it in.
    "tuned-exact-2": Run("exact", seed=2, share=TUNED_STEPS, start="exact-0"),
    "tuned-sampled-64-2": Run("sampled", seed=2, share=TUNED_STEPS, start="exact-0"),
    "tuned-fp8-64-2": Run("sampled", seed=2, scan="fp8", share=TUNED_STEPS, start="exact-0"),
    "tuned-exact-3": Run("exact", seed=3, share=TUNED_STEPS, start="exact-0"),
    "tuned-sampled-64-3": Run("sampled", seed=3, share=TUNED_STEPS, start="exact-0"),
    "tuned-fp8-64-3": Run("sampled", seed=3, scan="fp8", share=TUNED_STEPS, start="exact-0"),
}


def pairing(name: str, other: str) -> str | None:
    """Returns what sets a run apart from the one it is held against.

    Which is "seed", "gradient", "gradient and steps" for about equal time, or None if they are not to be compared.
    """
    run, reference = RUNS[name], RUNS[other]
    if run.timed or reference.timed or (run.optimizer, run.start) != (reference.optimizer, reference.start):
        return None
    if (run.head, reference.head, run.seed) == ("sampled", "exact", reference.seed):
        return "gradient" if run.share == reference.share else "gradient and steps"
    return "seed" if replace(run, seed=reference.seed) == reference and run.seed > reference.seed else None
