"""The SWE tasks that ship, one of each package of the index: downloaded, broken, repaired by their gold."""

from __future__ import annotations

import pytest

from palaestra.environments.sandbox import images
from palaestra.environments.sandbox.backends import lacks_native
from palaestra.environments.sandbox.base import NAME
from palaestra.environments.swe.build import function_of, with_clocks
from palaestra.environments.swe.copies import copies_in
from palaestra.environments.swe.environment import Swe
from palaestra.environments.swe.packages import PACKAGES
from palaestra.environments.swe.repository import whole
from palaestra.gym.agent import Loop
from palaestra.gym.environment import gold_of
from palaestra.gym.episode import run_episode
from palaestra.gym.policy import Replay
from palaestra.gym.types import Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacks_native()), reason="no native sandbox on this machine"),
    pytest.mark.parametrize("image", ["host", *({NAME} & set(images.names()))]),
]


@pytest.fixture
async def opened(image):
    config = Swe.Config(image=image)
    backend = await Swe.open(config)
    yield config, backend
    await Swe.shut(backend)


async def test_a_task_of_each_package_is_repaired_by_its_gold(opened):
    config, backend = opened
    chosen = {task.data["package"]: task for task in Swe.task_set(config)}
    assert len(chosen) == len(PACKAGES)
    for task in chosen.values():
        gold = Replay(gold_of(Swe(config, backend), task))
        episode = await run_episode(Swe(config, backend), Loop(), {"main": gold}, task, Sampling(), task.key)
        assert episode.result.value == 1, task.key


async def test_no_package_lies_in_a_box_unbroken(opened):
    config, backend = opened
    box = await backend.create(config.image, config.limits)
    assert await copies_in(box, [package.name for package in PACKAGES]) == []


async def test_no_verdict_looks_at_a_clock(opened):
    config, _ = opened
    clocks = {package.name: with_clocks(whole(package.name)) for package in PACKAGES}
    assert ("tests/test_dos_prevention.py", "test_nested_case_within_cap_under_1s") in clocks["sqlparse"]
    for task in Swe.task_set(config):
        for test in (*task.data["stable"], *task.data["fail_to_pass"]):
            assert function_of(test) not in clocks[task.data["package"]], test
