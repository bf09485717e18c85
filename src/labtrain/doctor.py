"""Judge this machine and environment against the lock: each check with what was found, what is wanted, and a hint.

torch is asked in a process of its own, last and with a time limit: a broken torch must not take the doctor with it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from labtrain.lock import Pin, find_lock, read_lock
from labtrain.provenance import distributions
from labtrain.run import shown

Status = Literal["ok", "failed", "skipped"]

DRIVER_FLOOR = (12, 1)  # the CUDA version of the oldest driver that every environment is locked for
DISK_BYTES = 5_000_000_000
PROBE_TIMEOUT_S = 120
PROBE = """
import json, torch
found = {"torch": torch.__version__, "CUDA runtime": torch.version.cuda}
if torch.version.cuda:
    number = torch.backends.cudnn.version()
    found["cuDNN"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
(torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
print(json.dumps(found))
"""
# What the probe finds, and the distribution of the lock that says what is wanted.
PROBED = {
    "torch": "torch",
    "CUDA runtime": "nvidia-cuda-runtime-cu12",
    "cuDNN": "nvidia-cudnn-cu12",
    "NCCL": "nvidia-nccl-cu12",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        group: environment, libraries, NVIDIA or machine.
        name: of the check, unique.
        status: ok, failed or skipped.
        found: what is there.
        wanted: what should be.
        hint: what to type or install; empty where nothing is wrong.
    """

    group: str
    name: str
    status: Status
    found: str
    wanted: str
    hint: str = ""


def examine(*, gpu_required: bool = False) -> Iterator[Check]:
    """Yield the result of each check, the slow one last.

    Args:
        gpu_required: a machine without an NVIDIA driver fails instead of being skipped.
    """
    lock = find_lock()
    pins = read_lock(lock)
    yield check_python()
    yield check_packages(pins, lock)
    yield from check_driver(required=gpu_required)
    yield check_disk(Path.cwd())
    yield from check_torch(pins)


def check_python() -> Check:
    """Check the interpreter's version."""
    found = sys.version_info[:2]
    good = (3, 11) <= found < (3, 14)
    hint = "" if good else "make PYTHON=python3.12 setup"
    return Check(
        group="environment",
        name="Python",
        status=_status(good),
        found=".".join(map(str, found)),
        wanted="3.11 to 3.13",
        hint=hint,
    )


def check_packages(pins: dict[str, Pin], lock: Path) -> Check:
    """Compare the version of every installed distribution with the lock."""
    installed = distributions()
    wrong = [
        f"{name} {installed.get(name, 'missing')} (locked {pin.version})"
        for name, pin in pins.items()
        if installed.get(name) != pin.version
    ]
    strays = sorted(set(installed) - set(pins) - {"labtrain"})
    wrong += [f"{name} {installed[name]} (not locked)" for name in strays]
    found = (
        "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        if wrong
        else f"all {len(pins)} as locked"
    )
    return Check(
        group="environment",
        name="packages",
        status=_status(not wrong),
        found=found,
        wanted=shown(lock),
        hint="make setup" if wrong else "",
    )


def check_driver(*, required: bool) -> Iterator[Check]:
    """Ask NVML for the driver and the GPUs, and hold the driver against the CUDA 12.1 floor."""
    import pynvml

    wanted = f"a driver of CUDA {DRIVER_FLOOR[0]}.{DRIVER_FLOOR[1]} or later (530.30.02 or later)"
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        names = [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    except pynvml.NVMLError as error:
        hint = (
            "install NVIDIA's driver, 530.30.02 or later; in a container, start it with --gpus all" if required else ""
        )
        found = f"no NVIDIA driver: CPU only ({error})"
        yield Check(
            group="NVIDIA",
            name="driver",
            status="failed" if required else "skipped",
            found=found,
            wanted=wanted,
            hint=hint,
        )
        return
    cuda = (number // 1000, number % 1000 // 10)
    good = cuda >= DRIVER_FLOOR
    hint = ""
    if not good:
        hint = "install NVIDIA's driver, 530.30.02 or later"
        if cuda[0] == 11:
            hint += f"; CUDA 11 ended with PyTorch 2.7, and this driver is of CUDA {cuda[0]}.{cuda[1]}"
    yield Check(
        group="NVIDIA",
        name="driver",
        status=_status(good),
        found=f"{driver}, of CUDA {cuda[0]}.{cuda[1]}",
        wanted=wanted,
        hint=hint,
    )
    yield Check(
        group="NVIDIA",
        name="GPUs",
        status=_status(bool(names) or not required),
        found=", ".join(names) or "none",
        wanted="one or more" if required else "any",
    )


def check_disk(folder: Path) -> Check:
    """Check the free space where runs are written."""
    free = shutil.disk_usage(folder).free
    good = free >= DISK_BYTES
    hint = "" if good else "checkpoint.url=/another/disk, or remove old runs"
    return Check(
        group="machine",
        name="disk",
        status=_status(good),
        found=f"{free / 1e9:.1f} GB free",
        wanted=f"{DISK_BYTES / 1e9:.0f} GB",
        hint=hint,
    )


def check_torch(pins: dict[str, Pin], *, python: str = sys.executable) -> Iterator[Check]:
    """Import torch in a process of its own, multiply two matrices, and compare its libraries with the lock."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, check=False, timeout=PROBE_TIMEOUT_S
        )
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        reason = "" if found else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except (subprocess.TimeoutExpired, ValueError) as error:
        found, reason = {}, f"no answer: {type(error).__name__}"
    if not found:
        yield Check(
            group="libraries",
            name="torch",
            status="failed",
            found=reason,
            wanted="a torch that can be imported",
            hint="make setup",
        )
        return
    for name, distribution in PROBED.items():
        wanted = pins[distribution].version if distribution in pins else None
        value = found.get(name)
        if value is None or wanted is None:
            yield Check(
                group="libraries",
                name=name,
                status="skipped",
                found=value or "not in this build",
                wanted=wanted or "not locked",
            )
            continue
        good = f"{wanted}.".startswith(f"{value.split('+')[0]}.")
        yield Check(
            group="libraries",
            name=name,
            status=_status(good),
            found=value,
            wanted=wanted,
            hint="" if good else "make setup",
        )


def _status(good: bool) -> Status:
    return "ok" if good else "failed"
