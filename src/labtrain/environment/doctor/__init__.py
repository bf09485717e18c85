"""Judge this machine and environment against the lock: each check with what was found, what is wanted, and a hint.

`environment` looks at Python and what is installed, `nvidia` at the driver and the GPUs, `machine` at memory, limits,
disks and the clock, `libraries` at torch, in a process of its own, last and with a time limit: a broken torch must not
take the doctor with it.
"""

from collections.abc import Iterator
from pathlib import Path

from labtrain.environment.doctor import environment, libraries, machine, nvidia
from labtrain.environment.doctor.report import Check
from labtrain.environment.lock import find_lock, read_lock

__all__ = ["Check", "examine"]


def examine(*, gpu_required: bool = False, deep: bool = False, checkpoints: str | None = None) -> Iterator[Check]:
    """Yield the result of each check, the slow ones last.

    Args:
        gpu_required: a machine without an NVIDIA driver fails instead of being skipped.
        deep: hash every installed file, not only those that changed since they were installed.
        checkpoints: the folder that checkpoints are written to; by default the runs' below the working directory.
    """
    lock = find_lock()
    pins = read_lock(lock)
    yield from environment.checks(pins, lock, deep=deep)
    yield from nvidia.checks(required=gpu_required)
    yield from machine.checks(Path.cwd(), checkpoints)
    yield from libraries.checks(pins)
