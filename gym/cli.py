"""The root of the command line. Commands of other folders come through the entry-point group `palaestra.commands`, and
are imported only when they are called."""

from __future__ import annotations

import asyncio
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import typer

from palaestra.gym.registry import UsageError, descriptions, one_line, points, prefixes, spec, split_alias

COMMANDS = "palaestra.commands"
TRACEBACK, INTERRUPTED = "PALAESTRA_TRACEBACK", 130
EXTRAS = {
    **dict.fromkeys(("torch", "ray", "safetensors", "tokenizers", "tensorboard", "matplotlib"), "train"),
    **dict.fromkeys(("transformers", "gguf", "accelerate"), "hf"),
}
"""Packages of the extras, by what they are imported as."""
MOST_UNSCORED = 0.1
"""An evaluation or a scoring in which a larger share is unscored exits with a status that is not 0."""

Ref = Annotated[
    str, typer.Argument(metavar="ENVIRONMENT", help="a name, package.module:Class, file.py:Class, prefix:ID")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[config.KEY=VALUE]...", help="the value is TOML")]
Split = Annotated[str, typer.Option(help="train, held-out, or all of a finite set")]
Seed = Annotated[int, typer.Option(help="the order of the tasks")]

environments = typer.Typer(help="List, make, check, play and score environments.", no_args_is_help=True)
tasks = typer.Typer(help="Look at an environment's tasks.", no_args_is_help=True)


def override(text: str) -> tuple[list[str], Any]:
    """`dotted.key=VALUE` as the key's parts and the value, which is TOML (a bare word is text). Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is no override; write key=value, the value in TOML")
    try:
        return key.split("."), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.split("."), value


def config_of(overrides: Sequence[str], *prefix: str) -> dict[str, Any]:
    """The configuration that `PREFIX.config.KEY=VALUE` overrides give. Raises UsageError for any other key."""
    config: dict[str, Any] = {}
    for text in overrides:
        parts, value = override(text)
        if parts[: len(prefix) + 1] != [*prefix, "config"] or len(parts) < len(prefix) + 2:
            expected = ".".join([*prefix, "config", "KEY=VALUE"])
            raise UsageError(f"{text!r} has no effect here; write {expected}")
        at = config
        for part in parts[len(prefix) + 1 : -1]:
            at = at.setdefault(part, {})
        at[parts[-1]] = value
    return config


@environments.command("list")
def env_list() -> None:
    """The installed environments, a line each."""
    found = descriptions()
    width = max(map(len, found), default=0)
    for name, (_, text) in found.items():
        typer.echo(f"{name:<{width}}  {text}")
    typer.echo(
        f"and whatever stands behind {', '.join(prefixes())} (harbor:FOLDER, say), package.module:Class and file.py"
    )


@environments.command("new")
def env_new(name: str, folder: Annotated[Path, typer.Option(help="where to write")] = Path()) -> None:
    """Write a working environment, and its test."""
    from palaestra.gym.scaffold import new

    for path in new(name, folder):
        typer.echo(f"wrote {path}")


@environments.command("check")
def env_check(
    ref: Ref,
    overrides: Overrides = None,
    tasks: Annotated[int, typer.Option(min=1, help="how many tasks to try")] = 4,
    seconds: Annotated[float, typer.Option(min=0.1, help="the deadline of a tool call")] = 10.0,
) -> None:
    """Whether an environment keeps its promises; one line for each fault."""
    from palaestra.gym.check import Finding, check

    def show(finding: Finding) -> None:
        state = "skip" if finding.skipped else "ok  " if finding.ok else "FAIL"
        typer.echo(f"{state} {finding.check}" + (f": {finding.message}" if finding.message else ""))

    findings = asyncio.run(check(spec(ref, config_of(overrides or [])), tasks, seconds, show))
    faults = sum(not finding.ok for finding in findings)
    if faults:
        raise UsageError(f"{ref}: {faults} fault{'s' if faults > 1 else ''} found")


@environments.command("play")
def env_play(
    ref: Ref,
    overrides: Overrides = None,
    policy: Annotated[str, typer.Option(help="human, scripted:gold, openai:MODEL@URL, ...")] = "human",
    role: Annotated[list[str] | None, typer.Option(help="ROLE=POLICY, for each further role")] = None,
    key: Annotated[str, typer.Option(help="the task's key; else the first")] = "",
    split: Split = "train",
    seed: Seed = 0,
) -> None:
    """Play one episode, and see it judged."""
    from palaestra.gym.play import play

    environment = spec(ref, config_of(overrides or []))
    task = environment.task(key, split, seed) if key else next(environment.tasks(split, seed))
    asyncio.run(play(environment, task, policy, role or [], typer.echo))


@environments.command("score")
def env_score(
    ref: Ref,
    input: Annotated[
        Path, typer.Option(help="JSONL or Parquet: data fields (docs/verifiers.md), key, prompt, and reply or messages")
    ],
    output: Annotated[Path, typer.Option(help="JSONL: key, reward, rewards, outcome")],
    overrides: Overrides = None,
    role: Annotated[list[str] | None, typer.Option(help="ROLE=POLICY, for each further role")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="rows judged at once")] = os.cpu_count() or 1,
) -> None:
    """Judge recorded replies without a model."""
    from palaestra.gym.policies import roles
    from palaestra.gym.score import load, save, score_rows

    environment = spec(ref, config_of(overrides or []))
    rows = load(input)
    with progress() as bar:
        line = bar.add_task("scoring", total=len(rows))
        run = score_rows(environment, rows, jobs, lambda _: bar.advance(line), roles(role or []))
        verdicts = asyncio.run(run)
    save(output, verdicts)
    missing = [verdict for verdict in verdicts if verdict.reward is None]
    typer.echo(f"{len(verdicts)} rows, {len(missing)} without a reward -> {output}", err=True)
    if missing and len(missing) > MOST_UNSCORED * len(verdicts):
        raise UsageError(f"{len(missing)} of {len(verdicts)} rows could not be scored; the first: {missing[0].detail}")


@tasks.command("list")
def tasks_list(
    ref: Ref,
    overrides: Overrides = None,
    split: Split = "train",
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1)] = 20,
) -> None:
    """The first tasks of a split: key, difficulty, beginning of the prompt."""
    from itertools import islice

    for task in islice(spec(ref, config_of(overrides or [])).tasks(split, seed), count):
        prompt = " ".join(task.messages()[-1].content.split())
        typer.echo(f"{task.key}\t{task.difficulty}\t{prompt[:100]}")


@tasks.command("show")
def tasks_show(ref: Ref, key: str, overrides: Overrides = None, split: Split = "train", seed: Seed = 0) -> None:
    """One task, whole, as JSON."""
    typer.echo(spec(ref, config_of(overrides or [])).task(key, split, seed).model_dump_json(indent=2))


@tasks.command("build")
def tasks_build(
    ref: Ref,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="tasks")] = 300,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="a folder; by default the environment's own place")] = None,
) -> None:
    """Make tasks from outside material, where the environment can; a build that was stopped goes on."""
    environment = spec(ref).environment()
    with progress() as bar:
        lines: dict[str, Any] = {}

        def say(name: str, done: int, total: int) -> None:
            if name not in lines:
                lines[name] = bar.add_task(name, total=total)
            bar.update(lines[name], completed=done, total=total)

        told = asyncio.run(environment.build(count, seed, output, say))
    typer.echo(told)


@tasks.command("export")
def tasks_export(
    ref: Ref,
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder to write tasks into")],
    overrides: Overrides = None,
    split: Split = "train",
    seed: Seed = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1)] = 20,
) -> None:
    """Write the first tasks of a split in a form that other tools read, where the environment has one."""
    from itertools import islice

    found = spec(ref, config_of(overrides or []))
    for task in islice(found.tasks(split, seed), count):
        typer.echo(str(found.environment().export(task, output)))


def evaluation(
    policy: Annotated[list[str], typer.Option(help="a policy; may be given several times")],
    env: Annotated[list[str], typer.Option(help="[ALIAS=]ENVIRONMENT; may be given several times")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[environments.ALIAS.config.KEY=VALUE]...")] = None,
    role: Annotated[list[str] | None, typer.Option(help="ROLE=POLICY, for each further role")] = None,
    tasks: Annotated[int, typer.Option("--tasks", "-n", min=1, help="tasks of each environment")] = 100,
    attempts: Annotated[int, typer.Option("--attempts", "-k", min=1, help="attempts at each task")] = 1,
    split: Split = "held-out",
    seed: Seed = 0,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of one reply")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="episodes at once")] = 16,
    right: Annotated[float, typer.Option(help="the result from which an attempt is right")] = 1.0,
    out: Annotated[
        Path, typer.Option(help="folder of the results; given again, only what is missing is played")
    ] = Path("runs/eval"),
) -> None:
    """Evaluate policies over environments: rewards, pass@k and pass^k with intervals, tool use, tokens and time."""
    from palaestra.gym.evaluate import Contest, Plan
    from palaestra.gym.policies import build, roles
    from palaestra.gym.types import Sampling

    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    plan = Plan(
        tasks=tasks,
        attempts=attempts,
        split=split,
        seed=seed,
        concurrency=concurrency,
        right=right,
        sampling=sampling,
    )
    specs = _specs(env, overrides or [])
    contest = Contest({ref: build(ref) for ref in policy}, specs, plan, roles(role or []))
    _evaluate(contest, out)


def _specs(refs: Sequence[str], overrides: Sequence[str]) -> list[Any]:
    """The environments, each with the overrides that name it. Raises UsageError for one that names none."""
    aliases = [split_alias(ref)[0] for ref in refs]
    of: dict[str, list[str]] = {alias: [] for alias in aliases}
    for text in overrides:
        parts, _ = override(text)
        if parts[0] != "environments" or len(parts) < 3 or parts[1] not in of:
            raise UsageError(f"{text!r} has no effect; write environments.ALIAS.config.KEY=VALUE, ALIAS of {list(of)}")
        of[parts[1]].append(text)
    configs = {alias: config_of(texts, "environments", alias) for alias, texts in of.items()}
    return [spec(ref, configs[alias]) for ref, alias in zip(refs, aliases, strict=True)]


def _evaluate(contest: Any, out: Path) -> None:
    from rich.console import Console

    from palaestra.gym import tables
    from palaestra.gym.evaluate import Row, evaluate, summarise
    from palaestra.gym.policies import shut

    async def run(on_row: Callable[[int, int, Row | None], None]) -> list[Row]:
        try:
            return await evaluate(contest, out, on_row)
        finally:
            await shut([*contest.policies.values(), *contest.roles.values()])

    with progress() as bar:
        line = bar.add_task("episodes", total=None)
        rows = asyncio.run(run(lambda done, total, _: bar.update(line, completed=done, total=total)))
    summaries = summarise(rows, contest.plan)
    tables.write(out, summaries, rows)
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(tables.table(summaries, short=console.width < tables.WIDE))
    for name, count in Counter(alias for alias, _ in sorted({(row.environment, row.key) for row in rows})).items():
        if count < contest.plan.tasks:
            typer.echo(
                f"{name} has {count} tasks in the split {contest.plan.split!r}; {contest.plan.tasks} were asked for"
            )
    typer.echo(f"-> {out}/index.html, summary.json, episodes.jsonl, episodes.parquet")
    unscored = [row for row in rows if row.reward is None]
    if len(unscored) > MOST_UNSCORED * len(rows):
        raise UsageError(f"{len(unscored)} of {len(rows)} episodes are unscored; the first: {unscored[0].detail}")


def progress() -> Any:
    """A progress bar on the error stream."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def application(called: str) -> typer.Typer:
    """The whole command line; of the commands of other folders only `called` is imported."""
    app = typer.Typer(
        name="palaestra",
        help="A reinforcement-learning gym and agentic post-training toolkit.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(lambda: None)
    app.add_typer(environments, name="env")
    app.add_typer(tasks, name="tasks")
    app.command("eval")(evaluation)
    for name, point in sorted(points(COMMANDS).items()):
        _attach(app, name, point, load=name == called)
    return app


def _attach(app: typer.Typer, name: str, point: EntryPoint, load: bool) -> None:
    """Add another folder's command: a typer.Typer, or a function whose parameters are the command's."""
    if not load:
        app.command(name, help=f"See palaestra {name} --help.")(lambda: None)
        return
    try:
        found = point.load()
    except ImportError as error:
        raise UsageError(f"palaestra {name}: {error}; pip install 'palaestra[train]'") from error
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)


def told(error: Exception) -> str:
    """An error as the line that is printed: our own speak for themselves; any other says how to find its place."""
    if type(error).__module__.startswith("palaestra.") and str(error):
        return " ".join(str(error).split())
    text = one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = EXTRAS[error.name]
        return f"{error.name} is not installed: pip install 'palaestra[{extra}]', or '.[{extra}]' in a clone"
    if isinstance(error, OSError) and str(error):
        text = str(error) if error.strerror is None else error.strerror
        text = f"{error.filename}: {text}" if error.filename else text
    return f"{text} ({TRACEBACK}=1 shows where)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit: 0, 1 after an error (one line), 2 for arguments that do not parse."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    called = next((text for text in given if not text.startswith("-")), "")
    try:
        application(called)(given)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer's own word for Ctrl-C
            raise
        print("palaestra: interrupted; eval and train go on where they stopped (train with --resume)", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"palaestra: {told(error)}", file=sys.stderr)
        sys.exit(1)
