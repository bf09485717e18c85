"""Which checkpoints are meant: where a run's lie, the newest that is whole, those that are kept, the next one's name.

No torch.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from labtrain.base.console import quoted, shown, warn
from labtrain.base.contracts import Link
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.stores.store import Checkpoint, Manifest, Store, links_error

NAMED = re.compile(r"[0-9a-f]{12}(-[\w-]+)?", re.ASCII)  # a run's id, as runs are named


def checkpoint_place(run_dir: Path, url: str | None) -> str:
    """Return where a run's checkpoints lie: in its own folder, or below `url` in one of the run's name."""
    return f"{url.rstrip('/')}/{run_dir.name}" if url else str(run_dir / "checkpoints")


def spool_of(run_dir: Path) -> Path:
    """Return the folder in which a run's checkpoints wait for a remote store."""
    return run_dir / "spool"


def stores_of(run_dir: Path, place: str) -> list[Store]:
    """Return where a run's checkpoints are looked for: what still waits in its spool, and their place.

    Raises:
        LabtrainError: one of both is a link.
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
    """Return the newest checkpoint whose files are what its manifest says, fetched; name each that is not.

    Args:
        stores: of one run; where two have a checkpoint, the first is asked first.
        into: a folder below which a remote one is copied, under its name.
        to_resume: leave out one that holds what became of the weights after the training's end.
        run_id: of the run; None where that is not known.
        look: raises a DamagedError for what a manifest does not tell.

    Raises:
        LabtrainError: one is a link, or that of another run.
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
            warn(f"{error.args[0]}: going on from an older checkpoint than {shown(checkpoint.url)}")
            continue
        return checkpoint, folder, manifest
    return None


def without_links(found: list[Checkpoint]) -> list[Checkpoint]:
    """Return what was found in a run's place.

    Raises:
        LabtrainError: one of them is a link.
    """
    for checkpoint in found:
        if checkpoint.is_link:
            raise links_error(shown(checkpoint.url))
    return found


def check_run(checkpoint: Checkpoint, manifest: Manifest, run_id: str) -> None:
    """Refuse another run's checkpoint.

    Raises:
        LabtrainError: names both runs.
    """
    if manifest["run_id"] != run_id:
        place = shown(checkpoint.url)
        raise LabtrainError(
            f"{place} is a checkpoint of the run {manifest['run_id']}, it lies among those of {run_id}",
            hint=f"mv {quoted(place)} {manifest['run_id']}.{checkpoint.name}"
            if checkpoint.store.local
            else f"labtrain store ls {quoted(checkpoint.store.url)}; move it to where it belongs",
        )


def check_chain(manifests: dict[str, Manifest]) -> None:
    """Refuse a run's checkpoints, by name, where one was not saved after the one that lies beside it.

    Each manifest says which checkpoint its training had saved, or gone on from, before. That one may be gone by now.

    Raises:
        LabtrainError: names both.
    """
    for name, wrong in broken_links(manifests):
        raise LabtrainError(
            f"{name} {wrong}: they are of two trainings of one run",
            hint="move away the one that was put there, and the same command goes on from the other",
        )


def broken_links(manifests: dict[str, Manifest]) -> Iterator[tuple[str, str]]:
    """Yield the name of each checkpoint that was saved after another one than lies beside it, and which that is."""
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
        digests = f"{before['digest'][:12]}, here it is {beside['digest'][:12]}"
        yield name, f"was saved after another {before['name']} than lies beside it: its manifest's digest was {digests}"


def link_to(name: str, manifest: Manifest) -> Link:
    """Return what the manifest of the next checkpoint says of this one."""
    return {"run_id": manifest["run_id"], "name": name, "digest": manifest["digest"]}


def misplaced(manifests: dict[str, tuple[Checkpoint, Manifest]]) -> dict[str, str]:
    """Return what is wrong, by path, with whole checkpoints that do not belong to those in the same folder.

    Whose a folder is: the run's that it is named after, or that the folder around `checkpoints` is; else of the most.
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
        found |= {path: f"is of the run {manifest['run_id']}, among those of {owner}"
                  for path, manifest in there.items() if manifest["run_id"] != owner}  # fmt: skip
    return found


def copy_as(checkpoint: Path, run_dir: Path, run_id: str) -> None:
    """Copy a checkpoint into a run that has none, as that run's own: it begins there, and has no record before."""
    store = Store(run_dir / "checkpoints")
    source = Store(checkpoint.parent)
    manifest = source.manifest(Checkpoint(source, checkpoint.name, {}))
    folder = Path(store.root, checkpoint.name)
    folder.mkdir(parents=True)
    for name in manifest["files"]:
        shutil.copy2(checkpoint / name, folder / name)
    store.commit(checkpoint.name, {**manifest, "before": None, "trail": None, "history": None, "run_id": run_id})


def list_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Return the complete checkpoints of a folder of this machine, oldest first."""
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
    """Return which checkpoints are kept: the last, the best, and each whose step is a multiple.

    Args:
        steps: of each checkpoint, by name, oldest first.
        scores: by name, of those that were validated.
        last: how many of the newest.
        best: how many of the best scores.
        every: each whose step is a multiple of this.
        mode: max or min: which score is better.
    """
    ranked = sorted((name for name in steps if name in scores), key=lambda name: scores[name], reverse=mode == "max")
    good = {name for name, step in steps.items() if every and step % every == 0}
    return good | set(list(steps)[-last:]) | set(ranked[:best])


def free_name(step: int, taken: set[str], *, finished: bool = False) -> str:
    """Return a checkpoint's name that is not taken, and take it."""
    number, name = 1, f"step-{step:010d}{'-end' if finished else ''}"
    free = name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    taken.add(free)
    return free
