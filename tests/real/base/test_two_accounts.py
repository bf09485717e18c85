"""Two accounts of a group share a folder of runs, whatever their umasks; a third one is a stranger. As root."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK, skip_or_fail
from tests.support.accounts import Lab
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.accounts"]

SHORT = (
    *QUICK,
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
    "checkpoint.every_n_steps=5",
    "checkpoint.keep_last=2",
)


def train(lab: Lab, *overrides: str) -> list[str]:
    return [sys.executable, "train.py", *overrides, *SHORT, f"paths.runs={lab.folder}/runs"]


def closed(folder: Path) -> list[str]:
    """Return what the group cannot read and write, or everybody can write."""
    return [
        f"{stat.S_IMODE(path.lstat().st_mode):o} {path.relative_to(folder)}"
        for path in [folder, *sorted(folder.rglob("*"))]
        if not path.is_symlink() and (path.stat().st_mode & 0o060 != 0o060 or path.stat().st_mode & stat.S_IWOTH)
    ]


def test_two_members_of_a_group_use_one_anothers_runs(lab: Lab) -> None:
    """One, with umask 077, is killed; two, with umask 022, lists, resumes, verifies, compares, notes and removes it.

    Every file below the shared folder is the group's to read and write, and nobody else's.
    """
    command = train(lab)
    process = lab.one.start(*command)
    wait_until(lambda: list(lab.folder.glob("runs/*/*/checkpoints/step-??????????/manifest.json")), process=process)
    process.kill()
    process.wait()
    (run,) = [path.parent for path in lab.folder.glob("runs/*/*/receipt.json")]
    assert run.owner() == lab.one.name
    assert run.group() == "labtrain-lab"
    assert closed(lab.folder) == []
    (row,) = json.loads(lab.two.labtrain("ls", lab.folder / "runs", "--json"))
    assert row["status"] == "killed"
    done = lab.two.run(*command)
    assert "resumes from step-" in done.stderr, done.stderr
    assert done.stdout.split()[0] == str(run)
    assert {path.owner() for path in (run / "checkpoints").iterdir()} >= {lab.two.name}
    assert "yes" in lab.two.labtrain("verify", run, "--trust", "--steps", "3")
    lab.one.labtrain("verify", run, "--trust", "--steps", "0")
    assert "same" in lab.two.labtrain("diff", run, run)
    lab.two.labtrain("note", run, "by two")
    lab.one.labtrain("note", run, "by one")
    assert closed(lab.folder) == []
    refused = lab.stranger.labtrain("ls", lab.folder / "runs")  # of a run with umask 077
    assert "no permission to read it; its owner is labtrain-one" in refused
    lab.two.labtrain("rm", run, "--yes")
    assert not run.exists()


@pytest.mark.release
def test_a_stranger_reads_what_the_umask_allows_and_writes_nothing(lab: Lab) -> None:
    """A sweep with two loggers and a store, by two with umask 022; one finds its runs complete."""
    sweep = train(lab, "-m", "seed=1,2", f"checkpoint.url={lab.folder}/store")
    sweep = [each for each in sweep if each != "logger=none"] + ["trainer.max_steps=3", "logger=[tensorboard,csv]"]
    done = lab.two.run(*sweep)
    assert done.returncode == 0, done.stderr
    assert closed(lab.folder) == []
    run = next(lab.folder.glob("runs/*/*/receipt.json")).parent
    assert "complete" in lab.stranger.labtrain("ls", lab.folder / "runs")
    lab.stranger.labtrain("verify", run, "--steps", "0")
    for arguments in (["note", run, "mine"], ["rm", run, "--yes"]):
        assert "permission" in lab.stranger.labtrain(*arguments, code=2)
    assert "no write permission" in lab.stranger.run(*train(lab, "seed=3")).stderr
    again = lab.one.run(*sweep)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is complete: nothing to train") == 2


def test_a_file_system_without_access_lists_is_told(tmp_path: Path) -> None:
    """On ramfs: once, and not to a user whose umask lets the group write."""
    if os.getuid():
        skip_or_fail("only root can mount a file system: run the tests as root to see this one")
    code = "import pathlib, labtrain.base.permissions as p; p.make_folder(pathlib.Path('a/b/c')); pathlib.Path('a/b/c/d').touch()"
    mount = f"mount -t ramfs none {tmp_path} && chmod 2775 {tmp_path} && cd {tmp_path}"
    for umask, warnings in (("022", 1), ("002", 0)):
        script = f"{mount} && umask {umask} && {sys.executable} -c {shlex.quote(code)} && stat -c %a a/b/c a/b/c/d"
        done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=True)
        assert done.stderr.count("hint: umask 002 before the command") == warnings
        assert done.stdout.split() == ["2775", "644" if warnings else "664"]
