"""Create and open files safely in folders that other users can write to. No torch.

A folder is shared if it has the setgid bit and its group can write to it (chmod g+ws), like a repository of git with
core.sharedRepository=group. In a folder that labtrain makes there, everything new is the group's to write, whatever the
umask and whichever program makes it: labtrain gives the folder a default access list, which the kernel applies instead
of the umask (acl(5)). Files outside, and files that a program makes for their owner alone, stay closed.
"""

import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from labtrain.base.console import quoted, shown, warn
from labtrain.base.errors import DamagedError
from labtrain.base.files import sync


def close_umask() -> int:
    """Prevent this process and its children from making world-writable files; return the umask. umask(2)."""
    before = os.umask(0o077)  # files that another thread makes meanwhile are closed rather than open
    os.umask(before | 0o002)
    return before | 0o002


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, unless they exist. Below a shared folder, its group can write to them.

    Others get what they have in the shared folder, in `folder` itself no more than the umask allows.
    """
    umask, missing = close_umask(), [each for each in (folder, *folder.parents) if not each.exists()]
    failed = ""
    for each in reversed(missing):
        with suppress(FileExistsError):  # another rank was faster
            each.mkdir()
            with suppress(PermissionError):  # one that nobody may list
                sync(each.parent)  # a checkpoint is on the disk only if its folders are
            if is_shared(above := each.parent.stat()):
                failed = _share(each, others=above.st_mode & (~umask if each == folder else ~0))
    folder.mkdir(exist_ok=True)  # fails for a file or a broken link
    found = folder.lstat()
    if not missing and is_shared(found) and found.st_uid == os.geteuid() and not _default_access(folder):
        failed = _share(folder, others=found.st_mode)  # from an older labtrain, or copied
    if failed and umask & stat.S_IWGRP:
        warn(
            f"{shown(folder)}: its group cannot write to new files in it: no default access lists in this file system"
            f" ({failed}). hint: umask 002 before the command"
        )


def is_shared(found: os.stat_result) -> bool:
    """Return whether a folder is a group's: what is new in it belongs to the group, which can write to it."""
    return stat.S_ISDIR(found.st_mode) and bool(found.st_mode & stat.S_ISGID) and bool(found.st_mode & stat.S_IWGRP)


ACCESS = "system.posix_acl_default"
# linux/posix_acl_xattr.h: a version, then (tag, permissions, id) of the owner, the group and everybody else.
_LIST, _ENTRY, _NOBODY = struct.Struct("<I"), struct.Struct("<HHI"), 0xFFFFFFFF
_OWNER, _GROUP, _MASK, _OTHERS = 0x01, 0x04, 0x10, 0x20


def _share(folder: Path, *, others: int) -> str:
    """Let the group write to a folder of this user and to all that will be new in it; others never write.

    Returns:
        why the file system does not support it; empty if it does.
    """
    others &= stat.S_IROTH | stat.S_IXOTH
    entries = ((_OWNER, 7), (_GROUP, 7), (_OTHERS, others))
    access = _LIST.pack(2) + b"".join(_ENTRY.pack(tag, allowed, _NOBODY) for tag, allowed in entries)
    # By descriptor: a member of the group could put a link to another folder of this user in its place.
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(opened, stat.S_ISGID | 0o770 | others)
        os.setxattr(opened, ACCESS, access)
        return ""
    except OSError as error:
        return error.strerror or "not supported"
    finally:
        os.close(opened)


def _default_access(folder: Path) -> dict[int, int]:
    """Return the permissions by tag in a folder's default access list; empty if it has none."""
    try:
        found = os.getxattr(folder, ACCESS)
    except OSError:
        return {}
    return {tag: allowed for tag, allowed, _ in _ENTRY.iter_unpack(found[_LIST.size :])}


def mode_in(folder: Path) -> int:
    """Return the mode of a new file in a folder: by its default access list, else by the umask."""
    access = _default_access(folder)
    if not access:
        return 0o666 & ~close_umask()
    group = access.get(_MASK, access[_GROUP])
    return 0o666 & (access[_OWNER] << 6 | group << 3 | access[_OTHERS] & ~stat.S_IWOTH)


def open_lock(path: Path) -> int:
    """Open the file of a record lock, creating it if needed, and return its descriptor.

    Only users who may write the file can open it, so nobody else can hold a lock: for a shared lock fcntl(2) does not
    require write permission. These users are its owner, and its group if that can write to new files in the folder.

    Raises:
        OSError: this user may not write it, or it is a link.
    """
    close_umask()
    mode = 0o660 if mode_in(path.parent) & stat.S_IWGRP else 0o600
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
    scratch = path.with_name(f"{path.name}.new")  # of a killed process, too: only one process at a time is here
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.fchmod(descriptor, mode_in(path.parent))
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
    *parents, last = Path(name).parts
    above = open_folder(folder, parents)
    try:
        place = _not_a_link(folder.joinpath(*parents, last), above)
        # O_NONBLOCK, because opening a pipe would wait for a writer.
        opened = os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=above)
    finally:
        os.close(above)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise _refused(place, "not a regular file")
    return os.fdopen(opened, "rb" if flags == os.O_RDONLY else "ab")


def open_folder(folder: Path, parts: Sequence[str]) -> int:
    """Return the descriptor of a folder in an untrusted one, following no link; raise like `open_inside`."""
    place = folder
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parts:
        try:
            place = _not_a_link(place / part, above)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        finally:
            os.close(above)
        above = below
    return above


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
