"""The packages that repair tasks are made of: source distributions whose tests pass offline with pytest alone.

Sources are downloaded once, from the index that pip is set to, and never committed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

from palaestra.gym.files import write_whole
from palaestra.gym.registry import UsageError

PYPI = "https://pypi.org/simple"
SIMPLE = "application/vnd.pypi.simple.v1+json"
SECONDS = 60


class Package(NamedTuple):
    """A source distribution. `source`: the folder or file that is mutated; `tests`: what pytest is given; `path`: what
    stands on PYTHONPATH."""

    name: str
    version: str
    sha256: str
    licence: str
    source: str
    tests: tuple[str, ...]
    path: str = "."


PACKAGES = (
    Package("inflection", "0.5.1", "1a29730d366e996aaacffb2f1f1cb9593dc38e2ddd30c91250c6dde09ea9b417", "MIT", "inflection", ("test_inflection.py",)),
    Package("voluptuous", "0.16.0", "006535e22fed944aec17bef6e8725472476194743c87bd233e912eb463f8ff05", "BSD-3-Clause", "voluptuous", ("voluptuous/tests/tests.py",)),
    Package("parse", "1.22.4", "706d458feed5a81b02768d3156e8070baf6cee7d150a3a3c0cd43101a875c3b5", "MIT", "parse", ("tests",)),
    Package("h11", "0.16.0", "4e35b956cf45792e4caa5885e69fba00bdbc6ffafbfa020300e549b208ee5ff1", "MIT", "h11", ("h11/tests",)),
    Package("pathspec", "1.1.1", "17db5ecd524104a120e173814c90367a96a98d07c45b2e10c2f3919fff91bf5a", "MPL-2.0", "pathspec", ("tests",)),
    Package("xmltodict", "1.0.4", "6d94c9f834dd9e44514162799d344d815a3a4faec913717a9ecbfa5be1bb8e61", "MIT", "xmltodict.py", ("tests",)),
    Package("tinydb", "4.9.0", "6928b1fa785186bda7952a0ba05aaeedc883ede565ca9c7d608de44e5e75de70", "MIT", "tinydb", ("tests",)),
    Package("cachetools", "8.0.1", "deb1d376d4d28c2f33f3e3058043b005e0af75c35c094bd54053e27d2906ad95", "MIT", "src/cachetools", ("tests",), "src"),
    Package("semver", "3.1.1", "149b26cabada6f63212f97e94505d21578cb1d280cf714827f328d5e70765fea", "BSD-3-Clause", "src/semver", ("tests",), "src"),
    Package("toolz", "1.0.0", "2c86e3d9a04798ac556793bced838816296a2f085017664e4995cb40a1047a02", "BSD-3-Clause", "toolz", ("toolz/tests",)),
    Package("simplejson", "4.3.0", "ffe34ab51a0d37e6d1c661a5672df00d2d5e18804e38eac07abffb83fa5ec3d7", "MIT", "simplejson", ("simplejson/tests",)),
    Package("jsonpointer", "3.12", "7a3dcc11b64053eaa9c549e85e413f8d40a075215f793a331bed9182a14251ae", "BSD-3-Clause", "jsonpointer.py", ("tests.py",)),
    Package("tabulate", "0.10.0", "e2cfde8f79420f6deeffdeda9aaec3b6bc5abce947655d17ac662b126e48a60d", "MIT", "tabulate", ("test",)),
    Package("tomlkit", "0.15.2", "83e32755ba1d20d9340bd069ee97e9f6232ba2346b63ffcba425de01f7e327a6", "MIT", "tomlkit", ("tests",)),
    Package("sqlparse", "0.6.1", "ca722573f848ff2d30e40ea30f53a104b7dea7635ea9285891263eb2c58fb6e7", "BSD-3-Clause", "sqlparse", ("tests",)),
    Package("boltons", "26.2.0", "d39cfd15c1a1c3bd4d705c82252fa9edb8e4f5e8cc039f8e39afac7b1b47e92c", "BSD-3-Clause", "boltons", ("tests",)),
    Package("parso", "0.8.7", "eaaac4c9fdd5e9e8852dc778d2d7405897ec510f2a298071453e5e3a07914bb1", "MIT", "parso", ("test",)),
)  # fmt: skip


def cache() -> Path:
    """The folder of downloaded source distributions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palaestra" / "sdists"


def fetched(package: Package) -> bytes:
    """The archive of a package, from the cache or the index. Raises UsageError where it cannot be had as pinned."""
    kept = cache() / f"{package.name}-{package.version}.tar.gz"
    if kept.exists() and _sha256(kept.read_bytes()) == package.sha256:
        return kept.read_bytes()
    content = _download(package)
    if _sha256(content) != package.sha256:
        raise UsageError(f"{kept.name} from the index has another sha256 than pinned; it is not used")
    write_whole(kept, content)
    return content


def files(package: Package) -> Mapping[str, bytes]:
    """The regular files of a package by their paths below its folder."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(fetched(package))) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None:
                found[member.name.partition("/")[2]] = file.read()
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _index() -> str:
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    return (os.environ.get("PIP_INDEX_URL") or asked.stdout.strip() or PYPI).rstrip("/")


def _download(package: Package) -> bytes:
    """From a simple index in its JSON form (PEP 691)."""
    page = f"{_index()}/{package.name}/"
    wanted = f"{package.name}-{package.version}.tar.gz"
    try:
        request = urllib.request.Request(page, headers={"Accept": SIMPLE})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            listed = json.load(answer)["files"]
        links = [file["url"] for file in listed if file["filename"] == wanted]
        if not links:
            raise UsageError(f"the package index has no {wanted}")
        with urllib.request.urlopen(urljoin(page, links[0]), timeout=SECONDS) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot download {wanted} from the package index: {error}") from error
