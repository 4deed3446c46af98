"""Whole runs on a toy environment and a very small hybrid: learning, determinism, resuming, what is left behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from palaestra.gym.registry import UsageError
from palaestra.model.config import ModelConfig
from palaestra.model.presets import PRESETS
from palaestra.trainer import metrics, state
from palaestra.trainer.assembly import assemble
from palaestra.trainer.batch import Batch, Sample
from palaestra.trainer.cli import folder_of, write_head
from palaestra.trainer.demonstrations import Demonstrations
from palaestra.trainer.learner import Learner, LearnerConfig
from palaestra.trainer.loop import Run, prepare, train
from palaestra.trainer.optim import OptimConfig
from palaestra.trainer.recipe import load

WORLD = '''
from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.tasksets import split_of
from palaestra.gym.types import Message, Task, ToolCall


def tasks(split, seed):
    number = 1000 * seed
    while True:
        number += 1
        if split_of(str(number)) == split:
            yield Task(key=str(number), prompt="say", data={"answer": "a"}, split=split, difficulty=number % 2)


class Toy(Environment):
    """Say a short thing."""

    tasks = tasks

    @tool
    def look(self, where: str) -> str:
        """Look."""
        return "a"

    @reward
    def short(self, episode) -> float:
        drawn = [turn.completion.generation for turn in episode.turns]
        return float((drawn[0].ids < 1024).mean()) if drawn else 0.0

    def solution(self, task):
        call = ToolCall(id="", name="look", arguments='{"where": "b"}')
        return [Message(role="assistant", tool_calls=(call,)), Message(role="assistant", content="a")]
'''
NANO = ModelConfig(
    hybrid_override_pattern="ME*-",
    hidden_size=32,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    moe_latent_size=16,
)
RECIPE = """
model = "preset:nano-test"
threads = 1
[environments.toy]
use = "{world}"
[environments.other]
use = "{world}"
[pool]
groups = 4
group_size = 4
[rollout]
max_tokens = 6
context = 96
slots = 64
[evaluation]
tasks = 6
[checkpoint]
every = 1
[stages.rl]
loss = "rlvr"
steps = 3
[stages.rl.optim]
muon = 0.002
adamw = 0.05
warmup = 0
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano-test", NANO)
    world = tmp_path / "world.py"
    world.write_text(WORLD)
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE.format(world=f"{world}:Toy"))
    return lambda *overrides: load(str(path), overrides)


def go(recipe, folder, watch=lambda *a: None):
    async def run():
        specs = recipe.specs()
        stack = assemble(recipe, specs, prepare(recipe))
        try:
            write_head(folder, recipe, {})
            return await train(Run(recipe, folder, stack, specs, watch)), stack
        finally:
            await stack.close()

    return asyncio.run(run())


def numbers(folder: Path):
    rows = metrics.read(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not metrics.is_time(name)} for row in rows]


def test_a_run_learns_and_leaves_everything_behind(make, tmp_path):
    folder = tmp_path / "run"
    summary, _ = go(make("stages.rl.steps=20", "pool.groups=8", "pool.group_size=8", "checkpoint.every=50"), folder)
    rows = numbers(folder)
    assert [row["step"] for row in rows] == list(range(20))
    first, last = (np.mean([row["reward/toy"] for row in part]) for part in (rows[:2], rows[-2:]))
    assert last > first + 0.2
    assert summary["environments"]["toy"]["gain"]["mean"] > 0
    part = summary["environments"]["toy"]
    assert set(part) == {"tasks", "before", "after", "gain", "greedy_gain"}
    assert set(part["gain"]) >= {"mean", "low", "high"}
    assert set(part["before"]) == set(part["after"]) == {"mean", "greedy"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "curves.png").stat().st_size > 1000
    assert "<h1>toy</h1>" in (folder / "report.html").read_text()
    assert (folder / "model" / "config.json").exists()
    assert list((folder / "tensorboard" / "rl").iterdir())


@pytest.mark.parametrize("nvfp4", ["true", "false"])
def test_sampler_and_trainer_agree_at_staleness_0(make, tmp_path, nvfp4):
    go(make("pool.staleness=0", f"nvfp4={nvfp4}", "evaluation.tasks=0"), tmp_path / "run")
    for row in numbers(tmp_path / "run"):
        assert row["logprob_gap"] < 1e-5
        assert row["logprob_gap_p999"] < 1e-4
        assert row["mismatch_kl"] < 1e-6
        assert row["importance_clipped"] == 0
        assert row["staleness/0"] == 1


def test_staleness_1_is_seen_in_the_metrics_and_never_exceeded(make, tmp_path):
    go(make("stages.rl.steps=4", "evaluation.tasks=0"), tmp_path / "run")
    seen = {name for row in numbers(tmp_path / "run") for name in row if name.startswith("staleness/")}
    assert seen <= {"staleness/0", "staleness/1"}
    assert "staleness/1" in seen


class Killed(Exception):
    pass


def test_deterministic_runs_are_equal_and_so_is_one_that_was_killed_and_resumed(make, tmp_path):
    recipe = make("deterministic=true", "stages.rl.steps=4")
    try:
        straight, _ = go(recipe, tmp_path / "one")
        again, _ = go(recipe, tmp_path / "two")

        def watch(stage, step, steps, found):
            if stage == "rl" and step == deaths[0]:
                deaths.pop(0)
                raise Killed

        deaths = [0, 2, 99]
        for _ in range(2):
            with pytest.raises(Killed):
                go(recipe, tmp_path / "three", watch)
        resumed, _ = go(recipe, tmp_path / "three", watch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two") == numbers(tmp_path / "three")
    assert straight == again == resumed


def test_permuted_rewards_change_what_is_learned_and_nothing_else(make, tmp_path):
    go(make("pool.staleness=0", "evaluation.tasks=0", "stages.rl.steps=1"), tmp_path / "real")
    permuted = make("pool.staleness=0", "evaluation.tasks=0", "stages.rl.steps=1", "stages.rl.permute_rewards=true")
    go(permuted, tmp_path / "permuted")
    (real,), (control,) = numbers(tmp_path / "real"), numbers(tmp_path / "permuted")
    assert real["reward/toy"] == control["reward/toy"]
    assert real["grad_norm"] != control["grad_norm"]


def test_supervised_training_learns_the_solutions_through_the_tools(make, tmp_path):
    text = (tmp_path / "toy.toml").read_text()
    stage = '[stages.sft]\nloss = "sft"\nsteps = 15\nbatch = 8\n[stages.sft.optim]\nmuon = 0.02\nadamw = 0.01\n'
    (tmp_path / "toy.toml").write_text(text.split("[pool]")[0] + stage + "[evaluation]\ntasks = 0\n")
    go(make(), tmp_path / "run")
    losses = [row["loss"] for row in numbers(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "run" / "model").is_dir()


async def test_a_demonstration_is_what_an_episode_looks_like(make):
    recipe = make()
    stack = assemble(recipe, recipe.specs(), torch.device("cpu"))
    data = Demonstrations(recipe.specs(), recipe.weights(), stack.renderer, 0)
    batch = await data.batch(2)
    await data.close()
    sample = batch.sequences[0]
    text = stack.renderer.decode(sample.ids.tolist())
    said = stack.renderer.decode(sample.ids[sample.loss].tolist())
    assert "say" in text
    assert "say" not in said
    assert "look" in said
    assert said.count("<|im_end|>") == 2


def sequences(n=12):
    generator = np.random.default_rng(0)
    found = []
    for place in range(n):
        size = int(generator.integers(8, 60))
        loss = generator.random(size) < 0.4
        loss[0], loss[-1] = False, True
        ids = generator.integers(0, 2048, size).astype(np.int32)
        mu = np.where(loss, np.float32(-7.6), np.float32(0))
        found.append(Sample(ids, mu, loss, float(generator.normal()) * (place % 3 > 0)))
    return found


def learned(batch, world=None, **config):
    from palaestra.model.network import Hybrid

    torch.manual_seed(0)
    learner = Learner(Hybrid(NANO), "rlvr", LearnerConfig(**config), OptimConfig(muon=0.01, adamw=0.01), world)
    measured = learner.step(batch)
    return measured, learner.state_dict()["masters"]


def test_micro_batches_and_order_change_nothing():
    found = sequences()
    expected, weights = learned(Batch(found))
    for batch, size in ((Batch(found), 64), (Batch(found[::-1]), 512)):
        measured, other = learned(batch, micro_tokens=size)
        assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert measured["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, atol=1e-4, rtol=0, msg=name)


class Rank:
    """One of two ranks in threads: sums meet at a barrier."""

    def __init__(self, rank, shared):
        self.rank, self.size, self._shared = rank, 2, shared

    def _exchange(self, value):
        self._shared["slots"][self.rank] = value.clone()
        self._shared["barrier"].wait(30)
        both = list(self._shared["slots"])
        self._shared["barrier"].wait(30)
        return both

    def sum(self, value):
        return value.copy_(sum(self._exchange(value)))

    def gather(self, value):
        return torch.cat(self._exchange(value))


def test_two_ranks_do_what_one_does():
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from palaestra.model.network import Hybrid

    batch = Batch(sequences())
    expected, weights = learned(batch)
    shared = {"slots": [None, None], "barrier": threading.Barrier(2)}
    torch.manual_seed(0)
    first = Hybrid(NANO)
    second = Hybrid(NANO)
    second.load_state_dict(first.state_dict())
    optim = OptimConfig(muon=0.01, adamw=0.01)
    learners = [Learner(m, "rlvr", LearnerConfig(), optim, Rank(r, shared)) for r, m in enumerate((first, second))]
    with ThreadPoolExecutor(2) as pool:
        measured = list(pool.map(lambda learner: learner.step(batch), learners))
    for learner, found in zip(learners, measured, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["logprob_gap"] == pytest.approx(expected["logprob_gap"], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(learner.state_dict()["masters"][name], value, atol=1e-4, rtol=0, msg=name)


def test_a_batch_without_any_advantage_moves_nothing():
    from palaestra.model.network import Hybrid

    torch.manual_seed(0)
    learner = Learner(Hybrid(NANO), "rlvr", LearnerConfig(), OptimConfig(muon=0.01, adamw=0.01))
    learner.step(Batch(sequences()))
    before = learner.state_dict()["masters"]
    quiet = Batch([Sample(s.ids, s.mu, s.loss, 0.0) for s in sequences()])
    measured = learner.step(quiet)
    assert measured["grad_norm"] == 0
    assert measured["entropy"] > 0
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict()["masters"].items())


def test_several_updates_a_step_move_the_ratio_away_from_one():
    batch = Batch(sequences())
    measured, _ = learned(batch, updates=3)
    assert measured["tokens"] == batch.tokens
    assert learned(batch, updates=3)[1]["lm_head.weight"].ne(learned(batch)[1]["lm_head.weight"]).any()


def test_the_router_is_frozen_in_rlvr_and_moves_in_sft():
    from palaestra.model.network import Hybrid

    for loss, moves in (("rlvr", False), ("sft", True)):
        torch.manual_seed(0)
        model = Hybrid(NANO)
        before = {name: value.clone() for name, value in model.state_dict().items() if ".gate." in name}
        optim = OptimConfig(muon=0.01, adamw=0.01, bias_step=0.1 if moves else 0.0, warmup=0)
        Learner(model, loss, LearnerConfig(train_router=moves), optim).step(Batch(sequences()))
        changed = {name: bool((model.state_dict()[name] != value).any()) for name, value in before.items()}
        assert len(changed) == 2
        assert all(value == moves for value in changed.values()), changed


def test_a_damaged_checkpoint_is_named_and_not_trusted(tmp_path):
    path = state.save(tmp_path, 3, {"x": 1}, keep=2)
    assert state.load(tmp_path) == {"x": 1}
    (path / "state.pt").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"step-000003/state.pt is damaged .* delete"):
        state.load(tmp_path)
    assert state.load(tmp_path / "none") is None


def test_a_full_disk_leaves_no_checkpoint_behind(tmp_path, monkeypatch):
    def full(path, content):
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "_write", full)
    with pytest.raises(UsageError, match="No space left on device; free space"):
        state.save(tmp_path, 1, {"x": 1}, keep=2)
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for number in range(4):
        state.save(tmp_path, number, {"n": number}, keep=2)
    assert [path.name for path in state.numbered(tmp_path)] == ["step-000002", "step-000003"]


def test_a_finished_run_is_never_overwritten_and_an_unfinished_one_needs_resume(make, tmp_path):
    recipe = make()
    folder = folder_of(recipe, tmp_path, False)
    write_head(folder, recipe, {})
    with pytest.raises(UsageError, match="--resume"):
        folder_of(recipe, tmp_path, False)
    assert folder_of(recipe, tmp_path, True) == folder
    with pytest.raises(UsageError, match=r"recipe.json differs from the recipe given: seed was \d, is 5; resume"):
        folder_of(make("seed=5"), tmp_path, True)
    (folder / "summary.json").write_text("{}")
    assert folder_of(recipe, tmp_path, False).name == "toy-2"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(make, tmp_path, resume):
    mine = tmp_path / "toy" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UsageError, match="toy is no run"):
        folder_of(make(), tmp_path, resume)
    assert mine.exists()


def test_a_run_that_samples_nothing_says_why(make, tmp_path):
    with pytest.raises(
        UsageError, match=r"step 0: no episode holds a sampled token \(they ended: 16 by limit:context\)"
    ):
        go(make("rollout.context=16", "evaluation.tasks=0"), tmp_path / "run")


def test_a_device_that_is_not_there_is_named(make):
    with pytest.raises(UsageError, match=r"device: 'gpu' is not to be had here"):
        prepare(make("device=gpu"))
