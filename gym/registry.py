"""Finding environments by name.

A reference is the name of an entry point (`math`), an installed `package.module:Class`, a file `path/to/file.py:Class`,
or a prefix that an adapter answers for (`gymnasium:CartPole-v1`). A file is loaded alone, by the hash of its content;
`sys.path` and the working directory play no part.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

    from palaestra.gym.environment import Environment
    from palaestra.gym.types import Task

ENVIRONMENTS = "palaestra.environments"
ADAPTERS = "palaestra.adapters"
_BUILT_IN_ADAPTERS = {"gymnasium": "palaestra.gym.gymnasium_bridge:environment_class"}
_ALIAS = re.compile(r"^([A-Za-z_][\w-]*)=(.+)$")
SEARCHED = 20_000
"""How many tasks of a generator are looked through for a key."""


class UsageError(Exception):
    """Something the user named does not exist or does not fit. The text is one line: what, where, and the fix."""


def suggest(name: str, options: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest option, and all of them."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def one_line(error: BaseException) -> str:
    """An exception as one line of text."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException, module: str) -> str:
    """Where an error arose, ` (FILE, line N)`: the last line of `module` or its package, else the last that is not
    ours; empty where there is none."""
    package = module.partition(".")[0]
    lines = [(str(frame.f_globals.get("__name__")), frame, line) for frame, line in walk_tb(error.__traceback__)]
    foreign = [entry for entry in lines if entry[0].partition(".")[0] != "palaestra"]
    for _, frame, line in reversed([entry for entry in foreign if entry[0].partition(".")[0] == package] or foreign):
        return f" ({frame.f_code.co_filename}, line {line})"
    return ""


def points(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


@dataclass(frozen=True)
class EnvironmentSpec:
    """All that another process needs to play an environment: a reference, the source of a single file (None for what
    is installed), the sha256 of the defining source, and the configuration. `alias` is its name in this run."""

    ref: str
    alias: str
    sha256: str
    source: bytes | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def environment(self) -> type[Environment]:
        """The class, imported or loaded from the shipped source."""
        if self.source is None:
            return _resolve(self.ref)
        path, _, name = self.ref.rpartition(":")
        return _class_in(_load_source(_file_at(Path(path), self.source), self.source), name, self.ref)

    def settings(self) -> BaseModel:
        """The validated configuration. Raises UsageError naming the key."""
        return configure(self.environment(), self.config, self.alias)

    def fingerprint(self) -> str:
        """The sha256 of source and configuration together."""
        settings = self.settings().model_dump_json()
        return hashlib.sha256(f"{self.sha256} {settings}".encode()).hexdigest()

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        """The tasks of a split, each with its environment's name filled in. Raises UsageError where there are none, or
        what they are made of is missing or damaged."""
        found = False
        try:
            for task in self.environment().iter_tasks(self.settings(), split, seed):
                found = True
                yield task.model_copy(update={"environment": self.alias})
        except (OSError, ValueError, KeyError) as error:
            where = place(error, self.environment().__module__)
            raise UsageError(f"environment {self.alias}, tasks of split {split!r}: {one_line(error)}{where}") from error
        if not found:
            raise UsageError(f"environment {self.alias}: no tasks in split {split!r}{self._splits()}")

    def _splits(self) -> str:
        """What splits a finite set has, and what to do where one is wanting."""
        tasks = self.environment().task_set(self.settings())
        counts = Counter(task.split for task in tasks) if isinstance(tasks, Iterable) else {}
        there = ", ".join(f"{name} ({count} tasks)" for name, count in sorted(counts.items()))
        advice = "; evaluate with --split all, or train with evaluation.tasks=0" if counts else ""
        return f"; there are: {there or 'no tasks at all'}{advice}"

    def task(self, key: str, split: str = "train", seed: int = 0) -> Task:
        """The task of that key. Raises UsageError where it is not found."""
        tasks = self.environment().task_set(self.settings())
        if hasattr(tasks, "get"):
            try:
                return tasks.get(key).model_copy(update={"environment": self.alias})
            except KeyError:
                raise UsageError(f"environment {self.alias}: no task has the key {key!r}") from None
        for task in islice(self.tasks(split, seed), SEARCHED):
            if task.key == key:
                return task
        raise UsageError(
            f"environment {self.alias}: no task {key!r} among the first {SEARCHED} of split {split!r}, seed {seed}"
        )


def spec(ref: str, config: Mapping[str, Any] | None = None) -> EnvironmentSpec:
    """The spec of `[ALIAS=]REF`. Raises UsageError when nothing is found there, or the configuration does not fit."""
    alias, target = split_alias(ref)
    source: bytes | None = None
    if _is_file(target):
        path, name = _split_file(target)
        source = _read(path)
        environment = _class_in(_load_source(path.resolve(), source), name, target)
        target = f"{path.resolve()}:{environment.__name__}"
    else:
        environment = _resolve(target)
    configure(environment, config or {}, alias)
    digest = hashlib.sha256(source).hexdigest() if source is not None else _module_hash(environment)
    return EnvironmentSpec(target, alias, digest, source, dict(config or {}))


def split_alias(ref: str) -> tuple[str, str]:
    """`[ALIAS=]REF` as the name in this run (by default what the reference suggests) and the reference."""
    named = _ALIAS.match(ref)
    return (named.group(1), named.group(2)) if named else (_default_alias(ref), ref)


def configure(environment: type[Environment], config: Mapping[str, Any], alias: str) -> BaseModel:
    """The environment's Config of these values. Raises UsageError naming an unknown key or an impossible value."""
    from pydantic import ValidationError

    known = environment.Config.model_fields
    for key in config:
        if key not in known:
            raise UsageError(f"environment {alias} has no config key {key!r}: {suggest(key, known)}")
    try:
        return environment.Config(**config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"environment {alias}, config.{where}: {first['msg']}") from None


def descriptions() -> dict[str, tuple[str, str]]:
    """Installed environments: name -> (reference, first line of the docstring), read without importing them."""
    found = {name: (point.value, _docstring(point)) for name, point in points(ENVIRONMENTS).items()}
    return dict(sorted(found.items()))


def _docstring(point: EntryPoint) -> str:
    try:
        module = importlib.util.find_spec(point.module)
        tree = ast.parse(Path(module.origin).read_bytes()) if module and module.origin else ast.parse("")
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return f"cannot be read ({one_line(error)})"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _is_file(target: str) -> bool:
    return target.endswith(".py") or ".py:" in target


def _split_file(target: str) -> tuple[Path, str]:
    """Path and class name (empty: the only one)."""
    path, _, name = target.rpartition(".py")
    return Path(f"{path}.py"), name.removeprefix(":")


def _default_alias(target: str) -> str:
    if _is_file(target):
        return _split_file(target)[0].stem
    prefix, _, rest = target.partition(":")
    return rest.lower() if "." in prefix else target


def prefixes() -> list[str]:
    """What adapters answer for, such as `harbor:`."""
    return sorted(f"{name}:" for name in _adapters())


def _adapters() -> dict[str, Callable[[], Any]]:
    built_in = {name: _loader(EntryPoint(name, value, ADAPTERS)) for name, value in _BUILT_IN_ADAPTERS.items()}
    return built_in | {name: _loader(point) for name, point in points(ADAPTERS).items()}


def _loader(point: EntryPoint) -> Callable[[], Any]:
    return point.load


def _resolve(target: str) -> type[Environment]:
    prefix, colon, rest = target.partition(":")
    adapters = _adapters()
    if colon and prefix in adapters:
        made: type[Environment] = adapters[prefix]()(rest)
        return made
    if _is_file(target):
        path, name = _split_file(target)
        return _class_in(_load_source(path.resolve(), _read(path)), name, target)
    if colon:
        return _dotted(prefix, rest, target)
    installed = points(ENVIRONMENTS)
    if target not in installed:
        raise UsageError(
            f"unknown environment {target!r}: {suggest(target, installed)}; or package.module:Class, file.py, or what "
            f"stands behind {', '.join(prefixes())}"
        )
    point = installed[target]
    return _dotted(point.module, point.attr, target)


def _dotted(module: str, name: str, target: str) -> type[Environment]:
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        hint = f"install its package, or use one of the prefixes {', '.join(prefixes())}"
        reason = f"{one_line(error)}{place(error, module)}"
        raise UsageError(f"environment {target}: cannot import {module} ({reason}); {hint}") from error
    return _class_in(imported, name, target)


def _class_in(module: ModuleType, name: str, target: str) -> type[Environment]:
    from palaestra.gym.environment import Environment

    own = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Environment) and value.__module__ == module.__name__
    }
    if not name and len(own) == 1:
        return next(iter(own.values()))
    if not name:
        raise UsageError(f"{target}: name the class (FILE.py:Class); it defines: {', '.join(own) or 'no Environment'}")
    value = getattr(module, name, None)
    if not (isinstance(value, type) and issubclass(value, Environment)):
        raise UsageError(f"{target}: no Environment named {name!r}: {suggest(name, own)}")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        relative = "" if path.is_absolute() else f" ({path} is looked for in the working folder, {Path.cwd()})"
        reason = error.strerror or error
        raise UsageError(f"cannot read the environment file {path.absolute()}: {reason}{relative}") from None


def _file_at(path: Path, source: bytes) -> Path:
    """Where shipped source lies on this machine: at its path if that holds the same bytes, else in a private folder."""
    if path.is_file() and path.read_bytes() == source:
        return path
    digest = hashlib.sha256(source).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"palaestra-{os.getuid()}" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    copy = folder / path.name
    if not copy.is_file() or copy.read_bytes() != source:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
            out.write(source)
        os.replace(out.name, copy)
    return copy


def _load_source(path: Path, source: bytes) -> ModuleType:
    """The module of a file, once for each path and content. It stands in sys.modules under a name of its own."""
    name = "palaestra_file_" + hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(
            f"{path} cannot be loaded: {one_line(error)}{place(error, name)}; a file is loaded alone, not its folder"
        ) from error
    return module


def _module_hash(environment: type[Environment]) -> str:
    """The hash of the file that defines an installed class; of its name where there is no file."""
    try:
        content = Path(inspect.getfile(environment)).read_bytes()
    except (TypeError, OSError):
        content = json.dumps([environment.__module__, environment.__qualname__]).encode()
    return hashlib.sha256(content).hexdigest()
