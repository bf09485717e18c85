"""Train several runs of a sweep at once, each on GPUs of its own: `-m hydra/launcher=parallel`. No torch.

Each job is a fork of the sweep's process, which composes the job's configuration and supervises its training, as in any
sweep. https://hydra.cc/docs/1.3/advanced/plugins/develop/
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from labtrain.base.errors import ConfigError
from labtrain.base.nvml import NoDriverError, nvml
from labtrain.base.signals import NUMBERS, block, end_with_parent, unblock

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        number: its number in the sweep.
        said: its overrides.
        gpus: how many GPUs it needs; 0: it trains on the CPU.
        run: composes and trains it.
    """

    number: int
    said: str
    gpus: int
    run: Callable[[], "JobReturn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A job that is being trained, and what it occupies."""

    job: SweepJob
    process: BaseProcess
    gpus: list[str]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that a training here would see: of CUDA_VISIBLE_DEVICES, else all numbers."""
    if (named := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        with nvml() as library:
            return [str(number) for number in range(library.nvmlDeviceGetCount())]
    except NoDriverError:
        return []


def gpus_of(accelerator: object, devices: object, there: int) -> int:
    """Return how many GPUs a job needs.

    Args:
        accelerator: its `trainer.accelerator`.
        devices: its `trainer.devices`.
        there: how many GPUs this machine has.

    Raises:
        ConfigError: it names GPUs, which the sweep has to choose, or needs more than there are.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not there):
        return 0
    if not isinstance(devices, int | str) or (isinstance(devices, str) and not devices.isdigit() and devices != "auto"):
        raise ConfigError(
            f"trainer.devices={devices}: hydra/launcher=parallel chooses the GPUs of each run",
            hint=f"trainer.devices=1; {VISIBLE}=0,1 limits the sweep to these GPUs",
        )
    needed = there if devices in ("auto", -1) else int(str(devices))
    if needed > there:
        raise ConfigError(f"trainer.devices={devices}: this machine has {there} GPUs", hint="trainer.devices=1")
    return needed


def run_all(jobs: Sequence[SweepJob], *, most: int | None) -> list["JobReturn"]:
    """Run the jobs and return their results in order.

    If a job ends its process, because its configuration is wrong or a signal stopped it, no other job starts. The
    running ones come to their end, and this process ends with the job's exit code.

    Args:
        jobs: they start in this order.
        most: how many may run at once; None: as many as have GPUs, or one at a time without GPUs.
    """
    block()
    running: dict[Connection, Running] = {}
    codes: list[int] = []

    def forward(number: int, _frame: object) -> None:
        codes.append(128 + number)
        for each in running.values():
            if number != signal.SIGINT and each.process.pid is not None:  # a terminal sends Ctrl-C to all of them
                os.kill(each.process.pid, number)

    before = {number: signal.signal(number, forward) for number in NUMBERS}
    try:
        results = _run(list(jobs), running, codes, most=most)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if codes:
        sys.exit(codes[0])
    return [result for _, result in sorted(results.items()) if result is not None]


def _run(
    waiting: list[SweepJob], running: dict[Connection, Running], codes: list[int], *, most: int | None
) -> "dict[int, JobReturn | None]":
    """Run the waiting jobs; return their results by number. Exit codes that end the sweep are added to `codes`."""
    free = visible_gpus()
    limit = most if most is not None else max(1, len(free))
    results: dict[int, JobReturn | None] = {}
    while running or (waiting and not codes):
        while waiting and not codes and len(running) < limit and waiting[0].gpus <= len(free):
            job = waiting.pop(0)
            gpus, free = free[: job.gpus], free[job.gpus :]
            connection, process = _start(job, gpus)
            running[connection] = Running(job=job, process=process, gpus=gpus)
        unblock()
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            ended = running[ready]
            results[ended.job.number] = _result(ready)
            ended.process.join()
            free += running.pop(ready).gpus
            if results[ended.job.number] is None:
                codes.append(ended.process.exitcode or 1)
        block()
    return results


def _start(job: SweepJob, gpus: list[str]) -> tuple[Connection, BaseProcess]:
    """Start a job's process; copy its lines to standard error, each with the job's number."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    lines, end = os.pipe()
    where = f" on GPU {', '.join(gpus)}" if gpus else ""
    sys.stderr.write(f"#{job.number}{where}: {job.said}\n")
    sys.stderr.flush()
    process = context.Process(target=_work, args=(job, gpus, sender, end))
    process.start()
    sender.close()
    os.close(end)
    threading.Thread(target=_copy, args=(lines, job.number), daemon=True).start()
    return receiver, process


def _work(job: SweepJob, gpus: list[str], sender: Connection, end: int) -> None:
    end_with_parent(os.getppid(), signal.SIGTERM)
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    os.dup2(end, 2)
    if gpus:
        os.environ[VISIBLE] = ",".join(gpus)
    sender.send(job.run())


def _copy(lines: int, number: int) -> None:
    with os.fdopen(lines, errors="replace") as file:
        for line in file:
            sys.stderr.write(f"#{number} {line}")


def _result(receiver: Connection) -> "JobReturn | None":
    """Return what a job sent; None if its process ended without a result."""
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        return None
    finally:
        receiver.close()
