"""The receipt: what a run leaves behind for whoever checks it. Schema ``labtrain/receipt/1``, receipt.schema.json.

One JSON file a run, written whole by the first process of rank 0 and replaced atomically at each change of status:
``running``, then ``interrupted``, ``complete`` or ``failed``. It ends with its own digest: a change by hand or by a
disk is found, one by somebody who writes the digest anew is not.

What looks like a credential is never in it (credentials.py). A text that comes from `${oc.env:X}` is in it as that.
"""

import functools
import json
import reprlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from labtrain.base import contracts, exact_json, untrusted
from labtrain.base.console import quoted
from labtrain.base.contracts import as_options
from labtrain.base.credentials import without_secrets as without_secrets
from labtrain.base.errors import DamagedError, not_readable
from labtrain.base.files import write_atomically

SCHEMA = "labtrain/receipt/1"
FILE = "receipt.json"
LOCK = ".lock"  # a record lock, beside it: held by the process that trains the run (recorder.py)
SIGN = ".training"  # another, which that process holds to be seen by those who may not open the first
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
    "digest",
)

Receipt = contracts.Receipt


def write(run_dir: Path, receipt: Receipt) -> None:
    """Replace the run's receipt in one step, with its digest: a reader sees the old one or the new one, whole."""
    assert tuple(receipt) == KEYS
    assert receipt["status"] in STATUSES
    receipt["digest"] = exact_json.digest_of(as_options(receipt))
    write_atomically(run_dir / FILE, exact_json.dumps(receipt, indent=1) + "\n")


@functools.cache
def _validator() -> Callable[[object], None]:
    """Return what holds a receipt against receipt.schema.json: a tenth of a second to make, then 0.3 ms a receipt."""
    import fastjsonschema

    schema = json.loads(Path(__file__).with_name("receipt.schema.json").read_text())
    return cast(Callable[[object], None], fastjsonschema.compile(schema, use_default=False, detailed_exceptions=True))


def hold_against_schema(receipt: object, path: Path) -> None:
    """Hold a receipt against its schema: whoever wrote it may have given it a right digest, and a path for a name.

    Raises:
        DamagedError: names the first place that is not as the schema says.
    """
    import fastjsonschema

    try:
        _validator()(receipt)
    except fastjsonschema.JsonSchemaValueException as error:
        place = ".".join(map(str, error.path[1:])) or "its top level"
        said = str(error.message).removeprefix(str(error.name)).strip()
        raise DamagedError(
            f"{path}: {place} {said[:200]}, got {reprlib.repr(error.value)}",
            hint="labtrain wrote no such receipt; get it again from whoever trained the run",
        ) from error


def origin_digest(receipt: Receipt) -> str:
    """Return the digest of another run's checkpoint that a run begins from; empty for a run from step 0."""
    origin = receipt["segments"][0].get("origin")
    return origin["digest"] if origin else ""


def time_of(text: str) -> datetime:
    """Return what `provenance.timestamp` wrote, in UTC; ValueError where it is no time of this calendar."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{text}: {error}") from error


def read(run_dir: Path) -> Receipt | None:
    """Return the receipt of a run folder, as its schema says; None if there is none.

    What it names is safe to use: ids and names are single parts of a path, the folder of the code lies in its
    repository.

    Raises:
        DamagedError: it is there and cannot be trusted: broken JSON, another schema, changed, not as its schema says.
        ConfigError: this user may not read it.
    """
    path = run_dir / FILE
    hint = f"mv {quoted(run_dir)} {quoted(f'{run_dir}.broken')}   # or start anew beside it: resume=never"
    try:
        receipt = untrusted.loads(untrusted.read(path))
        schema, said = receipt["schema"], receipt["digest"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise not_readable(run_dir) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is broken: {error!r}", hint=hint) from error
    if schema != SCHEMA:
        hint = "install the labtrain that wrote it: the wheel is in the experiment's vendor/"
        raise DamagedError(f"{path}: schema {schema!r}, this labtrain reads {SCHEMA!r}", hint=hint)
    if said != (found := exact_json.digest_of(as_options(receipt))):
        raise DamagedError(
            f"{path} was changed after it was written: its digest is {found[:12]}, it says {str(said)[:12]}", hint=hint
        )
    hold_against_schema(receipt, path)
    times = [segment[key] for segment in receipt["segments"] for key in ("started", "ended") if segment[key]]
    try:
        for text in times:
            time_of(text)
    except ValueError as error:
        raise DamagedError(f"{path}: a time that is none: {error}", hint=hint) from error
    if receipt["status"] == "complete":
        steps = receipt["results"]["steps"]
        for segment in receipt["segments"]:
            if segment["from_step"] > steps:
                raise DamagedError(
                    f"{path}: a segment from step {segment['from_step']} on, of a run of {steps} steps", hint=hint
                )
    return cast(Receipt, dict(receipt))
