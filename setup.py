"""Build of HelixPipe. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent

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
    packages=find_namespace_packages(include=["helixpipe*", "megatron.training*"]),
    package_data={"helixpipe.report": ["assets/*"]},
    install_requires=[
        "torch>=2.6",
        # From 0.17 on the wheel ships a megatron.training of its own and needs Python 3.12.
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
