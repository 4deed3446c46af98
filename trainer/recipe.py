"""Recipes: TOML files whose every key has an effect, with overrides from the command line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from palaestra.gym.episode import Bounds
from palaestra.gym.registry import EnvironmentSpec, UsageError, spec, suggest
from palaestra.gym.types import Limits
from palaestra.rollout.pool import PoolConfig
from palaestra.trainer.losses import LossConfig
from palaestra.trainer.optim import OptimConfig


class Part(BaseModel):
    """A frozen table of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EnvironmentPart(Part):
    """One environment of the mix: its reference, its share of the episodes, its configuration; where it is optional and
    the machine lacks what it needs, the run goes without it."""

    use: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    optional: bool = False
    config: dict[str, Any] = Field(default_factory=dict)


class RolloutPart(Part):
    """How episodes are drawn and bounded. Training samples at `temperature`; nothing prunes the distribution."""

    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=64, ge=1, description="of one reply")
    turns: int = Field(default=8, ge=1)
    context: int = Field(default=512, ge=16, description="tokens of a conversation")
    slots: int = Field(default=192, ge=1, description="conversations that the engine keeps at once")
    seconds: float = Field(default=120.0, gt=0)

    def bounds(self, deterministic: bool) -> Bounds:
        """The bounds of an episode; in a deterministic run a missed deadline aborts the run."""
        return Bounds(limits=Limits(turns=self.turns, seconds=self.seconds), strict=deterministic)


class EvaluationPart(Part):
    """The held-out evaluation before and after: the same tasks, once at temperature 1 and once greedily."""

    tasks: int = Field(default=500, ge=0, description="an environment; 0: no evaluation; one alone has no interval")
    seed: int = 0
    concurrency: int = Field(default=256, ge=1)


class CheckpointPart(Part):
    """How often the run is saved."""

    every: int = Field(default=20, ge=1, description="steps")
    keep: int = Field(default=2, ge=1)


class RayPart(Part):
    """The cluster to join; empty: one is started on this machine."""

    address: str = ""
    environment_actors: int = Field(default=1, ge=1)


class Stage(Part):
    """What every stage has. It ends after `steps`, or earlier after `minutes`."""

    loss: str
    steps: int = Field(ge=1)
    minutes: float | None = Field(default=None, gt=0)
    optim: OptimConfig = OptimConfig()
    micro_tokens: int = Field(default=8192, ge=1)


class RlvrStage(Stage):
    """Reinforcement learning from verifiable rewards."""

    loss: Literal["rlvr"] = "rlvr"
    advantage: Literal["group_std", "batch_rms"] = "group_std"
    updates: int = Field(default=1, ge=1)
    clip: LossConfig = LossConfig()
    permute_rewards: bool = Field(default=False, description="a control: rewards mean nothing")


class SftStage(Stage):
    """Supervised training on the environments' own solutions."""

    loss: Literal["sft"] = "sft"
    batch: int = Field(default=64, ge=1, description="demonstrations a step")
    easy_steps: int = Field(default=0, ge=0, description="steps at the lowest level alone, once demonstrations begin")
    drills: int = Field(default=0, ge=0, description="sequences a step that teach copying (trainer/drills.py)")
    drill_steps: int = Field(default=0, ge=0, description="first steps that hold drills alone")
    mtp_factor: float = Field(
        default=0.3, ge=0, description="of the multi-token-prediction loss, where the model has such a head"
    )


FOREIGN = "transformers:"
STAGES: dict[str, type[Stage]] = {"rlvr": RlvrStage, "sft": SftStage}


class Recipe(Part):
    """A whole run. `model`: a checkpoint folder, `preset:NAME` for fresh weights, `warmstart`, which ships, or
    `transformers:PATH`, a Hugging Face folder, which trains unquantised."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = 0
    model: str
    nvfp4: bool = True
    device: str = "auto"
    threads: int = Field(default=0, ge=0, description="0: as many as there are cores")
    deterministic: bool = False
    placement: Literal["inline", "shared", "split"] = "inline"
    environments: dict[str, EnvironmentPart] = Field(min_length=1)
    pool: PoolConfig = PoolConfig()
    rollout: RolloutPart = RolloutPart()
    evaluation: EvaluationPart = EvaluationPart()
    checkpoint: CheckpointPart = CheckpointPart()
    ray: RayPart = RayPart()
    stages: dict[str, RlvrStage | SftStage] = Field(min_length=1)

    def specs(self) -> dict[str, EnvironmentSpec]:
        """The environments by alias. Raises UsageError naming an unknown one or a bad configuration."""
        return {alias: spec(f"{alias}={part.use}", part.config) for alias, part in sorted(self.environments.items())}

    async def lacking(self) -> dict[str, str]:
        """The optional environments that this machine cannot play, and why."""
        chosen = {alias: spec for alias, spec in self.specs().items() if self.environments[alias].optional}
        found = {alias: await spec.environment().lacks(spec.settings()) for alias, spec in chosen.items()}
        return {alias: why for alias, why in found.items() if why}

    def without(self, aliases: Collection[str]) -> Recipe:
        """The same run with fewer environments."""
        kept = {alias: part for alias, part in self.environments.items() if alias not in aliases}
        return self.model_copy(update={"environments": kept})

    def weights(self) -> dict[str, float]:
        """The mix by alias."""
        return {alias: part.weight for alias, part in sorted(self.environments.items())}


def load(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file or of a shipped name, with overrides such as `stages.rlvr.steps=3`.

    Raises UsageError: one line that names the file, the key and the fix.
    """
    text, place = _find(reference)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{place} is not TOML: {error}") from None
    table.setdefault("name", Path(reference).stem)
    for override in overrides:
        _override(table, override)
    _refuse_unknown(table, Recipe, place)
    _refuse_idle(table, place)
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{place}: {_first(error)}") from None


def _find(reference: str) -> tuple[str, str]:
    path = Path(reference)
    if path.suffix == ".toml":
        try:
            return path.read_text(), str(path)
        except OSError as error:
            raise UsageError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    shipped = {
        entry.name.removesuffix(".toml"): entry for entry in files("palaestra.trainer").joinpath("recipes").iterdir()
    }
    if reference not in shipped:
        raise UsageError(f"there is no recipe {reference!r}: {suggest(reference, shipped)}; or give a FILE.toml")
    return shipped[reference].read_text(), f"recipe {reference}"


def _override(table: dict[str, Any], text: str) -> None:
    """Set one dotted key of the table."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key.strip()):
        raise UsageError(f"override {text!r}: write dotted.key=VALUE, the value in TOML (a text in quotes)")
    *parents, last = key.strip().split(".")
    at = table
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            raise UsageError(f"override {text!r}: {parent} is no table")
    at[last] = _toml_value(value, text)


def _toml_value(value: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[\w./~:@-]+", value):
            return value
        raise UsageError(f"override {text!r}: {value!r} is no TOML value (a text needs quotes)") from None


def _refuse_unknown(table: Mapping[str, Any], model: type[BaseModel], place: str, where: str = "") -> None:
    """Refuse keys that no part of the recipe knows, with the nearest that it does."""
    for key, value in table.items():
        path = f"{where}{key}"
        if path in ("stages", "environments") and not isinstance(value, dict):
            raise UsageError(f"{place}: {path} must be a table, such as [{path}.NAME]; it is {value!r}")
        if key not in model.model_fields:
            raise UsageError(f"{place}: unknown key {path}: {suggest(key, model.model_fields)}{_elsewhere(key, model)}")
        if path == "stages" and isinstance(value, dict):
            for name, stage in value.items():
                _refuse_unknown(stage, _stage(stage, f"{path}.{name}", place), place, f"{path}.{name}.")
        elif path == "environments" and isinstance(value, dict):
            for name, part in value.items():
                if isinstance(part, dict):
                    _refuse_unknown(part, EnvironmentPart, place, f"{path}.{name}.")
        elif isinstance(value, dict):
            inner = _model_of(model, key)
            if inner is not None:
                _refuse_unknown(value, inner, place, f"{path}.")


def _stage(stage: Any, where: str, place: str) -> type[Stage]:
    kind = stage.get("loss") if isinstance(stage, dict) else None
    if kind not in STAGES:
        raise UsageError(f"{place}: {where}.loss is {kind!r}; known: {', '.join(STAGES)}")
    return STAGES[kind]


def _elsewhere(key: str, model: type[BaseModel]) -> str:
    other = [name for name, kind in STAGES.items() if kind is not model and key in kind.model_fields]
    return f" ({key} has an effect only in {other[0]} stages)" if issubclass(model, Stage) and other else ""


def _model_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation = model.model_fields[key].annotation
    options = (annotation, *get_args(annotation))
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _refuse_idle(table: Mapping[str, Any], place: str) -> None:
    """Refuse keys that have no effect in the chosen mode."""
    stages = table.get("stages", {})
    learns = any(isinstance(stage, dict) and stage.get("loss") == "rlvr" for stage in stages.values())
    inline = table.get("placement", "inline") == "inline"
    foreign = str(table.get("model", "")).startswith(FOREIGN)
    idle = [
        ("nvfp4", foreign, "a transformers: model is not quantised"),
        ("ray", inline, 'placement = "inline" uses no Ray; choose "shared" or "split"'),
        ("pool", bool(stages) and not learns, "no stage is RLVR"),
    ]
    if isinstance(evaluation := table.get("evaluation"), dict) and evaluation.get("tasks") == 1:
        raise UsageError(f"{place}: evaluation.tasks = 1 gives no interval; at least 2, or 0 for no evaluation")
    if learns and isinstance(pool := table.get("pool"), dict) and pool.get("group_size") == 1:
        raise UsageError(f"{place}: pool.group_size = 1 leaves RLVR nothing to compare an episode with; at least 2")
    for key, useless, why in idle:
        if key in table and useless:
            raise UsageError(f"{place}: {key} has no effect here: {why}")
    for name, stage in stages.items():
        bias = stage.get("optim", {}).get("bias_step", 0) if isinstance(stage, dict) else 0
        if bias and stage.get("loss") == "rlvr":
            raise UsageError(
                f"{place}: stages.{name}.optim.bias_step has no effect here: RLVR freezes the router's bias"
            )
        if isinstance(stage, dict) and stage.get("drill_steps") and not stage.get("drills"):
            raise UsageError(f"{place}: stages.{name}.drill_steps has no effect here: drills is 0")
        if isinstance(stage, dict) and _too_many(stage):
            raise UsageError(f"{place}: stages.{name}.drill_steps leaves no step for demonstrations; raise steps")
    if table.get("deterministic") and any(isinstance(s, dict) and "minutes" in s for s in stages.values()):
        raise UsageError(f"{place}: stages' minutes cannot end a deterministic run; use steps")


def _too_many(stage: Mapping[str, Any]) -> bool:
    drills, steps = stage.get("drill_steps", 0), stage.get("steps")
    return isinstance(drills, int) and isinstance(steps, int) and drills >= steps > 0 < drills


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("RlvrStage", "SftStage"))
    return (
        f"{where}: {first['msg']} (given: {first['input']!r})" if first["type"] != "missing" else f"{where} is missing"
    )
