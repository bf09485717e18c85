"""Write files so that a crash or a full disk loses nothing, sync them to disk, and hash them. No torch."""

import ctypes
import fcntl
import hashlib
import io
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING

from labtrain.base.errors import LabtrainError, os_error_in, write_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK_BYTES = 8 << 20  # of a large file; the disk begins to write each one at once
SMALL_BYTES = 1 << 20  # shorter writes are joined to this much
LEFT = re.compile(r"\.part-[0-9a-f]{8}")  # after the last dot: torch.save writes the name before it into its file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names the file; an OSError of a path elsewhere passes.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        yield
    except LabtrainError:
        raise
    except Exception as error:
        found = os_error_in(error)  # loggers and torch raise their own after it
        if found is None or not _is_of(found, path):
            raise
        raise write_error(path, found) from error


def _is_of(error: OSError, path: Path) -> bool:
    """Return whether an OSError is about a path, its folder, or something in either; most name no file."""
    named = [each for each in (error.filename, error.filename2) if isinstance(each, str | os.PathLike)]
    return all(Path(each).absolute().is_relative_to(path.absolute().parent) for each in named)


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Yield the path of a new empty file beside `path`, and remove it at the end unless it was renamed.

    It also removes what killed processes left there. A process holds a lock on its scratch file (flock(2)), so one that
    nobody holds a lock on is left over.
    """
    _remove_left(path)
    while True:
        scratch = path.with_name(f"{_stem(path)}.part-{secrets.token_hex(4)}")
        held = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # some network file systems have no locks: nobody removes a file there
            fcntl.flock(held, fcntl.LOCK_EX)
        if os.fstat(held).st_nlink:
            break
        os.close(held)  # another process removed it in the moment before the lock
    try:
        yield scratch
    finally:
        os.close(held)
        scratch.unlink(missing_ok=True)


def _stem(path: Path) -> str:
    return f".{path.name.removeprefix('.')}"


def _remove_left(path: Path) -> None:
    """Remove the scratch files for `path` that no process holds."""
    stem = _stem(path)
    for left in [each for each in path.parent.iterdir() if each.name.startswith(stem)]:
        if LEFT.fullmatch(left.name.removeprefix(stem)) is None:
            continue
        with suppress(OSError):  # another user's, or another process removes it
            found = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(found)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a scratch file's path to write, which becomes `path` if the block succeeds; it is removed otherwise.

    A crash leaves the old file or the new one.
    """
    with scratch_beside(path) as scratch:
        yield scratch
        sync(scratch)
        scratch.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old file or the new one."""
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)


class Lines:
    """A file of lines that only grows. A line is with the kernel when `add` returns, so a kill loses none.

    Args:
        path: of the file, which may exist.

    Raises:
        WriteError: here and below: it cannot be written. A part of a line may then be in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self.file = path.open("ab", buffering=0)
            sync(path.parent)  # a checkpoint may be on the disk before the next sync

    def add(self, line: str) -> None:
        """Append a line."""
        with writing(self.path):
            write_all(self.file.fileno(), line.encode() + b"\n")

    def close(self) -> None:
        """Close the file; call it any number of times."""
        with writing(self.path):
            self.file.close()


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes: write(2) may take a part."""
    while data:
        data = data[os.write(descriptor, data) :]


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
