"""In a folder of a group, what labtrain makes is the group's, whatever the umask; nothing else changes."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labtrain.base.permissions import make_folder, mode_in, open_lock


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab").chmod(0o2775)
    return tmp_path / "lab"


@pytest.mark.parametrize(("closed", "file"), [(0o077, 0o660), (0o022, 0o664), (0o002, 0o664), (0o000, 0o664)])
def test_the_group_can_write_all_that_is_made_in_a_shared_folder(shared: Path, closed: int, file: int) -> None:
    """Also in folders and files that another program makes there; nobody else can write."""
    run = shared / "runs" / "digits" / "one"
    with umask(closed):
        make_folder(run)
        (run / "checkpoints" / "step-1").mkdir(parents=True)
        (run / "checkpoints" / "step-1" / "state.pt").touch()
        assert mode_in(run) == file
        os.close(open_lock(run / ".lock"))
    assert mode(run / "checkpoints" / "step-1" / "state.pt") == file
    assert mode(run / ".lock") == 0o660
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step-1"):
        assert mode(folder) == 0o2770 | (file & 0o005) | (0o005 if file & 0o004 else 0)
    assert mode(run.parent) == 0o2775  # one user's umask does not decide for those whose runs are beside it


def test_a_file_that_a_program_makes_for_its_owner_stays_closed(shared: Path) -> None:
    """As ssh-keygen and a password file do."""
    make_folder(shared / "run")
    os.close(os.open(shared / "run" / "key", os.O_CREAT | os.O_WRONLY, 0o600))
    assert mode(shared / "run" / "key") == 0o600


@pytest.mark.parametrize("above", [0o755, 0o775, 0o2755, 0o1777])
def test_in_any_other_folder_the_umask_counts(tmp_path: Path, above: int) -> None:
    """Only a folder with both the setgid bit and write permission for its group is shared."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(above)
    with umask(0o077):
        make_folder(tmp_path / "own" / "run")
        (tmp_path / "own" / "run" / "file").touch()
        os.close(open_lock(tmp_path / "own" / "run" / ".lock"))
    assert mode(tmp_path / "own" / "run") & 0o777 == 0o700
    assert mode(tmp_path / "own" / "run" / "file") == 0o600
    assert mode(tmp_path / "own" / "run" / ".lock") == 0o600


def test_a_run_of_an_older_labtrain_is_shared_if_its_group_could_write_to_it(shared: Path) -> None:
    """A folder that its owner closed stays closed."""
    with umask(0o002):
        (shared / "open").mkdir()
    (shared / "closed").mkdir(mode=0o700)
    with umask(0o077):
        for name in ("open", "closed"):
            make_folder(shared / name)
            (shared / name / "file").touch()
    assert mode(shared / "open" / "file") == 0o664
    assert mode(shared / "closed" / "file") == 0o600
    assert mode(shared / "closed") & 0o777 == 0o700


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            make_folder(tmp_path / name)
