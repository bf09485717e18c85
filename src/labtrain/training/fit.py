"""Train one run, from a resolved configuration to a receipt: `train`, read from top to bottom.

labtrain refuses what it can before it makes the run's folder.
"""

import logging
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from labtrain.base.console import few, one_line, shown, warn
from labtrain.base.contracts import Results, as_options
from labtrain.base.credentials import remember
from labtrain.base.errors import (
    EXIT_LOST,
    EXIT_USAGE,
    ConfigError,
    DeviceError,
    LabtrainError,
    LostError,
    NotThereYetError,
    explain_callback,
    explain_disk,
    in_words,
)
from labtrain.base.output import write_output_to
from labtrain.base.permissions import close_umask
from labtrain.base.signals import Stopped, Wishes, in_main_thread
from labtrain.checkpoints.initial import load_initial
from labtrain.environment.doctor.environment import REPAIR, unlike_lock
from labtrain.exact import determinism
from labtrain.exact.draws import take_draws
from labtrain.record import receipt
from labtrain.record.digests import digest
from labtrain.record.identity import EXACT_STRATEGIES, SHARDED_STRATEGY, Config, Job, route, shards_in_use
from labtrain.record.ranks import find_ranks
from labtrain.record.receipt import Receipt, Result, result_of
from labtrain.record.resume import changed_data
from labtrain.training.callbacks.checkpoint import Checkpoints, as_floats
from labtrain.training.callbacks.heart import Heart
from labtrain.training.callbacks.history import best_of
from labtrain.training.callbacks.kept import OUTLIVES_S
from labtrain.training.callbacks.recorder import Recorder, nothing_to_train
from labtrain.training.callbacks.watcher import hint
from labtrain.training.cluster import ended_rank, explain_loss, is_loss, lost_rank, make_environment, observe
from labtrain.training.devices import choose_accelerator, plain_because
from labtrain.training.epoch_loop import EpochLoop
from labtrain.training.guard import Guard, explain_operation
from labtrain.training.lightning import ignore_signals, observe_ranks, put_checkpoint_connector
from labtrain.training.loaders import take_loaders
from labtrain.training.loggers import log_config, log_receipt, make_loggers
from labtrain.training.speed import check_compiler, explain_compile, own_compiles
from labtrain.training.start import find_start, hold_records, refuse_outdated, warn_resumed
from labtrain.training.state.initial import put_initial
from labtrain.training.state.rebuild import Connector, explain_step
from labtrain.training.trainer import make_callbacks, make_experiment, make_trainer, seeded_alike

ENDS_S = 5.0  # how long a rank that failed may take to end
NO_STEPS = (
    "no optimizer step was counted, so the trail is empty and a resume starts again: training_step has to call step()"
    " of what self.optimizers() returns, not a method of the optimizer's own"
)


def train(job: Job) -> Result:
    """Train a job in this process and return its result; return a complete run's result at once.

    Raises:
        LabtrainError: it cannot be trained; nothing was written.
        Stopped: a signal came; the state is saved, and the receipt records the stop.
    """
    close_umask()
    config, run_dir = job.config, Path(job.run_dir)
    remember(config, job.references)
    done = receipt.read(run_dir)
    if done is not None and done["status"] == "complete" and not job.origin:
        if changed := changed_data(job, done):
            warn(changed)
        return result_of(run_dir, done["results"])

    accelerator, devices = choose_accelerator(config)
    check_compiler(config["speed"], accelerator)
    quiet_lightning()
    with determined(config, accelerator):
        session = _make_session(job, accelerator, devices, done)
        try:
            session.open()
            return session.fit()
        except BaseException as raised:
            error = session.fail(raised)
            if error is raised:
                raise
            raise error from raised
        finally:
            session.close()


@contextmanager
def determined(config: Config, accelerator: str) -> Iterator[None]:
    """Set torch's flags, its compiler and the seed for a training or an evaluation."""
    mode = config["determinism"]["mode"]
    flags = determinism.run(
        seed=config["seed"],
        mode=mode,
        accelerator=accelerator,
        threads=config["determinism"]["threads"],
        tf32=config["speed"]["tf32"] and accelerator == "gpu",
    )
    with ExitStack() as stack:
        stack.enter_context(flags)
        stack.enter_context(own_compiles(mode))
        if mode != "off":
            stack.callback(take_draws(determinism.run_say))
        yield


def _make_session(job: Job, accelerator: str, devices: int | list[int] | str, before: Receipt | None) -> "_Session":
    try:
        return _Session(job, accelerator, devices, before)
    except Exception as error:
        known = None if isinstance(error, LabtrainError) else explain(error, job.config, started=False)
        if known is None:
            raise
        raise known from error


class _Session:
    """One training in this process: the constructor makes all objects, and nothing is written before `open`."""

    def __init__(self, job: Job, accelerator: str, devices: int | list[int] | str, before: Receipt | None) -> None:
        self.job, self.config, self.before = job, job.config, before
        self.run_dir = Path(job.run_dir)
        self.ranks = find_ranks()
        environment = make_environment(self.ranks, accelerator=accelerator)
        self.experiment = make_experiment(job)
        self.start = find_start(job)
        self.wishes = Wishes(every_seconds=self.config["checkpoint"]["every_seconds"])
        resumed = self.start.resumed
        self.loggers = make_loggers(job, resumed=resumed.manifest.get("logs") if resumed else None)
        self.checkpoints = self._make_checkpoints()
        self.saver = self.checkpoints.saver
        self.recorder = Recorder(
            job,
            checkpoints=self.saver.listed,
            resumed_step=self.start.step,
            places=self.experiment.places,
            origin=self.start.origin,
        )
        determinism.set_say(self.recorder.say)
        callbacks = make_callbacks(job, self.checkpoints, self.recorder, self._make_guard(), self.experiment.callbacks)
        self.trainer = make_trainer(
            self.config, accelerator, devices, environment, self.loggers, callbacks, self.wishes, root=job.run_dir
        )
        self._replace_loop()
        self.keep_fetched = False
        self.ended: tuple[int, int] | None = None  # a rank that failed, and its exit code
        self.listening = ExitStack()  # catch signals until the receipt is closed: a dying launcher repeats SIGTERM

    def _make_checkpoints(self) -> Checkpoints:
        found = self.start.found
        seconds = self.config["failures"]["hang_seconds"]
        checkpoints = Checkpoints(
            self.run_dir,
            self.start.place,
            run_id=self.job.run_id,
            options=self.config["checkpoint"],
            say=lambda text: self.recorder.say(text),
            heart=Heart(seconds=seconds, run_dir=shown(self.run_dir), ranks=self.ranks),
            keeps=self.config["failures"]["max_restarts"] > 0,
            resumed=(found.name, found.manifest) if found else None,
        )
        checkpoints.saver.known = self.start.known
        self.wishes.can_save = lambda: not checkpoints.saver.busy
        return checkpoints

    def _make_guard(self) -> Guard:
        return Guard(
            mode=self.config["determinism"]["mode"],
            shards=shards_in_use(self.config),
            threads=self.config["determinism"]["threads"],
            say=self.recorder.say,
            code=self.experiment.code,
            there=self.experiment.modules,
            root=Path(self.job.root),
        )

    def _replace_loop(self) -> None:
        """Put labtrain's epoch loop and checkpoint connector into the trainer, and set the loaders' positions."""
        trainer, datamodule = self.trainer, self.experiment.datamodule
        loop = trainer.fit_loop.epoch_loop = EpochLoop(
            trainer,
            save=lambda required: self.checkpoints.save(trainer, required=required),
            keep=lambda: self.checkpoints.keep(trainer),
            every_n_steps=self.config["checkpoint"]["every_n_steps"],
            wishes=self.wishes,
            stop_at=self.job.stop_at,
        )
        put_checkpoint_connector(trainer, Connector(trainer, self.start.path, self._initialise))
        ignore_signals(trainer)
        observe_ranks(self._observe)
        take_loaders(datamodule, loop.placed, same_batches=bool(self.config["trainer"]["overfit_batches"]))
        set_up = datamodule.setup
        datamodule.setup = lambda stage: seeded_alike(lambda: set_up(stage))  # type: ignore[method-assign]

    def _observe(self, started: list[subprocess.Popen[bytes]]) -> None:
        def patience_s() -> float:
            return ENDS_S if self.checkpoints.kept.held is None else OUTLIVES_S

        watch = partial(observe, started, patience_s=patience_s, tell=self._tell_ended)
        Thread(target=watch, daemon=True).start()

    def _tell_ended(self, rank: int, code: int) -> None:
        """Tell the starting process that a rank failed, unless it has printed an error for people."""
        if code != EXIT_USAGE:
            lost = lost_rank(rank, code)
            self.checkpoints.beacon.fail(str(lost.args[0]), code if code > 0 else 128 - code)

    def _initialise(self, trainer: Trainer) -> None:
        """Start with the weights of `init_from`, unless the training resumes from a checkpoint."""
        first = self.config["init_from"]
        if first["path"] is not None and self.start.found is None:
            weights = load_initial(first, Path(self.job.root))
            put_initial(trainer, weights, first, say=self.recorder.say)

    def open(self) -> None:
        """Open receipt, store and loggers; refuse a run that they rule out."""
        config, start = self.config, self.start
        self.listening.enter_context(self.wishes.listening(leads=self.trainer.is_global_zero))
        if self.trainer.is_global_zero:
            self.recorder.open()
            refuse_outdated(self.before, self.run_dir)
            self.saver.open()
            self._say_start()
        write_output_to(self.run_dir)
        if shards_in_use(config) is None:
            self.recorder.say(plain_because(config))
            if config["trainer"]["strategy"] not in (*EXACT_STRATEGIES, SHARDED_STRATEGY) and start.found is not None:
                raise NotThereYetError(
                    f"resuming under trainer.strategy={config['trainer']['strategy']}", hint="resume=never starts again"
                )
        log_config(self.loggers, as_options(self.job.recorded()), run_id=self.run_dir.name)

    def _say_start(self) -> None:
        found, say = self.start.found, self.recorder.say
        if found is not None:
            warn_resumed(self.run_dir, found.name, self.start.origin)
        if self.start.resumed is not None:
            self.saver.missing = self.recorder.missing = hold_records(
                self.run_dir, self.start.resumed, self.before or self.config, say=say
            )
        if self.config["determinism"]["mode"] != "off" and (unlike := unlike_lock(Path(self.job.root))):
            say(f"this environment differs from the experiment's lock: {few(unlike)}. {REPAIR[route()]}")

    def fit(self) -> Result:
        """Train to the end, test, and close the receipt."""
        trainer, model, datamodule = self.trainer, self.experiment.model, self.experiment.datamodule
        trainer.fit(model, datamodule=datamodule, ckpt_path=self.start.path, weights_only=True)
        metrics = as_floats(trainer.callback_metrics)
        weights, steps = digest(model), trainer.global_step
        if self.start.origin is not None and steps == self.start.origin["step"]:
            raise nothing_to_train(self.config, steps)
        if not steps and trainer.fit_loop.epoch_loop.total_batch_idx >= 0:
            self.recorder.say(NO_STEPS)
        with self.checkpoints.heart.saving():
            state = self.checkpoints.finish(trainer, weights, resumed=self.start.path)
        if is_overridden("test_dataloader", datamodule) and is_overridden("test_step", model):
            trainer.test(model, datamodule=datamodule, verbose=False)
            metrics |= as_floats(trainer.callback_metrics)
        self.checkpoints.heart.close()
        result = Result(run_dir=self.run_dir, metrics=metrics, weights_digest=weights, steps=steps)
        if trainer.is_global_zero:
            self.saver.close(seconds=self.config["checkpoint"]["deliver_seconds"], wanted=True)
            self.recorder.close("complete", step=steps, results=results_of(result, state, self.config))
            log_receipt(self.loggers, self.run_dir)
        return result

    def fail(self, raised: BaseException) -> BaseException:
        """Save what can be saved, close the receipt, end the other ranks; return the error for people."""
        self.checkpoints.heart.close()
        if in_main_thread():
            # Ctrl-C may stop the delivery; the receipt is closed anyway.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        error = self._error_of(raised)
        error = explain_disk(error, self.run_dir) or error
        self._leave_copy(error)
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        if not stopped:
            self.listening.close()  # restore signal handling, so that the launcher's SIGTERM ends this rank
        if isinstance(error, Stopped) and not error.saved:
            self.keep_fetched = True  # other ranks may still read the fetched checkpoint and undelivered ones
        if self.trainer.is_global_zero:
            try:
                self._close_failed(error, stopped=stopped)
            except Exception as other:  # for example a full disk; show the training's own error
                if stopped:
                    raise
                said = other.args[0] if isinstance(other, LabtrainError) else in_words(other)
                warn(f"{shown(self.run_dir)}: the receipt could not be closed: {said}")
        if not stopped and (launcher := self.trainer.strategy.launcher):
            launcher.kill(signal.SIGKILL)  # the other ranks on this node wait for this rank forever
        return self._explained(error) or error

    def _error_of(self, raised: BaseException) -> BaseException:
        """Explain that other ranks are gone. Without a launcher this process knows how they ended."""
        error = explain_loss(raised, self.wishes)
        asked = isinstance(error, Stopped) and not error.saved  # also by Lightning, which watches the ranks
        if self.ranks is None and (is_loss(raised) or asked):
            self.ended = ended_rank(self.trainer.strategy.launcher, seconds=0 if asked else ENDS_S)
            if self.ended is not None:
                error = lost_rank(*self.ended)
        if self.ranks is None and isinstance(error, LostError) and self.ended is None:
            error.exit_code = 1 if self.trainer.is_global_zero else EXIT_LOST
        why = self.checkpoints.beacon.why
        if isinstance(error, LostError) and why not in ("", error.args[0]):  # a hang that the watcher has found
            error.args, error.hint = (why,), hint(shown(self.run_dir))
        return error

    def _leave_copy(self, error: BaseException) -> None:
        """Save the newest copy of the state after the death of a rank, and tell the starting process of the death."""
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        own = not isinstance(error, LostError) and isinstance(self._explained(error) or error, LabtrainError)
        refused = self.ended is not None and self.ended[1] == EXIT_USAGE  # that rank has printed an error for people
        if own or refused or isinstance(error, KeyboardInterrupt) or (isinstance(error, Stopped) and error.saved):
            return
        leads = self.trainer.is_global_zero
        try:
            if leads or stopped or isinstance(error, LostError):  # else rank 0 lives
                self.checkpoints.kept.write(leads=leads, take_over=self._take_over)
        except (Exception, KeyboardInterrupt) as other:
            warn(f"{shown(self.run_dir)}: the newest state could not be saved: {in_words(other)}")
        if self.ended is not None:
            self._tell_ended(*self.ended)
        elif not stopped:
            how = str(error.args[0]) if isinstance(error, LostError) else f"rank 0 raised {type(error).__qualname__}"
            self.checkpoints.beacon.fail(how, 1)

    def _take_over(self) -> bool:
        """Try to become the only process that trains this run."""
        try:
            self.recorder.open()
        except LabtrainError:
            return False
        return True

    def _close_failed(self, error: BaseException, *, stopped: bool) -> None:
        try:
            if isinstance(error, Stopped) and error.saved:
                soon = "SLURM_JOB_ID" in os.environ  # Slurm's signals leave little time; the next start delivers
                seconds = 0 if soon else self.config["checkpoint"]["deliver_seconds"]
                self.saver.close(seconds=seconds, wanted=False)
            else:
                self.saver.abandon()
        finally:
            why = str(error) if isinstance(error, Stopped) else type(error).__qualname__
            if self.ended is not None:
                why = str(error.args[0])
            elif isinstance(error, LabtrainError):
                why = f"{why}: {one_line(str(error.args[0]))}"
            self.recorder.close("interrupted" if stopped else "failed", step=self.trainer.global_step, why=why)

    def _explained(self, error: BaseException) -> BaseException | None:
        known = (
            explain_operation(error, self.experiment.model)
            or explain(error, self.config, started=self.recorder.receipt is not None)
            or explain_callback(error, self.experiment.callbacks)
        )
        has_stepped = self.start.found is None or self.trainer.global_step != self.start.step
        return known or (None if has_stepped else explain_step(error))

    def close(self) -> None:
        """End the writer's process; release the run's lock, fetched checkpoints and signals."""
        self.saver.end()
        # Without the lock another start may be reading them.
        if self.recorder.lock is not None and not self.keep_fetched:
            shutil.rmtree(self.start.fetched, ignore_errors=True)
        self.recorder.release()
        self.listening.close()


def explain(error: BaseException, config: Config, *, started: bool) -> LabtrainError | None:
    """Turn an exception of the training into an error for people; None if its traceback says more."""
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
    if isinstance(error, FileNotFoundError | PermissionError) and not started:
        return ConfigError(
            f"{error.strerror}: {error.filename}",
            hint="python train.py --cfg job shows the paths of data and model",
        )
    return None


def results_of(result: Result, state_digest: str | None, config: Config) -> Results:
    """Return the results for the receipt, with the digest of the last saved training state."""
    monitor, mode = config["checkpoint"]["monitor"], config["checkpoint"]["mode"]
    return {
        "metrics": result.metrics,
        "best": best_of(result.run_dir, monitor=monitor, mode=mode),
        "steps": result.steps,
        "weights_digest": result.weights_digest,
        "state_digest": state_digest,
    }


def quiet_lightning() -> None:
    """Turn off messages of Lightning and others that say nothing to a user of labtrain."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # aiohttp logs a lost store here; the delivery reports it
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # ranks.adopt warns if it matters
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", module="torch.distributed.checkpoint")
