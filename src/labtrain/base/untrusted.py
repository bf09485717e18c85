"""Read untrusted files: only regular files of a limited size, and JSON of a limited depth.

Also make scratch folders for untrusted code, and remove them.

The content may still be false. But reading cannot hang (a pipe, a device), lead elsewhere (a link), or fill the memory,
and two readers cannot see different values (a duplicate key). Errors are a short ValueError or OSError, or a
DamagedError that names the file; never another exception.
"""

import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from labtrain.base import exact_json
from labtrain.base.console import quoted, shown, warn
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError, not_readable

# Limits, larger than anything that labtrain writes. Files are read as a whole.
RECORD_BYTES = 256 << 20  # a receipt, a manifest, a header, a signature
LINES_BYTES = 8 << 30  # a trail, a history
LARGEST = 1 << 63  # integer
DEEPEST = 100  # levels of lists and mappings
MOST_VALUES = 5_000_000
# A path that is not UTF-8 has \udc80 to \udcff (PEP 383); other lone surrogates are not text.
_BROKEN = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")


class NotPlainError(OSError):
    """The file is a link, a folder, a pipe or a device, or too large."""


def open_plain(path: Path, limit: int = LINES_BYTES) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: of the file; its last part must not be a link.
        limit: maximum size in bytes.

    Raises:
        NotPlainError: it is not a regular file, or larger than the limit.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise NotPlainError(0, "not a valid file name") from error
    except OSError as error:
        if Path(path).is_symlink():
            raise NotPlainError(error.errno, "a link, must be a file") from error
        if error.errno in (6, 19):  # ENXIO, ENODEV: a socket, a device
            raise NotPlainError(error.errno, "not a regular file") from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotPlainError(0, "a folder, must be a file" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        if found.st_size > limit:
            raise NotPlainError(0, f"{found.st_size:,} bytes, at most {limit:,} expected")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(path: Path, limit: int = RECORD_BYTES) -> bytes:
    """Return a file's content; raise like `open_plain`."""
    with open_plain(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # allocated at once, so no more than that


def read_source(path: Path) -> bytes:
    """Return the content of an experiment's file; it may be a link to a regular file.

    Raises:
        ConfigError: it is a pipe, a socket or a device, or a broken link.
    """
    try:
        return read(Path(os.path.realpath(path)), 1 << 60)
    except (NotPlainError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise
        what = error.strerror if isinstance(error, NotPlainError) else "a broken link"
        raise ConfigError(f"{path} is {what}", hint=f"ls -l {quoted(path)}; move it out of the experiment") from error


@contextmanager
def scratch_folder(prefix: str, *, of: str = "") -> Iterator[Path]:
    """Make a folder for untrusted code to write to, and remove it at the end.

    Before Python 3.11.8 and 3.12.1, the cleanup of tempfile.TemporaryDirectory changes permissions through links
    (CVE-2023-6597). An error that leaves it does not name the folder, which is gone by then.

    Args:
        prefix: of the folder's name.
        of: what its files come from, for errors: a bundle, a repository, a run.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except LabtrainError as error:
        _forget(error, folder, of)
        raise
    finally:
        try:
            remove_tree(folder)
        except OSError as error:
            warn(f"cannot remove {folder}: {error.strerror}. hint: rm -rf {quoted(folder)}")


def _forget(error: LabtrainError, folder: Path, of: str) -> None:
    """Let an error name what a folder's files come from, not the folder."""
    for place in (str(folder), shown(folder)):
        said = str(error.args[0])
        if f"{place}/" in said:
            said = said.replace(f"{place}/", "")
            error.args = (f"{of}: {said}" if of else said, *error.args[1:])
        if place in error.hint:
            error.hint = f"ask whoever made {of or 'it'} for it again"


def remove_tree(path: Path) -> None:
    """Remove a folder with its contents, with any permissions and any depth, following no link.

    Raises:
        OSError: something cannot be removed, or `path` is not a folder.
    """
    top = _open_own(str(path), None)
    try:
        while names := os.listdir(top):  # noqa: PTH208  # needs a descriptor
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
    """Move an open folder's subfolders up to `top`, remove its files, and close it."""
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
    """Give a folder the needed permissions, and open it. Linux: O_PATH needs no permissions; chmod by /proc/self/fd.

    Raises:
        NotADirectoryError: it is not a folder, for example a link to one.
    """
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        with suppress(PermissionError):  # another user of the group owns it
            Path(f"/proc/self/fd/{found}").chmod(0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found)
    finally:
        os.close(found)


def is_part(name: object) -> bool:
    """Return whether a value is a single path component: it stays in its folder and is not hidden."""
    return isinstance(name, str) and 0 < len(name) < 256 and name[0] != "." and not re.search(r"[/\x00-\x1f\x7f]", name)


def loads(data: bytes | str) -> Any:
    """Parse JSON in UTF-8, with NaN and infinity as `exact_json` writes them.

    Raises:
        ValueError: it is not JSON, is nested too deeply, has a duplicate key, an invalid or too large number, or a lone
            surrogate.
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
        raise ValueError("an unpaired surrogate")
    return value


def leaves(tree: object) -> Iterator[object]:
    """Yield the values in nested lists and mappings, and the mappings' keys.

    Raises:
        ValueError: they are nested too deeply, or have too many values, for example in a cycle.
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
    """Return whether a value is a number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Return whether a value is an integer of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


@contextmanager
def damage_of(path: object, *, hint: str, what: str = "is broken") -> Iterator[None]:
    """Turn exceptions from reading a file into a DamagedError that names it; FileNotFoundError stays unchanged."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except PermissionError:
        raise not_readable(Path(str(path))) from None
    except OSError as error:
        raise DamagedError(f"{path} {what}: {error.strerror or error}", hint=hint) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise DamagedError(f"{path} {what}: {reason(error)}", hint=hint) from error


def reason(error: Exception) -> str:
    """Say in a few plain words why a file cannot be used. Python's own words can hold the whole file."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, KeyError):
        return f"{str(error.args[0] if error.args else 'a key')[:100]!r} is missing"
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, ValueError):
        return " ".join(str(error)[:3000].split())[:300]
    return "a value is missing or of the wrong kind"


def _mapping(pairs: list[tuple[str, object]]) -> object:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a duplicate key")
    return exact_json.restored(found)


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= (found := int(digits)) < LARGEST:
        raise ValueError(f"{digits[:20]} is too large a number")
    return found
