"""Where checkpoints lie: a folder each below any fsspec URL, complete when its manifest is there. No torch.

::

    .writer.json                          who trains this run, by its token; gone when it has ended
    step-0000000120/weights.safetensors   the state dict of the LightningModule
                    state.pt              the rest of the training state; loads with weights_only=True
                    manifest.json         sha256 and size of each file, place, weights digest, its own digest
    step-0000000120.2/                    the same step once more, where the first name was taken
    step-0000000300-end/                  only where a callback changed the weights after the last step: the result
    step-0000000140.writing-TOKEN/        being written, by the writer of this token; renamed once, when it is whole

The rule: a name is used once, and appears when everything in it is there: by a rename, or, in a store that renames
nothing (S3), by the creation of its manifest. So a reader sees a whole checkpoint or none, and the newest is found by
looking, not by a pointer that could lie. Five methods change something (`create`, `replace`, `put`, `move`, `remove`):
a crash between any two of them is what the tests walk through.

Two writers. A writer may be stopped for an hour between any two of its instructions, and wake up when another has taken
over, trained the run to its end, and left. So whatever it does late must harm nothing
(tests/quick/stores/test_writers.py):

- it becomes the writer only where .writer.json is as it was when it looked: it renames that aside, looks at it, and
  creates its own; and it ends where a checkpoint has appeared meanwhile;
- it looks for its own token in .writer.json before each write, each removal and each rename, and ends where it is not;
- what it writes lies under a name with its token, or, where nothing is renamed, with the sha256 of the content;
- who takes over renames away what others were writing (`sweep`), so that a late rename finds nothing; where nothing is
  renamed it puts an empty manifest there, which a late creation runs into;
- a removal begins with a rename aside (S3: with the manifest alone), looks at the token once more, and takes it back.
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
from labtrain.base.files import sha256_of, sync
from labtrain.stores.backends import explained, is_local, open_url

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
WRITER = ".writer.json"
SCHEMA = "labtrain/checkpoint/1"
NAME = re.compile(r"step-(\d{10})(-end)?(?:\.(\d+))?")
ASIDE = re.compile(rf"({NAME.pattern})\.(?P<why>writing|removing|removed)-(?P<token>[0-9a-f]{{16}})")
RUN_ID = re.compile(r"\w[\w-]{0,99}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
PART_BYTES = 16 << 20  # of an upload; some at once
PARTS_AT_ONCE = 4
LEAVING_S = 0.3  # for so long .writer.json may be out of sight while a writer before leaves

Manifest = contracts.Manifest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint's folder: complete, or what a crash or an unfinished upload left.

    Attributes:
        store: where it is.
        path: its folder, relative to the store.
        sizes: bytes of each file, by name.
        is_link: it is a symbolic link: labtrain makes none, reads none, and writes through none.
    """

    store: "Store"
    path: str
    sizes: dict[str, int]
    is_link: bool = False

    @property
    def complete(self) -> bool:
        """Whether it is a checkpoint; an empty manifest keeps its name from a writer that was taken over."""
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
        """Whether it is what became of the weights after the last step; nothing goes on from it."""
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

    def move(self, path: str, to: str) -> None:
        """Rename a folder, in one step.

        Raises:
            FileNotFoundError: it is not there.
            FileExistsError: something has that name.
        """
        source, target = f"{self.root}/{path}", f"{self.root}/{to}"
        try:
            if self.local:
                Path(source).rename(target)  # over an empty folder, which is no checkpoint
            else:
                self.fs.ftp.rename(source, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.fs.lexists(target) if self.local else self.fs.exists(target):
                raise FileExistsError(target) from error
            raise

    def put(self, local: Path, path: str, callback: object = None) -> None:
        """Upload a file, in parts at once where the backend has parts."""
        options: dict[str, object] = {"callback": callback} if callback is not None else {}
        if "s3" in self.fs.protocol:
            part = max(PART_BYTES, local.stat().st_size // 9000)  # S3 has at most 10,000
            options |= {"chunksize": part, "max_concurrency": PARTS_AT_ONCE}
        self.fs.put_file(str(local), f"{self.root}/{path}", **options)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and all below it; nothing where it is gone already."""
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
        """Whether it renames folders; else a checkpoint is made to exist by its manifest alone."""
        return self.local or self._is_sftp

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
        self._put(full, data)

    def _put(self, full: str, data: bytes) -> None:
        """Write a file to a folder that is there, and have it on the disk."""
        if not self.local:
            self.fs.pipe_file(full, data)
            return
        with Path(full).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    # -------------------------------------------------------------------------------------------------- looking

    def find(self) -> list[Checkpoint]:
        """Return every checkpoint's folder below the store, complete or not, links too: by run, oldest first."""
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
        """Yield path, kind (file, directory, link) and bytes of what lies below the store; through no link."""
        if self.local:
            yield from self._local_entries()
            return
        try:
            files = self.fs.find(self.root, detail=True, withdirs=self._is_sftp)
        except FileNotFoundError:
            if self._is_sftp:
                return
            raise
        for path, info in files.items():
            yield path.removeprefix(self.root).lstrip("/"), info["type"], info["size"] or 0

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
        """Return the complete ones: by run, oldest first."""
        return [checkpoint for checkpoint in self.find() if checkpoint.complete]

    def refuse_link(self) -> None:
        """Refuse a store whose own folder is a link. Not for one that a person has typed: that is theirs.

        Raises:
            LabtrainError: names it.
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
            DamagedError: it is none.
            StoreError: it cannot be read.
        """
        where = f"{checkpoint.path}/{MANIFEST}" if checkpoint.path else MANIFEST
        with untrusted.damage_of(
            f"{checkpoint.url}/{MANIFEST}", what=f"is no manifest of {SCHEMA}", hint=_prune_hint(self)
        ):
            if checkpoint.sizes.get(MANIFEST, 0) > untrusted.RECORD_BYTES:
                raise ValueError(f"{checkpoint.sizes[MANIFEST]:,} bytes")
            with explained(self.url):
                data = self.read(where)
            manifest: Manifest = untrusted.loads(data)
            _check_manifest(manifest)
        if wrong := _contradiction(manifest, checkpoint):
            raise DamagedError(f"{checkpoint.url}/{MANIFEST} {wrong}", hint=_prune_hint(self))
        return manifest

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
                    key = self.key(name, wanted)
                    self.fs.get_file(f"{self.root}/{checkpoint.path}/{key}", str(folder / name))
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

    def key(self, name: str, entry: SavedFile) -> str:
        """Return what a checkpoint's file is called here.

        Where nothing is renamed, two writers may put files to one checkpoint's name: each under what it holds, so that
        neither puts one over the other's.
        """
        return name if self.renames else f"{entry['sha256'][:16]}.{name}"

    def writing(self, path: str, token: str) -> str:
        """Return the folder that a writer writes a checkpoint to, until `publish` makes it exist."""
        return f"{path}.writing-{token}" if self.renames else path

    def publish(self, path: str, manifest: Manifest, token: str) -> None:
        """Make a checkpoint exist, all of whose files lie in `writing`: with its manifest, in one step.

        Args:
            path: of the checkpoint.
            manifest: of the checkpoint.
            token: of the writer.

        Raises:
            TakenOverError: another process has become the writer, or has made a checkpoint of this name.
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
        except FileNotFoundError as error:  # who took over has renamed the folder away
            raise taken_over(str(self)) from error
        except FileExistsError as error:
            if not self.holds(path, manifest):
                raise taken_over(f"{self}/{path}") from error
        if self.local:
            sync(Path(self.root, path).parent)

    def _write_into(self, folder: str, name: str, data: bytes) -> None:
        """Write a file to a folder that must be there, and have the folder on the disk."""
        full = f"{self.root}/{folder}/{name}"
        self._put(full, data)
        if self.local:
            sync(Path(full).parent)

    def commit(self, path: str, manifest: Manifest) -> None:
        """Make a checkpoint exist whose files lie there: create its manifest.

        Raises:
            TakenOverError: another process has made a checkpoint of this name.
        """
        try:
            self.create(f"{path}/{MANIFEST}", _as_bytes(manifest))
        except FileExistsError:
            if not self.holds(path, manifest):  # else it is this one, whose answer was lost
                raise taken_over(f"{self}/{path}") from None
        if self.local:
            sync(Path(self.root, path).parent)

    def holds(self, path: str, manifest: Manifest) -> bool:
        """Return whether this very checkpoint exists here."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.read(f"{path}/{MANIFEST}") == _as_bytes(manifest)
        return False

    def upload(self, folder: Path, manifest: Manifest, path: str, callback: object = None) -> None:
        """Copy a checkpoint's files here from a folder of this machine; it exists once it is committed."""
        if self._is_sftp:
            self.fs.makedirs(f"{self.root}/{path}", exist_ok=True)
        for name, wanted in manifest["files"].items():
            key = self.key(name, wanted)
            self.put(folder / name, f"{path}/{key}", callback)
            if (size := self.fs.info(f"{self.root}/{path}/{key}")["size"]) != wanted["size_bytes"]:
                raise StoreError(f"{self.url}/{path}/{key}: {size} bytes arrived of {wanted['size_bytes']}")

    def discard(self, path: str, token: str = "") -> None:
        """Remove a checkpoint, so that a crash leaves all of it or none.

        Args:
            path: of the checkpoint; nothing is done where it is gone already.
            token: of the writer; none for a person, who says which.

        Raises:
            TakenOverError: another process has become the writer; the checkpoint is there.
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
            self.move(aside, gone)  # from here on nobody takes it back
            self.remove(gone)

    def _discard_by_manifest(self, path: str, check: Callable[[], None]) -> None:
        manifest = f"{path}/{MANIFEST}"
        with suppress(FileNotFoundError):
            data = self.read(manifest)
            self.remove(manifest)
            try:
                check()
            except TakenOverError:
                with suppress(FileExistsError):  # who took over has taken it for what a crash left
                    self.create(manifest, data)
                raise
        self.remove(path)

    def sweep(self, token: str, *, keep: Collection[str] = ()) -> None:
        """Have the writers before make no checkpoint exist from now on; remove what they were writing or removing.

        Args:
            token: of the writer, which has taken over.
            keep: names of checkpoints of which a part may be there, and which this writer is to complete.
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

    def _sweep_folder(self, left: Checkpoint, found: re.Match[str], token: str) -> None:
        name = left.path.removesuffix(left.name) + found[1]
        with suppress(FileNotFoundError):
            if found["why"] == "removing":  # who wanted to remove it may want so no more
                with suppress(FileExistsError):
                    self.move(left.path, name)
                    return
            gone = f"{name}.removed-{token}"
            self.remove(gone)
            self.move(left.path, gone)  # first, so that a late rename finds nothing
            self.remove(gone)

    def _sweep_name(self, left: Checkpoint) -> None:
        if MANIFEST not in left.sizes:
            try:
                self.create(f"{left.path}/{MANIFEST}", b"")
            except FileExistsError:  # its writer was quicker: it is complete
                return
        for name in left.sizes:
            if name != MANIFEST:
                self.remove(f"{left.path}/{name}")

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
        if self.renames:
            self.renew(token, seen=self.seen())
            return token
        with explained(self.url):
            self.replace(WRITER, _who(token))
        return token

    def enter(self) -> str:
        """Become the store's one writer, where it has none that lives, and return what it is known by.

        Raises:
            StoreError: another writes there, or may.
        """
        token, found = secrets.token_hex(8), self.writer()
        with explained(self.url), suppress(FileExistsError):
            if found is None or (writer_lives(found) is False and self._take_away(str(found.get("token")), by=token)):
                self.create(WRITER, _who(token))
                return token
        who = f"process {found.get('process')} on {found.get('host')}" if found else "another process"
        raise StoreError(f"{who} writes checkpoints to {self}", hint=f"another folder: {self.url}/imported")

    def renew(self, token: str, *, seen: str | None) -> None:
        """Write who the writer is, where it is still who it was when this process looked.

        Where nothing is renamed another may come between the look and the write; who writes looks again (saver.py).

        Args:
            token: of the new writer.
            seen: what `seen` returned.

        Raises:
            TakenOverError: another process has come between.
        """
        with explained(self.url):
            if not self.renames and self.seen() == seen:
                self.replace(WRITER, _who(token))
                return
            with suppress(FileExistsError):
                if self.renames and (seen is None or self._take_away(seen, by=token)):
                    self.create(WRITER, _who(token))
                    return
        raise taken_over(str(self))

    def seen(self, path: str = WRITER) -> str | None:
        """Return the token of who writes here; None where nobody does, empty where what is there says none."""
        data: bytes | None = None
        try:
            with explained(self.url), suppress(FileNotFoundError):
                data = self.read(path)
            return None if data is None else str(untrusted.loads(data)["token"])
        except (ValueError, TypeError, KeyError, untrusted.NotPlainError):
            return ""

    def writer(self) -> dict[str, object] | None:
        """Return who writes here: token, host, process; None where nobody does, or it ended as it should."""
        try:
            with explained(self.url), suppress(FileNotFoundError):
                return dict(untrusted.loads(self.read(WRITER)))
        except (ValueError, TypeError, untrusted.NotPlainError):
            pass
        return None

    def check_writer(self, token: str) -> None:
        """Refuse to go on where this process is the writer no more.

        Raises:
            TakenOverError: names who is, or says that another one was and has ended.
        """
        deadline = time.monotonic() + LEAVING_S
        while (found := self.writer()) is None and time.monotonic() < deadline:
            time.sleep(LEAVING_S / 10)
        if found is None:
            raise taken_over(str(self), was=True)
        if found.get("token") != token:
            raise taken_over(str(self), f" (process {found.get('process')} on {found.get('host')})")

    def leave(self, token: str) -> None:
        """Be its writer no more; of another's `.writer.json` nothing is lost, whenever that comes."""
        found = self.writer()
        if found is None or found.get("token") != token:
            return
        with explained(self.url):
            self._take_away(token, by=token)

    def _take_away(self, token: str, *, by: str) -> bool:
        """Remove a writer's `.writer.json` and return whether it was there; another's is put back.

        Args:
            token: of that writer.
            by: the token of who does this.
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
            with suppress(FileExistsError):  # it was not that one's any more
                if self.local:
                    _rename_to_new(Path(self.root, own), Path(self.root, WRITER))
                else:
                    self.fs.ftp.rename(f"{self.root}/{own}", f"{self.root}/{WRITER}")
        return False


class TakenOverError(StoreError):
    """Another process writes to this place."""


def taken_over(where: str, who: str = "", *, was: bool = False) -> TakenOverError:
    """Return the error for two runs that write to one place."""
    doing = f"has taken over {where}, and has ended" if was else f"writes checkpoints to {where}"
    return TakenOverError(
        f"another process{who} {doing}: this one stops, and has changed nothing of what the other needs",
        hint="the same command goes on from the newest; or keep two apart: resume=never, or another checkpoint.url",
    )


def links_error(place: str) -> LabtrainError:
    """Return the error for a checkpoint, or a run's folder of checkpoints, that is a symbolic link."""
    path, copy = quoted(place), quoted(f"{place}.copy")
    replace = f"cp -rL {path} {copy} && rm {path} && mv {copy} {path}; " if is_local(place) else ""
    return LabtrainError(
        f"{place} is a symbolic link: labtrain reads and writes checkpoints through no link in a run's folder",
        hint=f"{replace}for another disk: checkpoint.url=FOLDER",
    )


def sealed(manifest: Manifest) -> Manifest:
    """Return a manifest with its own digest, as it is written."""
    return {**manifest, "digest": digest_of(as_options(manifest))}


def _as_bytes(manifest: Manifest) -> bytes:
    return (exact_json.dumps(sealed(manifest), indent=1) + "\n").encode()


def _contradiction(manifest: Manifest, checkpoint: Checkpoint) -> str:
    """Return how a manifest contradicts itself or the name of its folder; empty where it does not.

    Its digest is against accidents: who changes a manifest by hand may write it anew.
    """
    said, found = str(manifest.get("digest")), digest_of(as_options(manifest))
    if said != found:
        return f"was changed after it was written: its digest is {found[:12]}, it says {said[:12]}"
    if NAME.fullmatch(checkpoint.name) and (manifest["step"], manifest.get("finished", False)) != checkpoint.order[:2]:
        return f"is that of step {manifest['step']}"
    if not RUN_ID.fullmatch(manifest["run_id"]):
        return "has no run's id"
    if not all(SHA256.fullmatch(entry["sha256"]) for entry in manifest["files"].values()):
        return "has no sha256 of its files"
    return ""


def _is_ours(name: str) -> bool:
    return bool(NAME.fullmatch(name) or ASIDE.fullmatch(name))


def identity(process: int) -> dict[str, object]:
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


def _who(token: str) -> bytes:
    return json.dumps({"token": token, "host": os.uname().nodename, **identity(os.getpid())}).encode()


def writer_lives(writer: Options | None) -> bool | None:
    """Return whether what a store says of its writer is of a process that lives; None where that is not known here."""
    if writer is None:
        return False
    here = identity(os.getpid())
    if any(writer.get(key) != here[key] for key in ("boot", "namespace")):
        return None  # its number says nothing here: another machine or container, or one that was started anew since
    with suppress(OSError, ValueError, TypeError, OverflowError):
        return identity(int(writer["process"])) == {key: writer.get(key) for key in here}
    return False


def _check_manifest(manifest: Any) -> None:
    """Hold a manifest against what is read of it; another version may say more, and an older one less.

    Each file is read, and copied, by its name: none may lead out of the folder.

    Raises:
        KeyError: something is not there.
        ValueError: something is not what it should be.
    """
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"schema {manifest['schema']!r}")
    if missing := [key for key in ("files", "run_id", "step") if key not in manifest]:
        raise ValueError(f"without {', '.join(missing)}")
    for key, good in MANIFEST_KINDS.items():
        if key in manifest and not good(manifest[key]):
            raise ValueError(f"{key} is {manifest[key]!r}"[:200])
    for name, entry in manifest["files"].items():
        if not untrusted.is_part(name) or name == MANIFEST or not untrusted.is_count(entry["size_bytes"]):
            raise ValueError(f"a file {name!r} of {entry['size_bytes']!r} bytes"[:200])
        if not _is_digest(entry["sha256"]):
            raise ValueError(f"sha256 {entry['sha256']!r}"[:200])
    if not any(name.endswith(".safetensors") for name in manifest["files"]):
        raise ValueError("no file of weights")
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


def _is_link(value: Any) -> bool:
    return bool(RUN_ID.fullmatch(value["run_id"]) and NAME.fullmatch(value["name"]) and _is_digest(value["digest"]))


def _is_record(value: Any) -> bool:
    return untrusted.is_count(value["size_bytes"]) and _is_digest(value["sha256"])


def _are_ranges(value: Any, first: object) -> bool:
    ends = [end for steps in value for end in steps]
    return isinstance(value, list) and all(map(untrusted.is_count, [*ends, first])) and ends == sorted(ends)


def _wrong(path: Path, wanted: SavedFile) -> str:
    """Return how a file differs from what a manifest says of it; empty where it does not."""
    try:
        with untrusted.open_plain(path, 1 << 60) as file:
            size = os.fstat(file.fileno()).st_size
            if size != wanted["size_bytes"]:
                return f"of {size} bytes, manifest says {wanted['size_bytes']}"
            found = sha256_of(file)
    except FileNotFoundError:
        return f"no file, manifest says {wanted['size_bytes']} bytes"
    except untrusted.NotPlainError as error:
        return str(error.strerror)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint=f"ls -l {quoted(path)}") from error
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
    return f"labtrain store check {quoted(store)}"
