"""A run's episodes on disk: `episodes/NAME.parquet`, a file for each step of RLVR and each evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from palaestra.gym import files, tables
from palaestra.gym.types import Episode
from palaestra.gym.wire import flat

PLACE = ("round", "sample", "attempt")


def write(folder: Path, name: str, episodes: Iterable[Episode], advantages: Iterable[float] = ()) -> None:
    """Write `folder/episodes/NAME.parquet`, a row an episode, whole or not at all. Raises OSError (a full disk)."""
    rows = [{**_place(episode), **flat(episode)} for episode in episodes]
    for row, advantage in zip(rows, advantages, strict=False):
        row["advantage"] = float(advantage)
    files.replace(folder / "episodes" / f"{name}.parquet", tables.parquet(rows))


def _place(episode: Episode) -> dict[str, Any]:
    return {name: episode.provenance.get(name) for name in PLACE}
