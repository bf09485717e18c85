"""Makes the k-th request to a store fail, for each k of a short training, and judges what becomes of the training.

::

    python -m tests.support.store_faults                         all of it: the table of docs/guides/storage.md
    python -m tests.support.store_faults --choose "s3:resumed:LIST:1:stale new"

Stories: fresh: a run that has nothing yet; resumed: its folder is lost, and it goes on from the store; spool: the disk
fails below the run's spool (faults.c); ls, check: `labtrain store`; large: one checkpoint that S3 gets in parts.
bad_store.py stands before the real servers. A process that has imported torch is forked for each training, which is
`labtrain.launch.job` from its first line on.
"""

import argparse
import collections
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.bad_store import S3_HOWS, BadS3, BadSFTP, Fault
from tests.support.faults import (
    EXPECTED,
    HOWS,
    Ended,
    Trainings,
    build,
    files_in,
    made_in,
    run_in,
    stage_2,
    without_names,
)
from tests.support.servers import S3, SFTP

MARK = "s3://lab/THE-PLACE"  # in the job, replaced for each training
SHORT = ("trainer.max_epochs=1", "+trainer.limit_train_batches=4", "+trainer.limit_val_batches=1",
         "checkpoint.every_n_steps=1", "checkpoint.keep_last=2", "checkpoint.deliver_seconds=8", "trainer.devices=1",
         "data.num_workers=0", "logger=none", f"checkpoint.url={MARK}")  # fmt: skip
STORIES = {"s3": ("fresh", "resumed", "ls", "check", "large", "spool"),
           "sftp": ("fresh", "resumed", "ls", "check", "spool")}  # fmt: skip
TIMES = {"once": "", "again": "*", "ever": "+"}
LARGE = 20_000_000  # bytes: three parts


class Forks:
    """A process without threads that forks the trainings and the commands."""

    def __init__(self, folder: Path, experiment: Path) -> None:
        environment = stage_2(experiment.resolve(), folder / "RUNS", *SHORT)
        environment |= {"LD_PRELOAD": str(build(folder)), "AWS_EC2_METADATA_DISABLED": "true"}
        command = [sys.executable, "-m", "tests.support.store_faults", "--forks", str(folder)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: object) -> Ended:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(folder: Path) -> None:
    """Do what the lines of standard input ask for."""
    for name in ("s3fs", "aiobotocore.session", "paramiko", "fsspec.implementations.sftp", "labtrain.cli"):
        __import__(name)
    job = os.environ["LABTRAIN_JOB"]
    trainings = Trainings(folder, job, str(folder / "RUNS"))
    for line in sys.stdin:
        request = json.loads(line)
        os.environ |= request["environment"]
        if "command" in request:
            ended = command(folder, request["command"])
        else:
            trainings.job = job.replace(MARK, request["url"])
            ended = trainings.train(Path(request["runs"]), **request["faults"])
        print(json.dumps({"code": ended.code, "out": ended.out, "err": ended.err}), flush=True)


def command(folder: Path, arguments: list[str]) -> Ended:
    """Run the command `labtrain`."""
    from labtrain.cli import main as labtrain

    files = folder / "command.out", folder / "command.err"
    if (child := os.fork()) == 0:
        code = 99
        try:
            for descriptor, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            sys.argv = ["labtrain", *arguments]
            labtrain(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else bool(error.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return Ended(code=os.waitstatus_to_exitcode(status), out=files[0].read_text(), err=files[1].read_text())


class S3Place:
    """A real S3 server and a bad one before it; each case has a prefix of its own."""

    def __init__(self, folder: Path) -> None:
        self.server = S3(folder / "s3")
        self.server.start()
        self.server.make_bucket()
        self.bad = BadS3(self.server.port)
        self.variables = {**self.server.variables(), "AWS_ENDPOINT_URL": self.bad.endpoint}
        os.environ |= self.server.variables()
        self.hows, self.root = S3_HOWS, "s3://lab"

    def through(self, name: str) -> str:
        return f"{self.root}/{name}"

    directly = through

    def _fs(self) -> Any:
        from labtrain.stores.store import Store

        return Store(self.root).fs

    def files(self, name: str) -> dict[str, bytes]:
        """Return what is in the store."""
        fs = self._fs()
        return {path.removeprefix(f"lab/{name}/"): fs.cat_file(path) for path in fs.find(f"lab/{name}")}

    def fill(self, name: str, files: dict[str, bytes]) -> None:
        fs = self._fs()
        for path, data in files.items():
            fs.pipe_file(f"lab/{name}/{path}", data)

    def close(self) -> None:
        self.bad.close()
        self.server.kill()


class SFTPPlace:
    """A real SFTP server and a bad one before it; each case has a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.server = SFTP(folder / "sftp")
        self.server.folder.mkdir()
        self.server.start()
        self.bad = BadSFTP(self.server.port)
        known = self.server.home / ".ssh" / "known_hosts"
        known.write_text(known.read_text() + known.read_text().replace(str(self.server.port), str(self.bad.port)))
        self.variables = {"HOME": str(self.server.home)}
        os.environ |= self.variables
        self.hows = {"PACKET": ("reset", "lost")}

    def through(self, name: str) -> str:
        return self.directly(name).replace(f":{self.server.port}/", f":{self.bad.port}/")

    def directly(self, name: str) -> str:
        return f"{self.server.url}/{name}"

    def files(self, name: str) -> dict[str, bytes]:
        top = self.server.data / name
        return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}

    def fill(self, name: str, files: dict[str, bytes]) -> None:
        for path, data in files.items():
            (self.server.data / name / path).parent.mkdir(parents=True, exist_ok=True)
            (self.server.data / name / path).write_bytes(data)

    def close(self) -> None:
        self.bad.close()
        self.server.kill()


@dataclass
class Story:
    """All faults of one story.

    Attributes:
        kept: what is in the store when a case begins.
        written, removed: bytes of what a stale listing lacks of that, and has besides that, by path.
        trail, whole_trail: of the run without a fault, and of one that was not resumed.
        told: what a command without a fault prints.
    """

    forks: Forks
    place: S3Place | SFTPPlace
    name: str
    folder: Path
    kept: dict[str, bytes] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    calls: list[tuple[str, int, str]] = field(default_factory=list)
    digest: str = ""
    trail: bytes = b""
    whole_trail: bytes = b""
    told: str = ""
    number: int = 0

    def begin(self) -> None:
        """Do it once without a fault."""
        if self.name not in ("fresh", "spool", "large"):
            self.kept = self._kept()
        log = self.folder / "calls.txt"
        ended, runs, store = self._do(None, {"file": "/spool/", "log": str(log)} if self.name == "spool" else {})
        self.calls = list(self.place.bad.judge.calls)
        if self.name == "spool":
            lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
            self.calls = [(kind, int(number), without_names(path)) for kind, number, path in lines]
        assert ended.code == 0, ended.err
        self.digest, self.told = ended.digest, ended.out.replace(store, "X")
        if (run_dir := run_in(runs)) is not None:
            self.trail = (run_dir / "trail.jsonl").read_bytes()
            self.whole_trail = self.whole_trail or self.trail

    def _kept(self) -> dict[str, bytes]:
        """Return what a run leaves in the store; to go on from, without its last checkpoint."""
        runs = self.folder / "before"
        ended = self.forks.ask(
            runs=str(runs), url=self.place.through("before"), faults={}, environment=self.place.variables
        )
        assert ended.code == 0, ended.err
        run_dir = run_in(runs)
        assert run_dir is not None
        self.whole_trail = (run_dir / "trail.jsonl").read_bytes()
        shutil.rmtree(runs)
        files = self.place.files("before")
        newest = max(re.findall(r"step-\d+", " ".join(files)))
        self.written = {path: len(data) for path, data in files.items() if newest in path}
        if self.name != "resumed":
            return files
        self.removed = self.written
        kept = {path: data for path, data in files.items() if path not in self.removed}
        self.written = {path: len(data) for path, data in kept.items() if "/step-" in path}
        return kept

    def _do(self, fault: Fault | None, faults: dict[str, object]) -> tuple[Ended, Path, str]:
        """Do it anew; return how it ended, its runs and the name of its place."""
        self.number += 1
        store, runs = f"{self.name}-{self.number}", self.folder / "case"
        shutil.rmtree(runs, ignore_errors=True)
        self.place.fill(store, self.kept)
        self.place.bad.begin(fault)
        if isinstance(self.place, S3Place):
            self.place.bad.sizes |= {f"{store}/{path}": size for path, size in self.written.items()}
            self.place.bad.sizes |= {f"{store}/{path}": -size for path, size in self.removed.items()}
        if self.name == "large":
            ended = self._deliver(store)
        elif self.name in ("ls", "check"):
            ended = self.forks.ask(
                command=["store", self.name, self.place.through(store)], environment=self.place.variables
            )
        else:
            ended = self._train(runs, store, faults)
        return ended, runs, store

    def _train(self, runs: Path, store: str, faults: dict[str, object]) -> Ended:
        url = self.place.through(store)
        return self.forks.ask(runs=str(runs), url=url, faults=faults, environment=self.place.variables)

    def _deliver(self, store: str) -> Ended:
        """Deliver a checkpoint that has several parts, from a spool, as a training does."""
        from labtrain.stores.delivery import Delivery
        from labtrain.stores.store import Store
        from tests.real.stores.test_store import made

        spool, token = Store(self.folder / "large"), "0123456789abcdef"
        shutil.rmtree(spool.root, ignore_errors=True)
        spool.renew(token, seen=None)
        Store(self.place.directly(store)).renew(token, seen=None)
        manifest = made(Path(spool.root, "step-0000000001"), 1, LARGE)
        spool.commit("step-0000000001", manifest)
        before, os.environ["AWS_ENDPOINT_URL"] = (
            os.environ["AWS_ENDPOINT_URL"],
            self.place.variables["AWS_ENDPOINT_URL"],
        )
        try:
            delivery = Delivery(spool, Store(self.place.through(store)), token=token, spool_bytes=1 << 40)
            delivery.add("step-0000000001", manifest)
            done = delivery.wait(120)
            delivery.stop()
        finally:
            os.environ["AWS_ENDPOINT_URL"] = before
        return Ended(code=0 if done else 2, out="", err="" if done else f"error: {delivery.trouble}\nhint: ")

    def faults(self, *, distinct: bool, on: list[str]) -> Iterator[Fault]:
        """Yield the faults of all requests, or of the first and the last of each kind and path."""
        places = collections.defaultdict(list)
        for kind, at, path in self.calls:
            places[kind, general(path)].append(at)
        for kind, at, path in self.calls:
            if distinct and at not in (ends := places[kind, general(path)])[:1] + ends[-1:]:
                continue
            hows = HOWS if self.name == "spool" else self.place.hows
            for how in hows[kind]:
                for more in ("",) if self.name == "spool" else on:
                    yield Fault(kind=kind, at=at, how=f"{how}{more}", path=path)

    def judge(self, fault: Fault) -> tuple[str, list[str]]:
        """Do it with a fault, then without; return how it ended and what is wrong with that."""
        disk: dict[str, object] = {}
        if self.name == "spool":
            disk = {"kind": fault.kind, "at": fault.at, "how": fault.how.removesuffix("+"), "file": "/spool/"}
            disk |= {"on": 1} if fault.how.endswith("+") else {}
        ended, runs, store = self._do(None if disk else fault, disk)
        reached = self.place.bad.judge.made > 0 or bool(disk)
        self.place.bad.begin(None)
        if self.name in ("ls", "check"):
            wrong = list(wrong_with_exit(ended))
            printed = ended.out.replace(store, "X").splitlines()
            lacks = fault.how.startswith("stale new")  # it cannot show what an old listing lacks
            if (
                ended.code == 0
                and printed != self.told.splitlines()
                and not (lacks and printed and set(printed) <= set(self.told.splitlines()))
            ):
                wrong.append(f"it prints\n{ended.out}")
        else:
            wrong = self._wrong_with(ended, runs, store, fault.how)
        if self.name == "large":
            return ("survived" if ended.code == 0 else ended.err), wrong
        how = "survived" if ended.code == 0 else "error" if ended.code == 2 else f"exit code {ended.code}"
        if ended.code == 0 and "warning: " in ended.err.replace(EXPECTED, ""):
            how = "survived, with a warning"
        told = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        return ": ".join([how if reached else "not reached", *told]), [*wrong, *([ended.err[-3000:]] if wrong else [])]

    def _wrong_with(self, ended: Ended, runs: Path, store: str, how: str) -> list[str]:
        wrong = list(wrong_with_exit(ended))
        if ended.code == 0 and ended.digest != self.digest:
            wrong.append("other weights")
        wrong += wrong_with_run(run_in(runs), ended)
        wrong += damaged(self.place.directly(store))
        if self.name != "large" and (ended.code or wrong or "stale" in how):
            again = self._train(runs, store, {})
            if again.code or again.digest != self.digest:
                wrong.append(f"the next start: exit code {again.code}, {again.digest[:12]}\n{again.err[-3000:]}")
            wrong += damaged(self.place.directly(store))
        if (run_dir := run_in(runs)) is not None:
            trail = (run_dir / "trail.jsonl").read_bytes()
            if not self.whole_trail.endswith(trail) or not trail.endswith(self.trail):
                wrong.append("another trail")
            if waits := [
                name for name in files_in(run_dir) if name.startswith("spool/") and name != "spool/.writer.json"
            ]:
                wrong.append(f"in the spool: {waits}")
            wrong += self._wrong_in_store(store, run_dir, how)
        return wrong

    def _wrong_in_store(self, store: str, run_dir: Path, how: str) -> Iterator[str]:
        """Yield how the store differs from what the receipt of a complete run lists, and what nobody needs there."""
        found = {name.removeprefix(f"{run_dir.name}/"): data for name, data in self.place.files(store).items()}
        manifests = {name.partition("/")[0]: json.loads(data)
                     for name, data in found.items() if name.endswith("/manifest.json") and data}  # fmt: skip
        listed = {Path(each["path"]).name for each in json.loads((run_dir / "receipt.json").read_text())["checkpoints"]}
        if listed - manifests.keys() or (listed != manifests.keys() and "stale" not in how):
            yield f"listed {sorted(listed)}, in the store {sorted(manifests)}"
        for name, data in found.items():
            folder, _, file = name.partition("/")
            known = file.rpartition(".")[2] and any(
                file.endswith(each) for each in manifests.get(folder, {}).get("files", ())
            )
            small = folder.startswith(".writer.json")  # of a start that has ended; the next one writes over it
            if data and file != "manifest.json" and not known and not small and "stale" not in how:
                yield f"left in the store: {name}"


def general(path: str) -> str:
    """Return a path as a name of a kind of request."""
    path = re.sub(r"(fresh|resumed|ls|check|large|before)-?\d*/", "", path)
    path = re.sub(r"[0-9a-f]{12,64}", "", path)
    return re.sub(r"step-\d+(\.\d+)?|uploadId=[^&]*", "", path)


def wrong_with_exit(ended: Ended) -> Iterator[str]:
    if "Traceback" in ended.err:
        yield "a traceback"
    lines = [line.partition(": ")[0] for line in ended.err.splitlines() if line.startswith(("error: ", "hint: "))]
    if ended.code not in (0, 2):
        yield f"exit code {ended.code}"
    elif ended.code == 2 and lines != ["error", "hint"]:
        yield "not one error with a hint"
    elif ended.code == 0 and "error" in lines:
        yield "an error, and exit code 0"


def wrong_with_run(run_dir: Path | None, ended: Ended) -> Iterator[str]:
    """Yield what is wrong with the receipt, and with the checkpoints that it lists."""
    if run_dir is None or not (run_dir / "receipt.json").exists():
        return
    receipt = json.loads((run_dir / "receipt.json").read_text())
    last = receipt["segments"][-1]
    if ended.code == 2 and (receipt["status"] != "failed" or not last["why"]):
        yield f"the receipt says {receipt['status']}: {last['why']}"
    if ended.code == 0 and receipt["status"] != "complete":
        yield f"the receipt says {receipt['status']}"
    from labtrain.stores.store import Store

    where = receipt["config"]["checkpoint"]["url"]
    url = f"{where}/{run_dir.name}"
    if where.startswith("sftp"):
        url = DIRECT[0](url)
    spool = run_dir / "spool"
    yield from damaged(str(spool))
    there = {each.name for each in Store(url).checkpoints()} | {each.name for each in Store(spool).checkpoints()}
    if lost := {Path(each["path"]).name for each in receipt["checkpoints"]} - there:
        yield f"listed, and not there: {sorted(lost)}"


DIRECT: list[Any] = [str]


def damaged(url: str) -> Iterator[str]:
    """Yield what is wrong with the checkpoints that seem complete."""
    from labtrain.base.errors import StoreError
    from labtrain.stores.prune import check
    from labtrain.stores.store import Store

    try:
        found = Store(url).checkpoints()
    except (StoreError, FileNotFoundError):  # nothing was written
        return
    for checkpoint in found:
        if said := check(checkpoint):
            yield f"{checkpoint.url}: {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", default=[], choices=STORIES)
    parser.add_argument("--story", action="append", default=[])
    parser.add_argument("--choose", action="append", default=[], help="STORE:STORY:KIND:NUMBER:HOW")
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--how", action="append", default=[])
    parser.add_argument("--part", default="0/1", help="i/n: each n-th fault, from the i-th")
    parser.add_argument("--distinct", action="store_true", help="the first and the last request of each kind and path")
    parser.add_argument("--times", action="append", choices=("once", "again", "ever"),
                        help="how often: once; each time that the same request is tried again; for ever")  # fmt: skip
    parser.add_argument("--calls", action="store_true", help="only list the requests")
    parser.add_argument("--experiment", type=Path)
    parser.add_argument("--forks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forks:
        serve(options.forks)
        return
    with tempfile.TemporaryDirectory(prefix="store-faults-") as scratch:
        folder = Path(scratch).resolve()
        raise SystemExit(sweep(options, folder, options.experiment or made_in(folder)))


def sweep(options: argparse.Namespace, folder: Path, experiment: Path) -> bool:
    """Do all stories; return whether anything is wrong."""
    table: collections.Counter[tuple[str, ...]] = collections.Counter()
    wrong, begun = 0, time.monotonic()
    forks = Forks(folder, experiment)
    try:
        for store, name, fault, how, found in judged(options, forks, folder):
            table[store, name, fault.kind, fault.how, how.partition(": ")[0]] += 1
            wrong += bool(found)
            line = f"{'WRONG' if found else 'ok'}: {store} {name}: {fault}: {how}"
            print(line, *found, sep="\n  ", flush=True)
    finally:
        forks.close()
    for key, number in sorted(table.items()):
        print(*key, number)
    print(f"{sum(table.values())} faults, {wrong} wrong, {time.monotonic() - begun:.0f} s")
    return bool(wrong)


def judged(options: argparse.Namespace, forks: Forks, folder: Path) -> Iterator[tuple[str, str, Fault, str, list[str]]]:
    """Do what the options choose; yield each store, story and fault, how it ended, and what is wrong with that."""
    chosen = [each.split(":") for each in options.choose]
    for store in options.store or STORIES:
        names = [name for name in STORIES[store] if not options.story or name in options.story]
        if chosen:
            names = [name for name in names if [store, name] in [each[:2] for each in chosen]]
        if not names:
            continue
        place = S3Place(folder) if store == "s3" else SFTPPlace(folder)
        DIRECT[0] = lambda url, place=place: url.replace(f":{place.bad.port}/", f":{place.server.port}/")
        try:
            for name in names:
                story = Story(forks, place, name, folder)
                story.begin()
                if options.calls:
                    print(*(f"{name} {kind} {at} {path}" for kind, at, path in story.calls), sep="\n")
                    continue
                faults = [Fault(kind=kind, at=int(at), how=how) for *of, kind, at, how in chosen if of == [store, name]]
                for fault in faults or selected(options, story):
                    yield store, name, fault, *story.judge(fault)
        finally:
            place.close()


def selected(options: argparse.Namespace, story: Story) -> Iterator[Fault]:
    part, parts = map(int, options.part.split("/"))
    faults = story.faults(distinct=options.distinct, on=[TIMES[each] for each in options.times or TIMES])
    for fault in itertools.islice(faults, part, None, parts):
        if fault.kind in (options.kind or [fault.kind]) and fault.how in (options.how or [fault.how]):
            yield fault


if __name__ == "__main__":
    main()
