"""What a run shows: in the terminal a live table, a progress bar and the reward of each environment; else lines."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

FIRST, LATEST = 0, 1


LINES = 4
"""What an evaluation prints in a pipe, each way of drawing apart."""


class Screen:
    """Shows each step as it ends; in a pipe a line a step, and the last picture."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
        self._bars: dict[str, int] = {}
        self._rewards: dict[str, tuple[float, float]] = {}
        self._live = Live(self._progress, refresh_per_second=4)

    def __enter__(self) -> Screen:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.__exit__(kind, error, at)
        if not self._live.console.is_terminal:
            self._live.console.print()  # rich ends the last picture without a line break

    def show(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """One more step of a stage."""
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=steps)
        self._progress.update(self._bars[stage], completed=step + 1)  # type: ignore[arg-type]
        for name, value in metrics.items():
            if name.startswith("reward/"):
                first = self._rewards.get(name, (value, value))[FIRST]
                self._rewards[name] = (first, value)
        self._live.update(Group(self._table(metrics), self._progress) if self._rewards else self._progress)
        if not self._live.console.is_terminal:
            self._print(stage, step, steps, metrics)

    def _print(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        done = step + 1
        if not metrics and done * LINES // steps == step * LINES // steps:
            return
        rewards = [name for name in metrics if name.startswith("reward/")]
        shown = rewards or [name for name in ("loss",) if name in metrics]
        values = "  ".join(f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in shown)
        self._live.console.print(f"{stage} {done}/{steps}  {values}".rstrip(), highlight=False)

    def _table(self, metrics: Mapping[str, float]) -> Table:
        table = Table("environment", "first", "now", "change")
        for name, (first, latest) in self._rewards.items():
            cells = (f"{first:.3f}", f"{latest:.3f}", f"{latest - first:+.3f}")
            table.add_row(name.removeprefix("reward/"), *cells)
        shown = ("loss", "entropy", "grad_norm", "logprob_gap", "step_seconds")
        table.caption = "  ".join(f"{name} {metrics[name]:.3g}" for name in shown if name in metrics)
        return table
