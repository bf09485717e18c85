"""Each check that can fail is made to fail for real: a doctored environment, a driver library of our own, a tiny disk."""

import base64
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labtrain.doctor import environment, examine, libraries, machine
from labtrain.lock import read_lock
from tests.conftest import LABTRAIN, QUICK, ROOT, Experiment, need


def doctor(*options: str, cwd: Path = ROOT, prefix: tuple[str, ...] = (), **env: str) -> tuple[int, dict[str, dict]]:
    command = [*prefix, LABTRAIN, "doctor", "--json", *options]
    done = subprocess.run(command, env={**os.environ, **env}, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


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


def test_the_table_can_be_plain() -> None:
    done = subprocess.run(
        [LABTRAIN, "doctor"], env={**os.environ, "NO_COLOR": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "\x1b[" not in done.stdout
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "environment",
        "NVIDIA",
        "machine",
        "libraries",
    ]


def test_the_doctor_itself_does_not_import_torch() -> None:
    code = "import sys; from labtrain.doctor import examine; list(examine()); sys.exit('torch' in sys.modules)"
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
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from labtrain.doctor.environment import check_files; print(check_files(deep={how == 'same size and time'}))"
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
    code += "from labtrain.doctor.environment import check_strays; print([check for check in check_strays() if check.name == 'user site'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "status='failed'" in printed
    assert "export PYTHONNOUSERSITE=1" in printed


def test_another_cuda_on_the_library_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "libcudart.so.11.0").write_bytes(b"")
    _, checks = doctor(LD_LIBRARY_PATH=str(tmp_path))
    assert checks["LD_LIBRARY_PATH"]["status"] == "failed"
    assert f"{tmp_path}/libcudart.so.11.0" in checks["LD_LIBRARY_PATH"]["found"]


def test_another_python_fails() -> None:
    assert environment.check_python((3, 10)).status == "failed"
    assert environment.check_python((3, 14)).status == "failed"


def test_an_old_c_library_fails(tmp_path: Path) -> None:
    """A library that answers confstr() as glibc 2.17 does (RHEL 7), loaded before the real one."""
    old = compiled(tmp_path, "old_glibc.c", "libold.so")
    _, checks = doctor(LD_PRELOAD=str(old))
    assert (checks["glibc"]["status"], checks["glibc"]["found"]) == ("failed", "2.17")


# --------------------------------------------------------------------------------------------------------------- NVIDIA


def compiled(folder: Path, source: str, library: str, **macros: object) -> Path:
    need("gcc", "gcc")
    options = [f"-D{name}={value}" for name, value in macros.items()]
    command = ["gcc", "-shared", "-fPIC", *options, "-o", str(folder / library), str(ROOT / "tests/support" / source)]
    subprocess.run(command, check=True)
    return folder / library


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
    compiled(folder, "fake_nvml.c", "libnvidia-ml.so.1", DRIVER=f'"{number}"', **given)
    return {"LD_LIBRARY_PATH": str(folder)}


def test_a_machine_without_a_gpu_is_named_so_and_fails_where_one_is_required(
    healthy: tuple[int, dict[str, dict]],
) -> None:
    if healthy[1]["driver"]["status"] == "ok":
        pytest.skip("this machine has an NVIDIA driver")
    assert healthy[1]["driver"]["found"].startswith("no NVIDIA driver: CPU only")
    code, checks = doctor("--gpu", "required")
    assert (code, checks["driver"]["status"]) == (1, "failed")
    assert "530.30.02" in checks["driver"]["hint"]


def test_a_good_driver_and_gpu_pass(tmp_path: Path) -> None:
    code, checks = doctor("--gpu", "required", **driver(tmp_path))
    assert code == 0, checks
    assert checks["driver"]["found"] == "550.54.14, of CUDA 12.4"
    assert checks["GPU 0"]["found"] == "Test GPU, 24 GB, compute capability 8.9, ECC on, MIG not there, persistence off"


@pytest.mark.parametrize(("cuda", "says"), [(12000, "530.30.02"), (11080, "CUDA 11 ended with PyTorch 2.7")])
def test_a_driver_below_the_floor_fails_in_words(cuda: int, says: str, tmp_path: Path) -> None:
    code, checks = doctor(**driver(tmp_path, number="520.61.05", CUDA=cuda))
    assert (code, checks["driver"]["status"]) == (1, "failed")
    assert says in checks["driver"]["hint"]


@pytest.mark.parametrize(("major", "minor"), [(6, 1), (3, 5), (11, 0)])
def test_a_gpu_that_this_torch_has_no_code_for_fails(major: int, minor: int, tmp_path: Path) -> None:
    code, checks = doctor(**driver(tmp_path, MAJOR=major, MINOR=minor))
    assert (code, checks["GPU 0"]["status"]) == (1, "failed")
    assert f"compute capability {major}.{minor}" in checks["GPU 0"]["found"]


def test_a_gpu_that_others_use_fails(tmp_path: Path) -> None:
    code, checks = doctor(**driver(tmp_path, PROCESSES=2))
    assert (code, checks["GPU 0 in use"]["status"]) == (1, "failed")
    assert checks["GPU 0 in use"]["found"] == "process 4242 holds 21.0 GB, process 4243 holds 21.0 GB"


def test_gpus_that_cannot_reach_each_other_are_told(tmp_path: Path) -> None:
    """Not a failure: cards for the desk never can."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    assert doctor(**driver(tmp_path / "with", COUNT=3))[1]["P2P"]["status"] == "ok"
    code, checks = doctor(**driver(tmp_path / "without", COUNT=3, P2P=5))
    assert code == 0
    assert checks["P2P"]["found"].startswith("none between 0-1; 0-2; 1-2")


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
    assert checks["torch"]["hint"].startswith("old/_C.so asks for libcudart.so.11.0")


def test_a_torch_that_hangs_is_given_up(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    started = time.monotonic()
    (check,) = libraries.checks({}, python=str(python), timeout_s=0.5)
    assert check.status == "failed"
    assert check.found.startswith("no answer")
    assert time.monotonic() - started < 30


def test_a_torch_of_another_version_is_named(tmp_path: Path) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    other = lock.replace("\ntorch==2.9.1 ", "\ntorch==2.9.0 ").replace("cudnn-cu12==9.10.", "cudnn-cu12==9.11.")
    (tmp_path / "requirements.lock").write_text(other)
    found = {check.name: check for check in libraries.checks(read_lock(tmp_path / "requirements.lock"))}
    assert found["torch"].status == found["cuDNN"].status == "failed"
    assert found["NCCL"].status == "ok"
    assert (found["torch"].wanted, found["torch"].hint) == ("2.9.0", "make setup")


def test_a_cuda_library_from_elsewhere_is_named(tmp_path: Path, healthy: tuple[int, dict[str, dict]]) -> None:
    """torch's process really has it: a copy of cuFile, by LD_PRELOAD (torch's own RPATH goes before LD_LIBRARY_PATH)."""
    own = next((Path(sys.prefix) / "lib").glob("python*/site-packages/nvidia/cufile/lib/libcufile.so.0"))
    (tmp_path / own.name).write_bytes(own.read_bytes())
    _, checks = doctor(LD_PRELOAD=str(tmp_path / own.name))
    assert checks["CUDA libraries"]["status"] == "failed"
    assert checks["CUDA libraries"]["found"] == str(tmp_path / own.name)


# -------------------------------------------------------------------------------------------------------------- machine


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with mounts of its own."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace for this user: run the tests as root to see this one")
    return subprocess.run(["unshare", "-m", "bash", "-ec", script], capture_output=True, text=True, check=False)


def test_a_small_shared_memory_fails() -> None:
    """What docker gives by default: 64 MB."""
    done = in_namespace(f"mount -t tmpfs -o size=64m none /dev/shm; cd {ROOT}; {LABTRAIN} doctor --json || true")
    check = {entry["name"]: entry for entry in json.loads(done.stdout)}["shared memory"]
    assert (check["status"], check["found"]) == ("failed", "64 MB")
    assert "--shm-size" in check["hint"]
    assert machine.check_shared_memory(Path("/no-such-folder")).status == "failed"


def test_a_full_disk_fails_and_the_last_checkpoints_size_counts(experiment: Experiment, tmp_path: Path) -> None:
    """A disk of 1 MB, with a real checkpoint of which three more do not fit."""
    run = experiment.train(*QUICK, "paths.runs=runs", "trainer.max_steps=2", "model.width=64")
    checkpoint = run.folder.resolve() / "checkpoints"
    script = f"mkdir {tmp_path}/disk; mount -t tmpfs -o size=2m none {tmp_path}/disk; mkdir {tmp_path}/disk/run; cp -r {checkpoint}/* {tmp_path}/disk/run; "
    script += f"cd {tmp_path}/disk; {LABTRAIN} doctor --json --checkpoints {tmp_path}/disk || true"
    checks = {entry["name"]: entry for entry in json.loads(in_namespace(script).stdout)}
    assert checks["disk"]["status"] == checks["checkpoints"]["status"] == "failed"
    assert "the last one has" in checks["checkpoints"]["found"]


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


def test_too_few_open_files_fail() -> None:
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 256; {LABTRAIN} doctor --json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    check = {entry["name"]: entry for entry in json.loads(done.stdout)}["open files"]
    assert (check["status"], check["found"]) == ("failed", "256")
    assert check["hint"].startswith("ulimit -n ")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 256


def test_an_nccl_variable_that_switches_a_transport_off_fails() -> None:
    _, checks = doctor(NCCL_P2P_DISABLE="1", NCCL_DEBUG="INFO")
    assert checks["NCCL variables"]["status"] == "failed"
    assert checks["NCCL variables"]["hint"] == "unset NCCL_P2P_DISABLE"


def test_a_clock_that_is_behind_fails() -> None:
    """By libfaketime, for the doctor alone."""
    need("faketime", "faketime")
    _, checks = doctor(prefix=("faketime", "2020-01-01"))
    assert checks["clock"]["status"] == "failed"
    assert checks["clock"]["found"].startswith("2020-01-01")


def test_the_checks_have_names_of_their_own() -> None:
    names = [check.name for check in examine()]
    assert len(names) == len(set(names))
