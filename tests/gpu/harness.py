"""Runs checks, each in processes of its own and with a time limit, and reports them as a table and as JSON. No torch."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
NO_TIME = "no time left"
TIGHT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
LEAST_S = 2.0  # a check that would have less than this time is left out


class LeftOutError(Exception):
    """A check cannot run on this machine; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to see.

    Attributes:
        name: on the command line and in the table.
        shows: what is true if it passes.
        run: MODULE:FUNCTION; it gets a `Place` and returns a figure in words, or raises an error.
        limit_s: after this time the check and all its processes are killed.
        gpus: how many GPUs it needs; 0: a CPU can stand in for the GPU.
        alone: nothing else may run, because it measures or fills the GPU.
    """

    name: str
    shows: str
    run: str
    limit_s: float = 120
    gpus: int = 0
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a check runs.

    Attributes:
        device: cuda or cpu.
        folder: of its own; removed afterwards.
    """

    device: str
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def accelerator(self) -> str:
        """As Lightning names it."""
        return "gpu" if self.on_gpu else "cpu"

    def child(self, name: str) -> Path:
        """Make a folder in it."""
        (made := self.folder / name).mkdir(parents=True)
        return made


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a check: `figure` holds its figure, its error, or why it was left out."""

    name: str
    shows: str
    result: str
    figure: str
    seconds: float


def run_here(check: Check, place: Place, answer: Path) -> None:
    """Run a check in this process, and write its result and its figure."""
    module, _, name = check.run.partition(":")
    try:
        found = PASSED, str(getattr(importlib.import_module(module), name)(place))
    except LeftOutError as error:
        found = LEFT_OUT, str(error)
    except BaseException as error:
        words = "\n".join(str(error).strip().splitlines()[-40:])
        found = FAILED, f"{type(error).__name__}: {words}" if words else type(error).__name__
        sys.excepthook(type(error), error, error.__traceback__)
    answer.write_text(json.dumps(found))


class Session:
    """One run of some checks.

    Args:
        checks: in order of importance.
        facts: about the machine: `facts.py`.
        source: the module whose CHECKS they are.
        budget_s: for all of them; what does not fit is left out.
        jobs: how many checks run at once, unless they must be alone.
    """

    def __init__(
        self, checks: Sequence[Check], facts: dict[str, Any], *, source: str, budget_s: float, jobs: int
    ) -> None:
        self.checks, self.facts, self.source, self.jobs = checks, facts, source, jobs
        self.ends = time.monotonic() + budget_s
        self.printing = threading.Lock()

    def run(self) -> list[Outcome]:
        """Run all checks, first those that may run beside others; return what came of them, in their order."""
        found: dict[str, Future[Outcome]] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            found |= {each.name: pool.submit(self._one, each) for each in self.checks if not each.alone}
        with ThreadPoolExecutor(1) as pool:
            found |= {each.name: pool.submit(self._one, each) for each in self.checks if each.alone}
        return [found[each.name].result() for each in self.checks]

    def _one(self, check: Check) -> Outcome:
        began, left_s = time.monotonic(), self.ends - time.monotonic()
        if check.gpus > (have := len(self.facts["gpus"])):
            result, figure = LEFT_OUT, f"needs {'a GPU' if check.gpus == 1 else f'{check.gpus} GPUs'}, found {have}"
        elif left_s < LEAST_S:
            result, figure = LEFT_OUT, NO_TIME
        else:
            result, figure = self._in_a_child(check, min(check.limit_s, left_s))
        seconds = round(time.monotonic() - began, 1)
        with self.printing:
            sys.stderr.write(f"{result:<8} {check.name} ({seconds} s)\n")
            if result == FAILED:
                sys.stderr.write(textwrap.indent(figure, "    ") + "\n")
        return Outcome(name=check.name, shows=check.shows, result=result, figure=figure, seconds=seconds)

    def _in_a_child(self, check: Check, limit_s: float) -> tuple[str, str]:
        """Run a check in a process, and end all processes that it leaves behind."""
        with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
            answer, log = Path(scratch, "answer.json"), Path(scratch, "log.txt")
            command = [sys.executable, "-m", "tests.gpu", "--checks", self.source, "--run", check.name, scratch]
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
            variables = {**os.environ, **TIGHT, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                         "XDG_STATE_HOME": f"{scratch}/state", "PYTHONHASHSEED": "0",
                         "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for a GPU leaves a process that may fork
                         "LABTRAIN_GPU_CHECKS_ON": "cuda" if self.facts["gpus"] else "cpu"}  # fmt: skip
            with log.open("w") as file:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True
                )
            timed_out = False
            try:
                child.wait(limit_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            said = log.read_text(errors="replace")
            if timed_out:
                return (FAILED, f"killed after {limit_s:.0f} s") if limit_s >= check.limit_s else (
                    LEFT_OUT, f"{NO_TIME}: killed after {limit_s:.0f} s"
                )  # fmt: skip
            if not answer.exists():
                return FAILED, f"its process ended with {child.returncode}\n{said[-3000:]}"
            result, figure = json.loads(answer.read_text())
            return result, figure


def find_facts() -> dict[str, Any]:
    """Return the machine's facts, from a process of its own: this one holds no memory of a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.facts"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise SystemExit(f"error: torch does not load:\n{done.stderr}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def table(outcomes: Iterable[Outcome], facts: dict[str, Any], seconds: float) -> str:
    """Return the report as lines of text."""
    rows = list(outcomes)
    names = ", ".join(each["name"] for each in facts["gpus"]) or "no GPU: on the CPU, what a CPU can stand in for"
    versions = "  ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    lines = [names, versions, ""]
    for each in rows:
        first, *others = each.figure.splitlines() or [""]
        lines.append(f"{each.name:<28}{each.result:<10}{each.seconds:>6.1f} s  {first}")
        lines += [f"{'':<48}{line}" for line in others] if each.result == FAILED else []
    counts = ", ".join(f"{sum(row.result == kind for row in rows)} {kind}" for kind in (PASSED, FAILED, LEFT_OUT))
    late = sum(row.figure.startswith(NO_TIME) for row in rows)
    more = [f"incomplete: no time for {late} checks; --budget SECONDS gives them more"] if late else []
    return "\n".join([*lines, "", f"{counts}, in {seconds:.0f} s", *more]) + "\n"


def as_json(outcomes: Iterable[Outcome], facts: dict[str, Any], seconds: float) -> str:
    """Return the report as JSON."""
    checks = [asdict(each) for each in outcomes]
    return json.dumps({**facts, "checks": checks, "seconds": round(seconds)}, indent=1, ensure_ascii=False) + "\n"
