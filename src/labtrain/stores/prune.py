"""`labtrain store prune`: find what crashes left in a store, without touching what is being written. No torch."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.stores.backends import explained
from labtrain.stores.layout import kept
from labtrain.stores.store import MANIFEST, NAME, Checkpoint, GoneError, Store, writer_lives


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder without a manifest, or an unfinished multipart upload.

    Attributes:
        path: relative to the store.
        size_bytes: its size; 0 if the backend does not report it.
        age_s: seconds since the last write, by the store's clock.
        in_progress: whether it may still be written.
        upload: the backend's id of a multipart upload.
    """

    path: str
    size_bytes: int
    age_s: float
    in_progress: bool
    upload: str = ""


def leftovers(store: Store, *, older_than_s: float) -> list[Leftover]:
    """Find folders without a manifest and unfinished uploads.

    A leftover is in progress if its writer (a training or an import) lives on this machine. If the writer is on another
    machine or in another container, it counts as in progress for `older_than_s` seconds after the last write. Ages are
    differences of the store's clock, never of this machine's.
    """
    incomplete = [checkpoint for checkpoint in store.find() if not checkpoint.complete and not checkpoint.is_link]
    uploads = _uploads(store)
    if not incomplete and not uploads:
        return []
    now, writers = store.now(), dict[str, bool | None]()

    def left(run: str, path: str, size: int, touched: datetime, upload: str = "") -> Leftover:
        if run not in writers:
            writers[run] = writer_lives((Store(f"{store.url}/{run}") if run else store).writer())
        age = (now - touched).total_seconds()
        alive = writers[run]
        return Leftover(path, size, age, age < older_than_s if alive is None else alive, upload)

    found = []
    for checkpoint in incomplete:
        paths = [f"{checkpoint.path}/{name}" for name in checkpoint.sizes] or [checkpoint.path]
        try:
            touched = max(map(store.modified, paths))
        except FileNotFoundError:
            continue  # its writer has removed or renamed it since
        each = left(checkpoint.run, checkpoint.path, sum(checkpoint.sizes.values()), touched)
        # Check after asking for the writer: a writer that has ended may have finished the checkpoint meanwhile.
        if each.in_progress or not (NAME.fullmatch(checkpoint.name) and _is_finished(store, checkpoint)):
            found.append(each)
    for path, upload in uploads:
        run = path.rpartition("/")[0].rpartition("/")[0]
        found.append(left(run, path, 0, upload["Initiated"], upload["UploadId"]))
    return found


def clear(store: Store, leftover: Leftover) -> None:
    """Remove a leftover."""
    with explained(store.url):
        if leftover.upload:
            with suppress(FileNotFoundError):  # its writer has finished it since
                store.fs.abort_mpu(*f"{store.root}/{leftover.path}".split("/", 1), leftover.upload)
        else:
            store.remove(leftover.path)


def superseded(store: Store, *, keep_last: int) -> list[Checkpoint]:
    """Return each run's checkpoints that are older than its newest `keep_last`, at least one of which is undamaged.

    Raises:
        LabtrainError: all that would be kept are damaged.
    """
    doomed = []
    runs: dict[str, list[Checkpoint]] = {}
    for checkpoint in store.checkpoints():
        runs.setdefault(checkpoint.run, []).append(checkpoint)
    for run, found in runs.items():
        stay = kept({each.path: each.step for each in found}, {}, last=keep_last)
        stay |= {each.path for each in found if each.finished}
        going = [each for each in found if each.path not in stay]
        if going and not any(_is_whole(each) for each in reversed(found) if each.path in stay):
            raise LabtrainError(
                f"{store.url}/{run}: all {len(stay)} checkpoints that would remain are damaged; nothing was removed",
                hint=f"labtrain store check {store.url}",
            )
        doomed += going
    return doomed


def check(checkpoint: Checkpoint) -> str | None:
    """Read a checkpoint and compare it with its manifest; return an error text, None if it is undamaged.

    Raises:
        GoneError: it was removed since it was listed.
    """
    with TemporaryDirectory() as folder:
        try:
            checkpoint.store.fetch(checkpoint, Path(folder))
        except GoneError:
            raise
        except DamagedError as error:
            return str(error.args[0])
    return None


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        return check(checkpoint) is None
    except GoneError:
        return False


def _is_finished(store: Store, checkpoint: Checkpoint) -> bool:
    with explained(store.url), suppress(FileNotFoundError):
        store.fs.info(f"{store.root}/{checkpoint.path}/{MANIFEST}")  # fsspec's `exists` takes any error for a no
        return True
    return False


def _uploads(store: Store) -> list[tuple[str, Options]]:
    """Return (path, upload) of each multipart upload of a checkpoint; leave out other programs' uploads."""
    if "s3" not in store.fs.protocol:
        return []
    bucket, _, folder = store.root.partition("/")
    prefix = f"{folder}/" if folder else ""  # s3://lab/digits2 is not in s3://lab/digits
    with explained(store.url), suppress(FileNotFoundError):
        found = [(each["Key"].removeprefix(prefix), each) for each in store.fs.list_multipart_uploads(bucket)
                 if each["Key"].startswith(prefix)]  # fmt: skip
        return [(path, each) for path, each in found if NAME.fullmatch(path.rpartition("/")[0].rpartition("/")[2])]
    return []
