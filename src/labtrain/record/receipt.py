"""The receipt: the record of a run, for verification. Schema ``labtrain/receipt/1``, receipt.schema.json.

One JSON file for each run. Rank 0 writes it and replaces it atomically at each change of status: ``running``, then
``interrupted``, ``complete`` or ``failed``. It ends with its own digest, which detects accidental changes, but not a
change by somebody who recomputes the digest.

Every later version reads it: a key that is new is optional in the schema, or `read` fills it for older receipts, after
their digest was checked. tests/quick/record/test_old_runs.py has examples.

It never contains what looks like a credential (credentials.py). A text from `${oc.env:X}` is recorded as a reference.
"""

import fcntl
import functools
import glob
import json
import os
import re
import reprlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from labtrain.base import contracts, exact_json, untrusted
from labtrain.base.console import few, quoted, shown
from labtrain.base.contracts import as_options
from labtrain.base.credentials import without_secrets as without_secrets
from labtrain.base.errors import ConfigError, DamagedError, not_readable
from labtrain.base.files import write_atomically, writing
from labtrain.base.permissions import open_lock
from labtrain.record.identity import EXPERIMENT, RUN_ID, SHORT_ID, enclosing
from labtrain.record.trail import TRAIL, read_trail

SCHEMA = "labtrain/receipt/1"
FILE = "receipt.json"
WRITER = "use the labtrain that wrote it: its wheel is in the experiment's vendor/ at the commit of the run"
LOCK = ".lock"  # a record lock next to it, held by the process that trains the run (recorder.py)
SIGN = ".training"  # a second lock of that process, visible to users who may not open the first
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a training.

    Attributes:
        run_dir: the run's folder.
        metrics: the last value of each metric, by name.
        weights_digest: 64 hex digits.
        steps: optimizer steps since the run started.
    """

    run_dir: Path
    metrics: dict[str, float]
    weights_digest: str
    steps: int


def result_of(run_dir: Path, results: contracts.Results) -> Result:
    """Return the result that the receipt of a complete run records."""
    return Result(
        run_dir=run_dir,
        metrics=results["metrics"],
        weights_digest=results["weights_digest"],
        steps=results["steps"],
    )


def write(run_dir: Path, receipt: Receipt) -> None:
    """Replace the run's receipt, with its digest, in one step: a reader sees the old or the new one, complete.

    Raises:
        WriteError: it cannot be written.
    """
    assert tuple(receipt) == KEYS
    assert receipt["status"] in STATUSES
    receipt["digest"] = exact_json.digest_of(as_options(receipt))
    with writing(run_dir / FILE):
        write_atomically(run_dir / FILE, exact_json.dumps(receipt, indent=1) + "\n")


def close_killed(found: Receipt, run_dir: Path) -> None:
    """Close the last segment of a receipt whose process was killed, from its trail."""
    segment, trail = found["segments"][-1], run_dir / TRAIL
    if segment["status"] == "running":
        lines = read_trail(run_dir)
        ended = datetime.fromtimestamp(trail.stat().st_mtime, UTC).isoformat(timespec="seconds") if lines else None
        segment |= {"status": "killed", "ended": ended, "to_step": lines[-1]["step"] if lines else segment["from_step"]}


def explain_killed(run_dir: Path, why: str) -> None:
    """Record why the process was killed that trained a run, unless another one trains it by now.

    Raises:
        OSError: the receipt cannot be written.
        LabtrainError: the receipt is damaged, or cannot be written.
    """
    lock = open_lock(run_dir / LOCK)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (found := read(run_dir)) is not None and found["status"] == "running":
            close_killed(found, run_dir)
            found["status"] = "failed"
            found["segments"][-1] |= {"status": "failed", "why": why}
            write(run_dir, found)
    finally:
        os.close(lock)


@functools.cache
def _validator() -> Callable[[object], None]:
    """Return a validator for receipt.schema.json: 0.1 s to compile, then 0.3 ms for each receipt."""
    import fastjsonschema

    schema = json.loads(Path(__file__).with_name("receipt.schema.json").read_text())
    return cast(Callable[[object], None], fastjsonschema.compile(schema, use_default=False, detailed_exceptions=True))


def hold_against_schema(receipt: object, path: Path) -> None:
    """Check a receipt against its schema: a forged receipt can have a correct digest and a path as a name.

    Raises:
        DamagedError: names the first key that violates the schema.
    """
    import fastjsonschema

    try:
        _validator()(receipt)
    except fastjsonschema.JsonSchemaValueException as error:
        place = ".".join(map(str, error.path[1:])) or "its top level"
        said = str(error.message).removeprefix(str(error.name)).strip()
        raise DamagedError(
            f"{path}: {place} {said[:200]}, got {reprlib.repr(error.value)}",
            hint=f"this labtrain never writes such a receipt; {WRITER}, or ask for the receipt again",
        ) from error


def origin_digest(receipt: Receipt) -> str:
    """Return the digest of another run's checkpoint that a run begins from; empty for a run from step 0."""
    origin = receipt["segments"][0].get("origin")
    return origin["digest"] if origin else ""


def time_of(text: str) -> datetime:
    """Parse a time of `provenance.timestamp`, in UTC; raise ValueError if it is not a valid time."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{text}: {error}") from error


def runs_folder(root: Path | None = None) -> Path:
    """Return the folder of an experiment's runs: paths.runs in its conf/config.yaml, else its runs/.

    Args:
        root: the experiment's folder; None: that of the working directory. Outside an experiment it is ./runs.
    """
    root = root or enclosing(Path.cwd())
    if root is None:
        return Path("runs")
    import yaml

    with suppress(OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        runs = yaml.safe_load((root / "conf" / "config.yaml").read_text())["paths"]["runs"]
        return Path(re.sub(r"\$\{oc\.env:(\w+)(?:,([^{}]*))?\}", lambda each: _variable(each, root), runs))
    return root / "runs"


def _variable(reference: re.Match[str], root: Path) -> str:
    return os.environ.get(reference[1], reference[2] or "") if reference[1] != "LABTRAIN_ROOT" else str(root)


def find(target: str | Path, runs: Path | None = None) -> Path:
    """Return a run's folder, given the folder, or the run's id or the beginning of it (at least four digits).

    An id may follow its experiment's name: digits/906ca0.

    Anything else, and a path that exists, is returned unchanged.

    Args:
        target: what the user typed.
        runs: where to look for ids; None: `runs_folder`.

    Raises:
        ConfigError: no run has this id, or several have.
    """
    name, path = str(target), Path(target)
    if not is_id(name) or path.exists():
        return path
    runs = runs_folder() if runs is None else runs
    found = with_id(name, runs)
    if len(found) == 1:
        return found[0]
    listed = few([shown(each) for each in found or with_id("", runs)])
    if found:
        raise ConfigError(f"{name}: {len(found)} runs begin with it: {listed}", hint=f"for example {shown(found[-1])}")
    raise ConfigError(
        f"{name}: no run of this id in {shown(runs)}{f', which has {listed}' if listed else ''}",
        hint="labtrain ls lists the runs; name a run elsewhere by its folder",
    )


def is_id(name: str) -> bool:
    """Return whether a text can be a run's id or the beginning of it, also as EXPERIMENT/ID."""
    experiment, slash, last = name.rpartition("/")
    return bool(RUN_ID.fullmatch(last) or SHORT_ID.fullmatch(last)) and bool(
        EXPERIMENT.fullmatch(experiment) or not slash
    )


def with_id(name: str, runs: Path) -> list[Path]:
    """Return the folders of the runs of an id, else of those whose id begins with it."""
    experiment, _, last = name.rpartition("/")
    folder = glob.escape(experiment) or "*"
    there = sorted(file.parent for file in runs.glob(f"{folder}/{last}*/{FILE}") if RUN_ID.fullmatch(file.parent.name))
    return [each for each in there if each.name == last] or there


def read(run_dir: Path) -> Receipt | None:
    """Return the valid receipt of a run's folder; None if there is no receipt.

    Its names are safe to use: ids and names are single path components, and the code's folder is in its repository.

    Raises:
        DamagedError: the receipt is broken, changed, or does not match its schema.
        ConfigError: this user may not read it.
    """
    path = run_dir / FILE
    hint = f"mv {quoted(run_dir)} {quoted(f'{run_dir}.broken')}   # or train a new run: resume=never"
    try:
        receipt = untrusted.loads(untrusted.read(path))
        schema, said = receipt["schema"], receipt.get("digest")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise not_readable(run_dir) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is broken: {untrusted.reason(error)}", hint=hint) from error
    if schema != SCHEMA or said is None:  # before 0.1 there was no digest
        what = f"has schema {schema!r}" if schema != SCHEMA else "has no digest to check it by"
        raise DamagedError(f"{path} {what}, but this labtrain reads only {SCHEMA!r} with a digest", hint=WRITER)
    if said != (found := exact_json.digest_of(as_options(receipt))):
        raise DamagedError(
            f"{path} was changed after it was written: its digest is {found[:12]}, but it records {str(said)[:12]}",
            hint=hint,
        )
    hold_against_schema(receipt, path)
    times = [segment[key] for segment in receipt["segments"] for key in ("started", "ended") if segment[key]]
    try:
        for text in times:
            time_of(text)
    except ValueError as error:
        raise DamagedError(f"{path}: not a valid time: {error}", hint=hint) from error
    if receipt["status"] == "complete":
        steps = receipt["results"]["steps"]
        for segment in receipt["segments"]:
            if segment["from_step"] > steps:
                raise DamagedError(
                    f"{path}: a segment begins at step {segment['from_step']}, but the run has {steps} steps", hint=hint
                )
    return cast(Receipt, dict(receipt))
