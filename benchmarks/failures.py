"""What failures cost: goodput of labtrain, of Lightning with a restart loop, and of a DDP loop under torchrun.

All train benchmarks/failing/task.py on two gloo processes, one thread each, and save each 25 steps. A failure comes
every 100 to 200 steps: SIGKILL for a random rank, for all ranks, for the process that writes checkpoints, and in even
seeds a disk that is full for some seconds, in odd ones a store (S3) that is away for some seconds. Each way of training
gets the failures of a seed at the same steps; whatever ends is started again at once, by the same command. Before each
comes a training of the same kind without failures.

goodput      seconds from the first step to the last without failures, over the same with failures
steps lost   that were trained again
stalled      seconds from the last step before a failure to the next step that was new

The disk is a file system of its own in a file, which needs root; without root there is no such failure. For S3 a server
is started from .servers (`make servers`). Prints a table, and writes results-failures.json beside this file after each
seed. A try in a few minutes: `python benchmarks/failures.py --steps 120 --seeds 1`.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.support.processes import writer_of  # noqa: E402
from tests.support.servers import S3  # noqa: E402

from labtrain.record.config import CONF  # noqa: E402
from labtrain.record.provenance import machine  # noqa: E402

EVERY = 25  # steps between two saves
GAP = 100  # the least steps between two failures; the most are twice as many
AWAY = 2 * EVERY  # steps whose time a disk is full, and a store away: two saves
DISK_MB = 256
FRUITLESS = 8  # starts in a row without a new step; then a training counts as failed
LIMIT_S = 1800
EXTRAPOLATED_S = 45 * 60  # between two failures
HABIT_S = 10 * 60  # a common interval between two saves
WAYS = ("labtrain", "Lightning and a loop", "DDP and torchrun")
KILLS = ("rank", "all", "writer")


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure: at this step, when it is done for the first time, and so many seconds later."""

    step: int
    kind: str
    later_s: float


def schedule(seed: int, steps: int) -> list[Failure]:
    """Return the failures of a seed: each kind once, in any order, before one comes again."""
    draw = random.Random(seed)
    kinds = [*KILLS, "store" if seed % 2 else "disk"]
    least, step, found = min(GAP, steps // 4), 0, list[Failure]()
    while (step := step + draw.randint(least, 2 * least)) < steps:
        if len(found) % len(kinds) == 0:
            order = draw.sample(kinds, len(kinds))
        found.append(Failure(step, order[len(found) % len(kinds)], draw.uniform(0, 0.1)))
    return found


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Place:
    """Where a training saves: a folder of its own, or a bucket of a server, and what can be taken away there."""

    folder: Path
    server: S3 | None = None
    is_disk: bool = False
    away_s: float = 0.0  # how long something is taken away
    back: list[tuple[float, Callable[[], object]]] = field(default_factory=list)  # what comes back, and when

    def take(self, kind: str) -> bool:
        """Fill the disk or stop the server for `away_s` seconds; False: there is none."""
        if kind == "store" and self.server is not None:
            self.server.kill()
            self.back.append((time.time() + self.away_s, self.server.start))
            return True
        if kind == "disk" and self.is_disk:
            filler = self.folder / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                for size in (1 << 20, 1 << 12):
                    with suppress(OSError):
                        while file.write(bytes(size)):
                            pass
            self.back.append((time.time() + self.away_s, filler.unlink))
            return True
        return False

    def give_back(self, *, now: bool = False) -> None:
        """Give back what has been away for long enough."""
        for due, come_back in [each for each in self.back if now or each[0] <= time.time()]:
            self.back.remove((due, come_back))
            come_back()


class Training:
    """One training in one way, from its first start to its end, whatever befalls it.

    Args:
        way: one of WAYS.
        steps: how many.
        failures: what befalls it.
        place: where it saves.
        name: of the folder or of the prefix for its files.
    """

    def __init__(self, way: str, steps: int, failures: list[Failure], place: Place, name: str) -> None:
        self.way, self.steps, self.failures, self.place = way, steps, list(failures), place
        self.folder = place.folder / name
        self.folder.mkdir()
        self.logs = Path(tempfile.mkdtemp(prefix="steps-"))
        self.command, self.environment = self._command(f"s3://lab/{name}" if place.server else str(self.folder))
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                            "STEP_LOG": str(self.logs / "step"), **(place.server.variables() if place.server else {}),
                            **self.environment}  # fmt: skip
        self.lines: list[tuple[float, int, int]] = []  # rank 0's: time, step, process
        self.happened: list[tuple[float, Failure, bool]] = []  # when, what, and whether there was anything to fail
        self.starts = 0
        self.read = 0
        self.digest = ""

    def _command(self, place: str) -> tuple[list[str], dict[str, str]]:
        python = sys.executable
        plain = ["plain.py", "ddp" if self.way == WAYS[2] else "lightning", str(self.steps), str(EVERY), place]
        if self.way == WAYS[1]:
            return [python, *plain], {}
        if self.way == WAYS[2]:
            launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=100", "--standalone"]
            # Else processes that are started again find the addresses of those that are gone, and may wait for half an
            # hour: torch 2.9, elastic/rendezvous/dynamic_rendezvous.py.
            return [python, *launch, *plain], {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        remote = [f"checkpoint.url={place}"] if self.place.server else []
        if "\nfailures:" in (CONF / "labtrain.yaml").read_text():
            remote.append("failures.max_restarts=100")
        return [python, "ours.py", f"paths.runs={self.folder}/runs", f"trainer.max_steps={self.steps}", "logger=none",
                f"checkpoint.every_n_steps={EVERY}", *remote], {}  # fmt: skip

    def run(self) -> "Training":
        """Start it until it is complete.

        Raises:
            RuntimeError: it does not get there.
        """
        try:
            self._run()
        except BaseException:
            self._end_all()
            raise
        return self

    def _run(self) -> None:
        began, fruitless, code = time.time(), 0, -1
        while code:
            self.starts, before = self.starts + 1, self.reached()
            with (self.logs / "output").open("ab") as output:
                process = subprocess.Popen(
                    self.command, stdout=output, stderr=output, env=self.environment, cwd=HERE / "failing"
                )
            while process.poll() is None:
                self._look()
                time.sleep(0.005)
                if time.time() - began > LIMIT_S:
                    raise RuntimeError(f"{self.way}: step {self.reached()} after {LIMIT_S} s\n{self.said()}")
            self._look()
            code = process.returncode
            if code and self.way != WAYS[0]:  # labtrain's ranks end with the first; its writer goes on
                self._end_all()
            fruitless = fruitless + 1 if self.reached() == before else 0
            if fruitless == FRUITLESS:
                raise RuntimeError(f"{self.way}: step {self.reached()} after {self.starts} starts\n{self.said()}")
        self.place.give_back(now=True)
        self.digest = self.said().split()[-1]

    def said(self) -> str:
        """Return the end of what it printed."""
        return (self.logs / "output").read_text(errors="replace")[-4000:]

    def reached(self) -> int:
        """Return the last step that was done."""
        return max((step for _, step, _ in self.lines), default=0)

    def _look(self) -> None:
        """Read which steps were done, and let the next failure happen if it is time."""
        self.place.give_back()
        with suppress(FileNotFoundError), Path(f"{self.logs}/step-0").open("rb") as file:
            file.seek(self.read)
            whole = file.read().rpartition(b"\n")[0]  # a line may be seen before its end
            for line in whole.splitlines():
                moment, step, pid = line.split()
                self.lines.append((float(moment), int(step), int(pid)))
            self.read += len(whole) + 1 if whole else 0
        if self.failures and self.reached() >= self.failures[0].step:
            failure = self.failures.pop(0)
            time.sleep(failure.later_s)
            now = time.time()
            self.happened.append((now, failure, self._fail(failure)))

    def _fail(self, failure: Failure) -> bool:
        ranks = self._ranks()
        if failure.kind not in KILLS:
            return self.place.take(failure.kind)
        if failure.kind == "writer":
            writer = writer_of(ranks[0])
            doomed = [] if writer is None else [writer]
        else:
            doomed = ranks if failure.kind == "all" else [ranks[failure.step % len(ranks)]]
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(doomed)

    def _ranks(self) -> list[int]:
        """Return the processes that did the last steps."""
        last = [path.read_text().splitlines()[-1:] for path in sorted(self.logs.glob("step-*"))]
        return [int(line.split()[2]) for lines in last for line in lines]

    def _end_all(self) -> None:
        """Kill what is left of a start, as schedulers do."""
        mark = f"STEP_LOG={self.logs}/".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def clean(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.folder)
        shutil.rmtree(self.logs)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def span(lines: list[tuple[float, int, int]], steps: int) -> float:
    """Return the seconds from the first step to the first time that the last one was done."""
    return next(moment for moment, step, _ in lines if step == steps) - lines[0][0]


def costs(lines: list[tuple[float, int, int]], happened: list[tuple[float, Failure, bool]]) -> list[dict[str, Any]]:
    """Return what each failure cost, until the next one: steps done again, and the longest time without a new step."""
    found = []
    for number, (moment, failure, real) in enumerate(happened):
        until = happened[number + 1][0] if number + 1 < len(happened) else float("inf")
        reached = max(step for at, step, _ in lines if at <= moment)
        before = max(at for at, step, _ in lines if at <= moment)
        lost, stalled = 0, 0.0
        for at, step, _ in lines:
            if moment < at <= until:
                if step <= reached:
                    lost += 1
                else:
                    stalled, before, reached = max(stalled, at - before), at, step
        cost = {"steps_lost": lost, "stalled_s": round(stalled, 2)}
        found.append({"kind": failure.kind, "step": failure.step, "real": real, **cost})
    return found


def save_cost(lines: list[tuple[float, int, int]]) -> float:
    """Return how many seconds longer the steps after a save take, in a training without failures: by medians."""
    took: dict[int, list[float]] = {}
    for (before, _, _), (moment, step, _) in itertools.pairwise(lines):
        if step > EVERY:
            took.setdefault((step - 1) % EVERY, []).append(moment - before)
    medians = [statistics.median(took[place]) for place in sorted(took)]
    usual = statistics.median(medians[EVERY // 2 :])
    return max(0.0, sum(median - usual for median in medians[: EVERY // 2]))


def extrapolated(restart_s: float, losing: float, save_s: float, interval_s: float | None = None) -> float:
    """Return the goodput at a failure each EXTRAPOLATED_S.

    1 - (restart + losing * interval / 2) / EXTRAPOLATED_S - save / interval

    Args:
        restart_s: seconds that a failure stops the training, without the steps that are done again.
        losing: the share of the failures after which steps are done again: on average those of half an interval.
        save_s: seconds that a save costs.
        interval_s: between two saves; None: the best, (2 * save * EXTRAPOLATED_S / losing) ** 0.5 (J. W. Young: A
            first order approximation to the optimum checkpoint interval. CACM 17(9), 1974).
    """
    if interval_s is None:
        interval_s = max(1.0, (2 * save_s * EXTRAPOLATED_S / losing) ** 0.5) if losing else float(EXTRAPOLATED_S)
    return 1 - (restart_s + losing * interval_s / 2) / EXTRAPOLATED_S - save_s / interval_s


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one way of training from those of its seeds."""
    failures = [failure for row in rows for failure in row["failures"] if failure["real"]]
    kills = [failure for failure in failures if failure["kind"] in ("rank", "all")]
    restarts = [max(0.0, kill["stalled_s"] - kill["steps_lost"] * row["step_s"]) for row in rows
                for kill in row["failures"] if kill["kind"] in ("rank", "all")]  # fmt: skip
    losing = statistics.mean(kill["steps_lost"] > 1 for kill in kills)
    restart_s, save_s = statistics.mean(restarts), statistics.median(row["save_s"] for row in rows)
    return {
        "goodput": sum(row["useful_s"] for row in rows) / sum(row["all_s"] for row in rows),
        "failures": len(failures),
        "steps_lost": statistics.mean(failure["steps_lost"] for failure in failures),
        "stalled_s": statistics.median(failure["stalled_s"] for failure in failures),
        "after_a_kill_s": statistics.median(kill["stalled_s"] for kill in kills),
        "cost_of_a_failure_s": sum(row["all_s"] - row["useful_s"] for row in rows) / len(failures),
        "restart_s": restart_s,
        "losing": losing,
        "save_s": save_s,
        "step_s": statistics.median(row["step_s"] for row in rows),
        "at_45_minutes": extrapolated(restart_s, losing, save_s),
        "at_45_minutes_saving_each_10": extrapolated(restart_s, losing, save_s, HABIT_S),
        "same_digest": sum(row["same_digest"] for row in rows),
        "runs": len(rows),
    }


# ---------------------------------------------------------------------------------------------------------------- main


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system on a folder, for root; yield whether it is one."""
    folder.mkdir()
    image = folder.with_name("disk.img")
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    make = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)]
    mount = ["mount", "-o", "loop", str(image), str(folder)]
    try:
        for command in (make, mount):
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"note: no disk of its own, so none gets full: {error}\n")
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def measure(way: str, steps: int, seed: int, place: Place) -> dict[str, Any]:
    """Train once without failures and once with them."""
    name = f"{seed}-{WAYS.index(way)}"
    whole = Training(way, steps, [], place, f"{name}-whole").run()
    useful, step_s, save_s = span(whole.lines, steps), span(whole.lines, steps) / (steps - 1), save_cost(whole.lines)
    if not place.server:
        whole.clean()
    place.away_s = AWAY * step_s
    failing = Training(way, steps, schedule(seed, steps), place, f"{name}-failing").run()
    found: dict[str, Any] = {
        "seed": seed,
        "useful_s": round(useful, 2),
        "all_s": round(span(failing.lines, steps), 2),
        "step_s": round(step_s, 4),
        "save_s": round(save_s, 4),
        "starts": failing.starts,
        "same_digest": failing.digest == whole.digest,
        "digests": [whole.digest, failing.digest],
        "failures": costs(failing.lines, failing.happened),
    }
    failing.clean()
    for failure in found["failures"]:
        if not failure["real"]:
            sys.stderr.write(f"note: {way}: nothing to fail for {failure['kind']} at step {failure['step']}\n")
    return found


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    head = f"{'':22}{'goodput':>8}{'lost':>6}{'stalled':>9}{'a kill':>8}{'a save':>8}{'step':>8}{'45 min':>8}"
    print(f"{head}{'same digest':>13}")
    for way, row in found.items():
        print(
            f"{way:22}{row['goodput']:8.3f}{row['steps_lost']:6.1f}{row['stalled_s']:7.1f} s"
            f"{row['after_a_kill_s']:6.1f} s{row['save_s']:6.2f} s{1e3 * row['step_s']:5.0f} ms"
            f"{row['at_45_minutes']:8.4f}{row['same_digest']:8} of {row['runs']}"
        )


def main() -> None:
    """Measure each seed and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--write", type=Path, default=HERE / "results-failures.json")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running or mounted
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    schedules = {seed: [asdict(failure) for failure in schedule(seed, asked.steps)] for seed in range(asked.seeds)}
    folder = Path(tempfile.mkdtemp(prefix="failures-"))
    tempfile.tempdir = str(folder)
    server = S3(folder / "s3") if asked.seeds > 1 else None
    try:
        with disk(folder / "disk") as is_disk:
            for seed in range(asked.seeds):
                if server and seed % 2:
                    server.start()
                    server.make_bucket() if seed == 1 else None
                place = Place(folder, server) if seed % 2 else Place(folder / "disk", is_disk=is_disk)
                for way in WAYS[seed % 3 :] + WAYS[: seed % 3]:
                    rows[way].append(measure(way, asked.steps, seed, place))
                    sys.stderr.write(f"seed {seed}, {way}: {json.dumps(rows[way][-1])}\n")
                if server and seed % 2:
                    server.kill()
                found = {way: summary(rows[way]) for way in WAYS}
                results = {
                    "summary": found,
                    "seeds": rows,
                    "schedules": schedules,
                    "steps": asked.steps,
                    "every": EVERY,
                    "cpu": machine()["cpu"],
                    "python": platform.python_version(),
                }
                asked.write.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        if server:
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)
    show(found)


if __name__ == "__main__":
    main()
