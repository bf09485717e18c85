"""A stand-in for the `conda` program, on rattler, the library of conda's current solver: what conda-lock calls.

`--version`, `info --json`, and `create --file EXPLICIT --prefix P`, whose lines are `url#md5`; as conda does, it refuses
a package whose md5 is another. `create --dry-run --json --channel C SPEC...` solves, with the virtual packages of
CONDA_OVERRIDE_* and the pins of CONDA_PINNED_PACKAGES. No conda can be had where these tests run.
"""

import asyncio
import json
import os
import re
import sys
from pathlib import Path

from rattler import (
    BuildString,
    Channel,
    GenericVirtualPackage,
    MatchSpec,
    PackageName,
    PackageRecord,
    RepoDataRecord,
    Subdir,
    Version,
    install,
    solve,
)


def record(line: str) -> RepoDataRecord:
    url, _, md5 = line.partition("#")
    channel, subdir, file = url.rsplit("/", 2)
    name, version, build = re.sub(r"\.(conda|tar\.bz2)$", "", file).rsplit("-", 2)
    package = PackageRecord(
        name=name, version=version, build=BuildString(build), build_number=0, subdir=subdir, md5=bytes.fromhex(md5)
    )
    return RepoDataRecord(package_record=package, file_name=file, url=url, channel=channel)


def solved(arguments: list[str]) -> dict[str, object]:
    """Return what `conda create --dry-run --json` prints."""
    words = iter(arguments[1:])
    channels, specs = [], []
    for word in words:
        if word == "--channel":
            channels.append(next(words))
        elif word == "--prefix":
            next(words)
        elif not word.startswith("--"):
            specs.append(word)
    versions = {name: os.environ.get(f"CONDA_OVERRIDE_{name.upper()}") for name in ("cuda", "glibc", "linux")}
    virtual = [
        GenericVirtualPackage(PackageName(f"__{name}"), Version(version), BuildString("0"))
        for name, version in versions.items()
        if version
    ]
    pins = [pin for pin in os.environ.get("CONDA_PINNED_PACKAGES", "").split("&") if pin]
    remote = [Channel(channel) for channel in channels if channel.startswith("http")]
    chosen = asyncio.run(solve(remote, [MatchSpec(spec) for spec in specs], platforms=[Subdir("linux-64"), Subdir("noarch")],
                               virtual_packages=virtual, constraints=[MatchSpec(pin) for pin in pins]))  # fmt: skip
    fetch = [
        {"name": record.name.normalized, "version": str(record.version), "url": record.url, "md5": record.md5.hex(),
         "sha256": record.sha256.hex(), "depends": list(record.depends)}
        for record in chosen
        if record.md5 and record.sha256
    ]  # fmt: skip
    return {"success": True, "actions": {"FETCH": fetch, "LINK": []}}


def main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print("conda 25.1.0")
    elif arguments[:1] == ["info"]:
        print(json.dumps({"conda_version": "25.1.0", "platform": "linux-64", "virtual_packages": []}))
    elif arguments[:1] == ["create"] and "--dry-run" in arguments:
        print(json.dumps(solved(arguments)))
    elif arguments[:1] == ["create"]:
        prefix, file = (arguments[arguments.index(option) + 1] for option in ("--prefix", "--file"))
        lines = [line.strip() for line in Path(file).read_text().splitlines() if "://" in line]
        cache = Path(prefix).parent / "package-cache"
        asyncio.run(install([record(line) for line in lines], prefix, cache_dir=cache, show_progress=False))
    else:
        print(f"the stand-in for conda does not know {arguments}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # not through the interpreter's end, where rattler's threads still run: seen once, a SIGSEGV
