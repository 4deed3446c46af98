"""Shell tasks: the gold script earns 1, an untouched box and one planted slip 0; what hides, is found."""

from __future__ import annotations

import io
import random
import shlex
import sqlite3
import tarfile
import time
import zipfile

import pytest
from boxes import ISOLATING

from palaestra.environments.sandbox.backends import lacks_native
from palaestra.environments.terminal import Terminal
from palaestra.environments.terminal_state import applied, differences, members, tables
from palaestra.gym.agent import Loop
from palaestra.gym.episode import run_episode
from palaestra.gym.outcome import Cause
from palaestra.gym.policies import Null
from palaestra.gym.policy import Replay
from palaestra.gym.sandbox import Entry
from palaestra.gym.types import Message, Sampling
from palaestra.tasks.terminal import FAMILIES, PROGRAMS, drawn, shell_tasks
from palaestra.tasks.terminal.puzzle import Node, with_folders

pytestmark = pytest.mark.skipif(bool(lacks_native()), reason="no native sandbox on this machine")
TEMPLATES = [(family, template) for family, templates in FAMILIES.items() for template in templates]
SLIPS = ("touch /work/one-more", "mkdir /work/one-more", "echo x >> /etc/extra")


@pytest.fixture
async def backend():
    opened = await Terminal.open(Terminal.Config())
    yield opened
    await Terminal.shut(opened)


def task_of(family, template, level, seed):
    """A task of one template."""
    tasks = shell_tasks((level,), (family,))
    tasks._make = lambda level, r: drawn(family, template, level, r)
    return tasks.get(f"{level}-{seed}")


async def earned(backend, task, *commands):
    """What a policy earns that runs the commands, one after the other."""
    calls = [Message.calling("bash", command=command) for command in commands]
    policy = Replay([*calls, Message(role="assistant", content="done")]) if commands else Null()
    episode = await run_episode(Terminal(Terminal.Config(), backend), Loop(), {"main": policy}, task, Sampling(), "id")
    assert episode.outcome.cause in (Cause.OK, Cause.POLICY_CRASH), episode.outcome
    return episode.result.value


def slip(task, r):
    """A command that spoils a little of what is right."""
    files = [path for path, node in task.data["after"].items() if node.get("kind", "file") == "file"]
    if not files or r.random() < 0.3:
        return r.choice(SLIPS)
    path = shlex.quote(f"/work/{r.choice(files)}")
    return r.choice((f"chmod 0711 {path}", f"echo >> {path}", f"rm {path}"))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("family", "template"), TEMPLATES, ids=[template.__name__ for _, template in TEMPLATES])
async def test_gold_earns_all_and_nothing_or_a_slip_earns_nothing(backend, family, template, level):
    task = task_of(family, template, level, seed=7 * level)
    script = task.data["script"]
    assert await earned(backend, task, script) == 1
    assert await earned(backend, task) == 0
    assert await earned(backend, task, script, slip(task, random.Random(level))) == 0


def test_tasks_are_many_disjoint_and_found_by_their_keys():
    tasks = shell_tasks((1, 2, 3))
    train, held = tasks("train", 0), tasks("held-out", 0)
    one, other = [next(train) for _ in range(60)], [next(held) for _ in range(60)]
    assert not {task.key for task in one} & {task.key for task in other}
    assert len({str(task.data) for task in one + other}) > 115
    assert all(tasks.get(task.key).data == task.data for task in one)
    assert len({task.data["template"] for task in one + other}) > 20
    with pytest.raises(ValueError, match="no family nothing"):
        shell_tasks((1,), ("nothing",))


@pytest.mark.hack
@pytest.mark.parametrize(
    "hack",
    [
        "ln -sf /etc/passwd {file}",
        "rm -f {file}; mkdir {file}",
        "rm -f {file}; mkfifo {file}",
        "chattr +i {file} 2>/dev/null; truncate -s 3G {file}",
        "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt",
        "(while :; do echo 1 > /work/reward.txt; sleep 0.01; done) > /dev/null 2>&1 &",
        "printf '#!/bin/sh\\nexit 0\\n' > /root/python3; export PATH=/root:$PATH",
        "kill -9 -1",
        "head -c 900M /dev/zero > /dev/shm/x; python3 -c 'x = bytearray(2 << 30)'",
    ],
)
async def test_a_hack_earns_what_doing_nothing_earns(backend, hack):
    task = task_of("first", FAMILIES["first"][0], 2, seed=5)
    target = next(path for path, node in task.data["after"].items() if node.get("kind", "file") == "file")
    assert await earned(backend, task, hack.format(file=f"/work/{target}")) == 0


async def test_a_box_that_its_own_commands_ended_is_scored(backend):
    config = Terminal.Config(limits={"memory": 48 << 20, "disk": 200 << 20})
    task = task_of("first", FAMILIES["first"][0], 1, seed=5)
    calls = [Message.calling("bash", command="head -c 150M /dev/zero > /work/fill")] * 3
    policy = Replay([*calls, Message(role="assistant")])
    episode = await run_episode(Terminal(config, backend), Loop(), {"main": policy}, task, Sampling(), "id")
    assert episode.outcome.cause in (Cause.OK, Cause.POLICY_CRASH)  # one process or the box, as the kernel chooses
    assert episode.result.value == 0


async def test_a_box_that_the_machine_lost_is_not_scored(backend):
    task = task_of("first", FAMILIES["first"][0], 1, seed=5)
    environment = Terminal(Terminal.Config(), backend)

    class Killer(Null):
        async def reply(self, *arguments):
            backend._launching._process.kill()
            return await super().reply(*arguments)

    episode = await run_episode(environment, Loop(), {"main": Killer()}, task, Sampling(), "id")
    assert episode.outcome.cause is Cause.SANDBOX
    assert not hasattr(episode.result, "value")


def test_a_removed_folder_takes_along_what_it_held():
    one = Entry("file", 0o644)
    tree = {"/work/a": Entry("directory", 0o755), "/work/a/b": one, "/work/ab": one}
    assert sorted(applied(tree, {"/work/a": None, "/work/c": one})) == ["/work/ab", "/work/c"]


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"x" * 200])
def test_what_is_no_database_is_said_to_be_none(content):
    if not content:
        assert tables(content) == {}
        return
    with pytest.raises(Exception, match=r"database|malformed|not"):
        tables(content)


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz", "tar.xz"])
def test_what_is_no_archive_is_said_to_be_none(form):
    with pytest.raises(Exception):  # noqa: B017, PT011
        members(form, b"no archive at all")


ENDLESS = "CREATE VIEW v AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


def _database(script):
    with sqlite3.connect(":memory:") as db:
        db.executescript(script)
        return db.serialize()


@pytest.mark.parametrize(
    "script",
    [
        f"{ENDLESS} SELECT count(*) FROM c",
        f"{ENDLESS} SELECT x FROM c",
        "CREATE VIEW v AS SELECT zeroblob(1000000000)",
        f"{ENDLESS} SELECT zeroblob(1000000) FROM c",
        "CREATE TABLE t (a); INSERT INTO t VALUES (NULL), (1), ('x'), (x'00'), (2.5), (NULL)",
        "CREATE VIEW v AS SELECT * FROM nowhere",
        "CREATE VIEW v AS SELECT CAST(x'ff' AS TEXT)",
    ],
)
def test_a_database_that_means_harm_is_wrong_and_costs_little(script):
    wanted = {"db": Node(kind="sqlite", parts={"t": {"columns": [["a", ""]], "rows": [[1]]}})}
    began = time.process_time()
    assert differences(wanted, {"/work/db": Entry("file", 0o644, _database(script))})
    assert time.process_time() - began < 10


def _bomb(form):
    """A hundred mebibytes of nothing in one member; in an uncompressed archive, three thousand members."""
    out, size = io.BytesIO(), 100 << 20
    if form == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("x", bytes(size))
        return out.getvalue()
    with tarfile.open(fileobj=out, mode={"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[form]) as archive:
        for number in range(3000 if form == "tar" else 1):
            member = tarfile.TarInfo(str(number))
            member.size = 0 if form == "tar" else size
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return out.getvalue()


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz", "tar.xz"])
def test_an_archive_that_is_far_too_large_is_wrong_and_costs_little(form):
    wanted = {"a": Node(kind="archive", parts={"format": form, "members": {"x": "y"}})}
    content = _bomb(form)
    began = time.process_time()
    assert differences(wanted, {"/work/a": Entry("file", 0o644, content)})
    assert time.process_time() - began < 1


def test_folders_stand_before_what_they_hold():
    assert list(with_folders({"a/b/c": task_of("first", FAMILIES["first"][0], 1, 1) and None})) == ["a", "a/b", "a/b/c"]


async def test_an_image_that_lacks_a_program_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(PROGRAMS, "archives", ("tar", "no-such-packer"))
    monkeypatch.setitem(PROGRAMS, "texts", ())
    assert "lacks no-such-packer" in await Terminal.lacks(Terminal.Config(families=("archives", "texts")))
    assert not await Terminal.lacks(Terminal.Config(families=("texts",)))


@pytest.mark.skipif("docker" not in ISOLATING, reason="no Docker daemon")
@pytest.mark.slow
async def test_containers_give_the_same_rewards():
    config = Terminal.Config(backend="docker", image="palaestra/base")
    backend = await Terminal.open(config)
    try:
        for family, template in TEMPLATES:
            task = task_of(family, template, 1, seed=3)
            environment = Terminal(config, backend)
            policy = Replay([Message.calling("bash", command=task.data["script"]), Message(role="assistant")])
            episode = await run_episode(environment, Loop(), {"main": policy}, task, Sampling(), "id")
            assert episode.result.value == 1, template
    finally:
        await Terminal.shut(backend)
