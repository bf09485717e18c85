"""Which server is the one that was meant: known_hosts files, read as OpenSSH reads them (sshd(8), hostfile.c).

paramiko ends at a line that it does not understand, and knows neither patterns nor certificates. Here a line that is
none is passed over. A ``@revoked`` key is refused; a key that a ``@cert-authority`` has signed is taken while its
certificate holds (PROTOCOL.certkeys); every other key must stand in a line of its host. No torch.
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labtrain.base.errors import StoreError

USERS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
GLOBAL = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
HOST_CERTIFICATE = 2
CERTIFIED = "-cert-v01@openssh.com"
NUMBERS = {"ssh-ed25519": 1, "ssh-rsa": 2, "ssh-dss": 4}  # of strings that a public key has; of ecdsa 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line that is of the host.

    Attributes:
        where: its file and number.
        marker: revoked, cert-authority, or empty.
        kind: of key.
        blob: the key, in SSH's wire format.
    """

    where: str
    marker: str
    kind: str
    blob: bytes


class KnownHosts:
    """What is known of one host.

    Args:
        host: its name, as ssh looks it up: after HostName, or HostKeyAlias.
        port: that it listens on.
        config: of ssh, for this host.
    """

    def __init__(self, host: str, port: int, config: Mapping[str, Any]) -> None:
        self.host, self.port = host.lower(), port
        alias = config.get("hostkeyalias")
        self.name = alias.lower() if alias else self.host if port == 22 else f"[{self.host}]:{port}"
        users, everybodys = config.get("userknownhostsfile", USERS), config.get("globalknownhostsfile", GLOBAL)
        self.files = [*_paths(users), *_paths(everybodys)]
        revoked = config.get("revokedhostkeys", "none")
        self.revoked = [] if revoked == "none" else [Path(revoked).expanduser()]
        self.lines = [line for path in self.files for line in _lines(path, self.name)]
        # A server on another port than 22 may be known by its name alone, where nothing is known of the port.
        self.less = [] if self.name == self.host or alias else [
            line for path in self.files for line in _lines(path, self.host)
        ]  # fmt: skip

    def kinds(self, offered: tuple[str, ...]) -> tuple[str, ...]:
        """Return kinds of key in the order in which the server is asked for them: first those that are known of it."""
        of_authorities = any(line.marker == "cert-authority" for line in self.lines + self.less)
        known = {line.kind for line in self.lines if not line.marker} or {line.kind for line in self.less}

        def rank(kind: str) -> int:
            if kind.endswith(CERTIFIED):
                return 0 if of_authorities else 3
            return 1 if ("ssh-rsa" if kind.startswith("rsa-") else kind) in known else 2

        return tuple(sorted(offered, key=rank))

    def check(self, blob: bytes) -> None:
        """Refuse a server whose key, or certificate, is not known.

        Raises:
            StoreError: says what was found, where another key stands, and what to do.
        """
        try:
            kind, key, certificate = _opened(blob)
        except ValueError as error:
            raise StoreError(f"{self.name} shows a key that is none: {error}", hint=f"ssh {self.host}") from error
        self._refuse_revoked([key] if certificate is None else [key, certificate.authority])
        why = ""
        if certificate is not None:
            authorities = [line.blob for line in self.lines + self.less if line.marker == "cert-authority"]
            if certificate.authority in authorities:
                why = certificate.wrong(self.host if self.name.startswith("[") else self.name)
                if not why:
                    return
        plain = [line for line in self.lines if not line.marker]
        if any(line.blob == key for line in plain or self.less if not line.marker):
            return
        shown = f"{kind} key {fingerprint(key)}"
        if plain:
            places = ", ".join(f"{line.where} ({line.kind} {fingerprint(line.blob)})" for line in plain)
            raise StoreError(
                f"{self.name} shows the {shown}, and another is known for it: {places}: the server was set up anew, or"
                " somebody stands in between",
                hint=f"ask the administrator of {self.host} for its key's fingerprint before anything else",
            )
        raise StoreError(
            f"{self.name} shows the {shown}, which does not stand in {' or '.join(map(str, self.files)) or 'any file'}"
            + (f"; its certificate: {why}" if why else ""),
            hint=f"ssh -p {self.port} {self.host}: it asks whether that is the fingerprint; compare it with your"
            " administrator's",
        )

    def _refuse_revoked(self, keys: list[bytes]) -> None:
        places = [line.where for line in self.lines + self.less if line.marker == "revoked" and line.blob in keys]
        for path in self.revoked:
            try:
                text = path.read_bytes()
            except OSError as error:
                raise StoreError(f"RevokedHostKeys {path}: {error.strerror}", hint=f"ls -l {path}") from error
            if text.startswith(b"SSHKRL\n"):
                raise StoreError(
                    f"RevokedHostKeys {path} is a KRL; a list of keys can be read", hint="docs/guides/storage.md"
                )
            blobs = (_key(line.split()) for line in text.decode(errors="replace").splitlines())
            places += [str(path) for found in blobs if found is not None and found[1] in keys]
        if places:
            raise StoreError(
                f"{self.name} shows a key that is revoked: {places[0]}",
                hint=f"ask the administrator of {self.host}: whoever has the key can pass for the server",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """A certificate of a host's key, with what its authority says of it.

    Attributes:
        kind: 2 of a host, 1 of a user.
        principals: names of hosts; none: of every host.
        after: the first second since the epoch at which it holds.
        before: the first at which it does not.
        critical: options that whoever does not know them must not pass over.
        authority: the key that has signed.
        signed: what was signed.
        signature: of the authority.
    """

    kind: int
    principals: list[str]
    after: int
    before: int
    critical: bytes
    authority: bytes
    signed: bytes
    signature: bytes

    def wrong(self, host: str) -> str:
        """Return why it is none for a host now; empty where it is one."""
        now = int(time.time())
        if self.kind != HOST_CERTIFICATE:
            return "it is a user's, not a host's"
        if self.principals and host not in self.principals:
            return f"it is of {', '.join(self.principals)}"
        if not self.after <= now < self.before:
            return "it does not hold yet" if now < self.after else "it has expired"
        if self.critical:
            return "it has critical options, of which hosts have none"
        return "" if _verifies(self.authority, self.signed, self.signature) else "its signature is wrong"


def fingerprint(blob: bytes) -> str:
    """Return a key's fingerprint as ssh shows it."""
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def _paths(text: str) -> list[Path]:
    """Return the files that an option of ssh names, those that are there; `none` is none."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    home = str(Path("~").expanduser())
    words = [text] if Path(text).expanduser().is_file() else words  # paramiko takes the quotes of a single one away
    named = [Path(os.path.expandvars(word.replace("%d", home))).expanduser() for word in words if word != "none"]
    return [path for path in named if path.is_file()]


def _lines(path: Path, name: str) -> Iterator[Line]:
    """Yield the lines of a file that are of a host, without those that are none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    for number, line in enumerate(text.split("\n"), 1):
        words = re.split("[ \t]+", line.strip(" \t\r"))
        if not words[0] or words[0].startswith("#"):
            continue
        marker = words.pop(0)[1:] if words[0].startswith("@") else ""
        if marker not in ("", "revoked", "cert-authority") or not words:
            continue
        found = _key(words[1:])
        if found is not None and _is_of(words[0], name):
            yield Line(where=f"{path}:{number}", marker=marker, kind=found[0], blob=found[1])


def _key(words: list[str]) -> tuple[str, bytes] | None:
    """Return (kind, blob) of a public key's words, None where they are none."""
    if len(words) < 2 or words[0].startswith("#"):
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
        kind, _ = _string(blob)
    except (binascii.Error, ValueError):
        return None
    return (words[0], blob) if kind.decode(errors="replace") == words[0] else None


def _is_of(names: str, name: str) -> bool:
    """Return whether a line's names are of a host: hashed, or patterns of which one that is negated ends it."""
    if names.startswith("|"):
        try:
            _, kind, salt, digest = names.split("|")
            sha = hmac.new(base64.b64decode(salt), name.encode(), "sha1").digest()
            return kind == "1" and hmac.compare_digest(sha, base64.b64decode(digest))
        except ValueError:
            return False
    patterns = names.lower().split(",")
    if any(each.startswith("!") and _matches(each[1:], name) for each in patterns):
        return False
    return any(_matches(each, name) for each in patterns if not each.startswith("!"))


def _matches(pattern: str, name: str) -> bool:
    """Match as ssh_config(5) has patterns: `*` and `?`, no brackets."""
    parts = {"*": ".*", "?": "."}
    return re.fullmatch("".join(parts.get(each) or re.escape(each) for each in pattern), name, re.DOTALL) is not None


def _opened(blob: bytes) -> tuple[str, bytes, Certificate | None]:
    """Return (kind, plain key, certificate or None) of what a server shows."""
    name, rest = _string(blob)
    kind = name.decode()
    if not kind.endswith(CERTIFIED):
        return kind, blob, None
    kind = kind.removesuffix(CERTIFIED)
    _, rest = _string(rest)  # the nonce
    key = _wire(kind.encode())
    for _ in range(NUMBERS.get(kind, 2)):
        part, rest = _string(rest)
        key += _wire(part)
    rest = rest[8:]  # the serial number
    number, rest = int.from_bytes(rest[:4]), rest[4:]
    _, rest = _string(rest)  # the key's name
    names, rest = _string(rest)
    after, before, rest = int.from_bytes(rest[:8]), int.from_bytes(rest[8:16]), rest[16:]
    critical, rest = _string(rest)
    _, rest = _string(rest)  # extensions
    _, rest = _string(rest)  # reserved
    authority, rest = _string(rest)
    signed = blob[: len(blob) - len(rest)]
    signature, _ = _string(rest)
    principals = []
    while names:
        each, names = _string(names)
        principals.append(each.decode(errors="replace"))
    return kind, key, Certificate(kind=number, principals=principals, after=after, before=before, critical=critical,
                                  authority=authority, signed=signed, signature=signature)  # fmt: skip


def _verifies(key: bytes, text: bytes, signature: bytes) -> bool:
    from paramiko import Message, PKey

    kind, _ = _string(key)
    name, _ = _string(signature)
    if name == b"ssh-rsa":  # SHA-1
        return False
    try:
        return bool(PKey.from_type_string(kind.decode(), key).verify_ssh_sig(text, Message(signature)))
    except Exception:  # whatever it is, it is no signature
        return False


def _string(blob: bytes) -> tuple[bytes, bytes]:
    """Return the first string of SSH's wire format, and the rest (RFC 4251, section 5).

    Raises:
        ValueError: it is cut off.
    """
    end = 4 + int.from_bytes(blob[:4])
    if len(blob) < max(end, 4):
        raise ValueError("cut off")
    return blob[4:end], blob[end:]


def _wire(part: bytes) -> bytes:
    return len(part).to_bytes(4) + part
