"""Bar 8 of group sandbox: the quickstart with the terminal, without it where there is no sandbox, and swe-mini."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from bars import Measured
from learning import gains, learns, mean, quickstart, rows, three_seeds, train

SWE_MINUTES = 30
STEPS = 5


def learning() -> Measured:
    """Bar 1 of group main with four environments; one run as on a machine without bubblewrap; swe-mini's gain."""
    four = three_seeds()
    environments = sorted(four.figures["runs"]["seed 0"]["environments"])
    three = gains(_without_bubblewrap())
    repairs = _repairs(train("swe-mini", "swe-mini"))
    figures: dict[str, Any] = {
        "environments": environments,
        "missed": four.figures["missed"],
        "mean gain": {name: run["mean gain"] for name, run in four.figures["runs"].items()},
        "minutes": {name: run["minutes"] for name, run in four.figures["runs"].items()},
        "without bubblewrap": three,
        "missed without bubblewrap": learns(three),
        "swe-mini": repairs,
    }
    met = four.met and "terminal" in environments and "terminal" not in three["environments"]
    return Measured(met and not learns(three) and repairs["minutes"] <= SWE_MINUTES, figures)


def _repairs(folder: Path) -> dict[str, Any]:
    """The gains of swe-mini, and what RLVR added to the demonstrations."""
    returns = [row["reward/swe"] for row in rows(folder) if row["stage"] == "rlvr"]
    return {
        **gains(folder),
        "RLVR, first and last steps": [round(mean(returns[:STEPS]), 3), round(mean(returns[-STEPS:]), 3)],
    }


def _without_bubblewrap() -> Path:
    """A run of the quickstart that finds every program but bubblewrap."""
    with tempfile.TemporaryDirectory() as folder:
        for place in os.environ["PATH"].split(os.pathsep):
            for program in Path(place).glob("*"):
                link = Path(folder) / program.name
                if program.name != "bwrap" and not link.is_symlink():
                    link.symlink_to(program)
        path = os.environ["PATH"]
        os.environ["PATH"] = folder
        try:
            return quickstart(0, "without-bubblewrap")
        finally:
            os.environ["PATH"] = path
