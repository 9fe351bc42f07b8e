"""Build of HelixPipe, with its CUDA kernels where nvcc is. Tool settings are in pyproject.toml."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_namespace_packages, setup
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


setup(
    name="helixpipe",
    version="0.1.0",
    description="Pipeline parallelism for long-context training, over megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `megatron` is a namespace package shared with megatron-core: it must have no __init__.py here,
    # and only our part of it may be named.
    packages=find_namespace_packages(include=["helixpipe*", "megatron.pretrain*"]),
    package_data={"helixpipe.report": ["assets/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.6",
        # From 0.17 on the wheel ships a megatron.pretrain of its own and needs Python 3.12.
        "megatron-core>=0.16.1,<0.17",
        "numpy",
        "pybind11",
        "psutil",  # megatron.core.dist_checkpointing uses it without requiring it
        "tokenizers>=0.20",
        "matplotlib>=3.7",
        "tqdm",
        "rich>=13",
        "scipy>=1.11",  # HiGHS, for the checkpointing of elastic plans
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.0", "flash-attn>=2.6"],
        "test": ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.6", "hypothesis>=6"],
        # Linters are pinned: a new release must not turn a green tree red.
        "dev": ["ruff==0.17.5", "mypy==2.4.1"],
    },
    entry_points={"console_scripts": ["helixpipe=helixpipe.__main__:main"]},
)
