"""Check the driver and each GPU, as NVML describes them, against the installed torch (verdicts.py)."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from labtrain.base.console import few
from labtrain.base.contracts import Options
from labtrain.environment.doctor import cliffs
from labtrain.environment.doctor.processes import run_together
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
PROCESS = "labtrain.environment.doctor.nvml_process"
TIMEOUT_S = 30.0
LOST = "nvidia-smi; dmesg | grep Xid; a card that the driver has lost comes back after a reboot, or is broken"


def ask(timeout_s: float = TIMEOUT_S) -> Options:
    """Return what the driver says (nvml_process.py), or `broken`: why it says nothing."""
    (ended,) = run_together([[sys.executable, "-m", PROCESS]], timeout_s)
    try:
        return dict(json.loads(ended.output))
    except ValueError:
        lines = ended.errors.strip().splitlines() or [ended.reason]
        return {"broken": f"no answer in {timeout_s:g} seconds" if ended.code is None else lines[-1]}


def numbers(facts: Options) -> dict[str, int]:
    """Return the number of each GPU that answers, by UUID; empty without a driver."""
    return {str(gpu.get("uuid") or gpu["index"]): gpu["index"] for gpu in facts.get("gpus", []) if not gpu["error"]}


def checks(facts: Options, build: Build | None, *, required: bool = False) -> Iterator[Check]:
    """Yield the group's checks; only one if there is no driver.

    Args:
        facts: what the driver says.
        build: of the installed torch; None if it cannot use a GPU, or cannot be imported.
        required: whether a machine without a GPU fails.
    """
    if "no_driver" in facts:
        found = f"no NVIDIA driver: CPU only ({facts['no_driver']})"
        hint = f"{NEWER_DRIVER}; in a container, start it with --gpus all{_wsl_hint()}"
        yield (
            judged(GROUP, "driver", False, found, WANTED, hint) if required else skipped(GROUP, "driver", found, WANTED)
        )
        return
    if "broken" in facts or not facts["driver"] or not facts["cuda"]:
        found = f"the driver does not answer: {facts.get('broken') or '; '.join(facts['errors'])}"
        yield judged(GROUP, "driver", False, found, WANTED, LOST)
        return
    driver, number = facts["driver"], facts["cuda"]
    cuda = number // 1000, number % 1000 // 10
    verdict = of_driver(driver, cuda)
    yield check(verdict, "driver", f"{driver}, for CUDA {shown(cuda)}", WANTED)
    if verdict.result != "fails":
        yield from cliffs.checks(driver)
    count = len(facts["gpus"])
    hint = "nvidia-smi -L; in a container, start it with --gpus all"
    yield judged(
        GROUP, "GPUs", count > 0 or not required, str(count), "one or more" if required else "any number", hint
    )
    for gpu in facts["gpus"]:
        yield from check_gpu(gpu, driver, cuda, build)
    if count > 1:
        yield check_p2p(facts["without_p2p"])


def check_ends(facts: Options) -> list[Check]:
    """Return what the driver and the GPUs of this machine still run, and until when: the checks that need no torch."""
    of_torch = tuple(f"GPU {number}" for number in numbers(facts).values())
    return [each for each in checks(facts, None) if each.name not in (*of_torch, "GPUs", "P2P")
            and not each.name.endswith("in use")]  # fmt: skip


def check(verdict: Verdict, name: str, found: str, wanted: str) -> Check:
    """Return the check of a verdict."""
    said = f"{found}: {verdict.why}"
    if verdict.result == "runs":
        return judged(GROUP, name, True, found, wanted, "")
    if verdict.result == "warns":
        return warned(GROUP, name, said, wanted, verdict.hint)
    return judged(GROUP, name, False, said, wanted, verdict.hint)


def check_gpu(gpu: Options, driver: str, cuda: Version, build: Build | None) -> Iterator[Check]:
    """Check one GPU: its compute capability and other users; report its memory, ECC, MIG and persistence."""
    index = gpu["index"]
    if gpu["error"]:
        yield judged(
            GROUP, f"GPU {index}", False, f"the driver has lost it: {gpu['error']}", "a GPU that answers", LOST
        )
        return
    capability = tuple(gpu["capability"])
    memory = f"{gpu['memory_bytes'] / 1e9:.0f} GB" if gpu["memory_bytes"] else "shared memory"
    modes = ", ".join(f"{what} {mode}" for what, mode in gpu["modes"].items())
    found = f"{gpu['name']}, {memory}, compute capability {shown(capability)}, {modes}"
    if build is None:
        hint = "see the check of torch"
        yield judged(GROUP, f"GPU {index}", False, f"{found}: this torch cannot use a GPU", "a torch for CUDA", hint)
    else:
        wanted = f"a GPU that torch has code for: {' '.join(map(shown, build.compiled))}"
        yield check(of_gpu(driver, cuda, capability, build), f"GPU {index}", found, wanted)
    if not route().startswith("conda") and (later := of_later_wheels(driver, capability)).result == "warns":
        yield warned(GROUP, f"GPU {index} later", later.why, "a driver and GPU for later PyTorch, too", later.hint)
    others = gpu["processes"]
    yield judged(
        GROUP,
        f"GPU {index} in use",
        not others,
        ", ".join(f"process {pid} holds {size / 1e9:.1f} GB" for pid, size in others) or "not in use",
        "no other process",
        "nvidia-smi; wait, or choose another GPU: trainer.devices=[1]",
    )


def check_p2p(without: list[str]) -> Check:
    """Report which pairs of GPUs cannot read each other's memory; consumer cards never can, so this does not fail."""
    wanted = "between all GPUs"
    if not without:
        return judged(GROUP, "P2P", True, wanted, wanted, "")
    return skipped(GROUP, "P2P", f"not between {few(without)}: NCCL uses shared memory, which is slower", wanted)


def _wsl_hint() -> str:
    """Return a hint for WSL, where Windows has the driver."""
    if "microsoft" not in Path("/proc/version").read_text().lower():
        return ""
    return "; under WSL, install the driver only in Windows: its libcuda is in /usr/lib/wsl/lib"
