"""Run another program to its end, for a limited time."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from labtrain.base.errors import LabtrainError


def run_program(
    command: Sequence[str],
    *,
    timeout_s: int,
    hint: str,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program and return its exit code and output.

    Args:
        command: the program and its arguments.
        timeout_s: when to kill it.
        hint: what to do if it has to be killed.
        folder: its working directory, if not this process's.
        environment: its variables, if not this process's.

    Raises:
        LabtrainError: it took longer.
    """
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        name = " ".join([Path(command[0]).name, *command[1:3]])
        raise LabtrainError(f"{name} took longer than {timeout_s} s, so labtrain ended it", hint=hint) from error


def labtrain_command(*arguments: str | Path) -> list[str]:
    """Return the command line of `labtrain` in this environment: for packages below the one with the commands."""
    return [sys.executable, "-c", "from labtrain.cli import main; main()", *map(str, arguments)]
