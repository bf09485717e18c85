"""The writer's process: it outlives the training's, and the training's outlives it."""

import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.checkpoints.format import load_folder
from labtrain.record.digests import state_digest
from labtrain.stores.prune import check
from labtrain.stores.store import Store, writer_lives
from labtrain.training.start import wait_for_writer
from tests.conftest import ROOT
from tests.support.beside import mixed
from tests.support.waiting import wait_until


def run(whom: str, folder: Path) -> tuple[int, list[list[str]], str]:
    """Return the exit code, the lines that it printed, and its standard error."""
    command = [sys.executable, "-m", "tests.support.beside", whom, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        code = process.wait()  # the writer may still hold its output
        place = str(folder / "checkpoints")
        wait_for_writer(folder, place)
        assert not writer_lives(Store(place).writer())
        return code, [line.split() for line in process.stdout], process.stderr.read()


@pytest.mark.parametrize("whom", ["nobody", "writer", "trainer"])
def test_what_was_copied_is_saved_whoever_is_killed(whom: str, tmp_path: Path) -> None:
    """In the middle of the second save: by SIGKILL. A start waits until the writer has ended, and sees the save."""
    code, lines, said = run(whom, tmp_path)
    steps = (1, 2) if whom == "trainer" else (2, 3)  # the newest two
    assert (code, "the process that writes checkpoints was killed" in said) == (
        (-9, False) if whom == "trainer" else (0, whom == "writer")
    )
    store = Store(tmp_path / "checkpoints")
    found = store.checkpoints()
    assert [each.step for each in found] == list(steps)
    for checkpoint in found:
        assert check(checkpoint) is None
        assert store.manifest(checkpoint)["weights_digest"] == lines[checkpoint.step - 1][1]
        assert state_digest(load_folder(checkpoint.folder)) == state_digest(mixed(checkpoint.step))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {each.name for each in found}
    wait_until(lambda: not Path("/proc", lines[0][0]).exists())


def test_its_process_ends_though_a_loader_worker_holds_its_connection() -> None:
    """An exception ends a training while its workers live: they were forked after the writer's process."""
    code = (
        "import os, signal\nfrom labtrain.checkpoints.beside import InProcess\nhost = InProcess()\n"
        "worker = os.fork()\nif not worker:\n    signal.pause()\nhost.end()\nos.kill(worker, signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
