"""Processes for what a broken driver, card or library can crash or hang."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 5.0  # for a killed process to go; one that waits for a driver may stay


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal; None if it was killed because its time was over.
        output: its standard output.
        errors: its standard error.
    """

    code: int | None
    output: str
    errors: str

    @property
    def reason(self) -> str:
        """The signal or the exit code; empty if all is well, or the time was over."""
        if not self.code:
            return ""
        return signal.Signals(-self.code).name if self.code < 0 else f"exit code {self.code}"


def run_together(
    commands: Sequence[Sequence[str]], timeout_s: float, environment: Mapping[str, str] | None = None
) -> list[Ended]:
    """Run commands at the same time, and kill what has not ended in time, with all processes that it began.

    Their output goes to files, since a process that stays would hold a pipe open.

    Args:
        commands: at least one.
        timeout_s: for all of them.
        environment: variables beside those of this process.
    """
    end = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, contextlib.ExitStack() as files:
        begun: list[subprocess.Popen[bytes]] = []
        try:
            for number, command in enumerate(commands):
                out, err = (
                    files.enter_context(Path(scratch, f"{number}.{kind}").open("wb")) for kind in ("out", "err")
                )
                begun.append(
                    subprocess.Popen(
                        command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=out,
                        stderr=err, start_new_session=True,
                    )
                )  # fmt: skip
            codes = [_code(process, end) for process in begun]
        finally:
            for process in begun:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        texts = [[Path(scratch, f"{number}.{kind}").read_text(errors="replace") for kind in ("out", "err")]
                 for number in range(len(begun))]  # fmt: skip
    return [Ended(code=code, output=output, errors=errors)
            for code, (output, errors) in zip(codes, texts, strict=True)]  # fmt: skip


def _code(process: subprocess.Popen[bytes], end: float) -> int | None:
    """Wait for a process; kill it and return None if its time is over."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return None
