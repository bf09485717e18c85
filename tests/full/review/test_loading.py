"""`labtrain.load`: the model of a run, with its weights and by the code of the experiment here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK, Experiment, Run, changed

LOAD = """
import sys, torch, labtrain
before = torch.get_rng_state()
model = labtrain.load({run!r}, {path!r})
assert torch.equal(before, torch.get_rng_state())
assert not model.training and not any(each.training for each in model.modules())
assert {{each.device.type for each in model.parameters()}} == {{"cpu"}}
with torch.no_grad():
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
print(type(model).__module__, labtrain.digest(model))
"""


@pytest.fixture(scope="module")
def trained(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Run]:
    """An experiment with a run of 22 steps and two checkpoints."""
    root = tmp_path_factory.mktemp("trained") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    own = Experiment(root)
    return own, own.train(*QUICK, "trainer.max_steps=22", "checkpoint.keep_last=3", cwd=root)


@pytest.fixture
def copied(trained: tuple[Experiment, Run], tmp_path: Path) -> tuple[Path, Path]:
    """A copy that a test may change: the experiment's folder and the run's."""
    experiment, run = trained
    root = tmp_path / "digits"
    shutil.copytree(experiment.root, root)
    return root, root / run.folder.relative_to(experiment.root)


def python(code: str, cwd: Path, *, wanted: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == wanted, done.stderr
    return done


def test_a_run_is_named_by_its_folder_its_id_or_its_beginning(trained: tuple[Experiment, Run]) -> None:
    """From the experiment's folder or a folder in it; without a warning."""
    experiment, run = trained
    for name, cwd in ((str(run.folder), "."), (run.folder.name, "notebooks"), (run.folder.name[:6], "notebooks")):
        done = python(LOAD.format(run=name, path="."), experiment.root / cwd)
        assert (done.stdout, done.stderr) == (f"model {run.digest}\n", ""), name


def test_one_checkpoint_gives_its_own_weights(trained: tuple[Experiment, Run], tmp_path: Path) -> None:
    experiment, run = trained
    first, *_ = sorted((run.folder / "checkpoints").glob("step-*"))
    said = json.loads((first / "manifest.json").read_text())["weights_digest"]
    assert said != run.digest
    done = python(LOAD.format(run=str(first), path=str(experiment.root)), tmp_path)
    assert done.stdout == f"model {said}\n"
    lone = shutil.copytree(first, tmp_path / first.name)
    assert python(LOAD.format(run=str(lone), path=str(experiment.root)), tmp_path).stdout == f"model {said}\n"
    receipt = run.folder / "receipt.json"
    moved = receipt.rename(tmp_path / "receipt.json.away")
    said_why = python(LOAD.format(run=str(lone), path=str(experiment.root)), tmp_path, wanted=1).stderr
    moved.rename(receipt)
    assert f"the configuration of run {run.folder.name} is in its receipt, which is not in" in said_why
    assert "labtrain.load_weights needs no receipt" in said_why


def test_other_code_is_a_warning_and_a_model_that_does_not_fit_an_error(copied: tuple[Path, Path]) -> None:
    root, run_dir = copied
    model = root / "model.py"
    model.write_text(model.read_text() + "\n# changed\n")
    (root / "data.py").unlink()
    done = python(LOAD.format(run=run_dir.name, path="."), root)
    assert (
        done.stderr
        == f"warning: this code differs from that of {run_dir.relative_to(root)}: data.py (missing); model.py\n"
    )
    model.write_text(model.read_text().replace("nn.ReLU()", "nn.PReLU()", 1))
    said = python(LOAD.format(run=run_dir.name, path="."), root, wanted=1).stderr
    assert "ConfigError: the weights do not fit model.DigitsNet: net.2.weight is missing in the checkpoint" in said
    assert "hint: git checkout the code of the run" in said


def test_damaged_weights_are_an_error(copied: tuple[Path, Path]) -> None:
    root, run_dir = copied
    changed(run_dir, "results/weights_digest", "0" * 64)
    said = python(LOAD.format(run=run_dir.name, path="."), root, wanted=1).stderr
    assert "but receipt.json records 000000000000" in said


@pytest.mark.parametrize("key", ["_target_", "width"])
def test_a_receipt_of_somebody_else_calls_nothing_but_the_experiments_classes(
    key: str, copied: tuple[Path, Path], tmp_path: Path
) -> None:
    """Neither as the model nor as an argument of it; with trust=True it is called."""
    root, run_dir = copied
    foreign = {
        "_target_": "pathlib.Path.touch",
        "_args_": [{"_target_": "pathlib.Path", "_args_": [str(tmp_path / "x")]}],
    }
    changed(run_dir, "config/model" if key == "_target_" else "config/model/width", foreign)
    code = LOAD.format(run=run_dir.name, path=".")
    said = python(code, root, wanted=1).stderr
    assert f"you did not train runs/digits/{run_dir.name} in {root}, and its receipt says model." in said
    assert "_target_: pathlib.Path" in said
    assert not (tmp_path / "x").exists()
    python(code.replace("'.')", "'.', trust=True)"), root, wanted=1)  # it makes no model
    assert (tmp_path / "x").exists()


def test_a_receipt_of_somebody_else_with_the_experiments_class_is_loaded(
    copied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run_dir = copied
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
    assert python(LOAD.format(run=run_dir.name, path="."), root).stdout.startswith("model ")


def test_two_experiments_in_one_process_are_not_confused(
    trained: tuple[Experiment, Run], copied: tuple[Path, Path]
) -> None:
    root, run_dir = copied
    experiment, run = trained
    code = f"import labtrain; labtrain.load({str(run.folder)!r}, {str(experiment.root)!r})"
    said = python(f"{code}; labtrain.load({str(run_dir)!r}, {str(root)!r})", root, wanted=1).stderr
    assert f"this process has imported model from {os.path.realpath(experiment.root)}/model.py, not from" in said
