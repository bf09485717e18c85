"""`labtrain.train(cfg)` in a script or a notebook: the run of train.py, with its name and its bits, and each resumes the
other.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import labtrain
from labtrain.base.errors import JobFailedError
from tests.conftest import QUICK, Experiment, Run
from tests.support.training import SHORT, folders, kill_when, same, wait_for_step
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.training"]


def script(experiment: Experiment, *overrides: str, notebook: bool = False) -> str:
    """Return a script that trains and prints the folder and the digest, as train.py does.

    As in a notebook, torch is imported, and with `notebook` standard error is a stream of Python's.
    """
    return f"""
import io, sys
import torch
import labtrain
from labtrain.base.signals import Stopped
torch.rand(3)
printed = sys.stderr = io.StringIO() if {notebook} else sys.stderr
cfg = labtrain.compose({list(overrides)!r}, path={str(experiment.root)!r})
try:
    result = labtrain.train(cfg)
    print(result.run_dir, result.weights_digest)
    if {notebook}:
        sys.__stderr__.write(printed.getvalue())
except Stopped as stop:
    print("stopped", stop, stop.saved)
"""


def python(code: str, *, code_wanted: int = 0) -> Run:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == code_wanted, done.stderr
    return Run(done.returncode, done.stdout, done.stderr, Path.cwd())


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(each) for each in found.stdout.split()]


@pytest.fixture
def started(experiment: Experiment) -> Iterator[subprocess.Popen[str]]:
    """A script that has trained thirty steps."""
    command = [sys.executable, "-c", script(experiment, *SHORT)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for_step(30)
    yield child
    child.kill()
    child.communicate()


@pytest.mark.parametrize("notebook", [False, True])
def test_it_is_the_run_of_train_py(notebook: bool, experiment: Experiment, reference: Run) -> None:
    """The same id, weights, state and trail, though torch was imported before; and what it printed is shown."""
    run = python(script(experiment, *SHORT, notebook=notebook))
    assert run.folder.name == reference.folder.name
    same(run, reference)
    assert run.receipt["determinism"] == reference.receipt["determinism"]
    assert "4 steps" not in run.out
    assert "test" in run.err  # the table
    assert experiment.train(*SHORT).err.endswith("is complete: nothing to train (resume=never trains a new run)\n")
    assert python(script(experiment, *SHORT)).out == run.out


def test_two_devices_in_a_notebook_are_the_run_of_one(experiment: Experiment, reference: Run) -> None:
    two = (*SHORT, "trainer.accelerator=cpu", "trainer.devices=2")
    run = python(script(experiment, *two, notebook=True))
    assert run.folder.name == experiment.train(*two, "paths.runs=whole").folder.name
    assert run.digest == reference.digest


def test_it_resumes_what_train_py_was_killed_in(experiment: Experiment, reference: Run) -> None:
    assert kill_when(experiment, *SHORT, checkpoints=1) == -signal.SIGKILL
    run = python(script(experiment, *SHORT))
    assert len(run.receipt["segments"]) == 2
    same(run, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_train_py_resumes(
    number: signal.Signals, started: subprocess.Popen[str], experiment: Experiment, reference: Run
) -> None:
    """Sent to the script alone, as a notebook's kernel gets it."""
    started.send_signal(number)
    out, _ = started.communicate(timeout=300)
    assert out == f"stopped {number.name} True\n"
    (folder,) = folders(Path("runs"))
    assert json.loads((folder / "receipt.json").read_text())["segments"][0]["why"] == number.name
    run = experiment.train(*SHORT)
    assert len(run.receipt["segments"]) == 2
    same(run, reference)


def test_ctrl_c_to_all_processes_of_a_group_saves_too(experiment: Experiment) -> None:
    """As a terminal sends it, and Jupyter: the training gets it once, since a second one would end it unsaved."""
    command = [sys.executable, "-c", script(experiment, *SHORT)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(30)
    os.killpg(child.pid, signal.SIGINT)
    assert child.communicate(timeout=300)[0] == "stopped SIGINT True\n"


def test_it_ends_with_a_kernel_that_is_killed(
    started: subprocess.Popen[str], experiment: Experiment, reference: Run
) -> None:
    """It saves, so that nothing is lost, and the same call resumes."""
    (trains,) = children(started.pid)
    started.kill()
    started.wait()
    wait_until(lambda: not Path(f"/proc/{trains}/exe").exists())
    (folder,) = folders(Path("runs"))
    assert json.loads((folder / "receipt.json").read_text())["status"] == "interrupted"
    same(python(script(experiment, *SHORT)), reference)


def test_a_training_that_is_killed_is_an_error_of_python(experiment: Experiment) -> None:
    command = [sys.executable, "-c", script(experiment, *SHORT)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(30)
    (trains,) = children(child.pid)
    os.kill(trains, signal.SIGKILL)
    said = child.communicate(timeout=300)[1]
    assert child.returncode == 1
    assert "JobFailedError: runs/digits/" in said
    assert "the training's process was killed by SIGKILL\n\nhint: the same call resumes it" in said


def test_a_changed_model_is_another_run(own_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cell may write model.py between two calls: the second trains what the file says now."""
    monkeypatch.chdir(own_experiment.root)
    cfg = labtrain.compose([*QUICK, "trainer.max_steps=2", "data.num_workers=0"])
    first = labtrain.train(cfg)
    model = own_experiment.root / "model.py"
    model.write_text(model.read_text().replace("nn.ReLU()", "nn.SiLU()"))
    second = labtrain.train(cfg)
    assert first.run_dir != second.run_dir
    assert first.weights_digest != second.weights_digest
    run = own_experiment.train(*QUICK, "trainer.max_steps=2", cwd=own_experiment.root)
    assert (run.folder, run.digest) == (second.run_dir, second.weights_digest)


def test_modules_beside_a_notebook_are_not_part_of_the_run(own_experiment: Experiment) -> None:
    """train.py does not see them: a file that has the name of an installed module, in the notebook's folder."""
    folder = own_experiment.root.parent / "elsewhere"
    folder.mkdir()
    (folder / "colorsys.py").write_text("")
    cfg = f"cfg = labtrain.compose(['trainer.max_steps=1', 'logger=none'], path={str(own_experiment.root)!r})"
    code = f"import labtrain; {cfg}; print(labtrain.train(cfg).run_dir.name)"
    (folder / "cell.py").write_text(code)
    cell, here = (
        subprocess.run([sys.executable, *each], cwd=folder, capture_output=True, text=True, check=True).stdout
        for each in (("cell.py",), ("-c", code))
    )
    run = own_experiment.train("trainer.max_steps=1", "logger=none")
    assert {cell.strip(), here.strip()} == {run.folder.name}


def test_errors_are_exceptions_of_python(own_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the configuration, of labtrain in the training's process, and of the person's own code."""
    monkeypatch.chdir(own_experiment.root)
    cfg = labtrain.compose([*QUICK, "trainer.max_steps=2"])
    cfg.seed = "x"
    with pytest.raises(labtrain.LabtrainError, match=r"seed=x: must be an integer"):
        labtrain.train(cfg)
    cfg.seed = 1
    cfg.model._target_ = "model.Nothing"
    with pytest.raises(labtrain.LabtrainError, match=r"model._target_=model.Nothing") as found:
        labtrain.train(cfg)
    assert found.value.hint == "correct model in conf/, or the class it names"
    cfg.model._target_ = "model.DigitsNet"
    model = own_experiment.root / "model.py"
    model.write_text(model.read_text().replace('return self._step(batch, "train", self.train_acc)', "return 1 / 0"))
    with pytest.raises(
        JobFailedError, match=r"(?s)ZeroDivisionError: division by zero.*model\.py:\d+, in training_step"
    ):
        labtrain.train(cfg)
    assert not (own_experiment.root / "runs" / "digits").exists() or all(
        json.loads((folder / "receipt.json").read_text())["status"] == "failed"
        for folder in folders(own_experiment.root / "runs")
    )
