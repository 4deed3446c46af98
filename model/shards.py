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
    """The tensors of a folder by name, views of its files that are read where they are looked at: not to be written to.

    Raises CheckpointError naming a file that cannot be read, or that holds what the index does not say.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        self.metadata: dict[str, str] = {}
        with ExitStack() as files:
            for path, names in _listed(folder).items():
                self._take(path, _opened(path, files), names)
            self._open = files.pop_all()

    def _take(self, path: Path, file: Any, names: set[str] | None) -> None:
        held = set(file.keys())
        if names is not None and names != held:
            name = min(names ^ held)
            trouble = "lacks" if name in names else "holds"
            raise CheckpointError(f"{path} {trouble} {name}, unlike what {INDEX} says; fetch the folder anew")
        metadata = file.metadata() or {}
        for key, value in metadata.items():
            if self.metadata.setdefault(key, value) != value:
                raise CheckpointError(f"{path}: its {key} is {value!r}, another file's {self.metadata[key]!r}")
        self._files |= dict.fromkeys(held, (path, file))

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
        """Raises KeyError for a name that there is not, CheckpointError for what cannot be read."""
        path, file = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); fetch or write the file anew") from error
        return tensor

    def path(self, name: str) -> Path:
        """The file that holds a tensor, or the packed codes of one."""
        return self._files[name if name in self._files else f"{name}{PACKED}"][0]


def _opened(path: Path, files: ExitStack) -> Any:
    try:
        return files.enter_context(safe_open(str(path), framework="pt"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fetch or write it anew") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); fetch or write it anew") from error


def _listed(folder: Path) -> dict[Path, set[str] | None]:
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
        found: dict[Path, set[str] | None] = {}
        for name, file in entries:
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"{file!r} lies outside the folder")
            found.setdefault(folder / file, set()).add(name)  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); fetch it anew") from error
    return found


def write(folder: Path, tensors: Iterable[Named], metadata: dict[str, str], size: int = SHARD) -> None:
    """Write tensors as they come, so that no more than `size` bytes and one tensor are held; an index, where one file
    does not take all. Raises OSError, SafetensorError."""
    parts: list[tuple[Path, list[str]]] = []
    part: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / f"part-{len(parts)}"
        save_file(part, path, {"format": "pt", **metadata})
        path.chmod(folder.stat().st_mode & 0o666)  # it is made for its owner alone
        parts.append((path, list(part)))
        part.clear()

    for name, tensor in tensors:
        if part and sum(kept.nbytes for kept in part.values()) + tensor.nbytes > size:
            flush()
        part[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    _name(folder, parts, total)


def _name(folder: Path, parts: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the files that were written their names, and an index where there are several."""
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
