"""The conda lock: its entries, their dependencies, and its content hash. No solver runs here."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError
from labtrain.record.provenance import normalised

SPEC = "environment.yml"
VIRTUAL = "virtual-packages.yml"
LOCK = "conda-lock.yml"
PLATFORM = "linux-64"

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


def read_conda_lock(folder: Path) -> Options:
    """Read conda-lock.yml.

    Raises:
        DamagedError: it is missing, not YAML, or not a conda lock.
    """
    path = folder / LOCK
    try:
        lock = _parse(path.read_text())
        if lock["version"] != 1 or not isinstance(lock["package"], list):
            raise ValueError("not version 1")
        return dict(lock)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise DamagedError(f"{path}: not a conda lock ({text})", hint="git checkout conda-lock.yml") from error


@functools.lru_cache(maxsize=1)
def _parse(text: str) -> Options:
    """Parse a lock once for all checks of a command; callers must not change the result."""
    lock: Options = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return lock


def provides(entries: list[Entry], name: str) -> bool:
    """Return whether the conda lock has the package that PyPI calls `name`."""
    names = {normalised(entry["name"]) for entry in entries}
    if name.startswith(CUDA_PREFIX) and name.endswith(CUDA_SUFFIX):
        return True
    return name in names or normalised(CONDA_NAMES.get(name, name)) in names


def content_hash(folder: Path) -> str:
    """Return the content hash of environment.yml and virtual-packages.yml, by conda-lock's API.

    The same steps as `conda_lock.conda_lock.make_lock_files`, without access to a channel.
    """
    from conda_lock import content_hash as hashes
    from conda_lock import lookup, src_parser, virtual_package

    spec = src_parser.make_lock_spec(
        src_files=[folder / SPEC], platform_overrides=[PLATFORM], mapping_url=lookup.DEFAULT_MAPPING_URL
    )
    repository = virtual_package.virtual_package_repo_from_specification(folder / VIRTUAL)
    with repository:
        return str(hashes.compute_content_hashes(spec, repository)[PLATFORM])


def wrong_entries(entries: list[Entry]) -> Iterator[tuple[str, str, str]]:
    """Yield (package, found, wanted) for each malformed entry and each dependency that the lock does not satisfy.

    Dependencies are conda match specs; rattler, the library of conda's current solver, compares them.
    """
    from rattler import MatchSpec

    for entry in entries:
        name = entry["name"]
        if _file_of(entry) is None:
            yield name, f"url {entry.get('url')}", f"the file of {name} {entry['version']}"
            continue
        for kind, digits in (("md5", 32), ("sha256", 64)):
            value = str((entry.get("hash") or {}).get(kind, ""))
            if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                yield name, f"{kind} {value or 'missing'}", f"{digits} hex digits"
    records = records_of(entries)
    for entry in entries:
        for needed, spec in (entry.get("dependencies") or {}).items():
            if needed.startswith("__"):
                continue  # a virtual package: virtual-packages.yml
            wanted = f"{needed} {spec}".strip()
            if needed not in records:
                yield entry["name"], f"missing dependency {wanted}", wanted
            elif not MatchSpec(wanted).matches(records[needed]):
                yield entry["name"], f"{needed} {records[needed].version}", wanted


def records_of(entries: list[Entry]) -> Options:
    """Return rattler's record of each well-formed entry, by name, for comparisons as in conda's solver."""
    from rattler import BuildString, PackageRecord

    records: dict[str, PackageRecord] = {}
    for entry in entries:
        if (file := _file_of(entry)) is not None:
            records[entry["name"]] = PackageRecord(
                name=entry["name"],
                version=str(entry["version"]),
                build=BuildString(file.group(4)),
                build_number=int((re.search(r"(\d+)$", file.group(4)) or ["0", "0"])[1]),
                subdir=file.group(1),
            )
    return records


def _file_of(entry: Entry) -> re.Match[str] | None:
    """Return the parts of an entry's URL: subdir, name, version, build; None if it is another package's."""
    file = re.search(r"/([^/]+)/([^/]+)-([^-/]+)-([^-/]+)\.(conda|tar\.bz2)$", str(entry.get("url", "")))
    return file if file and (file.group(2), file.group(3)) == (entry["name"], str(entry["version"])) else None
