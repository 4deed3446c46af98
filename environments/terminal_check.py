"""The verifier of an exported shell task: runs in the container, writes 1 or 0, and needs nothing but the standard
library and terminal_state.py beside it.

`python3 terminal_check.py make` writes the tree that the task begins with; `... manifest` notes the rest of the file
system; `... judge` compares: what it cannot judge earns 0, for whoever made it so was the agent. All read task.json
beside this file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != Path.cwd()] + [str(HERE)]
    import terminal_state as state

WORK = Path("/work")
MANIFEST = Path("/var/lib/task-manifest.json")
LOGS = Path("/logs/verifier")
WATCHED = ("/etc", "/home", "/root", "/srv", "/usr/local", "/opt")
ENGINES = ("/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/mtab")
"""What container engines write themselves."""
OURS = "/opt/task"
"""What the task begins from; it is gone when the agent comes."""
SETTLE, SECONDS, ALL_SECONDS = 1.0, 30, 100
LARGE = 64 << 20
"""Bytes of a file that counts as none."""
LINES = {"kind": "file", "mode": 0o644, "text": "", "parts": {}}


def nodes(plain: dict[str, Any]) -> dict[str, Any]:
    """Nodes of a tree, from JSON."""
    return {path: SimpleNamespace(**{**LINES, **node}) for path, node in plain.items()}


def entry(path: Path) -> Any:
    """What stands at a path."""
    found = path.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return SimpleNamespace(kind="link", mode=mode, content=os.readlink(path).encode(errors="surrogateescape"))
    if stat.S_ISREG(found.st_mode) and found.st_size < LARGE:
        return SimpleNamespace(kind="file", mode=mode, content=path.read_bytes())
    return SimpleNamespace(kind="directory" if stat.S_ISDIR(found.st_mode) else "other", mode=mode, content=b"")


def walk(top: Path) -> dict[str, Any]:
    """Everything below a folder by absolute path; nothing, where it is a link."""
    found = {}
    for folder, folders, files in () if top.is_symlink() else os.walk(top):
        for name in folders + files:
            found[os.path.join(folder, name)] = entry(Path(folder, name))
    return found


def make(task: dict[str, Any]) -> None:
    """Write the tree that the task begins with."""
    WORK.mkdir(exist_ok=True)
    for path, node in nodes(task["before"]).items():
        place = WORK / path
        if node.kind == "directory":
            place.mkdir(exist_ok=True)
        elif node.kind == "link":
            place.symlink_to(node.text)
        elif node.kind != "git":
            place.write_bytes(state.content_of(node))
        if node.kind not in ("link", "git"):
            place.chmod(node.mode)


def rest() -> dict[str, str]:
    """A line for each path outside /work that is watched: kind, mode, hash of the content."""
    found = {}
    for top in WATCHED:
        for path, it in walk(Path(top)).items():
            if not path.startswith("/root/.") and path not in ENGINES and not f"{path}/".startswith(f"{OURS}/"):
                found[path] = f"{it.kind} {it.mode:o} {hashlib.sha256(it.content).hexdigest()}"
    return found


async def problems(task: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    found, wanted = walk(WORK), nodes(task["after"])
    said: list[str] = state.differences(wanted, found)
    for path, node in wanted.items():
        if node.kind == "git" and not said:
            said += await repository(node, f"{WORK}/{path}", found)
    for check in task["checks"]:
        if not said and not CHECKS[check["kind"]](check, found):
            said.append(f"check {check['kind']} fails")
    return said


async def repository(node: Any, place: str, found: dict[str, Any]) -> list[str]:
    """What is wrong with a repository, asked of git on a copy of its objects and references."""
    with tempfile.TemporaryDirectory() as scratch:
        config = SimpleNamespace(kind="file", content=state.CONFIG)
        for path, it in {"config": config, **state.taken(found, place)}.items():
            target = Path(scratch, "judged", path)
            if it.kind == "directory":
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(it.content)

        async def git(arguments: str) -> str:
            return run(f"{state.GIT} --git-dir=judged {arguments} 2>/dev/null", scratch).stdout.decode(errors="replace")

        problems: list[str] = await state.repository(git, node, place)
        return problems


def run(command: str, folder: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in a folder that is its home, too: nothing of the agent's home counts. Raises TimeoutExpired
    after SECONDS."""
    home = {**os.environ, "HOME": folder}
    return subprocess.run(command, shell=True, cwd=folder, env=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, timeout=SECONDS)  # fmt: skip


def numbers(arguments: list[str]) -> list[int]:
    """The numbers of the processes that have the arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            given = path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue
        if state.called(given, arguments):
            found.append(int(path.parent.name))
    return found


def process(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """So many processes have the arguments."""
    end = time.monotonic() + SETTLE
    while True:
        right: bool = len(numbers(check["arguments"])) == check["count"]
        if right or time.monotonic() > end:
            return right
        time.sleep(0.05)


def pidfile(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """The file holds the number of the process that has the arguments."""
    number: str = found[check["path"]].content.strip().decode(errors="replace")
    return number in map(str, numbers(check["arguments"]))


def answer(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """An HTTP GET brings the body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{check['port']}{check['path']}", timeout=5) as reply:
            body = check["body"].encode()
            return bool(reply.status == 200 and reply.read(len(body) + 1) == body)
    except OSError:
        return False


def fresh(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """In a copy of /work, a command prints the output."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(WORK, os.path.join(scratch, "work"), symlinks=True)
        done = run(check["command"], copy)
        return done.returncode == 0 and done.stdout == check["output"].encode()


CHECKS = {"process": process, "pidfile": pidfile, "answer": answer, "fresh": fresh}


def judge(task: dict[str, Any]) -> None:
    """Write the verdict: 0 until all is found right, whatever the state does to those who look at it."""
    LOGS.mkdir(parents=True, exist_ok=True)
    verdict = LOGS / "reward.txt"
    verdict.write_text("0\n")
    signal.alarm(ALL_SECONDS)
    try:
        said = asyncio.run(problems(task))
        if rest() != json.loads(MANIFEST.read_text()):
            said.append("something outside /work has changed")
    except Exception as error:
        said = [f"{type(error).__name__}: {error}"]
    verdict.write_text(f"{int(not said)}\n")
    print(*map(ascii, said), sep="\n")


def main(what: str) -> None:
    """Do what the argument says."""
    if what == "manifest":
        MANIFEST.parent.mkdir(parents=True, exist_ok=True)
        MANIFEST.write_text(json.dumps(rest()))
        return
    task = json.loads((HERE / "task.json").read_text())
    if what == "make":
        make(task)
    else:
        judge(task)


if __name__ == "__main__":
    main(sys.argv[1])
