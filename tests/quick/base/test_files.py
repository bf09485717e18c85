"""Files that are written in one step."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labtrain.base.console import shown
from labtrain.base.errors import WriteError, explain_disk
from labtrain.base.files import atomic, write_atomically, writing


def test_a_write_that_fails_leaves_the_old_file_only(tmp_path: Path) -> None:
    """A reader sees the old text or the new one, and no scratch file stays."""
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError, match="half"), atomic(path) as scratch:
        raise RuntimeError("half" * scratch.write_text("x"))
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write_atomically(path, "new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_a_ckpt_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    """torch.save puts the file's name into the archive, without what follows the last dot: our random part."""
    path = tmp_path / "model.ckpt"
    found = []
    for _ in range(2):
        with atomic(path) as scratch:
            torch.save({"weights": torch.arange(3)}, scratch)
        found.append(path.read_bytes())
    assert found[0] == found[1]


def test_the_next_write_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    """But not the scratch file of a process that lives, nor a file of the user's with a name like it."""
    path = tmp_path / "file"
    code = (
        "import os, signal, sys; from pathlib import Path; from labtrain.base.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as scratch:\n"
        "    print(scratch, flush=True); sys.stdin.read(1); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    scratch = Path(child.stdout.readline().decode().strip())
    kept = {
        tmp_path / name for name in (".file.part", ".file.20240101", ".file.part-old", "file.part-00000000", "file")
    }
    for each in kept - {path}:
        each.touch()
    write_atomically(path, "of another process")
    assert set(tmp_path.iterdir()) == {*kept, scratch}
    child.communicate(b"x")
    assert scratch.exists()
    write_atomically(path, "later")
    assert set(tmp_path.iterdir()) == kept


def test_an_error_of_a_write_names_file_and_reason(tmp_path: Path) -> None:
    """Also if another exception came after it; an error of a file elsewhere passes."""
    path = tmp_path / "runs" / "file"

    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ValueError("unexpected pos 64 vs 0") from error

    told = "runs/file could not be written: No space left on device"
    with pytest.raises(WriteError, match=told) as raised, writing(path):
        fail()
    place = shown(tmp_path)
    assert raised.value.hint == f"df -h {place}; ls -ld {place}; then the same command again"
    with pytest.raises(FileNotFoundError), writing(path):
        Path("/nowhere/at/all").read_text()
    with pytest.raises(ZeroDivisionError), writing(path):
        1 / 0  # noqa: B018


def test_an_error_of_a_full_disk_is_explained_wherever_it_comes_from(tmp_path: Path) -> None:
    own = explain_disk(FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "trail")), tmp_path)
    assert own is not None
    assert "trail could not be written: No such file or directory" in str(own)
    assert explain_disk(FileNotFoundError(errno.ENOENT, "No such file or directory", "data.csv"), tmp_path) is None
    assert explain_disk(ValueError("shape"), tmp_path) is None
    try:
        raise OSError(errno.EIO, "Input/output error")
    except OSError as error:
        known = explain_disk(error, tmp_path)
    assert known is not None
    assert "in test_an_error_of_a_full_disk" in str(known), "the line that wrote"
