"""Builds ggml, llama.cpp's kernels, for this machine: a yard-stick, and no part of the package or of its tests.

Its sources come with the package llama-cpp-python; cmake and ninja are installed into a virtual environment beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
import venv
from pathlib import Path

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SOURCES = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/ggml"
TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
ROWS = Path(__file__).parent / "ggml_rows"
SECONDS = 3600


def build(folder: Path) -> Path:
    """The library of `ggml_rows/`, through which ggml's functions are found too: made in `folder`, in some minutes,
    where it is not there yet. CMAKE_BUILD_PARALLEL_LEVEL: how many compilers at once.

    Raises RuntimeError where there is no compiler, where the index lacks a package, and where ggml does not compile.
    """
    made = folder.resolve() / f"ggml-{VERSION}"
    library = made / "build" / "librows.so"
    if not library.exists():
        for variable, default in (("CC", "cc"), ("CXX", "c++")):
            if not shutil.which(os.environ.get(variable, default)):
                raise RuntimeError(f"ggml needs a C and a C++ compiler: install gcc and g++, or set {variable}")
        tools = made / "tools"
        venv.create(tools, with_pip=True)
        _run("no cmake or ninja", tools / "bin" / "pip", "install", "--quiet", *TOOLS)
        if not (made / "ggml").exists():
            _unpack(tools, made)
        _compile(tools / "bin", made)
    return library


def _unpack(tools: Path, made: Path) -> None:
    """Fetch the package's sources, and keep ggml's. Those of the package alone: its build tools come as wheels."""
    with tempfile.TemporaryDirectory(dir=made) as scratch:
        options = ("--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", scratch)
        _run("no sources of ggml", tools / "bin" / "pip", "download", *options, f"{PACKAGE}=={VERSION}")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            wanted = [member for member in archive if member.name.startswith(f"{SOURCES}/")]
            archive.extractall(scratch, wanted, filter="data")
        (Path(scratch) / SOURCES).rename(made / "ggml")


def _compile(tools: Path, made: Path) -> None:
    cmake, target = tools / "cmake", made / "build"
    values = {
        "GGML": made / "ggml",
        "GGML_NATIVE": "ON",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools / "ninja",
    }
    given = [f"-D{name}={value}" for name, value in values.items()]
    _run("ggml was not configured", cmake, "-G", "Ninja", "-S", ROWS, "-B", target, *given)
    _run("ggml was not compiled", cmake, "--build", target, "--target", "rows")


def _run(failure: str, *command: str | Path) -> None:
    """Run a command at the lowest priority. Raises RuntimeError with the end of its output."""
    line = ["nice", "-n", "19", *map(str, command)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(
            f"{failure}: {' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout[-2000:]}"
        )
