"""Builds the C kernels, where there is a compiler. Everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU = Path("kernels/cpu")


class Build(build_ext):
    """The library is no Python module (ctypes loads it), so that its name needs none of Python's tags."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes."""
        return f"{fullname.replace('.', '/')}.so"


class Wheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tags."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "palaestra.kernels._cpu",
            sources=sorted(str(file) for file in CPU.glob("*.c")),
            depends=sorted(str(file) for file in CPU.glob("*.h")),
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=gnu11",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-Wno-psabi",
                "-pthread",
            ],
            extra_link_args=["-lm", "-pthread"],
            optional=True,  # without a compiler the kernels run in PyTorch
        )
    ],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
