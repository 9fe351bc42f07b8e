"""Builds the CUDA kernels where nvcc is. Everything else about the package is in pyproject.toml."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent


def load_kernel_build() -> ModuleType:
    # By its path: importing the package would need torch, which a build environment does not have.
    path = HERE / "helixpipe" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("kernel_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernel_build = load_kernel_build()


class BuildKernels(build_ext):
    def build_extension(self, extension: Extension) -> None:
        try:
            kernel_build.build(kernel_build.CUDA, Path(self.get_ext_fullpath(extension.name)).parent)
        except kernel_build.BuildError as error:
            raise CompileError(f"{error}\nset HELIXPIPE_KERNELS=0 to install without CUDA kernels") from None


def extensions() -> list[Extension]:
    if os.environ.get("HELIXPIPE_KERNELS") == "0":
        print("helixpipe: HELIXPIPE_KERNELS=0, no CUDA kernels are built", file=sys.stderr)
    elif kernel_build.find_nvcc() is None:
        print("helixpipe: nvcc was not found, no CUDA kernels are built", file=sys.stderr)
    else:
        return [Extension(f"helixpipe.kernels.{kernel_build.CUDA}", sources=[])]
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
