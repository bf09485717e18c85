"""Write files atomically, sync them to disk, and hash them. No torch."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a scratch file's path to write, which becomes `path` if the block succeeds; it is removed otherwise.

    A crash leaves the old file or the new one.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield scratch
        sync(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old file or the new one."""
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Sync a file, or a folder's entries, to disk: fsync(2)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return a file's sha256, 64 hex digits."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BufferedReader) -> str:
    """Return the sha256 of an open file, 64 hex digits."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """Return a text's sha256 as UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
