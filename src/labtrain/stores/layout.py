"""A run's checkpoints: their place, the newest undamaged one, which ones to keep, the next name. No torch."""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from labtrain.base.console import quoted, shown, warn
from labtrain.base.contracts import Link
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.stores.store import Checkpoint, Manifest, Store, links_error

NAMED = re.compile(r"[0-9a-f]{12}(-[\w-]+)?", re.ASCII)  # a run id


def checkpoint_place(run_dir: Path, url: str | None) -> str:
    """Return the place of a run's checkpoints: in its own folder, or below `url` in a folder with the run's name."""
    return f"{url.rstrip('/')}/{run_dir.name}" if url else str(run_dir / "checkpoints")


def spool_of(run_dir: Path) -> Path:
    """Return the folder in which a run's checkpoints wait for a remote store."""
    return run_dir / "spool"


def stores_of(run_dir: Path, place: str) -> list[Store]:
    """Return the stores that may have a run's checkpoints: its spool, if there is one, and `place`.

    Raises:
        LabtrainError: one of them is a link.
    """
    spool = spool_of(run_dir)
    stores = [*([Store(spool)] if spool.is_dir() else []), Store(place)]
    for store in stores:
        store.refuse_link()
    return stores


def newest_whole(
    stores: Iterable[Store],
    *,
    into: Path,
    to_resume: bool = False,
    run_id: str | None = None,
    look: Callable[[Path, Manifest], None] = lambda folder, manifest: None,
) -> tuple[Checkpoint, Path, Manifest] | None:
    """Fetch the newest checkpoint whose files match its manifest; warn about each damaged one.

    Args:
        stores: of one run; if two have the same checkpoint, the first is used.
        into: a folder to copy a remote checkpoint into, under its name.
        to_resume: skip a checkpoint with final weights only, which cannot be resumed.
        run_id: of the run; None if it is not known.
        look: an additional check; raises DamagedError.

    Raises:
        LabtrainError: a checkpoint is a link, or belongs to another run.
    """
    found = [(checkpoint.order, -place, checkpoint) for place, store in enumerate(stores)
             for checkpoint in without_links(store.find())
             if checkpoint.complete and not (to_resume and checkpoint.finished)]  # fmt: skip
    for _, _, checkpoint in sorted(found, key=lambda entry: entry[:2], reverse=True):
        try:
            if run_id is not None:
                check_run(checkpoint, checkpoint.store.manifest(checkpoint), run_id)
            folder, manifest = checkpoint.store.fetch(checkpoint, into / checkpoint.name)
            look(folder, manifest)
        except DamagedError as error:
            warn(f"{error.args[0]}: using an older checkpoint than {shown(checkpoint.url)}")
            continue
        return checkpoint, folder, manifest
    return None


def without_links(found: list[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints unchanged.

    Raises:
        LabtrainError: one of them is a link.
    """
    for checkpoint in found:
        if checkpoint.is_link:
            raise links_error(shown(checkpoint.url))
    return found


def check_run(checkpoint: Checkpoint, manifest: Manifest, run_id: str) -> None:
    """Raise if a checkpoint belongs to another run.

    Raises:
        LabtrainError: names both runs.
    """
    if manifest["run_id"] != run_id:
        place = shown(checkpoint.url)
        raise LabtrainError(
            f"{place} is a checkpoint of run {manifest['run_id']}, but it is in the folder of run {run_id}",
            hint=f"mv {quoted(place)} {manifest['run_id']}.{checkpoint.name}"
            if checkpoint.store.local
            else f"labtrain store ls {quoted(checkpoint.store.url)}; move it to its own run",
        )


def check_chain(manifests: dict[str, Manifest]) -> None:
    """Raise if a run's checkpoints (by name) come from two trainings.

    Each manifest names the checkpoint that its training saved, or resumed from, before. That one may have been removed.

    Raises:
        LabtrainError: names the two checkpoints.
    """
    for name, wrong in broken_links(manifests):
        raise LabtrainError(
            f"{name} {wrong}: the checkpoints come from two trainings of one run",
            hint="move the foreign checkpoint to another folder; the same command then resumes from the remaining one",
        )


def broken_links(manifests: dict[str, Manifest]) -> Iterator[tuple[str, str]]:
    """Yield each checkpoint whose recorded predecessor differs from the one here, and an error text."""
    for name, manifest in manifests.items():
        before = manifest.get("before")
        beside = manifests.get(before["name"]) if before else None
        if (
            before is None
            or beside is None
            or before["run_id"] != manifest["run_id"]
            or before["digest"] == beside["digest"]
        ):
            continue
        digests = f"{before['digest'][:12]}, the one here has {beside['digest'][:12]}"
        yield name, f"was saved after a different {before['name']}: its manifest had digest {digests}"


def link_to(name: str, manifest: Manifest) -> Link:
    """Return the entry about this checkpoint for the next one's manifest."""
    return {"run_id": manifest["run_id"], "name": name, "digest": manifest["digest"]}


def misplaced(manifests: dict[str, tuple[Checkpoint, Manifest]]) -> dict[str, str]:
    """Return an error text, by path, for each undamaged checkpoint that does not belong in its folder.

    A folder belongs to the run in its name, or in the name of the folder above `checkpoints`; else to the run with the
    most checkpoints.
    """
    runs: dict[str, dict[str, Manifest]] = {}
    for checkpoint, manifest in manifests.values():
        runs.setdefault(checkpoint.url.rpartition("/")[0], {})[checkpoint.path] = manifest
    found: dict[str, str] = {}
    for url, there in runs.items():
        ids = [manifest["run_id"] for manifest in there.values()]
        owner = url.removesuffix("/checkpoints").rpartition("/")[2]
        if not NAMED.fullmatch(owner):
            owner = max(ids, key=ids.count)
        by_name = {path.rpartition("/")[2]: (path, manifest) for path, manifest in there.items()}
        for name, wrong in broken_links({name: manifest for name, (_, manifest) in by_name.items()}):
            found[by_name[name][0]] = wrong
        found |= {path: f"belongs to run {manifest['run_id']}, not to run {owner}"
                  for path, manifest in there.items() if manifest["run_id"] != owner}  # fmt: skip
    return found


def copy_as(checkpoint: Path, run_dir: Path, run_id: str) -> None:
    """Copy a checkpoint into a run without checkpoints, as its own starting point, without earlier records."""
    store = Store(run_dir / "checkpoints")
    source = Store(checkpoint.parent)
    manifest = source.manifest(Checkpoint(source, checkpoint.name, {}))
    folder = Path(store.root, checkpoint.name)
    folder.mkdir(parents=True)
    for name in manifest["files"]:
        shutil.copy2(checkpoint / name, folder / name)
    store.commit(checkpoint.name, {**manifest, "before": None, "trail": None, "history": None, "run_id": run_id})


def list_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Return the complete checkpoints in a local folder, oldest first."""
    store, found = Store(folder), []
    for checkpoint in store.checkpoints():
        with suppress(DamagedError):
            found.append((checkpoint.folder, store.manifest(checkpoint)))
    return found


def kept(
    steps: dict[str, int],
    scores: dict[str, float],
    *,
    last: int,
    best: int = 0,
    every: int | None = None,
    mode: str = "max",
) -> set[str]:
    """Return which checkpoints to keep: the newest, the best, and those at multiples of a step.

    Args:
        steps: of each checkpoint, by name, oldest first.
        scores: by name, of validated checkpoints.
        last: how many of the newest to keep.
        best: how many of the best to keep.
        every: keep each whose step is a multiple of this.
        mode: max or min: which score is better.
    """
    ranked = sorted((name for name in steps if name in scores), key=lambda name: scores[name], reverse=mode == "max")
    good = {name for name, step in steps.items() if every and step % every == 0}
    return good | set(list(steps)[-last:]) | set(ranked[:best])


def free_name(step: int, taken: set[str], *, finished: bool = False) -> str:
    """Return an unused checkpoint name, and add it to `taken`."""
    number, name = 1, f"step-{step:010d}{'-end' if finished else ''}"
    free = name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    taken.add(free)
    return free
