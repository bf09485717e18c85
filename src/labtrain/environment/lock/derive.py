"""Derive from the locks: what conda lacks, the seal, and the versions of each route."""

import base64
import json
import re
import uuid
from pathlib import Path

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError
from labtrain.base.files import text_sha256
from labtrain.base.untrusted import reason
from labtrain.environment.lock import conda, pixi
from labtrain.environment.lock.files import read_text
from labtrain.environment.lock.pins import PYTHON_312_LINUX, Pin, read_lock, read_pins
from labtrain.record.identity import LOCK_FILE

CONDA_REQUIREMENTS = "requirements-conda.lock"
WHEELS = "nix/wheels.json"
FLAKE_LOCK = "flake.lock"
SEAL = "sbom.cdx.json"
OWN_LOCK = "labtrain.lock"  # in an experiment: its labtrain wheel
GLIBC = (2, 28)  # the newest that a wheel may need; environment.yml is solved for the same

METADATA = "(metadata)"  # in the seal: what a lock has besides packages
SOURCES = "(sources)"  # in the seal: what a conda lock was solved from

Seal = dict[str, str]


def conda_requirements(folder: Path) -> str:
    """Return requirements-conda.lock: the pins of requirements.lock that conda-lock.yml does not provide."""
    entries = conda.read_conda_lock(folder)["package"]
    pins = read_lock(folder / LOCK_FILE, PYTHON_312_LINUX)
    return "".join(pin.text for name, pin in sorted(pins.items()) if not conda.provides(entries, name))


def choose_file(pin: Pin, files: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the file that CPython 3.12 on x86-64 Linux installs: the wheel with the best tag, else the sdist.

    Args:
        pin: the package.
        files: (name, sha256) of each of its files.

    Raises:
        DamagedError: none of its files can be installed there.
    """
    glibc = [f"manylinux_{GLIBC[0]}_{minor}_x86_64" for minor in range(GLIBC[1], 4, -1)]
    platforms = [*glibc, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    tags = [
        *cpython_tags((3, 12), platforms=platforms),
        *compatible_tags((3, 12), interpreter="cp312", platforms=platforms),
    ]
    ranks = {tag: rank for rank, tag in enumerate(tags)}
    best: tuple[int, str, str] | None = None
    for name, sha256 in files:
        if sha256 not in pin.hashes:
            continue
        if name.endswith(".whl"):
            rank = min((ranks[tag] for tag in parse_wheel_filename(name)[3] if tag in ranks), default=None)
        else:
            rank = len(ranks) if name.endswith(".tar.gz") else None
        if rank is not None and (best is None or rank < best[0]):
            best = (rank, name, sha256)
    if best is None:
        raise DamagedError(
            f"{pin.name} {pin.version} has no file for CPython 3.12 on x86-64 Linux", hint="pin another version"
        )
    return best[1], best[2]


def wheel_entry(pin: Pin, file: str, sha256: str) -> dict[str, object]:
    """Return one entry of wheels.json: the arguments of nixpkgs' fetchPypi, so that no file names a host."""
    entry: dict[str, object] = {"name": pin.name, "version": pin.version, "hash": sri(sha256)}
    if file.endswith(".whl"):
        parts = file.removesuffix(".whl").split("-")
        pname, version, *build, python, abi, platform = parts
        return entry | {
            "format": "wheel",
            "pname": pname,
            "version": version,
            "build": build[0] if build else None,
            "dist": python,
            "python": python,
            "abi": abi,
            "platform": platform,
        }
    pname, _, version = file.removesuffix(".tar.gz").rpartition("-")
    return entry | {"format": "sdist", "pname": pname, "version": version, "extension": "tar.gz"}


def file_name(entry: Options) -> str:
    """Return the name of an entry's file, the inverse of `wheel_entry`."""
    if entry["format"] != "wheel":
        return f"{entry['pname']}-{entry['version']}.{entry['extension']}"
    parts = (entry["pname"], entry["version"], entry["build"], entry["python"], entry["abi"], entry["platform"])
    return "-".join(part for part in parts if part) + ".whl"


def sri(sha256: str) -> str:
    """Format a sha256 for Nix (Subresource Integrity)."""
    return f"sha256-{base64.b64encode(bytes.fromhex(sha256)).decode()}"


def hex_digest(hash_sri: str) -> str:
    """Return the hex digits of an SRI hash, the inverse of `sri`."""
    return base64.b64decode(hash_sri.removeprefix("sha256-")).hex()


def seal(folder: Path) -> Seal:
    """Return a digest for each package of each lock, by route and name, as sbom.cdx.json must have it.

    It covers the whole entry, so that no character of a hash, pin or address can change unnoticed.
    """
    sealed: Seal = {}
    for pin in read_pins(folder / LOCK_FILE):
        sealed[f"wheels {pin.name} {pin.version}"] = text_sha256(pin.text)
    for profile in conda.PROFILES:
        lock = conda.read_conda_lock(folder, profile)
        sealed[f"{profile.route} {METADATA}"] = _digest({**lock, "package": []})
        sealed[f"{profile.route} {SOURCES}"] = sources_digest(folder, profile)
        sealed |= {f"{profile.route} {entry['name']}": _digest(entry) for entry in lock["package"]}
    sealed |= {f"nix {entry['name']}": _digest(entry) for entry in read_wheels(folder)}
    sealed |= seal_pixi(pixi.read_pixi_lock(folder))
    flake = folder / FLAKE_LOCK
    if flake.exists():
        sealed["nix nixpkgs"] = text_sha256(read_text(folder, FLAKE_LOCK))
    return sealed


def seal_pixi(lock: Options) -> Seal:
    """Return the digests of what is in pixi.lock, by route and file."""
    packages = {f"pixi {pixi.file_name(entry)}": _digest(entry) for entry in lock["packages"]}
    return packages | {f"pixi {METADATA}": _digest(pixi.frame(lock))}


def sources_digest(folder: Path, profile: conda.Profile) -> str:
    """Return a digest of what a conda lock is solved from. Unlike conda-lock's content hash it needs no conda-lock."""
    return _digest({"spec": conda.read_spec(folder, profile), "virtual": conda.virtual_packages(folder, profile)})


def read_seal(folder: Path) -> Seal:
    """Return the digests in sbom.cdx.json, by route and name.

    Raises:
        DamagedError: it is missing or broken.
    """
    path = folder / SEAL
    try:
        return {
            component["bom-ref"]: next(
                str(each["value"]) for each in component["properties"] if each["name"] == "labtrain:seal"
            )
            for component in json.loads(path.read_text())["components"]
        }
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DamagedError(f"{path}: {reason(error)}", hint="labtrain lock write") from error


def serial_number(document: Options) -> str:
    """Return the serial number of an SBOM: a digest of everything else in it."""
    rest = {key: value for key, value in document.items() if key != "serialNumber"}
    return f"urn:uuid:{uuid.UUID(_digest(rest)[:32], version=4)}"


def _digest(entry: Options) -> str:
    return text_sha256(json.dumps(entry, sort_keys=True, default=str))


def read_wheels(folder: Path) -> list[Options]:
    """Read nix/wheels.json.

    Raises:
        DamagedError: it is missing or broken.
    """
    path = folder / WHEELS
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            entry["name"], entry["version"], file_name(entry), hex_digest(entry["hash"])
        return list(entries)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path}: {reason(error)}", hint="labtrain lock write") from error


def own_wheel(folder: Path) -> tuple[str, str] | None:
    """Return an experiment's labtrain wheel, as a path in the experiment, and its sha256; None in the repository.

    Raises:
        DamagedError: labtrain.lock is broken.
    """
    path = folder / OWN_LOCK
    if not path.exists():
        return None
    found = re.fullmatch(r"(?:\./)?(\S+\.whl) --hash=sha256:([0-9a-f]{64})", read_text(folder, OWN_LOCK).strip())
    if found is None:
        raise DamagedError(f"{path}: must be a wheel and its sha256", hint=f"git checkout {OWN_LOCK}")
    return found[1], found[2]


def stack(folder: Path) -> dict[str, dict[str, str]]:
    """Return the versions of torch, CUDA runtime, cuDNN and NCCL, which determine the bits, by route."""
    pins = read_lock(folder / LOCK_FILE, PYTHON_312_LINUX)
    entries, cpu = (
        {entry["name"]: str(entry["version"]) for entry in conda.read_conda_lock(folder, profile)["package"]}
        for profile in conda.PROFILES
    )
    nix = {entry["name"]: entry["version"] for entry in read_wheels(folder)}
    registry = {
        "torch": "torch",
        "CUDA runtime": "nvidia-cuda-runtime-cu12",
        "cuDNN": "nvidia-cudnn-cu12",
        "NCCL": "nvidia-nccl-cu12",
    }
    forge = {"torch": "pytorch", "CUDA runtime": "cuda-cudart", "cuDNN": "cudnn", "NCCL": "nccl"}
    return {
        "wheels": {what: pins[name].version if name in pins else "missing" for what, name in registry.items()},
        "nix": {what: nix.get(name, "missing") for what, name in registry.items()},
        "conda": {what: entries.get(name, "missing") for what, name in forge.items()},
        "conda-cpu": {"torch": cpu.get("pytorch", "missing")},
    }
