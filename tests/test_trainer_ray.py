"""The same run on Ray actors: they are killed in mid-run, and the run ends well."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from pathlib import Path

import pytest
import ray
import torch

from palaestra.gym.episode import Bounds
from palaestra.gym.types import Scored
from palaestra.model.presets import PRESETS
from palaestra.rollout.actors import Cluster
from palaestra.trainer.assembly import assemble
from palaestra.trainer.loop import Rlvr, Run, prepare
from palaestra.trainer.recipe import load

spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("test_trainer_run.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano-test", toy.NANO)
    (tmp_path / "world.py").write_text(toy.WORLD)
    path = tmp_path / "toy.toml"
    path.write_text(toy.RECIPE.format(world=f"{tmp_path / 'world.py'}:Toy"))
    return lambda *overrides: load(str(path), ["evaluation.tasks=0", *overrides])


@pytest.mark.parametrize("placement", ["shared", "split"])
def test_a_cluster_of_one_cpu_trains_and_survives_the_death_of_its_actors(recipe, tmp_path, placement):
    chosen = recipe(f"placement={placement}", "ray.environment_actors=2", "pool.staleness=1")

    async def run():
        stack = assemble(chosen, chosen.specs(), prepare(chosen))
        stage = Rlvr(Run(chosen, tmp_path, stack, chosen.specs()), "rl", chosen.stages["rl"])
        await stage.start()
        found = [await stage.step(0)]
        for step, victim in enumerate((stack.player.environments[0], stack.player.policy), 1):
            ray.kill(victim, no_restart=False)
            found.append(await stage.step(step))
            assert all(isinstance(episode.result, Scored) for episode in stage.episodes)
        retried = dict(stage.pool.retried)
        await stage.close()
        await stack.close()
        return found, retried

    found, retried = asyncio.run(run())
    assert [row["episodes"] for row in found] == [16, 16, 16]
    assert all(row["logprob_gap"] < 1e-5 for row in found if row.get("staleness/0") == 1)
    assert retried.get("model-server", 0) + retried.get("environment", 0) > 0


def test_an_engine_that_dies_while_it_takes_weights_is_given_them_again(tmp_path):
    died = tmp_path / "died"

    class Fragile:
        async def prepare(self, weights, version):
            if not died.exists():
                died.touch()
                os._exit(1)
            self.sum = sum(float(tensor.sum()) for _, tensor in weights)

        async def commit(self, version):
            assert (self.sum, version) == (2.0, 3)

    async def run():
        cluster = Cluster({}, Fragile, None, Bounds())
        try:
            assert not await cluster.policy.ready.remote()
            await cluster.deliver({"w": torch.ones(2)}, 3)
            return await cluster.policy.ready.remote()
        finally:
            await cluster.close()

    assert asyncio.run(run())
    assert died.exists()
