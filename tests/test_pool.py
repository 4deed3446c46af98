"""The pool: mix, staleness, retries, deadlines, losses, and resuming."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter

import pytest

from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.types import Episode, Outcome, Scored, Source, Task, Unscored
from palaestra.rollout.pool import Draw, Pool, PoolConfig, PoolError, Tasks, shares, work


class Spec:
    """Tasks of a made-up environment: `n` of them (None: endless)."""

    def __init__(self, alias, n=None, trainable=True):
        self.alias, self.n, self.trainable = alias, n, trainable

    def tasks(self, split, seed):
        number = 0
        while self.n is None or number < self.n:
            key = f"{seed}-{number}"
            yield Task(key=key, prompt=key, environment=self.alias, source=Source(trainable=self.trainable))
            number += 1


class Scripted:
    """A player: `causes[id of attempt]` decide; remembers what it was asked, and which versions were current."""

    def __init__(self, fail=lambda work: None, delay=0.0):
        self.fail, self.delay, self.works, self.pool = fail, delay, [], None

    async def play(self, work):
        self.works.append(work)
        self.version = self.pool.version if self.pool else 0
        await asyncio.sleep(self.delay)
        cause = self.fail(work)
        if isinstance(cause, Failure):
            raise cause
        if cause is not None:
            return Episode(work.id, work.task, result=Unscored(cause=cause), outcome=Outcome(cause=cause, detail="x"))
        return Episode(work.id, work.task, result=Scored(value=1.0), provenance=work.provenance)


def make(player=None, specs=None, weights=None, lockstep=False, **config):
    specs = specs or {"a": Spec("a"), "b": Spec("b")}
    config = PoolConfig(**{"groups": 4, "group_size": 2, "staleness": 1, **config})
    pool = Pool(
        specs,
        weights or dict.fromkeys(specs, 1.0),
        player or Scripted(),
        config,
        Draw(3),
        lockstep=lockstep,
    )
    pool._player.pool = pool
    return pool


def test_the_mix_is_the_target_exactly():
    assert shares({"a": 1, "b": 1, "c": 1}, 48) == {"a": 16, "b": 16, "c": 16}
    assert shares({"a": 3, "b": 1}, 5) == {"a": 4, "b": 1}
    assert sum(shares({"a": 1, "b": 1, "c": 1}, 8).values()) == 8


async def test_a_round_has_its_groups_and_identities_are_stable():
    player = Scripted()
    pool = make(player, staleness=0)
    groups = await pool.collect(0)
    assert Counter(group.task.environment for group in groups) == {"a": 2, "b": 2}
    assert all(len(group.episodes) == 2 for group in groups)
    assert len({episode.id for group in groups for episode in group.episodes}) == 8
    again = Scripted()
    await make(again, staleness=0).collect(0)
    assert sorted(w.id for w in player.works) == sorted(w.id for w in again.works)
    assert {w.sampling.seed for w in player.works} == {w.sampling.seed for w in again.works}


def test_the_seed_ignores_the_attempt_and_the_id_does_not():
    task = Task(key="k", prompt="p", environment="a")
    first, second = work(Draw(1), 0, task, 0, 0), work(Draw(1), 0, task, 0, 1)
    assert first.sampling.seed == second.sampling.seed
    assert first.id != second.id


async def test_staleness_bounds_what_starts():
    player = Scripted()
    pool = make(player, staleness=1)
    await pool.collect(0)
    await asyncio.sleep(0.01)
    assert {w.provenance["round"] for w in player.works} == {0, 1}
    with pytest.raises(PoolError, match="needs a policy of version 1"):
        await pool.collect(2)
    await pool.publish({}, 1)
    await asyncio.sleep(0.01)
    assert {w.provenance["round"] for w in player.works} == {0, 1, 2}
    synchronous = Scripted()
    await make(synchronous, staleness=0).collect(0)
    assert {w.provenance["round"] for w in synchronous.works} == {0}


async def test_infrastructure_failures_are_retried_twice_then_unscored_and_counted():
    def fail(work):
        sample = work.provenance["sample"]
        if work.task.environment != "a":
            return None
        return (
            Cause.TOOLS if sample == 0 else Failure(Cause.SANDBOX, "died") if work.provenance["attempt"] < 2 else None
        )

    pool = make(Scripted(fail), staleness=0)
    groups = await pool.collect(0)
    assert pool.outcomes == {("a", "tools"): 2, ("a", "ok"): 2, ("b", "ok"): 4}
    assert pool.retried == {"tools": 4, "sandbox": 4}
    lost = [e for group in groups for e in group.episodes if isinstance(e.result, Unscored)]
    assert [e.outcome.cause for e in lost] == [Cause.TOOLS] * 2


async def test_a_run_that_loses_most_of_its_episodes_stops():
    with pytest.raises(PoolError, match="8 of 8 episodes of one step have no score"):
        await make(Scripted(lambda w: Cause.SANDBOX), staleness=0).collect(0)


async def test_a_broken_environment_stops_the_run_by_name():
    broken = Scripted(
        lambda w: Cause.ENVIRONMENT if w.task.environment == "b" and w.provenance["sample"] == 0 else None
    )
    pool = make(broken, staleness=0, groups=120)
    with pytest.raises(PoolError, match=r"environment b failed in 60 of 240 episodes .*: x"):
        await pool.collect(0)


async def test_a_round_never_hangs_and_names_what_it_waits_for():
    pool = make(Scripted(delay=60), staleness=0, round_seconds=0.05)
    with pytest.raises(PoolError, match=r"round 0: still waiting for 4 of a, 4 of b after 0.05 s"):
        await pool.collect(0)
    await pool.close()
    assert not pool._rounds[0].running


async def test_a_bug_in_the_player_surfaces():
    def fail(work):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await make(Scripted(fail), staleness=0).collect(0)


async def test_a_resumed_pool_goes_on_where_it_was():
    straight = make(lockstep=True)
    expected = []
    for step in range(4):
        expected.append([e.id for g in await straight.collect(step) for e in g.episodes])
        await straight.publish({}, step + 1)
    pool, seen = make(lockstep=True), []
    for step in range(4):
        seen.append([e.id for g in await pool.collect(step) for e in g.episodes])
        await pool.publish({}, step + 1)
        state = pickle.loads(pickle.dumps(pool.state()))
        pool = make(lockstep=True)
        pool.load_state(state)
    assert seen == expected


async def test_lockstep_plays_in_order_of_task_and_sample():
    player = Scripted()
    await make(player, {"a": Spec("a")}, lockstep=True, staleness=0).collect(0)
    order = [(w.task.key, w.provenance["sample"]) for w in player.works]
    assert order == sorted(order)


def test_a_finite_set_is_passed_through_again_in_another_order_and_its_cursor_resumes():
    tasks = Tasks(Spec("a", 3), 5)
    keys = [task.key for task in tasks.take(7)]
    assert keys == ["5-0", "5-1", "5-2", "6-0", "6-1", "6-2", "7-0"]
    other = Tasks(Spec("a", 3), 5)
    other.load_state(tasks.state())
    assert [task.key for task in other.take(2)] == [task.key for task in tasks.take(2)] == ["7-1", "7-2"]


def test_tasks_for_evaluation_only_are_never_trained_on():
    with pytest.raises(UsageError, match="may be trained on"):
        Tasks(Spec("a", 3, trainable=False), 0).take(1)


async def test_a_task_that_is_drawn_twice_in_a_round_has_further_samples_and_not_the_same_again():
    class Lone(Spec):
        def tasks(self, split, seed):
            return super().tasks(split, 0)

    player = Scripted()
    pool = make(player, specs={"a": Lone("a", n=1)}, groups=3, staleness=0)
    groups = await pool.collect(0)
    assert {work.task.key for work in player.works} == {"0-0"}
    assert len({work.id for work in player.works}) == 6
    assert len({work.sampling.seed for work in player.works}) == 6
    assert [[e.provenance["sample"] for e in group.episodes] for group in groups] == [[0, 1], [2, 3], [4, 5]]
