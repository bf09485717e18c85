"""Stage 1 of a start: compose the configuration with Hydra, name the run, hand each job to a new process (job.py).

No torch here, so `--help` and configuration errors take a fraction of a second. This is the one place that sets the
environment variables that torch reads at import. It writes nothing, so any number of copies may run at once (srun,
torchrun). For task functions, search paths and launchers see https://hydra.cc/docs/1.3/.
"""

import atexit
import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO, cast

from labtrain.base.console import shown
from labtrain.base.credentials import CleanStream, remember
from labtrain.base.errors import EXIT_STOPPED, ConfigError, JobFailedError, LabtrainError, missing_package
from labtrain.base.permissions import close_umask
from labtrain.base.signals import block, hold_interrupts
from labtrain.checkpoints.initial import identify_weights
from labtrain.exact import determinism
from labtrain.launch.evaluation import Asked, asked_in, evaluation_job
from labtrain.launch.restarts import is_waited_for, run
from labtrain.record import config as configuration
from labtrain.record import receipt
from labtrain.record.identity import JOB_MODULE, JOB_VARIABLE, Config, Job
from labtrain.record.ranks import adopt, find_ranks, own_rank
from labtrain.record.resume import changed_data, make_job, near_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Linux limits one variable to 128 KiB (MAX_ARG_STRLEN).
MAX_JOB_BYTES = 120_000
# Environment of jobs of Hydra's submitit launcher: the signal before the time limit (submitit's default is SIGUSR2),
# and that a rank that dies ends all ranks (srun --kill-on-bad-exit).
SUBMITTED = {"SUBMITIT_PREEMPT_SIGNAL": "USR1", "SLURM_KILL_BAD_EXIT": "1"}


def start(file: str, config_path: str, config_name: str) -> None:
    """Compose the configuration and run it: `labtrain.main`, called by `file`."""
    block()
    close_umask()
    sys.stderr = cast(TextIO, CleanStream(sys.stderr))
    root = Path(file).resolve().parent
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints and exits: hydra/_internal/utils.py run_and_report
    os.environ["LABTRAIN_ROOT"] = str(root)  # conf/labtrain.yaml: paths.runs
    for name, value in SUBMITTED.items():
        os.environ.setdefault(name, value)
    try:
        _run_hydra(root, config_path, config_name, wants_trace)
    except Exception as error:
        from labtrain.launch.sweep import explain

        end_if_known(explain(error), wants_trace=wants_trace)
        raise


def end_if_known(error: Exception, *, wants_trace: bool) -> None:
    """End the process with an error for people; return if `error` is another exception, which keeps its traceback."""
    known = configuration.explain(error)
    if known is not None and not wants_trace:
        print_error(known, own_rank())
        sys.exit(known.exit_code)


@contextmanager
def training_packages(command: Sequence[str]) -> Iterator[None]:
    """End the process with an error for people if the block cannot import what labtrain's core does without."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (known := missing_package(error, command)) is None:
            raise
        print_error(known, own_rank())
        sys.exit(known.exit_code)


def print_error(error: LabtrainError, rank: int = 0) -> None:
    """Print an error and its hint to standard error."""
    sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}error: {error}\n")


def _run_hydra(root: Path, config_path: str, config_name: str, wants_trace: bool) -> None:
    gc.disable()  # importing Hydra creates no garbage, so collecting wastes time
    import hydra

    gc.freeze()
    gc.enable()
    folder = root / config_path
    if not (folder / f"{config_name}.yaml").exists():
        raise ConfigError(
            f"{shown(folder)}/{config_name}.yaml: no such file", hint="labtrain new DIR makes an experiment with one"
        )
    task = HydraTask(root=str(root), command=sys.argv, wants_trace=wants_trace)
    hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(task)()


@dataclass(frozen=True)
class HydraTask:
    """The task function that Hydra calls for each job; a class at module level, so that it can be pickled."""

    root: str
    command: list[str]
    wants_trace: bool = False

    def __call__(self, cfg: "DictConfig") -> float | None:
        """Check and name the run, then become its job; in a sweep, supervise the job instead.

        Returns:
            the value by which a sweep compares runs (sweep.py).
        """
        try:
            return self._run(cfg)
        except JobFailedError:
            raise  # the sweep continues with its other jobs
        except Exception as error:
            end_if_known(error, wants_trace=self.wants_trace)  # SystemExit, because Hydra would print another line
            raise

    def _run(self, cfg: "DictConfig") -> float | None:
        close_umask()  # a sweep launcher's worker did not call main
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        from labtrain.launch.sweep import note_run, value_of

        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(
                f"{missing[0]} has no value", hint=f"python train.py {missing[0]}=VALUE, or set it in conf/config.yaml"
            )
        config = cast(Config, OmegaConf.to_container(cfg, resolve=True))
        remember(config)
        single = HydraConfig.get().mode == RunMode.RUN
        if (asked := asked_in(config)) is not None:
            self._evaluate(asked, config, list(HydraConfig.get().overrides.task), single=single)
        configuration.check_complete(config, hint=configuration.RESTORE)
        adopt(config, find_ranks())
        configuration.check(config)
        configuration.check_modules(config, Path(self.root))
        references = configuration.references(cfg, config)
        remember(config, references)
        # hydra.mode=MULTIRUN, typed or in conf/, equals -m: record it in the command.
        command = self.command if single or {"-m", "--multirun"} & set(self.command) else [*self.command, "-m"]
        supervisor = 0 if single else os.getpid()
        identify_weights(config, Path(self.root))
        job = make_job(config, root=Path(self.root), command=command, supervisor=supervisor, references=references)
        note_run(job.run_dir)
        if finished(job):
            return None if single else value_of(job, HydraConfig.get().sweeper)
        start, environment = ready(job, wants_trace=self.wants_trace)
        sys.stdout.flush()
        sys.stderr.flush()
        if single and not is_waited_for(job):
            hold_interrupts()
            os.execve(start[0], start, environment)  # the same pid: signals, Slurm and torchrun see one process
        if single:
            code, _ = run_job(replace(job, supervisor=os.getpid()), start, environment)
            sys.exit(code if code >= 0 else 128 - code)
        supervise(job, start, environment)
        return value_of(job, HydraConfig.get().sweeper)

    def _evaluate(self, asked: Asked, config: Config, typed: list[str], *, single: bool) -> NoReturn:
        """Become the job that evaluates a run."""
        if not single:
            raise ConfigError(f"{asked.stage}={asked.run} in a sweep (-m)", hint="a command for each run, without -m")
        job = evaluation_job(asked, config, root=Path(self.root), command=self.command, typed=typed)
        remember(job.config, job.references)
        if asked.stage == "predict":
            refuse_unwritable(Path(job.predictions or job.run_dir))
        start, environment = process_of(job)
        if self.wants_trace:
            environment["HYDRA_FULL_ERROR"] = "1"
        sys.stderr.flush()
        hold_interrupts()
        os.execve(start[0], start, environment)


def ready(job: Job, *, wants_trace: bool) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of the process that trains a job, if its folder can be written.

    Raises:
        ConfigError: it cannot be, or the configuration is too large.
    """
    refuse_unwritable(Path(job.run_dir))
    if (near := near_run(job)) is not None:
        sys.stderr.write(
            f"note: the unfinished run {shown(near)} has this configuration, but other code or another environment"
            f" (resume={shown(near)} resumes it)\n"
        )
    command, environment = process_of(job)
    return command, environment | ({"HYDRA_FULL_ERROR": "1"} if wants_trace else {})


def process_of(job: Job) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of the process that trains a job.

    Raises:
        ConfigError: the configuration is too large to pass on.
    """
    config = job.config
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    environment |= determinism.variables(config["determinism"]["mode"], threads=config["determinism"]["threads"])
    environment[JOB_VARIABLE] = job.to_json()
    if len(environment[JOB_VARIABLE].encode()) > MAX_JOB_BYTES:
        raise ConfigError(
            f"the resolved configuration must be at most {MAX_JOB_BYTES} bytes",
            hint="move data from the configuration to a file, and configure its path",
        )
    return [sys.executable, "-m", JOB_MODULE, shown(job.run_dir)], environment


def finished(job: Job) -> bool:
    """Print the result of a complete run; return False if there is something to train."""
    found = receipt.read(Path(job.run_dir))
    if found is None or found["status"] != "complete" or job.origin:
        return False
    if own_rank():
        return True
    if changed := [segment for segment in found["segments"] if segment.get("changed")]:
        names = ", ".join(change["key"] for segment in changed for change in segment["changed"])
        sys.stderr.write(f"warning: {shown(job.run_dir)} was resumed with changes: {names}\n")
    if said := changed_data(job, found):
        sys.stderr.write(f"warning: {said}\n")
    sys.stderr.write(f"{shown(job.run_dir)} is complete: nothing to train (resume=never trains a new run)\n")
    sys.stdout.write(f"{shown(job.run_dir)} {found['results']['weights_digest']}\n")
    return True


def refuse_unwritable(run_dir: Path) -> None:
    """Raise ConfigError if the run's folder cannot be written, before torch is imported."""
    parent = run_dir
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "no write permission" if parent.is_dir() else "not a folder"
        raise ConfigError(
            f"{shown(parent)}: {what}, so the run {shown(run_dir)} cannot be written", hint=f"ls -ld {shown(parent)}"
        )


def run_job(job: Job, command: list[str], environment: dict[str, str]) -> tuple[int, list[int]]:
    """Run a job in its own process; return its exit code and the signals that were forwarded to it."""
    environment = {**environment, JOB_VARIABLE: job.to_json()}
    return run(
        job,
        environment,
        lambda variables, passed: subprocess.Popen(command, env=variables, pass_fds=passed),
        interrupts=False,
    )


def supervise(job: Job, command: list[str], environment: dict[str, str]) -> None:
    """Run one job of a sweep in its own process, with its own environment, rank variables and GPU memory.

    Raises:
        JobFailedError: its exit code is not 0.
    """
    code, caught = run_job(job, command, environment)
    submitted = "SUBMITIT_FOLDER" in os.environ
    failure = code if code >= 0 else 128 - code
    if caught and (code in (0, EXIT_STOPPED) or not submitted):
        # Not an Exception: this ends the sweep (hydra/core/utils.py run_job). Keep another rank's 0: rank 0 may still
        # be delivering.
        sys.exit(failure if failure or own_rank() else 128 + caught[0])
    if not code:
        return
    if submitted:  # submitit stores the error as the job's result, and all ranks would end with 0
        atexit.register(os._exit, failure)
    raise JobFailedError(f"{command[-1]} ended with exit code {code}", failure)
