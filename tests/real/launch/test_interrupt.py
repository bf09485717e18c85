"""Ctrl-C before a training handles it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Experiment

# sitecustomize.py: sends this process SIGINT when a module is imported.
HOOK = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "module",
    [
        "labtrain.launch.compose",
        pytest.param("hydra", marks=pytest.mark.release),
        "labtrain.launch.from_python",  # of stage 2, before its first line
        "torch",
        pytest.param("lightning.pytorch", marks=pytest.mark.release),
        "sklearn",  # of the experiment's data
    ],
)
def test_ctrl_c_during_an_import_is_no_traceback(experiment: Experiment, tmp_path: Path, module: str) -> None:
    """The process ends by the signal, as a program in C would; it says nothing and leaves nothing."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    done = subprocess.run(
        experiment.command("paths.runs=runs", "trainer.devices=1"),
        env={**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPT_AT": module},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (-signal.SIGINT, "", "")
    assert not (tmp_path / "runs").exists()
