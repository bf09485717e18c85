"""`labtrain doctor`, and NVIDIA drivers that say what a test wants."""

import json
import os
import subprocess
from pathlib import Path

from tests.conftest import LABTRAIN, ROOT, need


def doctor(*options: str, cwd: Path = ROOT, prefix: tuple[str, ...] = (), **env: str) -> tuple[int, dict[str, dict]]:
    """Run `labtrain doctor`; return its exit code and its checks by name."""
    command = [*prefix, LABTRAIN, "doctor", "--json", *options]
    done = subprocess.run(command, env={**os.environ, **env}, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def library(folder: Path, source: str, name: str, **macros: object) -> Path:
    """Compile a library of tests/support."""
    need("gcc", "gcc")
    options = [f"-D{macro}={value}" for macro, value in macros.items()]
    command = ["gcc", "-shared", "-fPIC", *options, "-o", str(folder / name), str(ROOT / "tests/support" / source)]
    subprocess.run(command, check=True)
    return folder / name


def driver(folder: Path, *, number: str = "550.54.14", **macros: object) -> dict[str, str]:
    """Compile a driver library, and return what makes the linker find it."""
    given = {
        "INIT": 0,
        "CUDA": 12040,
        "MAJOR": 8,
        "MINOR": 9,
        "COUNT": 1,
        "PROCESSES": 0,
        "P2P": 0,
        "USED": "0ULL",
        **macros,
    }
    library(folder, "fake_nvml.c", "libnvidia-ml.so.1", DRIVER=f'"{number}"', **given)
    return {"LD_LIBRARY_PATH": str(folder)}
