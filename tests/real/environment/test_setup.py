"""`make setup` repairs: each damage that the doctor finds, by the command that its hint names. On a small environment."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, skip_or_fail
from tests.support.setup import broken_pip, edited, repairs, without_python, without_record, without_stamp_and_uv

pytest_plugins = ["tests.support.setup"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(edited, marks=pytest.mark.release),
        without_stamp_and_uv,
        broken_pip,
        without_record,
        pytest.param(without_python, marks=pytest.mark.release),
    ],
)
def test_setup_repairs_what_it_made(project: Path, damage: Callable[[Path], None]) -> None:
    repairs(project, damage)


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    """A real one of 1 MB where this user may mount it; nothing is left on it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        skip_or_fail("no mount namespace for this user: run the tests as root to see this one")
    setup = f"cp {ROOT}/requirements.lock . && PYTHONPATH={ROOT}/src {sys.executable} -B -m labtrain.bootstrap; code=$?; ls; exit $code"
    script = f"{' '.join(mount)} && cd {tmp_path} && {setup}"
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: 0.0 GB of disk free here, need 9.0 GB" in done.stderr
    assert done.stdout.split() == ["requirements.lock"]
