"""What crashes left in a store, told from what is being written: `labtrain store prune`. No torch."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.stores.backends import explained
from labtrain.stores.layout import kept
from labtrain.stores.store import MANIFEST, NAME, Checkpoint, Store, writer_lives


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder without a manifest, or an upload in parts that nobody ended.

    Attributes:
        path: relative to the store.
        size_bytes: what is there of it; 0 where the backend does not say.
        age_s: since something was last written to it, by the store's own clock.
        in_progress: whether it may still be written.
        upload: the backend's number of an upload in parts.
    """

    path: str
    size_bytes: int
    age_s: float
    in_progress: bool
    upload: str = ""


def leftovers(store: Store, *, older_than_s: float) -> list[Leftover]:
    """Find what has no manifest.

    It is in progress where its writer lives on this machine: a training, or an import. Where that is dead, or has
    ended, it is not; of a writer on another machine or in another container, what was touched in the last
    `older_than_s` seconds may be. Ages are between two times of the store, never of this machine's clock.
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
            continue  # its writer has removed it since, or given it its name
        each = left(checkpoint.run, checkpoint.path, sum(checkpoint.sizes.values()), touched)
        # Asked after the writer: one that had ended by then has finished what it was writing when this began to look.
        if each.in_progress or not (NAME.fullmatch(checkpoint.name) and _is_finished(store, checkpoint)):
            found.append(each)
    for path, upload in uploads:
        run = path.rpartition("/")[0].rpartition("/")[0]
        found.append(left(run, path, 0, upload["Initiated"], upload["UploadId"]))
    return found


def clear(store: Store, leftover: Leftover) -> None:
    """Remove what a crash left."""
    with explained(store.url):
        if leftover.upload:
            with suppress(FileNotFoundError):  # its writer has ended it since
                store.fs.abort_mpu(*f"{store.root}/{leftover.path}".split("/", 1), leftover.upload)
        else:
            store.remove(leftover.path)


def superseded(store: Store, *, keep_last: int) -> list[Checkpoint]:
    """Return each run's checkpoints that are older than its newest `keep_last`, of which one must be whole.

    Raises:
        LabtrainError: none of those that would be kept is whole.
    """
    doomed = []
    runs: dict[str, list[Checkpoint]] = {}
    for checkpoint in store.checkpoints():
        runs.setdefault(checkpoint.run, []).append(checkpoint)
    for run, found in runs.items():
        stay = kept({each.path: each.step for each in found}, {}, last=keep_last)
        stay |= {each.path for each in found if each.finished}
        going = [each for each in found if each.path not in stay]
        if going and not any(check(each) is None for each in reversed(found) if each.path in stay):
            raise LabtrainError(
                f"{store.url}/{run}: none of the {len(stay)} checkpoints that would stay is whole: nothing is removed",
                hint=f"labtrain store check {store.url}",
            )
        doomed += going
    return doomed


def check(checkpoint: Checkpoint) -> str | None:
    """Read a checkpoint and compare it with its manifest; return what is wrong, None if it is whole."""
    with TemporaryDirectory() as folder:
        try:
            checkpoint.store.fetch(checkpoint, Path(folder))
        except DamagedError as error:
            return str(error.args[0])
    return None


def _is_finished(store: Store, checkpoint: Checkpoint) -> bool:
    with explained(store.url):
        return bool(store.fs.exists(f"{store.root}/{checkpoint.path}/{MANIFEST}"))


def _uploads(store: Store) -> list[tuple[str, Options]]:
    """Return (path, upload) of each upload in parts below the store that is a checkpoint's; another program's stay."""
    if "s3" not in store.fs.protocol:
        return []
    bucket, _, folder = store.root.partition("/")
    prefix = f"{folder}/" if folder else ""  # s3://lab/digits2 is no part of s3://lab/digits
    with explained(store.url), suppress(FileNotFoundError):
        found = [(each["Key"].removeprefix(prefix), each) for each in store.fs.list_multipart_uploads(bucket)
                 if each["Key"].startswith(prefix)]  # fmt: skip
        return [(path, each) for path, each in found if NAME.fullmatch(path.rpartition("/")[0].rpartition("/")[2])]
    return []
