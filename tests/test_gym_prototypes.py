"""Environments whose resources many episodes share."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from palaestra.gym.prototypes import Prototypes
from palaestra.gym.registry import spec

CODE = """
import asyncio
from palaestra.gym.environment import Environment

opened, shut = [], []


class Shared(Environment):
    '''Has a resource.'''

    @classmethod
    async def open(cls, config):
        await asyncio.sleep(0.01)
        opened.append(len(opened))
        if len(opened) == 1 and fails:
            raise OSError("not yet")
        return opened[-1]

    @classmethod
    async def shut(cls, resources):
        shut.append(resources)


fails = {fails}
"""


def shared(folder: Path, fails: bool):
    file = folder / f"shared_{fails}.py".lower()
    file.write_text(CODE.replace("{fails}", str(fails)))
    found = spec(f"{file}:Shared")
    return found, Prototypes({"shared": found})


async def test_two_hundred_episodes_that_begin_at_once_open_an_environment_once(tmp_path):
    found, prototypes = shared(tmp_path, fails=False)
    given = await asyncio.gather(*(prototypes.of("shared") for _ in range(200)))
    assert {prototype.resources for prototype in given} == {0}
    assert given[0].fresh().provenance == {"environment_sha256": found.sha256}
    await prototypes.close()
    await prototypes.close()
    assert vars(sys.modules[found.environment().__module__])["shut"] == [0]
    assert (await prototypes.of("shared")).resources == 1


async def test_an_environment_that_could_not_be_opened_is_tried_again_by_the_next_episode(tmp_path):
    _, prototypes = shared(tmp_path, fails=True)
    with pytest.raises(OSError, match="not yet"):
        await prototypes.of("shared")
    assert (await prototypes.of("shared")).resources == 1
