"""What is installed in a site-packages folder, against what each distribution's RECORD says. Standard library only."""

import base64
import csv
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from labtrain.base.contracts import InstalledFiles
from labtrain.base.files import file_sha256

NEEDED = ("METADATA", "RECORD")  # of each .dist-info: without them no installer knows what it has


def names(folders: Iterable[Path]) -> list[str]:
    """Return the name and version of each distribution, as its folder has them."""
    return sorted(info.name.removesuffix(".dist-info") for folder in folders for info in folder.glob("*.dist-info"))


def changes(folder: Path, *, deep: bool = False) -> Iterator[tuple[Path, str, str]]:
    """Yield the .dist-info, the name and the fate of each installed file; the fate of an unchanged one is empty.

    By default only those are read whose size or time says that they changed after they were installed: seven gigabytes
    take longer than a second. RECORD comes out of the wheel, and the wheel's own hash was checked then.
    """
    for info in folder.glob("*.dist-info"):
        for name in NEEDED:
            if not (info / name).exists():
                yield info, f"{info.name}/{name}", "is missing"
        if not (info / "RECORD").exists():
            continue
        installed = (info / "RECORD").stat().st_mtime
        with (info / "RECORD").open(newline="") as file:
            for name, digest, size, *_ in csv.reader(file):
                if digest.startswith("sha256="):
                    yield info, name, _fate(f"{folder}/{name}", digest, size, installed, deep=deep)


def _fate(path: str, digest: str, size: str, installed: float, *, deep: bool) -> str:
    try:  # plain functions: sixty thousand Path objects take half a second
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return "is missing"
    if not deep and stat.st_mtime <= installed + 1 and (not size or stat.st_size == int(size)):
        return ""
    now = bytes.fromhex(file_sha256(Path(path)))
    same = base64.urlsafe_b64encode(now).rstrip(b"=").decode() == digest.removeprefix("sha256=")
    return "" if same else "was changed"


def files_state() -> InstalledFiles:
    """Return what a receipt says of the installed files: how many, and each that is not as it was installed."""
    changed, files = changed_files()
    return {"files": files, "changed_files": changed}


def changed_files(*, deep: bool = False) -> tuple[list[str], int]:
    """Return each installed file that is not what its distribution's RECORD says, and how many there are.

    By default only those are read whose size or time says that they changed.
    """
    changed, files = [], 0
    for entry in dict.fromkeys(sys.path):
        for info, name, fate in changes(Path(entry), deep=deep) if entry else ():
            files += 1
            if fate:
                changed.append(f"{name} of {info.name.partition('-')[0]} {fate}")
    return changed, files
