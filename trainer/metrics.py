"""What every step writes down: JSONL for machines, TensorBoard for eyes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palaestra.gym.types import Episode, Group, Scored
from palaestra.trainer.advantages import Returns

TIMES = ("seconds", "tokens_per_second", "idle_share", "elapsed")
"""A metric whose name ends in one of these is a time: two deterministic runs may differ in it."""


def describe(groups: Sequence[Group], advantages: Returns, step: int, versions: Mapping[int, int]) -> dict[str, float]:
    """Reward by environment, outcomes by cause, share of zero advantages, staleness of the sampled tokens."""
    episodes = [episode for group in groups for episode in group.episodes]
    values = np.concatenate(advantages) if advantages else np.zeros(0)
    metrics = {f"reward/{name}": mean for name, mean in rewards(episodes).items()}
    causes = Counter(episode.outcome.cause.value for episode in episodes)
    metrics |= {f"outcome/{cause}": float(count) for cause, count in sorted(causes.items())}
    metrics["episodes"] = float(len(episodes))
    metrics["unscored_share"] = _share(not isinstance(episode.result, Scored) for episode in episodes)
    metrics["zero_advantage_share"] = float(np.mean(values == 0)) if len(values) else 0.0
    total = sum(versions.values()) or 1
    for version, count in sorted(versions.items()):
        metrics[f"staleness/{step - version}"] = count / total
    return metrics


def rewards(episodes: Sequence[Episode]) -> dict[str, float]:
    """The mean return of the scored episodes of each environment."""
    by_name: dict[str, list[float]] = {}
    for episode in episodes:
        if isinstance(episode.result, Scored):
            by_name.setdefault(episode.task.environment, []).append(episode.result.value)
    return {name: sum(found) / len(found) for name, found in sorted(by_name.items())}


def _share(flags: Any) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0


def is_time(name: str) -> bool:
    """Whether a metric measures time."""
    return name.endswith(TIMES)


class Log:
    """Appends a row a step to metrics.jsonl and to TensorBoard. A resumed run drops the rows past its checkpoint."""

    def __init__(self, folder: Path, stage: str, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        self._stage = stage
        kept = [row for row in read(self._path) if row["stage"] != stage or row["step"] < first]
        _rewrite(self._path, kept)
        self._board = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=first)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row. A value that is no number is written as null."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as out:
            out.write(json.dumps({"schema_version": 1, "stage": self._stage, "step": step, **clean}) + "\n")
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _rewrite(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    staged = path.with_suffix(".partial")
    staged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    staged.replace(path)
