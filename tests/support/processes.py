"""Processes by their ids, as proc(5) shows them."""

import contextlib
from pathlib import Path


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def writer_of(pid: int) -> int | None:
    """Return the process that writes rank 0's checkpoints: its oldest child that is a fork of it; None if it has none.

    A fork has its parent's stack (field 28, startstack); a program that was executed has one of its own.
    """
    with contextlib.suppress(OSError):
        forks = [child for child in children(pid) if stat(child)[25] == stat(pid)[25]]
        return min(forks, key=lambda child: int(stat(child)[19]), default=None)
    return None
