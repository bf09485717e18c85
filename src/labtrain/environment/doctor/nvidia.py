"""Check the driver (by NVML) against the CUDA 12.1 minimum, and each GPU against what this torch was built for."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from labtrain.base.console import few
from labtrain.base.nvml import NoDriverError, nvml
from labtrain.environment.doctor.report import Check, judged, skipped

GROUP = "NVIDIA"
DRIVER_FLOOR = (12, 1)  # CUDA version of the oldest supported driver
# Compute capabilities in the torch 2.9 wheels; a later minor version of the same major runs that code too.
CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
WANTED = f"a driver for CUDA {DRIVER_FLOOR[0]}.{DRIVER_FLOOR[1]} or later (530.30.02 or later)"


def checks(*, required: bool = False) -> Iterator[Check]:
    """Yield the group's checks; only one if there is no driver."""
    try:
        with nvml() as pynvml:
            yield from _check_all(pynvml, required=required)
    except NoDriverError as error:
        found = f"no NVIDIA driver: CPU only ({error})"
        hint = f"install NVIDIA's driver, 530.30.02 or later; in a container, start it with --gpus all{_wsl_hint()}"
        yield (
            judged(GROUP, "driver", False, found, WANTED, hint) if required else skipped(GROUP, "driver", found, WANTED)
        )


def _check_all(pynvml: ModuleType, *, required: bool) -> Iterator[Check]:
    yield check_driver(pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2())
    count = pynvml.nvmlDeviceGetCount()
    hint = "nvidia-smi -L; in a container, start it with --gpus all"
    yield judged(
        GROUP, "GPUs", count > 0 or not required, str(count), "one or more" if required else "any number", hint
    )
    for index in range(count):
        yield from check_gpu(pynvml, index)
    if count > 1:
        yield check_p2p(pynvml, count)


def check_driver(driver: str, cuda_number: int) -> Check:
    """Compare a driver with the minimum; `cuda_number` is NVML's, 12010 for CUDA 12.1."""
    cuda = (cuda_number // 1000, cuda_number % 1000 // 10)
    hint = "install NVIDIA's driver 530.30.02 or later (it runs older programs too); the CUDA toolkit need not change"
    if cuda[0] < 12:
        hint += f". This one is for CUDA {cuda[0]}.{cuda[1]}; CUDA 11 ended with PyTorch 2.7"
    return judged(GROUP, "driver", cuda >= DRIVER_FLOOR, f"{driver}, for CUDA {cuda[0]}.{cuda[1]}", WANTED, hint)


def check_gpu(pynvml: ModuleType, index: int) -> Iterator[Check]:
    """Check one GPU: its compute capability and other users; report its memory, ECC, MIG and persistence."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    good = any(capability[0] == major and capability[1] >= minor for major, minor in CAPABILITIES)
    modes = ", ".join(f"{what} {_mode(pynvml, handle, what)}" for what in ("ECC", "MIG", "persistence"))
    found = f"{name}, {memory.total / 1e9:.0f} GB, compute capability {capability[0]}.{capability[1]}, {modes}"
    built = " ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
    yield judged(
        GROUP,
        f"GPU {index}",
        good,
        found,
        f"a compute capability of {built}",
        "use another GPU, or a torch built for this one",
    )
    others = _processes(pynvml, handle)
    yield judged(
        GROUP,
        f"GPU {index} in use",
        not others,
        ", ".join(f"process {pid} holds {size / 1e9:.1f} GB" for pid, size in others) or "not in use",
        "no other process",
        "nvidia-smi; wait, or choose another GPU: trainer.devices=[1]",
    )


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
