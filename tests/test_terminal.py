"""Shell tasks: the gold script earns 1, an untouched box and one planted slip 0; what hides, is found."""

from __future__ import annotations

import base64
import io
import os
import random
import shlex
import socket
import sqlite3
import subprocess
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from boxes import IMAGES, ISOLATING, python

from palaestra.environments import terminal_state
from palaestra.environments.harbor_export import export
from palaestra.environments.sandbox import images, visitor
from palaestra.environments.sandbox.backends import lacks_native
from palaestra.environments.terminal import Terminal
from palaestra.environments.terminal_state import differences, members, opened, tables
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


async def earned(backend, task, *commands, config=None):
    """What a policy earns that runs the commands, one after the other."""
    config = config or Terminal.Config()
    calls = [Message.calling("bash", command=command) for command in commands]
    policy = Replay([*calls, Message(role="assistant", content="done")]) if commands else Null()
    episode = await run_episode(Terminal(config, backend), Loop(), {"main": policy}, task, Sampling(), "id")
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


def test_what_may_mean_harm_is_opened_by_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(terminal_state, "tables", None)
    monkeypatch.setattr(terminal_state, "members", None)
    content = _database("CREATE TABLE t (a TEXT, b BLOB); INSERT INTO t VALUES ('x', NULL), ('2', x'00ff')")
    rows = [["2", {"blob": "00ff"}], ["x", None]]
    assert opened("sqlite", "", content) == {"t": {"columns": [["a", "TEXT"], ["b", "BLOB"]], "rows": rows}}
    packed = terminal_state.content_of(Node(kind="archive", parts={"format": "tar.xz", "members": {"a": "ü\n"}}))
    assert opened("archive", "tar.xz", packed) == {"a": "ü\n"}


def test_what_takes_long_to_open_is_given_up(monkeypatch):
    monkeypatch.setattr(terminal_state, "OPEN_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(ValueError, match="longer than 1 s"):
        opened("sqlite", "", _database(SLOW))
    assert time.monotonic() - began < 5


ENDLESS = "CREATE VIEW v AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


TABLE = "CREATE TABLE t (a); INSERT INTO t VALUES (1); "
FORGED = TABLE + "PRAGMA writable_schema = ON; INSERT INTO sqlite_schema VALUES "
SLOW = (
    "PRAGMA ignore_check_constraints = ON; "
    "CREATE TABLE t (a CHECK (instr(zeroblob(900000), CAST(zeroblob(400000) || 'x' AS BLOB)) = a)); "
    "INSERT INTO t VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9)"
)
"""Calls of a function, of which each takes seconds: no progress handler ends it."""


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
        TABLE + "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END",
        FORGED + "('index', 'v', 'v', 0, 'CREATE VIEW v AS SELECT 1')",
        FORGED + "('index', 'v', 'v', 0, 'CREATE VIRTUAL TABLE v USING fts5(a)')",
        FORGED + "('table', NULL, NULL, 9, NULL)",
        "CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(1000000)); ALTER TABLE t ADD b DEFAULT 'x'",
        "CREATE TABLE t (a, b AS (hex(zeroblob(400000)))); INSERT INTO t VALUES (1), (2), (3)",
    ],
)
def test_a_database_that_means_harm_is_wrong_and_costs_little(script):
    wanted = {"db": Node(kind="sqlite", parts={"t": {"columns": [["a", ""]], "rows": [[1]]}})}
    assert not differences(wanted, {"/work/db": Entry("file", 0o644, _database(TABLE))})
    began = time.monotonic()
    assert differences(wanted, {"/work/db": Entry("file", 0o644, _database(script))})
    assert time.monotonic() - began < 10


def _of_size(size):
    """A tar archive whose one member says that it has so many bytes."""
    member = tarfile.TarInfo("x")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(10240)


@pytest.mark.parametrize("size", [-512, -1024, -1, 1 << 21, 1 << 60])
def test_a_tar_with_a_size_that_cannot_be_is_wrong_and_costs_little(size):
    wanted = {"a": Node(kind="archive", parts={"format": "tar", "members": {"x": ""}})}
    assert not differences(wanted, {"/work/a": Entry("file", 0o644, _of_size(0))})
    began = time.monotonic()
    assert differences(wanted, {"/work/a": Entry("file", 0o644, _of_size(size))})
    assert time.monotonic() - began < 5


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
    began = time.monotonic()
    assert differences(wanted, {"/work/a": Entry("file", 0o644, content)})
    assert time.monotonic() - began < 5


def _planted(path, content):
    """A command that puts bytes in the place of a file."""
    return f"echo {base64.b64encode(content).decode()} | base64 -d > {path}"


@pytest.mark.hack
@pytest.mark.parametrize(
    "script", [f"{ENDLESS} SELECT x FROM c", SLOW, FORGED + "('index', 'v', 'v', 0, 'CREATE VIEW v AS SELECT 1')"]
)
async def test_a_database_that_means_harm_earns_nothing(backend, monkeypatch, script):
    monkeypatch.setattr(terminal_state, "OPEN_SECONDS", 2)
    task = task_of("databases", FAMILIES["databases"][1], 1, seed=3)
    began = time.monotonic()
    assert await earned(backend, task, task.data["script"], _planted("shop.db", _database(script))) == 0
    assert time.monotonic() - began < 15


@pytest.mark.hack
@pytest.mark.parametrize(("make", "what"), [(_bomb, "tar.gz"), (_bomb, "tar"), (_of_size, -512)])
async def test_an_archive_that_means_harm_earns_nothing(backend, make, what):
    task = task_of("archives", FAMILIES["archives"][1], 1, seed=3)
    (path,) = (path for path, node in task.data["after"].items() if node.get("kind") == "archive")
    began = time.monotonic()
    assert await earned(backend, task, task.data["script"], _planted(path, make(what))) == 0
    assert time.monotonic() - began < 15


def test_folders_stand_before_what_they_hold():
    assert list(with_folders({"a/b/c": task_of("first", FAMILIES["first"][0], 1, 1) and None})) == ["a", "a/b", "a/b/c"]


async def test_an_image_that_lacks_a_program_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(PROGRAMS, "archives", ("tar", "no-such-packer"))
    monkeypatch.setitem(PROGRAMS, "texts", ())
    assert "lacks no-such-packer" in await Terminal.lacks(Terminal.Config(families=("archives", "texts")))
    assert not await Terminal.lacks(Terminal.Config(families=("texts",)))


def template_of(family, name):
    """A template by its name."""
    return next(template for template in FAMILIES[family] if template.__name__ == name)


@pytest.mark.hack
@pytest.mark.parametrize("arguments", ["{}", "run.py {}", "python3 run.py {}"])
async def test_another_process_with_the_same_arguments_is_not_the_wanted_one(backend, arguments):
    task = task_of("services", template_of("services", "keep_running"), 1, seed=3)
    (job,) = (check["arguments"][-1] for check in task.data["checks"] if check["kind"] == "process")
    other = f"setsid nohup python3 -c 'import time; time.sleep(99)' {arguments.format(job)} > /dev/null 2>&1 &"
    assert await earned(backend, task, f"{other} echo $! > run.pid; echo started {job} > run.log; sleep 0.3") == 0
    right = f"nohup /usr/bin/python3 run.py {job} > run.log 2>&1 & echo $! > run.pid; sleep 0.5"
    assert await earned(backend, task, right) == 1


@pytest.mark.hack
async def test_a_process_that_was_to_go_on_is_not_replaced_by_another(backend):
    task = task_of("services", template_of("services", "stop_process"), 1, seed=3)
    kept = [check["arguments"][-1] for check in task.data["checks"] if check["count"]]
    others = " ".join(f"setsid nohup sh -c 'sleep 99; :' {worker} > /dev/null 2>&1 &" for worker in kept)
    assert await earned(backend, task, f"pkill python3; {others} sleep 0.3") == 0


MERGES = (
    "git cherry-pick {branch} > /dev/null && git commit -q --allow-empty -m 'Merge {branch}'",
    "git merge -q --squash {branch} && git commit -q -m Theirs && git commit -q --allow-empty -m 'Merge {branch}'",
    "git cherry-pick {branch} > /dev/null && "
    "git reset -q --hard $(git commit-tree HEAD^{{tree}} -p HEAD -p HEAD^ -m 'Merge {branch}')",
    "git rebase -q {branch} && git commit -q --allow-empty -m 'Merge {branch}'",
)


@pytest.mark.hack
@pytest.mark.parametrize("hack", MERGES, ids=["cherry-pick", "squash", "parents", "rebase"])
async def test_what_looks_like_a_merge_is_none(backend, hack):
    task = task_of("repositories", template_of("repositories", "merge_branch"), 1, seed=3)
    (branch,) = (name for name in task.data["after"][".git"]["parts"]["branches"] if name != "main")
    assert await earned(backend, task, hack.format(branch=branch)) == 0


def commit_task():
    """A task of one commit, a command that does all of it but the commit, and one that commits."""
    task = task_of("repositories", template_of("repositories", "commit_change"), 1, seed=3)
    change, _, commit = task.data["script"].partition(" && ")
    return task, change, commit


@pytest.mark.hack
@pytest.mark.parametrize(
    "mess",
    [
        "rm .git/HEAD; mkfifo .git/HEAD",
        "rm .git/HEAD; mkdir .git/HEAD",
        "mv .git/HEAD .git/x; ln -s x .git/HEAD",
        "rm -rf .git/refs; mkfifo .git/refs",
        "rm -rf .git/refs; touch .git/refs",
        "mv .git/objects /tmp; ln -s /tmp/objects .git/objects",
        "mv .git /tmp/git; echo gitdir: /tmp/git > .git",
        "mv .git /tmp/git; ln -s /tmp/git .git",
        "rm .git/refs/heads/main; ln -s main .git/refs/heads/main",
        "rm .git/refs/heads/main; "
        + python("import socket; socket.socket(socket.AF_UNIX).bind('.git/refs/heads/main')"),
        "rm .git/HEAD; cd .git/objects; for i in $(seq 20); do mkdir $(printf %0200d 0); cd $(printf %0200d 0); done",
    ],
)
async def test_a_repository_of_strange_parts_earns_nothing(backend, mess):
    task, change, commit = commit_task()
    assert await earned(backend, task, change, commit, mess) == 0


async def test_what_is_strange_and_not_needed_leaves_a_repository_right(backend):
    task, change, commit = commit_task()
    mess = (
        "mkfifo .git/pipe .git/objects/pipe .git/refs/heads/pipe; ln -s /etc .git/objects/etc; ln -s main .git/refs/x"
    )
    assert await earned(backend, task, change, commit, mess) == 1


async def test_a_repository_that_a_fresh_box_does_not_take_in_is_scored(backend):
    task, change, commit = commit_task()
    deep = "cd .git/objects; for i in $(seq 20); do mkdir $(printf %0199d 0); cd $(printf %0199d 0); done; "
    name = "touch $(printf %0$((4094 - $(pwd | wc -c)))d 0)"
    assert await earned(backend, task, change, commit, deep + name) in (0, 1)


TROJANS = (
    "for place in /usr/local/bin /usr/bin /root/.local/bin; do mkdir -p $place; cp /tmp/liar $place/git; done; "
    "echo 'PATH=/root/.local/bin:$PATH' | tee /root/.profile > /root/.bashrc; export PATH=/root/.local/bin:$PATH",
    "git config --global alias.log '!/tmp/liar log'; git config --global core.fsmonitor /tmp/liar; "
    "git config --global core.hooksPath /tmp; git config --global log.showSignature true; "
    "git config --global gpg.program /tmp/liar; git config --global core.pager /tmp/liar",
    "git config alias.log '!/tmp/liar log'; git config core.fsmonitor /tmp/liar; git config core.worktree /tmp; "
    "git config include.path /tmp/more; for hook in post-commit reference-transaction; do "
    "cp /tmp/liar .git/hooks/$hook; done; echo /tmp/good/objects > .git/objects/info/alternates",
)


def liar(commit):
    """A command that makes a git which shows another repository, with the commit that lacks in the one of the task."""
    elsewhere = commit.replace("git", "git --git-dir=/tmp/good --work-tree=/work", 1)
    shows = 'exec /usr/bin/git $(echo "$@" | sed s,--git-dir=judged,--git-dir=/tmp/good,)'
    script = shlex.quote(f"#!/bin/sh\n{shows}\n")
    return f"cp -r .git /tmp/good; {elsewhere}; printf %s {script} > /tmp/liar; chmod +x /tmp/liar"


@pytest.mark.hack
@pytest.mark.parametrize("trojan", TROJANS, ids=["program", "home", "repository"])
async def test_a_git_that_lies_earns_nothing(backend, trojan):
    task, change, commit = commit_task()
    assert await earned(backend, task, change, liar(commit), trojan) == 0
    assert await earned(backend, task, change, commit, trojan.replace("/usr/local/bin /usr/bin", "")) == 1


@pytest.mark.hack
async def test_a_history_that_only_looks_right_earns_nothing(backend):
    task, change, commit = commit_task()
    hack = "git reset -q HEAD^; git commit -q --allow-empty -m other; git replace HEAD HEAD@{2}"
    assert await earned(backend, task, change, commit, hack) == 0


def python_liar():
    """A task of a script, and a command that leaves the script wrong and has every python3 run a right one."""
    task = task_of("builds", template_of("builds", "repair_script"), 1, seed=3)
    (name,) = task.data["before"]
    right = f"cp {name} /tmp/wrong; {task.data['script']}\nmv {name} /tmp/right.py; mv /tmp/wrong {name}"
    return task, (
        f"{right}; printf '#!/bin/sh\\nexec /usr/bin/python3 /tmp/right.py\\n' > /tmp/python3; chmod +x /tmp/python3; "
        "site=$(python3 -c 'import site; print(site.getusersitepackages())'); mkdir -p $site; "
        'echo \'import os; exec(open("/tmp/right.py").read()); os._exit(print(end="", flush=True) or 0)\' '
        "> $site/usercustomize.py; cp /tmp/python3 /usr/local/bin; export PATH=/tmp:$PATH"
    )


@pytest.mark.hack
async def test_a_python_that_lies_earns_nothing(backend):
    task, hack = python_liar()
    assert await earned(backend, task, hack) == 0


# -- small images


def _bare_image(root, name, *folders):
    """Store an image of a shell, awk and mkdir, which begins in /."""
    for program in ("/bin/sh", "/usr/bin/awk", "/usr/bin/mkdir"):
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for path in (program, *(word for word in listed.split() if word.startswith("/"))):
            place = root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(Path(path).read_bytes())
            place.chmod(0o755)
    for folder in ("tmp", *folders):
        (root / folder).mkdir()
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        archive.add(root, ".")
    images.import_image(root.with_suffix(".tar"), name)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _bare_image(tmp_path / "with", "with", "work")
    _bare_image(tmp_path / "without", "without")


rooted = pytest.mark.skipif(os.geteuid() != 0, reason="images are root's")


@rooted
@pytest.mark.parametrize("image", ["with", "without"])
async def test_the_shell_stands_in_work_whatever_the_image(backend, bare, image):
    assert images.find(image).config.workdir == "/"
    task = task_of("builds", template_of("builds", "write_script"), 1, seed=3)
    config = Terminal.Config(image=image)
    assert await earned(backend, task, task.data["script"], config=config) == 1
    assert await earned(backend, task, config=config) == 0


@rooted
@pytest.mark.hack
async def test_a_fresh_box_has_nothing_but_work_of_the_box_that_is_judged(backend, bare):
    task = task_of("builds", template_of("builds", "write_script"), 1, seed=3)
    check = task.data["checks"][0]
    environment = Terminal(Terminal.Config(image="with"), backend)
    await environment.setup(task)
    output = "".join(f"echo {line}\n" for line in check["output"].splitlines())
    for path in ("/usr/bin/awk", "/usr/local/bin/awk", "/tmp/awk"):
        await environment.box.put({path: Entry("file", 0o755, f"#!/bin/sh\n{output}".encode())})
    await environment.bash("export PATH=/tmp:$PATH; echo awk x > select.sh")
    assert (await environment.box.exec("sh select.sh", 5)).output.decode() == check["output"]
    assert await environment._check_fresh(check, await environment.box.diff())
    await environment.close()


# -- services


async def test_a_service_that_drips_is_waited_for_no_longer_than_the_deadline(backend):
    box = await backend.create(IMAGES["native"], Terminal.Config().limits)
    code = (
        "import socket, time\npeer = socket.create_server(('127.0.0.1', 8000)).accept()[0]\n"
        "while True:\n    peer.send(b'x')\n    time.sleep(0.05)\n"
    )
    await box.exec(f"setsid {python(code)} > /dev/null 2>&1 & sleep 0.5", 5)
    began = time.monotonic()
    with pytest.raises(OSError, match="Timeout"):
        await box.ask(8000, b"", 1.0)
    assert 0.9 < time.monotonic() - began < 3
    await box.destroy()


def test_an_answer_that_always_goes_on_is_read_no_longer_than_the_deadline(monkeypatch):
    monkeypatch.setattr(visitor, "CHUNK", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = threading.Thread(target=lambda: server.accept()[0].sendall(bytes(1 << 20)), daemon=True)
        asked.start()
        with pytest.raises(TimeoutError):
            visitor.ask(server.getsockname()[1], b"", 0.1)


# -- the verifier of exported tasks


@pytest.fixture
async def judged(backend, tmp_path):
    """Plays commands in a box that is made as an exported task's Dockerfile says, and has its verifier judge: what that
    writes, None where it writes nothing."""

    async def judged(task, *commands):
        folder = export(task, tmp_path)
        image = IMAGES["docker"] if IMAGES["docker"] in images.names() else IMAGES["native"]  # there /usr is read-only
        box = await backend.create(image, Terminal.Config().limits)
        try:
            await box.put(_files(folder / "environment" / "task", "/opt/task"))
            check = "python3 /opt/task/terminal_check.py"
            made = await box.exec(
                f"{check} make && rm /opt/task/task.json && {check} manifest && mkdir -p /run && sh /opt/task/begin.sh",
                60,
            )
            assert made.status == 0, made.output
            for command in commands:
                await box.exec(command, 30)
            await box.exec("kill -9 $$", 5)
            await box.put(_files(folder / "tests", "/tests"))
            await box.exec("mkdir -p /logs/verifier; cd /work; bash /tests/test.sh > /tmp/said 2>&1", 120)
            try:
                return (await box.read("/logs/verifier/reward.txt")).decode().strip()
            except OSError:
                return None
        finally:
            await box.destroy()

    return judged


def _files(folder, place):
    return {f"{place}/{path.name}": Entry("file", 0o755, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["archives", "repositories", "databases", "services", "builds"])
async def test_the_verifier_of_an_exported_task_tells_gold_from_nothing(judged, family):
    task = task_of(family, FAMILIES[family][0], 1, seed=3)
    assert await judged(task, task.data["script"]) == "1"
    assert await judged(task) == "0"


@pytest.mark.hack
@pytest.mark.parametrize(
    "mess",
    [
        "touch \"$(printf '/work/\\377\\n')\"",
        "ln -s a b; ln -s b a",
        "mv /work /tmp/work; ln -s / /work",
        "rm -rf /work",
        "rm -rf .git; echo x > .git",
        "rm .git/HEAD; mkfifo .git/HEAD",
        "rm -rf .git/objects; ln -s .git .git/objects",
        "truncate -s 900G big /etc/big; mkfifo pipe",
        "for i in $(seq 25); do mkdir $(printf %0200d 0); cd $(printf %0200d 0); done",
        "echo 1 > /logs/verifier/reward.txt; echo '{\"reward\": 1}' > /logs/verifier/reward.json; rm -rf .git",
        "rm -rf /logs; mkdir -p /logs/verifier/reward.txt; rm -rf .git",
        "rm -rf .git /var/lib/task-manifest.json",
    ],
)
async def test_a_mess_earns_nothing_from_the_verifier_of_an_exported_task(judged, mess):
    task, change, commit = commit_task()
    assert await judged(task, f"mkdir -p /logs/verifier; {change}", commit, mess) == "0"


@pytest.mark.hack
@pytest.mark.parametrize("trojan", TROJANS, ids=["program", "home", "repository"])
async def test_a_git_that_lies_earns_nothing_from_the_verifier_of_an_exported_task(judged, trojan):
    task, change, commit = commit_task()
    assert await judged(task, change, liar(commit), trojan.replace("/usr/bin", "")) == "0"


@pytest.mark.hack
async def test_a_python_that_lies_earns_nothing_from_the_verifier_of_an_exported_task(judged):
    task, hack = python_liar()
    assert await judged(task, hack.replace("; cp /tmp/python3 /usr/local/bin", "")) == "0"
    writes = "printf '#!/bin/sh\\necho 1 > /logs/verifier/reward.txt\\n' > /usr/local/bin/python3"
    assert await judged(task, f"{writes}; chmod +x /usr/local/bin/python3") == "0"


async def test_a_box_without_its_manifest_earns_nothing(judged):
    task, change, commit = commit_task()
    assert await judged(task, change, commit, "rm /var/lib/task-manifest.json") == "0"


async def test_what_container_engines_write_is_no_change_of_the_agent(judged):
    task, change, commit = commit_task()
    wrote = "for name in hosts resolv.conf hostname mtab; do echo x > /etc/$name; done"
    assert await judged(task, change, commit, wrote) == "1"
    assert await judged(task, change, commit, "echo x > /etc/other") == "0"


# -- containers


@pytest.mark.skipif("docker" not in ISOLATING, reason="no Docker daemon")
@pytest.mark.parametrize("family", list(FAMILIES))
async def test_native_boxes_and_containers_give_the_same_rewards(backend, family):
    task = task_of(family, FAMILIES[family][0], 1, seed=3)
    config = Terminal.Config(backend="docker", image=IMAGES["docker"])
    containers = await Terminal.open(config)
    try:
        for opened_backend, how in ((backend, Terminal.Config()), (containers, config)):
            assert await earned(opened_backend, task, task.data["script"], config=how) == 1
            assert await earned(opened_backend, task, config=how) == 0
    finally:
        await Terminal.shut(containers)


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
