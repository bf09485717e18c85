"""Starts all processes of a training again after one died: by SIGKILL, out of memory, by an exception. No torch.

Stage 1 stays as the parent of a training on several devices of this machine. Rank 0 tells it in shared memory (Beacon)
how far the training is. The ranks save what they can before they end (training/callbacks/kept.py). Under torchrun and
Slurm these start the ranks again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from labtrain.base.console import shown, warn
from labtrain.base.errors import LabtrainError, in_words
from labtrain.base.signals import WRITER_NAME, adopting_orphans, block, children_of, forwarding, interrupts_held
from labtrain.record import receipt
from labtrain.record.identity import JOB_MODULE, JOB_VARIABLE, Job
from labtrain.record.ranks import RESTARTED, Beacon, find_ranks
from labtrain.training.callbacks.watcher import hint

Start = Callable[[Mapping[str, str], tuple[int, ...]], subprocess.Popen[bytes]]

SAVE_S = 60  # how long a rank may take to save its copy, after rank 0 died
REAP_S = 1
POLL_S = 0.02
# A process that died by one of these was asked to stop.
ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


@dataclass(kw_only=True)
class _Deaths:
    """The deaths of a training at one step."""

    step: int = -1
    count: int = 0
    killed: int = 0  # how many were by a signal

    def add(self, step: int, *, killed: bool) -> None:
        if step != self.step:
            self.step, self.count, self.killed = step, 0, 0
        self.count += 1
        self.killed += killed


class _Current:
    """The process that trains now, which gets the signals."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def send_signal(self, sig: int, /) -> None:
        if self.process is not None:
            self.process.send_signal(sig)


def is_waited_for(job: Job) -> bool:
    """Return whether a process waits for the end of a job's process.

    If so, the job trains in several processes of this machine, without a launcher. If rank 0 dies, the waiting process
    starts all processes again, or says why the training has ended.
    """
    alone = job.config["trainer"]["devices"] in (1, "1") or len(_listed(job)) == 1
    failures = job.config["failures"]
    asked = failures["max_restarts"] > 0 or failures["hang_seconds"] is not None
    return not job.evaluate and not alone and find_ranks() is None and asked


def may_restart(job: Job) -> bool:
    """Return whether a job is a training whose processes are started again."""
    return is_waited_for(job) and job.config["failures"]["max_restarts"] > 0


def run(
    job: Job,
    environment: dict[str, str],
    start: Start,
    *,
    interrupts: bool,
    watch: Callable[[subprocess.Popen[bytes]], int] = subprocess.Popen.wait,
) -> tuple[int, list[int]]:
    """Run a job's process to its end, and start it again if one of its ranks died.

    Args:
        job: what it trains.
        environment: of the process.
        start: starts it, from its environment and file descriptors to pass on.
        interrupts: whether to forward Ctrl-C.
        watch: returns its exit code.

    Returns:
        its exit code, negative if a signal killed it, and the signals that were forwarded.
    """
    block()
    waits, restarts, current, deaths = is_waited_for(job), may_restart(job), _Current(), _Deaths()
    with forwarding(current, interrupts=interrupts) as caught, adopting_orphans() if restarts else nullcontext():
        while True:
            beacon, descriptor = Beacon.make()
            passed = {**environment, Beacon.VARIABLE: str(descriptor)} if waits else environment
            try:
                with interrupts_held():
                    current.process = start(passed, (descriptor,) if waits else ())
            finally:
                os.close(descriptor)
            code = _wait(current.process, watch)
            why = _why(beacon, code) if waits else ""
            if restarts:
                _end_ranks(job, spared=beacon.heir if why else 0)
            if why and caught:
                return -caught[0], caught  # it was asked to stop while it waited for the end of the others
            killed = code < 0 or beacon.code > 128
            if not why or not restarts or not _goes_on(job, beacon, deaths, killed=killed):
                return _ended(job, beacon, code, why, again=deaths.count > 1), caught
            environment = _again(job, environment, why, fewer=deaths.killed > 1)


def _ended(job: Job, beacon: Beacon, code: int, why: str, *, again: bool) -> int:
    """Return the exit code of a training that does not start again; if rank 0 could not say why it ended, say it.

    Args:
        job: that ended.
        beacon: of its last start.
        code: its exit code.
        why: how a rank died; empty if none did.
        again: whether a rank had died at the same step before.
    """
    if why and code < 0:
        if beacon.hung:
            sys.stderr.write(f"error: {LabtrainError(why, hint=hint(shown(job.run_dir)))}\n")
        try:
            receipt.explain_killed(Path(job.run_dir), why)
        except (OSError, LabtrainError) as error:
            warn(f"{shown(job.run_dir)}: the receipt could not be closed: {in_words(error)}")
    if beacon.hung and why:
        return 1
    return (beacon.code or code) if again else code


def _wait(child: subprocess.Popen[bytes], watch: Callable[[subprocess.Popen[bytes]], int]) -> int:
    try:
        return watch(child)
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _why(beacon: Beacon, code: int) -> str:
    """Return how a rank died; empty if nothing died that a restart could help."""
    if code < 0 and -code not in ASKED:
        return beacon.why or f"rank 0 was killed by {signal.Signals(-code).name}"
    return beacon.why if code > 0 else ""


def _goes_on(job: Job, beacon: Beacon, deaths: _Deaths, *, killed: bool) -> bool:
    """Count a death; return whether to start again."""
    if not killed and beacon.step <= beacon.begun:
        return False  # an exception before the first step of this start comes again
    deaths.add(beacon.step if beacon.step >= 0 else deaths.step, killed=killed)
    most = job.config["failures"]["max_restarts"]
    if deaths.count > most:
        sys.stderr.write(
            f"warning: {shown(job.run_dir)}: died {deaths.count} times at step {max(deaths.step, 0)}: no further"
            f" restart (failures.max_restarts={most})\n"
        )
    return deaths.count <= most


def _again(job: Job, environment: dict[str, str], why: str, *, fewer: bool) -> dict[str, str]:
    """Return the environment of the next start, and print why there is one."""
    trainer = job.config["trainer"]
    devices = trainer["devices"]
    if fewer and job.config["failures"]["elastic"] and isinstance(devices, int):
        trainer["devices"] = max(1, devices - 1)  # each process needs memory
    sys.stderr.write(f"warning: {shown(job.run_dir)}: {why}: labtrain starts all processes again\n")
    sys.stderr.flush()
    return {**environment, JOB_VARIABLE: job.to_json(), RESTARTED: why}


def _end_ranks(job: Job, *, spared: int) -> None:
    """End the ranks of a job that this process has adopted, and their loader workers.

    Args:
        job: that they trained.
        spared: a rank that may save its copy first.
    """
    deadline_s, seen = time.monotonic() + SAVE_S, set[int]()
    while ranks := {child for child in children_of(os.getpid()) if _trains(child, job)}:
        seen |= ranks
        for rank in ranks if time.monotonic() > deadline_s else ranks - {spared}:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        time.sleep(POLL_S)
    ended_s = time.monotonic() + REAP_S  # a process that ends has no command any more
    while (seen := {each for each in seen if not _reaped(each)}) and time.monotonic() < ended_s:
        time.sleep(POLL_S)


def _reaped(process: int) -> bool:
    try:
        return os.waitpid(process, os.WNOHANG)[0] == process
    except ChildProcessError:
        return True


def _trains(process: int, job: Job) -> bool:
    """Return whether a process is a rank of a job; the process that writes its checkpoints ends by itself."""
    with suppress(OSError):
        if Path(f"/proc/{process}/comm").read_text().strip() == WRITER_NAME:
            return False
        return {JOB_MODULE, shown(job.run_dir)} <= {*Path(f"/proc/{process}/cmdline").read_text().split("\0")}
    return False


def _listed(job: Job) -> list[int]:
    devices = job.config["trainer"]["devices"]
    return devices if isinstance(devices, list) else []
