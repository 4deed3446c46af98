"""Dockerfiles, as far as they need no network, run over stored images by the native backend.

FROM takes a stored image; where the name is not stored, the base image stands in for Debian, Ubuntu and Python images.
RUN, COPY and ADD of local files, ENV, ARG, WORKDIR and SHELL do what they say. What only matters to a daemon is passed
over, USER too: everything runs as the box's root. A .dockerignore is not read.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from palaestra.environments.sandbox import archives, images
from palaestra.environments.sandbox.base import NAME
from palaestra.environments.sandbox.native import Native
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Box, BoxLimits, Entry

STANDS_IN = re.compile(r"^(docker\.io/)?(library/)?(debian|ubuntu|python)(:.*)?$|^.*/(python|ubuntu|debian).*$")
PASSED_OVER = (
    "CMD",
    "ENTRYPOINT",
    "EXPOSE",
    "LABEL",
    "MAINTAINER",
    "VOLUME",
    "STOPSIGNAL",
    "HEALTHCHECK",
    "ONBUILD",
    "USER",
)
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIMITS = BoxLimits(memory=2 << 30, disk=4 << 30, inodes=500_000, processes=512)


class Line(NamedTuple):
    """An instruction of a Dockerfile."""

    number: int
    word: str
    rest: str


def parsed(text: str) -> list[Line]:
    """The instructions, continued lines joined, here-documents included. Raises UsageError."""
    found: list[Line] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        while line.rstrip().endswith("\\"):
            _, more = next(lines, (0, ""))
            if not more.lstrip().startswith("#"):
                line = line.rstrip()[:-1] + more
        word, _, rest = line.strip().partition(" ")
        if here := re.search(r"<<-?['\"]?(\w+)['\"]?", rest):
            body = []
            for _, inner in lines:
                body.append(inner)
                if inner.strip() == here[1]:
                    break
            rest = "\n".join([rest, *body])
        found.append(Line(number, word.upper(), rest.strip()))
    if not found or next((line.word for line in found if line.word != "ARG"), "") != "FROM":
        raise UsageError("a Dockerfile begins with FROM")
    return found


def start_of(name: str) -> images.Image:
    """The stored image that FROM names, or the base image in its place. Raises UsageError."""
    stored = images.names()
    if name in stored:
        return images.find(name)
    if STANDS_IN.match(name) and NAME in stored:
        return images.find(NAME)
    raise UsageError(
        f"the image {name} is not stored; import it (palaestra sandbox image import), or, for Debian, Ubuntu and "
        "Python images, build the base image that stands in for them (palaestra sandbox image build)"
    )


async def build(folder: Path, name: str) -> images.Image:
    """Run the Dockerfile of a folder and store what comes of it as `name`. Raises UsageError naming line and reason."""
    lines = parsed((folder / "Dockerfile").read_text())
    if sum(line.word == "FROM" for line in lines) > 1:
        raise UsageError(f"{folder / 'Dockerfile'} has several stages; only one is run here")
    backend = Native()
    try:
        return await _Build(folder, backend).run(lines, name)
    finally:
        await backend.close()


class _Build:
    def __init__(self, folder: Path, backend: Native) -> None:
        self._folder = folder
        self._backend = backend
        self._variables: dict[str, str] = {}
        self._environment: dict[str, str] = {}
        self._workdir = "/"
        self._shell: list[str] = []

    async def run(self, lines: list[Line], name: str) -> images.Image:
        before = lines[: [line.word for line in lines].index("FROM")]
        for line in before:
            self._argument(line.rest)
        source = self._filled(lines[len(before)].rest.split()[0])
        start = start_of(source)
        self._environment = dict(start.config.environment)
        self._workdir = start.config.workdir
        box = await self._backend.of(start, LIMITS)
        try:
            for line in lines[len(before) + 1 :]:
                try:
                    await self._instruction(box, line)
                except (UsageError, OSError, ValueError) as error:
                    raise UsageError(
                        f"{self._folder / 'Dockerfile'}, line {line.number} ({line.word}): {error}"
                    ) from None
            changed = await box.diff()
        finally:
            await box.destroy()
        config = images.Config(environment=self._environment, workdir=self._workdir)
        return images.derived(
            start, archives.packed(dict(_plain(changed))), [p for p, e in changed.items() if e is None], config, name
        )

    def _filled(self, text: str) -> str:
        known = {**self._variables, **self._environment}
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], found[0]), text)

    def _argument(self, rest: str) -> None:
        key, _, value = rest.partition("=")
        self._variables[key.strip()] = value.strip().strip("\"'")

    async def _instruction(self, box: Box, line: Line) -> None:
        if line.word == "RUN":
            await self._run(box, line.rest)
        elif line.word in ("COPY", "ADD"):
            await _placed(box, dict(self._copied(line.word, self._filled(line.rest))))
        elif line.word == "ENV":
            self._set(line.rest)
        elif line.word == "ARG":
            self._argument(line.rest)
        elif line.word == "WORKDIR":
            self._workdir = (
                self._filled(line.rest)
                if line.rest.startswith(("/", "$"))
                else f"{self._workdir.rstrip('/')}/{line.rest}"
            )
            await _placed(box, {self._workdir: Entry("directory", 0o755)})
        elif line.word == "SHELL":
            self._shell = json.loads(line.rest)
        elif line.word not in PASSED_OVER:
            raise UsageError("there is no such instruction here")

    def _set(self, rest: str) -> None:
        if "=" not in rest.split(" ", 1)[0]:
            key, _, value = rest.partition(" ")
            self._environment[key] = self._filled(value.strip())
            return
        for pair in shlex.split(rest):
            key, _, value = pair.partition("=")
            self._environment[key] = self._filled(value)

    async def _run(self, box: Box, rest: str) -> None:
        command = rest
        if rest.startswith("["):
            command = shlex.join(json.loads(rest))
        elif self._shell:
            command = shlex.join([*self._shell, rest])
        exports = "".join(
            f"export {key}={shlex.quote(value)}; " for key, value in {**self._variables, **self._environment}.items()
        )
        done = await box.exec(f"( cd {shlex.quote(self._workdir)}; {exports}\n{command}\n)", 1800)
        if done.status:
            said = done.output[-400:].decode(errors="replace").strip()
            raise UsageError(f"status {done.status}: {said} (there is no network here)")

    def _copied(self, word: str, rest: str) -> Iterator[tuple[str, Entry]]:
        options = []
        while rest.startswith("--"):
            option, _, rest = rest.partition(" ")
            options.append(option)
            rest = rest.lstrip()
        change = _changes(options)
        *sources, target = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
        place = target if target.startswith("/") else f"{self._workdir.rstrip('/')}/{target}"
        for source in sources:
            if "://" in source:
                raise UsageError(f"{source}: there is no network here")
            if word == "ADD" and source.endswith(ARCHIVES):
                raise UsageError(f"{source}: ADD does not unpack here; COPY it, and RUN tar")
            for path in self._found(source):
                for name, entry in _entries(path, place, target.endswith("/") or len(sources) > 1 or target == "."):
                    yield name, entry._replace(**change)

    def _found(self, source: str) -> list[Path]:
        """The paths of the folder that a source names. Raises UsageError where there are none, or others."""
        pattern = source.removeprefix("./").strip("/")
        found = sorted(self._folder.glob(pattern)) if pattern not in ("", ".") else [self._folder]
        if not found:
            raise UsageError(f"{source} is not in the folder")
        for path in found:
            if not path.resolve().is_relative_to(self._folder.resolve()):
                raise UsageError(f"{source} lies outside the folder")
        return found


async def _placed(box: Box, entries: dict[str, Entry]) -> None:
    """Put entries; a folder where a link to one stands is that folder."""
    folders = [path for path, entry in entries.items() if entry.kind == "directory"]
    asked = "".join(f"[ -L {name} ] && [ -d {name} ] && echo {n}; " for n, name in enumerate(map(shlex.quote, folders)))
    for number in (await box.exec(asked, 60)).output.split() if folders else ():
        del entries[folders[int(number)]]
    await box.put(entries)


def _changes(options: list[str]) -> dict[str, Any]:
    """What options of COPY change in an entry. Raises UsageError."""
    change: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key == "--chmod" and re.fullmatch("[0-7]{3,4}", value):
            change["mode"] = int(value, 8)
        elif key == "--chown" and re.fullmatch(r"(\d+|root)(:(\d+|root))?", value):
            user, _, group = value.replace("root", "0").partition(":")
            change |= {"uid": int(user), "gid": int(group or user)}
        elif key != "--link":
            raise UsageError(f"there is no option {option} here (--chmod in octal, --chown with numbers)")
    return change


def _entries(path: Path, place: str, inside: bool) -> Iterator[tuple[str, Entry]]:
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            yield f"{place.rstrip('/')}/{inner.relative_to(path)}", _entry(inner)
        return
    yield (f"{place.rstrip('/')}/{path.name}" if inside else place), _entry(path)


def _entry(path: Path) -> Entry:
    """What is copied is root's."""
    return archives.standing(path)._replace(uid=0, gid=0)


def _plain(changed: Mapping[str, Entry | None]) -> Iterator[tuple[str, Entry]]:
    for path, entry in changed.items():
        if (
            entry is not None
            and entry.kind in ("file", "directory", "link")
            and not path.startswith(("/dev", "/proc", "/tmp"))
        ):
            yield path, entry
