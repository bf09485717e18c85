import json
import os
import subprocess
from pathlib import Path

import pytest

from labtrain.doctor import check_disk, check_torch, examine
from labtrain.lock import read_lock
from tests.conftest import LABTRAIN, ROOT


def doctor(*options: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [LABTRAIN, "doctor", *options], env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def by_name(text: str) -> dict[str, dict]:
    return {check["name"]: check for check in json.loads(text)}


@pytest.fixture(scope="module")
def healthy() -> tuple[int, dict[str, dict]]:
    code, out, _ = doctor("--json")
    return code, by_name(out)


def test_the_locked_environment_passes(healthy: tuple[int, dict[str, dict]]) -> None:
    code, checks = healthy
    assert code == 0, checks
    assert set(checks) >= {"Python", "packages", "driver", "disk", "torch", "CUDA runtime", "cuDNN", "NCCL"}
    assert all(check["status"] in ("ok", "skipped") for check in checks.values())
    assert checks["torch"]["found"].startswith("2.9.1")


def test_a_machine_without_a_gpu_is_named_so_and_fails_where_one_is_required(
    healthy: tuple[int, dict[str, dict]],
) -> None:
    if healthy[1]["driver"]["status"] == "ok":
        pytest.skip("this machine has an NVIDIA driver")
    assert healthy[1]["driver"]["found"].startswith("no NVIDIA driver: CPU only")
    code, out, _ = doctor("--json", "--gpu", "required")
    assert code == 1
    assert by_name(out)["driver"]["status"] == "failed"
    assert "530.30.02" in by_name(out)["driver"]["hint"]


def test_a_package_that_is_not_the_locks_is_named(tmp_path: Path) -> None:
    """A real one: another click and an unknown package, put before the environment by PYTHONPATH."""
    for name in ("click-0.0.1", "stranger-1.0"):
        info = tmp_path / f"{name}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\n")
    code, out, _ = doctor("--json", PYTHONPATH=str(tmp_path))
    check = by_name(out)["packages"]
    assert (code, check["status"]) == (1, "failed")
    assert "click 0.0.1 (locked " in check["found"]
    assert "stranger 1.0 (not locked)" in check["found"]
    assert check["hint"] == "make setup"


def test_a_broken_torch_is_reported_and_does_not_break_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.11.0: cannot open shared object file')\n")
    code, out, _ = doctor("--json", PYTHONPATH=str(tmp_path))
    check = by_name(out)["torch"]
    assert (code, check["status"]) == (1, "failed")
    assert "libcudart.so.11.0" in check["found"]


def test_a_torch_that_hangs_ends() -> None:
    """The probe has a time limit; an interpreter that fails at once stands for one here."""
    (check,) = check_torch({}, python="/bin/false")
    assert check.status == "failed"


def test_a_torch_of_another_version_is_named(tmp_path: Path) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    (tmp_path / "requirements.lock").write_text(
        lock.replace("\ntorch==2.9.1 ", "\ntorch==2.9.0 ").replace("cudnn-cu12==9.10.", "cudnn-cu12==9.11.")
    )
    found = {check.name: check for check in check_torch(read_lock(tmp_path / "requirements.lock"))}
    assert found["torch"].status == found["cuDNN"].status == "failed"
    assert found["NCCL"].status == "ok"
    assert (found["torch"].wanted, found["torch"].hint) == ("2.9.0", "make setup")


def test_a_full_disk_fails(tmp_path: Path) -> None:
    check = check_disk(Path("/proc"))  # a file system with no free space
    assert check.status == "failed"
    assert check.hint


def test_the_table_names_what_is_wanted_and_can_be_plain() -> None:
    code, out, _ = doctor(NO_COLOR="1")
    assert code == 0
    assert "\x1b[" not in out
    assert "packages" in out
    assert len([check.name for check in examine()]) == len({check.name for check in examine()})
