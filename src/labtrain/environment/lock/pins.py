"""Read requirements.lock, the lock of the wheels: pins and hashes, without an index address."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.version import Version

from labtrain.assets import asset
from labtrain.base.console import one_line
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.environment.lock.files import read_text, restore
from labtrain.record.identity import LOCK_FILE
from labtrain.record.provenance import normalised

COMMENT = re.compile(r"(^|\s+)#.*$")  # pip's
VARIABLE = re.compile(r"\$\{[A-Z0-9_]+\}")  # pip puts the environment's value there
# Marker values in the conda and Nix environments, which are locked for one Python and one platform.
PYTHON_312_LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.12.13",
    "python_version": "3.12",
    "sys_platform": "linux",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """One entry of the lock: name, version, marker, the sha256 of each of its files, and its unchanged lines."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]
    text: str


def find_lock() -> Path:
    """Return the lock for this environment: the one in the working directory, else labtrain's own."""
    here = Path.cwd() / LOCK_FILE
    return here if here.exists() else asset(LOCK_FILE)


def require_locks(folder: Path) -> None:
    """Raise ConfigError unless a folder has requirements.lock."""
    if not (folder / LOCK_FILE).exists():
        raise ConfigError(
            f"{folder} has no {LOCK_FILE}",
            hint="cd to an experiment, or to labtrain's repository; labtrain new NAME makes an experiment",
        )


def read_lock(path: Path, environment: dict[str, str] | None = None) -> dict[str, Pin]:
    """Return the pins that apply, by normalised name.

    Args:
        path: the lock.
        environment: marker values, such as PYTHON_312_LINUX; by default those of this Python and platform.

    Raises:
        DamagedError: a line is not a pin, or has no hash; or two pins of one package apply.
    """
    found: dict[str, Pin] = {}
    for pin in read_pins(path):
        if pin.marker and not Marker(pin.marker).evaluate(environment):
            continue
        if found.setdefault(pin.name, pin) is not pin:
            raise _damaged(path, f"{pin.name} is pinned as {found[pin.name].version} and as {pin.version}")
    return found


def read_pins(path: Path) -> list[Pin]:
    """Return every pin, whatever its marker.

    Raises:
        DamagedError: a line is not a pin, or has no hash.
    """
    return parse_pins(read_text(path.parent, path.name), path)


def parse_pins(text: str, path: Path) -> list[Pin]:
    """Return every pin in a lock's text. Each line that pip would read must be a pin with hashes.

    Args:
        text: of the lock.
        path: for the error message.

    Raises:
        DamagedError: a line is not a pin, has no hash, or pins what another line pins.
    """
    pins: dict[tuple[str, str], Pin] = {}
    if re.search(r"\A(?:.*\n)?#.*coding[:=]", text):
        raise _damaged(path, "must be UTF-8, and has a comment that names an encoding")
    for line, lines in _joined(text):
        pin = _pin(line, lines, path)
        if pins.setdefault((pin.name, pin.version), pin) is not pin:
            raise _damaged(path, f"{pin.name}=={pin.version} is pinned twice")
    return list(pins.values())


def _joined(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each line as pip reads it, without comments, and the lines of the file that it consists of.

    https://pip.pypa.io/en/stable/reference/requirements-file-format/, and `join_lines` and `ignore_comments` of
    pip/_internal/req/req_file.py: a comment ends a continuation.
    """
    joined, lines = "", []
    for raw in [*text.splitlines(), None]:
        if raw is not None and raw.endswith("\\") and not COMMENT.match(raw):
            joined += raw.strip("\\")
            lines.append(raw)
            continue
        if raw is not None:
            joined += f" {raw}" if COMMENT.match(raw) else raw
            lines += [] if COMMENT.match(raw) else [raw]
        if line := COMMENT.sub("", joined).strip():
            yield line, lines
        joined, lines = "", []


def _pin(line: str, lines: list[str], path: Path) -> Pin:
    """Parse one line. Nothing but `NAME==VERSION ; MARKER --hash=sha256:DIGEST` is accepted.

    Raises:
        DamagedError: names the line, or the pin and what is wrong with it.
    """
    words = line.split(" ")
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    requirement, semicolon, marker = " ".join(words[:first]).partition(";")
    hashes = [re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", word, re.ASCII) for word in words[first:] if word]
    match = re.fullmatch(
        r"([A-Z0-9](?:[A-Z0-9._-]*[A-Z0-9])?)==([\w.!+-]+)", requirement.strip(" \t"), re.IGNORECASE | re.ASCII
    )
    if match is None or not hashes or not all(hashes) or VARIABLE.search(line):
        raise _damaged(path, f"not a pin with hashes: {lines[0].strip()[:80]}")
    name, version, marker = normalised(match[1]), match[2], marker.strip()
    try:
        Version(version)
        if semicolon:
            _check_marker(marker)
    except ValueError as error:  # packaging's errors of versions and markers
        found, _, _ = str(error).partition("\n")
        pin = f"{name}=={version}{semicolon and f' ; {marker}'}"
        raise _damaged(path, one_line(f"{pin[:100]}: {found}")) from error
    digests = tuple(found[1] for found in hashes if found)
    return Pin(name=name, version=version, marker=marker, hashes=digests, text="\n".join(lines) + "\n")


@functools.cache
def _check_marker(marker: str) -> None:
    """Raise ValueError if a marker cannot be parsed or evaluated."""
    for environment in (PYTHON_312_LINUX, None):
        Marker(marker).evaluate(environment)


def _damaged(path: Path, found: str) -> DamagedError:
    return DamagedError(f"{path}: {found}", hint=restore(path.name))
