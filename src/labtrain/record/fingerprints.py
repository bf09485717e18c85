"""A dataset's fingerprint: one sha256 over the files, arrays and values that it holds. No torch.

If a dataset has a method `fingerprint()`, its result counts. Otherwise labtrain walks the dataset's attributes, at any
depth. Tensors, arrays and pandas tables count by dtype, shape and content. Paths, texts that name a file or folder, and
memory maps count by the files' sha256, relative to the folder. Plain values count as such, objects (such as transforms)
by type and attributes, functions by name. Objects without readable content and folders of more than 100,000 files are
listed as opaque: the digest does not cover their content.

Files are hashed once. ~/.cache/labtrain keeps the sha256 by path, size, inode, mtime and ctime. The ctime detects an
edit after which the mtime was set back.
"""

import builtins
import datetime
import functools
import hashlib
import io
import logging
import os
import random
import sqlite3
import sys
import time
import types
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labtrain.base.console import full_name
from labtrain.base.contracts import DataRecord, DatasetRecord
from labtrain.base.errors import ConfigError
from labtrain.base.files import file_sha256
from labtrain.record.digests import tensor_bytes
from labtrain.record.sources import in_environment, texts_in

if TYPE_CHECKING:
    from _typeshed import FileDescriptorOrPath

SETTLED_NS = 2_000_000_000  # a younger file may change again within the same clock tick
SAID_BYTES = 5_000_000_000
MOST_FILES = 100_000
OUTER_PARTS = 2  # / and /data hold many datasets
MOST_PLACES = 100  # in a receipt; if there are more, their common folder
LONGEST_PLACE = 4096
OF_A_FILE = "file "  # prefix of each file's name in a receipt's data
SYSTEM = ("/proc/", "/sys/", "/dev/")
PLAIN = (type(None), bool, int, float, complex, str, bytes)
TOLD_BY_THEIR_WORDS = (range, slice, datetime.date, datetime.time, datetime.timedelta, Decimal, Enum)
TORCH_WORDS = ("torch.dtype", "torch.device", "torch.memory_format")


@dataclass
class _Seen:
    """What a walk found."""

    files: int = 0
    size: int = 0
    said: int = 0  # the size that was last printed
    opaque: set[str] = field(default_factory=set)
    places: list[Path] = field(default_factory=list)
    objects: dict[int, int] = field(default_factory=dict)  # by id, in order of discovery
    kept: list[object] = field(default_factory=list)  # keeps objects alive, so that no id is reused


def fingerprint(dataset: object) -> DataRecord:
    """Return what identifies a dataset's data.

    Args:
        dataset: any dataset; if it has a method `fingerprint()` that returns a text, that is used instead.

    Returns:
        digest: 64 hex digits; type; samples, if it has a length; files and bytes that were read; and opaque: the types
        whose content cannot be read.

    Raises:
        ConfigError: its own method does not return a text.
    """
    return fingerprint_and_places(dataset)[0]


def fingerprint_and_places(dataset: object) -> tuple[DataRecord, list[Path]]:
    """Return a dataset's fingerprint, and the files and folders that it covers."""
    seen, sha = _Seen(), hashlib.sha256()
    own = getattr(dataset, "fingerprint", None)
    if callable(own):
        said = own()
        if not isinstance(said, str) or not said:
            raise ConfigError(
                f"{type(dataset).__qualname__}.fingerprint() must return a text, got {said!r}",
                hint="return a text that identifies the data",
            )
        sha.update(f"own:{said}".encode())
    else:
        with closing(_Cache()) as cache:
            for part in _walk(dataset, seen, cache):
                sha.update(part)
    samples: DatasetRecord = {"samples": len(dataset)} if hasattr(dataset, "__len__") else {}
    return {
        "digest": sha.hexdigest(),
        "type": type(dataset).__qualname__,
        **samples,
        "files": seen.files,
        "bytes": seen.size,
        "opaque": sorted(seen.opaque),
    }, seen.places


# ------------------------------------------------------------------------------------------- files, by their places


def files_read(places: Iterable[Path], root: Path) -> dict[str, DataRecord]:
    """Return the fingerprints of the files and folders that a training read, for its receipt.

    Args:
        places: absolute, or relative to the working directory; missing ones are left out.
        root: the experiment's folder; paths in it are relative to it.
    """
    found = {Path(os.path.abspath(place)) for place in places}  # noqa: PTH100
    found = {place for place in found if place.exists() and not any(parent in found for parent in place.parents)}
    if len(found) > MOST_PLACES:
        found = {Path(os.path.commonpath(found))}
    names = {place: place.relative_to(root) if place.is_relative_to(root) else place for place in found}
    return {f"{OF_A_FILE}{name}": _of_place(place) for place, name in sorted(names.items())}


def files_now(data: dict[str, DataRecord], root: Path, *, outside: bool = True) -> dict[str, DataRecord]:
    """Return today's fingerprints of the files in a receipt; missing files are left out.

    Args:
        data: of a receipt.
        root: the experiment's folder.
        outside: include files outside that folder; an untrusted receipt could name any of this user's files.
    """
    found = {}
    for name in data:
        with suppress(OSError, ValueError):  # an unreadable file counts as missing
            if name.startswith(OF_A_FILE) and (place := root / name.removeprefix(OF_A_FILE)).exists():
                real = place.resolve()
                if not str(real).startswith(SYSTEM) and (outside or real.is_relative_to(root.resolve())):
                    found[name] = _of_place(place)
    return found


def changed_files(data: dict[str, DataRecord], root: Path) -> list[str]:
    """Return the files and folders that changed since a receipt's training read them."""
    now = files_now(data, root)
    return [name.removeprefix(OF_A_FILE) for name in now if now[name]["digest"] != data[name]["digest"]]


def _of_place(place: Path) -> DataRecord:
    seen, sha = _Seen(), hashlib.sha256()
    with closing(_Cache()) as cache:
        for part in _place(place, seen, cache):
            sha.update(part)
    kind = "folder" if place.is_dir() else "file"
    return {"digest": sha.hexdigest(), "type": kind, "files": seen.files, "bytes": seen.size,
            "opaque": [kind for each in seen.opaque if each]}  # fmt: skip


def places_in(node: object) -> Iterator[Path]:
    """Yield each text in a configuration that names an existing file or folder."""
    return (Path(text) for text in texts_in(node) if _exists(text))


@contextmanager
def noting_opened(found: set[Path]) -> Iterator[None]:
    """Record which files are opened for reading by Python's open, which numpy, pandas, torch and PIL call."""
    real = builtins.open

    @functools.wraps(real)
    def noted(file: "FileDescriptorOrPath", mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = real(file, mode, *arguments, **options)
        if isinstance(file, str | Path) and not {*"wax+"} & {*mode}:
            place = os.path.abspath(file)  # noqa: PTH100
            if not place.startswith(_systems_own()) and not in_environment(place):
                found.add(Path(place))
        return opened

    builtins.open = io.open = noted
    try:
        yield
    finally:
        builtins.open = io.open = real


@functools.cache
def _systems_own() -> tuple[str, ...]:
    """Return path prefixes of system files that the standard library reads and that are not data.

    Time zones, MIME types, the system's name. Not /usr/share: Debian puts datasets there.
    """
    import mimetypes
    import zoneinfo

    zones = (f"{folder}/" for folder in zoneinfo.TZPATH)
    return (
        *SYSTEM,
        *zones,
        *map(str, mimetypes.knownfiles),
        "/etc/localtime",
        "/etc/os-release",
        "/usr/lib/os-release",
    )


def _walk(node: Any, seen: _Seen, cache: "_Cache") -> Iterator[bytes | memoryview]:
    kind = type(node)
    if isinstance(node, Path) or (kind is str and _is_place(node)):
        yield from _place(Path(node), seen, cache)
    elif kind in PLAIN or isinstance(node, TOLD_BY_THEIR_WORDS) or full_name(kind) in TORCH_WORDS:
        yield f"{kind.__name__}:{node!r};".encode()
    elif isinstance(node, types.FunctionType | types.BuiltinFunctionType | types.MethodType | type):
        yield f"named:{full_name(node)};".encode()
    elif isinstance(node, logging.Logger):
        yield f"logger:{node.name};".encode()
    elif id(node) in seen.objects:
        yield f"again:{seen.objects[id(node)]};".encode()
    else:
        seen.objects[id(node)] = len(seen.objects)
        seen.kept.append(node)
        if _maps_a_file(node):
            yield f"map:{node.dtype.str}{node.shape}{node.offset};".encode()
            yield from _place(Path(node.filename), seen, cache)
            return
        try:
            content = _content(node)
        except Exception:  # a sparse tensor, a table of lists: listed as opaque
            content = None
            seen.opaque.add(full_name(kind))
        if content is None:
            yield from _inside(node, seen, cache)
        for part in content or ():
            seen.size += len(part) if isinstance(part, memoryview) else 0
            yield part


def _maps_a_file(node: Any) -> bool:
    """Return whether an array is a whole read-only numpy memory map of a file."""
    return (
        full_name(type(node)) in ("numpy.memmap", "numpy.core.memmap.memmap")
        and node.mode == "r"
        and type(node.base).__name__ == "mmap"
        and node.flags.c_contiguous
        and not node.dtype.hasobject
    )


def _content(node: Any) -> list[bytes | memoryview] | None:
    """Return the content of a tensor, array, table or generator; None for anything else."""
    kind = type(node)
    if hasattr(node, "detach") and hasattr(node, "element_size"):
        return [f"tensor:{node.dtype}{tuple(node.shape)};".encode(), tensor_bytes(node)]
    if kind.__module__.partition(".")[0] == "pandas" and hasattr(node, "to_numpy"):
        from pandas.util import hash_pandas_object

        frame = node.to_frame() if hasattr(node, "to_frame") else node
        columns = [(str(name), str(dtype)) for name, dtype in zip(frame.columns, frame.dtypes, strict=True)]
        return [f"table:{kind.__name__}{columns};".encode(), memoryview(hash_pandas_object(node).to_numpy()).cast("B")]
    if hasattr(node, "__array_interface__") and hasattr(node, "dtype") and not node.dtype.hasobject:
        import numpy as np

        raw = np.ascontiguousarray(node).reshape(-1).view(np.uint8)  # for a memory map, its pages
        return [f"array:{node.dtype.str}{node.shape};".encode(), raw.data]
    if isinstance(node, random.Random):
        return [f"generator:{node.getstate()!r};".encode()]
    return None


def _inside(node: object, seen: _Seen, cache: "_Cache") -> Iterator[bytes | memoryview]:
    kind = type(node)
    if isinstance(node, dict):
        yield f"dict {len(node)}:".encode()
        for key, value in node.items():
            yield from _walk(key, seen, cache)
            yield from _walk(value, seen, cache)
    elif hasattr(node, "__array_interface__") and hasattr(node, "tolist"):  # of Python objects
        yield from _walk(node.tolist(), seen, cache)
    elif isinstance(node, list | tuple):
        yield f"list {len(node)}:".encode()
        for value in node:
            yield from _walk(value, seen, cache)
    elif isinstance(node, set | frozenset):
        yield f"set {len(node)}:".encode()
        for value in sorted(node, key=repr):
            yield from _walk(value, seen, cache)
    elif isinstance(node, functools.partial):
        yield b"partial:"
        yield from _walk([node.func, node.args, node.keywords], seen, cache)
    elif not hasattr(node, "__dict__") or _has_hidden_state(kind):
        seen.opaque.add(full_name(kind))
        yield f"opaque {full_name(kind)};".encode()
    if hasattr(node, "__dict__") and not isinstance(node, types.ModuleType):
        yield f"object {full_name(kind)} {len(vars(node))}:".encode()
        for name in sorted(vars(node)):
            yield f"{name}=".encode()
            yield from _walk(vars(node)[name], seen, cache)


def _has_hidden_state(kind: type) -> bool:
    """Return whether a class has a base written in C, whose state Python cannot see."""
    heap_type = 1 << 9  # Py_TPFLAGS_HEAPTYPE: nearly always a class statement
    return any(base is not object and not base.__flags__ & heap_type for base in kind.__mro__)


def _is_place(text: str) -> bool:
    return os.sep in text and _exists(text) and "\n" not in text


def _exists(text: str) -> bool:
    return bool(text) and len(text) < LONGEST_PLACE and "\0" not in text and os.path.exists(text)  # noqa: PTH110


def _place(path: Path, seen: _Seen, cache: "_Cache") -> Iterator[bytes]:
    """Yield what identifies a file, or all files below a folder, independent of its path and name."""
    seen.places.append(path)
    if not path.exists():
        yield f"path:{path};".encode()
        return
    files = _files(path)
    if files is None:
        seen.opaque.add(f"folder {path}")
        yield b"opaque folder;"
        return
    seen.files += len(files)
    seen.size += sum(file.stat().st_size for file in files)
    if seen.size > seen.said + SAID_BYTES:
        seen.said = seen.size
        sys.stderr.write(f"fingerprint: {seen.size / 1e9:,.0f} GB hashed so far; the result is cached\n")
    yield f"files {len(files)}:".encode()
    for file in files:
        yield f"{file.relative_to(path) if file != path else ''}\0{cache.sha256(file)};".encode()


def _files(path: Path) -> list[Path] | None:
    """Return a path's files, sorted; None if there are too many for one dataset, as in / or a home."""
    if path.is_file():
        return [path]
    if len(path.resolve().parts) <= OUTER_PARTS:
        return None
    files: list[Path] = []
    entered: set[Path] = set()  # links may form a cycle
    for folder, folders, names in os.walk(path, followlinks=True):
        entered.add(Path(folder).resolve())
        folders[:] = [name for name in folders if Path(folder, name).resolve() not in entered]
        files += [Path(folder, name) for name in names if Path(folder, name).is_file()]
        if len(files) > MOST_FILES:
            return None
    return sorted(files)


class _Cache:
    """The sha256 of files, by path, size, times and inode; if it cannot be stored, every file is hashed."""

    def __init__(self) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        self.database: sqlite3.Connection | None = None
        with suppress(OSError, sqlite3.Error):
            (home / "labtrain").mkdir(parents=True, exist_ok=True)
            # Autocommit: each file is stored as soon as it is hashed, and no process waits for another's transaction.
            self.database = sqlite3.connect(home / "labtrain" / "files.sqlite", timeout=10, isolation_level=None)
            self.database.execute("pragma synchronous = off")
            self.database.execute("create table if not exists files (place text primary key, stamp text, sha256 text)")

    def sha256(self, path: Path) -> str:
        place, status = str(path.resolve()), path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        stamp = f"{status.st_size} {times[0]} {times[1]} {status.st_ino} {status.st_dev}"
        with suppress(sqlite3.Error):
            if self.database is not None:
                query = "select sha256 from files where place = ? and stamp = ?"
                if known := self.database.execute(query, (place, stamp)).fetchone():
                    return str(known[0])
        found = file_sha256(path)
        if time.time_ns() - max(times) > SETTLED_NS:
            with suppress(sqlite3.Error):
                if self.database is not None:
                    self.database.execute("insert or replace into files values (?, ?, ?)", (place, stamp, found))
        return found

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
