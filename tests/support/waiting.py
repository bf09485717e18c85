"""The one way in which tests wait: for a condition, with a deadline."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 300  # what never comes is a failure; a busy machine is none


def wait_until(
    answers: Callable[[], Any],
    seconds: float = PATIENCE_S,
    *,
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
) -> None:
    """Wait until a condition is true.

    Args:
        answers: the condition; an OSError of its own counts as false.
        seconds: the deadline.
        process: which has to live until the condition is true.
        log: a file whose last lines the error shows.

    Raises:
        TimeoutError: the condition was false at the deadline, or the process has ended.
    """
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if answers():
                return
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            break
        time.sleep(0.01)  # fixed: between two looks
    code = None if process is None else process.poll()
    text = "" if log is None or not log.exists() else "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    raise TimeoutError((f"nothing after {seconds} s" if code is None else f"it ended with {code}") + f"\n{text}")
