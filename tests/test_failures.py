"""What fails in mid-run, and what was wrong from the start: the real command line, real processes, a real full disk.

`benchmarks/failures.py` runs this file for bars 6 and 7 and reports the properties that it records.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from palaestra.gym.outcome import RULES, Cause
from palaestra.gym.policies import Gold
from palaestra.gym.registry import spec
from palaestra.gym.types import Scored, Unscored
from palaestra.model.network import Hybrid
from palaestra.model.presets import PRESETS
from palaestra.rollout.pool import Draw, Pool, PoolConfig
from palaestra.rollout.worker import Worker
from palaestra.trainer import metrics

COMMAND = Path(sys.executable).with_name("palaestra")
UNGRADED = {cause.value for cause, rule in RULES.items() if not rule.graded}
WORLDS = '''
import os
import random
from pydantic import BaseModel
from palaestra.gym.environment import Environment, ToolUnavailable, reward, tool
from palaestra.gym.tasksets import split_of
from palaestra.gym.types import Message, Task, ToolCall
from palaestra.gym.worker import worker


def tasks(split, seed):
    number = 1000 * seed
    while True:
        number += 1
        if split_of(str(number)) == split:
            yield Task(key=str(number), prompt="say", data={"words": [f"{number}-{place}" for place in range(3)]})


class Witness(Environment):
    """Whatever is said scores 1: a score below it comes from something else than the reply."""

    tasks = tasks

    @reward
    def heard(self) -> float:
        return 1.0


class Flaky(Environment):
    """Look words up in a backend of which a share of the calls fails."""

    class Config(BaseModel):
        share: float = 0.03

    tasks = tasks

    @classmethod
    async def open(cls, config):
        return random.Random(7)

    @tool
    def look(self, word: str) -> str:
        """Look a word up."""
        if self.resources.random() < self.config.share:
            raise ToolUnavailable("the backend is down", retry_after=0.001)
        return word[::-1]

    @reward
    def told(self, task, episode) -> float:
        shown = [message.content for turn in episode.turns for message in turn.added if message.role == "tool"]
        return float(shown == [word[::-1] for word in task.data["words"]] and episode.answer == " ".join(shown))

    def solution(self, task):
        calls = [ToolCall(id="", name="look", arguments='{"word": "%s"}' % word) for word in task.data["words"]]
        answer = Message(role="assistant", content=" ".join(word[::-1] for word in task.data["words"]))
        return [*(Message(role="assistant", tool_calls=(call,)) for call in calls), answer]


def run(source):
    """A careless verifier: the reply runs in its own process."""
    space = {}
    exec(source, space)
    return float(space["f"](1) == 2)


class Careless(Environment):
    """Write f(x) = x + 1."""

    class Config(BaseModel):
        sick: bool = False

    tasks = tasks

    @reward
    async def right(self, answer):
        return await worker(run, "import os; os._exit(3)" if self.config.sick else answer, timeout=2)

    def solution(self, task):
        return "def f(x): return x + 1"
'''
RECIPE = """
model = "preset:tiny"
threads = 1
[environments.math]
use = "math"
[environments.code]
use = "code"
[environments.search]
use = "search"
[pool]
groups = 6
group_size = 4
[rollout]
max_tokens = 16
slots = 64
[evaluation]
tasks = 0
[checkpoint]
every = 1
keep = 3
[stages.rl]
loss = "rlvr"
steps = 4
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the recipe r.toml and the environments of worlds.py."""
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "worlds.py").write_text(WORLDS)
    return tmp_path


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Keeps a figure for the bars' report, as JSON."""
    return lambda name, value: record_property(name, json.dumps(value))


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command line, in `place`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([COMMAND, *arguments], cwd=place, env=environment, text=True, **pipes)


def run(place: Path, *arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line in `place`, to its end."""
    process = start(place, *arguments)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def refusal(done: subprocess.CompletedProcess[str], *words: str) -> str:
    """The one line with which a command ended; it holds the words."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith("palaestra: ")
    assert "Traceback" not in done.stdout + done.stderr
    assert [word for word in words if word not in line] == [], line
    return line


def some(cases: Mapping[str, Any], *quick: str) -> list[Any]:
    """The names of the cases; all but the quick ones are slow tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return metrics.read(folder / "metrics.jsonl")


# -- bar 6: an actor is killed


BUSY = {"EnvironmentActor": "play", "PolicyActor": "generate"}
LOST_AS = {"EnvironmentActor": "environment", "PolicyActor": "model-server"}


def offspring(root: int) -> dict[int, str]:
    """The processes below `root`, with their titles."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, todo = {}, [root]
    while todo:
        for child in parents.get(todo.pop(), []):
            found[child] = title(child)
            todo.append(child)
    return found


def title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def eventually(what: str, check: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true value of `check`, asked again and again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = check()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds:g} s for {what}")


class Trained:
    """A `palaestra train` on Ray under way, whose actors get killed."""

    def __init__(self, place: Path, *overrides: str) -> None:
        self.folder = place / "runs" / "r"
        self.process = start(place, "train", "r.toml", "placement=shared", *overrides)
        self.killed: list[str] = []
        self.seen: dict[int, str] = {}

    def rows(self) -> int:
        """How many steps have ended."""
        assert self.process.poll() is None, self.process.communicate()
        return len(rows_of(self.folder))

    def kill(self, kind: str) -> None:
        """Kill the actor's process while it works."""
        self.seen |= offspring(self.process.pid)
        actor = eventually(f"a busy {kind}", lambda: self._busy(kind))
        os.kill(actor, signal.SIGKILL)
        self.killed.append(kind)

    def _busy(self, kind: str) -> int | None:
        assert self.process.poll() is None, self.process.communicate()
        titles = offspring(self.process.pid)
        return next((pid for pid, text in titles.items() if text == f"ray::{kind}.{BUSY[kind]}"), None)

    def kill_until_lost(self, kind: str) -> None:
        """Kill the actor until that cost an episode: it may have sent its last answer just before."""
        for _ in range(3):
            before = self.rows()
            self.kill(kind)
            eventually("two more steps", lambda known=before: self.rows() >= known + 2)
            if f"retried/{LOST_AS[kind]}" in rows_of(self.folder)[-1]:
                return
        raise AssertionError(f"three deaths of the {kind} cost no episode")

    def end(self) -> None:
        """Wait for the end; it is a good one, and every process is gone."""
        self.seen |= offspring(self.process.pid)
        out, err = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, (out, err)
        assert "Traceback" not in err
        assert json.loads((self.folder / "summary.json").read_text())
        eventually(
            "the end of every process", lambda: not [pid for pid, text in self.seen.items() if self._is(pid, text)]
        )

    def _is(self, pid: int, text: str) -> bool:
        return bool(text) and title(pid).partition(".")[0] == text.partition(".")[0]

    def close(self) -> None:
        """End what a failed test left."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture
def trained(place: Path) -> Iterator[Callable[..., Trained]]:
    running: list[Trained] = []

    def begin(*overrides: str) -> Trained:
        running.append(Trained(place, 'environments.witness.use="worlds.py:Witness"', "pool.groups=8", *overrides))
        return running[-1]

    yield begin
    for run in running:
        run.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_killed_in_training_cost_retries_and_no_zero(trained, record) -> None:
    run = trained("stages.rl.steps=12", "rollout.max_tokens=48")
    eventually("the first step", run.rows)
    run.kill_until_lost("EnvironmentActor")
    run.kill_until_lost("PolicyActor")
    run.end()
    rows = rows_of(run.folder)
    assert [row["step"] for row in rows] == list(range(12))
    for row in rows:
        outcomes = {name.removeprefix("outcome/"): count for name, count in row.items() if name.startswith("outcome/")}
        lost = sum(count for cause, count in outcomes.items() if cause in UNGRADED)
        assert sum(outcomes.values()) == row["episodes"] == 32
        assert round(row["unscored_share"] * 32) == lost
        assert row["reward/witness"] == 1
    retried = {name.removeprefix("retried/"): int(count) for name, count in rows[-1].items() if "retried/" in name}
    unscored = Counter(
        {name: int(row[name]) for row in rows for name in row if name.removeprefix("outcome/") in UNGRADED}
    )
    record("killed", dict(Counter(run.killed)))
    record("retried", retried)
    record("unscored", dict(unscored))
    record("lowest_reward_of_what_always_scores_1", min(row["reward/witness"] for row in rows))
    assert set(retried) == {"environment", "model-server"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_killed_in_an_evaluation_cost_no_score(trained, record) -> None:
    run = trained("stages.rl.steps=1", "rollout.max_tokens=48", "evaluation.tasks=60")
    for kind in BUSY:
        run.kill(kind)
        assert not rows_of(run.folder)
        eventually(f"another {kind}", lambda kind=kind: run._busy(kind))
    run.end()
    scores = json.loads((run.folder / "scores.json").read_text())
    counts = {(name, mode): len(found) for name, part in scores["before"].items() for mode, found in part.items()}
    record("killed", dict(Counter(run.killed)))
    record("scored", sum(counts.values()))
    assert len(counts) == 8
    assert set(counts.values()) == {60}
    assert set(scores["before"]["witness"]["mean"].values()) == {1.0}


# -- bar 6: a reply crashes its verifier

TESTS = "assert f(1, 2) == 2\nassert f(3, 2) == 3"
RIGHT = "def f(a, b):\n    return max(a, b)"
SEVEN = "\ndef f(a, b):\n    return 7"
CRASHES = {
    "exits": "import os\nos._exit(0)",
    "exits in the call": "def f(a, b):\n    import os\n    os._exit(0)",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)" + SEVEN,
    "kills its group": "import os\nos.killpg(0, 9)",
    "kills its parent's group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)" + SEVEN,
    "stops its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)" + SEVEN,
    "asks for a terabyte": "x = bytearray(1 << 40)" + SEVEN,
    "eats memory": "def f(a, b):\n    x = []\n    while True: x.append(bytearray(1 << 24))",
    "never ends": "while True: pass",
    "breaks the interpreter": "import ctypes\nctypes.string_at(0)",
    "forks for ever": "import os\nwhile True: os.fork()",
    "closes every file": "import os\nos.closerange(0, 64)" + SEVEN,
    "writes nonsense": "import os\nfor d in range(3, 64):\n    try: os.write(d, b'x' * 999)\n    except OSError: pass"
    + SEVEN,
    "answers too much": "def f(a, b): return 'x' * (1 << 26)",
    "leaves a child": "import os, subprocess\nsubprocess.Popen(['sleep', '99'], start_new_session=True)\nos._exit(0)",
}
if os.getuid() == 0:  # another user's processes are out of reach only for a reply that gives its own user up
    CRASHES["kills all that it may"] = "import os\nos.kill(-1, 9)" + SEVEN


def verdicts(place: Path, environment: str, replies: Mapping[str, str], *overrides: str) -> dict[str, dict[str, Any]]:
    """What `env score` says to each reply, by its name."""
    rows = [{"key": key, "tests": TESTS, "entry_point": "f", "reply": reply} for key, reply in replies.items()]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(place, "env", "score", environment, *overrides, "--input", "rows.jsonl", "--output", "verdicts.jsonl")
    found = [json.loads(line) for line in (place / "verdicts.jsonl").read_text().splitlines()]
    return {verdict["key"]: verdict for verdict in found}


def test_code_that_crashes_its_judge_is_scored_zero_and_the_next_reply_is_judged(place, record) -> None:
    found = verdicts(place, "code", {**CRASHES, "right": RIGHT})
    record("outcomes", dict(Counter(found[key]["outcome"] for key in CRASHES)))
    record("rewards", dict(Counter(str(found[key]["reward"]) for key in CRASHES)))
    assert {key: found[key]["reward"] for key in CRASHES} == dict.fromkeys(CRASHES, 0.0)
    assert all(found[key]["outcome"] in ("ok", "policy:crash") for key in CRASHES)
    assert found["right"]["reward"] == 1.0


def test_a_reply_that_kills_a_careless_verifier_is_the_policys_doing(place, record) -> None:
    crashes = {
        "exit": "import os; os._exit(3)",
        "kill": "import os; os.kill(os.getpid(), 9)",
        "group": "import os; os.killpg(0, 9)",
        "hang": "while True: pass",
    }
    found = verdicts(place, "worlds.py:Careless", {**crashes, "right": "def f(x): return x + 1"})
    record("outcomes", dict(Counter(found[key]["outcome"] for key in crashes)))
    assert {(found[key]["reward"], found[key]["outcome"]) for key in crashes} == {(0.0, "policy:crash")}
    assert found["right"]["reward"] == 1.0
    sick = verdicts(place, "worlds.py:Careless", {"right": "def f(x): return x + 1"}, "config.sick=true")["right"]
    assert (sick["reward"], sick["outcome"]) == (None, "verifier")


# -- bar 6: a tool's backend fails


async def played(place: Path, share: float, **config: Any) -> tuple[Pool, list[Any]]:
    """The episodes of one round of gold on Flaky."""
    flaky = spec(f"flaky={place / 'worlds.py'}:Flaky", {"share": share})
    player = Worker({"flaky": flaky}, {"main": Gold()})
    pool = Pool({"flaky": flaky}, {"flaky": 1.0}, player, PoolConfig(staleness=0, **config), Draw(0))
    try:
        groups = await pool.collect(0)
    finally:
        await pool.close()
        await player.close()
    return pool, [episode for group in groups for episode in group.episodes]


async def test_a_tool_that_fails_3_percent_of_its_calls_costs_retries_and_no_reward(place, record) -> None:
    pool, episodes = await played(place, 0.03, groups=75, group_size=4)
    calls, retries = (int(sum(e.metrics[name] for e in episodes)) for name in ("tool_calls", "tool_retries"))
    record("episodes", len(episodes))
    record("calls", calls)
    record("retries", retries)
    record("wrong_rewards", sum(episode.result != Scored(value=1.0) for episode in episodes))
    assert calls == 900
    assert 9 <= retries <= 60
    assert all(episode.result == Scored(value=1.0) for episode in episodes)
    assert pool.outcomes == {("flaky", "ok"): 300}


async def test_a_tool_that_is_down_costs_scores_and_gives_none(place) -> None:
    pool, episodes = await played(place, 1.0, groups=2, group_size=2, lost_share=1.0)
    assert all(isinstance(episode.result, Unscored) for episode in episodes)
    assert pool.outcomes == {("flaky", "tools"): 4}
    assert pool.retried == {"tools": 4 * RULES[Cause.TOOLS].retries}


def test_an_evaluation_over_a_failing_tool_is_right_everywhere(place, record) -> None:
    done = run(
        place, "eval", "--policy", "scripted:gold", "--env", "flaky=worlds.py:Flaky", "-n", "200", "--out", "out"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / "out" / "episodes.jsonl").read_text().splitlines()]
    retries = int(sum(row["metrics"]["tool_retries"] for row in rows))
    record("episodes", len(rows))
    record("retries", retries)
    assert len(rows) == 200
    assert {row["reward"] for row in rows} == {1.0}
    assert retries > 0


# -- bar 7: the recipe, the data or the model is wrong


def broken_model(place: Path) -> None:
    """Two checkpoint folders, one of damaged weights and one of a damaged config.json."""
    from palaestra.model import checkpoint

    checkpoint.save(Hybrid(PRESETS["tiny"]), place / "model")
    shutil.copytree(place / "model", place / "model2")
    weights = place / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (place / "model2" / "config.json").write_text('{"hidden_size": ')


def broken_data(place: Path) -> None:
    """Data files, each wrong in another way."""
    (place / "cut.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "ans\n')
    (place / "column.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (place / "empty.jsonl").write_text("")
    (place / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(9000).hex().encode())[:2000])
    (place / "cut.parquet").write_bytes(b"PAR1 nothing")


SOURCE = "environments.math.config.source="
WRONG = {
    "unknown key": (["pool.group=3"], "r.toml", "pool.group", "did you mean 'groups'?"),
    "unknown environment": (["environments.math.use=maths"], "r.toml", "'maths'", "did you mean 'math'?"),
    "unknown config key": (["environments.math.config.sauce=1"], "r.toml", "'sauce'", "did you mean 'source'?"),
    "impossible value": (["pool.groups=0"], "r.toml", "pool.groups", "greater than or equal to 1", "0"),
    "negative weight": (["environments.math.weight=-1"], "r.toml", "environments.math.weight", "greater than 0"),
    "text for a number": (["rollout.temperature=hot"], "r.toml", "rollout.temperature", "a valid number", "hot"),
    "unknown loss": (["stages.rl.loss=ppo"], "r.toml", "stages.rl.loss", "known: rlvr, sft"),
    "key without effect": (["ray.environment_actors=2"], "r.toml", "ray has no effect", "choose"),
    "unknown preset": (["model=preset:huge"], "'huge'", "known: base, mini"),
    "missing model": (["model=nowhere"], "no checkpoint folder nowhere", "give one"),
    "damaged model": (["model=model"], "model/model.safetensors", "damaged", "fetch or write it anew"),
    "damaged config": (["model=model2"], "model2/config.json", "give the folder of a checkpoint"),
    "missing data": ([SOURCE + "no.jsonl"], "r.toml", "math", "no data file no.jsonl", "give the path"),
    "cut data": ([SOURCE + "cut.jsonl"], "r.toml", "math", "cut.jsonl, line 2", "not JSON"),
    "missing column": ([SOURCE + "column.jsonl"], "column.jsonl, row 1", "no column 'prompt'", "question, answer"),
    "empty data": ([SOURCE + "empty.jsonl"], "r.toml", "math", "no tasks in split 'train'"),
    "cut archive": ([SOURCE + "cut.jsonl.gz"], "r.toml", "math", "cut.jsonl.gz", "whole"),
    "cut table": ([SOURCE + "cut.parquet"], "r.toml", "math", "cut.parquet", "whole"),
}


@pytest.mark.parametrize("case", some(WRONG, "unknown key", "impossible value", "missing data"))
def test_a_wrong_recipe_is_refused_in_one_line_and_nothing_is_left(place, record, case) -> None:
    overrides, *words = WRONG[case]
    if "model" in case or "config" in case:
        broken_model(place)
    broken_data(place)
    record("message", refusal(run(place, "train", "r.toml", *overrides), *words))
    assert not (place / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["first", "resumed"])
def test_no_recipe_and_no_toml_are_refused(place, resume) -> None:
    (place / "bad.toml").write_text("model = \n")
    refusal(run(place, "train", "none.toml", *resume), "cannot read the recipe none.toml", "No such file")
    refusal(run(place, "train", "bad.toml", *resume), "bad.toml is not TOML", "line 1")
    refusal(run(place, "train", "quickstat", *resume), "did you mean 'quickstart'?")
    assert not (place / "runs").exists()


# -- bar 7: a checkpoint is corrupt


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with r.toml and its run, killed after its second checkpoint."""
    place = tmp_path_factory.mktemp("killed")
    (place / "r.toml").write_text(RECIPE)
    process = start(place, "train", "r.toml")
    checkpoints = place / "runs" / "r" / "checkpoints"
    try:
        eventually("two checkpoints", lambda: len(list(checkpoints.glob("step-*"))) >= 2)
    finally:
        process.kill()
        process.communicate()
    assert not (place / "runs" / "r" / "summary.json").exists()
    return place


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped state": ("state.pt", flip, "state.pt is damaged"),
    "cut state": ("state.pt", cut, "state.pt is damaged"),
    "missing state": ("state.pt", Path.unlink, "state.pt: No such file"),
    "flipped hash": ("sha256", flip, "state.pt is damaged"),
    "missing hash": ("sha256", Path.unlink, "sha256: No such file"),
    "cut recipe": ("../../recipe.json", cut, "recipe.json cannot be read"),
}


@pytest.mark.parametrize("case", some(DAMAGES, "flipped state"))
def test_a_corrupt_checkpoint_is_named_and_not_resumed(place, killed_run, record, case) -> None:
    name, damage, words = DAMAGES[case]
    shutil.copytree(killed_run / "runs", place / "runs")
    newest = max((place / "runs" / "r" / "checkpoints").glob("step-*"))
    damage(newest / name)
    before = sorted(path.relative_to(place) for path in (place / "runs").rglob("*"))
    message = refusal(run(place, "train", "r.toml", "--resume"), words, "delete runs/r")
    record("message", message)
    assert before == sorted(path.relative_to(place) for path in (place / "runs").rglob("*"))


@pytest.mark.slow
def test_the_advice_for_a_corrupt_checkpoint_helps(place, killed_run) -> None:
    shutil.copytree(killed_run / "runs", place / "runs")
    folder = place / "runs" / "r"
    newest = max((folder / "checkpoints").glob("step-*"))
    flip(newest / "state.pt")
    line = refusal(run(place, "train", "r.toml", "--resume"), f"delete {newest.relative_to(place)} to resume")
    shutil.rmtree(place / line.partition("; delete ")[2].partition(" to resume")[0])
    done = run(place, "train", "r.toml", "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 3]
    assert (folder / "summary.json").exists()


# -- bar 7: the disk is full


class Disk:
    """A file system of its own, of a size that can change, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, size: str) -> None:
        """Raises CalledProcessError where mounting is not allowed."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.path)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def fill(self, leave: int = 0) -> None:
        """Use the space up but for `leave` bytes."""
        free = os.statvfs(self.path)
        (self.path / "fill").write_bytes(bytes(free.f_bavail * free.f_bsize - leave))

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(place: Path) -> Iterator[Disk]:
    """A disk of 1 MB at `place`/runs."""
    if os.getuid() != 0:
        pytest.skip("a disk of its own needs root (mount -t tmpfs)")
    made = Disk(place / "runs")
    made.path.mkdir()
    try:
        made.mount("1m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', error)}")
    yield made
    made.unmount()


def resumes(place: Path, disk: Disk) -> None:
    """With space on the disk, the run goes on to its end."""
    disk.resize("200m")
    done = run(place, "train", "r.toml", "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows_of(disk.path / "r")] == [0, 1, 2, 3]
    assert (disk.path / "r" / "summary.json").exists()


@pytest.mark.slow
def test_a_full_disk_at_the_head_of_a_run(place, disk, record) -> None:
    disk.fill()
    line = refusal(run(place, "train", "r.toml"), "cannot write the run folder runs/r", "No space left", "free space")
    record("message", line)
    assert not (disk.path / "r" / "recipe.json").exists()
    resumes(place, disk)


@pytest.mark.slow
def test_a_full_disk_at_the_first_row_of_metrics(place, disk, record) -> None:
    disk.fill(leave=3 * 4096)
    line = refusal(run(place, "train", "r.toml"), "cannot write the run folder runs/r", "No space left", "free space")
    record("message", line)
    assert (disk.path / "r" / "recipe.json").exists()
    assert not list(disk.path.rglob("step-*"))
    resumes(place, disk)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kept"), [("1m", 0), ("12m", 1)], ids=["first", "second"])
def test_a_full_disk_at_a_checkpoint_in_mid_run(place, disk, record, size, kept) -> None:
    disk.resize(size)
    words = (f"runs/r/checkpoints/step-00000{kept + 1}", "cannot write the checkpoint", "No space left", "free space")
    record("message", refusal(run(place, "train", "r.toml"), *words))
    left = sorted(path.name for path in (disk.path / "r" / "checkpoints").iterdir())
    assert left == [f"step-00000{number + 1}" for number in range(kept)]
    resumes(place, disk)


@pytest.mark.slow
def test_a_full_disk_at_the_end_of_a_run(place, disk, record) -> None:
    (place / "r.toml").write_text(RECIPE.replace("every = 1", "every = 99"))
    line = refusal(run(place, "train", "r.toml"), "runs/r/model", "No space left", "free space")
    record("message", line)
    assert not (disk.path / "r" / "summary.json").exists()
    assert not (disk.path / "r" / "model").exists()
    resumes(place, disk)
