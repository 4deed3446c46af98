"""Shell tasks written as Harbor task folders, which give the same reward when they are read back."""

from __future__ import annotations

import json
from pathlib import Path

from palaestra.environments.sandbox.base import NAME
from palaestra.gym.types import Task

TASK_TOML = """schema_version = "1.4"

[metadata]
family = "{family}"
template = "{template}"
difficulty = {difficulty}
source = "palaestra {key}"

[agent]
timeout_sec = 900.0

[verifier]
timeout_sec = 120.0

[environment]
network_mode = "no-network"
cpus = 1
memory_mb = 512
storage_mb = 1024
workdir = "/work"

[environment.healthcheck]
command = "test -e /run/task-ready || sh /opt/task/begin.sh"
timeout_sec = 30.0
"""
DOCKERFILE = """# FROM: an image with python3, git, make, gcc and procps; `palaestra sandbox image build` makes this one
FROM {image}
COPY task /opt/task
RUN python3 /opt/task/terminal_check.py make && rm /opt/task/task.json && python3 /opt/task/terminal_check.py manifest
WORKDIR /work
"""
BEGIN = """# Runs once, before the agent: what the task begins with besides its files.
cd /work || exit 1
{setup}
touch /run/task-ready
rm -r /opt/task
"""
TEST = """#!/bin/bash
cd /
export PATH=/usr/bin:/bin:$PATH
rm -rf /logs/verifier/reward.*
python3 -I -S /tests/terminal_check.py judge
"""


def export(task: Task, folder: Path, image: str = NAME) -> Path:
    """Write a shell task below `folder`; returns its folder, named after its key."""
    target = folder / f"{task.data['template']}-{task.key}".replace("_", "-")
    judged = json.dumps({name: task.data[name] for name in ("before", "after", "checks")})
    begins = json.dumps({"before": task.data["before"], "after": {}, "checks": []})
    code = {name: _source(name) for name in ("terminal_check.py", "terminal_state.py")}
    written = {
        "task.toml": TASK_TOML.format(**task.data, difficulty=task.difficulty, key=task.key),
        "instruction.md": f"{task.prompt}\n",
        "environment/Dockerfile": DOCKERFILE.format(image=image),
        "environment/task/task.json": begins,
        "environment/task/begin.sh": BEGIN.format(setup=task.data["setup"]),
        "tests/test.sh": TEST,
        "tests/task.json": judged,
        "solution/solve.sh": f"#!/bin/bash\ncd /work || exit 1\n{task.data['script']}\n",
        **{f"environment/task/{name}": text for name, text in code.items()},
        **{f"tests/{name}": text for name, text in code.items()},
    }
    for name, text in written.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        if place.suffix == ".sh":
            place.chmod(0o755)
    return target


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
