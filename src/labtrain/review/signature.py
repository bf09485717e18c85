"""Sign receipts with OpenSSH keys, as git signs commits (ssh-keygen(1), -Y; PROTOCOL.sshsig).

A receipt's signature is a file next to it, over its bytes. A verdict's signature is in its line (verdicts.py). An
allowed signers file says who may sign; it can be the one for the lab's commits. git's settings are read in the working
directory, never in the run's folder, which may be untrusted and could name its own signers.
"""

import base64
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain.base.console import quoted, shown
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.files import write_atomically
from labtrain.base.git import ask_git
from labtrain.base.untrusted import damage_of, read
from labtrain.record import receipt

FILE = f"{receipt.FILE}.sig"
LONGEST = 1 << 20  # maximum size of a signature, in bytes
NAMESPACE = "labtrain-receipt"  # a signature for another purpose does not count
VERDICT = "labtrain-verification"
BATCH_TIMEOUT_S = 60.0  # for an agent, or a hardware key that waits for a touch


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """A checked signature.

    Attributes:
        principal: the signer's name in the allowed signers file.
        fingerprint: of the signer's key: SHA256:...
    """

    principal: str
    fingerprint: str


def sign(run_dir: Path, *, key: Path | None) -> Path:
    """Sign a run's receipt and return the signature's file; an older signature is replaced.

    Args:
        run_dir: the run's folder.
        key: a private key, or a public key whose private half an agent holds. None: the key that git signs commits
            with, if it is an SSH key, else ~/.ssh/id_ed25519.

    Raises:
        DamagedError: the receipt cannot be trusted.
        LabtrainError: the run is being trained, or the key cannot be used.
    """
    check_ended(run_dir)
    signature = run_dir / FILE
    text = sign_text(read(run_dir / receipt.FILE), key=key, purpose=NAMESPACE)
    try:
        write_atomically(signature, text)
    except OSError as error:
        raise LabtrainError(f"{shown(signature)}: {error.strerror}", hint=f"ls -ld {quoted(signature)}") from error
    return signature


def check_ended(run_dir: Path) -> None:
    """Raise LabtrainError if a folder is not a run, or its receipt will still change."""
    found = receipt.read(run_dir)
    if found is None:
        raise ConfigError(f"{shown(run_dir)} is not a run: looked for {receipt.FILE}", hint="labtrain ls lists runs")
    if found["status"] == "running":
        raise LabtrainError(
            f"{shown(run_dir)} is still training, or was killed: its receipt will change",
            hint="wait until it ends, or resume it with the same command; then sign",
        )


def sign_text(text: bytes, *, key: Path | None, purpose: str) -> str:
    """Return an armored signature of a text.

    Args:
        text: what to sign.
        key: as in `sign`.
        purpose: a namespace of ssh-keygen; the signature is valid only for it.

    Raises:
        LabtrainError: the key cannot be used.
    """
    with TemporaryDirectory(prefix="labtrain-") as folder:
        # Sign a copy: for a file that is already signed, ssh-keygen asks whether to replace the signature.
        copy = Path(folder, "text")
        copy.write_bytes(text)
        path = key or _usual_key(Path(folder))
        done = _ssh_keygen("sign", "-f", str(path), str(copy), purpose=purpose, may_ask=sys.stdin.isatty())
        if done.returncode != 0:
            said = done.stderr.strip().replace(str(copy), "it")
            locked = "passphrase" in said or "No private key" in said
            raise LabtrainError(f"{path} cannot sign: {said}", hint=f"ssh-add {path}" if locked else "--key FILE")
        return copy.with_name("text.sig").read_text()


def check_signature(run_dir: Path, *, signers: Path | None) -> Signature | None:
    """Return who signed a run's receipt; None if it is not signed.

    Args:
        run_dir: the run's folder.
        signers: an allowed signers file. None: git's.

    Raises:
        DamagedError: the signature does not belong to these bytes.
        LabtrainError: the signer is not allowed, or there is no allowed signers file.
    """
    file = run_dir / FILE
    try:
        with damage_of(shown(file), hint=f"mv {quoted(file)} {quoted(f'{file}.broken')}"):
            read(file, LONGEST)  # ssh-keygen would wait for a pipe
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        text = read(run_dir / receipt.FILE)
    except OSError as error:
        raise DamagedError(f"{shown(file)} exists, but no {receipt.FILE}", hint="labtrain ls lists runs") from error
    fingerprint, wrong = check_text(text, file, purpose=NAMESPACE)
    if wrong:
        raise DamagedError(
            f"{shown(file)} is not a signature of this {receipt.FILE}: {wrong}",
            hint=f"one of them was changed; if the run was resumed since: labtrain sign {quoted(shown(run_dir))}",
        )
    return whose(text, file, fingerprint, purpose=NAMESPACE, signers=signers, name=shown(file))


def check_text(text: bytes, file: Path, *, purpose: str) -> tuple[str, str]:
    """Return (fingerprint of the key, "") if a signature belongs to a text; else ("", what is wrong)."""
    done = _ssh_keygen("check-novalidate", "-s", str(file), purpose=purpose, text=text)
    return (done.stdout.split()[-1], "") if done.returncode == 0 else ("", done.stderr.strip() or "not a signature")


def whose(text: bytes, file: Path, fingerprint: str, *, purpose: str, signers: Path | None, name: str) -> Signature:
    """Return which allowed signer made a checked signature.

    Args:
        text: the signed text.
        file: contains the signature.
        fingerprint: of its key.
        purpose: the signature's namespace.
        signers: an allowed signers file. None: git's.
        name: of the signature, for errors.

    Raises:
        LabtrainError: no allowed signer made it, or there is no allowed signers file.
    """
    allowed = signers or _usual_signers()
    if not allowed.is_file():
        raise LabtrainError(f"{allowed}: no such file (allowed signers)", hint="--signers FILE")
    done = _ssh_keygen("find-principals", "-s", str(file), "-f", str(allowed), purpose=purpose)
    for principal in done.stdout.splitlines():
        done = _ssh_keygen("verify", "-f", str(allowed), "-I", principal, "-s", str(file), purpose=purpose, text=text)
        if done.returncode == 0:
            return Signature(principal=principal, fingerprint=fingerprint)
    public = _public_key(file)
    if public.split()[-1] in allowed.read_text():  # expired, not yet valid, or for other namespaces
        raise LabtrainError(
            f"{name}: {allowed} does not allow the key {fingerprint} to sign this: {done.stderr.strip()}",
            hint=f"sign with another key, or change the key's options in {allowed}",
        )
    raise LabtrainError(
        f"{name}: made with the key {fingerprint}, which is not in {allowed}",
        hint=f'if you know its owner, add to {allowed}: NAME@HOST namespaces="{purpose}" {public}',
    )


def _usual_key(scratch: Path) -> Path:
    """Return the key that git signs with, else the default; a key given by value is written to `scratch`."""
    configured = ask_git(".", "config", "--get", "user.signingkey").strip()
    if configured and ask_git(".", "config", "--get", "gpg.format").strip() == "ssh":
        if configured.startswith(("key::", "ssh-")):
            public = scratch / "key.pub"
            public.write_text(configured.removeprefix("key::") + "\n")
            return public
        return Path(configured).expanduser()
    usual = Path("~/.ssh/id_ed25519").expanduser()
    if not usual.exists():
        raise LabtrainError(
            f"no key to sign with: looked for {usual}, and git's user.signingkey with gpg.format=ssh",
            hint="ssh-keygen -t ed25519, or labtrain sign RUN --key FILE",
        )
    return usual


def _usual_signers() -> Path:
    """Return git's allowed signers file; a relative path begins at the working tree, as in git."""
    configured = ask_git(".", "config", "--type=path", "--get", "gpg.ssh.allowedSignersFile").strip()
    if not configured:
        raise LabtrainError(
            "cannot check the signature: no allowed signers, and git has no gpg.ssh.allowedSignersFile",
            hint="--signers FILE, or git config --global gpg.ssh.allowedSignersFile FILE",
        )
    return Path(ask_git(".", "rev-parse", "--show-toplevel").strip(), configured)


def _public_key(signature: Path) -> str:
    """Return the public key in a signature, as written in an allowed signers file."""
    blob = base64.b64decode("".join(signature.read_text().strip().splitlines()[1:-1]))
    key, _ = _field(blob[10:])  # after the magic SSHSIG and a version of four bytes
    return f"{_field(key)[0].decode()} {base64.b64encode(key).decode()}"


def _field(blob: bytes) -> tuple[bytes, bytes]:
    """Return the first string of SSH's wire format, and the rest (RFC 4251, section 5)."""
    end = 4 + int.from_bytes(blob[:4])
    return blob[4:end], blob[end:]


def _ssh_keygen(
    action: str, *arguments: str, purpose: str, text: bytes | None = None, may_ask: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `ssh-keygen -Y`; it can ask for a passphrase only if `may_ask`.

    Otherwise it gets a session without a terminal, because it would open the terminal and wait.
    """
    namespace = [] if action == "find-principals" else ["-n", purpose]
    command = ["ssh-keygen", "-Y", action, *namespace, *arguments]
    try:
        done = subprocess.run(
            command,
            input=None if may_ask else text or b"",
            capture_output=True,
            check=False,
            start_new_session=not may_ask,
            timeout=None if may_ask else BATCH_TIMEOUT_S,
            env=os.environ if may_ask else os.environ | {"SSH_ASKPASS_REQUIRE": "never"},
        )
    except FileNotFoundError as error:
        raise LabtrainError("ssh-keygen is not installed", hint="apt-get install openssh-client") from error
    except subprocess.TimeoutExpired as error:
        raise LabtrainError(f"ssh-keygen did not answer for {BATCH_TIMEOUT_S:.0f} s", hint="ssh-add -l") from error
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(command, done.returncode, out, err)
