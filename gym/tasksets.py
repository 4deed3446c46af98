"""Where tasks come from: the TaskSet protocol, rows of anyone's data, and the split by hash."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from palaestra.gym.types import Source, Task

Column = str | Callable[[Mapping[str, Any]], Any]


@runtime_checkable
class TaskSet(Protocol):
    """A finite set of tasks."""

    def __iter__(self) -> Iterator[Task]: ...

    def get(self, key: str) -> Task:
        """The task of that key. Raises KeyError."""
        ...


def held_out(text: str) -> bool:
    """Whether what `text` identifies belongs to the held-out tenth: sha256 modulo 10 is 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


SPLITS, ALL = ("train", "held-out"), "all"


def split_of(text: str) -> str:
    """`held-out` or `train`, by the hash of `text`."""
    return "held-out" if held_out(text) else "train"


def of_split(tasks: Any, split: str, seed: int) -> Iterator[Task]:
    """The tasks of one split, or of ALL: a callable is asked, a finite set is filtered and shuffled by `seed`."""
    if callable(tasks):
        yield from tasks(split, seed)
        return
    chosen = [task for task in tasks if split in (task.split, ALL)]
    random.Random(seed).shuffle(chosen)
    yield from chosen


class Rows:
    """Tasks made of the rows of a table, in their order."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            if task.key in self._tasks:
                raise ValueError(f"two rows have the key {task.key!r}; name a column that is unique (key=...)")
            self._tasks[task.key] = task

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, key: str) -> Task:
        """The task of that key. Raises KeyError."""
        return self._tasks[key]


def read_rows(source: Any) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL (optionally .gz) or Parquet file, of a Hugging Face data set, or of any iterable of mappings.

    Raises FileNotFoundError naming the path, ValueError naming a damaged file, or file and line of a row that is not a
    JSON object.
    """
    if not isinstance(source, str | Path):
        yield from (dict(row) for row in source)
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no data file {path}; give the path of a JSONL or Parquet file")
    yield from _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a row must be a JSON object, not {type(row).__name__}")
            yield row


def _lines(path: Path) -> Iterator[str]:
    unpack = gzip.open if path.suffix == ".gz" else open
    try:
        with unpack(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); give a whole file")


def rows(
    source: Any,
    *,
    prompt: Column,
    answer: Column | None = None,
    data: Mapping[str, Column] | None = None,
    key: Column | None = None,
    split: Column | None = None,
    origin: Source | None = None,
) -> Rows:
    """A task set of anyone's rows, by naming columns (or functions of the row).

    `answer` becomes `task.data["answer"]`; `data` maps further fields; without `key`, the prompt's hash; without
    `split`, the hash of the key decides. Raises KeyError naming a column that a row lacks.
    """
    named = str(source) if isinstance(source, str | Path) else type(source).__name__
    columns = {**({} if answer is None else {"answer": answer}), **(data or {})}

    def task(number: int, row: Mapping[str, Any]) -> Task:
        def cell(column: Column) -> Any:
            if callable(column):
                return column(row)
            if column not in row:
                raise KeyError(f"{named}, row {number}: no column {column!r}; the columns are {', '.join(row)}")
            return row[column]

        text = cell(prompt)
        name = str(cell(key)) if key is not None else hashlib.sha256(str(text).encode()).hexdigest()[:16]
        part = str(cell(split)) if split is not None else split_of(name)
        fields = {field: cell(column) for field, column in columns.items()}
        return Task(key=name, prompt=text, data=fields, split=part, source=origin or Source(dataset=named))

    return Rows(task(number, row) for number, row in enumerate(read_rows(source), 1))
