"""What only containers do: layers on this machine, containers that nobody waits for, a daemon that must be at hand."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import pytest
from boxes import IMAGES, ISOLATING, SMALL

from palaestra.environments.sandbox import docker
from palaestra.environments.sandbox.backends import open_backend
from palaestra.environments.sandbox.images import HOST
from palaestra.gym.outcome import Failure
from palaestra.gym.registry import UsageError

pytestmark = pytest.mark.skipif("docker" not in ISOLATING, reason="no Docker on this machine")
IMAGE = IMAGES["docker"]


@pytest.fixture
async def backend():
    opened = open_backend("docker")
    yield opened
    await opened.close()


def owned(api, owner):
    return api.containers(all=True, filters={"label": f"{docker.LABEL}={owner}"})


async def test_a_difference_is_the_daemons_own(backend):
    box = await backend.create(IMAGE, SMALL)
    script = (
        "rm -r /root; mkdir -p /root/in; echo x > /root/in/x; rm /etc/passwd; chmod 700 /srv; echo y >> /etc/hosts; "
        "rm -r /etc/skel; mkdir /etc/skel; ln -s /nowhere /work/l; mkfifo /work/p; mv /bin/tar /work/tar"
    )
    assert (await box.exec(script, 10)).status == 0
    found = await box.diff()
    changes = await backend.call("changes", lambda api: api.diff(box._container))
    assert {path for path, entry in found.items() if entry is None} >= {c["Path"] for c in changes if c["Kind"] == 2}
    assert set(found) >= {c["Path"] for c in changes if not c["Path"].startswith(("/dev", "/proc", "/sys"))}
    assert found["/etc/skel/.bashrc"] is None
    assert found["/root/in/x"].content == b"x\n"
    assert found["/work/tar"].content[:4] == b"\x7fELF", "though the box has no tar any more"
    await box.destroy()


async def test_a_container_that_nobody_waits_for_any_more_is_removed(backend):
    await (await backend.create(IMAGE, SMALL)).destroy()
    for seconds in (0.001, 0.01, 0.03, 0.06, 0.1):
        with suppress(TimeoutError):
            await (await asyncio.wait_for(backend.create(IMAGE, SMALL), seconds)).destroy()
    async with asyncio.timeout(20):
        while await backend.call("list", lambda api: owned(api, backend._owner)):
            await asyncio.sleep(0.1)


async def test_closing_one_backend_leaves_anothers_containers_alone(backend):
    other = open_backend("docker")
    box = await backend.create(IMAGE, SMALL)
    await other.create(IMAGE, SMALL)
    await other.close()
    assert not await backend.call("list", lambda api: owned(api, other._owner))
    assert (await box.exec("echo here", 5)).output == b"here\n"


async def test_a_container_that_is_removed_behind_our_back_is_the_machines_failure(backend):
    box = await backend.create(IMAGE, SMALL)
    await backend.call("remove", lambda api: api.remove_container(box._container, force=True))
    for doing in (box.exec("true", 5), box.read("/etc/passwd"), box.diff()):
        with pytest.raises(Failure, match="docker"):
            await doing
    await box.destroy()


async def test_this_machines_own_files_are_no_image(backend):
    with pytest.raises(UsageError, match="image build"):
        await backend.create(HOST, SMALL)


def test_a_quota_is_claimed_only_where_its_mount_has_it():
    info = {"Driver": "overlay2", "DriverStatus": [["Backing Filesystem", "xfs"]], "DockerRootDir": "/proc/docker"}
    assert not docker._has_quota(info)
    assert not docker._has_quota({**info, "Driver": "btrfs"})


def test_a_daemon_elsewhere_and_an_ordinary_user_are_refused(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(UsageError, match="must run on this machine"):
        docker._connect()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="only root"):
        docker._connect()
