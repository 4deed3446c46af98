"""`palaestra train RECIPE [key=value ...]`."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palaestra.gym import files
from palaestra.gym.registry import UsageError

if TYPE_CHECKING:
    from palaestra.gym.registry import EnvironmentSpec
    from palaestra.trainer.recipe import Recipe

FULL = (errno.ENOSPC, errno.EDQUOT)
HEAD = ("versions.json", "versions.json.part", "recipe.json.part")
"""What a run that could not begin may leave behind."""


def train(
    recipe: Annotated[
        str, typer.Argument(help="a shipped recipe (quickstart, warmstart, control, swe-mini, smollm2) or FILE.toml")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="the value is TOML")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an unfinished run, or begin it")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the recipe, print it, train nothing")] = False,
    runs: Annotated[Path, typer.Option(help="where run folders lie")] = Path("runs"),
) -> None:
    """Train by a recipe: RLVR or supervised, stage by stage; held-out evaluation before and after."""
    from palaestra.trainer.recipe import load

    resolved = load(recipe, overrides or [])
    try:
        resolved = _playable(resolved)
        specs = checked_specs(resolved)
        if dry_run:
            asyncio.run(_openable(resolved, specs))
    except UsageError as error:
        raise UsageError(f"{recipe}: {error}") from error
    if dry_run:
        typer.echo(resolved.model_dump_json(indent=1))
        return
    folder = folder_of(resolved, runs, resume)
    try:
        with files.held(folder):
            _begin(folder, resolved, runs)
            _show(asyncio.run(_run(resolved, specs, folder)), folder, resolved)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise cannot_write(folder, error) from error


def _begin(folder: Path, recipe: Recipe, runs: Path) -> None:
    """Say where the run lies, and whether others are beside it or it goes on."""
    from palaestra.trainer.metrics import read

    if folder.name != recipe.name:
        typer.echo(f"{runs / recipe.name} has ended: a new run begins in {folder}")
    if rows := read(folder / "metrics.jsonl"):
        stage, step = rows[-1]["stage"], rows[-1]["step"] + 1
        typer.echo(f"{folder} goes on from its newest checkpoint; it had come to step {step} of {stage}")
    typer.echo(f"{folder}: metrics, checkpoints and episodes; report.html at the end")


def _playable(recipe: Recipe) -> Recipe:
    """The recipe without the optional environments that this machine cannot play; says which, and why."""
    lacking = asyncio.run(recipe.lacking())
    for alias, why in lacking.items():
        typer.echo(f"without {alias}: {why}", err=True)
    if len(lacking) == len(recipe.environments):
        raise UsageError("this machine can play none of the environments")
    return recipe.without(lacking)


async def _openable(recipe: Recipe, specs: dict[str, EnvironmentSpec]) -> None:
    """Raises UsageError where the model is not there, or an environment cannot be opened."""
    from palaestra.trainer.assembly import located

    located(recipe)
    for alias, spec in specs.items():
        if why := await spec.environment().lacks(spec.settings()):
            raise UsageError(f"environments.{alias}: {why}")


def checked_specs(recipe: Recipe) -> dict[str, EnvironmentSpec]:
    """The recipe's environments, each of which has tasks. Raises UsageError, before anything is written."""
    from palaestra.rollout.pool import Tasks

    specs = recipe.specs()
    for spec in specs.values():
        Tasks(spec, recipe.seed).take(1)
        if recipe.evaluation.tasks:
            next(spec.tasks("held-out", recipe.evaluation.seed))
    return specs


def folder_of(recipe: Recipe, runs: Path, resume: bool) -> Path:
    """The run's folder: `runs/NAME`; a finished run is never overwritten (NAME-2).

    Raises UsageError for an unfinished one without `resume`, for a resumed one that has ended or whose recipe has
    changed or is damaged, and for a folder that holds something else.
    """
    number = 1
    while (
        (folder := runs / (recipe.name if number == 1 else f"{recipe.name}-{number}")).joinpath("summary.json").exists()
    ):
        number += 1
    written = folder / "recipe.json"
    if written.exists():
        if not resume:
            with files.held(folder):  # who trains there now is named first
                pass
            raise UsageError(f"{folder} holds an unfinished run; give --resume to go on, or delete it")
        if changed := _changed(_read(written), json.loads(recipe.model_dump_json())):
            raise UsageError(
                f"{written} differs from the recipe given: {changed}; resume with the same recipe and overrides"
            )
        return folder
    if resume and number > 1:
        raise UsageError(f"the latest run {recipe.name} has ended; without --resume a new one begins in {folder}")
    if folder.exists() and any(path.name not in HEAD for path in folder.iterdir()):
        raise UsageError(f"{folder} is no run (it has no recipe.json); move it away, or choose another name=...")
    return folder


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete {path.parent} to start the run anew") from None


def _changed(before: Any, now: Any, where: str = "") -> str:
    """The values that differ, by their dotted keys; empty where none does."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before == now else f"{where} was {json.dumps(before)}, is {json.dumps(now)}"
    keys = sorted(before.keys() | now.keys())
    found = (_changed(before.get(key), now.get(key), f"{where}.{key}".lstrip(".")) for key in keys)
    return ", ".join(text for text in found if text)


async def _run(recipe: Recipe, specs: dict[str, Any], folder: Path) -> dict[str, Any]:
    from palaestra.trainer.assembly import assemble
    from palaestra.trainer.loop import Run, prepare, train, versions
    from palaestra.trainer.screen import Screen

    device = prepare(recipe)
    stack = assemble(recipe, specs, device)
    write_head(folder, recipe, versions())
    try:
        with Screen() as screen:
            return await train(Run(recipe, folder, stack, specs, screen.show))
    finally:
        await stack.close()


def write_head(folder: Path, recipe: Recipe, versions: dict[str, str]) -> None:
    """Write the resolved recipe and the versions. Raises UsageError (a full disk, say)."""
    try:
        for name, text in (("versions.json", json.dumps(versions)), ("recipe.json", recipe.model_dump_json(indent=1))):
            files.replace(folder / name, f"{text}\n".encode())
    except OSError as error:
        raise cannot_write(folder, error) from None


def cannot_write(folder: Path, error: OSError) -> UsageError:
    """The one line that says so."""
    return UsageError(
        f"cannot write the run folder {folder}: {error.strerror or error}; free space there, then --resume, "
        "or name another place (--runs)"
    )


def _show(summary: dict[str, Any], folder: Path, recipe: Recipe) -> None:
    """The gains, where to look, and a word if time ended a stage or there was nothing to learn from."""
    from palaestra.trainer.metrics import read, signal_seen

    for name, done in summary["stages"].items():
        minutes = recipe.stages[name].minutes
        if minutes is not None and done["steps"] < done["of"]:
            typer.echo(f"{name}: {done['steps']} of {done['of']} steps, all that its {minutes:g} minutes allowed")

    for name, part in summary["environments"].items():
        gain = part["gain"]
        typer.echo(
            f"{name}: {part['before']['mean']:.3f} -> {part['after']['mean']:.3f} "
            f"({gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]; "
            f"greedy {part['before']['greedy']:.3f} -> {part['after']['greedy']:.3f}; {part['tasks']} held-out tasks)"
        )
    if not signal_seen(read(folder / "metrics.jsonl")):
        typer.echo("nothing was learned: in no step did two episodes of a task differ in return; choose easier tasks")
    typer.echo(f"report: {folder / 'report.html'}")
