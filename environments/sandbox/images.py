"""Images: root file systems in a folder of this user, `$XDG_CACHE_HOME/palaestra/images/NAME`, for every backend.

`import_image` takes a root file system (a folder or a tar archive), an OCI layout or a `docker save` archive. Layers
are applied in order, whiteouts included (OCI image specification 1.1, layer.md).
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote

from palaestra.environments.sandbox.archives import standing
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Entry
from palaestra.gym.types import Record

HOST = "host"
HARBOR = "harbor/"
"""How the names begin of images that Harbor tasks leave."""
"""The image that is made of this machine's own programs: /usr and a few files of /etc, read-only, Python's standard
library alone. Needs no store."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9._-]+)*(:[\w.-]+)?")
KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE)
"""What is unpacked. Devices, fifos and sockets are not: a box has its own /dev."""


class Config(Record):
    """How commands begin in an image."""

    environment: Mapping[str, str] = {"PATH": PATH}
    workdir: str = "/"


class Image(NamedTuple):
    """A stored image: its root file system, and how commands begin in it."""

    root: Path
    config: Config


def store() -> Path:
    """The folder of this user's images."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "palaestra" / "images"


def names() -> list[str]:
    """The images that are stored."""
    return sorted(unquote(path.parent.name) for path in store().glob("*/image.json"))


def find(name: str) -> Image:
    """A stored image. Raises UsageError naming those that there are."""
    folder = _folder(name)
    try:
        config = Config.model_validate_json((folder / "image.json").read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"there is no sandbox image {name!r}; there are: {summary()}. "
            "`palaestra sandbox image build` makes the base image"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"sandbox image {name!r} is damaged ({error}); remove {folder} and import it anew") from None
    return Image(folder / "root", config)


def import_image(source: Path, name: str) -> Image:
    """Store the image at `source` under `name`, whole or not at all. Raises UsageError."""
    if not NAME.fullmatch(name) or name == HOST:
        raise UsageError(f"sandbox image: {name!r} is no name; use lower case, digits and . _ - / such as team/base:1")
    folder = _folder(name)
    staged = folder.with_name(f".{folder.name}.partial")
    remove(staged)
    try:
        staged.mkdir(parents=True, mode=0o700)  # an image may hold set-user-id programs
        (staged / "root").mkdir()
        config = _fill(source, staged / "root")
        if not any((staged / "root").iterdir()):
            raise ValueError("it holds nothing; give an archive or a folder of a whole system")
        (staged / "image.json").write_text(config.model_dump_json())
        remove(folder)
        staged.rename(folder)
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        remove(staged)
        raise UsageError(f"cannot import {source} as {name}: {type(error).__name__}: {error}") from error
    return find(name)


def derived(start: Image, layer: bytes, removed: Sequence[str], config: Config, name: str) -> Image:
    """Store an image that is another one with paths removed and a tar archive laid over it. Files that stay are shared
    (hard links). Raises UsageError."""
    folder = _folder(name)
    staged = folder.with_name(f".{folder.name}.partial")
    remove(staged)
    try:
        staged.mkdir(parents=True, mode=0o700)
        subprocess.run(["cp", "-al", str(start.root), str(staged / "root")], check=True, capture_output=True)
        for path in removed:
            place = inside(staged / "root", os.path.dirname(path)) / os.path.basename(path)
            _clear(place)
        with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
            apply_layer(archive, staged / "root")
        (staged / "image.json").write_text(config.model_dump_json())
        remove(folder)
        staged.rename(folder)
    except (OSError, tarfile.TarError, ValueError, subprocess.CalledProcessError) as error:
        remove(staged)
        raise UsageError(f"cannot store the image {name}: {type(error).__name__}: {error}") from error
    return find(name)


def forget(pattern: str) -> list[str]:
    """Remove the images of that name, or of the names that match a pattern such as harbor/*. Raises UsageError where
    there are none."""
    found = [name for name in names() if fnmatchcase(name, pattern)]
    if not found:
        raise UsageError(f"no sandbox image matches {pattern!r}; `palaestra sandbox image list` names them")
    for name in found:
        remove(_folder(name))
    return found


def summary() -> str:
    """The images that are stored, those that harbor tasks left as a number."""
    known = [name for name in names() if not name.startswith(HARBOR)]
    left = len(names()) - len(known)
    return ", ".join([HOST, *known, *([f"{left} of {HARBOR}..."] if left else [])])


def remove(folder: Path) -> None:
    """Remove an image's folder, folders without permission included."""
    for path, folders, _ in os.walk(folder):
        for inner in folders:
            if not os.path.islink(os.path.join(path, inner)):
                os.chmod(os.path.join(path, inner), 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _folder(name: str) -> Path:
    return store() / quote(name, safe="")  # a colon or a comma would end a path in the options of a mount


def _fill(source: Path, root: Path) -> Config:
    if source.is_dir() and not (source / "oci-layout").exists():
        return _copied(source, root)
    if source.is_dir():
        return _oci(_Folder(source), root)
    with tarfile.open(source) as archive:
        parts = _Archive(archive)
        if parts.has("manifest.json"):
            return _saved(parts, root)
        if parts.has("oci-layout"):
            return _oci(parts, root)
        apply_layer(archive, root)
        return Config()


def _copied(source: Path, root: Path) -> Config:
    """A root file system in a folder, through tar, which keeps owners, links and holes."""
    left_out = [f"--exclude=./{name}/*" for name in ("dev", "proc", "sys")]
    command = ["tar", "-C", str(source), *left_out, "--numeric-owner", "-cf", "-", "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as packing:
        with tarfile.open(fileobj=packing.stdout, mode="r|") as archive:
            apply_layer(archive, root)
        if packing.wait():
            raise OSError(f"tar could not read all of {source}")
    return Config(workdir="/work" if (root / "work").is_dir() else "/")


class _Folder:
    """Parts of an image by their names in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> IO[bytes]:
        return (self._folder / name).open("rb")

    def has(self, name: str) -> bool:
        return (self._folder / name).exists()


class _Archive:
    """Parts of an image by their names in a tar archive."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {member.name.removeprefix("./"): member for member in archive}

    def open(self, name: str) -> IO[bytes]:
        file = self._archive.extractfile(self._members[name])
        if file is None:
            raise KeyError(name)
        return file

    def has(self, name: str) -> bool:
        return name in self._members


def _saved(parts: _Folder | _Archive, root: Path) -> Config:
    """What `docker save` writes; the first image, where there are several."""
    (first, *_) = _json(parts, "manifest.json")
    return _layers(parts, first["Layers"], _json(parts, first["Config"]), root)


def _oci(parts: _Folder | _Archive, root: Path) -> Config:
    """An OCI layout; of an index of platforms, the one of this machine."""
    entry = _json(parts, "index.json")["manifests"][0]
    manifest = _json(parts, _blob(entry))
    if "manifests" in manifest:
        ours = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        fitting = [one for one in manifest["manifests"] if one.get("platform", {}).get("architecture") == ours]
        if not fitting:
            raise ValueError(f"it holds nothing for {ours}")
        manifest = _json(parts, _blob(fitting[0]))
    layers = [_blob(layer) for layer in manifest["layers"]]
    return _layers(parts, layers, _json(parts, _blob(manifest["config"])), root)


def _json(parts: _Folder | _Archive, name: str) -> Any:
    with parts.open(name) as file:
        return json.load(file)


def _blob(descriptor: Mapping[str, Any]) -> str:
    algorithm, _, digest = descriptor["digest"].partition(":")
    return f"blobs/{algorithm}/{digest}"


def _layers(parts: _Folder | _Archive, layers: Sequence[str], config: Mapping[str, Any], root: Path) -> Config:
    for layer in layers:
        with parts.open(layer) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            apply_layer(archive, root)
    found = config.get("config") or {}
    environment = dict(line.partition("=")[::2] for line in found.get("Env") or ())
    return Config(environment={"PATH": PATH, **environment}, workdir=found.get("WorkingDir") or "/")


def apply_layer(archive: tarfile.TarFile, root: Path) -> None:
    """Unpack a layer over what is in `root`. Raises OSError; ValueError for a name that cannot be."""
    root = root.resolve()
    folders: list[tuple[Path, tarfile.TarInfo]] = []
    for member in archive:
        name = os.path.normpath(f"/{member.name}").lstrip("/")
        if not name:
            continue
        parent = inside(root, os.path.dirname(name))
        parent.mkdir(parents=True, exist_ok=True)
        place = parent / os.path.basename(name)
        if place.name == OPAQUE:
            for child in parent.iterdir():
                _clear(child)
        elif place.name.startswith(WHITEOUT):
            _clear(parent / place.name.removeprefix(WHITEOUT))
        elif member.type in KINDS:
            _place(archive, member, place, root)
            if member.isdir():
                folders.append((place, member))
    for place, member in reversed(folders):  # last: one without permission to write would take nothing in
        if place.resolve() == place and place.is_dir():  # a later member may have put a link in its way
            _own(place, member)


def inside(root: Path, name: str) -> Path:
    """Where `name` leads in `root` when links are followed as a process with that root would."""
    at, rest, links = root, name.split("/")[::-1], 0
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = at if at == root else at.parent
            continue
        if not (at / part).is_symlink():
            at = at / part
            continue
        links += 1
        if links > 40:
            raise ValueError(f"{name}: links without end")
        target = os.readlink(at / part)
        at = root if target.startswith("/") else at
        rest += target.split("/")[::-1]
    return at


def tree(name: str, path: str) -> dict[str, Entry]:
    """What stands at a path of a stored image and below it, by absolute path. Links above it are followed as in a box,
    none below; to an ordinary user all is root's, as in a box. Raises OSError for what cannot be read."""
    root = find(name).root
    rest = [inside(root, os.path.dirname(path)) / os.path.basename(path)]
    found: dict[str, Entry] = {}
    while rest:
        place = rest.pop()
        if not os.path.lexists(place):
            continue
        entry = standing(place) if os.geteuid() == 0 else standing(place)._replace(uid=0, gid=0)
        found[os.path.normpath(f"/{place.relative_to(root)}")] = entry
        rest += place.iterdir() if entry.kind == "directory" else ()
    return found


def _clear(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        remove(place)
    else:
        place.unlink(missing_ok=True)


def _place(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path, root: Path) -> None:
    if member.isdir():
        if place.is_symlink() or not place.is_dir():
            place.unlink(missing_ok=True)
            place.mkdir()
        return
    _clear(place)
    if member.issym():
        place.symlink_to(member.linkname)
    elif member.islnk():
        target = member.linkname.lstrip("/")
        os.link(inside(root, os.path.dirname(target)) / os.path.basename(target), place, follow_symlinks=False)
        return
    else:
        file = archive.extractfile(member)
        with place.open("xb") as out:
            if file is not None:
                shutil.copyfileobj(file, out, 1 << 20)
    _own(place, member)


def _own(place: Path, member: tarfile.TarInfo) -> None:
    """Owner (where this user may), mode and time."""
    if os.geteuid() == 0:
        os.lchown(place, member.uid, member.gid)
    if not member.issym():
        os.chmod(place, member.mode & 0o7777)
        os.utime(place, (member.mtime, member.mtime))
