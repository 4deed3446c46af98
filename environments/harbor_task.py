"""Harbor task folders: task.toml of schema 1.x and older, read, checked, and said what of it cannot be done here.

Source: the Harbor framework's task format (harbor 0.25, models/task); unknown keys are kept out of the way.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from palaestra.gym.registry import UsageError

MIB = 1 << 20
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
SHELL = 10.0
"""Seconds for another shell to begin."""
SCALE = {"": 1 / MIB, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


class Part(BaseModel):
    """A table of task.toml; keys that nothing here uses are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Artifact(Part):
    """What crosses from the agent's box to a separate verifier's. A relative destination is a place among Harbor's
    results, and means nothing here."""

    source: str
    destination: str = ""


class Healthcheck(Part):
    """[environment.healthcheck]: a command that must succeed before the agent begins."""

    command: str
    interval_sec: float = 5
    timeout_sec: float = 30
    start_period_sec: float = 0
    retries: int = 3


class Surroundings(Part):
    """[environment], and [verifier.environment]."""

    build_timeout_sec: float = 600
    docker_image: str | None = None
    os: str = "linux"
    cpus: float = 1
    memory_mb: float = 2048
    storage_mb: float = 10240
    gpus: int = 0
    env: dict[str, str] = {}
    workdir: str | None = None
    network_mode: Literal["public", "no-network", "allowlist"] = "public"
    mcp_servers: list[Any] = []
    healthcheck: Healthcheck | None = None

    @model_validator(mode="before")
    @classmethod
    def _older(cls, table: Any) -> Any:
        """memory = "4G", storage = "10G" and allow_internet of older schemas."""
        table = dict(table)
        for old, new in (("memory", "memory_mb"), ("storage", "storage_mb")):
            if old in table:
                table.setdefault(new, _megabytes(str(table.pop(old))))
        if "allow_internet" in table:
            table.setdefault("network_mode", "public" if table.pop("allow_internet") else "no-network")
        return table


class Agent(Part):
    """[agent]."""

    timeout_sec: float | None = None
    user: str | int | None = None


class Collect(Part):
    """A command that runs in the agent's box before it is judged."""

    command: str
    timeout_sec: float = 60


class Verifier(Part):
    """[verifier]. `environment_mode` is separate where an environment of its own is given."""

    timeout_sec: float = 600
    env: dict[str, str] = {}
    user: str | int | None = None
    environment_mode: Literal["shared", "separate"] | None = None
    environment: Surroundings | None = None
    collect: list[Collect] = []

    @property
    def separate(self) -> bool:
        """Whether another box judges."""
        return (self.environment_mode or ("separate" if self.environment else "shared")) == "separate"


class HarborTask(Part):
    """A task.toml."""

    schema_version: str = "1.4"
    metadata: dict[str, Any] = {}
    agent: Agent = Agent()
    verifier: Verifier = Verifier()
    environment: Surroundings = Surroundings()
    artifacts: list[Artifact] = []
    steps: list[Any] = []

    @model_validator(mode="before")
    @classmethod
    def _older(cls, table: Any) -> Any:
        table = dict(table)
        if "version" in table:
            table.setdefault("schema_version", str(table.pop("version")))
        listed = [{"source": one} if isinstance(one, str) else one for one in table.get("artifacts", [])]
        return {**table, "artifacts": listed}


def _megabytes(text: str) -> float:
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size; write such as 4G")
    return float(found[1]) * SCALE[found[2].upper()]


def load(folder: Path) -> HarborTask:
    """Read a task folder. Raises UsageError: one line that names the file, the key and the fix."""
    for name in ("task.toml", "instruction.md", "environment", "tests/test.sh"):
        if not (folder / name).exists():
            raise UsageError(f"{folder} is no Harbor task: it has no {name}")
    try:
        task = HarborTask.model_validate(tomllib.loads((folder / "task.toml").read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / 'task.toml'} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{folder / 'task.toml'}: {where}: {first['msg']}") from None
    if reason := cannot(folder, task):
        raise UsageError(f"{folder}: {reason}")
    return task


def cannot(folder: Path, task: HarborTask) -> str:
    """Why a task cannot be run here; empty where it can."""
    if (folder / "environment" / "docker-compose.yaml").exists():
        return "it is made of several containers (docker-compose.yaml); only single ones are run"
    if task.schema_version.partition(".")[0] != "1":
        return f'its schema_version is {task.schema_version!r}; 1.x and the older version = "1.0" are known'
    if task.steps:
        return "it has several steps, which are not played here"
    for key, user in (("agent.user", task.agent.user), ("verifier.user", task.verifier.user)):
        if user not in (None, "", "root", 0, "0"):
            return f"{key} is {user!r}; in boxes everything runs as root"
    if reason := _lacking(task.environment):
        return f"[environment] {reason}"
    own = task.verifier.environment
    return f"[verifier.environment] {_lacking(own)}" if own and _lacking(own) else ""


def _lacking(wants: Surroundings) -> str:
    if wants.gpus:
        return "asks for a GPU; boxes have none"
    if wants.os != "linux":
        return f"asks for {wants.os}; boxes are Linux"
    if wants.network_mode == "allowlist":
        return "asks for a network with a list of allowed hosts; boxes have no network"
    return "asks for MCP servers, which are not started here" if wants.mcp_servers else ""


def timeouts(task: HarborTask) -> dict[str, float]:
    """Seconds that setting a task up and judging it may take by its own words; each command may end its shell."""
    verifier = task.verifier
    own = verifier.environment or task.environment
    built = own.build_timeout_sec if verifier.separate else 0
    collected = sum(one.timeout_sec + SHELL for one in verifier.collect)
    return {
        "setup": task.environment.build_timeout_sec + built + _ready(task.environment),
        "judge": collected + (_ready(own) if verifier.separate else 0) + verifier.timeout_sec + SHELL,
    }


def _ready(wants: Surroundings) -> float:
    check = wants.healthcheck
    return check.start_period_sec + (check.retries + 1) * (check.timeout_sec + check.interval_sec) if check else 0


def rewards(read: Mapping[str, bytes]) -> dict[str, float]:
    """What a verifier wrote: reward.json (numbers by name, or one number), else reward.txt (one number).

    `read`: the files' contents by name. Raises ValueError where there is none, or no finite number in it.
    """
    for name, parse in (("reward.json", json.loads), ("reward.txt", float)):
        if name in read:
            return _rewards(name, read[name], parse)
    raise ValueError("the verifier wrote neither reward.json nor reward.txt")


def _rewards(file: str, content: bytes, parse: Callable[[str], Any]) -> dict[str, float]:
    try:
        found = parse(content.decode("utf-8-sig").strip())
        table = found if isinstance(found, dict) else {"reward": found}
        numbers = {name: _number(value) for name, value in table.items()}
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} holds no rewards: {error!s:.200}") from None
    if strange := [name for name, number in numbers.items() if not math.isfinite(number)]:
        raise ValueError(f"{file}: {strange[0]!r:.80} has no finite number")
    if not numbers:
        raise ValueError(f"{file} is empty")
    return numbers


def _number(value: Any) -> float:
    """A number, nan for what is none, inf for one that is too large."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def variables(env: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """An env table with its ${NAME} and ${NAME:-default} filled in. Raises UsageError naming what is not set."""

    def filled(found: re.Match[str]) -> str:
        name, _, default = found[1].partition(":-")
        if name not in known and ":-" not in found[1]:
            raise UsageError(f"the task wants the variable {name}, which is not set")
        return known.get(name, default)

    return {name: re.sub(r"\$\{([^}]+)\}", filled, text) for name, text in env.items()}
