import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.base.errors import LabtrainError
from labtrain.bootstrap import check_disk, check_memory, check_python, fingerprint, locked_block
from tests.conftest import ROOT


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_is_refused_in_one_line(version: tuple[int, int]) -> None:
    with pytest.raises(LabtrainError, match=r"Python \d\.\d+ found, 3\.11 to 3\.13 wanted"):
        check_python(version)


def test_the_pythons_that_are_locked_for_are_taken() -> None:
    for minor in (11, 12, 13):
        check_python((3, minor))


def test_too_little_disk_and_memory_are_refused_before_anything_is_made() -> None:
    with pytest.raises(LabtrainError, match=r"7\.0 GB of disk are free here, 8\.0 GB wanted"):
        check_disk(7_000_000_000)
    with pytest.raises(LabtrainError, match=r"0\.5 GB of memory are available"):
        check_memory(500_000_000)


def test_uv_is_installed_by_the_hashes_of_the_lock() -> None:
    block = locked_block((ROOT / "requirements.lock").read_text(), "uv")
    assert block.startswith("uv==")
    assert block.count("--hash=sha256:") > 5
    assert "==" not in block[4:].partition("==")[2]
    with pytest.raises(LabtrainError, match="does not name nothing"):
        locked_block("uv==1 \\\n    --hash=sha256:aa\n", "nothing")


def test_an_environment_follows_its_locks(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("a==1 --hash=sha256:aa\n")
    first = fingerprint(tmp_path, editable=False)
    (tmp_path / "labtrain.environment.lock").write_text("./vendor/labtrain.whl --hash=sha256:bb\n")
    second = fingerprint(tmp_path, editable=False)
    (tmp_path / "requirements.lock").write_text("a==2 --hash=sha256:aa\n")
    assert len({first, second, fingerprint(tmp_path, editable=False)}) == 3


def test_a_missing_python_is_said_in_one_line() -> None:
    done = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[0]
        == "error: no-such-python not found, Python 3.11 to 3.13 wanted. hint: apt-get install python3 python3-venv"
    )


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    """A real one of 1 MB where this user may mount it; nothing is left on it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace for this user: run the tests as root to see this one")
    setup = f"cp {ROOT}/requirements.lock . && PYTHONPATH={ROOT}/src {sys.executable} -B -m labtrain.bootstrap; code=$?; ls; exit $code"
    script = f"{' '.join(mount)} && cd {tmp_path} && {setup}"
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: 0.0 GB of disk are free here, 8.0 GB wanted" in done.stderr
    assert done.stdout.split() == ["requirements.lock"]
