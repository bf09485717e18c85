"""Check a server's key with known_hosts files, as OpenSSH does (sshd(8), hostfile.c). No torch.

paramiko stops at a line that it does not understand, and supports neither patterns nor certificates. Here invalid lines
are skipped. A ``@revoked`` key is refused. A key signed by a ``@cert-authority`` is accepted while its certificate is
valid (PROTOCOL.certkeys). Every other key must be in a line of its host.
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
NUMBERS = {"ssh-ed25519": 1, "ssh-rsa": 2, "ssh-dss": 4}  # number of strings in a public key; ecdsa has 2


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownHostsLine:
    """A known_hosts line of the host.

    Attributes:
        where: its file and line number.
        marker: revoked, cert-authority, or empty.
        kind: type of the key.
        blob: the key, in SSH's wire format.
    """

    where: str
    marker: str
    kind: str
    blob: bytes


class KnownHosts:
    """The known keys of one host.

    Args:
        host: its name after applying HostName or HostKeyAlias.
        port: its port.
        config: ssh's configuration for this host.
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
        # For a port other than 22, lines with only the name count if there is no line with the port.
        self.less = [] if self.name == self.host or alias else [
            line for path in self.files for line in _lines(path, self.host)
        ]  # fmt: skip

    def kinds(self, offered: tuple[str, ...]) -> tuple[str, ...]:
        """Return key types in the order to request them: first the known ones."""
        of_authorities = any(line.marker == "cert-authority" for line in self.lines + self.less)
        known = {line.kind for line in self.lines if not line.marker} or {line.kind for line in self.less}

        def rank(kind: str) -> int:
            if kind.endswith(CERTIFIED):
                return 0 if of_authorities else 3
            return 1 if ("ssh-rsa" if kind.startswith("rsa-") else kind) in known else 2

        return tuple(sorted(offered, key=rank))

    def check(self, blob: bytes) -> None:
        """Raise if a server's key or certificate is not known.

        Raises:
            StoreError: names the key, the lines with other keys, and what to do.
        """
        try:
            kind, key, certificate = _opened(blob)
        except ValueError as error:
            raise StoreError(f"{self.name} sent an invalid key: {error}", hint=f"ssh {self.host}") from error
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
                f"{self.name} sent the {shown}, but known_hosts has another: {places}: the server was reinstalled, or"
                " somebody intercepts the connection",
                hint=f"first ask the administrator of {self.host} for its key's fingerprint",
            )
        raise StoreError(
            f"{self.name} sent the {shown}, which is not in {' or '.join(map(str, self.files)) or 'any known_hosts'}"
            + (f"; its certificate: {why}" if why else ""),
            hint=f"ssh -p {self.port} {self.host}: it shows the fingerprint and asks; compare it with your"
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
                    f"RevokedHostKeys {path} is a KRL; only a list of keys is supported", hint="docs/guides/storage.md"
                )
            blobs = (_key(line.split()) for line in text.decode(errors="replace").splitlines())
            places += [str(path) for found in blobs if found is not None and found[1] in keys]
        if places:
            raise StoreError(
                f"{self.name} sent a revoked key: {places[0]}",
                hint=f"ask the administrator of {self.host}: whoever has that key can impersonate the server",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """A certificate of a host's key.

    Attributes:
        kind: 2 for a host, 1 for a user.
        principals: host names; empty: every host.
        after: start of validity, in seconds since the epoch.
        before: end of validity, in seconds since the epoch.
        critical: options that must not be ignored if unknown.
        authority: the key that signed it.
        signed: the signed bytes.
        signature: the authority's signature.
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
        """Return why it is not valid for a host now; empty if it is valid."""
        now = int(time.time())
        if self.kind != HOST_CERTIFICATE:
            return "it is for a user, not for a host"
        if self.principals and host not in self.principals:
            return f"it is for {', '.join(self.principals)}"
        if not self.after <= now < self.before:
            return "it is not valid yet" if now < self.after else "it has expired"
        if self.critical:
            return "it has critical options, which are not defined for hosts"
        return "" if _verifies(self.authority, self.signed, self.signature) else "its signature is wrong"


def fingerprint(blob: bytes) -> str:
    """Return a key's fingerprint as ssh shows it."""
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def _paths(text: str) -> list[Path]:
    """Return the existing files that an ssh option names; `none` means no file."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    home = str(Path("~").expanduser())
    words = [text] if Path(text).expanduser().is_file() else words  # paramiko removes the quotes of a single path
    named = [Path(os.path.expandvars(word.replace("%d", home))).expanduser() for word in words if word != "none"]
    return [path for path in named if path.is_file()]


def _lines(path: Path, name: str) -> Iterator[KnownHostsLine]:
    """Yield a file's valid lines for a host."""
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
            yield KnownHostsLine(where=f"{path}:{number}", marker=marker, kind=found[0], blob=found[1])


def _key(words: list[str]) -> tuple[str, bytes] | None:
    """Return (kind, blob) of a public key's words; None if they are not a key."""
    if len(words) < 2 or words[0].startswith("#"):
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
        kind, _ = _string(blob)
    except (binascii.Error, ValueError):
        return None
    return (words[0], blob) if kind.decode(errors="replace") == words[0] else None


def _is_of(names: str, name: str) -> bool:
    """Return whether a line's names match a host: hashed, or patterns, of which a negated match excludes it."""
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
    """Match a pattern of ssh_config(5): `*` and `?`, no brackets."""
    parts = {"*": ".*", "?": "."}
    return re.fullmatch("".join(parts.get(each) or re.escape(each) for each in pattern), name, re.DOTALL) is not None


def _opened(blob: bytes) -> tuple[str, bytes, Certificate | None]:
    """Parse a server's key: return (kind, plain key, certificate or None)."""
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
    except Exception:  # any exception means that it is not a valid signature
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
