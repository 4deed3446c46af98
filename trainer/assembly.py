"""Puts a recipe's parts together: the model, its engine and token policy, and whoever plays the episodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from palaestra.gym.agent import MAIN
from palaestra.gym.registry import EnvironmentSpec, UsageError, suggest
from palaestra.model import checkpoint
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.model.presets import PRESETS
from palaestra.model.renderer import NemotronRenderer
from palaestra.model.tokenizer import Tokenizer
from palaestra.rollout.hybrid_engine import EngineConfig, HybridEngine, empty
from palaestra.rollout.policy import TokenPolicy
from palaestra.rollout.worker import Worker
from palaestra.trainer.recipe import Recipe

SHIPPED = Path(__file__).parent / "assets"


def model(recipe: Recipe, tokenizer: Tokenizer) -> Hybrid:
    """The network of `recipe.model`: a checkpoint folder, `preset:NAME`, or the name of one that ships.

    Raises UsageError naming what is not there, CheckpointError naming a damaged file.
    """
    kind, _, name = recipe.model.partition(":")
    if kind == "preset":
        if name not in PRESETS:
            raise UsageError(f"model: no preset {name!r}: {suggest(name, PRESETS)}")
        config = PRESETS[name]
        return Hybrid(config if recipe.nvfp4 else config.model_copy(update={"nvfp4": ()}))
    folder = SHIPPED / recipe.model if (SHIPPED / recipe.model).is_dir() else Path(recipe.model)
    if not folder.is_dir():
        raise UsageError(f"model: there is no checkpoint folder {recipe.model}; give one, or preset:NAME")
    loaded = checkpoint.load(folder)
    known = checkpoint.tokenizer_hash(folder)
    if known and known != tokenizer.sha256:
        raise UsageError(
            f"model: {folder} was trained with another tokenizer ({known[:12]}, not {tokenizer.sha256[:12]})"
        )
    return loaded if recipe.nvfp4 else _unquantised(loaded)


def _unquantised(quantised: Hybrid) -> Hybrid:
    plain = Hybrid(quantised.config.model_copy(update={"nvfp4": ()}))
    plain.load_state_dict(quantised.state_dict())
    return plain


def build_engine(config: ModelConfig, engine: EngineConfig, threads: int = 0) -> HybridEngine:
    """An engine that waits for weights; `threads` for torch in its process (0: as it is)."""
    if threads:
        torch.set_num_threads(threads)
    return HybridEngine(empty(config), engine)


class Base:
    """The model that is trained and its renderer."""

    def __init__(self, recipe: Recipe, device: Any) -> None:
        self._tokenizer = Tokenizer.load()
        self.model: Any = model(recipe, self._tokenizer).to(device)
        self.renderer: Any = NemotronRenderer(self._tokenizer)
        rollout = recipe.rollout
        self._engine_config = EngineConfig(
            slots=rollout.slots, context=rollout.context, deterministic=recipe.deterministic
        )

    def save_model(self, folder: Path) -> None:
        """Write the masters as a checkpoint folder."""
        checkpoint.save(folder, self.model, self._tokenizer.sha256)


class Inline(Base):
    """Everything in this process: engine, episodes and learner take turns."""

    def __init__(self, recipe: Recipe, specs: dict[str, EnvironmentSpec], device: Any) -> None:
        super().__init__(recipe, device)
        self._engine = build_engine(self.model.config, self._engine_config)
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
            partial(build_engine, self.model.config, self._engine_config, threads),
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
