"""Create and open files safely in folders that other users can write to. No torch."""

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from labtrain.base.console import quoted
from labtrain.base.errors import DamagedError


def close_umask() -> int:
    """Prevent this process and its children from making world-writable files; return the umask. umask(2)."""
    before = os.umask(0o077)  # files that another thread makes meanwhile are closed rather than open
    os.umask(before | 0o002)
    return before | 0o002


def open_lock(path: Path) -> int:
    """Open the file of a record lock, creating it if needed, and return its descriptor.

    Only users who may write the file can open it, so nobody else can hold a lock: for a shared lock fcntl(2) does not
    require write permission. These users are its owner, and its group if the umask allows that.

    Raises:
        OSError: this user may not write it, or it is a link.
    """
    mode = 0o600 if close_umask() & stat.S_IWGRP else 0o660
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise FileExistsError(f"{path} is not a regular file")
    shared = found.st_mode & 0o060 == 0o060
    with suppress(OSError):  # another group member owns it
        os.fchmod(descriptor, 0o660 if shared else 0o600)  # from an older labtrain, or copied
    return descriptor


def make_sign(path: Path) -> int:
    """Make a file with a record lock that shows everybody that this process lives; return its descriptor.

    It is a new file each time, locked before anybody else can open it. Only one process at a time may call this.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.fchmod(descriptor, 0o666 & ~close_umask())
    scratch.replace(path)
    return descriptor


def open_inside(folder: Path, name: str, *, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file in an untrusted folder, following no link.

    Args:
        folder: as the user named it; it may itself be a link.
        name: of the file, relative to the folder.
        flags: of open(2).

    Raises:
        DamagedError: a part of the path is a link, or the file is a folder, a pipe or a device; names it.
        OSError: it cannot be opened.
    """
    place = folder
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *parents, last = Path(name).parts
        for part in parents:
            place = _not_a_link(place / part, above)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            os.close(above)
            above = below
        place = _not_a_link(place / last, above)
        # O_NONBLOCK, because opening a pipe would wait for a writer.
        opened = os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=above)
    finally:
        os.close(above)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise _refused(place, "not a regular file")
    return os.fdopen(opened, "rb" if flags == os.O_RDONLY else "ab")


def _not_a_link(path: Path, folder: int) -> Path:
    """Return the path if its last part is not a link; open(2) refuses one that appears later."""
    if path.name == "..":
        raise _refused(path, "outside its folder")
    with suppress(FileNotFoundError):
        mode = os.lstat(path.name, dir_fd=folder).st_mode
        if stat.S_ISLNK(mode):
            raise _refused(path, f"a link to {os.readlink(path.name, dir_fd=folder)}")
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise _refused(path, "not a regular file")
    return path


def _refused(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} is {what}; expected a file of the run itself", hint=f"ls -l {quoted(path)}")
