"""Compare installed files in site-packages with each distribution's RECORD. Standard library only."""

import base64
import csv
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISREG

from labtrain.base.contracts import InstalledFiles
from labtrain.base.files import file_sha256

NEEDED = ("METADATA", "RECORD")  # in each .dist-info: without these, installers cannot read it


def names(folders: Iterable[Path]) -> list[str]:
    """Return the name and version of each distribution, from its folder's name."""
    return sorted(info.name.removesuffix(".dist-info") for folder in folders for info in folder.glob("*.dist-info"))


def changes(folder: Path, *, deep: bool = False) -> Iterator[tuple[Path, str, str]]:
    """Yield .dist-info, name and change of each installed file; the change of an unchanged file is empty.

    By default only files are hashed whose size or time shows a change since the installation: hashing all 8 GB takes
    long. RECORD comes from the wheel, whose hash was checked at installation.
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
    try:  # os.stat: sixty thousand Path objects take half a second
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return "is missing"
    if not deep and stat.st_mtime <= installed + 1 and (not size or stat.st_size == int(size)):
        return ""
    if not S_ISREG(stat.st_mode):  # a RECORD that somebody else wrote can name a device
        return "is not a file"
    now = bytes.fromhex(file_sha256(Path(path)))
    same = base64.urlsafe_b64encode(now).rstrip(b"=").decode() == digest.removeprefix("sha256=")
    return "" if same else "was changed"


def files_state() -> InstalledFiles:
    """Return the receipt's entry about installed files: their number, and each one that changed."""
    changed, files = changed_files()
    return {"files": files, "changed_files": changed}


def changed_files(*, deep: bool = False) -> tuple[list[str], int]:
    """Return each installed file that differs from its RECORD, and the number of all files.

    By default only files are hashed whose size or time shows a change.
    """
    changed, files = [], 0
    for entry in dict.fromkeys(sys.path):
        for info, name, fate in changes(Path(entry), deep=deep) if entry else ():
            files += 1
            if fate:
                changed.append(f"{name} of {info.name.partition('-')[0]} {fate}")
    return changed, files
