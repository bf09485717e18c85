"""Reads files that somebody else may have written: only plain files, of a bounded size, and JSON of a bounded depth.

And makes scratch folders for other people's code, and removes what that leaves there.

What is read here may still say anything. It cannot hang (a pipe, a device), lead elsewhere (a link), fill the memory,
or be two things to two readers (a key that is there twice). What is wrong is a ValueError or an OSError in a few words,
or a DamagedError that names the file; never another exception.
"""

import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from labtrain.base import exact_json
from labtrain.base.console import quoted, warn
from labtrain.base.errors import ConfigError, DamagedError, not_readable

# More than labtrain writes in the longest run; a file is read whole.
RECORD_BYTES = 256 << 20  # a receipt, a manifest, a header, a signature
LINES_BYTES = 8 << 30  # a trail, a history
LARGEST = 1 << 63  # of a whole number
DEEPEST = 100  # level of lists and mappings
MOST_VALUES = 5_000_000
# A path that is no UTF-8 is written with \udc80 to \udcff (PEP 383); other halves of a pair are no text at all.
_BROKEN = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")


class NotPlainError(OSError):
    """A link, a folder, a pipe, a device, or larger than what it should be."""


def open_plain(path: Path, limit: int = LINES_BYTES) -> BinaryIO:
    """Open a file to read it.

    Args:
        path: of the file; its last part is no link.
        limit: the most bytes that it may have.

    Raises:
        NotPlainError: it is no plain file of at most that size.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise NotPlainError(0, "no name of a file") from error
    except OSError as error:
        if Path(path).is_symlink():
            raise NotPlainError(error.errno, "a link, must be a file") from error
        if error.errno in (6, 19):  # ENXIO, ENODEV: a socket, a device
            raise NotPlainError(error.errno, "no plain file") from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotPlainError(0, "a folder, must be a file" if stat.S_ISDIR(found.st_mode) else "no plain file")
        if found.st_size > limit:
            raise NotPlainError(0, f"{found.st_size:,} bytes, at most {limit:,} expected")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(path: Path, limit: int = RECORD_BYTES) -> bytes:
    """Return a file's content; raises as `open_plain` does."""
    with open_plain(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # allocated at once: no more than that


def read_source(path: Path) -> bytes:
    """Return the content of a file of an experiment, which may be a link to one.

    Raises:
        ConfigError: it is a pipe, a socket or a device, or a link to nothing.
    """
    try:
        return read(Path(os.path.realpath(path)), 1 << 60)
    except (NotPlainError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise
        what = error.strerror if isinstance(error, NotPlainError) else "a link to nothing"
        raise ConfigError(f"{path} is {what}", hint=f"ls -l {quoted(path)}; move it out of the experiment") from error


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Make a folder that other people's code writes to, and remove it at the end.

    Before Python 3.11.8 and 3.12.1, tempfile.TemporaryDirectory changes permissions through links when it cleans up
    (CVE-2023-6597).
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        try:
            remove_tree(folder)
        except OSError as error:
            warn(f"{folder} could not be removed: {error.strerror}. hint: rm -rf {quoted(folder)}")


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it: through no link, whatever its permissions, and however deep.

    Raises:
        OSError: something cannot be removed, or the folder is none.
    """
    top = _open_own(str(path), None)
    try:
        while names := os.listdir(top):  # noqa: PTH208  # of what is open
            for name in names:
                with suppress(NotADirectoryError):
                    _raise_folders(_open_own(name, top), top)
                    os.rmdir(name, dir_fd=top)
                    continue
                os.unlink(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _raise_folders(folder: int, top: int) -> None:
    """Move the folders of an open one up to `top`, and remove its files; close it."""
    try:
        for name in os.listdir(folder):
            try:
                os.close(_open_own(name, folder))
                os.rename(name, secrets.token_hex(16), src_dir_fd=folder, dst_dir_fd=top)
            except NotADirectoryError:
                os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)


def _open_own(name: str, parent: int | None) -> int:
    """Open a folder, which gets the permissions for it. Linux: O_PATH needs none, and /proc/self/fd is what is open.

    Raises:
        NotADirectoryError: it is no folder, a link to one for example.
    """
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        Path(f"/proc/self/fd/{found}").chmod(0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found)
    finally:
        os.close(found)


def is_part(name: object) -> bool:
    """Return whether a value is one part of a path: a name that stays in its folder, and no hidden one."""
    return isinstance(name, str) and 0 < len(name) < 256 and name[0] != "." and not re.search(r"[/\x00-\x1f\x7f]", name)


def loads(data: bytes | str) -> Any:
    """Return what JSON in UTF-8 holds, NaN and infinity as `exact_json` writes them.

    Raises:
        ValueError: it is none, is nested too deeply, holds a key twice, a number that is none or too large, or half of
            a character.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_mapping, parse_constant=_refuse, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except TypeError as error:  # a key that is a list
        raise ValueError(str(error)) from error
    for _ in leaves(value):
        pass
    if "\\u" in text and _BROKEN.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half a character")
    return value


def leaves(tree: object) -> Iterator[object]:
    """Yield what nested lists and mappings hold, and the keys of these.

    Raises:
        ValueError: they are too deep to walk, or hold one another over and over: more values than any file has.
    """
    level, left = [tree], MOST_VALUES
    for _ in range(DEEPEST):
        below: list[object] = []
        for node in level:
            if isinstance(node, dict | list | tuple):
                left -= len(node) + 1
                if left < 0:
                    raise ValueError(f"more than {MOST_VALUES:,} values")
                below += [*node, *node.values()] if isinstance(node, dict) else node
            else:
                yield node
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {DEEPEST} levels")


def is_number(value: object) -> bool:
    """Return whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


@contextmanager
def damage_of(path: object, *, hint: str, what: str = "is broken") -> Iterator[None]:
    """Turn what reading a file raises into a DamagedError that names it; that it is not there stays as it is."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except PermissionError:
        raise not_readable(Path(str(path))) from None
    except OSError as error:
        raise DamagedError(f"{path} {what}: {error.strerror or error}", hint=hint) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        raise DamagedError(f"{path} {what}: {' '.join(said.split())[:300]}", hint=hint) from error


def _mapping(pairs: list[tuple[str, object]]) -> object:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return exact_json.restored(found)


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON's")


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= (found := int(digits)) < LARGEST:
        raise ValueError(f"{digits[:20]} is too large a number")
    return found
