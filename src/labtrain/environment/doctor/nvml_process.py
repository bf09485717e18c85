"""Ask NVIDIA's driver about itself and the GPUs: the process that nvidia.py starts, because a driver may not answer.

What a driver or a card does not know is left out: a GB10 has no memory of its own, a lost card answers nothing.

Run: python -m labtrain.environment.doctor.nvml_process
"""

import itertools
import json
import sys
from collections.abc import Callable
from types import ModuleType

from labtrain.base.contracts import Options
from labtrain.base.nvml import NoDriverError, nvml

MODES = {"ECC": "EccMode", "MIG": "MigMode", "persistence": "PersistenceMode"}


def facts() -> Options:
    """Return what the driver says: `no_driver`, or driver, cuda, gpus, without_p2p and errors."""
    try:
        with nvml() as pynvml:
            return _facts(pynvml)
    except NoDriverError as error:
        return {"no_driver": str(error)}


def _facts(pynvml: ModuleType) -> Options:
    errors: list[str] = []

    def ask(function: str, *arguments: object) -> object:
        try:
            return getattr(pynvml, function)(*arguments)
        except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:  # the second: an old driver
            errors.append(f"{function}: {error}")
            return None

    count = ask("nvmlDeviceGetCount")
    gpus = [_gpu(pynvml, index) for index in range(count if isinstance(count, int) else 0)]
    handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu["index"]) for gpu in gpus if not gpu["error"]]
    here = [gpu["index"] for gpu in gpus if not gpu["error"]]
    read = 0  # pynvml's constant is a tuple by mistake
    links = {
        f"{here[one]}-{here[other]}": ask("nvmlDeviceGetP2PStatus", handles[one], handles[other], read)
        for one, other in itertools.combinations(range(len(here)), 2)
    }
    return {
        "driver": ask("nvmlSystemGetDriverVersion"),
        "cuda": ask("nvmlSystemGetCudaDriverVersion_v2"),
        "gpus": gpus,
        "without_p2p": [pair for pair, status in links.items() if status != pynvml.NVML_P2P_STATUS_OK],
        "errors": errors,
    }


def _gpu(pynvml: ModuleType, index: int) -> Options:
    """Return what is known of one GPU; `error` if the driver has lost it."""

    def ask(function: Callable[..., object], *arguments: object) -> object:
        try:
            return function(*arguments)
        except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
            return None

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        capability = list(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    except pynvml.NVMLError as error:
        return {"index": index, "error": str(error)}
    memory, processes = (
        ask(pynvml.nvmlDeviceGetMemoryInfo, handle),
        ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle),
    )
    modes = {}
    for name, function in MODES.items():
        mode = ask(getattr(pynvml, f"nvmlDeviceGet{function}"), handle)
        now = mode[0] if isinstance(mode, list) else mode
        modes[name] = "not available" if now is None else "on" if now else "off"
    return {
        "index": index,
        "error": "",
        "uuid": ask(pynvml.nvmlDeviceGetUUID, handle),
        "name": ask(pynvml.nvmlDeviceGetName, handle) or "a GPU without a name",
        "memory_bytes": getattr(memory, "total", None),
        "capability": capability,
        "modes": modes,
        "processes": [[each.pid, each.usedGpuMemory or 0] for each in processes] if isinstance(processes, list) else [],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
