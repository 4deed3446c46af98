"""Processes, and services on the box's own loopback."""

from __future__ import annotations

import random
from typing import Any

from palaestra.tasks.terminal.content import names, text
from palaestra.tasks.terminal.puzzle import ANY, Puzzle, Tree, file, folder

SLEEP = "import time; time.sleep(86400)"


def process(arguments: list[str], count: int = 1) -> dict[str, Any]:
    """A check: exactly `count` processes have the arguments, all of them, the program's name included."""
    return {"kind": "process", "arguments": arguments, "count": count}


def answer(port: int, path: str, body: str) -> dict[str, Any]:
    """A check: an HTTP GET of the path at the port of 127.0.0.1 brings the body."""
    return {"kind": "answer", "port": port, "path": path, "body": body}


def stop_process(level: int, r: random.Random) -> Puzzle:
    """Some of several workers are stopped, the others go on."""
    workers = [f"worker-{name}-{r.randrange(10**6)}" for name in names(r, 2 + level)]
    gone = r.sample(workers, level)
    setup = "; ".join(f"setsid nohup python3 -c '{SLEEP}' {worker} > /dev/null 2>&1 &" for worker in workers).replace(
        "&;", "&"
    )
    setup += (
        "; for worker in " + " ".join(workers) + "; do until pgrep -f $worker > /dev/null; do sleep 0.01; done; done"
    )
    setup = setup.replace("&;", "&")
    which = " and ".join(gone)
    checks = tuple(process(["python3", "-c", SLEEP, worker], 0 if worker in gone else 1) for worker in workers)
    script = "; ".join(f"pkill -f {worker}" for worker in gone)
    prompt = (
        f"Several processes run in the background. Stop the one with the argument {which}. The others must go on."
        if level == 1
        else f"Several processes run in the background. Stop those with the arguments {which}. The others must go on."
    )
    return Puzzle(prompt, {}, {}, script, setup, checks)


def keep_running(level: int, r: random.Random) -> Puzzle:
    """A program is started so that it outlives its shell, its number in a file."""
    job = f"job-{r.randrange(10**6)}"
    before: Tree = {"run.py": file(f"import sys, time\nprint('started', sys.argv[1], flush=True)\n{SLEEP}\n")}
    prompt = f"Start `python3 run.py {job}` in /work in the background so that it goes on running, with its output in /work/run.log, and write its process number to /work/run.pid."
    script = f"nohup python3 run.py {job} > run.log 2>&1 < /dev/null & echo $! > run.pid; for i in $(seq 100); do [ -s run.log ] && break; sleep 0.05; done"
    arguments = ["python3", "run.py", job]
    checks = (process(arguments), {"kind": "pidfile", "path": "/work/run.pid", "arguments": arguments})
    after = {**before, "run.log": file(f"started {job}\n"), "run.pid": ANY}
    return Puzzle(prompt, before, after, script, "", checks)


def serve_folder(level: int, r: random.Random) -> Puzzle:
    """A folder is served over HTTP."""
    port = r.randint(8001, 8999)
    pages = {f"{name}.txt": text(r, 1) for name in names(r, 1 + level)}
    before: Tree = {"site": folder(), **{f"site/{name}": file(content) for name, content in pages.items()}}
    prompt = f"Serve the folder /work/site over HTTP at port {port} of 127.0.0.1, in the background, so that it goes on when your shell ends. (/{min(pages)} must bring the file of that name, and so on.) Leave no other file in /work."
    script = (
        f"setsid nohup python3 -m http.server {port} --bind 127.0.0.1 --directory site > /dev/null 2>&1 & "
        f"for i in $(seq 100); do python3 -c \"import socket; socket.create_connection(('127.0.0.1', {port}))\" 2> /dev/null && break; sleep 0.05; done"
    )
    return Puzzle(
        prompt, before, before, script, "", tuple(answer(port, f"/{name}", content) for name, content in pages.items())
    )


def fetch(level: int, r: random.Random) -> Puzzle:
    """What a local service knows is saved."""
    port = r.randint(8001, 8999)
    found = {name: text(r, level) for name in names(r, level)}
    hidden = "/tmp/.service"
    writes = "; ".join(f"printf %s '{content}' > {hidden}/{name}" for name, content in found.items())
    wait = f"for i in $(seq 200); do python3 -c \"import socket; socket.create_connection(('127.0.0.1', {port}))\" 2> /dev/null && break; sleep 0.05; done"
    setup = f"mkdir {hidden}; {writes}; setsid nohup python3 -m http.server {port} --bind 127.0.0.1 --directory {hidden} > /dev/null 2>&1 & {wait}"
    wanted: Tree = {f"{name}.got": file(content) for name, content in found.items()}
    which = ", ".join(f"/{name}" for name in found)
    prompt = f"A service listens on port {port} of 127.0.0.1 (HTTP). Save what it answers to GET {which} as /work/NAME.got, each under its own name."
    code = "; ".join(f"urllib.request.urlretrieve('http://127.0.0.1:{port}/{name}', '{name}.got')" for name in found)
    return Puzzle(prompt, {}, wanted, f'python3 -c "import urllib.request; {code}"', setup)


TEMPLATES = (stop_process, keep_running, serve_folder, fetch)
