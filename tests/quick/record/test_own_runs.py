"""Which runs and which stores are this user's own."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import DamagedError, StoreError
from labtrain.checkpoints.locate import digest_target, load_weights
from labtrain.record import receipt as receipts
from labtrain.record.differences import compare
from labtrain.record.own_runs import MOST, checkpoints_of, is_own, opened, patch_of, remember, remember_store
from labtrain.record.resume import find_origin
from labtrain.review.crate import write_crate
from labtrain.review.retrace import Case

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def some_receipt(**code: Any) -> receipts.Receipt:
    given = {"sources": {"model.py": "0" * 64}, "commit": None, "folder": None, "patch": ""}
    return {
        "run_id": "0" * 12,
        "config": {"seed": 1, "x": float("nan"), "checkpoint": {"url": None}},
        "code": given | code,
    }


def test_a_run_is_the_users_own_where_it_was_trained_and_as_it_was(tmp_path: Path) -> None:
    mine = some_receipt(patch=None)
    (tmp_path / "code.patch").write_text("long")
    assert not is_own(mine, tmp_path, tmp_path)
    remember(some_receipt(patch="long"), tmp_path)  # the receipt itself has none that is so long
    assert is_own(mine, tmp_path, tmp_path)
    assert not is_own(mine, tmp_path, tmp_path / "elsewhere")
    assert not is_own(mine | {"config": mine["config"] | {"seed": 2}}, tmp_path, tmp_path)
    assert not is_own(mine | {"run_id": "1" * 12}, tmp_path, tmp_path)
    for code in ({"patch": "other"}, {"patch": None, "commit": "1" * 40}, {"patch": None, "sources": {}}):
        assert not is_own(some_receipt(**code), tmp_path, tmp_path)
    (tmp_path / "code.patch").write_text("another")
    assert not is_own(mine, tmp_path, tmp_path)


def test_what_others_could_have_written_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember(some_receipt(), tmp_path)
    folder = tmp_path / "labtrain" / "trained"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert not is_own(some_receipt(), tmp_path, tmp_path)
    folder.chmod(0o700)
    assert is_own(some_receipt(), tmp_path, tmp_path)
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    assert not is_own(some_receipt(), tmp_path, tmp_path)


def test_no_more_than_the_newest_runs_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "labtrain" / "trained"
    folder.mkdir(parents=True, mode=0o700)
    for number in range(MOST):
        (folder / str(number)).touch()
        os.utime(folder / str(number), (number, number))
    remember(some_receipt(), tmp_path)
    assert len(list(folder.iterdir())) == MOST // 2 + 1
    assert is_own(some_receipt(), tmp_path, tmp_path)


def test_a_state_directory_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember(some_receipt(), tmp_path)
    assert not is_own(some_receipt(), tmp_path, tmp_path)


def test_a_patch_beside_a_receipt_is_a_plain_file(tmp_path: Path) -> None:
    """A link would show any file of this user's, and a pipe would never end."""
    receipt = some_receipt(patch=None)
    assert patch_of(receipt, tmp_path) is None
    (tmp_path / "private").write_text("key")
    (tmp_path / "code.patch").symlink_to(tmp_path / "private")
    with pytest.raises(DamagedError, match=r"code\.patch is broken: a link, must be a file"):
        patch_of(receipt, tmp_path)
    (tmp_path / "code.patch").unlink()
    os.mkfifo(tmp_path / "code.patch")
    with pytest.raises(DamagedError, match=r"code\.patch is broken: not a regular file"):
        patch_of(receipt, tmp_path)
    assert not is_own(receipt, tmp_path, tmp_path)


# ------------------------------------------------------------------------------------------------------ stores


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """What listens where the receipt's store is: nobody may come."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.fixture
def run_dir(tmp_path: Path, server: socket.socket) -> Path:
    """A run of somebody else, whose receipt names a store."""
    folder = tmp_path / "runs" / str(GOLDEN["run_id"])
    folder.mkdir(parents=True)
    found = json.loads(json.dumps(GOLDEN))
    found["config"]["checkpoint"]["url"] = f"sftp://127.0.0.1:{server.getsockname()[1]}/lab"
    receipts.write(folder, found)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        lambda run: digest_target(str(run)),
        lambda run: digest_target(str(run), whole=True),
        lambda run: load_weights(run),
        lambda run: write_crate(run, run / "crate.zip", weights=True, author=None, licence=None),
        lambda run: find_origin(str(run), run.parent),
        lambda run: find_origin(run.name, run.parent),
        lambda run: Case(run_dir=run, receipt=receipts.read(run), trail={}, root=run, home=run, scratch=run, devices=None,
                         changes={}, say=print, tick=print).fetched(2),
    ],
)  # fmt: skip
def test_a_store_that_a_receipt_names_is_not_opened(command: Any, run_dir: Path) -> None:
    with pytest.raises(StoreError, match="only the receipt names this store, so labtrain does not open it") as error:
        command(run_dir)
    assert error.value.hint.startswith("labtrain store ls sftp://127.0.0.1:")


def test_diff_compares_without_that_store(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(run_dir, run_dir).same
    assert "checkpoints are not compared: sftp://" in capsys.readouterr().err


def test_a_store_is_opened_once_the_user_has_named_it(run_dir: Path, tmp_path: Path) -> None:
    """It, or one above it; by training to it, by `labtrain store`, or in the same command."""
    receipt = receipts.read(run_dir)
    assert receipt is not None
    url = str(receipt["config"]["checkpoint"]["url"])
    place = f"{url}/{run_dir.name}"
    assert checkpoints_of(run_dir, receipt, named=f"{url}/") == place
    assert find_origin(str(run_dir), run_dir.parent, named=url) == (run_dir, place)
    for other in (f"{url}2", f"{url}/other", url.replace("127.0.0.1", "127.0.0.2"), "sftp://", ""):
        remember_store(other)
        with pytest.raises(StoreError):
            checkpoints_of(run_dir, receipt, named=other)
    remember(receipt, tmp_path)
    assert checkpoints_of(run_dir, receipt) == place
    assert opened(f"{url}/a/b") == f"{url}/a/b"
    with pytest.raises(StoreError):
        opened(url.rpartition("/")[0])
    assert opened("runs/a") == "runs/a"
    receipt["config"]["checkpoint"]["url"] = None
    assert checkpoints_of(run_dir, receipt) == str(run_dir / "checkpoints")
