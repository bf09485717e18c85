"""`labtrain.train(cfg)` in a script or a notebook: start the training's own process, and return its result. No torch.

The process is the one that train.py becomes (job.py), so the run has the same name and the same bits, and train.py
resumes it. Training in the calling process cannot promise that. torch is often imported there already, without
the variables that make it deterministic. Modules may be older than their files. And Lightning's strategies for
notebooks are not exact.
"""

import copy
import dataclasses
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from codecs import getincrementaldecoder
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

from labtrain.base import errors, exact_json
from labtrain.base.console import shown, warn
from labtrain.base.contracts import Options, as_options
from labtrain.base.credentials import remember
from labtrain.base.errors import ConfigError, JobFailedError, LabtrainError, in_words, where
from labtrain.base.permissions import close_umask
from labtrain.base.signals import Stopped, block
from labtrain.checkpoints.initial import identify_weights
from labtrain.launch.compose import ready
from labtrain.launch.evaluation import asked_in
from labtrain.launch.experiment import composed_at
from labtrain.launch.restarts import run
from labtrain.record import config as configuration
from labtrain.record import receipt
from labtrain.record.identity import ORDERED, Config, Job, enclosing
from labtrain.record.ranks import adopt, find_ranks
from labtrain.record.receipt import Result, result_of
from labtrain.record.resume import changed_data, make_job
from labtrain.record.sources import texts_in

POLL_S = 0.1


def train(cfg: object) -> Result:
    """Train the run that a configuration describes and return its result; return a complete run's result at once.

    The training has a process of its own, which prints here. So the run has the same id and the same bits as that of
    `python train.py` with the same configuration, on any number of devices, and that command resumes it. The code is
    read again in each call: a changed model.py gives another run. Ctrl-C saves and stops the training.

    Args:
        cfg: from `labtrain.compose`, or another configuration from Hydra (a DictConfig or a dict). Its experiment is
            then the nearest folder with a train.py, from the script's folder or the working directory upwards. A Job,
            and a model that the script itself defines (`__main__.Net`), are trained in this process.

    Raises:
        LabtrainError: it cannot be trained, or the training failed.
        Stopped: a signal came, such as Ctrl-C. The state is saved, and the same call resumes.
    """
    close_umask()
    if isinstance(cfg, Job):
        from labtrain.training.fit import train as train_here

        return train_here(cfg)
    job = _job(cfg)
    remember(job.config, job.references)
    done = receipt.read(Path(job.run_dir))
    if done is not None and done["status"] == "complete" and not job.origin:
        if changed := changed_data(job, done):
            warn(changed)
        return result_of(Path(job.run_dir), done["results"])
    return train(job) if _main_classes(job.config) else _train_apart(job)


def _job(cfg: object) -> Job:
    """Check a configuration and name its run."""
    from omegaconf import DictConfig, OmegaConf

    is_composed = isinstance(cfg, DictConfig)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True) if is_composed else cfg
    except Exception as error:
        raise configuration.explain(error) or error from None
    if not isinstance(plain, Mapping):
        raise ConfigError(f"labtrain.train({cfg!r}): must be a configuration, a mapping", hint=configuration.COMPOSE)
    config = configuration.completed(cast(Config, copy.deepcopy(dict(plain))))
    if (asked := asked_in(config)) is not None:
        raise ConfigError(
            f"labtrain.train: {asked.stage}={asked.run} evaluates a run and trains nothing",
            hint=f"python train.py {asked.stage}={asked.run}; labtrain.load({asked.run!r}) returns its model",
        )
    configuration.check_whole(config)
    adopt(config, find_ranks())
    configuration.check(config)
    root, path = _place(cfg)
    if not _has_file() and config["determinism"]["mode"] != "off":
        _refuse_classes_of_no_file(config, root)
    configuration.check_modules(config, root)
    references = configuration.references(cfg, config) if isinstance(cfg, DictConfig) else ()
    identify_weights(config, root)
    importlib.invalidate_caches()  # a cell may have written a module
    return make_job(config, root=root, command=[], supervisor=os.getpid(), references=references, path=path)


def _place(cfg: object) -> tuple[Path, list[str]]:
    """Return the experiment's folder, and the module search path after it.

    For a configuration of `compose` that is the path of `python train.py`: without the folder of this script, or the
    working directory of a notebook.
    """
    from omegaconf import DictConfig

    here = Path(str(_main_file())).resolve().parent if _has_file() else Path.cwd()
    if not isinstance(cfg, DictConfig) or (root := composed_at(cfg)) is None:
        return enclosing(here) or here, sys.path[:]
    is_scripts = _has_file() and sys.path[:1] == [str(here)]
    return root, [entry for entry in sys.path[1 if is_scripts else 0 :] if entry]


def _main_file() -> str | None:
    import __main__

    return getattr(__main__, "__file__", None)


def _has_file() -> bool:
    """Return whether this process runs a script; a notebook has no file."""
    return (file := _main_file()) is not None and Path(file).exists()


def _main_classes(config: Config) -> list[str]:
    """Return the classes in a configuration that the script or the notebook itself defines."""
    texts = texts_in([as_options(config)[group] for group in ORDERED])
    return [text for text in texts if text.startswith("__main__.")]


def _refuse_classes_of_no_file(config: Config, root: Path) -> None:
    """Raise ConfigError for a class in a notebook's cell: a run's name needs code that is in a file."""
    for text in _main_classes(config):
        own = root / "own.py"
        raise ConfigError(
            f"{text} is defined in the notebook: the run's name includes its code, but no file contains this class",
            hint=f"%%writefile {own if root != Path.cwd() else own.name} as the first line of its cell, then"
            f" _target_: own.{text.removeprefix('__main__.')}",
        )


def _train_apart(job: Job) -> Result:
    """Train a job in its own process, and show what it prints.

    The process is not in the terminal's process group. So Ctrl-C, which some notebooks also send to all processes of
    their group, reaches it once, from here: a second one would end it unsaved.
    """
    job = dataclasses.replace(job, answers=True)
    command, environment = ready(job, wants_trace=os.environ.get("HYDRA_FULL_ERROR") == "1")
    if environment.get("MPLBACKEND", "").startswith("module://matplotlib_inline"):
        del environment["MPLBACKEND"]  # ipykernel's
    is_shown = sys.stderr is sys.__stderr__  # else it is a notebook's, or another stream of Python's
    with tempfile.TemporaryFile() as answer:
        mask = block()

        def start(variables: Mapping[str, str], passed: tuple[int, ...]) -> subprocess.Popen[bytes]:
            answer.seek(0)
            answer.truncate()  # what a process that is started again has answered
            return subprocess.Popen(
                command, env=variables, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=answer,
                stderr=None if is_shown else subprocess.PIPE, process_group=0,
            )  # fmt: skip

        try:
            code, caught = run(job, environment, start, interrupts=True, watch=_watch)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        answer.seek(0)
        return _taken(answer.read().decode(), job, code, caught)


def _watch(child: subprocess.Popen[bytes]) -> int:
    """Show what a child prints, and return its exit code."""
    if child.stderr is not None:
        _show(child, child.stderr)
    return child.wait()


def _show(child: subprocess.Popen[bytes], printed: IO[bytes]) -> None:
    """Print what a child prints, until it ends; its own children may keep the stream open."""
    decode = getincrementaldecoder("utf-8")("replace").decode
    while True:
        ended = child.poll() is not None  # before asking: what it printed at the end is still read
        if select.select([printed], [], [], 0 if ended else POLL_S)[0]:
            if not (data := os.read(printed.fileno(), 1 << 16)):
                return
            sys.stderr.write(decode(data))
            sys.stderr.flush()
        elif ended:
            return


def answer(out: IO[str], outcome: Result | BaseException) -> None:
    """Tell the calling process how a training ended; called in the training's process."""
    said: Options
    match outcome:
        case Result():
            said = {"run_dir": str(outcome.run_dir), "metrics": outcome.metrics,
                    "weights_digest": outcome.weights_digest, "steps": outcome.steps}  # fmt: skip
        case Stopped():
            said = {"signal": outcome.signum, "saved": outcome.saved}
        case LabtrainError():
            said = {"error": type(outcome).__name__, "text": outcome.args[0], "hint": outcome.hint}
        case _:
            said = {"error": "JobFailedError", "text": f"{in_words(outcome)}{where(outcome.__traceback__)}", "hint": ""}
    out.write(exact_json.dumps(said))
    out.flush()


def _taken(text: str, job: Job, code: int, caught: list[int]) -> Result:
    """Return the result that a training's process told, or raise what it raised."""
    said = exact_json.loads(text) if text else {}
    if "error" in said:
        kind = getattr(errors, said["error"], LabtrainError)
        error: LabtrainError = kind.__new__(kind)
        LabtrainError.__init__(error, said["text"], hint=said["hint"])
        raise error
    if caught or "signal" in said:
        raise Stopped(said.get("signal") or caught[0], saved=said.get("saved", "run_dir" in said))
    if "run_dir" in said:
        return Result(**said | {"run_dir": Path(said["run_dir"])})
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    failed = JobFailedError(f"{shown(job.run_dir)}: the training's process {how}", code if code >= 0 else 128 - code)
    failed.hint = "the same call resumes it from its newest checkpoint"
    raise failed
