"""verified.jsonl, next to a receipt: one line for each time that somebody ran it again. No torch.

A line is a claim of whoever could write the file. A signed line (`labtrain verify --key`) is a claim of the key's
owner. The signature covers the line without it, as JSON with sorted keys and no spaces: the receipt's digest, the
result, the steps, the machine and the time. A line counts as a verification only if the reader knows the signer's key.
All other lines are shown as claims.
"""

import getpass
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain import __version__
from labtrain.base.console import quoted, shown
from labtrain.base.contracts import Hardware, Options
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.base.permissions import open_inside
from labtrain.base.untrusted import RECORD_BYTES, reason
from labtrain.record.provenance import timestamp
from labtrain.record.receipt import Receipt, time_of
from labtrain.review.signature import VERDICT, Signature, check_text, sign_text, whose

VERIFIED = "verified.jsonl"
NOT_SIGNED = "it is not signed"
MOST_CHECKED = 50  # signatures in one file: each starts ssh-keygen three times
TEXTS = ("when", "by", "host", "cpu", "labtrain", "receipt", "found")
KINDS = {**dict.fromkeys(TEXTS, str), "gpus": list, "from_step": int, "to_step": int, "whole": bool}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """One line of verified.jsonl.

    Attributes:
        when: in UTC.
        by: a user name.
        host: the machine's name.
        cpu: its processor.
        gpus: names of its GPUs.
        labtrain: the version.
        receipt: the digest of the verified receipt; the line says nothing about another one.
        from_step: the step that the rerun began from.
        to_step: the last step that was the same.
        whole: from the beginning to the end.
        same: whether the bits were the same; None if nothing was trained.
        found: the result as a sentence.
        signer: the allowed signer who signed the line.
        doubt: why it is only a claim; empty if there is a signer.
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
    signer: Signature | None = None
    doubt: str = NOT_SIGNED


def note(
    run_dir: Path,
    receipt: Receipt,
    *,
    hardware: Hardware,
    from_step: int,
    to_step: int,
    whole: bool,
    same: bool | None,
    found: str,
    key: Path | None = None,
) -> None:
    """Append a verification with this user, machine and time; warn if it cannot be written or signed."""
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
    if key is not None:
        try:
            line["signature"] = sign_text(_signed(line), key=key, purpose=VERDICT)
        except LabtrainError as error:
            sys.stderr.write(f"warning: {error.args[0]}: the verdict is not signed\n")
    try:
        with open_inside(run_dir, VERIFIED, flags=os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            file.write((json.dumps(line) + "\n").encode())
    except (OSError, DamagedError) as error:
        why = f"{shown(run_dir / VERIFIED)}: {error.strerror}" if isinstance(error, OSError) else error.args[0]
        sys.stderr.write(f"warning: {why}: the verdict is not recorded\n")


def check_key(key: Path) -> None:
    """Raise LabtrainError if a key cannot sign, before hours of training."""
    sign_text(b"", key=key, purpose=VERDICT)


def read_verifications(run_dir: Path, *, digest: str = "", signers: Path | None = None) -> list[Verification]:
    """Read verified.jsonl, newest line first; empty if there is no file.

    Args:
        run_dir: the run's folder.
        digest: of the receipt; signatures are checked only on its lines.
        signers: an allowed signers file. None: git's.

    Raises:
        DamagedError: the file is broken, or not a regular file.
    """
    path = run_dir / VERIFIED
    aside = f"mv {quoted(path)} {quoted(f'{path}.broken')}"
    try:
        with open_inside(run_dir, VERIFIED) as file:
            if (size := os.fstat(file.fileno()).st_size) > RECORD_BYTES:
                raise DamagedError(f"{shown(path)} has {size:,} bytes, at most {RECORD_BYTES:,} expected", hint=aside)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    try:
        entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        found = [(_parsed(entry), entry) for entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{shown(path)} is broken: {reason(error)}", hint=aside) from error
    newest_first = sorted(found, key=lambda pair: pair[0].when)[::-1]  # within one second, by line
    return list(_checked(newest_first, digest, signers))


def _checked(
    found: Iterable[tuple[Verification, dict[str, object]]], digest: str, signers: Path | None
) -> Iterable[Verification]:
    """Yield verifications, each with its signer or with the reason why it is only a claim."""
    left = MOST_CHECKED
    for line, entry in found:
        signature = entry.get("signature")
        if not isinstance(signature, str):
            yield line
        elif line.receipt != digest or not left:
            yield replace(line, doubt="its signature is not checked")
        else:
            left -= 1
            try:
                yield replace(line, signer=_signer(entry, signature, signers), doubt="")
            except LabtrainError as error:
                yield replace(line, doubt=str(error.args[0]))


def _signer(entry: dict[str, object], signature: str, signers: Path | None) -> Signature:
    """Return the allowed signer who signed a line.

    Raises:
        LabtrainError: there is no known signer; says why.
    """
    with TemporaryDirectory(prefix="labtrain-") as folder:
        file = Path(folder, "sig")
        file.write_bytes(signature.encode(errors="replace"))
        text = _signed(entry)
        fingerprint, wrong = check_text(text, file, purpose=VERDICT)
        if wrong:
            raise DamagedError("its signature does not match this line: one of the two was changed")
        return whose(text, file, fingerprint, purpose=VERDICT, signers=signers, name="its signature")


def _signed(line: dict[str, object]) -> bytes:
    """Return what a line's signature covers: `jq -cSj 'del(.signature)'`."""
    rest = {key: value for key, value in line.items() if key != "signature"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def _parsed(entry: Options) -> Verification:
    """Parse a line.

    Raises:
        KeyError, TypeError, ValueError: a key is missing or has the wrong type.
    """
    for key, kind in KINDS.items():
        if type(entry[key]) is not kind:
            raise TypeError(f"{key}: {entry[key]!r}"[:200])
    if not isinstance(same := entry["same"], bool | None) or not all(type(gpu) is str for gpu in entry["gpus"]):
        raise TypeError(f"same: {same!r}, gpus: {entry['gpus']!r}"[:200])
    return Verification(**{key: entry[key] for key in KINDS} | {"same": same, "when": time_of(entry["when"])})


def _user() -> str:
    with suppress(KeyError, OSError):  # in a container the user may have no entry
        return getpass.getuser()
    return str(os.getuid())
