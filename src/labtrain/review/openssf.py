"""Sign a run as OpenSSF model signing does, so that its tool verifies it: `model_signing verify key`. No torch.

The format is that of model_signing 1.1 (https://github.com/sigstore/model-transparency): a Sigstore bundle with a DSSE
envelope of an in-toto statement, which has the sha256 of each signed file, signed by an elliptic curve key. Signed are
the files that don't change once the run has ended: receipt, trail, configuration, patch and checkpoints.
"""

import base64
import getpass
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, cast

from labtrain.base.console import quoted, shown
from labtrain.base.errors import LabtrainError
from labtrain.base.files import sha256_of, write_atomically
from labtrain.base.permissions import open_inside
from labtrain.base.untrusted import read
from labtrain.record import receipt
from labtrain.record.provenance import PATCH
from labtrain.record.trail import TRAIL
from labtrain.review.signature import check_ended

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

SIGNATURE = "model.sig"
SIGNED = (receipt.FILE, TRAIL, "config.yaml", PATCH)
CHECKPOINTS = "checkpoints"
# Written later, or by others; the signature names them, so that the tool ignores them.
UNSIGNED = (SIGNATURE, "receipt.json.sig", "verified.jsonl", "note.txt", "predictions.pt", receipt.LOCK, receipt.SIGN,
            "checkpoints/.writer.json", "spool")  # fmt: skip
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
LONGEST_KEY = 1 << 20


def sign_model(run_dir: Path, *, key: Path) -> Path:
    """Sign a run's files with an elliptic curve key and return the signature's file; an older one is replaced.

    Args:
        run_dir: the run's folder.
        key: a private key of P-256, P-384 or P-521, as PEM.

    Raises:
        DamagedError: the receipt cannot be trusted, or a file is a link.
        LabtrainError: the run is being trained, or the key cannot be used.
    """
    check_ended(run_dir)
    private = _private_key(key)
    files = {name: _sha256(run_dir, name) for name in sorted(_signed(run_dir))}
    target = run_dir / SIGNATURE
    try:
        write_atomically(target, _bundle(_statement(run_dir, files), private))
    except OSError as error:
        raise LabtrainError(f"{shown(target)}: {error.strerror}", hint=f"ls -ld {quoted(run_dir)}") from error
    return target


def _signed(run_dir: Path) -> Iterator[str]:
    """Yield the names of the files to sign."""
    yield from (name for name in SIGNED if (run_dir / name).exists())
    for folder, folders, files in os.walk(run_dir / CHECKPOINTS):
        folders[:] = [name for name in folders if ".writing-" not in name]
        names = ((Path(folder) / name).relative_to(run_dir).as_posix() for name in files)
        yield from (name for name in names if name not in UNSIGNED)


def _unsigned(run_dir: Path) -> list[str]:
    """Return what is in the folder and not signed, and what may come later."""
    here = (path.name for path in run_dir.iterdir() if path.name not in (*SIGNED, CHECKPOINTS))
    inside = (path.relative_to(run_dir).as_posix() for path in (run_dir / CHECKPOINTS).glob("*.writing-*"))
    return sorted({*UNSIGNED, *here, *inside})


def _sha256(run_dir: Path, name: str) -> str:
    with open_inside(run_dir, name) as file:
        return sha256_of(cast(BufferedReader, file))


def _statement(run_dir: Path, files: dict[str, str]) -> bytes:
    """Return the in-toto statement about the files: names, sha256, and one sha256 over these in their order."""
    whole = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False,
                     "ignore_paths": _unsigned(run_dir)}  # fmt: skip
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in files.items()]
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": run_dir.resolve().name, "digest": {"sha256": whole}}],
        "predicateType": PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    return json.dumps(statement, sort_keys=True).encode()


def _bundle(statement: bytes, key: "EllipticCurvePrivateKey") -> str:
    """Return the Sigstore bundle: the statement, its signature, and the sha256 of the public key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    algorithm = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]
    # DSSE's pre-authentication encoding: https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
    encoded = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(statement)} ".encode() + statement
    signature = key.sign(encoded, ECDSA(algorithm))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(public).hexdigest()}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(statement).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle) + "\n"


def _private_key(path: Path) -> "EllipticCurvePrivateKey":
    """Read a private key; ask for its passphrase on a terminal.

    Raises:
        LabtrainError: it cannot be read, is of another kind, or has a passphrase that is wrong or cannot be asked for.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError as error:
        raise LabtrainError(
            "signing for model_signing needs the package cryptography", hint="make setup, in an experiment"
        ) from error
    new = _new_key(path)
    make = f"openssl ecparam -name prime256v1 -genkey -noout -out {quoted(new)}; then --model-signing {quoted(new)}"
    bare = (
        f"start it on a terminal, which asks for it; or without one: openssl pkey -in {quoted(path)} -out {quoted(new)}"
    )
    try:
        pem = read(path, LONGEST_KEY)
        secret = None
        if b"ENCRYPTED" in pem and sys.stdin.isatty():
            secret = getpass.getpass(f"Passphrase of {shown(path)}: ").encode()
        key = load_pem_private_key(pem, secret)
    except OSError as error:
        raise LabtrainError(f"{shown(path)}: {error.strerror}", hint=make) from error
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        locked = b"ENCRYPTED" in pem
        said = "its passphrase is missing or wrong" if locked else "it is not a private key in PEM"
        raise LabtrainError(f"{shown(path)}: {said}", hint=bare if locked else make) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise LabtrainError(f"{shown(path)} must be a key of P-256, P-384 or P-521", hint=make)
    return key


def _new_key(path: Path) -> Path:
    """Return the name of a file that does not exist yet, for a new key: the one that was named, or another one here."""
    names = (path, *(Path(f"model-signing{number}.pem") for number in ("", *range(2, 1000))))
    return next((each for each in names if not os.path.lexists(each) and each.parent.is_dir()), Path("new.pem"))
