"""The conda locks: their entries, dependencies and content hashes; the spec of the cpu profile. No solver runs here."""

import functools
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError
from labtrain.record.provenance import normalised

if TYPE_CHECKING:
    from rattler import MatchSpec

SPEC = "environment.yml"
VIRTUAL = "virtual-packages.yml"
PLATFORM = "linux-64"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One of the conda environments.

    Attributes:
        route: its route in receipts (record/identity.py).
        spec: what it is solved from.
        lock: conda-lock's file.
    """

    route: str
    spec: str
    lock: str


DEFAULT = Profile(route="conda", spec=SPEC, lock="conda-lock.yml")
CPU = Profile(route="conda-cpu", spec="environment-cpu.yml", lock="conda-lock-cpu.yml")
PROFILES = (DEFAULT, CPU)

# The cpu profile has none of these packages, which the spec names, and CPU builds of the two below.
GPU_ONLY = ("cuda-version", "cudnn", "nccl")
CPU_BUILD = "cpu_mkl*"
BUILT_TWICE = ("libtorch", "pytorch")
CPU_HEADER = f"""\
# {SPEC} for machines without a GPU; locked in {CPU.lock}.
# Written by `labtrain lock write`: change {SPEC} instead.
"""

# Packages that have another name on conda-forge than on PyPI.
CONDA_NAMES = {
    "antlr4-python3-runtime": "antlr-python-runtime",
    "fastjsonschema": "python-fastjsonschema",
    "matplotlib": "matplotlib-base",
    "nbconvert": "nbconvert-core",
    "torch": "pytorch",
    "tzdata": "python-tzdata",
    "xxhash": "python-xxhash",
}
# conda-forge has its own packages for the CUDA libraries.
CUDA_PREFIX = "nvidia-"
CUDA_SUFFIX = "-cu12"

Entry = Options


def read_spec(folder: Path, profile: Profile = DEFAULT) -> Options:
    """Read a profile's spec; its dependencies are strings such as `python=3.12.*`.

    Raises:
        DamagedError: it is missing, not YAML, or has no dependencies.
    """
    path = folder / profile.spec
    try:
        spec = yaml.safe_load(path.read_text())
        return {**spec, "dependencies": [str(line) for line in spec["dependencies"]]}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        hint = f"git checkout {profile.spec}"
        raise DamagedError(f"{path}: {' '.join(str(error).split())}", hint=hint) from error


def cpu_spec(folder: Path) -> str:
    """Return environment-cpu.yml: environment.yml without CUDA's packages, and with a CPU build of PyTorch."""
    spec = read_spec(folder)
    kept: list[str] = []
    for dependency in spec["dependencies"]:
        name, _, version = dependency.partition("=")
        if name == "pytorch-gpu":
            kept.append(f"pytorch={version}={CPU_BUILD}")
        elif name not in GPU_ONLY:
            kept.append(dependency)
    return CPU_HEADER + yaml.safe_dump({**spec, "dependencies": kept}, sort_keys=False)


def virtual_packages(folder: Path, profile: Profile) -> Options:
    """Return the virtual packages that a profile is solved for: those of virtual-packages.yml, on a CPU without CUDA.

    Raises:
        DamagedError: virtual-packages.yml cannot be read.
    """
    try:
        virtual: Options = yaml.safe_load((folder / VIRTUAL).read_text())
        for subdir in virtual["subdirs"].values() if profile == CPU else ():
            subdir["packages"].pop("__cuda", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())[:200]
        raise DamagedError(
            f"{folder / VIRTUAL}: not virtual packages ({text})", hint=f"git checkout {VIRTUAL}"
        ) from error
    return virtual


def read_conda_lock(folder: Path, profile: Profile = DEFAULT) -> Options:
    """Read a profile's lock.

    Raises:
        DamagedError: it is missing, not YAML, or not a conda lock.
    """
    path = folder / profile.lock
    try:
        lock = parse(path.read_text())
        if lock["version"] != 1 or not isinstance(lock["package"], list):
            raise ValueError("not version 1")
        for number, entry in enumerate(lock["package"], start=1):
            if not isinstance(entry["name"], str) or "version" not in entry:
                raise ValueError(f"package {number} has no name or version")
            for key in ("hash", "dependencies"):
                if not isinstance(entry.get(key), dict | None):
                    raise ValueError(f"{entry['name']}: {key} is not a table")
        return dict(lock)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise DamagedError(f"{path}: not a conda lock ({text})", hint=f"git checkout {profile.lock}") from error


@functools.lru_cache(maxsize=3)
def parse(text: str) -> Options:
    """Parse a lock once for all checks of a command; callers must not change the result."""
    lock: Options = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return lock


def locked_hash(lock: Options) -> str:
    """Return the content hash that a lock was solved for; empty if it has none."""
    try:
        return str(lock["metadata"]["content_hash"][PLATFORM])
    except (KeyError, TypeError):
        return ""


def provides(entries: list[Entry], name: str) -> bool:
    """Return whether the conda lock has the package that PyPI calls `name`."""
    names = {normalised(entry["name"]) for entry in entries}
    if name.startswith(CUDA_PREFIX) and name.endswith(CUDA_SUFFIX):
        return True
    return name in names or normalised(CONDA_NAMES.get(name, name)) in names


def content_hash(folder: Path, profile: Profile = DEFAULT) -> str:
    """Return the content hash of a profile's spec and virtual packages, by conda-lock's API.

    The same steps as `conda_lock.conda_lock.make_lock_files`, without access to a channel.

    Raises:
        DamagedError: conda-lock cannot read the spec or the virtual packages.
    """
    from conda_lock import content_hash as hashes
    from conda_lock import lookup, src_parser, virtual_package

    with tempfile.TemporaryDirectory() as scratch:
        virtual = Path(scratch) / VIRTUAL
        virtual.write_text(yaml.safe_dump(virtual_packages(folder, profile), sort_keys=False))
        try:
            spec = src_parser.make_lock_spec(
                src_files=[folder / profile.spec], platform_overrides=[PLATFORM], mapping_url=lookup.DEFAULT_MAPPING_URL
            )
            repository = virtual_package.virtual_package_repo_from_specification(virtual)
            with repository:
                return str(hashes.compute_content_hashes(spec, repository)[PLATFORM])
        except Exception as error:  # conda-lock's parsers can raise anything on a broken spec
            text = " ".join(str(error).split())[:200]
            raise DamagedError(f"{folder / profile.spec}: {text}", hint=f"git checkout {profile.spec}") from error


def match_spec(text: str) -> "MatchSpec | None":
    """Parse a requirement of conda's; None if it is not one."""
    from rattler import MatchSpec

    try:
        return MatchSpec(text)
    except Exception:  # rattler's own types
        return None


def wrong_entries(entries: list[Entry]) -> Iterator[tuple[str, str, str]]:
    """Yield (package, found, wanted) for each malformed entry and each dependency that the lock does not satisfy.

    Dependencies are conda match specs; rattler, the library of conda's current solver, compares them.
    """
    records = records_of(entries)
    for entry in entries:
        name = entry["name"]
        if name not in records:
            yield name, f"url {entry.get('url')}", f"the file of {name} {entry['version']}"
            continue
        for kind, digits in (("md5", 32), ("sha256", 64)):
            value = str((entry.get("hash") or {}).get(kind, ""))
            if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                yield name, f"{kind} {value or 'missing'}", f"{digits} hex digits"
    for entry in entries:
        for needed, spec in (entry.get("dependencies") or {}).items():
            if needed.startswith("__"):
                continue  # a virtual package: virtual-packages.yml
            wanted = f"{needed} {spec}".strip()
            if needed not in records:
                yield entry["name"], f"missing dependency {wanted}", wanted
            elif (parsed := match_spec(wanted)) is None or not parsed.matches(records[needed]):
                yield entry["name"], f"{needed} {records[needed].version}", wanted


def unlike_default(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (package, found, wanted) for each package that the cpu profile need not have another build of."""
    default = {entry["name"]: entry for entry in read_conda_lock(folder)["package"]}
    for entry in read_conda_lock(folder, CPU)["package"]:
        name, other = entry["name"], default.get(entry["name"])
        if other is None:
            yield name, str(entry["version"]), "missing"
        elif str(entry["version"]) != str(other["version"]):
            yield name, str(entry["version"]), str(other["version"])
        elif name not in BUILT_TWICE and entry != other:
            key = next(key for key in (*other, *entry) if entry.get(key) != other.get(key))
            yield name, f"{key} {entry.get(key)}", f"{other.get(key)}"


def records_of(entries: list[Entry]) -> Options:
    """Return rattler's record of each well-formed entry, by name, for comparisons as in conda's solver."""
    from rattler import BuildString, PackageRecord

    records: dict[str, PackageRecord] = {}
    for entry in entries:
        if (file := _file_of(entry)) is not None:
            with suppress(Exception):  # rattler's own types: not a name or a version
                records[entry["name"]] = PackageRecord(
                    name=entry["name"],
                    version=str(entry["version"]),
                    build=BuildString(file.group(4)),
                    build_number=int((re.search(r"(\d+)$", file.group(4)) or ["0", "0"])[1]),
                    subdir=file.group(1),
                )
    return records


def build_of(entry: Entry) -> str:
    """Return an entry's build string."""
    file = _file_of(entry)
    return file.group(4) if file else ""


def _file_of(entry: Entry) -> re.Match[str] | None:
    """Return the parts of an entry's URL: subdir, name, version, build; None if it is another package's."""
    file = re.search(r"/([^/]+)/([^/]+)-([^-/]+)-([^-/]+)\.(conda|tar\.bz2)$", str(entry.get("url", "")))
    return file if file and (file.group(2), file.group(3)) == (entry["name"], str(entry["version"])) else None
