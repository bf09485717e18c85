"""Read what `labtrain bundle` wrote: a zip that anybody may have changed or made.

Names, kinds and sizes of all entries are checked before anything is written. Then each file is compared with the sha256
in the crate's metadata, and the whole zip with the sha256 at its end. This detects a change, but not a forgery: the
receipt's digests and signature are checked afterwards, as for every run.
"""

import hashlib
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from labtrain.base.console import shown
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.base.untrusted import RECORD_BYTES, damage_of, loads, open_plain
from labtrain.record.differences import open_run
from labtrain.record.sources import source_digests
from labtrain.review.crate import SEAL, sha256_before_seal
from labtrain.review.crate_metadata import METADATA
from labtrain.review.foreign.repository import Found, check_lock

MOST_BYTES = 1 << 40
MOST_ENTRIES = 100_000
# A bomb grows by a factor of a thousand or more. Text of labtrain's grows by less than twenty.
SMALL_BYTES, MOST_GROWTH = 256 << 20, 50
LONGEST, DEEPEST = 255, 50
ASK = "ask whoever made the bundle for it again"


def is_bundle(path: Path) -> bool:
    """Return whether a path is a zip file."""
    try:
        with open_plain(path, MOST_BYTES) as file:
            return file.read(4) == b"PK\x03\x04" or zipfile.is_zipfile(file)  # by its end: its beginning was changed
    except OSError:
        return False


def unpack(path: Path, scratch: Path) -> Found:
    """Check a bundle and unpack it into a scratch folder.

    Args:
        path: the zip.
        scratch: an existing folder.

    Raises:
        DamagedError: it was changed or is not a bundle; names the file in it.
    """
    with _damage(path), open_plain(path, MOST_BYTES) as file:
        broken = _seal(file)
        with zipfile.ZipFile(file) as archive:
            entries = _checked(archive, os.fstat(file.fileno()).st_size)
            said = _said(archive, entries)
            if (need := sum(each.file_size for each in entries.values())) > (free := shutil.disk_usage(scratch).free):
                raise ConfigError(f"{need:,} bytes to unpack, {free:,} free in {scratch}", hint="TMPDIR=FOLDER")
            home = scratch / "code"
            home.mkdir()
            for name, entry in entries.items():
                _write(archive, entry, home / name, said.get(name))
        if broken:
            raise ValueError(broken)
    _, receipt = open_run(home)
    if source_digests(home) != (wanted := receipt["code"]["sources"]):
        there = source_digests(home)
        names = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        raise DamagedError(f"{shown(path)}: not the sources of its receipt: {', '.join(names[:8])}", hint=ASK)
    check_lock(receipt, home)
    facts = {"bundle": str(path), "run": receipt["run_id"]}
    commit = receipt["code"]["commit"]
    return Found(run=home, home=home, whence=f"sources in the bundle{f', of commit {commit[:12]}' if commit else ''}",
                 facts=facts)  # fmt: skip


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    with damage_of(shown(path), hint=ASK):
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"not a whole zip file: {error}") from error


def _seal(file: BinaryIO) -> str:
    """Return what is wrong with the sha256 at the end; empty if it is right, or if somebody packed it again."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64 - len(SEAL)))
    end = file.read()
    found = sha256_before_seal(file)
    file.seek(0)
    if end[-64:] == found.encode() and end.startswith(SEAL):
        return ""
    # A zip that was packed again has another comment, or none: then its files are checked, and nothing else.
    return "" if b"PK\x05\x06" in end[-22:] else "it was changed after it was written, in the zip's own records"


def _checked(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name.

    Raises:
        ValueError: an entry is not a plain file with a relative name, or they are too many or too large.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        parts = name.split("/")
        if (name != entry.orig_filename or not name.isprintable() or "\\" in name or len(parts) > DEEPEST
                or any(part in ("", ".", "..", ".git") or len(part.encode()) > LONGEST for part in parts)):  # fmt: skip
            raise ValueError(f"{name!r} is not a file's relative name")
        if kind not in (0, stat.S_IFREG) or entry.flag_bits & 0x1:
            raise ValueError(f"{name} is not a plain file")
        if found.setdefault(name, entry) is not entry:
            raise ValueError(f"{name} is there twice")
    for name in found:
        parents = name.split("/")[:-1]
        if above := next((each for n in range(len(parents)) if (each := "/".join(parents[: n + 1])) in found), None):
            raise ValueError(f"{above} is a file and a folder")
    total = sum(entry.file_size for entry in found.values())
    if len(found) > MOST_ENTRIES or total > SMALL_BYTES + MOST_GROWTH * size:
        raise ValueError(f"{len(found)} files of {total:,} bytes in a zip of {size:,}: too much to unpack")
    return found


def _said(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> dict[str, str]:
    """Return the sha256 of each file by the crate's metadata.

    Raises:
        ValueError: there is no metadata, or it does not name exactly the files of the zip.
    """
    if METADATA not in entries or entries[METADATA].file_size > RECORD_BYTES:
        raise ValueError(f"it has no {METADATA}, so `labtrain bundle` did not write it")
    try:
        graph = loads(archive.read(entries[METADATA]))["@graph"]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{METADATA} was changed: {error}") from error
    said = {unquote(each["@id"]): str(each["sha256"]) for each in graph if isinstance(each, dict) and "sha256" in each}
    if names := sorted({*said, METADATA} ^ {*entries}):
        raise ValueError(f"{names[0]} is {'missing' if names[0] in said else f'not in {METADATA}'}")
    return said


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, said: str | None) -> None:
    """Write one file; raise ValueError if its content is not the one that the metadata names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha, left = hashlib.sha256(), entry.file_size
    try:
        with archive.open(entry) as source, path.open("xb") as target:
            while left >= 0 and (part := source.read(1 << 20)):
                left -= len(part)
                sha.update(part)
                target.write(part)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{entry.filename} was changed: {error}") from error
    if said is not None and sha.hexdigest() != said:
        raise ValueError(f"{entry.filename} was changed: its sha256 is {sha.hexdigest()[:12]}, not {said[:12]}")
