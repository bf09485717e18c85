"""Stage 2 of a start: `python -m labtrain.launch.job RUN_DIR` trains the job that stage 1 put in the environment.

No Hydra application runs here, so Lightning's launcher starts this very command again for every local rank: each rank
runs its parent's job, never the command line, and a sweep is never run by its ranks. RUN_DIR is for people who look at
the list of processes.
"""

import gc
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO, cast

from labtrain.base.console import shown
from labtrain.base.credentials import CleanStream, remember
from labtrain.base.errors import EXIT_STOPPED, LabtrainError, LostError
from labtrain.base.permissions import close_umask
from labtrain.base.signals import Stopped, end_with_parent
from labtrain.launch.compose import print_error
from labtrain.record import receipt
from labtrain.record.identity import JOB_VARIABLE, Job
from labtrain.record.ranks import Ranks, find_ranks, in_slurm_step, requeue, wants_requeue
from labtrain.record.sources import load_from_source

if TYPE_CHECKING:
    from labtrain.training.fit import Result

LOST_SECONDS = 600  # Slurm takes a node for dead after 300 (SlurmdTimeout)
FIRST_RANK = "LABTRAIN_FIRST_RANK"  # the process that started this one as a rank of its own


def main() -> None:
    """Train the job of this process; on rank 0, print its folder and its weights digest to standard output."""
    if JOB_VARIABLE not in os.environ:
        print_error(LabtrainError("labtrain.launch.job is started by train.py", hint="python train.py"))
        sys.exit(2)
    close_umask()
    job = Job.from_json(os.environ[JOB_VARIABLE])
    remember(job.config, job.references)
    ranks = find_ranks()
    rank = ranks.rank if ranks else int(os.environ.get("LOCAL_RANK", "0"))
    _end_with_starter(job, ranks)
    out = _take_stdout()
    sys.stdout, sys.stderr = cast(TextIO, CleanStream(sys.stdout)), cast(TextIO, CleanStream(sys.stderr))
    job.enter_path()
    if job.config["determinism"]["mode"] != "off":
        load_from_source()
    gc.disable()  # importing torch and Lightning makes no garbage: half a second of looking for it
    from labtrain.training.fit import train

    gc.freeze()
    gc.enable()
    try:
        result = train(job)
    except LabtrainError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        print_error(error, rank)
        if ranks and isinstance(error, LostError):
            time.sleep(LOST_SECONDS)  # the launcher acts first: it knows whether a rank failed, or a node
        sys.exit(error.exit_code)
    except Stopped as error:
        if not rank:  # with another code Lightning, srun and torchrun kill rank 0, which may be delivering yet
            _report_stop(job, error)
        sys.exit(EXIT_STOPPED if not rank else 0)
    if not rank:
        # srun reads the two streams apart and joins them in any order: there the table comes before the digest in one.
        print_table(result, out if in_slurm_step(os.environ) else sys.stderr)
        out.write(f"{shown(result.run_dir)} {result.weights_digest}\n")
        out.flush()


def _end_with_starter(job: Job, ranks: Ranks | None) -> None:
    """End this process with the one that started it."""
    is_child = os.environ.get(FIRST_RANK) == str(os.getppid())
    os.environ[FIRST_RANK] = str(os.getpid())
    if is_child:
        end_with_parent(os.getppid(), signal.SIGKILL)  # a rank alone has nothing to save
    elif job.supervisor:
        end_with_parent(job.supervisor, signal.SIGTERM)
    elif ranks and ranks.launcher == "torchrun":
        end_with_parent(os.getppid(), signal.SIGTERM)  # its SIGUSR1, say, ends torchrun alone


def _report_stop(job: Job, stop: Stopped) -> None:
    """Say that the training was stopped; under Slurm, queue it again if that is wanted."""
    how = "saved" if stop.saved else "with nothing new to save"
    sys.stderr.write(f"\nstopped by {stop}, {how}: the same command resumes {shown(job.run_dir)}\n")
    if wants_requeue(stop.signum):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which Slurm ends what it queues again
        found = receipt.read(Path(job.run_dir))
        requeue(starts=len(found["segments"]) if found else 0, progress=stop.saved)


def print_table(result: "Result", file: IO[str]) -> None:
    """Print the metrics of a run: a row a metric, a column a stage."""
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, dict[str, float]] = {}
    stages: list[str] = []
    for name, value in result.metrics.items():
        stage, _, metric = name.rpartition("/")
        if metric.endswith("_step"):
            continue  # Lightning's value of the last batch, beside that of the epoch
        rows.setdefault(metric.removesuffix("_epoch"), {})[stage] = value
        if stage not in stages:
            stages.append(stage)
    stages.sort(key=lambda stage: ("train", "val", "test", stage).index(stage))
    table = Table(title=f"{shown(result.run_dir)}, {result.steps} steps", title_justify="left")
    for heading in ("metric", *stages):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for metric, values in rows.items():
        table.add_row(metric, *(f"{values[stage]:.4f}" if stage in values else "" for stage in stages))
    if rows:
        Console(file=file).print(table)


def _take_stdout() -> IO[str]:
    """Return standard output for this module alone; everything else that is printed goes to standard error.

    gloo prints to it from C++, and people's code prints to it in every rank.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


if __name__ == "__main__":
    main()
