"""`labtrain batch-size`: the largest data.batch_size that fits, by Lightning's Tuner.

As a training starts (compose.py, job.py): composed without torch, then searched in the process that this one becomes,
with the variables that must precede torch. One device: a step takes the micro-batches of determinism.shards one after
the other, so what fits on one fits on as many as there are shards.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn, cast

from labtrain.base.errors import ConfigError, DeviceError, LabtrainError
from labtrain.exact import determinism
from labtrain.launch.compose import print_error, process_of
from labtrain.record import config as configuration
from labtrain.record.identity import JOB_VARIABLE, SHARDED_STRATEGY, Config, Job, shards_in_use
from labtrain.record.resume import make_job

SAID = ("Batch size", "The batch size", "Reached", "Applying")  # of what Lightning says, how the search goes


def search(root: Path, overrides: list[str], *, mode: str, max_trials: int, steps: int) -> NoReturn:
    """Become the process that searches, and prints what it finds to standard output.

    Args:
        root: the experiment's folder.
        overrides: as train.py takes them.
        mode: power or binsearch.
        max_trials: how many sizes are tried at most.
        steps: optimizer steps that each is trained for.

    Raises:
        LabtrainError: no experiment is here, or its configuration cannot be searched.
    """
    config = composed(root, overrides)
    if config["trainer"]["strategy"] == SHARDED_STRATEGY:
        raise ConfigError(
            "the search has one device, trainer.strategy=fsdp is for a model that no single one holds",
            hint="trainer.strategy=auto",
        )
    config["trainer"] |= {"devices": 1, "num_nodes": 1, "fast_dev_run": False, "enable_progress_bar": False}
    config |= {"resume": "never", "logger": {}, "callbacks": {}}
    command, environment = process_of(make_job(config, root=root, command=sys.argv))
    command = [command[0], "-m", "labtrain.training.largest_batch", mode, str(max_trials), str(steps)]
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def composed(root: Path, overrides: list[str]) -> Config:
    """Return the configuration of the experiment in `root`, as its train.py would have it.

    Raises:
        LabtrainError: there is none, or it is not right.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not (root / "conf" / "config.yaml").exists():
        raise ConfigError("conf/config.yaml: no such file", hint="cd to an experiment; labtrain new DIR makes one")
    os.environ["LABTRAIN_ROOT"] = str(root)
    try:
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            whole = compose("config", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(whole)  # what the configuration itself may ask: ${hydra:...}
        cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(f"{missing[0]} has no value", hint=f"labtrain batch-size {missing[0]}=VALUE")
        config = cast(Config, OmegaConf.to_container(cfg, resolve=True))
        configuration.check(config)
    except Exception as error:
        raise configuration.explain(error) or error from None
    return config


def main() -> None:
    """Search with the job of this process, and print the size."""
    mode, max_trials, steps = sys.argv[1:]
    job = Job.from_json(os.environ[JOB_VARIABLE])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what people's code prints
    job.enter_path()
    try:
        size = largest(job.config, mode=mode, max_trials=int(max_trials), steps=int(steps))
    except LabtrainError as error:
        print_error(error)
        sys.exit(error.exit_code)
    out.write(f"{size}\n")
    out.flush()


def largest(config: Config, *, mode: str, max_trials: int, steps: int) -> int:
    """Train for some steps with one size after another, say how it goes, and return the largest that fitted.

    Raises:
        LabtrainError: it cannot be trained, or not even one sample a shard fits.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.tuner.tuning import Tuner

    from labtrain.base.signals import Wishes
    from labtrain.training.cluster import make_environment
    from labtrain.training.devices import choose_accelerator
    from labtrain.training.fit import instantiate, make_trainer
    from labtrain.training.speed import check_compiler, hasten

    shards, seed, determined = shards_in_use(config), config["seed"], config["determinism"]
    smallest = max(2, shards or 1)
    config["data"]["batch_size"] = smallest
    accelerator, devices = choose_accelerator(config)
    check_compiler(config["speed"], accelerator)
    determinism.set_run(seed=seed, mode=determined["mode"], accelerator=accelerator)
    determinism.apply(
        determined["mode"], threads=determined["threads"], tf32=config["speed"]["tf32"] and accelerator == "gpu"
    )
    determinism.seed_all(seed, "init")
    datamodule = instantiate(config["data"], "data", pl.LightningDataModule)
    model = instantiate(config["model"], "model", pl.LightningModule)
    if not hasattr(datamodule, "batch_size"):
        raise ConfigError(
            f"{type(datamodule).__name__} has no attribute batch_size: the search sets it and asks for loaders",
            hint="self.batch_size = batch_size in its __init__, and the loaders made with self.batch_size",
        )
    hasten(model, config["speed"], mode=determined["mode"], say=say)
    if accelerator == "cpu":
        say("on a CPU nothing says when memory is full: sizes are tried until the data, 8192 or --max-trials ends them")
    let_lightning_say_how_it_goes()
    with tempfile.TemporaryDirectory() as scratch:  # for the weights, which each trial begins with
        alone = make_environment(None, accelerator=accelerator)
        trainer = make_trainer(config, accelerator, devices, alone, [], [], Wishes(), root=scratch)
        fitted: list[int] = []
        run = trainer.fit_loop.run

        def noted() -> None:
            run()
            fitted.append(datamodule.batch_size)

        trainer.fit_loop.run = noted  # type: ignore[method-assign]
        try:
            found = Tuner(trainer).scale_batch_size(
                model,
                datamodule=datamodule,
                mode=mode,
                steps_per_trial=steps,
                init_val=smallest,
                max_trials=max_trials,
            )
        except ConfigError as error:
            if datamodule.batch_size >= smallest:
                raise
            raise DeviceError(
                f"out of memory at data.batch_size={smallest}, the smallest that determinism.shards={shards} take",
                hint="trainer.precision=bf16-mixed, speed.checkpoint_activations=true, or a smaller model",
            ) from error
    assert found is not None
    found = max(smallest, min(found, max(fitted)))  # Lightning's last one, 8192, it takes without a trial
    say(f"data.batch_size={found}: {held_at_once(found, shards)}")
    return found


def held_at_once(size: int, shards: int | None) -> str:
    """Return, in words, how much of a batch is in memory at once, and on how many devices it fits so."""
    if shards is None:
        return "on one device; without determinism.shards each of several would take its part of it"
    return (
        f"determinism.shards={shards} micro-batches of {-(-size // shards)} samples, one after the other, on one device"
        f" or on up to {shards}"
    )


def let_lightning_say_how_it_goes() -> None:
    """Let through what the search says of itself, to standard error, and nothing else of Lightning's."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: record.getMessage().startswith(SAID))


def say(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
