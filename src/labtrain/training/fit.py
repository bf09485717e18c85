"""Train one run, from a resolved configuration to a receipt: `train`, read from top to bottom.

Whatever can be refused is refused before the run's folder is made.
"""

import copy
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden

from labtrain.base.console import shown
from labtrain.base.credentials import remember, without_secrets
from labtrain.base.errors import (
    ConfigError,
    DeviceError,
    LabtrainError,
    NotThereYetError,
    explain_callback,
    in_words,
    where,
)
from labtrain.base.permissions import close_umask, open_lock
from labtrain.base.signals import Stopped, Wishes
from labtrain.checkpoints.format import check_loads
from labtrain.environment.doctor.environment import REPAIR, unlike_lock
from labtrain.environment.doctor.report import few
from labtrain.exact import determinism
from labtrain.record import receipt
from labtrain.record.digests import digest
from labtrain.record.fingerprints import noting_opened, places_in
from labtrain.record.identity import EXACT_STRATEGIES, ORDERED, SHARDED_STRATEGY, Config, Job, route, shards_in_use
from labtrain.record.ranks import adopt, find_ranks, restarted
from labtrain.record.resume import changed_data, checkpoint_digest, make_job
from labtrain.record.sources import Code, load_from_source, note_executed, read_code, texts_in
from labtrain.record.trail import BEST_UNSURE, HISTORY, TRAIL, is_as_recorded, missing_steps
from labtrain.stores.backends import is_local
from labtrain.stores.layout import checkpoint_place, newest_whole, stores_of
from labtrain.stores.store import Manifest
from labtrain.training.callbacks.agreement import Agreement
from labtrain.training.callbacks.checkpoint import Checkpoints, FolderIO, as_floats
from labtrain.training.callbacks.gpu_stats import GpuStats
from labtrain.training.callbacks.history import History, best_of
from labtrain.training.callbacks.recorder import Recorder, nothing_to_train
from labtrain.training.callbacks.steps import BatchSizes, Progress, Seeding, Trail, warn
from labtrain.training.cluster import explain_loss, make_environment
from labtrain.training.devices import choose_accelerator, make_strategy, plain_because
from labtrain.training.epoch_loop import EpochLoop
from labtrain.training.guard import Guard, explain_operation
from labtrain.training.lightning import ignore_signals, put_checkpoint_connector
from labtrain.training.loggers import log_config, make_loggers
from labtrain.training.sharded.objective import Objective
from labtrain.training.speed import Speed, check_compiler, explain_compile
from labtrain.training.state.rebuild import Connector, explain_step

PATIENCE_S = 5  # in which one start waits for another in silence


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a training leaves.

    Attributes:
        run_dir: the run's folder.
        metrics: the last value of each metric, by name.
        weights_digest: 64 hex digits.
        steps: optimizer steps since the run's beginning.
    """

    run_dir: Path
    metrics: dict[str, float]
    weights_digest: str
    steps: int


def train(cfg: Any) -> Result:
    """Train the run that a configuration describes and return its result; of a complete run, the result it has.

    Args:
        cfg: a configuration as Hydra composes it (a DictConfig or a dict), or the Job that stage 1 made of it.

    Raises:
        LabtrainError: it cannot be trained; nothing was written.
        Stopped: a signal came; the state is saved, and the receipt says so.
    """
    close_umask()
    job = cfg if isinstance(cfg, Job) else _job(cfg)
    config, run_dir = job.config, Path(job.run_dir)
    remember(config, job.references)
    done = receipt.read(run_dir)
    if done is not None and done["status"] == "complete" and not job.origin:
        results = done["results"]
        if changed := changed_data(job, done):
            warn(changed)
        return Result(
            run_dir=run_dir,
            metrics=results["metrics"],
            weights_digest=results["weights_digest"],
            steps=results["steps"],
        )

    accelerator, devices = choose_accelerator(config)
    check_compiler(config["speed"], accelerator)
    _quiet_lightning()
    with determinism.run(
        seed=config["seed"],
        mode=config["determinism"]["mode"],
        accelerator=accelerator,
        threads=config["determinism"]["threads"],
        tf32=config["speed"]["tf32"] and accelerator == "gpu",
    ):
        return _train(job, accelerator, devices, done)


def _train(job: Job, accelerator: str, devices: int | list[int] | str, before: receipt.Receipt | None) -> Result:
    config, run_dir, seed = job.config, Path(job.run_dir), job.config["seed"]
    code, there = named_code(job), set(sys.modules)
    ranks = find_ranks()
    environment = make_environment(ranks, accelerator=accelerator)
    places = set(places_in([config["model"], config["data"]]))
    with noting_opened(places):
        determinism.seed_all(seed, "init")
        datamodule = instantiate(config["data"], "data", pl.LightningDataModule)
        determinism.seed_all(seed, "init")  # again: what the data drew must not move the weights
        model = instantiate(config["model"], "model", pl.LightningModule)
    for hook in ("prepare_data", "setup"):
        setattr(datamodule, hook, noting_opened(places)(getattr(datamodule, hook)))
    own = {
        name: instantiate(options, f"callbacks.{name}", pl.Callback)
        for name, options in config["callbacks"].items()
        if options
    }

    place = checkpoint_place(run_dir, config["checkpoint"]["url"])
    job.hold(place)
    fetched = run_dir.with_name(f".{run_dir.name}.fetched")
    # A start anew of one that had gone on from another run has gone on from there already.
    goes_on = not job.origin or job.origin_digest or restarted()
    looked = {checkpoint.name for store in stores_of(run_dir, place) for checkpoint in store.checkpoints()}
    found, origin = find_checkpoint(run_dir, place, fetched, run_id=job.run_id) if goes_on else None, None
    if found is None and job.origin:
        found = find_checkpoint(run_dir, job.origin, fetched, run_id=None if job.origin_digest else job.run_id)
        origin = origin_of(job, found)
    if job.origin and found is None:
        raise ConfigError(f"resume={config['resume']}: that run has no checkpoint yet", hint="resume=never")
    name, path, manifest = found or (None, None, None)
    wishes = Wishes(every_seconds=config["checkpoint"]["every_seconds"])
    loggers = make_loggers(job, resumed=manifest.get("logs") if manifest and not origin else None)
    checkpoints = Checkpoints(
        run_dir,
        place,
        run_id=job.run_id,
        options=config["checkpoint"],
        say=lambda text: recorder.say(text),
        resumed=(name, manifest) if name and manifest else None,
    )
    checkpoints.saver.known = looked
    wishes.can_save = lambda: not checkpoints.saver.busy
    recorder = Recorder(
        job,
        checkpoints=checkpoints.saver.listed,
        resumed_step=manifest["step"] if manifest else 0,
        places=places,
        origin=origin,
    )
    determinism.set_say(recorder.say)
    guard = Guard(
        mode=config["determinism"]["mode"],
        shards=shards_in_use(config),
        threads=config["determinism"]["threads"],
        say=recorder.say,
        code=code,
        there=there,
        root=Path(job.root),
    )
    callbacks = make_callbacks(job, checkpoints, recorder, guard, own)
    trainer = make_trainer(config, accelerator, devices, environment, loggers, callbacks, wishes, root=job.run_dir)
    loop = trainer.fit_loop.epoch_loop = EpochLoop(
        trainer,
        save=lambda required: checkpoints.save(trainer, required=required),
        every_n_steps=config["checkpoint"]["every_n_steps"],
        wishes=wishes,
        stop_at=job.stop_at,
    )
    put_checkpoint_connector(trainer, Connector(trainer, path))
    ignore_signals(trainer)
    make_loader, set_up = datamodule.train_dataloader, datamodule.setup
    datamodule.train_dataloader = lambda: loop.placed(make_loader())
    datamodule.setup = lambda stage: seeded_alike(lambda: set_up(stage))
    keep_fetched = False
    listening = ExitStack()  # until the receipt is closed: a launcher that dies sends SIGTERM several times
    try:
        listening.enter_context(wishes.listening(leads=trainer.is_global_zero))
        if trainer.is_global_zero:
            recorder.open()
            refuse_outdated(before, run_dir)
            checkpoints.saver.open()
            if name is not None:
                warn_resumed(run_dir, name, origin)
            if name is not None and manifest is not None and origin is None:
                checkpoints.saver.missing = recorder.missing = hold_records(
                    run_dir, name, manifest, before or config, say=recorder.say
                )
            if config["determinism"]["mode"] != "off" and (unlike := unlike_lock(Path(job.root))):
                recorder.say(f"this environment is not that of the experiment's lock: {few(unlike)}. {REPAIR[route()]}")
        if shards_in_use(config) is None:
            recorder.say(plain_because(config))
            if config["trainer"]["strategy"] not in (*EXACT_STRATEGIES, SHARDED_STRATEGY) and path is not None:
                raise NotThereYetError(f"going on under trainer.strategy={config['trainer']['strategy']}")
        log_config(loggers, job.recorded())
        trainer.fit(model, datamodule=datamodule, ckpt_path=path, weights_only=True)
        metrics = as_floats(trainer.callback_metrics)
        weights, steps = digest(model), trainer.global_step
        if origin is not None and steps == origin["step"]:
            raise nothing_to_train(config, steps)
        state = checkpoints.finish(trainer, weights, resumed=path)
        if is_overridden("test_dataloader", datamodule) and is_overridden("test_step", model):
            trainer.test(model, datamodule=datamodule, verbose=False)
            metrics |= as_floats(trainer.callback_metrics)
        result = Result(run_dir=run_dir, metrics=metrics, weights_digest=weights, steps=steps)
        if trainer.is_global_zero:
            checkpoints.saver.close(seconds=config["checkpoint"]["deliver_seconds"], wanted=True)
            recorder.close("complete", step=steps, results=results_of(result, state, config))
        return result
    except BaseException as raised:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends a delivery; the receipt is closed
        error = raised if ranks is None else explain_loss(raised, wishes)
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        if not stopped:
            listening.close()  # or a launcher that ends all ranks, since one has failed, would have to kill this one
        if isinstance(error, Stopped) and not error.saved:
            keep_fetched = True  # other ranks may be reading it, and what the saver would deliver
        if trainer.is_global_zero:
            try:
                if isinstance(error, Stopped) and error.saved:
                    soon = "SLURM_JOB_ID" in os.environ  # its signals leave little time, and the next start delivers
                    checkpoints.saver.close(
                        seconds=0 if soon else config["checkpoint"]["deliver_seconds"], wanted=False
                    )
                else:
                    checkpoints.saver.abandon()
            finally:
                why = str(error) if isinstance(error, Stopped) else type(error).__qualname__
                recorder.close("interrupted" if stopped else "failed", step=trainer.global_step, why=why)
        if not stopped and (launcher := trainer.strategy.launcher):
            launcher.kill(signal.SIGKILL)  # the other ranks of this node wait for this one
        known = explain_operation(error, model) or explain(error, config, started=recorder.receipt is not None)
        known = known or explain_callback(error, own)
        if known is None and manifest is not None and trainer.global_step == manifest["step"]:  # it has made no step
            known = explain_step(error)
        if known is not None:
            raise known from raised
        if error is not raised:
            raise error from raised
        raise
    finally:
        if recorder.lock is not None and not keep_fetched:  # else another start trains this run, and may be reading it
            shutil.rmtree(fetched, ignore_errors=True)
        recorder.release()
        listening.close()


def named_code(job: Job) -> Code | None:
    """Return the code that the run is named by, and load it from source from now on; None in mode off.

    Raises:
        ConfigError: the code was changed since the run was named.
    """
    if job.config["determinism"]["mode"] == "off":
        return None
    load_from_source()
    note_executed()
    code = read_code(Path(job.root), job.config)
    if job.code_digest not in ("", code.digest):
        raise ConfigError("the code was changed while the training started", hint="start it again")
    return code


def find_checkpoint(run_dir: Path, place: str, into: Path, *, run_id: str | None) -> tuple[str, Path, Manifest] | None:
    """Return the name, the folder and the manifest of the newest whole checkpoint that a run goes on from.

    One of a remote store is copied into a folder of this machine, once for all ranks that share it.

    Args:
        run_dir: its folder.
        place: where its checkpoints lie, or those of another run that it goes on from.
        into: a folder for such copies.
        run_id: of the run whose checkpoints lie there; None where they are another run's.

    Raises:
        LabtrainError: the newest is of another run, or one is a link.
        StoreError: the store cannot be asked: whether there is a checkpoint is not known.
    """
    stores = stores_of(run_dir, place)
    if is_local(place):
        found = newest_whole(stores, into=into, to_resume=True, run_id=run_id, look=check_loads)
    elif not any(store.checkpoints() for store in stores):
        found = None
    else:
        into.mkdir(parents=True, exist_ok=True)
        with alone_in(into):
            found = newest_whole(stores, into=into, to_resume=True, run_id=run_id, look=check_loads)
    return (found[0].name, *found[1:]) if found else None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into a folder; where that takes long, say for whom."""
    with os.fdopen(open_lock(folder / ".lock"), "r+") as file:
        begun, patience = time.monotonic(), PATIENCE_S
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() - begun > patience:
                    patience += 60
                    file.seek(0)
                    warn(f"waiting for {file.read().strip() or 'another process'}, which fetches into {shown(folder)}")
                time.sleep(0.1)
        file.seek(0)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def refuse_outdated(before: receipt.Receipt | None, run_dir: Path) -> None:
    """Refuse to go on where another process has trained the run since this one looked at it.

    Raises:
        LabtrainError: what this start has found may be old.
    """
    if (receipt.read(run_dir) or {}).get("digest") != (before or {}).get("digest"):
        raise LabtrainError(
            f"{shown(run_dir)}: another process trained it while this one started", hint="the same command goes on"
        )


def seeded_alike(set_up: Callable[[], None]) -> None:
    """Run a datamodule's setup: each of them draws the same, for "fit", for "test", and on each rank.

    So a split at random gives the same parts to the training and to the test. What it drew moves nothing after it.
    """
    determinism.seed_place("setup")
    set_up()
    determinism.seed_place("setup")


def instantiate(options: Config, key: str, kind: type[Any]) -> Any:
    """Make the object that a part of the configuration describes with `_target_`, Hydra's way.

    Args:
        options: that part.
        key: its key.
        kind: of what it must be.

    Raises:
        ConfigError: the target cannot be found, does not take these arguments, or is of another kind.
    """
    target = options["_target_"]
    try:
        made = hydra_instantiate(options, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        # What a callback refuses are its arguments; a model or a datamodule may do anything when it is made.
        if cause is None or isinstance(cause, TypeError | ImportError) or kind is pl.Callback:
            text = " ".join(str(error).split()) if cause is None else in_words(cause) + where(cause.__traceback__)
            raise ConfigError(
                f"{key}._target_={target}: {text}", hint=f"correct {key} in conf/, or the class it names"
            ) from error
        raise cause from None
    if not isinstance(made, kind):
        raise ConfigError(
            f"{key}._target_={target} makes a {type(made).__name__}, a {kind.__name__} is wanted",
            hint=f"derive it from lightning.pytorch.{kind.__name__}",
        )
    return made


def make_callbacks(
    job: Job, checkpoints: Checkpoints, recorder: Recorder, guard: Guard, own: dict[str, pl.Callback]
) -> list[pl.Callback]:
    """Return labtrain's callbacks and the person's, in the order in which they act.

    A progress bar of the person's takes the place of labtrain's.

    Raises:
        ConfigError: there is one, and the configuration says that there is none.
    """
    config, shards = job.config, shards_in_use(job.config)
    mode = config["determinism"]["mode"]
    callbacks: list[pl.Callback] = [checkpoints, guard]  # first: counters are put in place before others look at them
    callbacks += [Speed(config["speed"], mode=mode, say=recorder.say), Agreement(mode=mode, say=recorder.say)]
    if shards is not None and shards > 1 and mode != "off":
        callbacks.append(
            Objective(
                shards=shards,
                strict=mode in determinism.STRICT_MODES,
                judge=guard.judge,
                say=recorder.say,
                note=recorder.note,
            )
        )
    callbacks += [Seeding(per_rank=shards is None), BatchSizes(), recorder]
    if config["trail"]["every_n_steps"]:
        callbacks.append(
            Trail(
                Path(job.run_dir) / TRAIL,
                every_n_steps=config["trail"]["every_n_steps"],
                resumed_step=recorder.resumed_step,
                say=recorder.say,
            )
        )
    callbacks.append(History(Path(job.run_dir), batch_size=config["data"]["batch_size"]))
    if config["gpu_stats"]:
        callbacks.append(GpuStats())
    bars = [name for name, callback in own.items() if isinstance(callback, ProgressBar)]
    if bars and config["trainer"]["enable_progress_bar"] is False:
        raise ConfigError(
            f"callbacks.{bars[0]} is a progress bar, and trainer.enable_progress_bar is false",
            hint=f"callbacks.{bars[0]}=null, or trainer.enable_progress_bar=true",
        )
    if len(bars) > 1:
        both = " and ".join(f"callbacks.{name}" for name in bars)
        raise ConfigError(f"{both} are progress bars: a training has one", hint=f"callbacks.{bars[1]}=null")
    if config["trainer"]["enable_progress_bar"] and not bars:
        callbacks.append(Progress(batch_size=config["data"]["batch_size"], status=checkpoints.saver.status))
    return [*callbacks, *own.values()]


def make_trainer(
    config: Config,
    accelerator: str,
    devices: int | list[int] | str,
    environment: ClusterEnvironment,
    loggers: list[Any],
    callbacks: list[pl.Callback],
    wishes: Wishes,
    *,
    root: str,
) -> pl.Trainer:
    """Return Lightning's Trainer with the keys of `trainer`; those that are null take its defaults.

    `check_val_every_n_epoch` is the exception: its default is 1, and null means "count batches across epochs".
    """
    options = {key: value for key, value in config["trainer"].items() if value is not None}
    options["check_val_every_n_epoch"] = config["trainer"]["check_val_every_n_epoch"]
    options |= {"accelerator": accelerator, "devices": devices}
    if (strategy := make_strategy(config, accelerator, devices, wishes)) is not None:
        options["strategy"] = strategy
    try:
        return pl.Trainer(
            **options,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[FolderIO(), environment],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            default_root_dir=root,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(
            f"Lightning's Trainer: {' '.join(str(error).split())}",
            hint="python train.py --help shows the keys of trainer",
        ) from error


def explain(error: BaseException, config: Config, *, started: bool) -> LabtrainError | None:
    """Turn an exception of the training into an error for people; None where its traceback says more."""
    if isinstance(error, torch.OutOfMemoryError):
        numbers = " ".join(str(error).split(" See documentation")[0].split())
        half = max(1, config["data"]["batch_size"] // 2)
        smaller = f"data.batch_size={half}"
        more = 2 * (shards_in_use(config) or 1)
        knobs = f"determinism.shards={more}; trainer.precision=bf16-mixed; {smaller} trainer.accumulate_grad_batches=2"
        return DeviceError(
            f"out of GPU memory at data.batch_size={config['data']['batch_size']}: {numbers}",
            hint=f"one of these: {knobs}",
        )
    if (known := explain_compile(error)) is not None:
        return known
    batches = config["trainer"]["overfit_batches"]
    if batches and isinstance(error, ValueError) and "needs to subclass `torch.utils.data.DataLoader`" in str(error):
        return ConfigError(
            f"trainer.overfit_batches={batches}: Lightning would put a sampler of its own into labtrain.DataLoader",
            hint=f"trainer.limit_train_batches={batches} trainer.limit_val_batches={batches}, and shuffle=False in"
            " train_dataloader",
        )
    if isinstance(error, FileNotFoundError | PermissionError) and not started:
        return ConfigError(
            f"{error.strerror}: {error.filename}",
            hint="python train.py --cfg job shows the paths that data and model were given",
        )
    return None


def origin_of(job: Job, found: tuple[str, Path, Manifest] | None) -> dict[str, Any] | None:
    """Return what the receipt says of the checkpoint that a run begins from; None if the run begun goes on itself.

    Raises:
        ConfigError: it is not the one that the run is named after.
    """
    if not job.origin_digest or found is None:
        return None
    name, _, manifest = found
    if (digest := checkpoint_digest(manifest)) != job.origin_digest:
        raise ConfigError(
            f"resume={job.config['resume']}: its newest checkpoint cannot be read, and the run would begin from"
            f" {name}, an older one",
            hint=f"labtrain store check {job.origin}; rm -r the damaged one, and the same command begins from {name}",
        )
    return {
        "run_id": manifest["run_id"],
        "checkpoint": name,
        "step": manifest["step"],
        "digest": digest,
        "url": without_secrets(job.origin),
    }


def hold_records(
    run_dir: Path, name: str, manifest: Manifest, before: Mapping[str, Any], *, say: Callable[[str], None]
) -> list[list[int]]:
    """Say where trail and history are not what they were when a checkpoint was saved; return the steps that are lost.

    Args:
        run_dir: the run's folder.
        name: of the checkpoint.
        manifest: of the checkpoint.
        before: the receipt, which says how often a line of the trail was written; where it is gone, the configuration.
        say: called with each sentence.
    """
    begun = (before.get("segments") or [{}])[0].get("origin") or {}
    missing = missing_steps(
        run_dir, manifest, every_n_steps=before["trail"]["every_n_steps"], from_step=begun.get("step", 0)
    )
    if missing:
        steps = ", ".join(f"{first} to {last}" if first < last else f"{first}" for first, last in missing)
        say(
            f"{TRAIL} is not what it was when {name} was saved: the lines of these steps are missing, or were changed:"
            f" {steps}"
        )
    if (said := manifest.get("history")) and not is_as_recorded(run_dir / HISTORY, said):
        say(f"{HISTORY} is not what it was when {name} was saved: {BEST_UNSURE}")
    return missing


def warn_resumed(run_dir: Path, name: str, origin: dict[str, Any] | None) -> None:
    """Say that a run goes on, or begins from another, and from where."""
    if origin is not None:
        warn(f"{shown(run_dir)} is a new run: it begins from {name} of {origin['run_id']}, which stays as it is")
        return
    warn(f"{shown(run_dir)} goes on from {name} (resume=never starts anew beside it)")


def results_of(result: Result, state_digest: str | None, config: Config) -> dict[str, Any]:
    """Return what a receipt holds of a result, with the digest of the training state that was saved last."""
    monitor, mode = config["checkpoint"]["monitor"], config["checkpoint"]["mode"]
    return {
        "metrics": result.metrics,
        "best": best_of(result.run_dir, monitor=monitor, mode=mode),
        "steps": result.steps,
        "weights_digest": result.weights_digest,
        "state_digest": state_digest,
    }


def _job(cfg: Any) -> Job:
    from omegaconf import DictConfig, OmegaConf

    import __main__
    from labtrain.record import config as configuration

    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    if not isinstance(plain, Mapping):
        raise ConfigError(f"labtrain.train({cfg!r}): must be a configuration, a mapping", hint=configuration.COMPOSE)
    plain = copy.deepcopy(dict(plain))
    config = configuration.completed(cast(Config, plain))
    configuration.check_whole(config)
    adopt(config, find_ranks())
    configuration.check(config)
    file = Path(getattr(__main__, "__file__", "notebook.py"))
    if not file.exists() and config["determinism"]["mode"] != "off":
        _refuse_classes_of_no_file(config)
    root = file.resolve().parent
    references = configuration.references(cfg, config) if isinstance(cfg, DictConfig) else ()
    return make_job(config, root=root, command=[], references=references)


def _refuse_classes_of_no_file(config: Config) -> None:
    """Raise ConfigError for a class of a notebook's cell: a run cannot be named by code that is in no file."""
    for text in texts_in([config[group] for group in ORDERED]):
        if text.startswith("__main__."):
            name = text.removeprefix("__main__.")
            raise ConfigError(
                f"{text} is defined in the notebook, so no file holds its code, and no run can be named by it",
                hint=f"%%writefile own.py in the first line of its cell, and _target_: own.{name}",
            )


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # aiohttp's, when a store goes away: said by the delivery
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # ranks.adopt says it where it matters
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", module="torch.distributed.checkpoint")
