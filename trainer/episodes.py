"""A run's episodes on disk: `episodes/NAME.parquet`, a file for each step of RLVR and each evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from palaestra.gym import files, tables
from palaestra.gym.types import Episode
from palaestra.gym.wire import flat

PLACE = ("round", "sample", "attempt")


def write(folder: Path, name: str, episodes: Iterable[Episode], advantages: Iterable[float] | None = None) -> None:
    """Write `folder/episodes/NAME.parquet`, a row an episode, whole or not at all.

    Raises OSError (a full disk), ValueError where there are more or fewer advantages than episodes.
    """
    rows = [{**_place(episode), **flat(episode)} for episode in episodes]
    if advantages is not None:
        for row, advantage in zip(rows, advantages, strict=True):
            row["advantage"] = float(advantage)
    files.replace(folder / "episodes" / f"{name}.parquet", tables.parquet(rows))


def _place(episode: Episode) -> dict[str, Any]:
    return {name: episode.provenance.get(name) for name in PLACE}
