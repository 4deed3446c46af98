"""`palaestra sandbox doctor | run | image`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from palaestra.gym.registry import UsageError, suggest
from palaestra.gym.sandbox import BoxLimits, Capabilities

app = typer.Typer(no_args_is_help=True, help="Boxes for commands that nobody has read.")
image = typer.Typer(no_args_is_help=True, help="Root file systems that boxes start from.")
app.add_typer(image, name="image")


@app.command()
def doctor() -> None:
    """Print what works on this machine, and how to get the rest. Exits with 1 where no backend isolates."""
    from palaestra.environments.sandbox.doctor import examine

    findings = asyncio.run(examine())
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'NO  '}{finding.name}: {finding.text}")
    isolating = [f for f in findings if f.good and f.name in ("backend native", "backend docker")]
    sys.exit(0 if isolating else 1)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARGUMENT]...")],
    backend: Annotated[str, typer.Option(help="auto, native, docker or process")] = "auto",
    image: Annotated[str, typer.Option(help="host, or the name of a stored image")] = "host",
    limit: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE, such as memory=1G, processes=64, loopback=no, hidden=/usr/games/"),
    ] = None,
) -> None:
    """Run one command in a fresh box, with our standard input and output; its exit status is ours."""
    from palaestra.environments.sandbox.backends import open_backend

    limits = limits_of(limit or [])

    async def once() -> int:
        opened = open_backend(backend)
        for name in unenforced(opened.capabilities, limit or []):
            typer.echo(f"not enforced here: --limit {name} (palaestra sandbox doctor says why)", err=True)
        try:
            return await opened.run(image, limits, command)
        finally:
            await opened.close()

    sys.exit(asyncio.run(once()))


ENFORCED = {
    "memory": "memory",
    "processes": "processes",
    "cpus": "processes",
    "disk": "disk_quota",
    "inodes": "disk_quota",
}
"""The capability without which a limit is none; processor time is counted where processes are."""


def unenforced(given: Capabilities, texts: list[str]) -> list[str]:
    """The limits among KEY=VALUE texts that a backend does not enforce."""
    keys = [text.partition("=")[0] for text in texts]
    return [key for key in keys if key in ENFORCED and not getattr(given, ENFORCED[key])]


def limits_of(texts: list[str]) -> BoxLimits:
    """Limits of KEY=VALUE texts; sizes may end in K, M or G. Raises UsageError."""
    values: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in BoxLimits.model_fields:
            raise UsageError(f"--limit {text!r}: no limit {key!r}: {suggest(key, BoxLimits.model_fields)}")
        values[key] = (*values.get(key, ()), value) if key == "hidden" else _bytes(value)
    try:
        return BoxLimits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--limit {first['loc'][0]}={first['input']}: {first['msg']}; such as memory=512M") from None


def _bytes(text: str) -> str | int:
    """A size such as 512M as bytes; any other text as it is."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text[:-1]) * scale if scale and text[:-1].isdigit() else text


@image.command()
def build(
    name: Annotated[str, typer.Option(help="what to call it")] = "palaestra/base",
    registry: Annotated[
        bool, typer.Option("--registry", help="from Docker's debian image, not by debootstrap")
    ] = False,
) -> None:
    """Make the base image, Debian with the usual tools: minutes."""
    from palaestra.environments.sandbox.base import build as make

    typer.echo(f"{name}: {make(name, registry, typer.echo).root}")


@image.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="a folder or tar of a root file system, an OCI layout, a docker save")],
    name: Annotated[str, typer.Argument(help="such as team/base:1")],
) -> None:
    """Store an image for every backend."""
    from palaestra.environments.sandbox.images import import_image

    found = import_image(source, name)
    typer.echo(f"{name}: {found.root}")


@image.command()
def remove(
    names: Annotated[list[str], typer.Argument(help="names, or patterns such as 'harbor/*'")],
) -> None:
    """Remove stored images. Harbor tasks build theirs anew when they are played again."""
    from palaestra.environments.sandbox.images import forget

    for name in names:
        for found in forget(name):
            typer.echo(f"{found}: removed")


@image.command("list")
def list_() -> None:
    """Print the names of the stored images."""
    from palaestra.environments.sandbox.images import HOST, names

    for name in (HOST, *names()):
        typer.echo(name)
