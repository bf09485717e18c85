"""`labtrain.load`: the model of a run with its weights, made by the code of the experiment here."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from labtrain.base.console import few, shown, warn
from labtrain.base.contracts import Options, as_options
from labtrain.base.credentials import NOT_RECORDED
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.checkpoints.locate import found_checkpoint
from labtrain.launch.experiment import experiment_at
from labtrain.record import receipt as receipts
from labtrain.record.config import flat_texts, from_environment
from labtrain.record.identity import Config
from labtrain.record.own_runs import is_own
from labtrain.record.receipt import Receipt
from labtrain.record.sources import Code, read_code, stale_modules
from labtrain.review.trust import foreign_targets
from labtrain.stores.backends import is_local
from labtrain.stores.store import MANIFEST, NAME, Manifest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def load(run: str | Path, path: str | Path = ".", *, trust: bool = False) -> "LightningModule":
    """Return the model of a run with its final weights, on the CPU in eval mode.

    The receipt says which class and arguments. The code is that of the experiment here: labtrain warns if it differs
    from the run's. Of an unfinished run, the weights are those of the newest checkpoint.

    Args:
        run: a run's folder or id, one checkpoint of it, or the URL of one or of the run's checkpoints. The run's
            receipt must be on this machine.
        path: the experiment's folder, or a folder in it.
        trust: also make what the receipt of somebody else names outside the experiment, torch, Lightning, torchmetrics
            and labtrain. Such a receipt can name any function of any installed package.

    Raises:
        ConfigError: there is no receipt or no class, or the weights do not fit the model; names them.
        DamagedError: the weights are not those that the receipt records.
        LabtrainError: there is no run or no checkpoint.
    """
    root = experiment_at(path)
    runs = receipts.runs_folder(root)
    target = str(receipts.find(run, runs)) if is_local(str(run)) else str(run)
    with found_checkpoint(target) as (folder, manifest):
        run_dir, found = _receipt_of(target, manifest, runs)
        code = read_code(root, as_options(found["config"]))
        is_one = bool(NAME.fullmatch(Path(target).name))
        _warn(run_dir, found, manifest, code, is_one=is_one)
        options = _model_of(found, run_dir)
        if not trust and not is_own(found, run_dir, root):
            _refuse_foreign(options, run_dir, root, code)
        with _first_in_path(root, str(options.get("_target_")), code):
            from labtrain.record.digests import digest
            from labtrain.training.trained import make_trained

            model = make_trained(options, folder)
        is_final = found["status"] == "complete" and not is_one
        recorded = {MANIFEST: manifest["weights_digest"]}
        recorded |= {receipts.FILE: found["results"]["weights_digest"]} if is_final else {}
        for name, said in recorded.items():
            if (now := digest(model)) != said:
                raise DamagedError(
                    f"{shown(run_dir)}: the weights have digest {now[:12]}, but {name} records {said[:12]}",
                    hint=f"labtrain store check {shown(run_dir)}",
                )
    return model


def _receipt_of(target: str, manifest: Manifest, runs: Path) -> tuple[Path, Receipt]:
    """Return the run's folder and receipt: where the checkpoint is, else the run of that id below `runs`."""
    run_id = str(manifest["run_id"])
    place = Path(target.removeprefix("file://")).absolute()
    places = [place, *list(place.parents)[:2]] if is_local(target) else []  # RUN, RUN/checkpoints, RUN/checkpoints/NAME
    for run_dir in places:
        if (found := receipts.read(run_dir)) is not None:
            if found["run_id"] != run_id:
                raise LabtrainError(
                    f"{target} is a checkpoint of run {run_id}, but {shown(run_dir)} is run {found['run_id']}",
                    hint=f"labtrain store check {target}",
                )
            return run_dir, found
    there = sorted(file.parent for file in runs.glob(f"*/{run_id}/{receipts.FILE}"))
    found = receipts.read(there[0]) if there else None
    if found is None:
        raise ConfigError(
            f"{target}: the configuration of run {run_id} is in its receipt, which is not in {shown(runs)}",
            hint=f"copy it to {shown(runs)}/NAME/{run_id}/{receipts.FILE}; labtrain.load_weights needs no receipt",
        )
    return there[0], found


def _warn(run_dir: Path, found: Receipt, manifest: Manifest, code: Code, *, is_one: bool) -> None:
    """Warn if the code differs from the run's, or if the weights are not the final ones."""
    said, now = found["code"]["sources"] | found["code"].get("outside", {}), code.sources | code.outside
    if changed := [name if name in now else f"{name} (missing)" for name in said if said[name] != now.get(name)]:
        warn(f"this code differs from that of {shown(run_dir)}: {few(changed)}")
    if stale := stale_modules(code):
        warn(f"changed since they were imported: {few(stale)}. Restart the kernel to load the new code")
    if found["status"] != "complete" and not is_one:
        warn(f"{shown(run_dir)} is not complete: these are the weights of step {manifest['step']}")


def _model_of(found: Receipt, run_dir: Path) -> Options:
    """Return the configuration's `model`, with values from this environment."""
    options = from_environment(cast(Config, {"model": found["config"]["model"]}))[0]["model"]
    if lost := [key for key, text in flat_texts(options) if NOT_RECORDED in text]:
        raise ConfigError(
            f"{shown(run_dir)}: model.{lost[0]} is a credential, which the receipt does not record",
            hint="labtrain.load_weights returns the weights, for a model that you make yourself",
        )
    return options


def _refuse_foreign(options: Options, run_dir: Path, root: Path, code: Code) -> None:
    """Raise ConfigError if somebody else's receipt would call what this user has not chosen.

    The experiment's classes are those in the user's own folder. What the receipt says about its sources does not count.
    """
    for key, text in foreign_targets({"model": options}, root, code.sources):
        raise ConfigError(
            f"you did not train {shown(run_dir)} in {root}, and its receipt says {key}: {text}, which is not a class of"
            " this experiment or of torch, Lightning, torchmetrics or labtrain",
            hint=f"labtrain.load({str(run_dir)!r}, trust=True), if you trust whoever sent it",
        )


@contextmanager
def _first_in_path(root: Path, target: str, code: Code) -> Iterator[None]:
    """Import from the experiment first.

    Raises:
        ConfigError: a module of the same name was imported from another folder.
    """
    module = target.partition(".")[0]
    is_own = any(name in (f"{module}.py", f"{module}/__init__.py") for name in code.sources)
    imported = getattr(sys.modules.get(module), "__file__", None)
    if is_own and imported and not Path(os.path.realpath(imported)).is_relative_to(root):
        raise ConfigError(
            f"model._target_={target}: this process has imported {module} from {imported}, not from {root}",
            hint="use one process or kernel for each experiment",
        )
    before = sys.path[:]
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path[:] = before
