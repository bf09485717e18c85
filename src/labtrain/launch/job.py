"""Stage 2 of a start: `python -m labtrain.launch.job RUN_DIR` trains the job that stage 1 put in the environment.

Hydra does not run here. Lightning's launcher starts this same command for every local rank, so each rank runs its
parent's job and never a sweep. RUN_DIR is only for people who look at the process list.
"""

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from labtrain.base import exact_json
from labtrain.base.console import one_line, shown
from labtrain.base.credentials import remember
from labtrain.base.errors import EXIT_STOPPED, LabtrainError, LostError, explain_disk
from labtrain.base.output import keep_output
from labtrain.base.permissions import close_umask
from labtrain.base.signals import Stopped, end_on_interrupt, end_with_parent
from labtrain.launch.compose import print_error, training_packages
from labtrain.launch.from_python import answer
from labtrain.record import receipt
from labtrain.record.identity import JOB_VARIABLE, Job
from labtrain.record.ranks import Ranks, find_ranks, in_slurm_step, requeue, wants_requeue
from labtrain.record.receipt import Result
from labtrain.record.sources import load_from_source

if TYPE_CHECKING:
    from labtrain.training.evaluation import Predictions

WIDE = 1000  # columns of a file
LOST_SECONDS = 600  # Slurm declares a node dead after 300 (SlurmdTimeout)
FIRST_RANK = "LABTRAIN_FIRST_RANK"  # the process that started this rank


def main() -> None:
    """Train this process's job; on rank 0, print its folder and its weights digest to standard output."""
    end_on_interrupt()
    if JOB_VARIABLE not in os.environ:
        print_error(LabtrainError("only train.py can start labtrain.launch.job", hint="python train.py"))
        sys.exit(2)
    close_umask()
    job = Job.from_json(os.environ[JOB_VARIABLE])
    remember(job.config, job.references)
    ranks = find_ranks()
    rank = ranks.rank if ranks else int(os.environ.get("LOCAL_RANK", "0"))
    _end_with_starter(job, ranks)
    out = _take_stdout()
    keep_output(rank)
    job.enter_path()
    if job.config["determinism"]["mode"] != "off":
        load_from_source()
    train, evaluate = _training(writes=not job.evaluate)
    answers = job.answers and (ranks is not None or not rank)  # not the ranks that Lightning starts
    if job.evaluate and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it has scratch folders to remove
    try:
        found = evaluate(job) if job.evaluate else train(job)
    except Stopped as error:
        if not rank:  # with another code Lightning, srun and torchrun kill rank 0, which may still be delivering
            _report_stop(job, error)
        if answers:
            answer(out, error)
        sys.exit(EXIT_STOPPED if not rank else 0)
    except KeyboardInterrupt:  # of an evaluation, or of a training that delivers its checkpoints after a stop
        sys.exit(128 + signal.SIGINT)
    except Exception as raised:
        known = raised if isinstance(raised, LabtrainError) else explain_disk(raised, Path(job.run_dir))
        if answers:
            answer(out, known or raised)
        if known is None:
            raise
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        if not answers:
            print_error(known, rank)
        if ranks and isinstance(known, LostError):
            time.sleep(LOST_SECONDS)  # let the launcher act first: it knows whether a rank or a node failed
        sys.exit(known.exit_code)
    _tell(found, out, rank, evaluated=bool(job.evaluate), answers=answers)


def _training(*, writes: bool) -> tuple[Callable[[Job], Result], Callable[[Job], "Result | Predictions"]]:
    """Import torch and Lightning, and return what trains a job and what evaluates one.

    Args:
        writes: whether checkpoints are going to be written: fork the process for that.
    """
    gc.disable()  # the imports create no garbage; this saves half a second
    with training_packages(["python", "train.py"]):
        from labtrain.checkpoints.beside import fork
        from labtrain.training.evaluation import evaluate
        from labtrain.training.fit import train
    gc.freeze()  # so that the fork's collector leaves the memory shared, too
    gc.enable()
    if writes:
        fork()
    return train, evaluate


def _tell(found: "Result | Predictions", out: IO[str], rank: int, *, evaluated: bool, answers: bool) -> None:
    """Print the metrics, and tell the result to whoever reads standard output."""
    if not rank:
        print_found(found, out, evaluated=evaluated, answers=answers)
    if answers and isinstance(found, Result):
        answer(out, found)


def print_found(found: "Result | Predictions", out: IO[str], *, evaluated: bool, answers: bool) -> None:
    """Print a training's table, folder and digest; an evaluation's metrics as one line of JSON; a file and its sha256.

    Standard output has none of this if it is read by labtrain.train, which gets an answer.
    """
    if not isinstance(found, Result):
        out.write(f"{shown(found.file)} {found.digest}\n")
    else:
        # srun merges the two streams in any order; in one stream the table precedes the digest.
        print_table(found, out if in_slurm_step(os.environ) and not evaluated and not answers else sys.stderr)
        if evaluated:
            out.write(f"{exact_json.dumps(found.metrics)}\n")
        elif not answers:
            out.write(f"{shown(found.run_dir)} {found.weights_digest}\n")
    out.flush()


def _end_with_starter(job: Job, ranks: Ranks | None) -> None:
    """End this process when its starter ends."""
    is_child = os.environ.get(FIRST_RANK) == str(os.getppid())
    os.environ[FIRST_RANK] = str(os.getpid())
    if is_child:
        end_with_parent(os.getppid(), signal.SIGKILL)  # a rank alone has nothing to save
    elif job.supervisor:
        end_with_parent(job.supervisor, signal.SIGTERM)
    elif ranks and ranks.launcher == "torchrun":
        end_with_parent(os.getppid(), signal.SIGTERM)  # SIGUSR1, for example, ends only torchrun


def _report_stop(job: Job, stop: Stopped) -> None:
    """Print that the training was stopped; under Slurm, requeue the job after such a signal."""
    how = "saved" if stop.saved else "nothing new to save"
    sys.stderr.write(f"\nstopped by {stop}, {how}: the same command resumes {shown(job.run_dir)}\n")
    if wants_requeue(stop.signum):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to the job that it requeues
        found = receipt.read(Path(job.run_dir))
        requeue(starts=len(found["segments"]) if found else 0, progress=stop.saved)


def print_table(result: Result, file: IO[str]) -> None:
    """Print a run's metrics: one row for each metric, one column for each stage."""
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, dict[str, float]] = {}
    stages: list[str] = []
    for name, value in result.metrics.items():
        stage, _, metric = name.rpartition("/")
        if metric.endswith("_step"):
            continue  # Lightning's value of the last batch; the epoch's is shown
        rows.setdefault(metric.removesuffix("_epoch"), {})[stage] = value
        if stage not in stages:
            stages.append(stage)
    stages.sort(key=lambda stage: ("train", "val", "test", stage).index(stage))
    table = Table()
    for heading in ("metric", *stages):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for metric, values in rows.items():
        table.add_row(metric, *(f"{values[stage]:.4f}" if stage in values else "" for stage in stages))
    if rows:
        # In lines of their own width: rich would fold a title to its table's, and in a file every row to 80 columns.
        print(one_line(f"{shown(result.run_dir)}, {result.steps} steps"), file=file)
        Console(file=file, width=None if file.isatty() else WIDE).print(table)


def _take_stdout() -> IO[str]:
    """Reserve standard output for this module; everything else printed goes to standard error.

    gloo prints from C++, and user code prints in every rank.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


if __name__ == "__main__":
    main()
