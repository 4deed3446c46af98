"""The Gymnasium bridge, both ways."""

from __future__ import annotations

import json
import sys
import threading
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from palaestra.gym.agent import Loop
from palaestra.gym.episode import run_episode
from palaestra.gym.gymnasium_bridge import GymnasiumEnv, as_message
from palaestra.gym.outcome import Failure
from palaestra.gym.policies import Null
from palaestra.gym.registry import UsageError, spec
from palaestra.gym.types import Completion, Message, Sampling, Scored

FILE = """
import random
from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.types import Limits, Task

closed = []

def tasks(split, seed):
    draw = random.Random(seed)
    while True:
        n = draw.randrange(10**6)
        yield Task(key=str(n), prompt=f"Double {n}", data={"n": n}, limits=Limits(turns=3))

class Doubling(Environment):
    tasks = tasks

    @tool
    def double(self, number: int) -> int:
        return 2 * number

    @reward
    def correct(self, task, answer):
        return None if answer == "unscored" else float(answer == str(2 * task.data["n"]))

    def close(self):
        closed.append(self.task.key)
"""


@pytest.fixture
def found(tmp_path):
    path = tmp_path / "doubling.py"
    path.write_text(FILE)
    return spec(str(path))


@pytest.fixture
def env(found):
    env = GymnasiumEnv(found)
    yield env
    env.close()


def call(number: int) -> str:
    return json.dumps({"tool": "double", "arguments": {"number": number}})


def test_an_environment_of_ours_passes_gymnasiums_own_check(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(render|spec|custom|not within|register).*")
        check_env(env, skip_render_check=True)


def test_tool_calls_and_the_reply_are_steps_and_the_result_comes_last(env):
    observation, info = env.reset(seed=1)
    number = int(observation.removeprefix("Double "))
    assert info["tools"][0]["function"]["name"] == "double"
    observation, reward, terminated, truncated, _ = env.step(call(number))
    assert (observation, reward, terminated, truncated) == (str(2 * number), 0.0, False, False)
    _, reward, terminated, truncated, info = env.step(observation)
    assert (reward, terminated, truncated, info["outcome"]) == (1.0, True, False, "ok")
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("more")


def test_a_spent_limit_truncates_and_what_is_unscored_raises(env):
    env.reset(seed=1)
    ends = [env.step(call(1))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    env.reset(seed=1)
    with pytest.raises(Failure):
        env.step("unscored")


def test_reset_and_close_end_the_episode_under_way(env, found):
    closed = sys.modules[found.environment().__module__].closed
    key = next(found.tasks("train", 0)).key
    _, info = env.reset(options={"key": key})
    assert info["key"] == key
    env.reset(seed=2)
    assert closed == [key]
    env.close()
    assert len(closed) == 2
    for thread in threading.enumerate():
        if thread.name == "palaestra-gymnasium":
            thread.join(5)
            assert not thread.is_alive()


def test_actions_are_replies_or_tool_calls():
    assert as_message("5").content == "5"
    assert as_message('{"tool": 5}').content == '{"tool": 5}'
    assert as_message(call(3)).tool_calls[0].arguments == '{"number": 3}'


class Balance(Null):
    """Pushes the pole's cart to the side that it falls to."""

    async def reply(self, path, new, *_):
        state = json.loads(new[-1].content.rpartition("Observation: ")[2])
        return Completion(Message(role="assistant", content=f"I push {int(state[2] + state[3] > 0)}"))


async def play(ref, policy, seed=0, **config):
    found = spec(ref, config)
    task = next(found.tasks("train", seed))
    environment = found.environment()(found.settings())
    return await run_episode(environment, Loop(), {"main": policy}, task, Sampling(), "e"), task


async def test_a_gymnasium_environment_is_played_as_gymnasium_plays_it():
    episode, task = await play("gymnasium:CartPole-v1", Balance(), steps=60)
    env = gymnasium.make("CartPole-v1", max_episode_steps=60)
    state, _ = env.reset(seed=task.seed)
    total, over = 0.0, False
    while not over:
        state, reward, terminated, truncated, _ = env.step(int(np.float32(state[2]) + np.float32(state[3]) > 0))
        total, over = total + reward, terminated or truncated
    assert episode.result == Scored(value=total)
    assert total > 20


async def test_a_reply_that_is_no_action_is_answered_and_counted():
    episode, _ = await play("gymnasium:FrozenLake-v1", Null(), steps=2)
    assert episode.outcome.cause.value == "limit:turns"
    assert episode.metrics["invalid_actions"] == 12
    assert "one integer from 0 to 3" in episode.turns[1].added[0].content


class Spelling(gymnasium.Env):
    """A text action space: spell the word."""

    observation_space = gymnasium.spaces.Text(10)
    action_space = gymnasium.spaces.Text(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "cat", {}

    def step(self, action):
        return "end", float(action == "cat"), True, False, {}


async def test_text_actions_are_the_reply_itself():
    gymnasium.register("PalaestraSpelling-v0", Spelling)
    try:

        class Cat(Null):
            async def reply(self, path, new, *_):
                return Completion(Message(role="assistant", content=" cat "))

        episode, _ = await play("gymnasium:PalaestraSpelling-v0", Cat())
        assert episode.result == Scored(value=1.0)
    finally:
        del gymnasium.registry["PalaestraSpelling-v0"]


def test_what_cannot_be_bridged_is_named():
    with pytest.raises(UsageError, match="only Discrete and Text"):
        spec("gymnasium:Pendulum-v1")
    with pytest.raises(UsageError, match="gymnasium:NoSuch-v0"):
        spec("gymnasium:NoSuch-v0")
