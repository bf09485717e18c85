"""Export requirements.lock as pylock.toml, for those who install with uv or pip: PEP 751, paths instead of addresses.

https://packaging.python.org/en/latest/specifications/pylock-toml/. The paths are relative and lead into a folder of
wheels. So the file names no index, and the folder with it can be copied to a machine without a network.
"""

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from packaging.markers import Marker
from packaging.pylock import Package, PackageSdist, PackageWheel, Pylock, is_valid_pylock_path
from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from labtrain.base.console import few, quoted
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.base.files import file_sha256, write_atomically
from labtrain.environment.lock import derive
from labtrain.environment.lock.pins import PYTHON_312_LINUX, Pin, read_lock
from labtrain.record.identity import LOCK_FILE

WHEELS = "wheels"  # the folder of the documentation
ELSEWHERE = "labtrain lock export -o FOLDER/pylock.toml, in a folder where you may write"
LINUX = Marker("sys_platform == 'linux' and platform_machine == 'x86_64'")

Files = dict[str, list[tuple[str, str]]]  # by pin: path relative to the lock, and sha256


def export_pylock(folder: Path, output: Path, wheels: Path | None = None) -> Pylock:
    """Write pylock.toml, and return its content.

    Args:
        folder: an experiment, or labtrain's repository.
        output: the file; its paths are relative to its folder.
        wheels: a folder with the files for this Python. By default the lock is for Python 3.12 on Linux, and expects
            the files of nix/wheels.json in the folder `wheels` beside it.

    Raises:
        ConfigError: the file's name is not one that installers accept, or the folder lacks a file.
        DamagedError: a lock is missing or damaged.
    """
    _check_name(output)
    if wheels is None:
        python, pins = "3.12", read_lock(folder / LOCK_FILE, PYTHON_312_LINUX)
        files = _expected(folder, pins)
    else:
        python, pins = f"{sys.version_info[0]}.{sys.version_info[1]}", read_lock(folder / LOCK_FILE)
        files = _present(wheels, pins, python, output.parent)
    lock = Pylock(
        lock_version=Version("1.0"),
        environments=[LINUX],
        requires_python=SpecifierSet(f"=={python}.*"),
        created_by="labtrain",
        packages=[*(_package(pin, files[name]) for name, pin in sorted(pins.items())), *_own(folder, output.parent)],
    )
    lock.validate()
    try:
        write_atomically(output, _toml(lock))
    except OSError as error:
        raise _not_writable(output, error) from error
    return lock


def _check_name(output: Path) -> None:
    """Check that installers accept the file's name, and that a file can have it.

    Raises:
        ConfigError: they do not, its folder is missing, or it is a folder.
    """
    if not is_valid_pylock_path(output):
        instead = output.with_name("pylock.toml") if output.name else output / "pylock.toml"
        what = f"{output.name or 'no file name'}: installers read pylock.toml or pylock.NAME.toml (PEP 751)"
        raise ConfigError(what, hint=f"labtrain lock export -o {quoted(str(instead))}")
    try:
        if not stat.S_ISDIR(output.parent.stat().st_mode):
            raise ConfigError(f"{output.parent}: not a folder", hint=ELSEWHERE)
        if output.is_dir():
            raise ConfigError(f"{output}: is a folder, must be a file", hint=ELSEWHERE)
    except FileNotFoundError as error:
        hint = f"mkdir -p {quoted(str(output.parent))}"
        raise ConfigError(f"{output.parent}: no such folder", hint=hint) from error
    except OSError as error:
        raise _not_writable(output, error) from error


def _not_writable(output: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{output}: cannot be written: {error.strerror}", hint=ELSEWHERE)


def _expected(folder: Path, pins: dict[str, Pin]) -> Files:
    """Return the files that nix/wheels.json names, as paths in the folder `wheels`."""
    files: Files = {}
    for entry in derive.read_wheels(folder):
        path = f"{WHEELS}/{derive.file_name(entry)}"
        files.setdefault(entry["name"], []).append((path, derive.hex_digest(entry["hash"])))
    for pin in pins.values():
        if not any(sha256 in pin.hashes for _, sha256 in files.get(pin.name, [])):
            raise DamagedError(f"{derive.WHEELS} has no file of {pin.name} {pin.version}", hint="labtrain lock check")
    return files


def _present(wheels: Path, pins: dict[str, Pin], python: str, beside: Path) -> Files:
    """Return the files of a folder that are pinned, by hash; paths are relative to the folder `beside`."""
    if not wheels.is_dir():
        raise ConfigError(f"{wheels}: no such folder", hint=_download(wheels))
    tags = frozenset(sys_tags())
    owners = {sha256: pin.name for pin in pins.values() for sha256 in pin.hashes}
    files: Files = {name: [] for name in pins}
    usable, strangers = set(), []
    for path in sorted(path for path in wheels.iterdir() if path.name.endswith((".whl", ".tar.gz"))):
        sha256 = file_sha256(path)
        if (name := owners.get(sha256)) is None:
            strangers.append(path.name)
            continue
        relative = PurePosixPath(os.path.relpath(path.resolve(), beside.resolve()))
        files[name].append((str(relative), sha256))
        if path.name.endswith(".tar.gz") or _tags_of(path.name) & tags:
            usable.add(name)
    missing = [f"{pin.name} {pin.version}" for name, pin in sorted(pins.items()) if name not in usable]
    if missing:
        changed = [name for name in strangers if canonicalize_name(name.partition("-")[0]) in pins]
        said = f"; the hash of {few(changed)} is not in {LOCK_FILE}" if changed else ""
        raise ConfigError(
            f"{wheels} lacks files for Python {python}: {few(missing)}{said}",
            hint=_download(wheels),
        )
    return files


def _download(wheels: Path) -> str:
    return f"python -m pip download --require-hashes --no-deps -r {LOCK_FILE} -d {quoted(str(wheels))}"


def _tags_of(name: str) -> frozenset[object]:
    try:
        return parse_wheel_filename(name)[3]
    except InvalidWheelFilename:
        return frozenset()


def _package(pin: Pin, files: list[tuple[str, str]]) -> Package:
    sdists = [PackageSdist(path=path, hashes={"sha256": sha256}) for path, sha256 in files if path.endswith(".tar.gz")]
    wheels = [PackageWheel(path=path, hashes={"sha256": sha256}) for path, sha256 in files if path.endswith(".whl")]
    return Package(
        name=NormalizedName(pin.name),
        version=Version(pin.version),
        marker=Marker(pin.marker) if pin.marker else None,
        sdist=sdists[0] if sdists else None,
        wheels=wheels or None,
    )


def _own(folder: Path, beside: Path) -> Iterator[Package]:
    """Yield labtrain itself in an experiment: the wheel in its labtrain.lock."""
    if (own := derive.own_wheel(folder)) is None:
        return
    wheel, sha256 = own
    try:
        version = parse_wheel_filename(Path(wheel).name)[1]
    except InvalidWheelFilename as error:
        hint = f"git checkout {derive.OWN_LOCK}"
        raise DamagedError(f"{folder / derive.OWN_LOCK}: {error}", hint=hint) from error
    relative = PurePosixPath(os.path.relpath((folder / wheel).resolve(), beside.resolve()))
    wheels = [PackageWheel(path=str(relative), hashes={"sha256": sha256})]
    yield Package(name=NormalizedName("labtrain"), version=version, wheels=wheels)


def _toml(lock: Pylock) -> str:
    """Return the lock as TOML. Its values are strings, and lists and tables of them."""
    head = lock.to_dict()
    text = "".join(f"{key} = {_inline(value)}\n" for key, value in head.items() if key != "packages")
    for package in head["packages"]:
        text += "\n[[packages]]\n" + "".join(f"{key} = {_inline(value)}\n" for key, value in package.items())
    return text


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(each) for each in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)
