"""Shell tasks in a sandbox, judged by the whole state that they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from palaestra.environments import harbor_export
from palaestra.environments import terminal_state as state
from palaestra.environments.boxed import Boxed
from palaestra.gym.environment import metric, reward
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import Box, Entry
from palaestra.gym.types import Message, Task
from palaestra.tasks.terminal import PROGRAMS, shell_tasks
from palaestra.tasks.terminal.puzzle import Node, Tree

TOLERATED = ("/tmp/", "/var/", "/dev/", "/run/", "/root/.")
"""Where anything may change."""
SETUP_SECONDS = 30.0
ASK_SECONDS, SETTLE_SECONDS = 5.0, 1.0


class Terminal(Boxed):
    """Do in a shell what the task asks; the shell begins in /work. Reply without a tool call when all is done."""

    class Config(Boxed.Config):
        """`levels` and `families` of the generated tasks (all families, when none is named); `backend` of the sandbox,
        `image` and `limits` of its boxes, of which `warm` are made ahead; `seconds` that one command may take; `shown`:
        characters of output that the policy sees."""

        levels: tuple[int, ...] = (1, 2, 3)
        families: tuple[str, ...] = ()

    _baseline: Mapping[str, Entry | None] = {}

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """Generated tasks."""
        return shell_tasks(config.levels, config.families)

    @classmethod
    def programs(cls, config: Any) -> Iterable[str]:
        """What the families' tasks use."""
        return {program for family in config.families or PROGRAMS for program in PROGRAMS.get(family, ())}

    @classmethod
    def export(cls, task: Task, folder: Path) -> Path:
        """A Harbor task folder."""
        return harbor_export.export(task, folder)

    async def another_box(self) -> Box:
        """Another box, whose shell stands in /work, whatever its image begins with."""
        box = await super().another_box()
        try:
            done = await box.exec(f"mkdir -p {state.WORK} && cd {state.WORK}", SETUP_SECONDS)
            if done.status:
                raise Failure(Cause.SANDBOX, f"no shell in {state.WORK}: {done.output.decode(errors='replace')}")
        except BaseException:
            await box.destroy()
            raise
        return box

    async def setup(self, task: Task) -> None:
        """A fresh box in which the task's tree stands."""
        await super().setup(task)
        await self.box.put(dict(_entries(_tree(task.data["before"]))))
        if task.data.get("setup"):
            done = await self.box.exec(task.data["setup"], SETUP_SECONDS)
            if done.status or done.stopped:
                raise Failure(Cause.SANDBOX, f"the task's setup failed: {done.output[-500:].decode(errors='replace')}")
        self._baseline = await self.box.diff()

    @reward
    async def done(self, task: Task) -> float:
        """1 if everything is as the task wants it, and nothing else has changed."""
        return float(not await self._problems(task))

    @metric
    async def right(self, task: Task) -> float:
        """The share of the wanted tree's paths that are right."""
        wanted = _tree(task.data["after"])
        try:
            found = {path: entry for path, entry in (await self.box.diff()).items() if entry is not None}
        except OSError:
            return 0.0
        wrong = await asyncio.to_thread(state.differences, wanted, found)
        return max(0.0, 1 - len(wrong) / max(1, len(wanted)))

    async def _problems(self, task: Task) -> list[str]:
        """What is wrong, a line each."""
        try:
            after = await self.box.diff()
        except OSError as error:  # more than anyone collects: what ran in the box made it so
            return [str(error)]
        found = {path: entry for path, entry in after.items() if entry is not None}
        wanted = _tree(task.data["after"])
        problems = await asyncio.to_thread(state.differences, wanted, found) + _elsewhere(self._baseline, after)
        for path, node in wanted.items():
            if node.kind == "git" and not problems:
                problems += await self._in_fresh_box(partial(_repository, node, f"{state.WORK}/{path}", found))
        for check in task.data.get("checks", ()):
            if not problems:
                problems += await getattr(self, f"_check_{check['kind']}")(check, found)
        return problems

    async def _in_fresh_box(self, judge: Any) -> list[str]:
        """What a judge finds wrong in a fresh box; what that does not take in is wrong, too."""
        box = await self.another_box()
        try:
            return await judge(box)  # type: ignore[no-any-return]
        except OSError as error:
            return [f"a fresh box does not take it in: {error}"]
        finally:
            await box.destroy()

    async def _check_process(self, check: Mapping[str, Any], found: Mapping[str, Entry]) -> list[str]:
        """So many processes have the arguments; what was just killed has a moment to go."""
        for _ in range(int(SETTLE_SECONDS / 0.05)):
            count = len(await self._numbers(check["arguments"]))
            if count == check["count"]:
                break
            await asyncio.sleep(0.05)
        return [] if count == check["count"] else [f"{count} processes are {' '.join(check['arguments'])}"]

    async def _check_pidfile(self, check: Mapping[str, Any], found: Mapping[str, Entry]) -> list[str]:
        """The file holds the number of the process that has the arguments."""
        numbers = await self._numbers(check["arguments"])
        content = found[check["path"]].content.strip().decode(errors="replace")
        return [] if content in map(str, numbers) else [f"{check['path']} does not hold the process number"]

    async def _numbers(self, arguments: Sequence[str]) -> list[int]:
        """The numbers of the processes that have the arguments, in the box."""
        return [process.pid for process in await self.box.processes() if state.called(process.arguments, arguments)]

    async def _check_answer(self, check: Mapping[str, Any], found: Mapping[str, Entry]) -> list[str]:
        """An HTTP GET brings the body."""
        request = f"GET {check['path']} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode()
        try:
            answer = await self.box.ask(check["port"], request, ASK_SECONDS)
        except OSError as error:
            return [f"port {check['port']}: {error}"]
        status, _, rest = answer.partition(b"\r\n")
        right = b" 200 " in status and rest.partition(b"\r\n\r\n")[2] == check["body"].encode()
        return [] if right else [f"port {check['port']} answers something else"]

    async def _check_fresh(self, check: Mapping[str, Any], found: Mapping[str, Entry]) -> list[str]:
        """In a fresh box that holds what /work holds, a command prints the output."""

        async def judge(box: Box) -> list[str]:
            kinds = ("file", "directory", "link")
            work = {path: entry for path, entry in found.items() if path.startswith("/work/") and entry.kind in kinds}
            await box.put(work)
            done = await box.exec(check["command"], self.config.seconds)
            right = done.status == 0 and done.output == check["output"].encode()
            return [] if right else [f"{check['command']} printed something else"]

        return await self._in_fresh_box(judge)

    def solution(self, task: Task) -> list[str | Message]:
        """The task's script, then a word that all is done."""
        return [Message.calling("bash", command=task.data["script"]), "done"]


async def _repository(node: Node, place: str, found: Mapping[str, Entry], box: Box) -> list[str]:
    """What is wrong with a repository, asked of git in a fresh box."""

    async def git(arguments: str) -> str:
        done = await box.exec(f"{state.GIT} --git-dir=judged {arguments} 2>/dev/null", ASK_SECONDS)
        return done.output.decode(errors="replace")

    files = {"config": Entry("file", 0o644, state.CONFIG), **state.taken(found, place)}
    await box.put({f"{state.WORK}/judged/{path}": entry for path, entry in files.items()})
    return await state.repository(git, node, place)


def _entries(tree: Tree) -> Iterator[tuple[str, Entry]]:
    """What to put into a box."""
    for path, node in tree.items():
        if node.kind != "git":
            kind = node.kind if node.kind in ("directory", "link") else "file"
            yield f"{state.WORK}/{path}", Entry(kind, node.mode, state.content_of(node))


def _tree(plain: Mapping[str, Any]) -> Tree:
    return {path: Node.model_validate(node) for path, node in plain.items()}


def _elsewhere(before: Mapping[str, Entry | None], after: Mapping[str, Entry | None]) -> list[str]:
    """What changed outside /work and the places where anything may."""
    absent = object()
    changed = [path for path in before.keys() | after.keys() if before.get(path, absent) != after.get(path, absent)]
    strange = [p for p in changed if not p.startswith("/work/") and p != "/work" and not f"{p}/".startswith(TOLERATED)]
    return [f"{path}: changed" for path in sorted(strange)]
