"""`labtrain lock write`, which asks the registry."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from labtrain.environment.lock.check import check_locks
from labtrain.environment.lock.pins import read_pins
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


@pytest.mark.release
def test_an_experiment_locks_packages_of_its_own(tmp_path: Path) -> None:
    """labtrain's pins stay, all locks agree, what does not fit is an error that changes nothing. Asks the registry."""
    root = tmp_path / "experiment"
    subprocess.run([LABTRAIN, "new", str(root)], capture_output=True, check=True)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    pins = {pin.name: pin.text for pin in read_pins(root / "requirements.lock")}

    def write(packages: str) -> subprocess.CompletedProcess[str]:
        text = re.sub(r"^dependencies = .*", f"dependencies = {packages}", manifest, flags=re.MULTILINE)
        (root / "pyproject.toml").write_text(text)
        return subprocess.run([LABTRAIN, "lock", "write"], cwd=root, capture_output=True, text=True, check=False)

    manifest = (root / "pyproject.toml").read_text()
    assert write('["einops>=0.8"]').returncode == 0
    found = {pin.name: pin.text for pin in read_pins(root / "requirements.lock")}
    assert found.pop("einops")
    assert found == pins
    assert "einops" in {pin.name for pin in read_pins(root / "requirements-conda.lock")}
    assert check_locks(root) == []
    lock = root / "requirements.lock"
    text = lock.read_text()
    digest = re.search(r"^six==.*\n.*sha256:(\w+)", text, re.MULTILINE)
    assert digest
    change(lock, digest[1], f"{'0' if digest[1][0] != '0' else '1'}{digest[1][1:]}")
    refused = write('["einops>=0.8"]')
    assert (refused.returncode, "requirements.lock: no file of six" in refused.stderr) == (2, True)
    lock.write_text(text)
    refused = write('["numpy<1.20"]')
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: no versions fit together: Because ")
    assert refused.stderr.endswith("hint: change the versions in pyproject.toml\n")
    assert "einops" in {pin.name for pin in read_pins(root / "requirements.lock")}
    assert write("[]").returncode == 0
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed <= {"requirements.lock", "sbom.cdx.json"}  # uv writes no comments here
    assert {pin.name: pin.text for pin in read_pins(root / "requirements.lock")} == pins
    assert check_locks(root) == []
