"""Where checkpoints lie: a folder each below any fsspec URL, complete when its manifest is there. No torch.

::

    .writer.json                          who trains this run; gone when it has ended
    step-0000000120/weights.safetensors   the state dict of the LightningModule
                    state.pt              the rest of the training state; loads with weights_only=True
                    manifest.json         written last: sha256 and size of each file, place, weights digest
    step-0000000120.2/                    the same step once more, where the first name was taken by what a crash left
    step-0000000300-end/                  only where a callback changed the weights after the last step: the result

The rule: a name is used once, files come first, and the manifest is created last, in one step and never replaced. So a
reader sees a whole checkpoint or none; the newest is found by looking, not by a pointer that could lie; and whatever
has no manifest was left by a crash or is being written. Four methods change something (`create`, `replace`, `put`,
`remove`): a crash between any two of them is what the tests walk through.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labtrain.base import exact_json
from labtrain.base.errors import DamagedError, StoreError
from labtrain.record.identity import shown
from labtrain.stores.backends import explained, is_local, open_url

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
WRITER = ".writer.json"
SCHEMA = "labtrain/checkpoint/1"
NAME = re.compile(r"step-(\d{10})(-end)?(?:\.(\d+))?")
PART_BYTES = 16 << 20  # of an upload; some at once
PARTS_AT_ONCE = 4

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint's folder: complete, or what a crash or an unfinished upload left.

    Attributes:
        store: where it is.
        path: its folder, relative to the store.
        sizes: bytes of each file, by name.
    """

    store: "Store"
    path: str
    sizes: dict[str, int]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def run(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def step(self) -> int:
        return self.order[0]

    @property
    def finished(self) -> bool:
        """Whether it is what became of the weights after the last step; nothing goes on from it."""
        return self.order[1]

    @property
    def order(self) -> tuple[int, bool, int]:
        found = NAME.fullmatch(self.name)
        assert found is not None
        return int(found[1]), bool(found[2]), int(found[3] or 1)

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.path}" if self.path else self.store.url

    @property
    def folder(self) -> Path:
        """Its folder on this machine."""
        assert self.store.local
        return Path(self.store.root, self.path)


class Store:
    """Checkpoints below one URL.

    Args:
        place: a path, or any URL that fsspec has a backend for.

    Raises:
        ConfigError: the URL cannot be used.
        StoreError: it cannot be reached, or refuses.
    """

    def __init__(self, place: str | Path) -> None:
        self.url = str(place).removeprefix("file://").rstrip("/")
        self.local = is_local(self.url)
        self.fs, self.root = open_url(self.url)

    def __str__(self) -> str:
        return shown(self.url) if self.local else self.url

    # ------------------------------------------------------------------------------------------ what changes something

    def create(self, path: str, data: bytes) -> None:
        """Write a small file that must not exist yet, in one step.

        Raises:
            FileExistsError: it does.
        """
        full = f"{self.root}/{path}"
        scratch = f"{full}.{secrets.token_hex(4)}"
        try:
            if self.local:
                self._write(scratch, data)
                _rename_to_new(Path(scratch), Path(full))
                sync(Path(full).parent)
            elif self._is_sftp:
                self._write(scratch, data)
                self.fs.ftp.rename(scratch, full)  # fails where it exists, unlike posix_rename
            else:
                self.fs.pipe_file(full, data, mode="create")
        except OSError as error:
            with suppress(Exception):
                if self.local or self._is_sftp:
                    self.fs.rm_file(scratch)
            if not isinstance(error, FileExistsError) and self.fs.exists(full):
                raise FileExistsError(full) from error
            raise

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file, over the one that is there, in one step."""
        full = f"{self.root}/{path}"
        if not self.local and not self._is_sftp:
            self.fs.pipe_file(full, data)
            return
        scratch = f"{full}.{secrets.token_hex(4)}"
        self._write(scratch, data)
        if self.local:
            Path(scratch).replace(full)
        else:
            self.fs.ftp.posix_rename(scratch, full)

    def put(self, local: Path, path: str, callback: Any = None) -> None:
        """Upload a file, in parts at once where the backend has parts."""
        options: dict[str, Any] = {"callback": callback} if callback is not None else {}
        if "s3" in self.fs.protocol:
            part = max(PART_BYTES, local.stat().st_size // 9000)  # S3 has at most 10,000
            options |= {"chunksize": part, "max_concurrency": PARTS_AT_ONCE}
        self.fs.put_file(str(local), f"{self.root}/{path}", **options)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and all below it; nothing where it is gone already."""
        full = f"{self.root}/{path}"
        with suppress(FileNotFoundError):
            if self.local and Path(full).is_dir():
                shutil.rmtree(full)
            elif self.fs.isdir(full):
                self.fs.rm(full, recursive=True)
            else:
                self.fs.rm_file(full)

    @property
    def _is_sftp(self) -> bool:
        return "sftp" in self.fs.protocol

    def _write(self, full: str, data: bytes) -> None:
        for attempt in range(3):
            try:
                self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
                break
            except OSError:  # over SFTP, another process may be making the same folders
                if attempt == 2:
                    raise
        if not self.local:
            self.fs.pipe_file(full, data)
            return
        with Path(full).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    # -------------------------------------------------------------------------------------------------- looking

    def find(self) -> list[Checkpoint]:
        """Return every checkpoint's folder below the store, complete or not: by run, oldest first."""
        with explained(self.url):
            try:
                files = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                if self.local or self._is_sftp:
                    return []
                raise
        folders: dict[str, dict[str, int]] = {}
        for path, info in files.items():
            folder, _, name = path.removeprefix(self.root).lstrip("/").rpartition("/")
            if NAME.fullmatch(folder.rpartition("/")[2]):
                folders.setdefault(folder, {})[name] = info["size"]
        found = [Checkpoint(self, path, sizes) for path, sizes in folders.items()]
        return sorted(found, key=lambda checkpoint: (checkpoint.run, checkpoint.order))

    def checkpoints(self) -> list[Checkpoint]:
        """Return the complete ones: by run, oldest first."""
        return [checkpoint for checkpoint in self.find() if MANIFEST in checkpoint.sizes]

    def read(self, path: str) -> bytes:
        """Return a small file's content."""
        return bytes(self.fs.cat_file(f"{self.root}/{path}"))

    def manifest(self, checkpoint: Checkpoint) -> Manifest:
        """Return a checkpoint's manifest.

        Raises:
            DamagedError: it is none.
            StoreError: it cannot be read.
        """
        where = f"{checkpoint.path}/{MANIFEST}" if checkpoint.path else MANIFEST
        with explained(self.url):
            data = self.read(where)
        with suppress(ValueError, KeyError, TypeError):
            manifest = exact_json.loads(data)
            files = manifest["files"]  # each is read, and copied, by its name: none may lead out of the folder
            weights = any(name.endswith(".safetensors") for name in files)
            if manifest["schema"] == SCHEMA and weights and not any("/" in name for name in files):
                return dict(manifest)
        raise DamagedError(f"{checkpoint.url}/{MANIFEST} is no manifest of {SCHEMA}", hint=_prune_hint(self))

    def fetch(self, checkpoint: Checkpoint, into: Path) -> tuple[Path, Manifest]:
        """Return a folder of this machine that holds a checkpoint, whole, and its manifest.

        Args:
            checkpoint: one of this store.
            into: the folder to copy it to, where the store is remote; a local one is read where it lies.

        Raises:
            DamagedError: a file is missing, or is not what the manifest says.
            StoreError: it cannot be read.
        """
        manifest = self.manifest(checkpoint)
        folder = checkpoint.folder if self.local else into
        for name, wanted in manifest["files"].items():
            wrong = _wrong(folder / name, wanted)
            if wrong and not self.local:  # else another rank of this machine has copied it, and may be reading it
                into.mkdir(parents=True, exist_ok=True)
                with explained(self.url), suppress(FileNotFoundError):
                    self.fs.get_file(f"{self.root}/{checkpoint.path}/{name}", str(folder / name))
                wrong = _wrong(folder / name, wanted)
            if wrong:
                raise DamagedError(f"{checkpoint.url}/{name}: {wrong}", hint=_prune_hint(self))
        return folder, manifest

    def modified(self, path: str) -> datetime:
        """Return when a file was last written, by the store's own clock."""
        with explained(self.url):
            time = self.fs.modified(f"{self.root}/{path}")
        assert isinstance(time, datetime)
        return time if time.tzinfo else time.replace(tzinfo=UTC)

    # -------------------------------------------------------------------------------------------------- writing

    def commit(self, path: str, manifest: Manifest) -> None:
        """Make a checkpoint exist: create its manifest.

        Raises:
            StoreError: another process has made a checkpoint of this name.
        """
        data = (exact_json.dumps(manifest, indent=1) + "\n").encode()
        try:
            self.create(f"{path}/{MANIFEST}", data)
        except FileExistsError:
            if self.read(f"{path}/{MANIFEST}") != data:  # else it is this one, whose answer was lost
                raise taken_over(f"{self}/{path}") from None

    def upload(self, folder: Path, manifest: Manifest, path: str, callback: Any = None) -> None:
        """Copy a checkpoint's files here from a folder of this machine; it exists once it is committed."""
        for name, wanted in manifest["files"].items():
            self.put(folder / name, f"{path}/{name}", callback)
            if (size := self.fs.info(f"{self.root}/{path}/{name}")["size"]) != wanted["size_bytes"]:
                raise StoreError(f"{self.url}/{path}/{name}: {size} bytes arrived of {wanted['size_bytes']}")

    def discard(self, path: str) -> None:
        """Remove a checkpoint, its manifest first: a crash in between leaves none, not a broken one."""
        self.remove(f"{path}/{MANIFEST}")
        self.remove(path)

    def now(self) -> datetime:
        """Return what the store takes the time to be, by writing a file: so it can be written."""
        probe = f".probe-{secrets.token_hex(8)}"
        with explained(self.url):
            self.replace(probe, b"")
            try:
                return self.modified(probe)
            finally:
                self.remove(probe)

    # -------------------------------------------------------------------------------------------------- its one writer

    def take_over(self) -> str:
        """Become the store's one writer and return what it is known by; the one before finds out at its next save."""
        token = secrets.token_hex(8)
        self.renew(token)
        return token

    def renew(self, token: str) -> None:
        """Write who the writer is; the age of that file is when it last began to write."""
        who = {"token": token, "host": os.uname().nodename, **identity(os.getpid())}
        with explained(self.url):
            self.replace(WRITER, json.dumps(who).encode())

    def writer(self) -> dict[str, Any] | None:
        """Return who writes here: token, host, process; None where nobody does, or it ended as it should."""
        try:
            with explained(self.url), suppress(FileNotFoundError):
                return dict(json.loads(self.read(WRITER)))
        except (ValueError, TypeError):
            pass
        return None

    def check_writer(self, token: str) -> None:
        """Refuse to go on where another process has taken over.

        Raises:
            StoreError: names it.
        """
        found = self.writer()
        if found is not None and found.get("token") != token:
            raise taken_over(str(self), f" (process {found.get('process')} on {found.get('host')})")

    def leave(self, token: str) -> None:
        """Be its writer no more."""
        found = self.writer()
        if found is not None and found.get("token") == token:
            with explained(self.url):
                self.remove(WRITER)


class TakenOverError(StoreError):
    """Another process writes to this place."""


def taken_over(where: str, who: str = "") -> TakenOverError:
    """Return the error for two runs that write to one place."""
    return TakenOverError(
        f"another process{who} writes checkpoints to {where}: this one stops, and loses nothing that the other needs",
        hint="train a run once; or keep them apart: resume=never, or another checkpoint.url",
    )


def identity(process: int) -> dict[str, Any]:
    """Return what tells a process of this machine from every other one, by name.

    A number alone is used again, and means another process in another container of the same host name: so with it go
    the kernel's start, the namespace of process numbers, and when it began (in clock ticks since then). Linux, proc(5).

    Raises:
        OSError: there is no such process.
    """
    status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    if status[0] == "Z":
        raise ProcessLookupError(process)  # it has ended, and only its parent has not asked how
    return {
        "process": process,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),  # noqa: PTH115
        "began": int(status[19]),
    }


def sync(path: Path) -> None:
    """Have the kernel write a file or a folder's entries to the disk: fsync(2)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return a file's sha256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong(path: Path, wanted: dict[str, Any]) -> str:
    """Return how a file differs from what a manifest says of it; empty where it does not."""
    try:
        size = path.stat().st_size
        if size != wanted["size_bytes"]:
            return f"of {size} bytes, manifest says {wanted['size_bytes']}"
        found = file_sha256(path)
    except FileNotFoundError:
        return f"no file, manifest says {wanted['size_bytes']} bytes"
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint=f"ls -l {path}") from error
    return "" if found == wanted["sha256"] else f"sha256 {found[:12]}, manifest says {wanted['sha256'][:12]}"


def _rename_to_new(scratch: Path, target: Path) -> None:
    """Give a file its name, which nothing may have yet."""
    try:
        os.link(scratch, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if target.exists():  # a file system without links: the writer's name alone keeps others away
            raise FileExistsError(target) from error
        scratch.rename(target)
    scratch.unlink(missing_ok=True)


def _prune_hint(store: Store) -> str:
    return f"labtrain store check {store}"
