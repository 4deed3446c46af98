"""Puts a recipe's parts together: the model, its engine and token policy, and whoever plays the episodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from palaestra.gym.agent import MAIN
from palaestra.gym.registry import EnvironmentSpec, UsageError, suggest
from palaestra.model import checkpoint
from palaestra.model.config import ModelConfig
from palaestra.model.foreign import Foreign
from palaestra.model.network import Hybrid
from palaestra.model.presets import PRESETS
from palaestra.model.renderer import NemotronRenderer
from palaestra.model.template import TemplateRenderer
from palaestra.model.tokenizer import Tokenizer
from palaestra.rollout.engine import Engine
from palaestra.rollout.hybrid_engine import EngineConfig, HybridEngine
from palaestra.rollout.policy import TokenPolicy
from palaestra.rollout.transformers_engine import TransformersEngine
from palaestra.rollout.worker import Worker
from palaestra.trainer.recipe import FOREIGN, Recipe

TOKEN = Path.home() / ".ray" / "auth_token"
"""What `ray start` has its clusters ask for."""


def located(recipe: Recipe) -> ModelConfig | Path:
    """What `recipe.model` names: a preset's configuration, or the folder of a checkpoint, be it one that ships.

    Raises UsageError naming what is not there.
    """
    kind, _, name = recipe.model.partition(":")
    if kind == "preset":
        if name not in PRESETS:
            raise UsageError(f"model: no preset {name!r}: {suggest(name, PRESETS)}")
        return PRESETS[name]
    folder = Path(name) if recipe.model.startswith(FOREIGN) else checkpoint.locate(recipe.model)
    if not folder.is_dir():
        raise UsageError(
            f"model: there is no checkpoint folder {folder}; give one, preset:NAME, or one that ships: "
            f"{suggest(recipe.model, checkpoint.shipped())}"
        )
    return folder


def model(recipe: Recipe) -> Hybrid:
    """The hybrid network of `recipe.model`. Raises as located; CheckpointError naming a file that is damaged or was
    trained with another tokenizer."""
    source = located(recipe)
    if isinstance(source, ModelConfig):
        return Hybrid(source if recipe.nvfp4 else source.model_copy(update={"nvfp4": ()}))
    checkpoint.tokenizer(source)
    loaded = checkpoint.load(source)
    return loaded if recipe.nvfp4 else _unquantised(loaded)


def _unquantised(quantised: Hybrid) -> Hybrid:
    plain = Hybrid(quantised.config.model_copy(update={"nvfp4": ()}))
    plain.load_state_dict(quantised.state_dict())
    return plain


def hybrid_engine(config: ModelConfig, engine: EngineConfig, threads: int = 0) -> Engine:
    """An engine of ours that waits for weights; `threads` for torch in its process (0: as it is)."""
    if threads:
        torch.set_num_threads(threads)
    return HybridEngine(config, engine)


def foreign_engine(path: str, engine: EngineConfig, threads: int = 0) -> Engine:
    """An engine over its own copy of a foreign model."""
    if threads:
        torch.set_num_threads(threads)
    return TransformersEngine(Foreign.load(path), engine.slots, engine.context, engine.deterministic)


class Base:
    """The model that is trained, its renderer, and how its engines are built."""

    def __init__(self, recipe: Recipe, device: Any) -> None:
        rollout = recipe.rollout
        engine = EngineConfig(slots=rollout.slots, context=rollout.context, deterministic=recipe.deterministic)
        self.model: Any
        self.renderer: Any
        self.build: Callable[..., Engine]
        if recipe.model.startswith(FOREIGN):
            path = str(Path(recipe.model.removeprefix(FOREIGN)).resolve())
            self.model = Foreign.load(path).to(device)
            self.renderer = TemplateRenderer(self.model.tokenizer)
            self.build = partial(foreign_engine, path, engine)
            self.save_model = self.model.save
        else:
            tokenizer = Tokenizer.load()
            self.model = model(recipe).to(device)
            self.renderer = NemotronRenderer(tokenizer)
            self.build = partial(hybrid_engine, self.model.config, engine)
            self.save_model = partial(checkpoint.save, self.model, tokenizer_hash=tokenizer.sha256)


class Inline(Base):
    """Everything in this process: engine, episodes and learner take turns."""

    def __init__(self, recipe: Recipe, specs: dict[str, EnvironmentSpec], device: Any) -> None:
        super().__init__(recipe, device)
        self._engine = self.build()
        policy = TokenPolicy(self.renderer, self._engine)
        self.player = Worker(specs, {MAIN: policy}, recipe.rollout.bounds(recipe.deterministic))

    async def deliver(self, weights: Any, version: int) -> None:
        """Prepare and commit."""
        await self._engine.prepare(weights.items(), version)
        await self._engine.commit(version)

    async def close(self) -> None:
        """Shut the environments."""
        await self.player.close()


class OnRay(Base):
    """Engine and environments in Ray actors. `shared`: they and the learner take turns on all cores; `split`: half of
    the cores are the engine's, so that it samples while the learner learns."""

    def __init__(self, recipe: Recipe, specs: dict[str, EnvironmentSpec], device: Any) -> None:
        if recipe.ray.address and TOKEN.exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once, when it is imported
        from palaestra.rollout.actors import Cluster, connect

        super().__init__(recipe, device)
        connect(recipe.ray.address)
        split = recipe.placement == "split"
        cores = recipe.threads or torch.get_num_threads()
        threads = max(1, cores // 2) if split else cores
        if split:
            torch.set_num_threads(max(1, cores - threads))
        self.player = Cluster(
            specs,
            partial(self.build, threads),
            self.renderer,
            recipe.rollout.bounds(recipe.deterministic),
            recipe.ray.environment_actors,
            (0.5, 0.1) if split else (0.0, 0.0),
        )

    async def deliver(self, weights: Any, version: int) -> None:
        """To the policy actor."""
        await self.player.deliver(weights, version)

    async def close(self) -> None:
        """End the actors."""
        await self.player.close()


def assemble(recipe: Recipe, specs: dict[str, EnvironmentSpec], device: Any) -> Inline | OnRay:
    """The stack of the recipe's placement."""
    return Inline(recipe, specs, device) if recipe.placement == "inline" else OnRay(recipe, specs, device)
