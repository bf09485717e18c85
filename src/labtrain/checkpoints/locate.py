"""Finds what a person names on the command line: a run, a checkpoint's folder or URL, a store, or a weights file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain.base.console import quoted
from labtrain.base.errors import LabtrainError
from labtrain.record import receipt
from labtrain.record.digests import digest_file, digest_folder, state_digest
from labtrain.record.own_runs import checkpoints_of
from labtrain.stores.backends import is_local
from labtrain.stores.layout import newest_whole, stores_of
from labtrain.stores.store import MANIFEST, NAME, Checkpoint, Manifest, Store


def digest_target(target: str, *, whole: bool = False) -> tuple[str, str | None]:
    """Return the digest of `target`, computed from its files, and the digest in its record.

    Args:
        target: a run's folder or id (its newest checkpoint), a checkpoint's folder or URL, or a .safetensors file.
        whole: of the whole training state instead of the weights.

    Raises:
        LabtrainError: nothing there has a digest.
    """
    target = _found(target)
    path = Path(target.removeprefix("file://"))
    if path.is_file() and path.suffix == ".safetensors" and not whole:
        return digest_file(Path(os.path.realpath(path))), None  # model caches use links
    found = receipt.read(path) if is_local(target) else None
    results = found["results"] if found else {}
    claimed = results.get("state_digest") if whole else results.get("weights_digest")
    with found_checkpoint(target, verified=False) as (folder, manifest):
        claimed = claimed or (manifest.get("state_digest") if whole else manifest.get("weights_digest"))
        if not whole:
            return digest_folder(folder), claimed
        from labtrain.checkpoints.format import load_folder

        return state_digest(load_folder(folder)), claimed


def load_weights(target: str | Path) -> dict[str, object]:
    """Return the weights of a run, or of one checkpoint, as a state dict on the CPU. This runs no code from them.

    Args:
        target: a run's folder or id, or the URL of its checkpoints (the newest complete one), a checkpoint's folder or
            URL, or a .safetensors file.

    Raises:
        DamagedError: the file does not fit the manifest.
        LabtrainError: there are no weights.
        StoreError: the store cannot be read.
    """
    from labtrain.checkpoints.format import load_tensors, load_weights_of

    if str(target).endswith(".safetensors") and is_local(str(target)):
        return load_tensors(Path(os.path.realpath(str(target).removeprefix("file://"))))
    with found_checkpoint(str(target)) as (folder, _):
        return load_weights_of(folder)


def _found(target: str) -> str:
    """Return the folder of a run that is named by its id; anything else unchanged."""
    return str(receipt.find(target)) if receipt.is_id(target) else target


@contextmanager
def found_checkpoint(target: str, *, verified: bool = True) -> Iterator[tuple[Path, Manifest]]:
    """Find a checkpoint and yield its folder on this machine and its manifest.

    Args:
        target: a run's folder or id, or the URL of its checkpoints, for the newest complete one; or a checkpoint.
        verified: refuse a named checkpoint on this machine that is damaged.

    Raises:
        DamagedError: the named checkpoint is damaged.
        LabtrainError: there is no checkpoint.
    """
    with TemporaryDirectory(prefix="labtrain-") as scratch:
        target = _found(target)
        if (named := _named(target)) is not None:
            if named.store.local and not verified:
                yield named.folder, named.store.manifest(named)
            else:
                yield named.store.fetch(named, Path(scratch, named.name))
            return
        stores, run_id = _stores(target)
        newest = newest_whole(stores, into=Path(scratch), run_id=run_id)
        if newest is None:
            raise _nothing_at(target, run_id)
        yield newest[1], newest[2]


def found_manifest(target: str) -> Manifest:
    """Return the manifest of the checkpoint that `found_checkpoint` finds if none is damaged, and fetch nothing else.

    Raises:
        LabtrainError: there is no checkpoint.
    """
    target = _found(target)
    if (named := _named(target)) is not None:
        return named.store.manifest(named)
    stores, run_id = _stores(target)
    found = [each for store in stores for each in store.find() if each.complete and not each.is_link]
    if not found:
        raise _nothing_at(target, run_id)
    newest = max(found, key=lambda each: each.order)
    return newest.store.manifest(newest)


def _named(target: str) -> Checkpoint | None:
    """Return the checkpoint whose folder or URL `target` is; None if it is something else."""
    place, _, name = target.rstrip("/").removesuffix(f"/{MANIFEST}").rpartition("/")
    return Checkpoint(Store(place or "."), name, {}) if NAME.fullmatch(name) else None


def _stores(target: str) -> tuple[list[Store], str | None]:
    """Return the stores with the checkpoints of `target`, and the run's id if it is a run's folder."""
    place = target.rstrip("/").removesuffix(f"/{MANIFEST}")
    run_dir = Path(place.removeprefix("file://"))
    found = receipt.read(run_dir) if is_local(place) else None
    if found is None:
        return [Store(place)], None
    return stores_of(run_dir, checkpoints_of(run_dir, found)), found["run_id"]


def _nothing_at(target: str, run_id: str | None) -> LabtrainError:
    if run_id is not None:
        return LabtrainError(
            f"{target} has no checkpoints: only its receipt is here",
            hint=f"copy them to {quoted(Path(target) / 'checkpoints')}; labtrain report shows the recorded digest",
        )
    return LabtrainError(
        f"{target} is neither a run nor a checkpoint: looked for {receipt.FILE}, {MANIFEST} and step-*",
        hint="labtrain ls lists runs; labtrain store ls URL lists checkpoints",
    )
