"""Check the driver (by NVML) and each GPU against what the installed torch was built for (verdicts.py)."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from labtrain.base.console import few
from labtrain.base.nvml import NoDriverError, nvml
from labtrain.environment.doctor import cliffs
from labtrain.environment.doctor.report import Check, judged, skipped, warned
from labtrain.environment.doctor.verdicts import (
    LEAST_DRIVER,
    NEWER_DRIVER,
    QUIET_DRIVER,
    Build,
    Verdict,
    Version,
    of_driver,
    of_gpu,
    of_later_wheels,
    shown,
)
from labtrain.record.identity import route

GROUP = "NVIDIA"
WANTED = f"{shown(LEAST_DRIVER)} or later, better {shown(QUIET_DRIVER)} (CUDA 12.1) or later"


def checks(build: Build | None, *, required: bool = False) -> Iterator[Check]:
    """Yield the group's checks; only one if there is no driver.

    Args:
        build: of the installed torch; None if it cannot use a GPU, or cannot be imported.
        required: whether a machine without a GPU fails.
    """
    try:
        with nvml() as pynvml:
            yield from _check_all(pynvml, build, required=required)
    except NoDriverError as error:
        found = f"no NVIDIA driver: CPU only ({error})"
        hint = f"{NEWER_DRIVER}; in a container, start it with --gpus all{_wsl_hint()}"
        yield (
            judged(GROUP, "driver", False, found, WANTED, hint) if required else skipped(GROUP, "driver", found, WANTED)
        )


def _check_all(pynvml: ModuleType, build: Build | None, *, required: bool) -> Iterator[Check]:
    driver, number = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
    cuda = number // 1000, number % 1000 // 10
    verdict = of_driver(driver, cuda)
    yield check(verdict, "driver", f"{driver}, for CUDA {shown(cuda)}", WANTED)
    if verdict.result != "fails":
        yield from cliffs.checks(driver)
    count = pynvml.nvmlDeviceGetCount()
    hint = "nvidia-smi -L; in a container, start it with --gpus all"
    yield judged(
        GROUP, "GPUs", count > 0 or not required, str(count), "one or more" if required else "any number", hint
    )
    for index in range(count):
        yield from check_gpu(pynvml, index, driver, cuda, build)
    if count > 1:
        yield check_p2p(pynvml, count)


def check(verdict: Verdict, name: str, found: str, wanted: str) -> Check:
    """Return the check of a verdict."""
    said = f"{found}: {verdict.why}"
    if verdict.result == "runs":
        return judged(GROUP, name, True, found, wanted, "")
    if verdict.result == "warns":
        return warned(GROUP, name, said, wanted, verdict.hint)
    return judged(GROUP, name, False, said, wanted, verdict.hint)


def check_gpu(pynvml: ModuleType, index: int, driver: str, cuda: Version, build: Build | None) -> Iterator[Check]:
    """Check one GPU: its compute capability and other users; report its memory, ECC, MIG and persistence."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    modes = ", ".join(f"{what} {_mode(pynvml, handle, what)}" for what in ("ECC", "MIG", "persistence"))
    found = f"{name}, {memory.total / 1e9:.0f} GB, compute capability {shown(capability)}, {modes}"
    if build is None:
        hint = "see the check of torch"
        yield judged(GROUP, f"GPU {index}", False, f"{found}: this torch cannot use a GPU", "a torch for CUDA", hint)
    else:
        wanted = f"a GPU that torch has code for: {' '.join(map(shown, build.compiled))}"
        yield check(of_gpu(driver, cuda, capability, build), f"GPU {index}", found, wanted)
    if not route().startswith("conda") and (later := of_later_wheels(driver, capability)).result == "warns":
        yield warned(GROUP, f"GPU {index} later", later.why, "a driver and GPU for later PyTorch, too", later.hint)
    others = _processes(pynvml, handle)
    yield judged(
        GROUP,
        f"GPU {index} in use",
        not others,
        ", ".join(f"process {pid} holds {size / 1e9:.1f} GB" for pid, size in others) or "not in use",
        "no other process",
        "nvidia-smi; wait, or choose another GPU: trainer.devices=[1]",
    )


def numbers() -> dict[str, int]:
    """Return the number of each GPU, by UUID; empty without a driver."""
    try:
        with nvml() as pynvml:
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            return {pynvml.nvmlDeviceGetUUID(handle): number for number, handle in enumerate(handles)}
    except NoDriverError:
        return {}


def check_p2p(pynvml: ModuleType, count: int) -> Check:
    """Report which pairs of GPUs cannot read each other's memory; consumer cards never can, so this does not fail."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    read = 0  # pynvml's constant is a tuple by mistake
    without = [
        f"{one}-{other}"
        for one, other in itertools.combinations(range(count), 2)
        if pynvml.nvmlDeviceGetP2PStatus(handles[one], handles[other], read) != pynvml.NVML_P2P_STATUS_OK
    ]
    wanted = "between all GPUs"
    if not without:
        return judged(GROUP, "P2P", True, wanted, wanted, "")
    return skipped(GROUP, "P2P", f"not between {few(without)}: NCCL uses shared memory, which is slower", wanted)


def _mode(pynvml: ModuleType, handle: object, what: str) -> str:
    functions = {"ECC": "EccMode", "MIG": "MigMode", "persistence": "PersistenceMode"}
    try:
        mode = getattr(pynvml, f"nvmlDeviceGet{functions[what]}")(handle)
        return "on" if (mode[0] if isinstance(mode, list) else mode) else "off"
    except pynvml.NVMLError:
        return "not available"


def _processes(pynvml: ModuleType, handle: object) -> list[tuple[int, int]]:
    try:
        return [
            (process.pid, process.usedGpuMemory or 0) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        ]
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):  # the second: a driver older than this pynvml
        return []


def _wsl_hint() -> str:
    """Return a hint for WSL, where Windows has the driver."""
    if "microsoft" not in Path("/proc/version").read_text().lower():
        return ""
    return "; under WSL, install the driver only in Windows: its libcuda is in /usr/lib/wsl/lib"
