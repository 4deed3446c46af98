"""A run from recipe to summary: evaluate, train stage by stage, evaluate again, report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from palaestra.gym import files
from palaestra.gym.registry import EnvironmentSpec, UsageError
from palaestra.gym.types import Episode, Group, Sampling, Task
from palaestra.rollout.pool import Draw, Pool
from palaestra.rollout.worker import Player
from palaestra.trainer import episodes, evaluation, metrics, report, state
from palaestra.trainer.advantages import ADVANTAGES, Returns, permuted, returns
from palaestra.trainer.batch import Batch, Sample, pack
from palaestra.trainer.demonstrations import Demonstrations
from palaestra.trainer.drills import Drills
from palaestra.trainer.evaluation import Evaluation
from palaestra.trainer.learner import Learner, LearnerConfig, Metrics
from palaestra.trainer.recipe import Recipe, RlvrStage, SftStage, Stage

DRILL_SOURCES = 900
"""Demonstrations that the drills' tokens are taken from."""

Watch = Callable[[str, int, int, Metrics], None]
"""Told of every step: the stage's name, the step, the stage's steps, its metrics."""


class Stack(Protocol):
    """What plays under a run: the model that is trained, and the player that samples from its published weights."""

    model: Any
    renderer: Any

    @property
    def player(self) -> Player:
        """Plays episodes with the published weights."""
        ...

    async def deliver(self, weights: Any, version: int) -> None:
        """Hand weights to every engine: prepare and commit."""
        ...

    def save_model(self, folder: Path) -> None:
        """Write the model as a checkpoint folder."""
        ...

    async def close(self) -> None:
        """Give everything back."""
        ...


@dataclass(eq=False)
class Run:
    """A run folder, and how far the run has come."""

    recipe: Recipe
    folder: Path
    stack: Stack
    specs: dict[str, EnvironmentSpec]
    watch: Watch = lambda stage, step, steps, metrics: None
    progress: dict[str, Any] = field(default_factory=lambda: {"stage": 0, "step": 0, "before": None, "retried": {}})


class Rlvr:
    """The RLVR stage: collect, pack, learn, publish."""

    def __init__(self, run: Run, name: str, stage: RlvrStage) -> None:
        recipe = run.recipe
        sampling = Sampling(temperature=recipe.rollout.temperature, max_tokens=recipe.rollout.max_tokens)
        self.learner = Learner(
            run.stack.model,
            "rlvr",
            LearnerConfig(
                micro_tokens=stage.micro_tokens,
                updates=stage.updates,
                loss=stage.clip,
                temperature=recipe.rollout.temperature,
            ),
            stage.optim,
        )
        self.pool = Pool(
            run.specs,
            recipe.weights(),
            run.stack.player,
            recipe.pool,
            Draw(recipe.seed, name, sampling),
            run.stack.deliver,
            lockstep=recipe.deterministic,
        )
        self._stage = stage
        self._seed = recipe.seed
        self._folder = run.folder
        self._name = name
        self.episodes: list[Episode] = []

    async def step(self, step: int) -> Metrics:
        """One step of training."""
        started = time.monotonic()
        groups = await self.pool.collect(step)
        waited = time.monotonic() - started
        values = self._advantages(groups, step)
        batch = pack(groups, values)
        if not batch.tokens:
            raise UsageError(_nothing_sampled(groups, step))
        measured = self.learner.step(batch)
        await self.pool.publish(self.learner.weights(), version=step + 1)
        self.episodes = [episode for group in groups for episode in group.episodes]
        episodes.write(self._folder, f"{self._name}-{step:06d}", self.episodes, np.concatenate(values))
        seconds = time.monotonic() - started
        return {
            **metrics.describe(groups, values, step, batch.versions),
            **measured,
            **{f"retried/{cause}": float(count) for cause, count in sorted(self.pool.retried.items())},
            "collect_seconds": waited,
            "step_seconds": seconds,
            "sampled_tokens_per_second": batch.tokens / seconds,
            "learner_idle_share": waited / seconds,
        }

    async def start(self) -> None:
        """Hand the first weights (a resumed run: the latest) to the engines."""
        await self.pool.publish(self.learner.weights(), version=self.pool.version)

    def state(self) -> dict[str, Any]:
        """Learner and pool."""
        return {"learner": self.learner.state_dict(), "pool": self.pool.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.learner.load_state_dict(state["learner"])
        self.pool.load_state(state["pool"])

    async def close(self) -> None:
        """Cancel what is still being played."""
        await self.pool.close()

    def _advantages(self, groups: list[Group], step: int) -> Returns:
        values = returns(groups)
        if self._stage.permute_rewards:
            generator = np.random.default_rng((self._seed, step))
            values = permuted(values, [group.task.environment for group in groups], generator)
        return ADVANTAGES[self._stage.advantage](values)


def _nothing_sampled(groups: list[Group], step: int) -> str:
    causes = Counter(episode.outcome.cause.value for group in groups for episode in group.episodes)
    ended = ", ".join(f"{n} by {cause}" for cause, n in causes.most_common())
    return f"step {step}: no episode holds a sampled token (they ended: {ended}); is rollout.context too short?"


class Sft:
    """The supervised stage: demonstrate, learn."""

    def __init__(self, run: Run, name: str, stage: SftStage) -> None:
        recipe = run.recipe
        config = LearnerConfig(micro_tokens=stage.micro_tokens, train_router=True, mtp_factor=stage.mtp_factor)
        self.learner = Learner(run.stack.model, "sft", config, stage.optim)
        self._data = Demonstrations(run.specs, recipe.weights(), run.stack.renderer, recipe.seed)
        self._drills: Drills | None = None
        self._run = run
        self._stage = stage

    async def start(self) -> None:
        """Take the drills' tokens from demonstrations. Nothing samples during supervised training."""
        if self._stage.drills:
            self._drills = Drills(await self._tokens(), self._run.recipe.seed)

    async def step(self, step: int) -> Metrics:
        """One step of training."""
        started = time.monotonic()
        measured = self.learner.step(Batch([*await self._demonstrations(step), *self._drilled(step)]))
        return {**measured, "step_seconds": time.monotonic() - started}

    async def _demonstrations(self, step: int) -> Sequence[Sample]:
        later = step - self._stage.drill_steps
        if later < 0:
            return []
        return (await self._data.batch(self._stage.batch, easy=later < self._stage.easy_steps)).sequences

    async def _tokens(self) -> set[int]:
        """The tokens of some demonstrations, less the tags."""
        run = self._run
        source = Demonstrations(run.specs, run.recipe.weights(), run.stack.renderer, run.recipe.seed)
        try:
            shown = await source.batch(DRILL_SOURCES)
        finally:
            await source.close()
        tags: frozenset[int] = run.stack.renderer.tag_ids
        return {int(number) for sample in shown.sequences for number in sample.ids} - tags

    def _drilled(self, step: int) -> Sequence[Sample]:
        return [] if self._drills is None else self._drills.batch(self._stage.drills, step)

    def state(self) -> dict[str, Any]:
        """Learner and cursors."""
        return {"learner": self.learner.state_dict(), "data": self._data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.learner.load_state_dict(state["learner"])
        self._data.load_state(state["data"])

    async def close(self) -> None:
        """Shut the environments."""
        await self._data.close()


async def train(run: Run) -> dict[str, Any]:
    """Evaluate, train every stage, evaluate again, write summary and report. Returns the summary.

    A run that was stopped goes on from its newest checkpoint. Raises UsageError, PoolError, MissedDeadline.
    """
    saved = _resume(run)
    tasks = evaluation.held_out(run.specs, run.recipe) if run.recipe.evaluation.tasks else {}
    if tasks and run.progress["before"] is None:
        before = await _evaluate(run, tasks, "before")
        run.progress |= {"before": before.scores, "retried": dict(before.retried)}
    for number, (name, stage) in enumerate(run.recipe.stages.items()):
        if number >= run.progress["stage"]:
            await _train_stage(run, name, stage, saved)
            saved = None
            run.progress |= {"stage": number + 1, "step": 0, "elapsed": 0.0}
    run.stack.save_model(run.folder / "model")
    return _finish(run, tasks, await _evaluate(run, tasks, "after") if tasks else None)


async def _train_stage(run: Run, name: str, stage: Stage, saved: dict[str, Any] | None) -> None:
    kind = Rlvr(run, name, stage) if isinstance(stage, RlvrStage) else Sft(run, name, stage)  # type: ignore[arg-type]
    if saved is not None:
        kind.load_state(saved)
    first = run.progress["step"]
    log = metrics.Log(run.folder, name, first)
    started = time.monotonic() - run.progress.get("elapsed", 0.0)
    try:
        await kind.start()
        for step in range(first, stage.steps):
            measured = await kind.step(step)
            elapsed = time.monotonic() - started
            log.write(step, {**measured, "elapsed": elapsed})
            run.watch(name, step, stage.steps, measured)
            run.progress |= {"step": step + 1, "elapsed": elapsed}
            if (step + 1) % run.recipe.checkpoint.every == 0 and step + 1 < stage.steps:
                _save(run, kind.state())
            if stage.minutes is not None and elapsed > 60 * stage.minutes:
                break
    finally:
        try:
            log.close()
        finally:
            await kind.close()


async def _evaluate(run: Run, tasks: dict[str, list[Task]], when: str) -> Evaluation:
    await run.stack.deliver(dict(run.stack.model.weights()), 0)

    def seen(mode: str, done: int, total: int) -> None:
        run.watch(f"{when}, {mode}", done - 1, total, {})

    found = await evaluation.evaluate(run.stack.player, tasks, run.recipe, seen)
    for mode, played in found.episodes.items():
        episodes.write(run.folder, f"{when}-{mode}", played)
    return found


def _finish(run: Run, tasks: dict[str, list[Task]], after: Evaluation | None) -> dict[str, Any]:
    summary: dict[str, Any] = {"environments": {}}
    shown: list[Episode] = []
    if after is not None:
        before = run.progress["before"]
        summary = evaluation.summary(before, after.scores, tasks)
        summary["retried"] = {"before": run.progress["retried"], "after": dict(after.retried)}
        shown = after.episodes["mean"]
        _write(run.folder / "scores.json", {"schema_version": 1, "before": before, "after": after.scores})
    rows = metrics.read(run.folder / "metrics.jsonl")
    steps = Counter(row["stage"] for row in rows)
    summary["stages"] = {name: {"steps": steps[name], "of": stage.steps} for name, stage in run.recipe.stages.items()}
    report.curves(rows, run.folder / "curves.png")
    report.page(run.recipe.name, summary, run.folder / "curves.png", shown, run.folder / "report.html")
    _write(run.folder / "summary.json", summary)
    return summary


def _write(path: Path, content: dict[str, Any]) -> None:
    files.replace(path, (json.dumps(content, indent=1) + "\n").encode())


def _save(run: Run, stage_state: dict[str, Any]) -> None:
    checkpoints = run.folder / "checkpoints"
    number = run.progress["stage"] * 1_000_000 + run.progress["step"]
    content = {"progress": run.progress, "stage": stage_state}
    state.save(checkpoints, number, content, run.recipe.checkpoint.keep)


def _resume(run: Run) -> dict[str, Any] | None:
    found = state.load(run.folder / "checkpoints")
    if found is None:
        return None
    run.progress = found["progress"]
    stage: dict[str, Any] = found["stage"]
    return stage


def prepare(recipe: Recipe) -> torch.device:
    """Set threads, seeds and determinism; returns the device that `device` names."""
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=recipe.device).device
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise UsageError(f"device: {recipe.device!r} is not to be had here ({text}); use auto or cpu") from None


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {name: installed_version(name) for name in ("palaestra", "torch", "numpy", "pydantic")}
