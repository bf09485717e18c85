"""Each check that can fail is made to fail for real: a doctored environment, other libraries, few open files."""

import base64
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labtrain.environment.doctor import environment, examine, libraries, machine
from labtrain.environment.lock import read_lock
from tests.conftest import ROOT
from tests.support.doctor import doctor


@pytest.fixture(scope="module")
def healthy() -> tuple[int, dict[str, dict]]:
    return doctor()


def test_the_locked_environment_passes(healthy: tuple[int, dict[str, dict]]) -> None:
    code, checks = healthy
    assert code == 0, checks
    names = [
        "Python",
        "glibc",
        "packages",
        "files",
        "PYTHONPATH",
        "driver",
        "disk",
        "checkpoints",
        "clock",
        "torch",
        "cuDNN",
        "NCCL",
    ]
    assert set(names) | {
        "user site",
        "LD_LIBRARY_PATH",
        "shared memory",
        "open files",
        "CUDA runtime",
        "CUDA libraries",
    } <= set(checks)
    assert all(check["status"] in ("ok", "skipped") for check in checks.values())
    assert checks["torch"]["found"].startswith("2.9.1")
    assert not any(check["hint"] for check in checks.values())


def test_the_doctor_itself_does_not_import_torch() -> None:
    code = (
        "import sys; from labtrain.environment.doctor import examine; list(examine()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------- environment


def doctored(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Install a distribution by hand, with a RECORD."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for path, text in files.items():
        (folder / path).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}\n")
    (info / "RECORD").write_text("".join(lines))


def test_a_package_that_is_not_the_locks_is_named(tmp_path: Path) -> None:
    """Another click and an unknown package, before the environment on the path; and that this shadows is said too."""
    doctored(tmp_path, "click", "0.0.1", {})
    doctored(tmp_path, "stranger", "1.0", {})
    code, checks = doctor(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert checks["packages"]["status"] == checks["PYTHONPATH"]["status"] == "failed"
    assert "click 0.0.1 (locked " in checks["packages"]["found"]
    assert "stranger 1.0 (not locked)" in checks["packages"]["found"]
    assert checks["packages"]["hint"] == "make setup"
    assert checks["PYTHONPATH"]["hint"] == "unset PYTHONPATH"


@pytest.mark.parametrize("how", ["longer", "same size", "removed", "same size and time"])
def test_a_file_that_was_changed_by_hand_is_named(how: str, tmp_path: Path) -> None:
    """By its size or its time; one who sets the time back as well is found by --deep."""
    doctored(tmp_path, "mine", "1.0", {"mine.py": "x = 1\n", "other.py": "y = 1\n"})
    path = tmp_path / "mine.py"
    installed = path.stat().st_mtime
    if how == "removed":
        path.unlink()
    else:
        path.write_text("x = 1  # changed\n" if how == "longer" else "x = 2\n")
        later = installed if how == "same size and time" else installed + 60
        os.utime(path, (later, later))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from labtrain.environment.doctor.environment import check_files; print(check_files(deep={how == 'same size and time'}))"
    if how == "same size and time":
        # A deep look at seven gigabytes is for people; here at the doctored folder alone.
        code = code.replace("print(", f"sys.path[:] = [{str(tmp_path)!r}]; print(")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "status='failed'" in printed
    assert f"mine.py of mine {'is missing' if how == 'removed' else 'was changed'}" in printed
    assert "other.py" not in printed


def test_a_user_site_that_is_searched_fails(tmp_path: Path) -> None:
    """A virtual environment made with --system-site-packages searches it; here the site module is told to."""
    user = tmp_path / "user"
    user.mkdir()
    code = f"import site, sys; site.USER_SITE = {str(user)!r}; site.ENABLE_USER_SITE = True; sys.path.append({str(user)!r})\n"
    code += "from labtrain.environment.doctor.environment import check_strays; print([check for check in check_strays() if check.name == 'user site'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "status='failed'" in printed
    assert "export PYTHONNOUSERSITE=1" in printed


def test_another_python_fails() -> None:
    assert environment.check_python((3, 10)).status == "failed"
    assert environment.check_python((3, 14)).status == "failed"


# --------------------------------------------------------------------------------------------------------------- NVIDIA


def test_a_machine_without_a_gpu_is_named_so_and_fails_where_one_is_required(tmp_path: Path) -> None:
    """On a machine with a driver too: the linker finds a library that is none before it."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library\n")
    code, checks = doctor("--gpu", "required", LD_LIBRARY_PATH=str(tmp_path))
    assert checks["driver"]["found"].startswith("no NVIDIA driver: CPU only")
    assert (code, checks["driver"]["status"]) == (1, "failed")
    assert "install NVIDIA's driver R580" in checks["driver"]["hint"]


# ------------------------------------------------------------------------------------------------------------ libraries


def test_a_torch_that_asks_for_another_cuda_is_explained(tmp_path: Path) -> None:
    """The classic: libcudart.so.11.0 not found. Who asks for it is named; the doctor itself goes on."""
    (tmp_path / "torch.py").write_text("import ctypes\nctypes.CDLL('libcudart.so.11.0')\n")
    (tmp_path / "old-1.0.dist-info").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "_C.so").write_bytes(b"\x7fELF\0libcudart.so.11.0\0")
    code, checks = doctor(PYTHONPATH=str(tmp_path))
    assert (code, checks["torch"]["status"]) == (1, "failed")
    assert "libcudart.so.11.0: cannot open shared object file" in checks["torch"]["found"]
    assert checks["torch"]["hint"].startswith("old/_C.so needs libcudart.so.11.0")


def test_a_torch_that_hangs_is_given_up(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")  # fixed: over its time limit
    python.chmod(0o755)
    started = time.monotonic()
    (check,) = libraries.checks({}, libraries.probe(python=str(python), timeout_s=0.5))
    assert check.status == "failed"
    assert check.found.startswith("no answer")
    assert time.monotonic() - started < 30


def test_a_torch_of_another_version_is_named(tmp_path: Path) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    other = lock.replace("\ntorch==2.9.1 ", "\ntorch==2.9.0 ").replace("cudnn-cu12==9.10.", "cudnn-cu12==9.11.")
    (tmp_path / "requirements.lock").write_text(other)
    found = {
        check.name: check for check in libraries.checks(read_lock(tmp_path / "requirements.lock"), libraries.probe())
    }
    assert found["torch"].status == found["cuDNN"].status == "failed"
    assert found["NCCL"].status == "ok"
    assert (found["torch"].wanted, found["torch"].hint) == ("2.9.0", "make setup")


@pytest.mark.parametrize(
    ("file", "versions"),
    [
        ("pytorch-2.9.1-cuda129_mkl_py312_h04de0ce_301.json",
         {"torch": "2.9.1", "CUDA runtime": "12.9", "cuDNN": "9.10.2", "NCCL": "2.29.3"}),
        ("pytorch-2.9.1-cpu_mkl_py312_hd3d05ca_101.json", {"torch": "2.9.1", "CUDA runtime": None}),
    ],
)  # fmt: skip
def test_condas_libraries_are_compared_with_condas_lock(
    file: str, versions: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the wheels', which have another CUDA and NCCL."""
    (tmp_path / "conda-meta").mkdir()
    (tmp_path / "conda-meta" / file).touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    probed = libraries.Probed(found={**versions, "loaded": []}, reason="")
    found = list(libraries.checks(read_lock(ROOT / "requirements.lock"), probed, libraries.of_conda(ROOT)))
    assert {check.name: check.status for check in found if versions.get(check.name)} == {
        name: "ok" for name, version in versions.items() if version
    }
    assert "failed" not in {check.status for check in found}
    other = libraries.Probed(found={"torch": "2.9.0", "loaded": []}, reason="")
    torch = next(libraries.checks({}, other, libraries.of_conda(ROOT)))
    assert (torch.status, torch.wanted) == ("failed", "2.9.1")
    assert torch.hint.startswith("create it again from conda-lock")
    assert libraries.of_conda(tmp_path) == {}


# -------------------------------------------------------------------------------------------------------------- machine


def test_a_checkpoint_folder_that_cannot_be_written_fails() -> None:
    check = machine.check_checkpoints(ROOT, "/proc/checkpoints")
    assert check.status == "failed"
    assert check.hint == "ls -ld /proc"


def test_a_remote_store_is_written_to() -> None:
    assert machine.check_checkpoints(ROOT, "memory://doctor").status == "ok"
    check = machine.check_checkpoints(ROOT, "sftp://127.0.0.1:9/runs")
    assert check.status == "failed"
    assert check.found.startswith("sftp://127.0.0.1:9/runs: ")
    assert check.hint


def test_the_checks_have_names_of_their_own() -> None:
    names = [check.name for check in examine()]
    assert len(names) == len(set(names))
