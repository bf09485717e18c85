"""The receipt: what a run leaves behind for whoever checks it. Schema ``labtrain/receipt/1``, receipt.schema.json.

One JSON file a run, written whole by the first process of rank 0 and replaced atomically at each change of status:
``running``, then ``interrupted``, ``complete`` or ``failed``. It ends with its own digest: a change by hand or by a
disk is found, one by somebody who writes the digest anew is not.

What looks like a credential is never in it: values of keys that name one, and texts in the forms that the large
services give theirs.
"""

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from labtrain.base import exact_json
from labtrain.base.errors import DamagedError, not_readable

SCHEMA = "labtrain/receipt/1"
FILE = "receipt.json"
LOCK = ".lock"  # a record lock, beside it: held by the process that trains the run (recorder.py)
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

# Names of keys and variables whose values are credentials; and values that are, whatever their key.
SECRET_KEY = re.compile(
    r"(?:^|[_.\-])(?:token|secret|passw(?:or)?d|pwd|api_?key|access_?key(?:_?id)?|secret_?key|private_?key|account_?key|credentials?"
    r"|auth|authorization|connection_?string)$",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_\w{20,}|sk-[\w-]{20,}"
    r"|xox[abposr]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
MARKER = re.compile(r"[\[<].*[\]>]")  # "[PAD]" under model.pad_token is no credential
NOT_RECORDED = "(not recorded)"

Receipt = dict[str, Any]


def write(run_dir: Path, receipt: Receipt) -> None:
    """Replace the run's receipt in one step, with its digest: a reader sees the old one or the new one, whole."""
    assert tuple(receipt) == KEYS
    assert receipt["status"] in STATUSES
    receipt["digest"] = digest_of(receipt)
    write_atomically(run_dir / FILE, exact_json.dumps(receipt, indent=1) + "\n")


def digest_of(receipt: Receipt) -> str:
    """Return the sha256 over a receipt without its own digest: JSON with sorted keys and no spaces, in ASCII."""
    rest = {key: value for key, value in receipt.items() if key != "digest"}
    return hashlib.sha256(exact_json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def without_secrets(node: Any, *, secret: bool = False) -> Any:
    """Return nested dicts, lists and texts without what looks like a credential.

    Args:
        node: what a receipt is to hold.
        secret: it stands under a key that names one, so that each text in it is one.
    """
    if isinstance(node, dict):
        return {key: without_secrets(value, secret=secret or names_a_secret(str(key))) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_secrets(value, secret=secret) for value in node]
    if not isinstance(node, str) or not node:
        return node
    name, sign, value = node.partition("=")  # an override, as it was typed
    if sign and value and " " not in name and names_a_secret(name) and not MARKER.fullmatch(value):
        return f"{name}={NOT_RECORDED}"
    if secret and not MARKER.fullmatch(node):
        return NOT_RECORDED
    return SECRET_VALUE.sub(NOT_RECORDED, node)


def names_a_secret(key: str) -> bool:
    """Return whether what stands under a key, or in a variable of this name, is a credential."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # openaiApiKey
    return SECRET_KEY.search(words) is not None


def hold_against_schema(receipt: Receipt, run_dir: Path) -> None:
    """Hold a receipt against receipt.schema.json: what somebody else wrote may have a right digest and lack a key.

    Raises:
        DamagedError: names the first place that is not as the schema says.
    """
    import jsonschema

    schema = json.loads(Path(__file__).with_name("receipt.schema.json").read_text())
    first = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(receipt)), None)
    if first is not None:
        place = ".".join(map(str, first.absolute_path)) or "its top level"
        raise DamagedError(
            f"{run_dir / FILE} is not what its schema says, at {place}: {first.message[:200]}",
            hint="take it from where it was written",
        )


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read(run_dir: Path) -> Receipt | None:
    """Return the receipt of a run folder; None if there is none.

    Raises:
        DamagedError: it is there and cannot be trusted: broken JSON, another schema, a field missing.
        ConfigError: this user may not read it.
    """
    path = run_dir / FILE
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise not_readable(run_dir) from None
    hint = f"mv {run_dir} {run_dir}.broken   # or start anew beside it: resume=never"
    try:
        receipt = exact_json.loads(text)
        schema, missing = receipt["schema"], sorted(set(KEYS) - set(receipt))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is broken: {error!r}", hint=hint) from error
    if schema != SCHEMA:
        hint = "install the labtrain that wrote it: the wheel is in the experiment's vendor/"
        raise DamagedError(f"{path}: schema {schema!r}, this labtrain reads {SCHEMA!r}", hint=hint)
    if missing or receipt["status"] not in STATUSES:
        wrong = f"without {', '.join(missing)}" if missing else f"with status {receipt['status']!r}"
        raise DamagedError(f"{path} is broken: {wrong}", hint=hint)
    if receipt["digest"] != (found := digest_of(receipt)):
        said = str(receipt["digest"])[:12]
        raise DamagedError(
            f"{path} was changed after it was written: its digest is {found[:12]}, it says {said}", hint=hint
        )
    return dict(receipt)
