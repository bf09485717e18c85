"""Checks that fail for real: driver libraries of our own, small disks, another clock, an old C library."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.environment.doctor import machine, nvidia
from labtrain.environment.doctor.verdicts import BUILDS
from tests.conftest import LABTRAIN, ROOT, need, skip_or_fail
from tests.quick.environment.test_verdicts import DRIVERS, TABLES
from tests.support.doctor import doctor, driver, library


def test_an_old_c_library_fails(tmp_path: Path) -> None:
    """A library that answers confstr() as glibc 2.17 does (RHEL 7), loaded before the real one."""
    old = library(tmp_path, "old_glibc.c", "libold.so")
    _, checks = doctor(LD_PRELOAD=str(old))
    assert (checks["glibc"]["status"], checks["glibc"]["found"]) == ("failed", "2.17")


def test_a_good_driver_and_gpu_pass(tmp_path: Path) -> None:
    code, checks = doctor("--gpu", "required", "--fast", **driver(tmp_path))
    assert code == 0, checks
    assert checks["driver"]["found"] == "550.54.14, for CUDA 12.4"
    assert (
        checks["GPU 0"]["found"]
        == "Test GPU, 24 GB, compute capability 8.9, ECC on, MIG not available, persistence off"
    )


@pytest.mark.parametrize(("cuda", "says"), [(12000, "525.60.13"), (11080, "CUDA 11 ended with PyTorch 2.7")])
def test_a_driver_below_the_floor_fails_in_words(cuda: int, says: str, tmp_path: Path) -> None:
    code, checks = doctor("--fast", **driver(tmp_path, number="520.61.05", CUDA=cuda))
    assert (code, checks["driver"]["status"]) == (1, "failed")
    assert says in checks["driver"]["found"]


def test_a_driver_of_cuda_12_0_warns(tmp_path: Path) -> None:
    """NVIDIA's floor for CUDA 12 is 525.60.13; R525 has no updates any more."""
    code, checks = doctor("--fast", **driver(tmp_path, number="525.147.05", CUDA=12000))
    assert (code, checks["driver"]["status"], checks["GPU 0"]["status"]) == (0, "warned", "warned")
    assert checks["driver support"]["found"].startswith(
        "NVIDIA does not list R525 among the branches that get updates: R580 (until June 2028)"
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [(804, "cuda-compat"), (803, "different versions"), (802, "NVSwitch"), (999, "does not answer"),
     (100, "finds no GPU")],
)  # fmt: skip
def test_a_gpu_that_cuda_cannot_use_fails_in_words(code: int, says: str, tmp_path: Path) -> None:
    """torch itself meets the error: a libcuda of our own answers cuInit with it."""
    environment = driver(tmp_path, number="580.65.06", CUDA=13000)
    library(tmp_path, "fake_cuda.c", "libcuda.so.1", CODE=code)
    ended, checks = doctor(**environment)
    assert (ended, checks["GPU 0"]["status"]) == (1, "ok")
    assert checks["GPU 0 start"]["status"] == "failed"
    assert says in checks["GPU 0 start"]["found"]
    assert checks["GPU 0 start"]["hint"]


def test_a_gpu_without_libcuda_fails(tmp_path: Path) -> None:
    """As in a container that has only the driver's management library."""
    code, checks = doctor(**driver(tmp_path))
    assert (code, checks["GPU 0 start"]["status"]) == (1, "failed")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in checks["GPU 0 start"]["hint"]
    code, checks = doctor(CUDA_VISIBLE_DEVICES="", **driver(tmp_path))
    assert (code, checks["kernels"]["found"]) == (0, "CUDA_VISIBLE_DEVICES= hides every GPU")


def test_the_last_pytorch_for_a_driver_is_told(tmp_path: Path) -> None:
    code, checks = doctor("--fast", **driver(tmp_path))
    assert (code, checks["GPU 0 later"]["status"]) == (0, "warned")
    assert checks["GPU 0 later"]["found"].startswith("PyTorch 2.14 is the last with wheels (CUDA 12.6)")


@pytest.mark.parametrize(("major", "minor"), [(6, 1), (3, 5), (11, 0)])
def test_a_gpu_that_this_torch_has_no_code_for_fails(major: int, minor: int, tmp_path: Path) -> None:
    code, checks = doctor("--fast", **driver(tmp_path, MAJOR=major, MINOR=minor))
    assert (code, checks["GPU 0"]["status"]) == (1, "failed")
    assert f"compute capability {major}.{minor}" in checks["GPU 0"]["found"]


def test_a_gpu_that_others_use_fails(tmp_path: Path) -> None:
    code, checks = doctor("--fast", **driver(tmp_path, PROCESSES=2))
    assert (code, checks["GPU 0 in use"]["status"]) == (1, "failed")
    assert checks["GPU 0 in use"]["found"] == "process 4242 holds 21.0 GB, process 4243 holds 21.0 GB"


def test_gpus_that_cannot_reach_each_other_are_told(tmp_path: Path) -> None:
    """Not a failure: cards for the desk never can."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    assert doctor("--fast", **driver(tmp_path / "with", COUNT=3))[1]["P2P"]["status"] == "ok"
    code, checks = doctor("--fast", **driver(tmp_path / "without", COUNT=3, P2P=5))
    assert code == 0
    assert checks["P2P"]["found"].startswith("not between 0-1; 0-2; 1-2")


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with mounts of its own."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        skip_or_fail("no mount namespace for this user: run the tests as root to see this one")
    return subprocess.run(["unshare", "-m", "bash", "-ec", script], capture_output=True, text=True, check=False)


def test_a_small_shared_memory_fails() -> None:
    """What docker gives by default: 64 MB."""
    done = in_namespace(f"mount -t tmpfs -o size=64m none /dev/shm; cd {ROOT}; {LABTRAIN} doctor --json || true")
    check = {entry["name"]: entry for entry in json.loads(done.stdout)}["shared memory"]
    assert (check["status"], check["found"]) == ("failed", "64 MB")
    assert "--shm-size" in check["hint"]
    assert machine.check_shared_memory(Path("/no-such-folder")).status == "failed"


def test_a_clock_that_is_behind_fails() -> None:
    """By libfaketime, for the doctor alone."""
    need("faketime", "faketime")
    _, checks = doctor(prefix=("faketime", "2020-01-01"))
    assert checks["clock"]["status"] == "failed"
    assert checks["clock"]["found"].startswith("2020-01-01")


def test_the_table_can_be_plain() -> None:
    done = subprocess.run(
        [LABTRAIN, "doctor"], env={**os.environ, "NO_COLOR": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "\x1b[" not in done.stdout
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "environment",
        "machine",
        "libraries",
        "NVIDIA",
        "kernels",
        "no problems",
    ]


def test_another_cuda_on_the_library_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "libcudart.so.11.0").write_bytes(b"")
    _, checks = doctor(LD_LIBRARY_PATH=str(tmp_path))
    assert checks["LD_LIBRARY_PATH"]["status"] == "failed"
    assert f"{tmp_path}/libcudart.so.11.0" in checks["LD_LIBRARY_PATH"]["found"]


def test_a_cuda_library_from_elsewhere_is_named(tmp_path: Path) -> None:
    """torch's process really has it: a copy of cuFile, by LD_PRELOAD (torch's own RPATH goes before LD_LIBRARY_PATH)."""
    own = next((Path(sys.prefix) / "lib").glob("python*/site-packages/nvidia/cufile/lib/libcufile.so.0"))
    (tmp_path / own.name).write_bytes(own.read_bytes())
    _, checks = doctor(LD_PRELOAD=str(tmp_path / own.name))
    assert checks["CUDA libraries"]["status"] == "failed"
    assert checks["CUDA libraries"]["found"] == str(tmp_path / own.name)


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


ASK = """
import json, os, sys
from labtrain.environment.doctor import nvidia
from labtrain.environment.doctor.nvml_process import facts
from labtrain.environment.doctor.verdicts import BUILDS
found = []
for route, number, cuda, major, minor in json.load(sys.stdin):
    os.environ |= {"DRIVER": number, "CUDA": str(cuda[0] * 1000 + cuda[1] * 10), "MAJOR": str(major), "MINOR": str(minor)}
    checks = {check.name: check for check in nvidia.checks(facts(), BUILDS[route])}
    found.append([checks["driver"].status, checks["GPU 0"].status, checks["GPU 0"].hint])
print(json.dumps(found))
"""


def test_each_driver_and_card_has_its_verdict(tmp_path: Path) -> None:
    """The whole table, through NVML: a driver library of our own that answers as each driver and card would."""
    variables = {name: f'atoi(getenv("{name}"))' for name in ("CUDA", "MAJOR", "MINOR")}
    library(tmp_path, "fake_nvml.c", "libnvidia-ml.so.1", DRIVER='getenv("DRIVER")', INIT=0, COUNT=1, PROCESSES=0, P2P=0,
            USED="0ULL", **variables)  # fmt: skip
    cases = [(route, number, cuda, *capability) for route, table in TABLES.items() for capability in table
             for number, cuda in DRIVERS]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(cases), env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, cwd=ROOT, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    letters = {"ok": "r", "warned": "w", "failed": "f"}
    found = json.loads(done.stdout)
    wanted = [letter for table in TABLES.values() for row in table.values() for letter in row]
    assert [letters[gpu] for _, gpu, _ in found] == wanted
    assert all(bool(hint) == (gpu != "ok") for _, gpu, hint in found)
    assert {number: of_driver for (_, number, *_), (of_driver, *_) in zip(cases, found, strict=True)} == {
        number: {"515": "failed", "525": "warned"}.get(number[:3], "ok") for number, _ in DRIVERS
    }


def test_a_lost_gpu_fails_alone(tmp_path: Path) -> None:
    """NVML's error 15: the driver is there, the card does not answer."""
    code, checks = doctor(
        "--fast", **driver(tmp_path, number="580.65.06", CUDA=13000, COUNT=2, LOST="(index ? 15 : 0)")
    )
    assert (code, checks["GPU 0"]["status"], checks["GPU 1"]["status"]) == (1, "ok", "failed")
    assert checks["GPU 1"]["found"].startswith("the driver has lost it: ")
    assert "dmesg" in checks["GPU 1"]["hint"]


def test_a_gpu_without_memory_of_its_own(tmp_path: Path) -> None:
    """As a GB10 answers: NVML_ERROR_NOT_SUPPORTED."""
    _, checks = doctor("--fast", **driver(tmp_path, number="580.65.06", CUDA=13000, MEMORY=3))
    assert checks["GPU 0"]["found"].startswith("Test GPU, shared memory, compute capability 8.9")


def test_a_driver_that_hangs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in driver(tmp_path, INIT="(pause(), 0)").items():
        monkeypatch.setenv(name, value)
    (check,) = nvidia.checks(nvidia.ask(timeout_s=3), BUILDS["conda"])
    assert (check.status, check.found) == ("failed", "the driver does not answer: no answer in 3 seconds")


def test_a_process_that_kernels_leave_behind_does_not_hold_the_doctor(tmp_path: Path) -> None:
    """cuInit forks, and both sleep: the limit of three seconds and the grace of five hold."""
    library(tmp_path, "fake_cuda.c", "libcuda.so.1", CODE="(fork(), pause(), 100)")
    code = "from labtrain.environment.doctor import kernels; print([c.found for c in kernels.checks('cuda', 1, {}, timeout_s=20)])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, cwd=ROOT, timeout=200,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "['it did not end: no answer in 20 seconds']\n"
