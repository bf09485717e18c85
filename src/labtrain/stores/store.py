"""Store checkpoints below any fsspec URL, one folder each, complete once the manifest exists. No torch.

::

    .writer.json                          the token of the process that trains this run; removed when it ends
    step-0000000120/weights.safetensors   the state dict of the LightningModule
                    state.pt              the rest of the training state; loads with weights_only=True
                    manifest.json         sha256 and size of each file, step, weights digest, its own digest
    step-0000000120.2/                    the same step again, if the first name was taken
    step-0000000300-end/                  final weights, only if a callback changed them after the last step
    step-0000000140.writing-TOKEN/        being written by the writer with this token; renamed once, when complete

The rule: a name is used once, and it appears only when everything in it exists: by a rename, or, in a store without
renames (S3), by creating its manifest. So a reader sees a complete checkpoint or none, and finds the newest by listing,
not by a pointer that could be wrong. Five methods change something (`create`, `replace`, `put`, `move`, `remove`). The
tests simulate a crash between any two of them.

Two writers: a writer may be suspended for an hour between any two instructions, and wake up after another process has
taken over, trained the run to the end, and left. Its late actions must do no harm (tests/quick/stores/test_writers.py):

- It becomes the writer only if .writer.json has not changed since it looked. It renames the file aside, checks it, and
  creates its own. It stops if a checkpoint has appeared meanwhile.
- Before each write, removal and rename it checks that .writer.json has its token, and stops if not.
- It writes to names with its token, or, without renames, with the sha256 of the content.
- A process that takes over renames away what others were writing (`sweep`), so that a late rename finds nothing.
  Without renames it creates an empty manifest, so that a late creation fails.
- A removal first renames the folder aside (S3: removes only the manifest), checks the token again, and undoes the
  rename if the token changed.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labtrain.base import contracts, exact_json, untrusted
from labtrain.base.console import quoted, shown
from labtrain.base.contracts import Options, SavedFile, as_options
from labtrain.base.errors import DamagedError, LabtrainError, StoreError
from labtrain.base.exact_json import digest_of
from labtrain.base.files import atomic, scratch_beside, sha256_of, sync
from labtrain.base.permissions import make_folder
from labtrain.base.signals import status_of
from labtrain.stores.backends import explained, is_local, open_url

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
WRITER = ".writer.json"
TOKEN_ASIDE = re.compile(r"\.writer\.json\.[0-9a-f]{16}")
SCHEMA = "labtrain/checkpoint/1"
NAME = re.compile(r"step-(\d{10})(-end)?(?:\.(\d+))?")
ASIDE = re.compile(rf"({NAME.pattern})\.(?P<why>writing|removing|removed)-(?P<token>[0-9a-f]{{16}})")
RUN_ID = re.compile(r"\w[\w-]{0,99}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
PART_BYTES = 8 << 20  # of a multipart upload; twice this, or twice as many at once, is slower (make bench-checkpoint)
PARTS_AT_ONCE = 4
LEAVING_S = 0.3  # .writer.json may be missing this long while an earlier writer leaves

Manifest = contracts.Manifest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint's folder: complete, or left by a crash or an unfinished upload.

    Attributes:
        store: its store.
        path: its folder, relative to the store.
        sizes: bytes of each file, by name.
        is_link: it is a symbolic link; labtrain never makes, reads or writes through one.
    """

    store: "Store"
    path: str
    sizes: dict[str, int]
    is_link: bool = False

    @property
    def complete(self) -> bool:
        """Whether it is complete; an empty manifest only blocks the name for a writer that was taken over."""
        return bool(NAME.fullmatch(self.name)) and self.sizes.get(MANIFEST, 0) > 0

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
        """Whether it has final weights only, so that it cannot be resumed."""
        return self.order[1]

    @property
    def order(self) -> tuple[int, bool, int]:
        found = NAME.match(self.name)
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
        StoreError: the store cannot be reached or refuses access.
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
            FileExistsError: it exists.
        """
        full = f"{self.root}/{path}"
        scratch = f"{full}.{secrets.token_hex(4)}"
        try:
            if self.local:
                self._make_above(full)
                with scratch_beside(Path(full)) as own:
                    self._put(str(own), data)
                    _rename_to_new(own, Path(full))
                sync(Path(full).parent)
            elif self._is_sftp:
                self._write(scratch, data)
                self.fs.ftp.rename(scratch, full)  # fails if it exists, unlike posix_rename
            else:
                self.fs.pipe_file(full, data, mode="create")
        except OSError as error:
            with suppress(Exception):
                if self._is_sftp:
                    self.fs.rm_file(scratch)
            if not self.local and not isinstance(error, FileExistsError) and self.fs.exists(full):
                raise FileExistsError(full) from error  # a server says only that it failed
            raise

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file in one step, replacing an existing one."""
        full = f"{self.root}/{path}"
        if not self.local and not self._is_sftp:
            self.fs.pipe_file(full, data)
            return
        if self.local:
            self._make_above(full)
            with atomic(Path(full)) as own:
                own.write_bytes(data)
            return
        scratch = f"{full}.{secrets.token_hex(4)}"
        self._write(scratch, data)
        self.fs.ftp.posix_rename(scratch, full)

    def move(self, path: str, to: str) -> None:
        """Rename a folder, in one step.

        Raises:
            FileNotFoundError: it does not exist.
            FileExistsError: the new name exists.
        """
        source, target = f"{self.root}/{path}", f"{self.root}/{to}"
        try:
            if self.local:
                Path(source).rename(target)  # may replace an empty folder, which is not a checkpoint
            else:
                self.fs.ftp.rename(source, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.fs.lexists(target) if self.local else self.fs.exists(target):
                raise FileExistsError(target) from error
            raise

    def put(self, local: Path, path: str, callback: object = None) -> None:
        """Upload a file, with parallel parts if the backend supports it."""
        options: dict[str, object] = {"callback": callback} if callback is not None else {}
        if "s3" in self.fs.protocol:
            part = max(PART_BYTES, local.stat().st_size // 9000)  # S3 has at most 10,000
            options |= {"chunksize": part, "max_concurrency": PARTS_AT_ONCE}
        self.fs.put_file(str(local), f"{self.root}/{path}", **options)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its contents; do nothing if it does not exist."""
        full = f"{self.root}/{path}"
        with suppress(FileNotFoundError):
            if self.local and Path(full).is_dir() and not Path(full).is_symlink():
                shutil.rmtree(full)
            elif self.fs.isdir(full):
                self.fs.rm(full, recursive=True)
            else:
                self.fs.rm_file(full)

    @property
    def renames(self) -> bool:
        """Whether it can rename folders; else only the manifest makes a checkpoint exist."""
        return self.local or self._is_sftp

    @property
    def _is_sftp(self) -> bool:
        return "sftp" in self.fs.protocol

    def _write(self, full: str, data: bytes) -> None:
        self._make_above(full)
        self._put(full, data)

    def _make_above(self, full: str) -> None:
        """Make the folder of a file."""
        for attempt in range(3):
            try:
                above = full.rpartition("/")[0]
                make_folder(Path(above)) if self.local else self.fs.makedirs(above, exist_ok=True)
                break
            except OSError:  # over SFTP, another process may be making the same folders
                if attempt == 2:
                    raise

    def _put(self, full: str, data: bytes) -> None:
        """Write a file to an existing folder, and sync it to disk."""
        if not self.local:
            self.fs.pipe_file(full, data)
            return
        with Path(full).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    # -------------------------------------------------------------------------------------------------- looking

    def find(self) -> list[Checkpoint]:
        """Return every checkpoint folder below the store, complete or not, including links: by run, oldest first."""
        folders: dict[str, dict[str, int]] = {}
        links: set[str] = set()
        with explained(self.url):
            for path, kind, size in self._entries():
                folder, _, name = path.rpartition("/")
                if kind == "link" and NAME.fullmatch(name):
                    links.add(path)
                elif kind == "directory" and _is_ours(name):
                    folders.setdefault(path, {})
                elif kind == "file" and _is_ours(folder.rpartition("/")[2]):
                    folders.setdefault(folder, {})[name] = size
        found = [Checkpoint(self, path, sizes) for path, sizes in folders.items()]
        found += [Checkpoint(self, path, {}, is_link=True) for path in links]
        return sorted(found, key=lambda checkpoint: (checkpoint.run, checkpoint.order, checkpoint.name))

    def _entries(self) -> Iterator[tuple[str, str, int]]:
        """Yield path, kind (file, directory, link) and bytes of each entry below the store; follow no link."""
        if self.local:
            yield from self._local_entries()
            return
        if self._is_sftp:
            yield from self._sftp_entries(self.root)
            return
        for path, info in self.fs.find(self.root, detail=True).items():
            yield path.removeprefix(self.root).lstrip("/"), info["type"], info["size"] or 0

    def _sftp_entries(self, folder: str) -> Iterator[tuple[str, str, int]]:
        """Raise if a folder cannot be listed: fsspec's `find` leaves it out, as if it were empty."""
        try:
            listing = self.fs.ls(folder, detail=True)
        except FileNotFoundError:  # nothing is there yet, or it was removed meanwhile
            return
        for info in listing:
            yield info["name"].removeprefix(self.root).lstrip("/"), info["type"], info["size"] or 0
            if info["type"] == "directory":
                yield from self._sftp_entries(info["name"])

    def _local_entries(self) -> Iterator[tuple[str, str, int]]:
        def refuse(error: OSError) -> None:
            if error.filename == self.root and not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        for folder, folders, files in os.walk(self.root, onerror=refuse):
            at = folder.removeprefix(self.root).lstrip("/")
            ours = _is_ours(folder.rpartition("/")[2])
            for name in [*folders, *(files if ours else [each for each in files if NAME.fullmatch(each)])]:
                with suppress(FileNotFoundError):
                    entry = Path(folder, name).lstat()
                    kind = "link" if stat.S_ISLNK(entry.st_mode) else "directory" if name in folders else "file"
                    yield f"{at}/{name}".lstrip("/"), kind, entry.st_size

    def checkpoints(self) -> list[Checkpoint]:
        """Return the complete checkpoints: by run, oldest first."""
        return [checkpoint for checkpoint in self.find() if checkpoint.complete]

    def refuse_link(self) -> None:
        """Raise if the store's own folder is a link. Do not call it for a store that the user typed.

        Raises:
            LabtrainError: names the link.
        """
        mode = 0
        with explained(self.url), suppress(FileNotFoundError):
            if self.local:
                mode = Path(self.root).lstat().st_mode
            elif self._is_sftp:
                mode = self.fs.ftp.lstat(self.root).st_mode
        if stat.S_ISLNK(mode):
            raise links_error(str(self))

    def read(self, path: str) -> bytes:
        """Return a small file's content."""
        if self.local:
            return untrusted.read(Path(self.root, path))
        return bytes(self.fs.cat_file(f"{self.root}/{path}"))

    def manifest(self, checkpoint: Checkpoint) -> Manifest:
        """Return a checkpoint's manifest.

        Raises:
            DamagedError: it is not a valid manifest.
            GoneError: the checkpoint was removed since it was listed.
            StoreError: it cannot be read.
        """
        where = f"{checkpoint.path}/{MANIFEST}" if checkpoint.path else MANIFEST
        with untrusted.damage_of(
            f"{checkpoint.url}/{MANIFEST}", what=f"is not a {SCHEMA} manifest", hint=_prune_hint(self)
        ):
            if checkpoint.sizes.get(MANIFEST, 0) > untrusted.RECORD_BYTES:
                raise ValueError(f"{checkpoint.sizes[MANIFEST]:,} bytes")
            with explained(self.url):
                try:
                    data = self.read(where)
                except FileNotFoundError:
                    if MANIFEST not in checkpoint.sizes:  # not listed, but named by a person
                        raise
                    raise GoneError(checkpoint) from None
            manifest = _upgraded(untrusted.loads(data))
            _check_manifest(as_options(manifest))
        if wrong := _contradiction(manifest, checkpoint):
            raise DamagedError(f"{checkpoint.url}/{MANIFEST} {wrong}", hint=_prune_hint(self))
        return manifest

    def fetch(self, checkpoint: Checkpoint, into: Path) -> tuple[Path, Manifest]:
        """Return a local folder with a checked checkpoint, and its manifest.

        Args:
            checkpoint: one of this store.
            into: the folder to copy it to, if the store is remote; a local checkpoint is read in place.

        Raises:
            DamagedError: a file is missing or does not match the manifest.
            StoreError: it cannot be read.
        """
        manifest = self.manifest(checkpoint)
        folder = checkpoint.folder if self.local else into
        for name, wanted in manifest["files"].items():
            wrong = _wrong(folder / name, wanted)
            # If it is correct, another rank on this machine copied it and may be reading it.
            if wrong and not self.local:
                into.mkdir(parents=True, exist_ok=True)
                with explained(self.url), suppress(FileNotFoundError):
                    key = self.key(name, wanted)
                    self.fs.get_file(f"{self.root}/{checkpoint.path}/{key}", str(folder / name))
                wrong = _wrong(folder / name, wanted)
            if wrong:
                self.manifest(checkpoint)  # raises if the checkpoint was removed meanwhile
                raise DamagedError(f"{checkpoint.url}/{name}: {wrong}", hint=_prune_hint(self))
        return folder, manifest

    def modified(self, path: str) -> datetime:
        """Return when a file was last written, by the store's own clock."""
        with explained(self.url):
            time = self.fs.modified(f"{self.root}/{path}")
        assert isinstance(time, datetime)
        return time if time.tzinfo else time.replace(tzinfo=UTC)

    # -------------------------------------------------------------------------------------------------- writing

    def key(self, name: str, entry: SavedFile) -> str:
        """Return the name of a checkpoint's file in this store.

        Without renames, two writers may upload files for the same checkpoint. Names with the content's hash prevent
        them from overwriting each other's files.
        """
        return name if self.renames else f"{entry['sha256'][:16]}.{name}"

    def writing(self, path: str, token: str) -> str:
        """Return the folder that a writer writes a checkpoint to before `publish`."""
        return f"{path}.writing-{token}" if self.renames else path

    def publish(self, path: str, manifest: Manifest, token: str) -> None:
        """Make a checkpoint with all files in `writing` exist: add its manifest, in one step.

        Args:
            path: of the checkpoint.
            manifest: of the checkpoint.
            token: of the writer.

        Raises:
            TakenOverError: another process became the writer, or made a checkpoint of this name.
        """
        if not self.renames:
            self.check_writer(token)
            self.commit(path, manifest)
            return
        folder = self.writing(path, token)
        try:
            self._write_into(folder, MANIFEST, _as_bytes(manifest))
            self.check_writer(token)
            self.move(folder, path)
        except FileNotFoundError as error:  # the new writer has renamed the folder away
            raise taken_over(str(self)) from error
        except FileExistsError as error:
            if not self.holds(path, manifest):
                raise taken_over(f"{self}/{path}") from error
        if self.local:
            sync(Path(self.root, path).parent)

    def _write_into(self, folder: str, name: str, data: bytes) -> None:
        """Write a file to an existing folder, and sync the folder to disk."""
        full = f"{self.root}/{folder}/{name}"
        self._put(full, data)
        if self.local:
            sync(Path(full).parent)

    def commit(self, path: str, manifest: Manifest) -> None:
        """Make a checkpoint whose files are in place exist: create its manifest.

        Raises:
            TakenOverError: another process made a checkpoint of this name.
        """
        try:
            self.create(f"{path}/{MANIFEST}", _as_bytes(manifest))
        except FileExistsError:
            if not self.holds(path, manifest):  # if it holds: this checkpoint was created, and the answer was lost
                raise taken_over(f"{self}/{path}") from None
        if self.local:
            sync(Path(self.root, path).parent)

    def holds(self, path: str, manifest: Manifest) -> bool:
        """Return whether exactly this checkpoint exists here."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.read(f"{path}/{MANIFEST}") == _as_bytes(manifest)
        return False

    def upload(self, folder: Path, manifest: Manifest, path: str, callback: object = None) -> None:
        """Upload a checkpoint's files from a local folder; it exists only after commit."""
        if self._is_sftp:
            self.fs.makedirs(f"{self.root}/{path}", exist_ok=True)
        for name, wanted in manifest["files"].items():
            key = self.key(name, wanted)
            self.put(folder / name, f"{path}/{key}", callback)
            if (size := self.fs.info(f"{self.root}/{path}/{key}")["size"]) != wanted["size_bytes"]:
                raise StoreError(f"{self.url}/{path}/{key}: only {size} of {wanted['size_bytes']} bytes arrived")

    def discard(self, path: str, token: str = "") -> None:
        """Remove a checkpoint, so that a crash leaves all of it or none.

        Args:
            path: of the checkpoint; nothing happens if it does not exist.
            token: of the writer; empty if the user asked for the removal.

        Raises:
            TakenOverError: another process became the writer; the checkpoint still exists.
        """

        def check() -> None:
            if token:
                self.check_writer(token)

        check()
        if not self.renames:
            self._discard_by_manifest(path, check)
            return
        by = token or secrets.token_hex(8)
        aside, gone = f"{path}.removing-{by}", f"{path}.removed-{by}"
        with suppress(FileNotFoundError):
            self.move(path, aside)
            try:
                check()
            except TakenOverError:
                self.move(aside, path)
                raise
        with suppress(FileNotFoundError):
            self.move(aside, gone)  # from here on nobody restores it
        self.remove(gone)  # as above, it may be there from an attempt that a lost connection ended

    def _discard_by_manifest(self, path: str, check: Callable[[], None]) -> None:
        manifest = f"{path}/{MANIFEST}"
        with suppress(FileNotFoundError):
            data = self.read(manifest)
            self.remove(manifest)
            try:
                check()
            except TakenOverError:
                with suppress(FileExistsError):  # the new writer has treated it as a crash's leftover
                    self.create(manifest, data)
                raise
        self.remove(path)

    def sweep(self, token: str, *, keep: Collection[str] = ()) -> None:
        """Prevent earlier writers from finishing a checkpoint; remove what they were writing or removing.

        Args:
            token: of the writer that has taken over.
            keep: names of checkpoints that may be partly uploaded, and that this writer will complete.
        """
        with explained(self.url):
            for left in self.find():
                if left.complete or left.is_link:
                    continue
                if found := ASIDE.fullmatch(left.name):
                    if found["token"] != token:
                        self._sweep_folder(left, found, token)
                elif not self.renames and left.name not in keep:
                    self._sweep_name(left)
            if self.renames:
                self._sweep_tokens()

    def _sweep_tokens(self) -> None:
        """Remove what processes left that were killed while they took away a writer's token (`_take_away`).

        A token of a live writer stays: another process may be about to put it back.
        """
        for path in self.fs.ls(self.root, detail=False):
            name = path.rpartition("/")[2]
            if TOKEN_ASIDE.fullmatch(name) and (found := self.writer(name)) and writer_lives(found) is False:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(path)

    def _sweep_folder(self, left: Checkpoint, found: re.Match[str], token: str) -> None:
        name = left.path.removesuffix(left.name) + found[1]
        with suppress(FileNotFoundError):
            if found["why"] == "removing":  # restore it: the removal may no longer be due
                with suppress(FileExistsError):
                    self.move(left.path, name)
                    return
            gone = f"{name}.removed-{token}"
            self.remove(gone)
            self.move(left.path, gone)  # before removing, so that a late rename finds nothing
            self.remove(gone)

    def _sweep_name(self, left: Checkpoint) -> None:
        if MANIFEST not in left.sizes:
            try:
                self.create(f"{left.path}/{MANIFEST}", b"")
            except FileExistsError:  # its writer has completed it meanwhile
                return
        for name in left.sizes:
            if name != MANIFEST:
                self.remove(f"{left.path}/{name}")

    def now(self) -> datetime:
        """Return the store's time by writing a file, which also proves that the store is writable."""
        probe = f".probe-{secrets.token_hex(8)}"
        with explained(self.url):
            self.replace(probe, b"")
            try:
                return self.modified(probe)
            finally:
                self.remove(probe)

    # -------------------------------------------------------------------------------------------------- its one writer

    def take_over(self) -> str:
        """Become the store's only writer and return the token; the earlier writer notices at its next save."""
        token = secrets.token_hex(8)
        if self.renames:
            self.renew(token, seen=self.seen())
            return token
        with explained(self.url):
            self.replace(WRITER, _who(token))
        return token

    def enter(self) -> str:
        """Become the store's only writer, if there is no live writer, and return the token.

        Raises:
            StoreError: another process writes there, or may.
        """
        token, found = secrets.token_hex(8), self.writer()
        with explained(self.url), suppress(FileExistsError):
            if found is None or (writer_lives(found) is False and self._take_away(str(found.get("token")), by=token)):
                self._claim(token)
                return token
        who = f"process {found.get('process')} on {found.get('host')}" if found else "another process"
        raise StoreError(f"{who} writes checkpoints to {self}", hint=f"use another folder: {self.url}/imported")

    def renew(self, token: str, *, seen: str | None) -> None:
        """Become the writer, if the writer has not changed since this process looked.

        Without renames another process may come in between; saver.py checks again before it writes.

        Args:
            token: of the new writer.
            seen: the result of `seen`.

        Raises:
            TakenOverError: another process came in between.
        """
        with explained(self.url):
            if not self.renames and self.seen() == seen:
                self.replace(WRITER, _who(token))
                return
            with suppress(FileExistsError):
                if self.renames and (seen is None or self._take_away(seen, by=token)):
                    self._claim(token)
                    return
        raise taken_over(str(self))

    def _claim(self, token: str) -> None:
        """Create `.writer.json`.

        Raises:
            FileExistsError: another writer has.
        """
        try:
            self.create(WRITER, _who(token))
        except FileExistsError:
            if self.seen() != token:  # else it was created, and the answer was lost
                raise

    def seen(self, path: str = WRITER) -> str | None:
        """Return the writer's token; None if there is no writer, empty if the file has no token."""
        data: bytes | None = None
        try:
            with explained(self.url), suppress(FileNotFoundError):
                data = self.read(path)
            return None if data is None else str(untrusted.loads(data)["token"])
        except (ValueError, TypeError, KeyError, untrusted.NotPlainError):
            return ""

    def writer(self, path: str = WRITER) -> dict[str, object] | None:
        """Return the writer's token, host and process; None if there is no writer, or it ended properly."""
        try:
            with explained(self.url), suppress(FileNotFoundError):
                return dict(untrusted.loads(self.read(path)))
        except (ValueError, TypeError, untrusted.NotPlainError):
            pass
        return None

    def check_writer(self, token: str) -> None:
        """Raise if this process is no longer the writer.

        Raises:
            TakenOverError: names the writer, or says that another one was and has ended.
        """
        deadline = time.monotonic() + LEAVING_S
        while (found := self.writer()) is None and time.monotonic() < deadline:
            time.sleep(LEAVING_S / 10)
        if found is None:
            raise taken_over(str(self), was=True)
        if found.get("token") != token:
            raise taken_over(str(self), f" (process {found.get('process')} on {found.get('host')})")

    def leave(self, token: str) -> None:
        """Stop being the writer; another writer's `.writer.json` is never lost."""
        found = self.writer()
        if found is None or found.get("token") != token:
            return
        with explained(self.url):
            self._take_away(token, by=token)

    def _take_away(self, token: str, *, by: str) -> bool:
        """Remove a writer's `.writer.json` and return whether it existed; put back another writer's.

        Args:
            token: of that writer.
            by: the caller's token.
        """
        own = f"{WRITER}.{by}"
        with suppress(FileNotFoundError):
            if not self.renames:
                self.remove(WRITER)
                return True
            self.move(WRITER, own)
            if self.seen(own) == token:
                self.fs.rm_file(f"{self.root}/{own}")
                return True
            with suppress(FileExistsError):  # the file belongs to another writer by now
                if self.local:
                    _rename_to_new(Path(self.root, own), Path(self.root, WRITER))
                else:
                    self.fs.ftp.rename(f"{self.root}/{own}", f"{self.root}/{WRITER}")
        return False


class GoneError(DamagedError):
    """A checkpoint was removed after it was listed: by another process, or the listing was old."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(f"{checkpoint.url} was removed since it was listed", hint=_prune_hint(checkpoint.store))


class TakenOverError(StoreError):
    """Another process has become the writer of this store."""


def taken_over(where: str, who: str = "", *, was: bool = False) -> TakenOverError:
    """Return the error for two processes that write to one place."""
    doing = f"has taken over {where}, and has ended" if was else f"writes checkpoints to {where}"
    return TakenOverError(
        f"another process{who} {doing}: this process stops, and has not changed the other's checkpoints",
        hint="the same command resumes from the newest checkpoint; to train two runs: resume=never, or another"
        " checkpoint.url",
    )


def links_error(place: str) -> LabtrainError:
    """Return the error for a checkpoint, or a folder of checkpoints, that is a symbolic link."""
    path, copy = quoted(place), quoted(f"{place}.copy")
    replace = f"cp -rL {path} {copy} && rm {path} && mv {copy} {path}; " if is_local(place) else ""
    return LabtrainError(
        f"{place} is a symbolic link: labtrain does not follow links to checkpoints in a run's folder",
        hint=f"{replace}to keep checkpoints on another disk: checkpoint.url=FOLDER",
    )


def sealed(manifest: Manifest) -> Manifest:
    """Return a manifest with its own digest."""
    return {**manifest, "digest": digest_of(as_options(manifest))}


def _upgraded(manifest: Manifest) -> Manifest:
    """Return a manifest of before 2026-11-30 with a digest, which it lacks; any other one unchanged.

    A newer manifest that has lost only its digest is damaged, and stays without one.
    """
    return manifest if any(key in manifest for key in ("digest", "before", "trail", "history")) else sealed(manifest)


def _as_bytes(manifest: Manifest) -> bytes:
    return (exact_json.dumps(sealed(manifest), indent=1) + "\n").encode()


def _contradiction(manifest: Manifest, checkpoint: Checkpoint) -> str:
    """Return how a manifest contradicts itself or its folder's name; empty if it does not.

    Its digest detects accidents. Somebody who changes a manifest can recompute it.
    """
    said, found = str(manifest.get("digest")), digest_of(as_options(manifest))
    if said != found:
        return f"was changed after it was written: its digest is {found[:12]}, but it records {said[:12]}"
    if NAME.fullmatch(checkpoint.name) and (manifest["step"], manifest.get("finished", False)) != checkpoint.order[:2]:
        return f"belongs to step {manifest['step']}"
    if not RUN_ID.fullmatch(manifest["run_id"]):
        return "has no valid run id"
    if not all(SHA256.fullmatch(entry["sha256"]) for entry in manifest["files"].values()):
        return "has no valid sha256 of its files"
    return ""


def _is_ours(name: str) -> bool:
    return bool(NAME.fullmatch(name) or ASIDE.fullmatch(name))


def identity(process: int) -> dict[str, object]:
    """Return what identifies a process on this machine.

    A process id is reused, and exists in several containers. So the result also has the boot id, the PID namespace and
    the process's start time (in clock ticks since boot). Linux, proc(5).

    Raises:
        OSError: there is no such process.
    """
    status = status_of(process)
    if status[0] == "Z":
        raise ProcessLookupError(process)  # a zombie: it has ended
    return {
        "process": process,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),  # noqa: PTH115
        "began": int(status[19]),
    }


def _who(token: str) -> bytes:
    own = identity(os.getpid())
    return json.dumps({"token": token, "host": os.uname().nodename, "parent": os.getppid(), **own}).encode()


def writer_lives(writer: Options | None) -> bool | None:
    """Return whether a store's writer is a live process; None if this machine cannot know."""
    if writer is None:
        return False
    here = identity(os.getpid())
    if any(writer.get(key) != here[key] for key in ("boot", "namespace")):
        return None  # another machine or container, or a reboot since: its process id says nothing here
    with suppress(OSError, ValueError, TypeError, OverflowError):
        return identity(int(writer["process"])) == {key: writer.get(key) for key in here}
    return False


def _check_manifest(manifest: Options) -> None:
    """Check the keys of a manifest that labtrain reads; other versions may have more or fewer keys.

    Files are read and copied by name, so no name may lead out of the folder.

    Raises:
        KeyError: a key is missing.
        ValueError: a value is not valid.
    """
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"schema {manifest['schema']!r}")
    if missing := [key for key in ("files", "run_id", "step") if key not in manifest]:
        raise ValueError(f"missing {', '.join(missing)}")
    for key, good in MANIFEST_KINDS.items():
        if key in manifest and not good(manifest[key]):
            raise ValueError(f"{key} is {manifest[key]!r}"[:200])
    for name, entry in manifest["files"].items():
        if not untrusted.is_part(name) or name == MANIFEST or not untrusted.is_count(entry["size_bytes"]):
            raise ValueError(f"a file {name!r} of {entry['size_bytes']!r} bytes"[:200])
        if not _is_digest(entry["sha256"]):
            raise ValueError(f"sha256 {entry['sha256']!r}"[:200])
    if not any(name.endswith(".safetensors") for name in manifest["files"]):
        raise ValueError("no weights file")
    if STATE not in manifest["files"]:
        raise ValueError(f"no {STATE}")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and untrusted.is_number(number) for name, number in value.items()
    )


MANIFEST_KINDS: dict[str, Callable[[Any], bool]] = {
    "files": lambda value: isinstance(value, dict),
    "step": untrusted.is_count,
    "run_id": untrusted.is_part,
    "epoch": untrusted.is_count,
    "batch": untrusted.is_count,
    "finished": lambda value: isinstance(value, bool),
    "metrics": _are_numbers,
    "scores": _are_numbers,
    "logs": lambda value: isinstance(value, dict),
    "weights_digest": _is_digest,
    "digest": _is_digest,
    "before": lambda value: value is None or _is_link(value),
    "history": lambda value: value is None or _is_record(value),
    "trail": lambda value: value is None or (_is_record(value) and _are_ranges(value["missing"], value["first"])),
}


def _is_link(value: Options) -> bool:
    return bool(RUN_ID.fullmatch(value["run_id"]) and NAME.fullmatch(value["name"]) and _is_digest(value["digest"]))


def _is_record(value: Options) -> bool:
    return untrusted.is_count(value["size_bytes"]) and _is_digest(value["sha256"])


def _are_ranges(value: Any, first: object) -> bool:
    ends = [end for steps in value for end in steps]
    return isinstance(value, list) and all(map(untrusted.is_count, [*ends, first])) and ends == sorted(ends)


def _wrong(path: Path, wanted: SavedFile) -> str:
    """Return how a file differs from its manifest entry; empty if it does not."""
    try:
        with untrusted.open_plain(path, 1 << 60) as file:
            size = os.fstat(file.fileno()).st_size
            if size != wanted["size_bytes"]:
                return f"{size} bytes, manifest says {wanted['size_bytes']}"
            found = sha256_of(file)
    except FileNotFoundError:
        return f"no file, manifest says {wanted['size_bytes']} bytes"
    except untrusted.NotPlainError as error:
        return str(error.strerror)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint=f"ls -l {quoted(path)}") from error
    return "" if found == wanted["sha256"] else f"sha256 {found[:12]}, manifest says {wanted['sha256'][:12]}"


def _rename_to_new(scratch: Path, target: Path) -> None:
    """Rename a file to a name that must not exist yet."""
    try:
        os.link(scratch, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if target.exists():  # a file system without hard links: only .writer.json keeps other writers away
            raise FileExistsError(target) from error
        scratch.rename(target)
    scratch.unlink(missing_ok=True)


def _prune_hint(store: Store) -> str:
    return f"labtrain store check {quoted(store)}"
