"""The kinds of code tasks: what a row of each holds, and what program a reply means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from palaestra.gym.tasksets import Rows, read_rows, rows
from palaestra.gym.types import Source, Task

COLUMNS: dict[str, tuple[str, ...]] = {
    "stdio": ("cases",),
    "testwriting": ("entry_point", "right", "mutants"),
    "infilling": ("entry_point", "tests", "prefix", "suffix"),
    "functions": ("entry_point", "tests"),
    "repair": ("entry_point", "tests"),
    "prediction": ("answer",),
}
"""What a row of a kind holds besides its prompt. The first kind whose columns are all there is a row's."""
OPTIONAL = ("prefix", "one_process", "solution", "equal_numbers")

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def kind_of(row: Mapping[str, Any]) -> str:
    """What a row names as its `kind`, else what its columns say. Raises ValueError where they fit none."""
    named = row.get("kind")
    if named is not None and named not in COLUMNS:
        raise ValueError(f"there is no kind of code task {named!r}; the kinds are {', '.join(COLUMNS)}")
    for kind in (named,) if named else COLUMNS:
        if all(row.get(column) is not None for column in COLUMNS[kind]):
            return kind
    needs = [f"{kind} ({', '.join(COLUMNS[kind])})" for kind in ((named,) if named else COLUMNS)]
    raise ValueError(f"a code task has the columns of {' or '.join(needs)}; this one has {', '.join(row)}")


def own(path: str) -> Rows:
    """The rows of a JSONL or Parquet file; each says what kind it is. Raises ValueError naming a row that fits none."""
    named = rows(_kept(path), prompt="prompt", data={"row": "row"}, origin=Source(dataset=path))
    return Rows(map(_unpacked, named))


def _unpacked(task: Task) -> Task:
    """The row as the task's data. A reply in one process with its tests can forge the verdict: not to be trained on."""
    row = task.data["row"]
    source = task.source.model_copy(update={"trainable": not row.get("one_process", False)})
    return task.model_copy(update={"data": row, "source": source})


def _kept(path: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(read_rows(path), 1):
        try:
            kind = kind_of(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        wanted = (*COLUMNS[kind], *OPTIONAL)
        yield {**row, "row": {"kind": kind, **{name: row[name] for name in wanted if row.get(name) is not None}}}


def source_of(reply: str) -> str:
    """The code of a reply: its last fenced block, else the whole."""
    blocks = FENCED.findall(reply)
    return str(blocks[-1] if blocks else reply)


def completed(prefix: str, entry_point: str, code: str) -> str:
    """The program that a reply means: it repeats the function, or continues the prefix where that breaks off."""
    if not prefix:
        return code
    if re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{prefix.rstrip()}\n    pass\n\n\n{code}" if prefix.rstrip().endswith(('"""', "'''", ":")) else code
    return prefix + code


def filled(prefix: str, suffix: str, code: str) -> str:
    """The program that a reply means: the whole of it, from the prefix to the suffix, or what stands between the two.

    Where the prefix ends in an indentation, the middle may bring it along.
    """
    whole = code.strip()
    if whole.startswith(prefix.strip()) and whole.endswith(suffix.strip()):
        return code
    if prefix.rpartition("\n")[2].isspace():
        code = code.lstrip()
    if suffix.startswith("\n"):
        code = code.rstrip()
    return prefix + code + suffix
