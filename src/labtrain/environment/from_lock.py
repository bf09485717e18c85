"""Make the environment of a lock that somebody else wrote, without running any of its code. No torch.

`labtrain verify URL` needs the environment of the receipt. Its lock and its labtrain wheel are untrusted, as its code:

- Only pins with hashes are obeyed (pins.py). uv gets a list that labtrain writes from them, never the file itself.
- Packages come as wheels, which are only unpacked. A source archive is built only if labtrain's own lock has its hash.
- uv installs everything in one call into an empty environment, and nobody starts its interpreter outside the sandbox,
  because a wheel's .pth files run at each start.

Environments are kept in the cache, named by what they are made from. One is renamed into place when it is complete, so
an interrupted installation leaves nothing that looks like one.
"""

import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labtrain.assets import asset
from labtrain.base.console import quoted, shown
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.files import text_sha256
from labtrain.base.permissions import open_inside, open_lock
from labtrain.base.programs import run_program
from labtrain.base.untrusted import RECORD_BYTES, damage_of, read, remove_tree
from labtrain.bootstrap import DISK_BYTES, PYTHONS, check_python, damaged_distributions, installer_variables
from labtrain.environment.lock.derive import OWN_LOCK, own_wheel
from labtrain.environment.lock.pins import Pin, parse_pins, read_lock, read_pins
from labtrain.record.identity import LOCK_FILE, route
from labtrain.record.installed import changed_files
from labtrain.record.provenance import distributions

Say = Callable[[str], None]
INSTALL_TIMEOUT_S = 3 * 3600  # 4.4 GB over a slow line
QUERY_TIMEOUT_S = 60
FACTS = "import sys; print(sys.version.replace(chr(10), ' ')); print(sys.base_prefix)"
NO_SITE = ("-I", "-S")  # no .pth file, no sitecustomize, no folder of the user
PLAIN_WHEEL = re.compile(r"vendor/(labtrain-[\w.+!]+-py3-none-any\.whl)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """A Python, and the folders that it needs to start.

    Attributes:
        python: the program. If it is in an environment that was made here, it may only be started in the sandbox.
        reads: its environment and the Python that this was made with.
        said: what it is, in words.
        current: it is this process's own.
    """

    python: Path
    reads: tuple[Path, ...]
    said: str
    current: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignLock:
    """The checked locks of an experiment.

    Attributes:
        pins: of requirements.lock.
        wheel: the content of the labtrain wheel in vendor/, as labtrain.lock pins it.
        wheel_name: the wheel's file name.
        wheel_sha256: 64 hex digits.
    """

    pins: list[Pin]
    wheel: bytes
    wheel_name: str
    wheel_sha256: str

    def requirements(self) -> str:
        """Return the pins as labtrain writes them: names, versions, markers and hashes, and nothing else."""
        return "".join(
            f"{pin.name}=={pin.version}{f' ; {pin.marker}' if pin.marker else ''}"
            f"{''.join(f' --hash=sha256:{each}' for each in pin.hashes)}\n"
            for pin in sorted(self.pins, key=lambda pin: (pin.name, pin.version))
        )

    def only_as_wheels(self) -> list[str]:
        """Return the names of the packages with a file that labtrain's own lock does not have."""
        own = {(pin.name, pin.version): set(pin.hashes) for pin in read_pins(asset(LOCK_FILE))}
        return sorted({pin.name for pin in self.pins if not set(pin.hashes) <= own.get((pin.name, pin.version), set())})


def read_foreign_lock(root: Path) -> ForeignLock:
    """Read and check the locks of an experiment that somebody else wrote.

    Raises:
        ConfigError: it has no locks.
        DamagedError: a line is not a pin with hashes, or the wheel in vendor/ does not match labtrain.lock.
    """
    for name in (LOCK_FILE, OWN_LOCK):
        if not (root / name).is_file():
            raise ConfigError(
                f"no {name} at that commit, so labtrain cannot make the run's environment",
                hint="clone it, make the environment yourself, and there: labtrain verify RUN",
            )
    hint = "the author can restore it: git checkout requirements.lock labtrain.lock vendor"
    try:
        pins = parse_pins(_text(root, LOCK_FILE), Path(LOCK_FILE))
        _text(root, OWN_LOCK)
        named = own_wheel(root)
    except DamagedError as error:
        raise DamagedError(str(error.args[0]).replace(f"{root}/", ""), hint=hint) from None
    found = PLAIN_WHEEL.fullmatch(named[0]) if named else None
    if named is None or found is None:
        raise DamagedError(f"{OWN_LOCK}: must name vendor/labtrain-VERSION-py3-none-any.whl", hint=hint)
    with damage_of(named[0], hint=hint):
        try:
            with open_inside(root, named[0]) as file:
                wheel = file.read(RECORD_BYTES)
        except FileNotFoundError:
            raise DamagedError(f"{named[0]}: no such file, but {OWN_LOCK} names it", hint=hint) from None
    if (sha256 := hashlib.sha256(wheel).hexdigest()) != named[1]:
        raise DamagedError(f"{named[0]} has sha256 {sha256[:12]}, but {OWN_LOCK} says {named[1][:12]}", hint=hint)
    return ForeignLock(pins=pins, wheel=wheel, wheel_name=found[1], wheel_sha256=sha256)


def _text(root: Path, name: str) -> str:
    with damage_of(name, hint=f"ls -l {quoted(name)}"):
        return read(root / name).decode()


def interpreter_for(lock: ForeignLock, *, version: str, own_sha256: Callable[[], str], say: Say) -> Interpreter:
    """Return an interpreter whose environment has exactly what a lock names: this process's, a kept one, or a new one.

    Args:
        lock: the experiment's.
        version: of Python in the receipt; its minor version is preferred.
        own_sha256: returns the sha256 of this labtrain's wheel.
        say: receives what takes long.

    Raises:
        LabtrainError: there is no uv or no Python, or the installation failed.
    """
    if why := _unlike_current(lock, version, own_sha256):
        say(f"             not this environment: {why}")
    else:
        return Interpreter(python=Path(sys.executable), reads=(), current=True,
                           said=f"{shown(Path(sys.prefix))}, this one: it has exactly what the lock names")  # fmt: skip
    uv = _find_uv()
    base, full_version, prefix = _find_python(uv, version)
    key = text_sha256("\0".join((lock.requirements(), lock.wheel_sha256, full_version)))
    place = environments_folder() / key[:24]
    made = "kept from before"
    with _only_one(place):
        if place.exists() and damaged_distributions(place):
            say(f"             files of {shown(place)} were changed or removed: making it again")
            remove_tree(place)
        if not place.exists():
            _make(lock, place, uv=uv, base=base, say=say)
            made = "made now"
    said = f"{shown(place)}, {made}: {len(lock.pins)} pins, Python {full_version.split()[0]}"
    return Interpreter(python=place / "bin" / "python", reads=(place, prefix), said=said)


def environments_folder() -> Path:
    """Return the folder of the kept environments, in the user's cache (basedir-spec)."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if Path(cache).is_absolute() else Path.home() / ".cache", "labtrain", "environments")


def _unlike_current(lock: ForeignLock, version: str, own_sha256: Callable[[], str]) -> str:
    """Return why this process's environment is not a lock's; empty if it is."""
    if route() != "wheels":
        return f"it was made by {route()}"
    if _minor(version) != sys.version_info[:2]:
        return f"it has Python {sys.version.split()[0]}, the receipt {version}"
    own = {(pin.name, pin.version): (pin.marker, set(pin.hashes)) for pin in read_pins(asset(LOCK_FILE))}
    if {(pin.name, pin.version): (pin.marker, set(pin.hashes)) for pin in lock.pins} != own:
        return "it has another lock"
    here = {name: found for name, found in distributions().items() if name != "labtrain"}
    wanted = {name: pin.version for name, pin in read_lock(asset(LOCK_FILE)).items()}
    if other := sorted(name for name in {*here, *wanted} if here.get(name) != wanted.get(name)):
        return f"it differs from its lock: {', '.join(other[:5])}{', ...' if len(other) > 5 else ''}"
    if lock.wheel_sha256 != own_sha256():
        return "the experiment has another labtrain"
    # Programs in bin/ are not imported. labtrain's own files are those that own_sha256 has packed.
    changed = [each for each in changed_files()[0] if not each.startswith("../") and " of labtrain " not in each]
    return changed[0] if changed else ""


def _minor(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d{1,3})\.(\d{1,3})(?!\d)", version, re.ASCII)
    return tuple(map(int, found.groups())) if found else ()


def _find_uv() -> str:
    """Return the program uv: of this environment, on PATH, or the one that started this process (uvx)."""
    beside = str(Path(sys.prefix, "bin", "uv"))
    found = shutil.which(beside) or shutil.which("uv") or shutil.which(os.environ.get("UV", ""))
    if found is None:
        raise LabtrainError("making the run's environment needs uv, which is not installed here", hint="pip install uv")
    return found


def _find_python(uv: str, version: str) -> tuple[str, str, Path]:
    """Return a Python outside environments, its version and its folder: of the receipt's minor version, if it is here.

    Raises:
        LabtrainError: none of the supported versions is here.
    """
    first, below = PYTHONS
    allowed = [(first[0], minor) for minor in range(first[1], below[1])]
    wanted = _minor(version)
    for minor in sorted(allowed, key=lambda each: (each != wanted, each)):
        named = ".".join(map(str, minor))
        command = [uv, "python", "find", "--system", "--no-python-downloads", named]
        hint = f"uv python install {named}"
        found = run_program(command, timeout_s=QUERY_TIMEOUT_S, hint=hint, folder=Path(tempfile.gettempdir()))
        python = found.stdout.strip()
        if found.returncode or not python:
            continue
        facts = run_program([python, *NO_SITE, "-c", FACTS], timeout_s=QUERY_TIMEOUT_S, hint=hint)
        if not facts.returncode:
            full, prefix = facts.stdout.splitlines()
            check_python(minor)
            return python, full, Path(prefix)
    named = ".".join(map(str, wanted if wanted in allowed else allowed[0]))
    raise LabtrainError(
        f"the receipt was made with Python {version}; found none of {allowed[0][0]}.{allowed[0][1]} to"
        f" {allowed[-1][0]}.{allowed[-1][1]} here",
        hint=f"uv python install {named}",
    )


@contextmanager
def _only_one(place: Path) -> Iterator[None]:
    """Let one process at a time make an environment; a process that is killed gives way to the next."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = open_lock(place.with_name(f"{place.name}.lock"))
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(lock: ForeignLock, place: Path, *, uv: str, base: str, say: Say) -> None:
    """Make an environment in a folder beside its place, and rename it when it is complete."""
    if (free := shutil.disk_usage(place.parent).free) < DISK_BYTES:
        raise LabtrainError(
            f"{shown(place.parent)}: {free / 1e9:.1f} GB free, need {DISK_BYTES / 1e9:.1f} GB for an environment",
            hint="XDG_CACHE_HOME=FOLDER before the same command, with more room",
        )
    making = place.with_name(f"{place.name}.making")
    if making.is_dir():  # of a process that was killed
        remove_tree(making)
    say("             making it, each file checked by hash: seconds if uv has the files, else 4.4 GB to download")
    wheels = [option for name in lock.only_as_wheels() for option in ("--only-binary", name)]
    try:
        with tempfile.TemporaryDirectory(prefix="labtrain-lock-") as scratch:
            folder = Path(scratch)
            (folder / lock.wheel_name).write_bytes(lock.wheel)
            wheel = f"./{lock.wheel_name} --hash=sha256:{lock.wheel_sha256}\n"
            (folder / "requirements.txt").write_text(lock.requirements() + wheel)
            _uv(uv, "venv", "--relocatable", "--no-python-downloads", "--python", base, str(making), folder=folder)
            # One call into an empty environment: uv starts its interpreter, and later .pth files would run.
            _uv(uv, "pip", "sync", "--python", str(making / "bin" / "python"), "--no-python-downloads",
                "--require-hashes", "--build-constraints", str(asset(LOCK_FILE)), *wheels, "requirements.txt",
                folder=folder)  # fmt: skip
        making.rename(place)
    finally:
        if making.is_dir():
            remove_tree(making)


def _uv(uv: str, *arguments: str, folder: Path) -> None:
    hint = "the author's lock may be broken; if a file could not be downloaded, repeat the command"
    command = [uv, "--quiet", "--color", "never", *arguments]
    done = run_program(
        command, timeout_s=INSTALL_TIMEOUT_S, hint=hint, folder=folder, environment=installer_variables()
    )
    if done.returncode:
        raise LabtrainError(f"uv {' '.join(arguments[:2])} failed:\n{done.stderr.strip()[-2000:]}", hint=hint)
