"""`labtrain lock write`, which asks the registry."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, ROOT
from tests.support.locks import FILES, change

pytest_plugins = ["tests.support.locks"]


@pytest.mark.release
def test_written_locks_are_those_of_the_repository(locks: Path) -> None:
    """`lock write` of an unchanged spec changes nothing; what was damaged in a derived file is mended. Asks the registry."""
    shutil.copy(ROOT / "README.md", locks / "README.md")
    change(locks / "nix/wheels.json", '"click"', '"clack"')
    (locks / "requirements-conda.lock").unlink()
    done = subprocess.run([LABTRAIN, "lock", "write"], cwd=locks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "conda-lock.yml: unchanged" in done.stdout
    for name in FILES:
        assert (locks / name).read_text() == (ROOT / name).read_text(), name


def test_a_conda_spec_that_changed_needs_a_channel(locks: Path) -> None:
    """Where nothing can be solved, that is said, and all locks stay as they were.

    The solver is a program that fails: looking for a real one, conda-lock asks the network for a minute.
    """
    shutil.copy(ROOT / "README.md", locks / "README.md")
    change(locks / "environment.yml", "dependencies:\n", "dependencies:\n  - tmux\n")
    (locks / "requirements-conda.lock").unlink()
    before = {path: path.read_bytes() for path in locks.rglob("*") if path.is_file()}
    solver = locks / "bin" / "conda"
    solver.parent.mkdir()
    solver.write_text("#!/bin/sh\nexit 1\n")
    solver.chmod(0o755)
    environment = {**os.environ, "PATH": f"{solver.parent}:{os.environ['PATH']}", "XDG_DATA_HOME": str(locks / "data")}
    done = subprocess.run(
        [LABTRAIN, "lock", "write"], cwd=locks, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "could not be solved again" in done.stderr
    after = {path: path.read_bytes() for path in locks.rglob("*") if path.is_file() and path.parent != solver.parent}
    assert after == before
