"""Check this machine and environment: each check has what was found, what is expected, and a hint.

`environment` checks Python and the installed packages, `machine` memory, limits, disks and the clock. `libraries`
checks torch in its own process and with a time limit, so that a broken torch cannot crash the doctor. `nvidia` compares
the driver and the GPUs with that torch (verdicts.py), and `kernels` runs that torch on each GPU.
"""

from collections.abc import Iterator
from pathlib import Path

from labtrain.environment.doctor import environment, kernels, libraries, machine, nvidia
from labtrain.environment.doctor.report import Check, skipped
from labtrain.environment.lock import find_lock, read_lock

__all__ = ["Check", "examine"]


def examine(
    *, gpu_required: bool = False, deep: bool = False, fast: bool = False, checkpoints: str | None = None
) -> Iterator[Check]:
    """Yield the result of each check, the slow ones last.

    Args:
        gpu_required: fail without an NVIDIA driver instead of skipping the check.
        deep: hash every installed file, not only those that changed since the installation.
        fast: run no kernels on the GPUs.
        checkpoints: the folder or URL for checkpoints; by default runs/ in the working directory.
    """
    lock = find_lock()
    pins = read_lock(lock)
    yield from environment.checks(pins, lock, deep=deep)
    yield from machine.checks(Path.cwd(), checkpoints)
    probed = libraries.probe()
    yield from libraries.checks(pins, probed, libraries.of_conda(lock.parent))
    facts = nvidia.ask()
    yield from nvidia.checks(facts, probed.build, required=gpu_required)
    gpus = nvidia.numbers(facts)
    if fast or probed.build is None or not gpus:
        why = "--fast" if fast else "no GPU" if not gpus else "this torch cannot use a GPU"
        yield skipped(kernels.GROUP, "kernels", f"not run: {why}", "the known results of kernels on each GPU")
    else:
        yield from kernels.checks("cuda", probed.found["GPUs"], gpus)
