"""What every store keeps to, against real servers: a folder, memory, S3 (SeaweedFS), SFTP (OpenSSH)."""

import errno
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError, StoreError
from labtrain.base.files import file_sha256
from labtrain.stores.layout import kept, newest_whole
from labtrain.stores.prune import Leftover, check, clear, leftovers, superseded
from labtrain.stores.store import (
    MANIFEST,
    SCHEMA,
    STATE,
    WEIGHTS,
    Checkpoint,
    GoneError,
    Store,
    TakenOverError,
    identity,
    sealed,
)
from tests.conftest import LABTRAIN, need
from tests.support.servers import KEY, READ_KEY, READ_SECRET, SECRET, SFTP
from tests.support.waiting import wait_until

BACKENDS = ("local", "memory", "s3", "sftp")


each = pytest.mark.parametrize("url", BACKENDS, indirect=True)


def made(folder: Path, step: int = 1, size: int = 1000) -> dict[str, Any]:
    """Write a checkpoint's files to a folder and return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(bytes([step % 251]) * size)
    (folder / STATE).write_bytes(b"s" * 10)
    files = {
        name: {"sha256": file_sha256(folder / name), "size_bytes": (folder / name).stat().st_size}
        for name in (WEIGHTS, STATE)
    }
    return {"schema": SCHEMA, "run_id": "abc", "step": step, "files": files}


def put(store: Store, folder: Path, step: int, name: str = "") -> str:
    name = name or f"step-{step:010d}"
    manifest = made(folder / name, step)
    store.upload(folder / name, manifest, name)
    store.commit(name, manifest)
    return name


def key_of(store: Store, path: str, name: str) -> str:
    """Return what a file of a checkpoint is called in a store."""
    return store.key(name, store.manifest(Checkpoint(store, path, {}))["files"][name])


def names(store: Store) -> list[str]:
    return [checkpoint.name for checkpoint in store.checkpoints()]


# ------------------------------------------------------------------------------------------------------ the contract


@each
def test_what_was_put_is_listed_and_fetched(url: str, tmp_path: Path) -> None:
    store = Store(url)
    assert store.find() == []
    for step in (3, 20, 1):
        put(store, tmp_path / "from", step)
    assert names(store) == ["step-0000000001", "step-0000000003", "step-0000000020"]
    checkpoint = store.checkpoints()[-1]
    assert store.manifest(checkpoint) == sealed(made(tmp_path / "again", 20))
    folder, _ = store.fetch(checkpoint, tmp_path / "into")
    assert (folder / WEIGHTS).read_bytes() == bytes([20]) * 1000


@each
def test_a_name_is_used_once(url: str, tmp_path: Path) -> None:
    """Also when many try at once: one of them makes it."""
    stores = [Store(url) for _ in range(4)]
    won: list[int] = []

    def attempt(number: int) -> None:
        try:
            stores[number].create(f"step-0000000001/{MANIFEST}", f"{number}".encode())
            won.append(number)
        except FileExistsError:
            pass

    if url.startswith("memory"):  # within one process, one after the other
        for number in range(4):
            attempt(number)
    else:
        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(won) == 1
    assert stores[0].read(f"step-0000000001/{MANIFEST}") == f"{won[0]}".encode()
    assert list(stores[0].find()[0].sizes) == [MANIFEST]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some FUSE file systems are: a name is used once all the same."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path)
    store.create("step-0000000001/x", b"1")
    with pytest.raises(FileExistsError):
        store.create("step-0000000001/x", b"2")
    assert store.read("step-0000000001/x") == b"1"
    assert list(store.find()[0].sizes) == ["x"]


@each
def test_a_checkpoint_exists_with_its_manifest(url: str, tmp_path: Path) -> None:
    store = Store(url)
    manifest = made(tmp_path / "from")
    store.upload(tmp_path / "from", manifest, "step-0000000001")
    assert store.checkpoints() == []
    assert [left.name for left in store.find()] == ["step-0000000001"]
    store.commit("step-0000000001", manifest)
    assert names(store) == ["step-0000000001"]
    store.commit("step-0000000001", manifest)  # it is this one already: an answer that was lost
    with pytest.raises(TakenOverError):
        store.commit("step-0000000001", {**manifest, "run_id": "other"})


@each
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "other manifest", "no manifest"])
def test_each_damage_is_found_and_the_older_one_taken(
    url: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(url)
    older, newer = put(store, tmp_path / "from", 1), put(store, tmp_path / "from", 2)
    full = f"{store.root}/{newer}/{key_of(store, newer, WEIGHTS)}"
    match damage:
        case "flip":
            store.fs.pipe_file(full, bytes([2]) * 500 + b"\3" + bytes([2]) * 499)
        case "cut":
            store.fs.pipe_file(full, bytes([2]) * 999)
        case "remove":
            store.fs.rm_file(full)
        case "other manifest":
            store.fs.pipe_file(f"{store.root}/{newer}/{MANIFEST}", json.dumps(made(tmp_path / "x", 9)).encode())
        case "no manifest":
            store.fs.pipe_file(f"{store.root}/{newer}/{MANIFEST}", b'{"schema": "lab')
    found = newest_whole([store], into=tmp_path / "into")
    said = capsys.readouterr().err
    assert found is not None
    assert found[0].name == older
    assert newer in said
    assert "using an older checkpoint" in said
    assert check(store.checkpoints()[0]) is None
    assert newer in str(check(store.checkpoints()[1]))


@each
def test_a_removal_that_stops_in_between_leaves_no_broken_one(url: str, tmp_path: Path) -> None:
    store = Store(url)
    name = put(store, tmp_path / "from", 1)
    store.remove(f"{name}/{MANIFEST}")
    assert store.checkpoints() == []
    store.discard(name)
    assert store.find() == []
    store.discard(name)  # again, and nothing is wrong


@each
def test_what_is_removed_after_it_was_listed_is_skipped(url: str, tmp_path: Path) -> None:
    """It is not damaged, and no reason to stop."""
    store = Store(url)
    for step in (1, 2):
        put(store, tmp_path, step)
    older, newer = store.checkpoints()
    store.discard(newer.path)
    with pytest.raises(GoneError, match="was removed since it was listed"):
        check(newer)
    store.find = lambda: [older, newer]  # type: ignore[method-assign]
    found = newest_whole([store], into=tmp_path / "copies")
    assert found is not None
    assert found[0] == older


@pytest.mark.parametrize("url", ["local", "sftp"], indirect=True)
@pytest.mark.parametrize("why", ["removing", "removed"])
def test_a_removal_that_was_cut_off_is_finished(url: str, why: str, tmp_path: Path) -> None:
    """As after a connection that was lost: the same writer tries again."""
    store = Store(url)
    name, token = put(store, tmp_path, 1), store.take_over()
    store.move(name, f"{name}.{why}-{token}")
    store.discard(name, token)
    assert store.find() == []


@each
def test_two_writers_are_told_apart(url: str) -> None:
    store, other = Store(url), Store(url)
    token = store.take_over()
    store.check_writer(token)
    second = other.take_over()
    with pytest.raises(TakenOverError, match=f"another process .process {os.getpid()} on "):
        store.check_writer(token)
    store.leave(token)  # is the other's
    assert other.writer() is not None
    other.leave(second)
    assert other.writer() is None


@each
def test_leftovers_are_told_from_uploads_in_progress(url: str, tmp_path: Path) -> None:
    store = Store(url)
    put(store, tmp_path / "from", 1)
    store.upload(tmp_path / "from" / "step-0000000001", made(tmp_path / "x"), "step-0000000002")

    def found(older_than_s: float = 3600.0) -> Leftover:
        (left,) = leftovers(store, older_than_s=older_than_s)
        return left

    assert not found().in_progress  # nobody writes there
    token = store.take_over()
    assert found().in_progress  # this process does
    elsewhere = {"token": token, "host": "elsewhere", "process": 1}
    store.replace(".writer.json", json.dumps(elsewhere).encode())
    assert found().in_progress  # another machine may
    assert not found(older_than_s=-1).in_progress  # no more
    with subprocess.Popen(["sleep", "60"]) as dead:
        gone = identity(dead.pid)
        dead.kill()
    store.replace(".writer.json", json.dumps({**elsewhere, **gone}).encode())
    assert not found().in_progress
    clear(store, found())
    assert names(store) == ["step-0000000001"]
    assert leftovers(store, older_than_s=0) == []


@each
def test_what_its_writer_finished_meanwhile_is_no_leftover(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between the look at the folders and the question who writes: the checkpoint is whole by then, and stays."""
    store, writer = Store(url), Store.writer
    token = store.take_over()
    manifest = made(tmp_path / "from")
    store.upload(tmp_path / "from", manifest, "step-0000000001")

    def meanwhile(self: Store) -> Any:
        monkeypatch.setattr(Store, "writer", writer)
        store.commit("step-0000000001", manifest)
        store.leave(token)
        return writer(self)

    monkeypatch.setattr(Store, "writer", meanwhile)
    assert leftovers(store, older_than_s=0) == []
    assert names(store) == ["step-0000000001"]


@each
def test_a_store_has_one_writer_that_enters(url: str) -> None:
    """Not beside one that lives, or that may on another machine; in the place of a dead one, or of none."""
    store = Store(url)
    token = store.enter()
    with pytest.raises(StoreError, match=f"process {os.getpid()} on .* writes checkpoints to") as error:
        Store(url).enter()
    assert error.value.hint == f"use another folder: {url}/imported"
    store.check_writer(token)
    store.leave(token)
    store.replace(".writer.json", json.dumps({"token": "x", "host": "elsewhere", "process": 1}).encode())
    with pytest.raises(StoreError, match="process 1 on elsewhere"):
        store.enter()
    with subprocess.Popen(["sleep", "60"]) as dead:
        gone = identity(dead.pid)
        dead.kill()
    store.replace(".writer.json", json.dumps({"token": "x", "host": "here", **gone}).encode())
    store.leave(store.enter())
    assert store.writer() is None


@each
def test_what_stays_must_hold_a_whole_one(url: str, tmp_path: Path) -> None:
    store = Store(url)
    for step in (1, 2, 3):
        put(store, tmp_path / "from", step)
    assert [found.step for found in superseded(store, keep_last=2)] == [1]
    for name in names(store)[1:]:
        store.fs.rm_file(f"{store.root}/{name}/{key_of(store, name, STATE)}")
    with pytest.raises(LabtrainError, match="all 2 checkpoints that would remain are damaged"):
        superseded(store, keep_last=2)


def test_which_are_kept() -> None:
    steps = {f"s{step}": step for step in (1, 2, 3, 4, 5, 6)}
    scores = {"s1": 0.1, "s2": 0.9, "s3": 0.5}
    assert kept(steps, scores, last=1) == {"s6"}
    assert kept(steps, scores, last=2, best=1) == {"s5", "s6", "s2"}
    assert kept(steps, scores, last=1, best=1, mode="min") == {"s6", "s1"}
    assert kept(steps, scores, last=1, every=2) == {"s2", "s4", "s6"}


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("url", ["local", "s3", "sftp"], indirect=True)
def test_the_commands(url: str, tmp_path: Path) -> None:
    store = Store(url)
    for step in (1, 2):
        put(store, tmp_path / "from", step, f"runs/r{step}/step-{step:010d}")
    store.upload(tmp_path / "from" / "runs/r1/step-0000000001", made(tmp_path / "x"), "runs/r1/step-0000000009")

    def labtrain(*arguments: str, code: int = 0) -> list[str]:
        done = subprocess.run([LABTRAIN, "store", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout.splitlines()

    assert [line.split()[0] for line in labtrain("ls", url)] == [
        f"{url}/runs/r1/step-0000000001",
        f"{url}/runs/r2/step-0000000002",
    ]
    rows = json.loads("\n".join(labtrain("ls", url, "--json")))
    assert [row["manifest"]["step"] for row in rows] == [1, 2]
    assert all(line.endswith("  ok") for line in labtrain("check", url))
    changed = "runs/r2/step-0000000002"
    store.fs.pipe_file(f"{store.root}/{changed}/{key_of(store, changed, STATE)}", b"t" * 10)
    assert "state.pt: sha256" in labtrain("check", url, code=1)[1]
    assert "left by a crash" in labtrain("prune", url, "--dry-run")[0]
    assert len(store.find()) == 3
    assert "left by a crash" in labtrain("prune", url)[0]
    assert len(store.find()) == 2


@pytest.mark.parametrize(
    ("url", "ended"), [("local", False), ("s3", False), ("s3", True), ("sftp", True)], indirect=["url"]
)
def test_prune_leaves_an_import_alone_while_its_process_lives(url: str, ended: bool, tmp_path: Path) -> None:
    """Held still in the middle of it; where it is killed there, what it left goes, and another import takes the place."""
    torch.save({"state_dict": {f"w{i}": torch.ones(1000, 1000) for i in range(30)}, "global_step": 7}, tmp_path / "in")
    store, command = Store(url), [LABTRAIN, "store", "import", str(tmp_path / "in"), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: leftovers(store, older_than_s=0))
        process.send_signal(signal.SIGSTOP)
        (left,) = leftovers(store, older_than_s=-1)[:1]
        assert left.in_progress
        done = subprocess.run([LABTRAIN, "store", "prune", url], capture_output=True, text=True, check=True)
        assert "in progress, kept" in done.stdout
        assert "removed" not in done.stdout
        if not ended:
            second = subprocess.run(command, capture_output=True, text=True, check=False)
            assert second.returncode == 2
            assert f"process {process.pid} on {os.uname().nodename} writes checkpoints to" in second.stderr
        process.send_signal(signal.SIGKILL if ended else signal.SIGCONT)
        assert process.wait() == (-signal.SIGKILL if ended else 0)
    if ended:
        done = subprocess.run([LABTRAIN, "store", "prune", url], capture_output=True, text=True, check=True)
        assert "left by a crash, removed" in done.stdout
        assert store.find() == []
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (checkpoint,) = store.find()
    assert check(checkpoint) is None
    assert (checkpoint.name, store.writer()) == ("step-0000000007-end", None)


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """The disk is full in the middle: no folder, no writer."""
    torch.save({"state_dict": {"w": torch.ones(1 << 20)}}, tmp_path / "in")
    script = f"ulimit -f 2048; exec {LABTRAIN} store import in store"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: store/step-0000000000-end could not be written: ")
    assert list((tmp_path / "store").iterdir()) == []


# ---------------------------------------------------------------------------------------------------- S3 and SFTP alone


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_thousand_are_listed(url: str) -> None:
    """benchmarks/checkpoint.py has the time: here the pages of the listing are what counts."""
    store = Store(url)
    data = json.dumps({"schema": SCHEMA}).encode()
    store.fs.pipe({f"{store.root}/step-{step:010d}/{MANIFEST}": data for step in range(1100)})
    assert len(store.checkpoints()) == 1100


@pytest.mark.parametrize("url", ["s3"], indirect=True)
@pytest.mark.parametrize(
    ("key", "secret", "says"),
    [
        (KEY, "wrong-secret-value", "signature"),
        ("wrong-key", SECRET, "key"),
        (READ_KEY, READ_SECRET, "Access ?Denied|Forbidden"),
    ],
)
def test_wrong_credentials_are_refused_and_never_shown(
    url: str, key: str, secret: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(StoreError, match=f"(?i){says}") as error:
        Store(url).take_over()
    assert secret not in str(error.value)
    assert "credentials" in error.value.hint


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_bucket_that_is_missing(url: str) -> None:
    for place in ("s3://no-such-bucket/runs", "s3://no-such-bucket"):
        with pytest.raises(StoreError, match="bucket does not exist"):
            Store(place).checkpoints()


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_uploads_in_parts_that_nobody_ended_are_found(url: str) -> None:
    """What kill -9 leaves of an upload: no object, so no listing shows it."""
    store = Store(url)
    bucket, _, prefix = store.root.partition("/")
    store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/step-0000000005/{WEIGHTS}")
    (left,) = leftovers(store, older_than_s=3600)
    assert (left.path, left.in_progress) == (f"step-0000000005/{WEIGHTS}", False)
    token = store.take_over()
    (left,) = leftovers(store, older_than_s=3600)
    assert left.in_progress
    store.leave(token)
    clear(store, left)
    assert leftovers(store, older_than_s=3600) == []


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_prune_takes_no_neighbours_uploads(url: str) -> None:
    """Of a place whose name begins alike, of the bucket around it, and of programs that write no checkpoints."""
    store, neighbour = Store(url), Store(f"{url}2")
    bucket, _, prefix = store.root.partition("/")
    writer = {"token": "t", "host": "here", **identity(os.getpid())}
    neighbour.replace("run/.writer.json", json.dumps(writer).encode())
    keys = [f"{prefix}2/run/step-0000000001/{WEIGHTS}", f"{prefix}/run/data.tar", f"{prefix}/run/steps/{WEIGHTS}",
            f"{prefix}/run/step-0000000001/{WEIGHTS}"]  # fmt: skip
    for key in keys:
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert [left.path for left in leftovers(store, older_than_s=0)] == [f"run/step-0000000001/{WEIGHTS}"]
    for place in (url, f"{url}2"):
        subprocess.run([LABTRAIN, "store", "prune", place], capture_output=True, check=True)
    left = {each["Key"] for each in store.fs.list_multipart_uploads(bucket)}
    assert set(keys) - left == {keys[-1]}


@pytest.mark.parametrize("url", ["s3", "sftp", "local"], indirect=True)
def test_prune_takes_no_neighbours_folders(url: str, tmp_path: Path) -> None:
    """What a crash left beside a place whose name begins alike is not that place's."""
    Store(f"{url}2").upload(tmp_path / "from", made(tmp_path / "from"), "run/step-0000000001")
    store = Store(url)
    store.upload(tmp_path / "from", made(tmp_path / "from"), "run/step-0000000002")
    assert [left.path for left in leftovers(store, older_than_s=0)] == ["run/step-0000000002"]


@pytest.mark.parametrize("url", ["sftp"], indirect=True)
def test_an_unknown_host_key_is_refused(url: str, sftp: SFTP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own default would accept it. Also where another key is known for that host."""
    other = " ".join((sftp.home / ".ssh" / "id_ed25519.pub").read_text().split()[:2])
    for known in ("", f"[127.0.0.1]:{sftp.port} {other}\n"):
        home = tmp_path / f"home{len(known)}"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "known_hosts").write_text(known)
        (home / ".ssh" / "config").write_text(f"Host 127.0.0.1\n  IdentityFile {sftp.home}/.ssh/id_ed25519\n")
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(StoreError, match=r"which is not in|but known_hosts has another") as error:
            Store(url)
        assert ("administrator of 127.0.0.1" if known else f"ssh -p {sftp.port} 127.0.0.1") in error.value.hint


@pytest.mark.parametrize("url", ["sftp"], indirect=True)
def test_a_key_that_is_not_allowed(url: str, sftp: SFTP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "known_hosts").write_text((sftp.home / ".ssh" / "known_hosts").read_text())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(StoreError, match=r"(?i)authentication") as error:
        Store(url)
    assert "credentials" in error.value.hint


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(StoreError, match=f"sftp://127.0.0.1:{port}/x"):
        Store(f"sftp://127.0.0.1:{port}/x")


def test_secrets_that_a_server_repeats_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "permission")
    found = without_secrets("no permission for s3cret-value")
    assert found == "no permission for ${oc.env:AWS_SECRET_ACCESS_KEY}"


def test_a_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    """Its files are read, and copied, by their names."""
    store = Store(tmp_path)
    (tmp_path / "step-0000000001").mkdir()
    manifest = {"schema": SCHEMA, "files": {f"../{WEIGHTS}": {"sha256": "0", "size_bytes": 1}}}
    store.commit("step-0000000001", manifest)
    with pytest.raises(DamagedError, match="is not a labtrain/checkpoint/1 manifest"):
        store.fetch(store.checkpoints()[0], tmp_path / "to")


def test_urls_that_cannot_be_used() -> None:
    for place, says in (
        ("sftp://host", "a host and a path"),
        ("gs://bucket", "gcsfs"),
        ("nothing://x", "is not supported"),
    ):
        with pytest.raises(ConfigError, match=says):
            Store(place)


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_clock_that_is_wrong_is_named(url: str) -> None:
    need("faketime", "faketime")
    command = ["faketime", "-f", "-2h", LABTRAIN, "store", "ls", url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "The difference between the request time and the server's time is too large" in done.stderr
    assert "the clocks of this machine and the server differ too much" in done.stderr
