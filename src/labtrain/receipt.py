"""The receipt: what a run leaves behind for whoever checks it. Schema ``labtrain/receipt/1``.

One JSON file a run, written whole by the first process of rank 0 and replaced atomically at each change of status:
``running``, then ``interrupted``, ``complete`` or ``failed``.
"""

import json
import os
from pathlib import Path
from typing import Any

from labtrain.errors import DamagedError

SCHEMA = "labtrain/receipt/1"
FILE = "receipt.json"
STATUSES = ("running", "interrupted", "complete", "failed")
KEYS = (
    "schema",
    "run_id",
    "status",
    "command",
    "config",
    "code",
    "environment",
    "hardware",
    "determinism",
    "data",
    "segments",
    "results",
    "checkpoints",
    "trail",
)

Receipt = dict[str, Any]


def write(run_dir: Path, receipt: Receipt) -> None:
    """Replace the run's receipt in one step: a reader sees the old one or the new one, whole."""
    assert tuple(receipt) == KEYS
    assert receipt["status"] in STATUSES
    write_atomically(run_dir / FILE, json.dumps(receipt, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read(run_dir: Path) -> Receipt | None:
    """Return the receipt of a run folder; None if there is none.

    Raises:
        DamagedError: it is there and cannot be trusted: broken JSON, another schema, a field missing.
    """
    path = run_dir / FILE
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    hint = f"mv {run_dir} {run_dir}.broken   # or start anew beside it: resume=never"
    try:
        receipt = json.loads(text)
        schema, missing = receipt["schema"], sorted(set(KEYS) - set(receipt))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is broken: {error!r}", hint=hint) from error
    if schema != SCHEMA:
        hint = "install the labtrain that wrote it: the wheel is in the experiment's vendor/"
        raise DamagedError(f"{path}: schema {schema!r}, this labtrain reads {SCHEMA!r}", hint=hint)
    if missing or receipt["status"] not in STATUSES:
        wrong = f"without {', '.join(missing)}" if missing else f"with status {receipt['status']!r}"
        raise DamagedError(f"{path} is broken: {wrong}", hint=hint)
    return dict(receipt)
