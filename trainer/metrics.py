"""What every step writes down: JSONL for machines, TensorBoard for eyes."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from palaestra.gym import files
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


class Board:
    """A TensorBoard file of scalars, written in the caller's thread: the usual writer's own thread prints a traceback
    when the disk is full. What was written from step `first` on is no longer shown."""

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._records = RecordWriter(path.open("wb"))
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first, file_version="brain.Event:2")
        self._write(step=first, session_log=start)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of a step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file. What a full disk refused is refused again here: that is not news."""
        with suppress(OSError):
            self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


class Log:
    """Appends a row a step to metrics.jsonl and to TensorBoard. A resumed run drops the rows past its checkpoint."""

    def __init__(self, folder: Path, stage: str, first: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._stage = stage
        kept = [row for row in read(self._path) if row["stage"] != stage or row["step"] < first]
        _rewrite(self._path, kept)
        self._board = Board(folder / "tensorboard" / stage, first)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row. A value that is no number is written as null."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as out:
            out.write(json.dumps({"schema_version": 1, "stage": self._stage, "step": step, **clean}) + "\n")
        self._board.add(step, {name: value for name, value in clean.items() if value is not None})

    def close(self) -> None:
        """Close what is open."""
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


def signal_seen(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any step of RLVR had an advantage other than zero: without one nothing was learned."""
    shares = [row["zero_advantage_share"] for row in rows if "zero_advantage_share" in row]
    return not shares or min(shares) < 1


def _rewrite(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    files.replace(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
