"""Write files atomically, sync them to disk, and hash them. No torch."""

import ctypes
import hashlib
import io
import os
import secrets
import threading
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


def write_hashed(path: Path, write: Callable[[IO[bytes]], object], pool: Executor) -> str:
    """Write a new file to the disk, and return its sha256, 64 hex digits.

    Args:
        path: of the file.
        write: gets the open file, and writes it in order.
        pool: hashes the file in another thread while it is written.
    """
    with _InChunks(path, "xb") as raw, io.BufferedWriter(raw, SMALL_BYTES) as file:
        complete = threading.Event()
        hashed = pool.submit(_hash_behind, path, complete)
        try:
            write(file)
            file.flush()
        finally:
            complete.set()
        os.fsync(file.fileno())
    return hashed.result()


class _InChunks(io.FileIO):
    """A file that is written in chunks, however much it is given: some file systems let nobody read during a write."""

    def write(self, data: "ReadableBuffer", /) -> int:
        return super().write(memoryview(data)[:CHUNK_BYTES])


def _hash_behind(path: Path, complete: threading.Event) -> str:
    """Return the sha256 of a file that is being written in order, and start to write it to the disk.

    Linux: sync_file_range(2), SYNC_FILE_RANGE_WRITE. Otherwise the disk would start only with the fsync at the end.
    """
    begin_writeback = ctypes.CDLL(None).sync_file_range
    begin_writeback.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    sha, buffer, done = hashlib.sha256(), memoryview(bytearray(SMALL_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while True:
            last = complete.is_set()
            while size := file.readinto(buffer):
                sha.update(buffer[:size])
                begin_writeback(file.fileno(), done, size, 2)
                done += size
            if last:
                return sha.hexdigest()
            complete.wait(0.002)


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
