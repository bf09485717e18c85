"""Keep what a training's process prints: output.log in the run's folder.

Only what Python prints is kept. Libraries in C, such as NCCL with NCCL_DEBUG, write to the terminal alone.
"""

import os
import re
import sys
from pathlib import Path
from typing import TextIO, cast

from labtrain.base.credentials import CleanStream
from labtrain.base.files import write_all

FILE = "output.log"
MOST_WAITING = 1000  # lines that wait for the run's folder
# ECMA-48: a column's address moves to the line's beginning as a carriage return does; the rest is colours and such.
_TO_BEGINNING, _CONTROL = re.compile(r"\x1b\[1?G"), re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-_])")


class KeptStream(CleanStream):
    """A text stream whose lines are also written to output.log, without colours and without lines that move."""

    def __init__(self, stream: TextIO, log: "Log") -> None:
        super().__init__(stream)
        self.log, self.begun = log, ""

    def write(self, text: str) -> int:
        clean = self.clean(text)
        self.stream.write(clean)
        *lines, last = (self.begun + _TO_BEGINNING.sub("\r", clean)).split("\n")
        self.begun = last.rpartition("\r")[2]
        if lines:
            self.log.add([_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]) for line in lines])
        return len(text)


class Log:
    """The lines of this process; they wait until `path` is known and its folder exists."""

    def __init__(self, rank: int) -> None:
        self.prefix = f"[rank {rank}] " if rank else ""
        self.path: Path | None = None
        self.waiting: list[str] = []

    def add(self, lines: list[str]) -> None:
        """Append lines in one write, so that the lines of several ranks do not mix."""
        self.waiting = [*self.waiting, *(f"{self.prefix}{line}\n" for line in lines)][-MOST_WAITING:]
        if self.path is None or not self.path.parent.is_dir():
            return
        text = "".join(self.waiting).encode("utf-8", "backslashreplace")
        self.waiting = []
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                write_all(file, text)
            finally:
                os.close(file)
        except OSError as error:  # a full disk must not end a training
            self.path = None
            sys.__stderr__ and sys.__stderr__.write(f"warning: {FILE} is not continued: {error.strerror}\n")


_log: Log | None = None


def keep_output(rank: int) -> None:
    """From now on, keep what this process prints, without credentials."""
    global _log
    _log = Log(rank)
    sys.stdout, sys.stderr = cast(TextIO, KeptStream(sys.stdout, _log)), cast(TextIO, KeptStream(sys.stderr, _log))


def write_output_to(run_dir: Path) -> None:
    """Write what this process has printed, and prints from now on, to a run's folder; nothing if it is not kept."""
    if _log is not None:
        _log.path = run_dir / FILE
        _log.add([])
