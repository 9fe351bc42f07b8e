"""Unpack wheels of megatron-core, each into a folder of its own: ``python unpack_cores.py FOLDER``.

They serve on PYTHONPATH, before the installed one and with the folder ``cores`` after them, also under a
Python that they do not ask for, see ``cores/sitecustomize.py``.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.17.1", "0.18.2", "0.19.2")


def unpack(version, folder):
    """The wheel of ``version`` into ``folder``, unless it is there."""
    if (folder / "megatron").is_dir():
        return
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--dest", downloads, f"megatron-core=={version}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        # At once: half a folder must not pass for a whole one.
        partly = folder.with_name(f"{folder.name}.partly")
        zipfile.ZipFile(wheel).extractall(partly)
        partly.rename(folder)


if __name__ == "__main__":
    for version in VERSIONS:
        unpack(version, Path(sys.argv[1]) / version)
