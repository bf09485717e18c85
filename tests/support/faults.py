"""Makes the k-th call that writes fail, for each k of a short training, and judges what becomes of the training.

::

    python -m tests.support.faults                        every call, every fault: the table of docs/guides/storage.md
    python -m tests.support.faults --kind write --how full --logger csv

faults.c counts the calls. A process that has imported torch is forked for each training, which is `labtrain.launch.job`
from its first line on.
"""

import argparse
import collections
import ctypes
import importlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("faults.c")
# Two epochs of three steps with a validation each; a checkpoint each two steps.
SHORT = ("trainer.max_epochs=2", "+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1",
         "checkpoint.every_n_steps=2", "trainer.devices=1", "data.num_workers=0", "trainer.log_every_n_steps=1")  # fmt: skip
LOGGERS = {"both": ("logger=tensorboard", "+logger.csv={}"), "csv": ("logger=csv",), "none": ("logger=none",)}
EXPECTED = "warning: BatchNorm"  # of the template's model
HOWS = {
    "open": ("ENOSPC", "EDQUOT"),
    "write": ("ENOSPC", "EIO", "EDQUOT", "full", "short", "short+"),
    "sync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "link": ("EIO",),
    "mkdir": ("ENOSPC",),
    "truncate": ("EIO",),
    "close": ("EIO", "EDQUOT"),
}
# What runs leave that nobody asked for.
LEFT = re.compile(r"\.part-[0-9a-f]{8}$|\.new$|\.writing-|\.removing-|\.removed-|/\.training\.|/\.metrics\.csv$")


def build(folder: Path) -> Path:
    """Compile faults.c; return the library."""
    library = folder / "faults.so"
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC").split()[0] or "gcc"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def variables(library: Path, below: Path, **options: object) -> dict[str, str]:
    """Return the environment in which the chosen calls below a folder fail, by the names that faults.c has."""
    found = {"LD_PRELOAD": str(library), "FAULTS_BELOW": str(below.resolve())}
    return found | {f"FAULTS_{name.upper()}": str(value) for name, value in options.items()}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One call that fails: its kind, its number, how, and the path that it was counted on."""

    kind: str
    at: int
    how: str  # with + every later call of this kind too
    path: str = ""
    file: str = ""  # count only calls on paths that this is a part of

    def __str__(self) -> str:
        return f"{self.kind} {self.at} {self.how} {self.path or self.file}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a training ended."""

    code: int
    out: str
    err: str

    @property
    def digest(self) -> str:
        return self.out.split()[-1] if self.out.strip() else ""


JOB = """
import json, os, runpy, sys
def stop(path, command, environment):
    sys.__stdout__.write(json.dumps(environment)); sys.__stdout__.flush(); os._exit(0)
os.execve = stop
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stage_2(experiment: Path, runs: Path, *overrides: str) -> dict[str, str]:
    """Return the environment that stage 1 gives stage 2."""
    command = [sys.executable, "-c", JOB, str(experiment / "train.py"), f"paths.runs={runs}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


class Trainings:
    """Trains one job in processes that are forked from this one, which has LD_PRELOAD and the job's environment.

    Args:
        folder: of the runs and logs.
        job: its JSON, which names `runs`.
        runs: the folder in it, replaced for each training.
    """

    def __init__(self, folder: Path, job: str, runs: str) -> None:
        self.folder, self.job, self.runs = folder, job, runs
        for name in ("launch.job", "training.evaluation", "training.fit"):
            importlib.import_module(f"labtrain.{name}")
        importlib.import_module("sklearn.datasets")  # the template's
        from labtrain.record.installed import files_state
        from labtrain.training.callbacks import recorder

        found = files_state()  # half a second, and the same each time
        recorder.files_state = lambda: found

    def train(self, runs: Path, **faults: object) -> Ended:
        """Train in a process of its own, whose calls below `runs` are counted."""
        for name in [name for name in os.environ if name.startswith("FAULTS_")]:
            del os.environ[name]
        log = runs.with_suffix(".log")
        sys.stdout.flush()
        sys.stderr.flush()
        if (child := os.fork()) == 0:
            self._train(runs, log, faults)
        _, status = os.waitpid(child, 0)
        out, err = (Path(f"{log}.{which}").read_text() for which in ("out", "err"))
        return Ended(code=os.waitstatus_to_exitcode(status), out=out, err=err)

    def _train(self, runs: Path, log: Path, faults: dict[str, object]) -> None:
        from labtrain.launch import job

        code = 99
        try:
            for which, descriptor in (("out", 1), ("err", 2)):
                opened = os.open(f"{log}.{which}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(opened, descriptor)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            os.environ["LABTRAIN_JOB"] = self.job.replace(self.runs, str(runs))
            os.environ |= variables(Path(os.environ["LD_PRELOAD"]), runs, **faults)
            ctypes.CDLL(None).faults_begin()
            sys.argv = ["labtrain.launch.job"]
            job.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)


@dataclass
class Sweep:
    """All faults of one job."""

    trainings: Trainings
    whole: Ended
    trail: bytes
    files: set[str]
    calls: list[tuple[str, int, str]]

    @classmethod
    def of(cls, trainings: Trainings) -> "Sweep":
        """Train once without a fault, and count."""
        runs = trainings.folder / "whole"
        log = trainings.folder / "calls.txt"
        whole = trainings.train(runs, log=log)
        assert whole.code == 0, whole.err
        lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
        calls = [(kind, int(number), without_names(path)) for kind, number, path in lines]
        run_dir = run_in(runs)
        assert run_dir is not None
        assert_trail_first(calls)
        return cls(trainings, whole, (run_dir / "trail.jsonl").read_bytes(), files_in(runs), calls)

    def faults(self, kinds: list[str], hows: list[str], *, distinct: bool) -> Iterator[Fault]:
        """Yield the faults of all calls, or of the first and the last call of each kind on each kind of file."""
        places = collections.defaultdict(list)
        for kind, at, path in self.calls:
            places[kind, path].append(at)
        for kind, at, path in self.calls:
            if distinct and at not in (ends := places[kind, path])[:1] + ends[-1:]:
                continue
            for how in HOWS[kind]:
                if (not kinds or kind in kinds) and (not hows or how in hows):
                    yield Fault(kind=kind, at=at, how=how, path=path)

    def chosen(self, text: str) -> Fault:
        """Return the fault that a text KIND:HOW:FILE chooses: the first call of that kind on such a file, or on any."""
        kind, how, file = text.split(":")
        return Fault(kind=kind, at=1, how=how, file=file)

    def judge(self, fault: Fault) -> tuple[str, list[str]]:
        """Train with a fault, then without; return how it ended and what is wrong with that."""
        runs = self.trainings.folder / "case"
        shutil.rmtree(runs, ignore_errors=True)
        more: dict[str, object] = {"on": 1} if fault.how.endswith("+") else {}  # every later call, too
        more |= {"file": fault.file} if fault.file else {}
        ended = self.trainings.train(runs, kind=fault.kind, at=fault.at, how=fault.how.removesuffix("+"), **more)
        wrong = list(self._wrong_with(ended, runs))
        if ended.code == 0 and not wrong:
            return ("survived, with a warning" if "warning: " in ended.err.replace(EXPECTED, "") else "survived"), []
        again = self.trainings.train(runs)
        if again.code or again.digest != self.whole.digest:
            wrong.append(f"the next start: exit code {again.code}, {again.digest[:12]}\n{again.err[-3000:]}")
        else:
            run_dir = run_in(runs)
            assert run_dir is not None
            if (run_dir / "trail.jsonl").read_bytes() != self.trail:
                wrong.append("another trail")
        if left := {name for name in files_in(runs) - self.files if LEFT.search(name)}:
            wrong.append(f"left: {sorted(left)}")
        how = "survived" if ended.code == 0 else "error" if ended.code == 2 else f"exit code {ended.code}"
        told = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        return ": ".join([how, *told]), [*wrong, *([ended.err[-3000:]] if wrong else [])]

    def _wrong_with(self, ended: Ended, runs: Path) -> Iterator[str]:
        if "Traceback" in ended.err:
            yield "a traceback"
        if ended.code == 0:
            if ended.digest != self.whole.digest:
                yield "other weights"
        elif ended.code != 2:
            yield f"exit code {ended.code}"
        elif [line[:5] for line in ended.err.splitlines() if line.startswith(("error: ", "hint: "))] != [
            "error",
            "hint:",
        ]:
            yield "not one error with a hint"
        run_dir = run_in(runs)
        if run_dir is None or not (run_dir / "receipt.json").exists():
            return
        receipt = json.loads((run_dir / "receipt.json").read_text())
        last = receipt["segments"][-1]
        unclosed = "receipt" in ended.err  # the error or a warning says so
        if ended.code == 2 and not unclosed and (receipt["status"] != "failed" or not last["why"]):
            yield f"the receipt says {receipt['status']}: {last['why']}"
        yield from damaged(run_dir, receipt)


def damaged(run_dir: Path, receipt: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the checkpoints that exist, or that the receipt lists."""
    from labtrain.stores.prune import check
    from labtrain.stores.store import Store

    store = Store(run_dir / "checkpoints")
    found = {checkpoint.name: checkpoint for checkpoint in store.checkpoints() if checkpoint.complete}
    if receipt["status"] != "running" and (
        lost := [each["path"] for each in receipt["checkpoints"] if Path(each["path"]).name not in found]
    ):
        yield f"listed, and not there: {lost}"
    for checkpoint in found.values():
        if said := check(checkpoint):
            yield f"{checkpoint.name}: {said}"


def assert_trail_first(calls: list[tuple[str, int, str]]) -> None:
    """The trail, and its name in the run's folder, are on the disk before a checkpoint's manifest is made."""
    order = [(kind, path) for kind, _, path in calls]
    manifests = [at for at, call in enumerate(order) if call == ("open", "/checkpoints/step.writing/manifest.json")]
    assert manifests
    assert ("sync", "/") in order[order.index(("open", "/trail.jsonl")) : manifests[0]], "no name after a power cut"
    for number, at in enumerate(manifests, start=1):
        assert order[:at].count(("sync", "/trail.jsonl")) >= number, "the trail is not on the disk before a checkpoint"


def run_in(runs: Path) -> Path | None:
    return next((path for path in runs.glob("*/*") if path.is_dir()), None)


def files_in(runs: Path) -> set[str]:
    return {str(path.relative_to(runs)) for path in runs.rglob("*")}


def without_names(path: str) -> str:
    """Return a path without what differs between two trainings, as a name of a kind of file."""
    path = re.sub(r"^/[^/]+/[0-9a-f]{12}", "", path)
    path = re.sub(r"writing-[0-9a-f]+", "writing", path)
    path = re.sub(r"step-\d+", "step", path)
    path = re.sub(r"\.part-[0-9a-f]{8}$", ".part", path)
    path = re.sub(r"/\.tmp\w+$", "/weights.safetensors", path)
    path = re.sub(r"(removing|removed)-[0-9a-f]+|\.writer\.json\.[0-9a-f]+$", r"\1", path)
    return re.sub(r"events.out.tfevents.*", "events", path) or "/"


def made_in(folder: Path) -> Path:
    """Make an experiment in a folder, and return its own."""
    from tests.conftest import make_experiment

    make_experiment(folder / "digits", author="a test")
    return folder / "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", default=[], choices=HOWS)
    parser.add_argument("--how", action="append", default=[])
    parser.add_argument("--logger", default="both", choices=LOGGERS)
    parser.add_argument("--experiment", type=Path)
    parser.add_argument("--server", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    parser.add_argument(
        "--choose", action="append", default=[], help="KIND:HOW:FILE: the first such call on a path with FILE in it"
    )
    parser.add_argument("--part", default="0/1", help="i/n: each n-th fault, from the i-th")
    parser.add_argument("--distinct", action="store_true", help="the first and the last call of each kind and file")
    parser.add_argument("--calls", action="store_true", help="only list the calls")
    options = parser.parse_args()
    if options.server:
        serve(options)
        return
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = Path(scratch).resolve()
        experiment = options.experiment or made_in(folder)
        environment = stage_2(experiment.resolve(), folder / "RUNS", *SHORT, *LOGGERS[options.logger])
        environment |= {"LD_PRELOAD": str(build(folder))}
        more = ["--server", str(folder), "--runs", str(folder / "RUNS")]
        command = [sys.executable, "-m", "tests.support.faults", *sys.argv[1:], *more]
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


def serve(options: argparse.Namespace) -> None:
    sweep = Sweep.of(Trainings(options.server, os.environ["LABTRAIN_JOB"], options.runs))
    if options.calls:
        for kind, number, path in sweep.calls:
            print(kind, number, path)
        return
    table: collections.Counter[tuple[str, str, str]] = collections.Counter()
    wrong, begun = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    part, parts = map(int, options.part.split("/"))
    faults = sweep.faults(options.kind, options.how, distinct=options.distinct)
    if options.choose:
        faults = map(sweep.chosen, options.choose)
    for fault in itertools.islice(faults, part, None, parts):
        how, found = sweep.judge(fault)
        table[fault.kind, fault.how, how.partition(": ")[0]] += 1
        wrong += bool(found)
        print(f"{'WRONG' if found else 'ok'}: {fault}: {how}", *found, sep="\n  ", flush=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime - begun.ru_utime + ended.ru_stime - begun.ru_stime
    for key, number in sorted(table.items()):
        print(*key, number)
    print(f"{sum(table.values())} faults, {wrong} wrong, {seconds:.0f} s of CPU time")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
