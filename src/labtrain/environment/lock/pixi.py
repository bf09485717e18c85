"""pixi.toml and pixi.lock: the two conda environments for pixi, derived from the conda specs and locks.

https://pixi.sh. rattler, pixi's own library, writes the lock. A conda lock has neither the size of a package nor its
constraints, so the full records come from the channel, once; they stay in pixi.lock as long as the package does.
"""

import asyncio
import json
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from labtrain.base.console import few
from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.environment.lock import conda

if TYPE_CHECKING:
    from rattler import PackageRecord, RepoDataRecord

MANIFEST = "pixi.toml"
LOCK = "pixi.lock"
VERSION = 7  # of the lock file
TIMEOUT_S = 600
# By pixi's environment: the profile, and the platform. `default` needs a driver of CUDA 12, as cuda-version 12 does.
ENVIRONMENTS = {"default": (conda.DEFAULT, "linux-64-cuda"), "cpu": (conda.CPU, conda.PLATFORM)}
CUDA = "12"
# 0.71 is the first pixi with virtual packages per platform.
HEAD = f"""\
# {conda.SPEC} and {conda.CPU.spec} for pixi.
# Written by `labtrain lock write`: change {conda.SPEC} instead.
[workspace]
name = "labtrain"
requires-pixi = ">=0.71"
channels = {{channels}}
platforms = [{{{{ name = "linux-64-cuda", platform = "linux-64", cuda = "{CUDA}" }}}}, "linux-64"]

[environments]
default = ["gpu"]
cpu = ["cpu"]

# In an experiment: pixi run train. In labtrain's own repository: pixi run editable.
[tasks.packages]
cmd = "python -m pip install --quiet --no-deps --require-hashes -r requirements-conda.lock"
[tasks.labtrain]
cmd = "python -m pip install --quiet --no-deps --require-hashes -r labtrain.lock"
depends-on = ["packages"]
[tasks.editable]
cmd = "python -m pip install --quiet --no-deps --no-build-isolation -e ."
depends-on = ["packages"]
[tasks.train]
cmd = "python train.py"
depends-on = ["labtrain"]
"""


def manifest(folder: Path) -> str:
    """Return pixi.toml: the dependencies of both specs, and those of one as a feature."""
    specs = {profile: conda.read_spec(folder, profile)["dependencies"] for profile in conda.PROFILES}
    channels = [channel for channel in conda.read_spec(folder)["channels"] if channel != "nodefaults"]
    both = [dependency for dependency in specs[conda.DEFAULT] if dependency in specs[conda.CPU]]
    tables = {
        "dependencies": both,
        "feature.gpu.dependencies": [dependency for dependency in specs[conda.DEFAULT] if dependency not in both],
        "feature.cpu.dependencies": [dependency for dependency in specs[conda.CPU] if dependency not in both],
    }
    text = HEAD.format(channels=json.dumps(channels))
    for table, dependencies in tables.items():
        if table.startswith("feature"):
            platform = ENVIRONMENTS["cpu" if "cpu" in table else "default"][1]
            text += f"\n[{table.removesuffix('.dependencies')}]\nplatforms = {json.dumps([platform])}\n"
        text += f"\n[{table}]\n" + "".join(_line(dependency) for dependency in dependencies)
    return text


def _line(dependency: str) -> str:
    """Return a dependency of conda's as a line of TOML: conda's `=1.2` is pixi's `1.2.*`."""
    spec = conda.match_spec(dependency)
    if spec is None or spec.name is None:
        raise DamagedError(
            f"{conda.SPEC}: not a requirement of conda's: {dependency}", hint=f"git checkout {conda.SPEC}"
        )
    version = json.dumps(str(spec.version or "*"))
    build = json.dumps(str(spec.build)) if spec.build else ""
    return f"{spec.name.normalized} = " + (f"{{ version = {version}, build = {build} }}\n" if build else f"{version}\n")


def read_pixi_lock(folder: Path) -> Options:
    """Read pixi.lock.

    Raises:
        DamagedError: it is missing, not YAML, or not a lock of conda packages.
    """
    path = folder / LOCK
    try:
        lock = conda.parse(path.read_text())
        for number, entry in enumerate(lock["packages"], start=1):
            if not isinstance(entry, dict) or not isinstance(entry.get("conda"), str):
                raise ValueError(f"package {number} has no address")
        for name in ENVIRONMENTS:
            locked_urls(lock, name)
        return lock
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise DamagedError(f"{path}: not a lock of pixi ({text})", hint=f"git checkout {LOCK}") from error


def locked_urls(lock: Options, environment: str) -> list[str]:
    """Return the addresses of an environment's packages."""
    by_platform = lock["environments"][environment]["packages"]
    return [reference["conda"] for reference in by_platform[ENVIRONMENTS[environment][1]]]


def file_name(entry: Mapping[str, object]) -> str:
    """Return the name of the file that an entry of pixi.lock names."""
    return str(entry["conda"]).rpartition("/")[2]


def frame(lock: Options) -> Options:
    """Return what pixi.lock has besides packages: version, platforms, channels."""
    environments = {
        name: {**environment, "packages": {platform: [] for platform in environment["packages"]}}
        for name, environment in lock["environments"].items()
    }
    return {**lock, "environments": environments, "packages": []}


def wanted_entries(folder: Path) -> dict[str, dict[str, Options]]:
    """Return the entries of the conda locks by pixi's environment and address."""
    return {
        name: {str(entry.get("url")): entry for entry in conda.read_conda_lock(folder, profile)["package"]}
        for name, (profile, _) in ENVIRONMENTS.items()
    }


def lock_text(folder: Path, records: Mapping[str, "RepoDataRecord"]) -> str:
    """Return pixi.lock, written by rattler.

    Args:
        folder: that of the conda locks.
        records: of each package, by address.
    """
    from rattler import LockChannel, LockFile, LockPlatform, Subdir

    platforms = {
        platform: LockPlatform(
            platform, Subdir(conda.PLATFORM), [f"__cuda={CUDA}"] if platform != conda.PLATFORM else []
        )
        for _, platform in ENVIRONMENTS.values()
    }
    lock = LockFile(list(platforms.values()))
    for name, entries in wanted_entries(folder).items():
        channels = sorted({_channel(url) for url in entries})
        lock.set_channels(name, [LockChannel(f"{channel}/") for channel in channels])
        for url in sorted(entries):
            lock.add_conda_package(name, platforms[ENVIRONMENTS[name][1]], records[url])
    with tempfile.TemporaryDirectory() as scratch:
        lock.to_path(Path(scratch) / LOCK)
        return (Path(scratch) / LOCK).read_text()


def full_records(folder: Path, changed: Set[str]) -> dict[str, "RepoDataRecord"]:
    """Return the full record of each package of the conda locks, by address: from pixi.lock, else from the channel.

    Args:
        folder: that of the locks.
        changed: the files of pixi.lock whose records may not be reused, because somebody changed them.

    Raises:
        LabtrainError: a package is new, and its channel cannot be reached, or has another file of this name.
    """
    wanted = {url: entry for entries in wanted_entries(folder).values() for url, entry in entries.items()}
    here = {
        url: record
        for url, record in _recorded(folder).items()
        if url in wanted and is_same(record, wanted[url]) and record.file_name not in changed
    }
    missing = {url: entry for url, entry in wanted.items() if url not in here}
    return here | _fetched(missing) if missing else here


def is_same(record: "PackageRecord", entry: Options) -> bool:
    """Return whether a record has the hashes of a conda lock's entry."""
    found = {"md5": record.md5, "sha256": record.sha256}
    return all(
        digest is not None and digest.hex() == (entry.get("hash") or {}).get(kind) for kind, digest in found.items()
    )


def _recorded(folder: Path) -> dict[str, "RepoDataRecord"]:
    """Return the records in pixi.lock, by address; none if it is missing or damaged."""
    from rattler import LockFile

    try:
        environments = [environment for _, environment in LockFile.from_path(folder / LOCK).environments()]
    except Exception:  # rattler raises its own types, and OSError
        return {}
    return {
        record.url: record
        for environment in environments
        for platform in environment.platforms()
        for record in environment.conda_repodata_records_for_platform(platform) or ()
    }


def _fetched(missing: Mapping[str, Options]) -> dict[str, "RepoDataRecord"]:
    """Return the records of these packages, by address, from their channels."""
    names = few([url.rpartition("/")[2] for url in sorted(missing)])
    records: dict[str, RepoDataRecord] = {}
    for channel in sorted({_channel(url) for url in missing}):
        try:
            found = asyncio.run(_query(channel, sorted({missing[url]["name"] for url in missing})))
        except Exception as error:  # rattler raises its own types; the network any
            text = " ".join(str(error).split())[:200]
            hint = f"run it with access to {channel}, or git checkout the conda locks and {LOCK}"
            raise LabtrainError(f"{LOCK} needs the full records of {names}: {text}", hint=hint) from error
        records |= {record.url: record for record in found if record.url in missing}
    for url, entry in sorted(missing.items()):
        if url not in records or not is_same(records[url], entry):
            what = "has other hashes for it" if url in records else "does not have it"
            raise LabtrainError(
                f"{LOCK} needs the full record of {url.rpartition('/')[2]}, and {_channel(url)} {what}",
                hint=f"change {conda.SPEC} so that the conda locks are solved again",
            )
    return records


async def _query(channel: str, names: list[str]) -> list["RepoDataRecord"]:
    from rattler import Channel, Gateway, Subdir

    subdirs = [Subdir(conda.PLATFORM), Subdir("noarch")]
    answer = Gateway().query([Channel(channel)], subdirs, names, recursive=False)
    return [record for records in await asyncio.wait_for(answer, TIMEOUT_S) for record in records]


def _channel(url: str) -> str:
    """Return the address of a package's channel: before the platform and the file."""
    return url.rsplit("/", 2)[0]
