"""What is saved is the state at the call; a crash anywhere leaves what was durable; a failure reaches the loop."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.base.errors import LabtrainError, StoreError
from labtrain.checkpoints.format import load_folder
from labtrain.checkpoints.memory import OwnMemory, SharedMemory
from labtrain.checkpoints.staging import Staging
from labtrain.record.digests import digest
from labtrain.stores.layout import newest_whole
from labtrain.stores.prune import check
from labtrain.stores.store import Store, TakenOverError, sealed
from tests.conftest import skip_or_fail
from tests.real.stores.test_store import names
from tests.support.saver import judge, save, saver_of, saves_in_a_child, writer_of

# --------------------------------------------------------------------------------------------------------- the copy


def test_weights_changed_right_after_the_call_are_not_in_it(tmp_path: Path) -> None:
    """A staged save whose copy is not waited for holds the next step's values in some tensors: torch's own can."""
    saver = saver_of(tmp_path)
    saver.open()
    weights = {f"w{index}": torch.zeros(500_000) for index in range(20)}
    for step in range(1, 6):
        for tensor in weights.values():
            tensor.fill_(step)
        wanted = digest(weights)
        name = saver.save({"state_dict": weights, "count": [step]}, {"run_id": "abc", "step": step})
        for tensor in weights.values():
            tensor.add_(0.5)  # the next optimizer step
        saver.wait()
        assert saver.manifests[name]["weights_digest"] == wanted
        read = load_folder(tmp_path / "checkpoints" / name)
        assert digest(read["state_dict"]) == wanted
        assert read["count"] == [step]


@pytest.mark.parametrize("memory", [OwnMemory, SharedMemory])
def test_buffers_are_used_again_and_a_state_that_grows_is_whole(memory: type[OwnMemory | SharedMemory]) -> None:
    staging = Staging(memory())
    first = staging.copy({"a": torch.ones(4), "b": [torch.zeros(2)]})
    assert staging.copy({"a": torch.zeros(4), "b": [torch.zeros(2)]})["a"] is first["a"]
    again = staging.copy({"a": torch.full((4,), 2.0), "b": [torch.zeros(2), torch.ones(3, dtype=torch.int64)]})
    assert again["a"].tolist() == [2.0] * 4
    assert again["b"][1].tolist() == [1, 1, 1]
    assert staging.copy({"a": torch.ones(2, 3).T})["a"].shape == (3, 2)
    half = torch.ones(3, dtype=torch.bfloat16)
    assert staging.copy({"a": half})["a"].dtype == torch.bfloat16


def test_keys_that_read_alike_are_not_mixed_up() -> None:
    state = {"x.y": torch.ones(2), "x": {"y": torch.zeros(2)}, 1: torch.ones(1), "1": torch.zeros(1)}
    copied = Staging().copy(state)
    assert copied["x.y"].tolist() == [1.0, 1.0]
    assert copied[1].tolist() == [1.0]


def test_lists_and_dicts_are_copied_too() -> None:
    inner = {"x": [1, 2]}
    copied = Staging().copy({"inner": inner})
    inner["x"].append(3)
    assert copied == {"inner": {"x": [1, 2]}}


# --------------------------------------------------------------------------------------------------------- failures


def test_one_is_in_flight_and_its_failure_reaches_the_next_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(tmp_path)
    saver.open()
    gate = threading.Event()

    def stuck(*_: Any) -> Any:
        gate.wait()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("labtrain.checkpoints.writer.write_files", stuck)
    save(saver, 1)
    assert saver.busy
    saver.check()
    gate.set()
    with pytest.raises(StoreError, match="step-0000000001 could not be written: Input/output error"):
        saver.wait()
    monkeypatch.undo()
    save(saver, 2)
    saver.wait()
    assert names(writer_of(saver).home) == ["step-0000000002"]


def as_nobody(folder: Path, work: Callable[[], None]) -> None:
    """Run in a child that permissions hold for, and fail where it fails."""
    folder.chmod(0o777)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_permissions_taken_away_in_mid_run(tmp_path: Path) -> None:
    for parent in tmp_path.parents:
        if not parent.stat().st_mode & 0o005 and os.geteuid() == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    place = tmp_path / "open" / "checkpoints"
    place.parent.mkdir()
    place.parent.chmod(0o777)

    def work() -> None:
        saver = saver_of(place.parent)
        saver.open()
        save(saver, 1)
        saver.wait()
        place.chmod(0o555)
        save(saver, 2)
        with pytest.raises(StoreError, match="Permission denied"):
            saver.wait()
        place.chmod(0o755)
        assert names(Store(place)) == ["step-0000000001"]

    as_nobody(tmp_path, work)


@pytest.mark.parametrize("spooled", [False, True], ids=["local", "spool"])
def test_a_full_disk(spooled: bool, tmp_path: Path) -> None:
    """On a file system of four megabytes. What was whole stays whole, and room is made of what was not."""
    if os.geteuid() != 0:
        skip_or_fail("a small tmpfs can only be mounted by root")
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path / "small")], check=True)
    try:
        saver = saver_of(tmp_path / "small", "memory://full" if spooled else None)
        if spooled:
            writer_of(saver).home = Store(tmp_path / "small" / "spool")
            writer_of(saver).place = str(writer_of(saver).home)
        saver.open()
        save(saver, 1, size=400_000)
        saver.wait()
        save(saver, 2, size=800_000)
        with pytest.raises(StoreError, match="No space left on device") as error:
            saver.wait()
        assert "df -h" in error.value.hint
        assert names(writer_of(saver).home) == ["step-0000000001"]
        found = newest_whole([writer_of(saver).home], into=tmp_path)
        assert found is not None
        save(saver, 3, size=400_000)
        saver.wait()
        assert names(writer_of(saver).home) == ["step-0000000001", "step-0000000003"]
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_what_cannot_be_removed_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new one is whole and stays: a failure to remove an old one is said, and the training goes on."""
    saver = saver_of(tmp_path)
    saver.open()
    for step in (1, 2):
        save(saver, step)
        saver.wait()

    def refuse(path: str, token: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(writer_of(saver).home, "discard", refuse)
    save(saver, 3)
    saver.wait()
    assert names(writer_of(saver).home) == [f"step-{step:010d}" for step in (1, 2, 3)]
    assert "superseded checkpoints could not be removed" in capsys.readouterr().err


def test_another_process_that_took_over_is_found_before_anything_exists(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    saver.open()
    other = saver_of(tmp_path)
    other.open()
    save(saver, 1)
    with pytest.raises(TakenOverError, match=f"another process .process {os.getpid()}"):
        saver.wait()
    save(other, 2)
    other.wait()
    assert names(writer_of(other).home) == ["step-0000000002"]
    save(saver, 2)  # which the other has made exist meanwhile: it is not taken away
    with pytest.raises(TakenOverError):
        saver.wait()
    assert names(writer_of(other).home) == ["step-0000000002"]
    assert check(writer_of(other).home.checkpoints()[0]) is None


def test_an_end_without_delivery_names_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = saver_of(tmp_path, "memory://away")
    saver.open()
    assert writer_of(saver).delivery is not None
    writer_of(saver).delivery.stop()
    writer_of(saver).delivery.thread.join()
    save(saver, 7)
    with pytest.raises(StoreError, match=r"not delivered to memory://away: step-0000000007, kept in .*spool"):
        saver.close(seconds=0.1, wanted=True)
    assert names(Store(tmp_path / "spool")) == ["step-0000000007"]
    again = saver_of(tmp_path, "memory://away")
    again.open()
    again.close(seconds=30, wanted=True)
    assert names(Store("memory://away")) == ["step-0000000007"]
    assert names(Store(tmp_path / "spool")) == []


# ----------------------------------------------------------------------------------------- a crash between two writes

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def crash_at(number: int, folder: Path) -> None:
    """Have this process end, as by kill -9, before its so many-th change of a file below a folder."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writing or event in WRITES) and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(hook)


def test_a_crash_between_any_two_writes(tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        place = str(run_dir / "checkpoints")
        durable = saves_in_a_child(run_dir, place, arm=partial(crash_at, number, run_dir), remote=False)
        if not durable:
            break
        judge(run_dir, place, durable)
    assert number > 20


# ------------------------------------------------------------------------------------------------------ what is hostile


def test_a_hostile_state_is_refused(tmp_path: Path) -> None:
    """Under our own names, with hashes that are right: loading it runs nothing."""
    saver = saver_of(tmp_path)
    saver.open()
    name = save(saver, 1)
    saver.wait()
    folder = tmp_path / "checkpoints" / name

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"x": Evil()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    raw = (folder / "state.pt").read_bytes()
    manifest["files"]["state.pt"] = {"sha256": hashlib.sha256(raw).hexdigest(), "size_bytes": len(raw)}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    found = newest_whole([writer_of(saver).home], into=tmp_path)
    assert found is not None
    with pytest.raises(LabtrainError, match="without running code"):
        load_folder(found[1])
    assert not (tmp_path / "ran").exists()
