"""What crashes left in a store, told from uploads in progress: `labtrain store prune`. No torch."""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.stores.backends import explained
from labtrain.stores.layout import kept
from labtrain.stores.store import MANIFEST, Checkpoint, Store, identity


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

    It is in progress where the run's writer lives on this machine; where it is dead, or has ended, it is not; of a
    writer on another machine or in another container, what was touched in the last `older_than_s` seconds may be. Ages
    are between two times of the store, never of this machine's clock.
    """
    incomplete = [checkpoint for checkpoint in store.find() if MANIFEST not in checkpoint.sizes]
    uploads = _uploads(store)
    if not incomplete and not uploads:
        return []
    now, writers = store.now(), dict[str, bool | None]()

    def left(run: str, path: str, size: int, touched: datetime, upload: str = "") -> Leftover:
        if run not in writers:
            writers[run] = _writer_lives(store, run)
        age = (now - touched).total_seconds()
        alive = writers[run]
        return Leftover(path, size, age, age < older_than_s if alive is None else alive, upload)

    found = []
    for checkpoint in incomplete:
        touched = max(store.modified(f"{checkpoint.path}/{name}") for name in checkpoint.sizes)
        found.append(left(checkpoint.run, checkpoint.path, sum(checkpoint.sizes.values()), touched))
    for upload in uploads:
        path = upload["Key"].removeprefix(store.root.partition("/")[2]).lstrip("/")
        run = path.rpartition("/")[0].rpartition("/")[0]
        found.append(left(run, path, 0, upload["Initiated"], upload["UploadId"]))
    return found


def clear(store: Store, leftover: Leftover) -> None:
    """Remove what a crash left."""
    with explained(store.url):
        if leftover.upload:
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


def _writer_lives(store: Store, run: str) -> bool | None:
    """Return whether the run's writer lives; None where that cannot be known from here."""
    writer = Store(f"{store.url}/{run}").writer() if run else store.writer()
    if writer is None:
        return False
    here = identity(os.getpid())
    if any(writer.get(key) != here[key] for key in ("boot", "namespace")):
        return None  # its number says nothing here: another machine or container, or one that was started anew since
    with suppress(OSError, ValueError, TypeError):
        return identity(int(writer["process"])) == {key: writer.get(key) for key in here}
    return False


def _uploads(store: Store) -> list[dict[str, Any]]:
    if "s3" not in store.fs.protocol:
        return []
    bucket, _, prefix = store.root.partition("/")
    with explained(store.url), suppress(FileNotFoundError):
        return [found for found in store.fs.list_multipart_uploads(bucket) if found["Key"].startswith(prefix)]
    return []
