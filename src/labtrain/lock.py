"""The lock of the plain wheels, `requirements.lock`: pins, hashes and no index address."""

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker

from labtrain.assets import asset
from labtrain.errors import DamagedError
from labtrain.provenance import normalised
from labtrain.run import LOCK_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """One line of the lock: a distribution, its version and the sha256 of each of its files."""

    name: str
    version: str
    hashes: tuple[str, ...]


def find_lock() -> Path:
    """Return the lock that this environment should be: the working directory's, else the one labtrain brings."""
    here = Path.cwd() / LOCK_FILE
    return here if here.exists() else asset(LOCK_FILE)


def read_lock(path: Path) -> dict[str, Pin]:
    """Return the pins that apply to this Python and platform, by normalised name.

    Raises:
        DamagedError: a line is no pin, or has no hash.
    """
    pins: dict[str, Pin] = {}
    try:
        text = path.read_text()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}", hint="make lock") from error
    for entry in text.replace("\\\n", " ").splitlines():
        line = entry.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        pin, *options = line.split(" --hash=sha256:")
        requirement, _, marker = pin.partition(";")
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", requirement.strip())
        if match is None or not options:
            raise DamagedError(f"{path}: not a pin with hashes: {line[:80]}", hint="make lock")
        if not marker or Marker(marker).evaluate():
            name = normalised(match.group(1))
            pins[name] = Pin(name=name, version=match.group(2), hashes=tuple(option.strip() for option in options))
    return pins
