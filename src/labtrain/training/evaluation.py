"""Evaluate a complete run: `validate=RUN`, `test=RUN` and `predict=RUN`.

The model gets the run's final weights, and the callbacks and plain attributes of its last checkpoint. Epoch and step
are those of its last validation, or of its test. So the numbers have the bits that the training gave. The receipt does
not change.
"""

import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves

from labtrain.base.console import shown, warn
from labtrain.base.contracts import State, as_options
from labtrain.base.credentials import remember
from labtrain.base.errors import ConfigError, LabtrainError, NotThereYetError, explain_callback, in_words
from labtrain.base.files import atomic, file_sha256
from labtrain.base.permissions import close_umask
from labtrain.base.signals import Wishes
from labtrain.checkpoints.format import load_folder, load_weights_of
from labtrain.data.sharded import Loader
from labtrain.exact.collate import received, to_send
from labtrain.exact.predictions import joined_rows
from labtrain.record import receipt
from labtrain.record.digests import PLACE, digest
from labtrain.record.identity import SHARDED_STRATEGY, Job, shards_in_use
from labtrain.record.own_runs import checkpoints_of
from labtrain.record.ranks import find_ranks
from labtrain.record.receipt import Result
from labtrain.stores.layout import newest_whole, stores_of
from labtrain.training.callbacks.checkpoint import as_floats
from labtrain.training.callbacks.steps import BatchSizes, Progress, Seeding
from labtrain.training.cluster import explain_loss, make_environment
from labtrain.training.devices import choose_accelerator
from labtrain.training.epoch_loop import EpochLoop
from labtrain.training.fit import determined, explain, quiet_lightning
from labtrain.training.guard import Guard, evaluation_loaders, explain_operation
from labtrain.training.lightning import (
    epochs_done,
    eval_loaders,
    ignore_signals,
    mute_loggers,
    predict_loaders,
    put_checkpoint_connector,
)
from labtrain.training.loaders import take_loaders
from labtrain.training.sharded.strategy import Exact
from labtrain.training.speed import check_compiler, hasten
from labtrain.training.state.rebuild import Connector
from labtrain.training.trainer import make_experiment, make_trainer, seeded_alike, wants_progress

FILE = "predictions.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """The result of predict=RUN: a file, and its sha256."""

    file: Path
    digest: str


def evaluate(job: Job) -> Result | Predictions:
    """Evaluate the complete run that a job names, with its final weights.

    Raises:
        LabtrainError: it cannot be evaluated; nothing was written.
    """
    close_umask()
    config = job.config
    remember(config, job.references)
    if config["trainer"]["strategy"] == SHARDED_STRATEGY:
        raise NotThereYetError(f"{job.evaluate}=RUN with trainer.strategy=fsdp", hint="trainer.strategy=auto")
    accelerator, devices = choose_accelerator(config)
    check_compiler(config["speed"], accelerator)
    quiet_lightning()
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    done = receipt.read(Path(job.run_dir))
    if done is None:
        raise ConfigError(f"{shown(job.run_dir)} is not a run", hint="ls runs/*/")
    with determined(config, accelerator), TemporaryDirectory(prefix="labtrain-") as scratch:
        state = final_state(Path(job.run_dir), done, Path(scratch))
        return _Evaluation(job, accelerator, devices, state, steps=done["results"]["steps"]).run()


def final_state(run_dir: Path, done: receipt.Receipt, scratch: Path) -> State:
    """Return the last state of a complete run, with its final weights.

    Raises:
        LabtrainError: its checkpoints are gone, or do not have the weights in its receipt.
    """
    stores, expected = stores_of(run_dir, checkpoints_of(run_dir, done)), done["results"]["weights_digest"]
    last = newest_whole(stores, into=scratch / "last", run_id=done["run_id"])
    if last is None:
        raise ConfigError(f"{shown(run_dir)} has no checkpoint any more", hint="restore it, or train the run again")
    _, folder, manifest = newest_whole(stores, into=scratch / "whole", to_resume=True, run_id=done["run_id"]) or last
    state: State = {}
    if not manifest.get("finished") and manifest["step"] == done["results"]["steps"]:
        state = load_folder(folder)
    # Code may change the weights after the last step: then they are in a checkpoint of their own.
    if not state or manifest["weights_digest"] != expected:
        state["state_dict"] = load_weights_of(last[1])
    if (found := digest(state["state_dict"])) != expected:
        raise LabtrainError(
            f"{shown(last[0].url)} does not have the final weights of {shown(run_dir)}: its digest is {found[:12]}, the"
            f" receipt has {expected[:12]}",
            hint=f"labtrain verify --steps 0 {shown(run_dir)}",
        )
    return state


class _Evaluation:
    """One evaluation in this process."""

    def __init__(self, job: Job, accelerator: str, devices: int | list[int] | str, state: State, *, steps: int) -> None:
        self.job, self.config, self.state, self.steps = job, job.config, state, steps
        self.ranks, self.parts = find_ranks(), _Parts()
        self.experiment = make_experiment(job)
        self.wishes = Wishes()
        # Its own progress bar needs this key, and Lightning would add one.
        own = self.experiment.callbacks
        bar = [Progress(batch_size=job.config["data"]["batch_size"])] if wants_progress(job.config, own) else []
        config = as_options(job.config) | {"trainer": {**job.config["trainer"], "profiler": None}}
        self.trainer = make_trainer(
            config,  # type: ignore[arg-type]
            accelerator,
            devices,
            make_environment(self.ranks, accelerator=accelerator),
            mute_loggers(len(job.config["logger"])),
            [*self._callbacks(), *bar, *own.values()],
            self.wishes,
            root=job.run_dir,
        )
        loop = EpochLoop(self.trainer, save=lambda _: None, every_n_steps=None, wishes=self.wishes)
        self.loop = self.trainer.fit_loop.epoch_loop = loop
        self.connector = Connector(self.trainer, initialise=self._restore)
        put_checkpoint_connector(self.trainer, self.connector)
        ignore_signals(self.trainer)
        self._take_data()

    def _callbacks(self) -> list[pl.Callback]:
        job, determined_by = self.job, self.config["determinism"]
        shards = shards_in_use(self.config)
        self.guard = Guard(
            mode=determined_by["mode"],
            shards=shards,
            threads=determined_by["threads"],
            say=warn,
            code=self.experiment.code,
            there=self.experiment.modules,
            root=Path(job.root),
        )
        return [self.guard, _Ready(self), Seeding(per_rank=shards is None), BatchSizes()]

    def _take_data(self) -> None:
        """Let the data module return exact loaders; of the test, if it has none for predictions."""
        stage, data, set_up = self.job.evaluate, self.experiment.datamodule, self.experiment.datamodule.setup
        step = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[stage]
        loader = {"validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}[stage]
        if stage != "predict" and not is_overridden(step, self.experiment.model):
            raise ConfigError(f"{type(self.experiment.model).__name__} has no {step}", hint=f"add {step} to the model")
        as_test = stage == "predict" and not is_overridden(loader, data)
        if not is_overridden("test_dataloader" if as_test else loader, data):
            raise ConfigError(f"{type(data).__name__} has no {loader}", hint=f"add {loader} to the data module")
        if as_test:
            data.predict_dataloader = data.test_dataloader  # type: ignore[method-assign]
        take_loaders(data, lambda loader: loader)
        data.setup = lambda stage: seeded_alike(lambda: set_up("test" if as_test else stage))  # type: ignore[method-assign]
        make = data.val_dataloader
        data.val_dataloader = lambda: self._in_epoch(make())  # type: ignore[method-assign]

    def _in_epoch(self, made: object) -> object:
        """Return loaders whose samples are those of the run's last epoch, as Lightning asks for in a training."""
        for loader in tree_leaves(made.iterables if isinstance(made, CombinedLoader) else made):
            if isinstance(loader, Loader):
                loader.set_epoch(epochs_done(self.trainer))
        return made

    def _restore(self, trainer: pl.Trainer) -> None:
        """Give the model, the callbacks and the loop the state with which the training evaluated."""
        connector, state = self.connector, self.state
        connector.loaded = state
        connector.restore_model()
        connector.restore_datamodule()
        connector.restore_callbacks()
        connector.loaded = {}
        at: State = state.get(PLACE) or {
            "epoch": 0,
            "global_step": self.steps,
            "exact": True,
            "ranks": [{"metrics": {}}],
        }
        self.loop.stand_at(at, over=self.job.evaluate != "validate")
        self.state = {}

    def run(self) -> Result | Predictions:
        """Evaluate, and return the metrics or the file with the predictions."""
        trainer, model, data = self.trainer, self.experiment.model, self.experiment.datamodule
        try:
            if self.job.evaluate == "predict":
                return self._predict()
            evaluate = trainer.validate if self.job.evaluate == "validate" else trainer.test
            evaluate(model, datamodule=data, verbose=False)
            metrics = as_floats(trainer.callback_metrics)
            return Result(run_dir=Path(self.job.run_dir), metrics=metrics, weights_digest="", steps=self.steps)
        except BaseException as raised:
            error = raised if self.ranks is None else explain_loss(raised, self.wishes)
            if launcher := trainer.strategy.launcher:
                launcher.kill(signal.SIGKILL)  # the other ranks on this node wait for this rank forever
            known = (
                explain_operation(error, model)
                or explain(error, self.config, started=True)
                or explain_callback(error, self.experiment.callbacks)
            )
            if isinstance(raised, TypeError) and self.job.evaluate == "predict":
                known = known or _explain_predict_step(raised, model)
            if (known or error) is raised:
                raise
            raise (known or error) from raised

    def _predict(self) -> Predictions:
        trainer, strategy, parts = self.trainer, self.trainer.strategy, self.parts
        if isinstance(strategy, Exact):
            strategy.on_predicted = parts.add
        elif trainer.world_size > 1:
            raise ConfigError("without determinism.shards, predict=RUN works on one device", hint="trainer.devices=1")
        else:
            parts.add_all_of(strategy)
        trainer.predict(self.experiment.model, datamodule=self.experiment.datamodule, return_predictions=False)
        file = Path(self.job.predictions or Path(self.job.run_dir, FILE))
        if not trainer.is_global_zero:
            return Predictions(file=file, digest="")
        whole = parts.joined()
        with atomic(file) as scratch, scratch.open("wb") as out:  # to a file object: torch saves the name of a path
            torch.save(whole, out)
        return Predictions(file=file, digest=file_sha256(file))


def _explain_predict_step(error: TypeError, model: pl.LightningModule) -> ConfigError | None:
    """Explain an error of Lightning's predict_step, which passes the whole batch to forward."""
    if is_overridden("predict_step", model):
        return None
    return ConfigError(
        f"{type(model).__name__} has no predict_step, and its forward does not take a whole batch: {in_words(error)}",
        hint="in the model: def predict_step(self, batch, batch_idx): return self(batch[0])",
    )


class _Ready(pl.Callback):
    """Checks the loaders, and applies `speed`, when all parts of the model exist."""

    def __init__(self, evaluation: _Evaluation) -> None:
        self.evaluation = evaluation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluation.parts.gather()  # while the ranks can still talk

    def _begin(self, module: pl.LightningModule) -> None:
        config, trainer, stage = self.evaluation.config, self.evaluation.trainer, self.evaluation.job.evaluate
        loaders = predict_loaders(trainer) if stage == "predict" else eval_loaders(trainer)
        for what, hint in evaluation_loaders(stage, loaders):
            self.evaluation.guard.judge(what, hint)
        hasten(module, config["speed"], mode=config["determinism"]["mode"], say=warn)


# ---------------------------------------------------------------------------------------------------------- predictions

Part = tuple[int, int, int, int | None, object]  # loader, batch, shard, samples, what predict_step returned


class _Parts:
    """What predict_step has returned for each shard of this rank; after `gather` on rank 0, of all ranks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, which: int, batch: int, shard: int, samples: int | None, output: object) -> None:
        self.parts.append((which, batch, shard, samples, received(to_send(output), torch.device("cpu"))))

    def add_all_of(self, strategy: pl.strategies.Strategy) -> None:
        """Add what a strategy's predict_step returns for each batch."""
        step = strategy.predict_step

        def predict_step(*args: object) -> object:
            output = step(*args)
            self.add(args[2] if len(args) > 2 else 0, len(self.parts), 0, None, output)  # type: ignore[arg-type]
            return output

        strategy.predict_step = predict_step  # type: ignore[method-assign]

    def gather(self) -> None:
        """Give rank 0 the parts of all ranks; every rank calls it."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            ranks: list[list[Part]] = [[] for _ in range(dist.get_world_size())]
            dist.gather_object(self.parts, ranks if dist.get_rank() == 0 else None)
            self.parts = [part for of_rank in ranks for part in of_rank]

    def joined(self) -> object:
        """Return what predict_step returned for all samples of a loader, in its order; of several loaders a list.

        Raises:
            ConfigError: the outputs cannot be joined.
        """
        parts = sorted(self.parts, key=lambda part: part[:3])
        loaders = [
            joined_rows([(samples, output) for which, _, _, samples, output in parts if which == number])
            for number in sorted({part[0] for part in parts})
        ]
        if not loaders:
            raise ConfigError("predict_dataloader has no batch", hint="correct predict_dataloader")
        return loaders[0] if len(loaders) == 1 else loaders
