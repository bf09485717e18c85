"""Which checkpoints are meant: where a run's lie, the newest that is whole, those that are kept, the next one's name.

No torch.
"""

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from labtrain.base.errors import DamagedError
from labtrain.record.identity import shown
from labtrain.stores.store import Checkpoint, Manifest, Store


def checkpoint_place(run_dir: Path, url: str | None) -> str:
    """Return where a run's checkpoints lie: in its own folder, or below `url` in one of the run's name."""
    return f"{url.rstrip('/')}/{run_dir.name}" if url else str(run_dir / "checkpoints")


def spool_of(run_dir: Path) -> Path:
    """Return the folder in which a run's checkpoints wait for a remote store."""
    return run_dir / "spool"


def stores_of(run_dir: Path, place: str) -> list[Store]:
    """Return where a run's checkpoints are looked for: what still waits in its spool, and their place."""
    spool = spool_of(run_dir)
    return [*([Store(spool)] if spool.is_dir() else []), Store(place)]


def newest_whole(
    stores: Iterable[Store], *, into: Path, to_resume: bool = False
) -> tuple[Checkpoint, Path, Manifest] | None:
    """Return the newest checkpoint whose files are what its manifest says, fetched; name each that is not.

    Args:
        stores: of one run; where two have a checkpoint, the first is asked first.
        into: a folder below which a remote one is copied, under its name.
        to_resume: leave out one that holds what became of the weights after the training's end.
    """
    found = [(checkpoint.order, -place, checkpoint) for place, store in enumerate(stores)
             for checkpoint in store.checkpoints() if not (to_resume and checkpoint.finished)]  # fmt: skip
    for _, _, checkpoint in sorted(found, key=lambda entry: entry[:2], reverse=True):
        try:
            folder, manifest = checkpoint.store.fetch(checkpoint, into / checkpoint.name)
        except DamagedError as error:
            older = f"going on from an older checkpoint than {shown(checkpoint.url)}"
            sys.stderr.write(f"warning: {error.args[0]}: {older}\n")
            continue
        return checkpoint, folder, manifest
    return None


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
