"""verified.jsonl, beside a receipt: a line each time that somebody ran it again. Their word, not a proof. No torch."""

import getpass
import json
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from labtrain import __version__
from labtrain.base.errors import DamagedError
from labtrain.record.identity import shown
from labtrain.record.provenance import time_of, timestamp
from labtrain.record.receipt import Receipt

VERIFIED = "verified.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """A line of it.

    Attributes:
        when: in UTC.
        by: a user's name.
        host: where, with its processor and GPUs.
        cpu: its processor.
        gpus: their names.
        labtrain: the version.
        receipt: the digest of the receipt that was verified; another's says nothing of this one.
        from_step: that the training began from.
        to_step: the last step that was the same.
        whole: from its beginning to its end.
        same: whether bits were; None where nothing was trained.
        found: a sentence.
    """

    when: datetime
    by: str
    host: str
    cpu: str
    gpus: list[str]
    labtrain: str
    receipt: str
    from_step: int
    to_step: int
    whole: bool
    same: bool | None
    found: str


def note(
    run_dir: Path,
    receipt: Receipt,
    *,
    hardware: dict[str, Any],
    from_step: int,
    to_step: int,
    whole: bool,
    same: bool | None,
    found: str,
) -> None:
    """Append a verification, of this user, machine and time; where that cannot be written, say so."""
    line = {
        "when": timestamp(),
        "by": _user(),
        "host": os.uname().nodename,
        "cpu": hardware["cpu"],
        "gpus": [gpu["name"] for gpu in hardware.get("gpus", [])],
        "labtrain": __version__,
        "receipt": receipt["digest"],
        "from_step": from_step,
        "to_step": to_step,
        "whole": whole,
        "same": same,
        "found": found,
    }
    try:
        with (run_dir / VERIFIED).open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        sys.stderr.write(f"warning: {shown(run_dir / VERIFIED)}: {error.strerror}: the verdict is not kept\n")


def read_verifications(run_dir: Path) -> list[Verification]:
    """Read who has run a receipt again, newest first; none without the file.

    Raises:
        DamagedError: the file is broken.
    """
    path = run_dir / VERIFIED
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    try:
        found = [
            Verification(**{**{key: entry[key] for key in Verification.__slots__}, "when": time_of(entry["when"])})
            for entry in map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{shown(path)} is broken: {error!r}", hint=f"mv {path} {path}.broken") from error
    return sorted(found, key=lambda each: each.when, reverse=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        return str(os.getuid())
