"""Write files atomically, sync them to disk, and hash them. No torch."""

import ctypes
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK_BYTES = 8 << 20  # of a large file; the disk begins to write each one at once
SMALL_BYTES = 1 << 20  # shorter writes are joined to this much


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


def write_hashed(path: Path, write: Callable[[IO[bytes]], object], hasher: Executor) -> str:
    """Write a new file to the disk with little memory, and return its sha256, 64 hex digits.

    Args:
        path: of the file.
        write: gets the open file.
        hasher: takes the sha256 of each part in another thread while the part is written.
    """
    with _HashedFile(path, hasher) as raw, io.BufferedWriter(raw, SMALL_BYTES) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return raw.sha.hexdigest()


class _HashedFile(io.FileIO):
    """A file that is written in order. Hashing takes twice as long as writing, and both leave the interpreter free."""

    def __init__(self, path: Path, hasher: Executor) -> None:
        super().__init__(path, "xb")
        self.sha, self.hasher, self.size = hashlib.sha256(), hasher, 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of the data, unlike other unbuffered files."""
        view = memoryview(data)
        hashed = self.hasher.submit(self.sha.update, view)
        try:
            done = 0
            while done < len(view):
                size = super().write(view[done : done + CHUNK_BYTES])
                _begin_writeback(self.fileno(), self.size, size)
                done += size
                self.size += size
        finally:
            hashed.result()  # the memory is the caller's
        return done


def _begin_writeback(descriptor: int, offset: int, size: int) -> None:
    """Have the kernel start to write a part of a file to the disk; otherwise it would start with the fsync.

    Linux: sync_file_range(2), SYNC_FILE_RANGE_WRITE.
    """
    begin = ctypes.CDLL(None).sync_file_range
    begin.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    begin(descriptor, offset, size, 2)


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
