"""`labtrain batch-size` and `labtrain lr-find`: start the search for the largest batch, or for a learning rate.

They start like a training (compose.py, job.py): compose without torch, then replace this process by one that has the
variables for torch and searches (training/search). They use one device. A step computes the shards one after the
other, so a size that fits on one device fits on up to as many devices as there are shards.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from labtrain.base import exact_json
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.checkpoints.initial import identify_weights
from labtrain.launch.compose import print_error, process_of, training_packages
from labtrain.launch.experiment import compose, experiment_at, resolved
from labtrain.record import config as configuration
from labtrain.record.identity import JOB_VARIABLE, SHARDED_STRATEGY, Job
from labtrain.record.resume import make_job


def search_batch_size(root: Path, overrides: list[str], *, mode: str, max_trials: int, steps: int) -> NoReturn:
    """Replace this process by one that searches and prints the size to standard output.

    Args:
        root: the experiment's folder.
        overrides: as for train.py.
        mode: power or binsearch.
        max_trials: maximum number of sizes to try.
        steps: optimizer steps to train with each size.

    Raises:
        LabtrainError: there is no experiment here, or the search does not support its configuration.
    """
    _search(root, overrides, "batch-size", mode=mode, max_trials=max_trials, steps=steps)


def search_rate(
    root: Path, overrides: list[str], *, min_rate: float, max_rate: float, steps: int, plot: Path | None
) -> NoReturn:
    """Replace this process by one that searches and prints the learning rate to standard output.

    Args:
        root: the experiment's folder.
        overrides: as for train.py.
        min_rate: the first rate.
        max_rate: the last rate.
        steps: optimizer steps, each with a new rate.
        plot: a PNG file to write; None: no file.

    Raises:
        LabtrainError: there is no experiment here, or the search does not support its configuration.
    """
    if not 0 < min_rate < max_rate:
        raise ConfigError(
            f"--min {min_rate:g} --max {max_rate:g}: must be above 0, and min below max", hint="--min 1e-6 --max 1"
        )
    if plot is not None and (plot.suffix != ".png" or not plot.absolute().parent.is_dir()):
        raise ConfigError(f"--plot {plot}: must be a .png file in an existing folder", hint="--plot lr.png")
    _search(
        root, overrides, "lr-find", min_rate=min_rate, max_rate=max_rate, steps=steps,
        plot=None if plot is None else str(plot.absolute()),
    )  # fmt: skip


def _search(root: Path, overrides: list[str], command: str, **options: object) -> NoReturn:
    root = experiment_at(root)
    config = resolved(compose(overrides, root), hint=f"labtrain {command}")
    if config["trainer"]["strategy"] == SHARDED_STRATEGY:
        raise ConfigError(
            f"{command} does not support trainer.strategy=fsdp: it searches on one device",
            hint="trainer.strategy=auto",
        )
    config["trainer"] |= {"devices": 1, "num_nodes": 1, "fast_dev_run": False, "enable_progress_bar": False}
    config["trainer"]["profiler"] = None
    config |= {"resume": "never", "logger": {}, "callbacks": {}}
    if command == "batch-size":
        config["init_from"] = configuration.init_from(None)  # weights of any value take the same memory
    identify_weights(config, root)
    started, environment = process_of(make_job(config, root=root, command=sys.argv))
    sys.stdout.flush()
    os.execve(started[0], [started[0], "-m", "labtrain.launch.search", command, exact_json.dumps(options)], environment)


def main() -> None:
    """Search with this process's job, and print what was found."""
    command, options = sys.argv[1], exact_json.loads(sys.argv[2])
    job = Job.from_json(os.environ[JOB_VARIABLE])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # user code may print
    job.enter_path()
    try:
        with training_packages(["labtrain", command]):
            search = _searches()[command]
        found = search(job, **options)
    except LabtrainError as error:
        print_error(error)
        sys.exit(error.exit_code)
    out.write(f"{found}\n")
    out.flush()


def _searches() -> dict[str, Callable[..., str]]:
    from labtrain.training.search.largest_batch import largest  # torch
    from labtrain.training.search.learning_rate import suggested_rate

    def rate(job: Job, *, plot: str | None, **options: float) -> str:
        found = suggested_rate(
            job.config,
            Path(job.root),
            plot=None if plot is None else Path(plot),
            min_rate=options["min_rate"],
            max_rate=options["max_rate"],
            steps=int(options["steps"]),
        )
        return f"{found:.4g}"

    return {"batch-size": lambda job, **options: str(largest(job.config, **options)), "lr-find": rate}


if __name__ == "__main__":
    main()
