"""What is installed in a site-packages folder, against what each distribution's RECORD says. Standard library only."""

import base64
import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

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
    with open(path, "rb") as file:  # noqa: PTH123
        now = hashlib.file_digest(file, "sha256").digest()
    same = base64.urlsafe_b64encode(now).rstrip(b"=").decode() == digest.removeprefix("sha256=")
    return "" if same else "was changed"
