"""`init_from`: find the weights that a training starts with, and their digest. No torch, unless a pickle holds them."""

import os
from collections.abc import Iterator
from pathlib import Path

from labtrain.base.console import shown, warn
from labtrain.base.contracts import InitFrom, State
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.checkpoints.locate import found_checkpoint, found_manifest
from labtrain.record import receipt
from labtrain.record.digests import digest_file
from labtrain.record.identity import RUN_ID, Config
from labtrain.stores.backends import is_local

SAFETENSORS = ".safetensors"


def identify_weights(config: Config, root: Path) -> None:
    """Complete `init_from` in a configuration, before its run is named: where the weights are, and their digest.

    A path inside the experiment's folder becomes relative to it, so that a clone finds it too. If the weights are gone,
    a run that started with them still has its name: the digest comes from its receipt.

    Raises:
        ConfigError: there are no weights, or they do not have the configured digest.
    """
    first = config["init_from"]
    if first["path"] is None:
        return
    typed, runs = str(first["path"]), Path(config["paths"]["runs"]).resolve() / str(config["experiment"])
    places = [typed] if not is_local(typed) else [str(path) for path in _paths(typed, runs)]
    place = next((place for place in places if not is_local(place) or Path(place).exists()), None)
    if place is not None:
        digest = _digest_of(place)
        if first["digest"] not in (None, digest):
            raise _another(typed, str(first["digest"]), digest)
        first |= {"path": _portable(place, root), "digest": digest}
        return
    recorded = [_portable(each, root) for each in places]
    found = first["digest"], recorded[0]
    if first["digest"] is None:
        found = _from_receipts(recorded, [Path(config["resume"]), *runs.glob("*/")])
    if found[0] is None:
        raise ConfigError(
            f"init_from={typed}: no such file, and no run: looked for {', '.join(map(shown, places))}",
            hint="a file with weights (.ckpt, .pt, .safetensors), a run's folder or id, or a URL with checkpoints",
        )
    first |= {"path": found[1], "digest": found[0]}


def load_initial(first: InitFrom, root: Path) -> State:
    """Return the weights that `init_from` names, on the CPU, after checking their digest.

    Args:
        first: as `identify_weights` has completed it.
        root: the experiment's folder.

    Raises:
        LabtrainError: they are gone, damaged, or not those that the run is named by.
    """
    from labtrain.checkpoints.format import load_tensors, load_weights_of
    from labtrain.checkpoints.lightning_ckpt import read_weights
    from labtrain.record.digests import digest

    place = str(first["path"])
    if is_local(place):
        place = str(root / place.removeprefix("file://"))
        if not Path(place).exists():
            raise ConfigError(
                f"init_from={first['path']}: no such file or run: looked for {shown(place)}",
                hint="put it there again; or init_from.path=PLACE with the same weights",
            )
    if not Path(place).is_file():
        with found_checkpoint(place) as (folder, _):
            weights = load_weights_of(folder)
    elif place.endswith(SAFETENSORS):
        weights = load_tensors(Path(os.path.realpath(place)))
    else:
        weights = read_weights(Path(place))
    if (found := digest(weights)) != first["digest"]:
        raise _another(str(first["path"]), str(first["digest"]), found)
    return weights


def _paths(typed: str, runs: Path) -> Iterator[Path]:
    yield Path(typed.removeprefix("file://")).absolute()
    if receipt.is_id(typed) and receipt.with_id(typed, runs.parent):
        yield receipt.find(typed, runs.parent)
    elif RUN_ID.fullmatch(typed):  # a run that is gone
        yield runs / typed


def _digest_of(place: str) -> str:
    """Return the weights digest of a file, a run or a checkpoint; of the latter two from the manifest."""
    if is_local(place) and Path(place).is_file():
        if place.endswith(SAFETENSORS):
            return digest_file(Path(os.path.realpath(place)))
        from labtrain.checkpoints.lightning_ckpt import read_weights  # torch
        from labtrain.record.digests import digest

        return digest(read_weights(Path(place)))
    digest_in_manifest = found_manifest(place).get("weights_digest")
    if digest_in_manifest is None:
        raise LabtrainError(f"{place}: its manifest has no weights digest", hint=f"labtrain store check {place}")
    return digest_in_manifest


def _portable(place: str, root: Path) -> str:
    """Return a local path inside the experiment's folder relative to it."""
    if not is_local(place):
        return place
    path, home = Path(place), root.resolve()
    real = path.parent.resolve() / path.name
    return str(real.relative_to(home) if real.is_relative_to(home) else real)


def _from_receipts(recorded: list[str], run_dirs: list[Path]) -> tuple[str | None, str]:
    """Return the digest, and the path, of the newest of some runs that started with weights of one of these paths."""
    found = []
    for run_dir in run_dirs:
        try:
            read = receipt.read(run_dir)
        except LabtrainError:
            continue
        first = read["config"].get("init_from") if read is not None else None
        if first and first["path"] in recorded:
            found.append(((run_dir / receipt.FILE).stat().st_mtime, run_dir, first))
    if not found:
        return None, recorded[0]
    _, run_dir, first = max(found, key=lambda each: each[0])
    warn(f"init_from={first['path']} is gone: the digest of its weights comes from {shown(run_dir)}")
    return first["digest"], str(first["path"])


def _another(typed: str, expected: str, found: str) -> ConfigError:
    return ConfigError(
        f"init_from={typed}: the digest of its weights is {found[:12]}, expected {expected[:12]}",
        hint="a run is named by these weights: restore them; or, for another run, leave out init_from.digest and start"
        " again",
    )
