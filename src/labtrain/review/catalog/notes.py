"""`labtrain note`: a person's note about a run, in its folder but outside receipt, digest and signature. No torch."""

import os
from contextlib import suppress
from pathlib import Path

from labtrain.base import untrusted
from labtrain.base.console import one_line, shown
from labtrain.base.errors import ConfigError
from labtrain.base.files import write_atomically
from labtrain.record import receipt

FILE = "note.txt"
MOST_BYTES = 10_000


def write_note(run: Path, text: str) -> Path:
    """Keep a note about a run, in place of an earlier one; an empty text removes it. Return the run's folder.

    Raises:
        ConfigError: there is no run, or the note is too long or cannot be written.
        DamagedError: the receipt is broken or was changed.
    """
    run_dir = receipt.find(run)
    if receipt.read(run_dir) is None:
        raise ConfigError(f"{shown(run_dir)} is not a run: looked for {receipt.FILE}", hint="labtrain ls lists runs")
    text = text.strip()
    if len(text.encode(errors="surrogateescape")) > MOST_BYTES:
        raise ConfigError(
            f"a note has at most {MOST_BYTES:,} bytes", hint=f"put a longer text into a file in {shown(run_dir)}"
        )
    try:
        if text:
            write_atomically(run_dir / FILE, text + "\n")
        else:
            (run_dir / FILE).unlink(missing_ok=True)
    except OSError as error:
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise ConfigError(f"{shown(run_dir)}: no permission to write", hint=f"ls -ld {shown(run_dir)}") from None
        raise ConfigError(f"{shown(run_dir / FILE)}: {error.strerror}", hint=f"ls -ld {shown(run_dir)}") from None
    return run_dir


def read_note(run_dir: Path) -> str:
    """Return a run's note in one line; empty if there is none, or none that can be read."""
    with suppress(OSError):
        text = untrusted.read(run_dir / FILE, MOST_BYTES).decode(errors="replace")
        return one_line(" ".join(text.split()))
    return ""
