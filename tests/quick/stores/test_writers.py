"""Two writers of one place: whatever one of them does too late harms nothing of the other's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from labtrain.cli import main
from labtrain.stores.store import WRITER, Store, TakenOverError
from tests.support.saver import save, saver_of, writer_of
from tests.support.writers import Starting, walk, whole, write


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no writer wait for one that may just be leaving."""
    monkeypatch.setattr("labtrain.stores.store.LEAVING_S", 0.01)


@pytest.mark.parametrize(("others", "ends"), [(1, False), (2, True)], ids=["alive", "ended, twice"])
def test_a_writer_that_wakes_up_too_late_harms_nothing(others: int, ends: bool, tmp_path: Path) -> None:
    """In a folder: stopped before any of its changes, it leaves every checkpoint of who took over as it was."""
    assert walk(tmp_path, lambda number: str(tmp_path / f"store-{number}"), others=others, ends=ends) > 15


def test_the_same_where_nothing_is_renamed(tmp_path: Path) -> None:
    """As on S3: of two machines with a spool each."""
    assert walk(tmp_path, lambda number: f"memory://{tmp_path.name}/{number}", ends=True) > 15


@pytest.mark.parametrize(("others", "ends"), [(1, False), (1, True), (2, True)], ids=["alive", "ended", "ended, twice"])
def test_a_start_that_wakes_up_too_late_harms_nothing(others: int, ends: bool, tmp_path: Path) -> None:
    """In a folder: stopped before or after any of its changes, also just before it becomes the writer.

    Who took over meanwhile stays the writer, and what it saved stays: it is newer than what this one goes on from.
    """
    assert (
        walk(tmp_path, lambda number: str(tmp_path / f"store-{number}"), others=others, ends=ends, kind=Starting) > 20
    )


def test_the_same_start_where_nothing_is_renamed(tmp_path: Path) -> None:
    """As on S3: a spool each. Who took over may be stopped there; what it saved stays."""
    assert walk(tmp_path, lambda number: f"memory://{tmp_path.name}/{number}", ends=True, kind=Starting) > 20


def test_who_becomes_the_writer_looks_who_it_is(tmp_path: Path) -> None:
    """None, one, one that cannot be read; where it is another one by then, nothing is changed."""
    store = Store(tmp_path)
    assert store.seen() is None
    first = store.take_over()
    with pytest.raises(TakenOverError, match="another process"):
        store.renew("b" * 16, seen=None)
    with pytest.raises(TakenOverError, match="another process"):
        store.renew("b" * 16, seen="c" * 16)
    assert store.seen() == first
    assert [path.name for path in tmp_path.iterdir()] == [".writer.json"]
    store.renew("b" * 16, seen=first)
    assert store.seen() == "b" * 16
    store.leave("b" * 16)
    with pytest.raises(TakenOverError, match="another process"):
        store.renew("d" * 16, seen=first)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".writer.json").write_text("{")
    store.check_writer(store.take_over())
    assert [path.name for path in tmp_path.iterdir()] == [".writer.json"]


def test_a_writer_whose_file_is_gone_stops(tmp_path: Path) -> None:
    """Another has taken over and ended: with what both see, that is all there is to find."""
    saver = saver_of(tmp_path)
    saver.open()
    (tmp_path / "checkpoints" / ".writer.json").unlink()
    save(saver, 1)
    with pytest.raises(TakenOverError, match=r"another process has taken over .*checkpoints, and has ended") as error:
        saver.wait()
    assert "resumes from the newest" in error.value.hint
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_is_written_is_no_checkpoint(tmp_path: Path) -> None:
    """Neither to a reader nor to the next writer, which removes it; nor to `store prune`, which does too."""
    saver = saver_of(tmp_path)
    saver.open()
    write(saver, 1)
    place = tmp_path / "checkpoints"
    for why in ("writing", "removed"):
        left = place / f"step-0000000002.{why}-0123456789abcdef"
        left.mkdir()
        (left / "manifest.json").write_bytes((place / "step-0000000001" / "manifest.json").read_bytes())
    assert whole(writer_of(saver).home).keys() == {"step-0000000001"}
    saver.close(seconds=1, wanted=True)
    done = CliRunner().invoke(main, ["store", "prune", str(place)])
    assert done.stdout.count("left by a crash, removed") == 2
    assert [path.name for path in place.iterdir()] == ["step-0000000001"]
    left.mkdir()
    again = saver_of(tmp_path)
    again.open()
    assert sorted(path.name for path in place.iterdir()) == [".writer.json", "step-0000000001"]


def test_a_removal_that_was_not_decided_is_taken_back(tmp_path: Path) -> None:
    """A crash between the two renames of a removal: the next writer has the checkpoint again, and decides itself."""
    saver = saver_of(tmp_path)
    saver.open()
    write(saver, 1)
    before = whole(writer_of(saver).home)
    writer_of(saver).home.move("step-0000000001", "step-0000000001.removing-0123456789abcdef")
    assert whole(writer_of(saver).home) == {}
    again = saver_of(tmp_path)
    again.open()
    assert whole(writer_of(again).home) == before


def test_what_another_has_written_meanwhile_stays(tmp_path: Path) -> None:
    """`leave` removes .writer.json where it is this writer's, and puts another's back."""
    store = Store(tmp_path)
    token = store.take_over()
    found = store.writer()

    class Late(Store):
        def writer(self, path: str = WRITER) -> dict[str, object] | None:
            return {"token": "0123456789abcdef"}  # what it was when this one looked

    Late(tmp_path).leave("0123456789abcdef")
    assert store.writer() == found
    store.leave(token)
    assert list(tmp_path.iterdir()) == []


# Becomes the writer and leaves, but is killed at the so many-th call that changes or opens something.
KILLED = """
import os, signal, sys
from labtrain.stores.store import Store
store, left = Store(sys.argv[1]), [int(sys.argv[2])]
def killed(real):
    def call(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("link", "rename", "unlink", "fsync", "open"):
    setattr(os, name, killed(getattr(os, name)))
store.renew("5" * 16, seen=store.seen())
store.leave("5" * 16)
"""


def test_the_next_writer_removes_what_one_left_that_was_killed_at_any_call(tmp_path: Path) -> None:
    before, left = tmp_path / "before", set()
    begin = "import sys; from labtrain.stores.store import Store; Store(sys.argv[1]).take_over()"
    subprocess.run([sys.executable, "-c", begin, before], check=True)
    for number in range(1, 100):
        store = Store(shutil.copytree(before, tmp_path / str(number)))
        done = subprocess.run([sys.executable, "-c", KILLED, store.root, str(number)], check=False)
        if not done.returncode:
            break
        left |= {re.sub("[0-9a-f]{8,}", "X", path.name) for path in Path(store.root).iterdir()}
        store.renew("6" * 16, seen=store.seen())
        store.sweep("6" * 16)
        assert [path.name for path in Path(store.root).iterdir()] == [".writer.json"]
    assert left == {".writer.json", ".writer.json.X", ".writer.json.part-X"}
