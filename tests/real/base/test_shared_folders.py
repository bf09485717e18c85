"""Two starts, two users, two machines: what they share is not taken from under each other."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from labtrain.base.console import shown
from labtrain.base.errors import EXIT_STOPPED, LabtrainError
from labtrain.cli import main
from labtrain.record import receipt
from labtrain.record.config import explain
from labtrain.record.identity import Job, first_free
from labtrain.review.catalog.listing import is_trained, list_runs
from labtrain.stores.prune import leftovers
from labtrain.stores.store import Store, identity, sealed
from labtrain.training import start
from labtrain.training.callbacks.recorder import Recorder
from labtrain.training.start import alone_in, refuse_outdated
from tests.conftest import LABTRAIN, ROOT, Experiment, skip_or_fail
from tests.support.exact import Runner, configure, outcome
from tests.support.waiting import wait_until


def closed_to_the_group(folder: Path) -> list[str]:
    """Return what a second user of the group could not read and write."""
    return [
        f"{stat.S_IMODE(path.stat().st_mode):o} {path.relative_to(folder)}"
        for path in sorted(folder.rglob("*"))
        if not path.stat().st_mode & stat.S_IWGRP or not path.stat().st_mode & stat.S_IRGRP
    ]


def here(config: Any, umask: str = "022") -> Any:
    return config | {
        "callbacks": {**config["callbacks"], "here": {"_target_": "tests.support.small_models.Here", "umask": umask}}
    }


@pytest.mark.release
@pytest.mark.parametrize("url", [None, "{}/store", "local://{}/store"])
def test_every_file_of_a_run_has_the_mode_that_the_umask_says(runner: Runner, url: str | None) -> None:
    """Under umask 002 a second user of the group can read, write and lock each; under 077 nobody else can.

    In the run's folder, in a folder as store, and on the way through the spool.
    """
    url = url.format(runner.folder) if url else None
    config = configure("mlp", "even", checkpoint={"url": url, "every_n_steps": 2}, trainer={"max_epochs": 1})
    run_dir = runner.run(here(config, "002"))
    assert run_dir is not None
    assert (run_dir / ".lock").exists()
    assert list(runner.folder.rglob("*weights.safetensors"))
    assert closed_to_the_group(runner.folder / "runs") == []
    assert url is None or closed_to_the_group(runner.folder / "store") == []
    run_dir = runner.run(here(config | {"seed": 1}, "077"))
    assert run_dir is not None
    assert not [path for path in run_dir.rglob("*") if path.stat().st_mode & 0o077]


@pytest.mark.release
def test_nothing_that_labtrain_writes_can_be_written_by_all(own_experiment: Experiment, tmp_path: Path) -> None:
    """Under umask 000: by a sweep with a loader's worker and all loggers, and by the commands that write."""
    root, folder = own_experiment.root, tmp_path / "lab"
    folder.mkdir()
    place = {"cwd": folder, "umask": 0}
    quick = ("trainer.max_steps=3", "trainer.enable_progress_bar=false", "data.num_workers=1", "logger=many")
    own_experiment.train("-m", "seed=1,2", *quick, f"paths.runs={folder}/runs", env={"WANDB_MODE": "offline"}, **place)
    run_dir = next(folder.glob("runs/digits/*/receipt.json")).parent
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    for arguments in (
        ["new", "other"],
        ["store", "export", str(run_dir), "out.ckpt"],
        ["store", "import", "out.ckpt", "store"],
        ["report", str(run_dir), "-o", "a.html"],
        ["sign", str(run_dir), "--key", str(key)],
        ["crate", str(run_dir), "-o", "a.zip", "--weights"],
        ["verify", str(run_dir), "--steps", "1"],
    ):
        done = subprocess.run([LABTRAIN, *arguments], check=False, capture_output=True, text=True, **place)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
    found = [*folder.rglob("*"), *root.rglob("*")]
    names = {path.name for path in found}
    assert {".lock", "weights.safetensors", "state.pt", "a.html", "a.zip", "out.ckpt", "verified.jsonl", "config.yaml",
            "receipt.json.sig", "metrics.csv", "multirun.yaml", "manifest.json"} <= names  # fmt: skip
    assert [path for path in found if not path.is_symlink() and path.stat().st_mode & stat.S_IWOTH] == []


def job_of(run_dir: Path) -> Job:
    return Job(run_id="x", run_dir=str(run_dir), root="", config={}, command=[], code_digest="", lock_digest="")


def as_second_user(action: Callable[[], None], *, group: int = 0) -> str:
    """Run an action in a fork of this process that is another user, by default of this one's group; return its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(65534)
            action()
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def test_a_second_user_of_the_group_can_lock_a_run_and_one_who_may_not_is_told_why() -> None:
    """As root, which makes a real second user of it."""
    need_root()
    before = os.umask(0o002)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o775)
        run_dir = Path(folder, "run")
        mine, theirs = (Recorder(job_of(run_dir), checkpoints=list, resumed_step=0) for _ in range(2))
        try:
            mine.open()
            assert "is being trained by process" in as_second_user(theirs.open)
            mine.release()
            assert as_second_user(theirs.open) == ""
            (run_dir / receipt.LOCK).chmod(0o644)
            assert "the run belongs to another user" in (said := as_second_user(theirs.open))
            assert "hint: train with umask 002" in said
        finally:
            os.umask(before)


def need_root() -> None:
    if os.getuid():
        skip_or_fail("only root can become another user: run the tests as root to see this one")


@pytest.mark.parametrize(("umask", "group"), [(0o022, 0), (0o022, 65534), (0o002, 65534), (0o000, 65534)])
def test_who_may_only_read_a_run_keeps_nobody_from_training_it(umask: int, group: int) -> None:
    """Another user holds whatever locks the system gives them, on each file of the run: it is trained all the same.

    They see whether it is trained, and cannot make it look so.
    """
    need_root()
    before = os.umask(umask)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        run_dir = Path(folder, "run")
        mine = Recorder(job_of(run_dir), checkpoints=list, resumed_step=0)
        second = Recorder(job_of(run_dir), checkpoints=list, resumed_step=0)
        locked, ended = multiprocessing.Event(), multiprocessing.Event()

        def hold() -> None:
            held = []
            for path in run_dir.iterdir():
                for flags in (os.O_RDONLY, os.O_RDWR):
                    for lock in (fcntl.lockf, fcntl.flock):
                        with suppress(OSError):
                            held.append(os.open(path, flags))
                            lock(held[-1], (fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            locked.set()
            ended.wait(60)

        try:
            mine.open()
            assert as_second_user(lambda: sys.exit(str(is_trained(run_dir))), group=group) == "True"
            mine.sign = mine.lock = os.close(mine.lock) or os.close(mine.sign)  # type: ignore[arg-type, func-returns-value]
            assert (run_dir / receipt.SIGN).exists()  # as after SIGKILL
            reader = threading.Thread(target=as_second_user, args=(hold,), kwargs={"group": group})
            reader.start()
            assert locked.wait(60)
            assert as_second_user(lambda: sys.exit(str(is_trained(run_dir))), group=group) == "False"
            second.open()
            assert as_second_user(lambda: sys.exit(str(is_trained(run_dir))), group=group) == "True"
            second.release()
            ended.set()
            reader.join()
        finally:
            os.umask(before)


def test_a_lock_that_others_could_open_is_closed_to_them(tmp_path: Path) -> None:
    """As an older labtrain made it, or as it was copied; where the group may write it, it goes on to."""
    mine = Recorder(job_of(tmp_path), checkpoints=list, resumed_step=0)
    lock = tmp_path / receipt.LOCK
    for mode, closed in ((0o666, 0o660), (0o664, 0o660), (0o644, 0o600), (0o640, 0o600), (0o604, 0o600)):
        lock.write_text("")
        lock.chmod(mode)
        mine.open()
        assert stat.S_IMODE(lock.stat().st_mode) == closed
        mine.release()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A run's folder that came from elsewhere does not have a file of this user emptied."""
    (tmp_path / "mine").write_text("mine")
    lock = tmp_path / "run" / receipt.LOCK
    lock.parent.mkdir()
    {"link": lambda: lock.symlink_to(tmp_path / "mine"), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(LabtrainError, match="cannot lock"):
        Recorder(job_of(lock.parent), checkpoints=list, resumed_step=0).open()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("closed", ["runs/lab/one", "runs/lab", "runs/lab/one/receipt.json"])
def test_a_second_user_is_told_what_is_closed_and_whose_it_is(closed: str) -> None:
    """Of a run that was made under umask 077: by a start of its command, and by labtrain ls."""
    need_root()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        run_dir, place = Path(folder, "runs/lab/one"), Path(folder, closed)
        run_dir.mkdir(parents=True)
        shutil.copy(ROOT / "tests/golden/receipt.json", run_dir)
        place.chmod(0o700 if place.is_dir() else 0o600)
        place = min(place, run_dir)  # of a file, the run: its others are closed as well
        said = as_second_user(lambda: receipt.read(run_dir) and None)
        assert said.startswith(f"{place}: no permission to read it; its owner is root\n\nhint: root can run: chmod ")
        assert said.endswith(f"chmod -R a+rX {run_dir}" if place == run_dir else f"chmod a+x {place}")
        if closed == "runs/lab/one":  # of a shared folder, only its group is let in
            run_dir.parent.chmod(0o2775)
            os.chown(run_dir.parent, -1, 0)
            said = as_second_user(lambda: receipt.read(run_dir) and None)
            assert said.endswith(f"root can run: chgrp -R root {run_dir} && chmod -R g+rwX {run_dir}")
        listed = as_second_user(lambda: sys.exit(str(list_runs([Path(folder, "runs")]))))
        assert f"run='{place}', status='broken'" in listed
        assert f"error='{place}: no permission to read it; its owner is root'" in listed

        def start() -> None:
            try:
                first_free(run_dir)
            except PermissionError as error:
                raise (explain(error) or error) from None

        assert (as_second_user(start) == said) == (place != run_dir)


# ------------------------------------------------------------------------------------------------------ two starts


def test_a_second_start_leaves_what_the_first_has_fetched(runner: Runner, other: Runner) -> None:
    """It is refused, and the folder that the first reads from is there until the first has ended; the bits are the same."""
    whole = outcome(other.run(here(configure("mlp", "even"))))
    config = here(configure("mlp", "even", checkpoint={"url": f"local://{runner.folder}/store"}))
    runner.run(config, code=EXIT_STOPPED, signal_at=f"4 {int(signal.SIGTERM)} 0")
    (run_dir,) = runner.folder.glob("runs/*/*")
    fetched = run_dir.with_name(f".{run_dir.name}.fetched")
    with (run_dir / receipt.LOCK).open("r+") as lock:  # the first start, which trains it
        fcntl.lockf(lock, fcntl.LOCK_EX)
        runner.run(config, code=2)
        assert "is being trained by" in runner.said()
        assert list(fetched.glob("step-*/weights.safetensors"))
    assert outcome(runner.run(config)) == whole
    assert "resumes from step-" in runner.said()
    assert not fetched.exists()


def test_a_start_that_looked_before_another_ended_does_not_go_on_from_what_is_old(tmp_path: Path) -> None:
    """A receipt that is another one than at the beginning of the start is refused, also where there was none."""
    refuse_outdated(None, tmp_path)
    (run_dir,) = (Path(__file__).parents[2] / "golden",)
    before = receipt.read(run_dir)
    refuse_outdated(before, run_dir)
    for outdated in (None, {"digest": "another"}):
        with pytest.raises(LabtrainError, match="another process trained it while this process started"):
            refuse_outdated(outdated, run_dir)


def test_who_waits_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One process holds the folder, and another that waits for it names it, and goes on after it."""
    monkeypatch.setattr(start, "PATIENCE_S", 0)
    code = f"from pathlib import Path; from labtrain.training.start import alone_in\nwith alone_in(Path({str(tmp_path)!r})):\n" \
           "    print('held', flush=True); input()"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"

    def end() -> None:
        wait_until(lambda: "waiting for" in "".join(said), seconds=60)
        holder.stdin.write("\n")  # type: ignore[union-attr]
        holder.stdin.close()  # type: ignore[union-attr]

    said: list[str] = []
    monkeypatch.setattr(start, "warn", said.append)
    ending = threading.Thread(target=end)
    ending.start()
    with alone_in(tmp_path):
        whom = f"process {holder.pid} on {os.uname().nodename}"
        assert said[0] == f"waiting for {whom}, which fetches into {shown(tmp_path)}"
    ending.join()
    assert holder.wait() == 0


# ------------------------------------------------------------------------------------------------------------ a store


def upload_of(store: Store, **writer: Any) -> bool:
    """Return whether what a writer left is taken for an upload in progress."""
    store.replace("step-0000000001/weights.safetensors", b"part")
    store.replace(".writer.json", json.dumps({"token": "x", "host": os.uname().nodename} | writer).encode())
    (left,) = leftovers(store, older_than_s=3600)
    return left.in_progress


def test_prune_knows_a_writer_by_more_than_its_number_and_host(tmp_path: Path) -> None:
    """A number that is used again is not the writer; one of another container of this host name may be."""
    store, me = Store(tmp_path / "store"), identity(os.getpid())
    assert upload_of(store, **me)
    assert not upload_of(store, **me | {"began": me["began"] - 1})  # the number is mine by now
    assert upload_of(store, **me | {"namespace": "pid:[1]", "process": 2**22 - 1})  # in another container
    assert upload_of(store, **me | {"boot": "another", "process": 2**22 - 1})
    assert upload_of(store, process=2**22 - 1)  # an older labtrain's: it says too little
    child = subprocess.Popen(["sleep", "60"])
    gone = identity(child.pid)
    assert upload_of(store, **gone)
    child.kill()
    wait_until(lambda: "Z" in Path(f"/proc/{child.pid}/stat").read_text().split(), seconds=60)
    assert not upload_of(store, **gone)  # also while nobody has asked how it ended
    child.wait()
    assert not upload_of(store, **gone)


def test_two_machines_with_one_process_number_can_ask_a_store_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second asks between the first's write and its look, and takes nothing away from it."""
    store, modified = Store(tmp_path), Store.modified

    def meanwhile(self: Store, path: str) -> Any:
        monkeypatch.setattr(Store, "modified", modified)
        Store(tmp_path).now()
        return modified(self, path)

    monkeypatch.setattr(Store, "modified", meanwhile)
    assert abs(store.now().timestamp() - time.time()) < 3600
    assert list(tmp_path.iterdir()) == []


def test_one_bad_manifest_does_not_hide_the_others(tmp_path: Path) -> None:
    """`store ls --json` lists it with what is wrong."""
    store = Store(tmp_path)
    files = {name: {"sha256": "0" * 64, "size_bytes": 1} for name in ("state.pt", "weights.safetensors")}
    good = sealed({"schema": "labtrain/checkpoint/1", "run_id": "abc", "step": 2, "files": files})
    store.create("step-0000000002/manifest.json", json.dumps(good).encode())
    store.create("step-0000000001/manifest.json", b"{")
    done = subprocess.run(
        [LABTRAIN, "store", "ls", str(tmp_path), "--json"], capture_output=True, text=True, check=True
    )
    bad, whole = json.loads(done.stdout)
    assert bad["manifest"] is None
    assert "is not a labtrain/checkpoint/1 manifest" in bad["error"]
    assert (whole["manifest"], whole["error"]) == (good, None)
    assert "step-0000000001" in done.stderr


def test_a_folder_that_is_shared_later_is_opened_as_the_guide_says() -> None:
    """The owner types the guide's commands; then another member of the group can change, add and remove."""
    need_root()
    page = (ROOT / "docs/guides/shared-folder.md").read_text().partition("## Share a folder that has runs already")[2]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        Path(place).chmod(0o755)
        lab = Path(place, "lab")
        lab.mkdir()
        os.chown(lab, 61001, 61001)

        def typed(user: int, script: str) -> subprocess.CompletedProcess[str]:
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--groups=61010", "sh", "-ec", script]
            return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)

        assert typed(61001, f"umask 077; mkdir -p {lab}/runs/x && echo 1 > {lab}/runs/x/note.txt").returncode == 0
        change = f"echo 2 > {lab}/runs/x/note.txt && mkdir {lab}/runs/y && rm {lab}/runs/x/note.txt"
        assert typed(61002, change).returncode != 0
        commands = page.split("```")[1].replace("/scratch/lab", str(lab)).replace("chgrp -R lab ", "chgrp -R 61010 ")
        assert typed(61001, commands).stderr == ""
        assert typed(61002, change).stderr == ""
        assert (lab / "runs/y").stat().st_gid == 61010


def test_ls_of_a_closed_folder_says_whose_it_is() -> None:
    need_root()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        Path(place).chmod(0o755)
        closed = Path(place, "runs")
        closed.mkdir(mode=0o700)
        for folder in (closed, closed / "lab"):
            said = as_second_user(partial(list_runs, [folder]))
            assert said.startswith(
                f"{closed}: no permission to read it; its owner is root\n\nhint: root can run: chmod"
            )
        done = CliRunner().invoke(main, ["ls", str(closed / "none")])
        assert "no such folder" in done.output
