"""The files of a checkpoint folder: safetensors, one or several with an index. Pickles are never opened."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palaestra.kernels.layouts import PACKED

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHARD = 5 << 30
"""Bytes of tensors in a file, at most, unless one tensor alone is larger."""

Named = tuple[str, Tensor]


class CheckpointError(Exception):
    """A checkpoint cannot be used; the text names the file, what is wrong and what to do."""


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for. Raises CheckpointError naming the file."""

    def __init__(self, folder: Path) -> None:
        self._open = ExitStack()
        self._files: dict[str, tuple[Path, Any]] = {}
        self.metadata: dict[str, str] = {}
        for path, names in _listed(folder).items():
            file = self._opened(path)
            self.metadata |= file.metadata() or {}
            held = set(file.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise CheckpointError(f"{path} lacks {name}, which {INDEX} says it holds; fetch the folder anew")
                self._files[name] = (path, file)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> Tensor:
        """A copy. Raises KeyError for a name that there is not, CheckpointError for what cannot be read."""
        path, file = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); fetch or write the file anew") from error
        return tensor

    def path(self, name: str) -> Path:
        """The file that holds a tensor, or the packed codes of one."""
        return self._files[name if name in self._files else f"{name}{PACKED}"][0]

    def _opened(self, path: Path) -> Any:
        try:
            return self._open.enter_context(safe_open(str(path), framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; fetch or write it anew") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or no safetensors file ({error}); fetch or write it anew"
            ) from error


def _listed(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files, and the names that an index says they hold (None: whatever they do)."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).exists() and folder.is_dir():
            pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
            if pickles:
                raise CheckpointError(
                    f"{folder / pickles[0]} is a pickle, which may run any code and is never loaded; have its maker "
                    "write safetensors"
                )
        return {folder / WEIGHTS: None}
    try:
        entries = json.loads(index.read_text())["weight_map"].items()
        found: dict[Path, list[str] | None] = {}
        for name, file in entries:
            if Path(file).name != file:
                raise ValueError(f"{file!r} lies outside the folder")
            found.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); fetch it anew") from error
    return found


def write(folder: Path, tensors: Iterable[Named], metadata: dict[str, str], size: int = SHARD) -> None:
    """Write tensors as they come, so that no more than `size` bytes of them are held; an index, where one file does not
    take all. Raises OSError, SafetensorError."""
    parts: list[tuple[Path, list[str]]] = []
    total = 0
    for part in _parts(tensors, size):
        path = folder / f"part-{len(parts)}"
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, path, {"format": "pt", **metadata})
        parts.append((path, list(part)))
        total += sum(tensor.nbytes for tensor in part.values())
    if len(parts) == 1:
        parts[0][0].rename(folder / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, 1):
        target = path.with_name(f"model-{number:05}-of-{len(parts):05}.safetensors")
        path.rename(target)
        places |= dict.fromkeys(names, target.name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _parts(tensors: Iterable[Named], size: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if part and held + tensor.nbytes > size:
            yield part
            part, held = {}, 0
        part[name] = tensor
        held += tensor.nbytes
    yield part
