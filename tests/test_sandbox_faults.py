"""Evaluations in which sandboxes fail: every loss has its cause, nothing that the machine did is scored, and the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from boxes import ISOLATING

from palaestra.environments.sandbox import launching
from palaestra.environments.terminal import Terminal
from palaestra.gym.environment import tool
from palaestra.gym.evaluate import Contest, Plan, Row, evaluate
from palaestra.gym.outcome import Cause
from palaestra.gym.policies import build
from palaestra.gym.registry import spec

pytestmark = pytest.mark.slow
GOLD = "scripted:gold"
FULL = "PALAESTRA_TEST_FULL_DISK"
EASY = {"families": ["first", "files"], "levels": [1]}
native = pytest.mark.skipif("native" not in ISOLATING, reason="no native sandbox on this machine")


class Sabotaged(Terminal):
    """Terminal on a machine that kills one box in five in the middle of an episode, and now and then the launcher."""

    dice = random.Random(0)

    @tool
    async def bash(self, command: str) -> str:
        """Run a command in the shell."""
        drawn = self.dice.random()
        if drawn < 0.2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._box.init, signal.SIGKILL)
        elif drawn < 0.23:
            self.resources._launching._process.kill()
        return await super().bash(command)


class Hogs(Terminal):
    """Terminal in which every second solution uses its box's memory up first."""

    count = 0

    @tool
    async def bash(self, command: str) -> str:
        """Run a command in the shell."""
        type(self).count += 1
        if self.count % 2:
            await super().bash("head -c 200M /dev/zero > /work/fill; tail -c +1 /dev/zero | sort")
        return await super().bash(command)


class Narrow(Terminal):
    """Terminal whose launcher ends before the first episode, on a machine whose disk (FULL) is full by then."""

    @classmethod
    async def open(cls, config: Any) -> Any:
        backend = await super().open(config)
        backend._launching.close()
        if disk := os.environ.get(FULL):
            Path(disk, "the-last-inode").touch()
            subprocess.run(["mount", "-o", "remount,nr_inodes=2", disk], check=True)
        return backend


def contest(reference: str, config: dict, tasks: int) -> Contest:
    return Contest({GOLD: build(GOLD)}, [spec(reference, config)], Plan(tasks=tasks, concurrency=8))


def outcomes(rows: list[Row]) -> dict[str, int]:
    return dict(Counter(row.outcome for row in rows))


@native
@pytest.mark.timeout(300)
async def test_boxes_and_launchers_killed_in_mid_episode_cost_retries_and_no_score(tmp_path, record_property):
    plan = contest(f"{__file__}:Sabotaged", EASY, 150)
    rows = await evaluate(plan, tmp_path)
    record_property("outcomes", json.dumps(outcomes(rows)))
    assert len(rows) == 150
    assert {row.outcome for row in rows} <= {Cause.OK, Cause.SANDBOX}, [row.detail for row in rows]
    assert [row for row in rows if row.reward != (1.0 if row.outcome == Cause.OK else None)] == []
    assert all("native:" in row.detail for row in rows if row.reward is None)
    assert sum(row.outcome == Cause.OK for row in rows) > 100, "a fifth of the tries fails; each is tried again"


@native
async def test_a_box_that_its_own_episode_used_up_is_scored(tmp_path, record_property):
    rows = await evaluate(contest(f"{__file__}:Hogs", {**EASY, "limits": {"memory": 64 << 20}}, 8), tmp_path)
    record_property("rewards", json.dumps([row.reward for row in rows]))
    assert {row.outcome for row in rows} <= {
        Cause.OK,
        Cause.POLICY_CRASH,
    }  # the kernel picks a process or the whole box
    assert sorted(row.reward for row in rows) == 4 * [0.0] + 4 * [1.0]


@native
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a full disk")
async def test_a_full_disk_of_this_machine_leaves_episodes_unscored_until_there_is_room(
    tmp_path, monkeypatch, record_property
):
    disk = Path(tempfile.mkdtemp(prefix="palaestra-test-"))  # where boxes' own ids may go, as they may in /tmp
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=99,mode=755", "tmpfs", disk], check=True)
    try:
        monkeypatch.setattr(launching, "STAGES", disk)
        monkeypatch.setenv(FULL, str(disk))
        plan = contest(f"{__file__}:Narrow", EASY, 12)
        full = await evaluate(plan, tmp_path / "run")
        monkeypatch.delenv(FULL)
        subprocess.run(["mount", "-o", "remount,nr_inodes=99", disk], check=True)
        again = await evaluate(plan, tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
        disk.rmdir()
    record_property("full", json.dumps(outcomes(full)))
    record_property("with room, the same command again", json.dumps(outcomes(again)))
    assert {(row.outcome, row.reward) for row in full} == {(Cause.SANDBOX, None)}
    assert "No space left" in full[0].detail
    assert {(row.outcome, row.reward) for row in again} == {(Cause.OK, 1.0)}


@pytest.mark.skipif("docker" not in ISOLATING, reason="no Docker daemon")
@pytest.mark.timeout(300)
async def test_a_daemon_that_is_stopped_in_mid_run_costs_no_score(tmp_path, monkeypatch, record_property):
    relay = Relay(tmp_path / "docker.sock")
    relay.start()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{relay.path}")
    config = {**EASY, "backend": "docker", "image": "palaestra/base"}
    rows: list[Row] = []

    async def stop_for_a_while() -> None:
        while len(list_rows(tmp_path)) < 6:
            await asyncio.sleep(0.05)
        relay.stop()
        await asyncio.sleep(3)
        relay.start()

    try:
        stopping = asyncio.create_task(stop_for_a_while())
        rows = await evaluate(contest("terminal", config, 40), tmp_path)
        await stopping
        again = await evaluate(contest("terminal", config, 40), tmp_path)
    finally:
        relay.stop()
    record_property("outcomes", json.dumps(outcomes(rows)))
    record_property("after the same command again", json.dumps(outcomes(again)))
    assert {row.outcome for row in rows} <= {Cause.OK, Cause.SANDBOX}
    assert [row for row in rows if row.reward != (1.0 if row.outcome == Cause.OK else None)] == []
    assert {row.reward for row in again} == {1.0}
    assert relay.cut, "the daemon was to be stopped in mid-episode"


def list_rows(folder: Path) -> list[str]:
    file = folder / "episodes.jsonl"
    return file.read_text().splitlines() if file.exists() else []


class Relay:
    """A socket before the daemon's that can be taken away as if the daemon had ended. Lives in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._daemon = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
        self._peers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.cut = 0

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def _stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self.path.unlink(missing_ok=True)
        self.cut += len(self._peers)
        for peer in list(self._peers):
            peer.close()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_unix_connection(self._daemon)
        pair = {writer, downstream}
        self._peers |= pair
        try:
            await asyncio.gather(_pump(reader, downstream), _pump(upstream, writer))
        finally:
            self._peers -= pair
            for peer in pair:
                peer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await source.read(1 << 16):
            sink.write(part)
            await sink.drain()
    with contextlib.suppress(OSError):
        if sink.can_write_eof():
            sink.write_eof()
