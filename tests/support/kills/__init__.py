"""Kill trainings of the matrix's models at random moments, and compare each end with a run that nothing befell.

    python -m tests.support.kills --seed 0 --until 1000 --state .tmp/kills.json

Each run is started again and again, on 1 to 3 processes, and gets SIGKILL until it is complete. A file holds what was
found after each run, so the same command goes on where it was ended. It prints each run, and then the sum.

The processes are forked from one that has imported torch and Lightning (exact_worker.py), with the code's digests
computed once: a start takes one CPU second instead of six. So imports, stage 1, Lightning's launcher and a supervisor
that starts ranks again are not in it; benchmarks/failures.py kills whole starts.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing.forkserver as zygote
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from labtrain.base.files import write_atomically
from labtrain.record.sources import read_code
from tests.support import exact_worker
from tests.support.exact import Runner, configure, outcome
from tests.support.processes import stat, writer_of

EPOCHS, STEPS = 30, 140  # of a run; an epoch has four to five
CASES = [
    ("mlp", "even", "32-true"), ("cnn", "uneven", "32-true"), ("gpt", "clipped", "32-true"),
    ("mlp", "uneven", "bf16-mixed"), ("cnn", "batch of 11", "bf16-mixed"), ("gpt", "validated in between", "bf16-mixed"),
    ("mlp", "ends in between", "32-true"), ("cnn", "validated in between", "32-true"), ("gpt", "uneven", "32-true"),
]  # fmt: skip
VICTIMS = ("rank", "rank", "all", "writer")
AT_THE_END = 3  # kills after the last step; then the run may end


def configuration(number: int) -> Any:
    """Return the configuration of the so many-th case."""
    model, shape, precision = CASES[number % len(CASES)]
    config = configure(model, shape, precision)
    config["trainer"] |= {"max_steps": STEPS} if shape == "ends in between" else {"max_epochs": EPOCHS}
    return config


@cache
def code_of(model: str) -> Any:
    """Return the digests of the code that a model depends on."""
    config = next(config for config in map(configuration, range(len(CASES))) if config["model"]["_target_"] == model)
    code = read_code(Path("none"), config)
    assert code.digest  # computed once, before the processes are forked
    return code


for number in range(len(CASES)):
    code_of(configuration(number)["model"]["_target_"])


def work(config: dict[str, Any], *arguments: Any) -> None:
    """Train as exact_worker does, with the code's digests of the first process; fork the writer as job.py does."""
    for name, module in list(sys.modules.items()):
        if name.startswith("labtrain.") and getattr(module, "read_code", None) is read_code:
            vars(module)["read_code"] = lambda root, config, **_: code_of(config["model"]["_target_"])
    with contextlib.suppress(ImportError):
        importlib.import_module("labtrain.checkpoints.beside").fork()
    exact_worker.work(config, *arguments)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, of the one that forks, and of all that it has forked."""
    forking = stat(zygote._forkserver._forkserver_pid)[11:15]  # type: ignore[attr-defined]
    return time.process_time() + sum(map(int, forking)) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------------- kills


@dataclass
class Killer:
    """Kills one start of a run: after some of its steps and a part of one more, or at any moment from its beginning.

    Attributes:
        draw: of victims and moments.
        folder: of the runner.
        steps: of the whole run.
        writers: whether a rank's oldest child is its writer; with a loader's workers nobody can tell.
        kills: of each victim; "writer" is among them where there was one.
        at_the_end: kills after the last step.
    """

    draw: random.Random
    folder: Path
    steps: int
    writers: bool = True
    kills: dict[str, int] = field(default_factory=dict)
    at_the_end: int = 0
    thread: threading.Thread | None = None
    first_step_s: float = 1.0

    def begin(self, pids: list[int]) -> None:
        ranks = [os.pidfd_open(pid) for pid in pids]
        self.thread = threading.Thread(target=self.work, args=(ranks, pids))
        self.thread.start()

    def join(self) -> int:
        """Wait for the thread, and return how many kills there have been so far."""
        assert self.thread is not None
        self.thread.join()
        return sum(self.kills.values())

    def trail(self) -> Path:
        return next(self.folder.glob("runs/*/*/trail.jsonl"), self.folder / "no such file")

    def work(self, ranks: list[int], pids: list[int]) -> None:
        try:
            while self.wait(ranks) and self.kill(ranks, pids) == "writer":
                pass
        finally:
            for rank in ranks:
                os.close(rank)

    def wait(self, ranks: list[int]) -> bool:
        """Wait for the moment of a kill; False: all have ended before, or the run may end."""
        began = time.monotonic()
        if self.draw.random() < 0.15:
            return self.ends_within(ranks, self.draw.uniform(0, 1.2 * self.first_step_s))
        path, lines = self.trail(), 0
        with contextlib.suppress(OSError):
            lines = path.read_bytes().count(b"\n")
        wanted = self.draw.randint(1, 5)
        if last := self.steps - lines <= wanted:
            if self.at_the_end == AT_THE_END:
                return False
            self.at_the_end += 1
        wanted, grown, size, before = max(1, min(wanted, self.steps - lines)), 0, -1, began
        step_s = 0.05
        while grown < wanted:
            if not self.ends_within(ranks, 0.002):
                return False
            if not path.exists():
                path = self.trail()
            with contextlib.suppress(OSError):
                now = path.stat().st_size
                if now > size >= 0:
                    grown += 1
                    step_s, before = time.monotonic() - before, time.monotonic()
                    if grown == 1:
                        self.first_step_s = before - began
                size = now
            if last and time.monotonic() - began > 20 * self.first_step_s:
                break  # all steps were done before this start
        return self.ends_within(ranks, self.draw.uniform(0, 0.5 if last else 1.5 * min(step_s, 0.2)))

    @staticmethod
    def ends_within(ranks: list[int], seconds: float) -> bool:
        """Wait; return whether all ranks still live after that."""
        return not select.select(ranks, [], [], seconds)[0]

    def kill(self, ranks: list[int], pids: list[int]) -> str:
        victim, found = self.draw.choice(VICTIMS), None
        if victim == "writer":
            found = writer_of(pids[0]) if self.writers else None
            victim = "writer" if found else "all"
        with contextlib.suppress(ProcessLookupError):
            if found is not None:
                os.kill(found, signal.SIGKILL)
            else:
                for rank in ranks if victim == "all" else [self.draw.choice(ranks)]:
                    signal.pidfd_send_signal(rank, signal.SIGKILL)
            self.kills[victim] = self.kills.get(victim, 0) + 1
        return victim


# ----------------------------------------------------------------------------------------------------------------- runs


@cache
def reference(case: int) -> dict[str, Any]:
    """Return what a case comes to on one process that nothing befell."""
    with tempfile.TemporaryDirectory() as folder:
        return outcome(Runner(Path(folder), work=work, preload=__name__).run(configuration(case)))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of what differs, and the first step of the trail that does."""
    names = [name for name in expected if found.get(name) != expected[name]]
    if "trail" in names:
        pairs = zip(found["trail"], expected["trail"], strict=False)
        names.append(f"trail from {next((b['step'] for a, b in pairs if a != b), 'its end')}")
    return names


def left_behind(folder: Path) -> list[str]:
    """Return the files of a complete run that it should not have."""
    runs = [path for run in folder.glob("runs/*/*") for path in [*run.iterdir(), *run.glob("checkpoints/*")]]
    known = {".lock", "receipt.json", "trail.jsonl", "history.jsonl", "config.yaml", "checkpoints", "code.patch"}
    return sorted(
        path.name
        for path in runs
        if (path.name not in known and not path.name.startswith("step-")) or ".writing-" in path.name
    )


def one_run(seed: int, number: int, folder: Path) -> dict[str, Any]:
    """Train one run to its end, however often it is killed, and return what was found."""
    draw = random.Random(f"{seed} {number}")
    config, expected = configuration(number), reference(number % len(CASES))
    workers = draw.choice([0, 0, 0, 2])
    config["data"]["num_workers"] = workers
    config["checkpoint"] |= {"every_n_steps": draw.choice([1, 2, 3, None]), "keep_last": draw.choice([1, 2])}
    killer = Killer(draw, folder, expected["steps"], writers=not workers)
    runner = Runner(folder, work=work, preload=__name__, begun=killer.begin)
    began, cpu, starts, in_vain, error, run_dir = time.monotonic(), cpu_seconds(), 0, 0, "", None
    while run_dir is None and not error:
        starts, before = starts + 1, sum(killer.kills.values())
        try:
            run_dir = runner.run(config, world=draw.choice([1, 1, 1, 2, 2, 3]), code=None)
        except AssertionError as late:
            error = str(late)[-2000:]
        in_vain = in_vain + 1 if run_dir is None and killer.join() == before else 0
        if in_vain == 3:
            error = f"ended by itself three times: {runner.said()[-2000:]}"
    killer.join()
    return {
        "run": number,
        "case": CASES[number % len(CASES)],
        "code": code_of(config["model"]["_target_"]).digest[:12],
        "starts": starts,
        "kills": killer.kills,
        "differences": differences(outcome(run_dir), expected) if run_dir else [],
        "error": error,
        "left": left_behind(folder),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(cpu_seconds() - cpu, 1),
    }


def kills_of(runs: list[dict[str, Any]]) -> int:
    return sum(sum(run["kills"].values()) for run in runs)


def main() -> None:
    """Go on until there were enough kills."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=int, default=1000, help="kills")
    parser.add_argument("--state", type=Path, required=True)
    asked = parser.parse_args()
    state = json.loads(asked.state.read_text()) if asked.state.exists() else {"seed": asked.seed, "runs": []}
    assert state["seed"] == asked.seed, f"{asked.state} has the runs of seed {state['seed']}"
    while kills_of(state["runs"]) < asked.until:
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        found = one_run(asked.seed, len(state["runs"]), folder)
        if found["differences"] or found["error"]:
            found["folder"] = str(folder)  # stays, to be looked at
        else:
            shutil.rmtree(folder)
        state["runs"].append(found)
        write_atomically(asked.state, json.dumps(state, indent=1) + "\n")
        sys.stdout.write(f"{json.dumps(found)}\n")
        sys.stdout.flush()
    runs = state["runs"]
    bad = [run["run"] for run in runs if run["differences"] or run["error"]]
    victims = {name: sum(run["kills"].get(name, 0) for run in runs) for name in ("rank", "all", "writer")}
    seconds, cpu = (sum(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
    sys.stdout.write(
        f"{kills_of(runs)} kills {victims} in {len(runs)} runs and {sum(run['starts'] for run in runs)} starts:"
        f" {len(bad)} runs differ or failed {bad}; {seconds / 60:.0f} minutes,"
        f" {cpu / max(1, kills_of(runs)):.1f} CPU seconds a kill\n"
    )
    sys.exit(bool(bad))
