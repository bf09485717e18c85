"""Read requirements.lock, the lock of the wheels: pins and hashes, without an index address."""

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker

from labtrain.assets import asset
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.record.identity import LOCK_FILE
from labtrain.record.provenance import normalised

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
        DamagedError: a line is not a pin, or has no hash.
    """
    pins = read_pins(path)
    return {pin.name: pin for pin in pins if not pin.marker or Marker(pin.marker).evaluate(environment)}


def read_pins(path: Path) -> list[Pin]:
    """Return every pin, whatever its marker.

    Raises:
        DamagedError: a line is not a pin, or has no hash.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}", hint="labtrain lock write") from error
    return parse_pins(text, path)


def parse_pins(text: str, path: Path) -> list[Pin]:
    """Return every pin in a lock's text; `path` is for the error message."""
    pins = []
    for block in re.findall(r"^[^\s#].*(?:\n[ \t].*)*", text, re.MULTILINE):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
        pin, *options = " ".join(line.rstrip("\\").strip() for line in lines).split(" --hash=sha256:")
        requirement, _, marker = pin.partition(";")
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", requirement.strip())
        hashes = tuple(option.strip() for option in options)
        if match is None or not hashes or not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in hashes):
            raise DamagedError(f"{path}: not a pin with hashes: {lines[0][:80]}", hint="labtrain lock write")
        name = normalised(match.group(1))
        text = "\n".join(lines) + "\n"
        pins.append(Pin(name=name, version=match.group(2), marker=marker.strip(), hashes=hashes, text=text))
    return pins
