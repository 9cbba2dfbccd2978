"""Live progress of a run: a moving line on a terminal, a line now and then in a log file."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from logitless_demo.memory import format_bytes
from logitless_demo.train import StepRecord

LINES_WITHOUT_TERMINAL = 6


class StepProgress:
    """Shows the steps of one run.

    Args:
        console: where to.
        label: the run's name.
        steps: steps in all.
        tokens: tokens a step.
        done: steps done before.
    """

    def __init__(self, console: Console, label: str, steps: int, tokens: int, done: int = 0) -> None:
        self._console = console
        self._label = label
        self._steps = steps
        self._tokens = tokens
        self._progress = Progress(
            TextColumn(f"[bold]{label:>9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("", total=steps, completed=done, numbers="")

    def __enter__(self) -> StepProgress:
        """Begins to draw, on a terminal."""
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the last state on the screen."""
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, record: StepRecord) -> None:
        """Shows a step that is done."""
        numbers = (
            f"loss {record.loss:7.4f}   {self._tokens / record.seconds:9,.0f} tokens/s   "
            f"peak {format_bytes(record.peak_bytes)} (head {format_bytes(record.head_bytes)})"
        )
        if record.held_out_loss is not None:
            numbers += f"   held-out loss {record.held_out_loss:.4f}"
        self._progress.update(self._task, completed=record.step, numbers=numbers)
        every = max(1, self._steps // LINES_WITHOUT_TERMINAL)
        if not self._console.is_terminal and (record.step % every == 0 or record.step in (1, self._steps)):
            self._console.print(f"{self._label:>9}  step {record.step:4d}/{self._steps}  {numbers}", soft_wrap=True)
