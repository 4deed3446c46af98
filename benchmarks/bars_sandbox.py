"""The acceptance bars of sandboxes and what stands on them: `make bars GROUP=sandbox`.

None is marked as quick: CI runs the tests that bars 1, 2 and 4 count, slow ones included.
"""

from __future__ import annotations

import agents
import boxes
import four
import suites
from bars import bar

BARS = (
    bar(1, "at least 40 attacks, stopped by native and by docker")(boxes.attacks),
    bar(2, "at least 20 reward hacks earn what doing nothing earns")(boxes.hacks),
    bar(3, "native 10 times faster than docker, commands under 2 ms, 64 boxes in 8 s, nothing left behind")(
        boxes.speed
    ),
    bar(4, "the tests that need Docker, none skipped")(boxes.real_docker),
    bar(5, "300 SWE tasks of 15 packages within 90 minutes; gold 1, nothing and edited tests 0")(suites.swe_tasks),
    bar(6, "200 terminal tasks: gold 1, untouched 0, a slip 0, each under 2 s")(suites.terminal_tasks),
    bar(7, "1,000 gold episodes without an error of infrastructure; faults cost no score")(suites.evaluations),
    bar(8, "four environments gain .08 each, .15 in the mean, in 20 minutes; swe-mini's gain")(four.learning),
    bar(9, "an agent of another make is judged; SmolLM2 plays 20 terminal and 20 SWE tasks")(agents.real_agents),
)
