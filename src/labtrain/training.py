"""Train one run, from a resolved configuration to a receipt: `train`, read from top to bottom.

Whatever can be refused is refused before the run's folder is made.
"""

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from labtrain import determinism, receipt
from labtrain.callbacks import Progress, Seeding, Trail, warn
from labtrain.checkpoint import Checkpoints, FolderIO
from labtrain.digests import digest
from labtrain.errors import ConfigError, DeviceError, LabtrainError
from labtrain.loggers import log_config, make_loggers
from labtrain.recorder import Recorder
from labtrain.run import Config, Job, make_job, shown
from labtrain.store import Manifest, checkpoint_folder, newest_whole


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


class Interrupted(BaseException):
    """A signal ended the training. A BaseException, as KeyboardInterrupt is: `except Exception` must not swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def train(cfg: Any) -> Result:
    """Train the run that a configuration describes and return its result; of a complete run, the result it has.

    Args:
        cfg: a configuration as Hydra composes it (a DictConfig or a dict), or the Job that stage 1 made of it.

    Raises:
        LabtrainError: it cannot be trained; nothing was written.
        Interrupted: a signal came; the receipt says so.
    """
    job = cfg if isinstance(cfg, Job) else _job(cfg)
    config, run_dir = job.config, Path(job.run_dir)
    mode, seed = config["determinism"]["mode"], config["seed"]
    done = receipt.read(run_dir)
    if done is not None and done["status"] == "complete":
        results = done["results"]
        return Result(
            run_dir=run_dir,
            metrics=results["metrics"],
            weights_digest=results["weights_digest"],
            steps=results["steps"],
        )

    accelerator = choose_accelerator(config)
    _quiet_lightning()
    if config["trainer"]["num_nodes"] == 1:
        # By itself gloo looks up the host's name, and hangs where it has none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    determinism.set_run(seed=seed, mode=mode)
    determinism.apply(mode, threads=config["determinism"]["threads"])
    determinism.seed_all(seed, "init")
    datamodule = instantiate(config, "data", pl.LightningDataModule)
    determinism.seed_all(seed, "init")  # again: what the data drew must not move the weights
    model = instantiate(config, "model", pl.LightningModule)

    folder = checkpoint_folder(run_dir, config["checkpoint"]["url"])
    path, manifest = newest_whole(folder) or (None, None)
    step = manifest["step"] if manifest else 0
    recorder = Recorder(job, checkpoints=folder, resumed_step=step)
    loggers = make_loggers(job, resumed_step=step)
    trainer = make_trainer(config, accelerator, loggers, make_callbacks(job, folder, manifest, recorder))
    try:
        with _signals():
            if trainer.is_global_zero:
                recorder.open()
                if path is not None:
                    warn_resumed(run_dir, path)
            log_config(loggers, config)
            trainer.fit(model, datamodule=datamodule, ckpt_path=path, weights_only=True)
            metrics = {**(manifest["metrics"] if manifest else {}), **_floats(trainer.callback_metrics)}
            weights, steps = digest(model), trainer.global_step
            if is_overridden("test_dataloader", datamodule) and is_overridden("test_step", model):
                trainer.test(model, datamodule=datamodule, verbose=False)
                metrics |= _floats(trainer.callback_metrics)
            result = Result(run_dir=run_dir, metrics=metrics, weights_digest=weights, steps=steps)
            if trainer.is_global_zero:
                recorder.close("complete", step=steps, results=_results(result, folder))
            return result
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        if trainer.is_global_zero:
            recorder.close("interrupted" if interrupted else "failed", step=trainer.global_step)
        if launcher := trainer.strategy.launcher:
            launcher.kill(signal.SIGTERM)  # the other ranks of this node; Lightning leaves them to time out
        if (known := explain(error, config, started=recorder.receipt is not None)) is not None:
            raise known from error
        raise


def choose_accelerator(config: Config) -> str:
    """Return `gpu` or `cpu`, or a name that only Lightning knows.

    Raises:
        DeviceError: more devices are asked for than there are, or a precision that they do not have.
        ConfigError: fewer samples a step than devices.
    """
    wanted, devices, precision = (config["trainer"][key] for key in ("accelerator", "devices", "precision"))
    gpus = torch.cuda.device_count()
    accelerator = ("gpu" if gpus else "cpu") if wanted == "auto" else {"cuda": "gpu"}.get(wanted, wanted)
    if accelerator == "gpu":
        numbers = devices if isinstance(devices, list) else range(devices if isinstance(devices, int) else 1)
        if missing := [number for number in numbers if number >= gpus]:
            found = f"this machine has {gpus} GPU{'s' if gpus != 1 else ''}"
            hint = (
                f"trainer.devices={gpus}, or trainer.accelerator=cpu"
                if gpus
                else "trainer.accelerator=cpu, or labtrain doctor says why no GPU is seen"
            )
            raise DeviceError(f"trainer.devices={devices} asks for GPU {missing[0]}, {found}", hint=hint)
    elif accelerator == "cpu":
        if isinstance(devices, list):
            raise DeviceError(
                f"trainer.devices={devices} names GPUs, on a CPU a number of processes is wanted",
                hint=f"trainer.devices={len(devices)}",
            )
        if precision in ("16-mixed", "16-true", "16"):
            raise DeviceError(
                f"trainer.precision={precision}: fp16 with loss scaling needs a GPU",
                hint="trainer.precision=bf16-mixed",
            )
    per_node = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    world = per_node * config["trainer"]["num_nodes"]
    if config["data"]["batch_size"] < world:
        raise ConfigError(
            f"data.batch_size={config['data']['batch_size']} is the samples of one step over all {world} devices",
            hint=f"data.batch_size={world} or more",
        )
    return str(accelerator)


def instantiate(config: Config, key: str, kind: type[Any]) -> Any:
    """Make the object that `config[key]` describes with `_target_`, Hydra's way.

    Raises:
        ConfigError: the target cannot be found, does not take these arguments, or is of another kind.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    target = config[key]["_target_"]
    try:
        made = hydra_instantiate(config[key], _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError | ImportError):
            text = " ".join(str(cause or error).split())
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


def make_callbacks(job: Job, folder: Path, resumed: Manifest | None, recorder: Recorder) -> list[pl.Callback]:
    """Return labtrain's callbacks and the person's, in the order in which they act."""
    from hydra.utils import instantiate as hydra_instantiate

    config, step = job.config, resumed["step"] if resumed else 0
    kept = {key: config["checkpoint"][key] for key in ("keep_last", "keep_best", "monitor", "mode")}
    # First: an epoch's state is saved before others touch it.
    callbacks: list[pl.Callback] = [Checkpoints(folder, run_id=job.run_id, resumed=resumed, **kept)]
    if config["determinism"]["mode"] != "off":
        callbacks.append(Seeding(seed=config["seed"], mode=config["determinism"]["mode"]))
    callbacks.append(recorder)
    if config["trail"]["every_n_steps"]:
        callbacks.append(
            Trail(Path(job.run_dir) / "trail.jsonl", every_n_steps=config["trail"]["every_n_steps"], resumed_step=step)
        )
    if config["trainer"]["enable_progress_bar"]:
        callbacks.append(Progress(batch_size=config["data"]["batch_size"]))
    return callbacks + [
        hydra_instantiate(options, _convert_="all") for options in config["callbacks"].values() if options
    ]


def make_trainer(config: Config, accelerator: str, loggers: list[Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    """Return Lightning's Trainer with the keys of `trainer`; those that are null take its defaults."""
    options = {key: value for key, value in config["trainer"].items() if value is not None} | {
        "accelerator": accelerator
    }
    try:
        return pl.Trainer(
            **options,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[FolderIO()],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            default_root_dir="runs",
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
        knobs = f"{smaller}; trainer.precision=bf16-mixed; {smaller} trainer.accumulate_grad_batches=2"
        return DeviceError(
            f"out of GPU memory at data.batch_size={config['data']['batch_size']}: {numbers}",
            hint=f"one of these: {knobs}",
        )
    if isinstance(error, FileNotFoundError | PermissionError) and not started:
        return ConfigError(
            f"{error.strerror}: {error.filename}",
            hint="python train.py --cfg job shows the paths that data and model were given",
        )
    return None


def warn_resumed(run_dir: Path, checkpoint: Path) -> None:
    """Say that a run goes on, and from where."""
    warn(f"{shown(run_dir)} goes on from {checkpoint.name} (resume=never starts anew beside it)")


def _results(result: Result, folder: Path) -> dict[str, Any]:
    found = newest_whole(folder)
    return {
        "metrics": result.metrics,
        "steps": result.steps,
        "weights_digest": result.weights_digest,
        "state_digest": found[1]["state_digest"] if found else None,
    }


def _job(cfg: Any) -> Job:
    from omegaconf import DictConfig, OmegaConf

    import __main__
    from labtrain import config as configuration

    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    config = cast(Config, plain)
    configuration.check(config)
    root = Path(getattr(__main__, "__file__", "notebook.py")).resolve().parent
    return make_job(config, root=root, command=[])


def _floats(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(metrics.items())}


@contextmanager
def _signals() -> Iterator[None]:
    """Raise Interrupted when SIGINT or SIGTERM comes; by itself Lightning would end with exit code 0 after SIGTERM."""

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_IGN)
        raise Interrupted(signum)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
