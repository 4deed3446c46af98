"""The verifier of an exported shell task: runs in the container, writes 1 or 0, and needs nothing but the standard
library and terminal_state.py beside it.

`python3 terminal_check.py make` writes the tree that the task begins with; `... manifest` notes the rest of the file
system; `... judge` compares. All read task.json beside this file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
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
MANIFEST = Path("/usr/share/task-manifest.json")
WATCHED = ("/etc", "/home", "/root", "/srv", "/usr/local", "/opt")
SETTLE, SECONDS = 1.0, 30
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
    if stat.S_ISREG(found.st_mode):
        return SimpleNamespace(kind="file", mode=mode, content=path.read_bytes())
    return SimpleNamespace(kind="directory" if stat.S_ISDIR(found.st_mode) else "other", mode=mode, content=b"")


def walk(top: Path) -> dict[str, Any]:
    """Everything below a folder by absolute path."""
    found = {}
    for folder, folders, files in os.walk(top):
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
            if not path.startswith("/root/."):
                found[path] = f"{it.kind} {it.mode:o} {hashlib.sha256(it.content).hexdigest()}"
    return found


async def problems(task: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    found, wanted = walk(WORK), nodes(task["after"])
    said: list[str] = state.differences(wanted, found)
    if rest() != json.loads(MANIFEST.read_text()):
        said.append("something outside /work has changed")
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
        subprocess.run(f"{state.GIT} init -q --bare judged", shell=True, cwd=scratch, check=True)
        for path, it in state.taken(found, place).items():
            target = Path(scratch, "judged", path)
            if it.kind == "directory":
                target.mkdir(parents=True, exist_ok=True)
            elif it.kind == "file":
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(it.content)

        async def git(arguments: str) -> str:
            command = f"{state.GIT} --git-dir=judged {arguments} 2>/dev/null"
            done = subprocess.run(command, shell=True, cwd=scratch, capture_output=True, timeout=SECONDS)
            return done.stdout.decode(errors="replace")

        problems: list[str] = await state.repository(git, node, place)
        return problems


def arguments() -> dict[int, list[str]]:
    """The arguments of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue
    return found


def process(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """So many processes have the argument."""
    end = time.monotonic() + SETTLE
    while True:
        right: bool = sum(check["argument"] in given for given in arguments().values()) == check["count"]
        if right or time.monotonic() > end:
            return right
        time.sleep(0.05)


def pidfile(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """The file holds the number of the process that has the argument."""
    number: str = found[check["path"]].content.strip().decode(errors="replace")
    return number.isdigit() and check["argument"] in arguments().get(int(number), [])


def answer(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """An HTTP GET brings the body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{check['port']}{check['path']}", timeout=5) as reply:
            return bool(reply.status == 200 and reply.read() == check["body"].encode())
    except OSError:
        return False


def fresh(check: dict[str, Any], found: dict[str, Any]) -> bool:
    """In a copy of /work, a command prints the output."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(WORK, Path(scratch, "work"), symlinks=True)
        done = subprocess.run(check["command"], shell=True, cwd=Path(scratch, "work"), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=SECONDS)  # fmt: skip
        return done.returncode == 0 and done.stdout == check["output"].encode()


CHECKS = {"process": process, "pidfile": pidfile, "answer": answer, "fresh": fresh}


def main(what: str) -> None:
    """Do what the argument says."""
    if what == "manifest":
        MANIFEST.write_text(json.dumps(rest()))
        return
    task = json.loads((HERE / "task.json").read_text())
    if what == "make":
        make(task)
    else:
        said = asyncio.run(problems(task))
        print(*said, sep="\n")
        Path("/logs/verifier").mkdir(parents=True, exist_ok=True)
        Path("/logs/verifier/reward.txt").write_text(f"{int(not said)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
