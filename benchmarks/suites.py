"""The tasks of SWE and terminal, and evaluations over them: bars 5 to 7 of group sandbox."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from bars import ROOT, Measured
from cases import measured
from learning import COMMAND, fingerprint

from palaestra.environments.swe.environment import Swe
from palaestra.environments.terminal import Terminal
from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment, gold_of
from palaestra.gym.episode import run_episode
from palaestra.gym.policies import Null
from palaestra.gym.policy import Policy, Replay
from palaestra.gym.types import Message, Sampling, Scored, Task

TASKS, PACKAGES, MINUTES = 300, 15, 90
SWE_SAMPLE, TERMINAL_SAMPLE, TEMPLATES, SECONDS = 50, 200, 20, 2.0
EPISODES, AT_ONCE = 1000, 16
LONGEST = 6 * 3600
EDIT_TESTS = (
    "cd /work/repo; mkdir -p tests; echo 'def test_all(): pass' | tee tests/test_all.py test_all.py conftest.py"
)
FAULTS = {
    "boxes and launchers killed": "test_boxes_and_launchers_killed_in_mid_episode_cost_retries_and_no_score",
    "a box used up by its own episode": "test_a_box_that_its_own_episode_used_up_is_scored",
    "a full disk": "test_a_full_disk_of_this_machine_leaves_episodes_unscored_until_there_is_room",
    "Docker's daemon stopped": "test_a_daemon_that_is_stopped_in_mid_run_costs_no_score",
}


def typing(commands: Sequence[str]) -> Replay:
    """A policy that runs the commands, one after the other."""
    return Replay([*(Message.calling("bash", command=line) for line in commands), Message(role="assistant")])


async def played(make: Callable[[], Environment], task: Task, policy: Policy) -> tuple[float | None, float]:
    """The return of an episode (None: unscored), and its seconds."""
    started = time.monotonic()
    episode = await run_episode(make(), Loop(), {"main": policy}, task, Sampling(), f"bar-{task.key}")
    return (episode.result.value if isinstance(episode.result, Scored) else None), time.monotonic() - started


def swe_tasks() -> Measured:
    """Built anew by one command, and a random sample of those that ship."""
    minutes, built = _build()
    shipped = _counts(ROOT / "tasks" / "data" / "swe")
    sample = asyncio.run(_swe_sample())
    figures = {"built anew": built, "minutes": round(minutes, 1), "shipped": shipped, f"{SWE_SAMPLE} at random": sample}
    enough = all(sum(found.values()) >= TASKS and len(found) >= PACKAGES for found in (built, shipped))
    right = all(
        returns == {value: SWE_SAMPLE} for returns, value in zip(sample.values(), ("1.0", "0.0", "0.0"), strict=True)
    )
    return Measured(enough and minutes <= MINUTES and right, figures)


def _build() -> tuple[float, dict[str, int]]:
    """Minutes of the build, summed over its interruptions, and its tasks by package."""
    folder = ROOT / "runs" / "bars" / fingerprint() / "swe"
    folder.mkdir(parents=True, exist_ok=True)
    spent = folder / "seconds"
    started = time.monotonic()
    try:
        command = [str(COMMAND), "tasks", "build", "swe", "--count", str(TASKS), "--output", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=LONGEST, stdout=subprocess.DEVNULL)
    finally:
        before = float(spent.read_text()) if spent.exists() else 0.0
        spent.write_text(str(before + time.monotonic() - started))
    return float(spent.read_text()) / 60, _counts(folder)


def _counts(folder: Path) -> dict[str, int]:
    tasks = list(Swe.task_set(Swe.Config(folder=str(folder))))
    return dict(Counter(task.data["package"] for task in tasks))


async def _swe_sample() -> dict[str, dict[str, int]]:
    """Returns of the gold solution, of nothing, and of tests edited where the bug stays; each with how often."""
    config = Swe.Config()
    tasks = random.Random(time.time_ns()).sample(list(Swe.task_set(config)), SWE_SAMPLE)
    backend = await Swe.open(config)
    submit = Message.calling("submit")
    ways: dict[str, Callable[[Task], Policy]] = {
        "gold": lambda task: Replay(gold_of(Swe(config, backend), task) or []),
        "nothing": lambda task: Null(),
        "tests edited": lambda task: Replay([Message.calling("bash", command=EDIT_TESTS), submit]),
    }
    try:
        found = {
            name: [await played(lambda: Swe(config, backend), task, way(task)) for task in tasks]
            for name, way in ways.items()
        }
    finally:
        await Swe.shut(backend)
    return {name: dict(Counter(str(value) for value, _ in results)) for name, results in found.items()}


def terminal_tasks() -> Measured:
    """Random tasks of all families and levels: the gold solution, nothing, and the gold solution with a slip."""
    returns, seconds, templates = asyncio.run(_terminal_sample())
    figures = {
        "templates": templates,
        "returns": returns,
        "seconds, median and longest": [round(sorted(seconds)[len(seconds) // 2], 3), round(max(seconds), 3)],
    }
    right = [
        returns[name] == {value: TERMINAL_SAMPLE}
        for name, value in (("gold", "1.0"), ("nothing", "0.0"), ("slip", "0.0"))
    ]
    return Measured(all(right) and templates >= TEMPLATES and max(seconds) < SECONDS, figures)


async def _terminal_sample() -> tuple[dict[str, dict[str, int]], list[float], int]:
    r = random.Random(time.time_ns())
    config = Terminal.Config()
    source = Terminal.iter_tasks(config, "train", r.randrange(10**9))
    tasks = [next(source) for _ in range(TERMINAL_SAMPLE)]
    backend = await Terminal.open(config)
    ways: dict[str, Callable[[Task], Sequence[str]]] = {
        "gold": lambda task: [task.data["script"]],
        "nothing": lambda task: [],
        "slip": lambda task: [task.data["script"], slip(task, r)],
    }
    returns, seconds = {}, []
    try:
        for name, way in ways.items():
            policies = [
                Replay(
                    [
                        *(Message.calling("bash", command=line) for line in way(task)),
                        Message(role="assistant", content="done"),
                    ]
                )
                for task in tasks
            ]
            found = [
                await played(lambda: Terminal(config, backend), task, policy)
                for task, policy in zip(tasks, policies, strict=True)
            ]
            returns[name] = dict(Counter(str(value) for value, _ in found))
            seconds += [took for _, took in found]
    finally:
        await Terminal.shut(backend)
    return returns, seconds, len({task.data["template"] for task in tasks})


def slip(task: Task, r: random.Random) -> str:
    """A command that spoils a little of what is right: a wrong mode, a line too many, a file too many or too few."""
    files = [path for path, node in task.data["after"].items() if node.get("kind", "file") == "file"]
    if not files or r.random() < 0.3:
        return "touch /work/one-more"
    path = shlex.quote(f"/work/{r.choice(files)}")
    return r.choice((f"chmod 0711 {path}", f"echo >> {path}", f"rm {path}"))


def evaluations() -> Measured:
    """Episodes of gold over SWE, terminal and code without one error of infrastructure; then with faults."""
    out = ROOT / "runs" / "bars" / fingerprint() / "gold"
    names = ("swe", "terminal", "code")
    each = EPISODES * 11 // (9 * len(names))  # of SWE fewer can be had: a tenth is held out
    chosen = [part for name in names for part in ("--env", name)]
    command = [
        str(COMMAND),
        "eval",
        "--policy",
        "scripted:gold",
        *chosen,
        "--tasks",
        str(each),
        "--split",
        "train",
        "--concurrency",
        str(AT_ONCE),
        "--out",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LONGEST, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    plain = {
        name: dict(Counter(f"{r['outcome']}, {r['reward']}" for r in rows if r["environment"] == name))
        for name in names
    }
    faults = measured({name: f"tests/test_sandbox_faults.py::{test}" for name, test in FAULTS.items()})
    clean = all(set(found) == {"ok, 1.0"} for found in plain.values()) and len(rows) >= EPISODES
    return Measured(clean and faults.met, {"outcome, reward": plain, "with faults": faults.figures})
