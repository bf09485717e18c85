"""`labtrain batch-size`: start the search for the largest data.batch_size that fits.

It starts like a training (compose.py, job.py): compose without torch, then replace this process by one that has the
variables for torch and searches (training/largest_batch.py). It uses one device. A step computes the shards one after
the other, so a size that fits on one device fits on up to as many devices as there are shards.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.launch.compose import print_error, process_of
from labtrain.launch.experiment import compose, experiment_at, resolved
from labtrain.record.identity import JOB_VARIABLE, SHARDED_STRATEGY, Job
from labtrain.record.resume import make_job


def search(root: Path, overrides: list[str], *, mode: str, max_trials: int, steps: int) -> NoReturn:
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
    root = experiment_at(root)
    config = resolved(compose(overrides, root), hint="labtrain batch-size")
    if config["trainer"]["strategy"] == SHARDED_STRATEGY:
        raise ConfigError(
            "batch-size does not support trainer.strategy=fsdp: it searches on one device",
            hint="trainer.strategy=auto",
        )
    config["trainer"] |= {"devices": 1, "num_nodes": 1, "fast_dev_run": False, "enable_progress_bar": False}
    config |= {"resume": "never", "logger": {}, "callbacks": {}}
    command, environment = process_of(make_job(config, root=root, command=sys.argv))
    command = [command[0], "-m", "labtrain.launch.batch_size", mode, str(max_trials), str(steps)]
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def main() -> None:
    """Search with this process's job, and print the size."""
    mode, max_trials, steps = sys.argv[1:]
    job = Job.from_json(os.environ[JOB_VARIABLE])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # user code may print
    job.enter_path()
    from labtrain.training.largest_batch import largest  # torch

    try:
        size = largest(job.config, mode=mode, max_trials=int(max_trials), steps=int(steps))
    except LabtrainError as error:
        print_error(error)
        sys.exit(error.exit_code)
    out.write(f"{size}\n")
    out.flush()


if __name__ == "__main__":
    main()
