"""train.py as people start it: more of tests/real/test_training.py."""

from pathlib import Path

import pytest

from tests.conftest import Experiment, Run
from tests.support.training import SHORT, folders, same

pytest_plugins = ["tests.support.training"]


def test_the_same_bits_with_workers_and_with_each_logger(experiment: Experiment, reference: Run) -> None:
    """How a run is executed and watched does not reach its weights, nor its name."""
    run = experiment.train(*SHORT, "data.num_workers=2", "logger=csv", "trainer.enable_progress_bar=true")
    same(run, reference)
    assert run.folder.name == reference.folder.name
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    assert "val/acc" in rows[0]
    assert len(rows) > 4


@pytest.mark.parametrize(
    "override",
    [
        "seed=43",
        "determinism.mode=portable",
        "model.width=8",
        "data.batch_size=63",
        "data.max_shift=0",
    ],
)
def test_what_determines_the_bits_changes_name_and_digest(
    override: str, experiment: Experiment, reference: Run
) -> None:
    run = experiment.train(*SHORT, override)
    assert run.digest != reference.digest
    assert run.folder.name != reference.folder.name


def test_edited_code_is_a_new_run(own_experiment: Experiment, reference: Run) -> None:
    model = own_experiment.root / "model.py"
    model.write_text(model.read_text().replace("nn.MaxPool2d(2)", "nn.AvgPool2d(2)"))
    run = own_experiment.train(*SHORT, cwd=own_experiment.root)
    assert Path(run.out.split()[0]).name != reference.folder.name
    assert run.digest != reference.digest


def test_four_processes_leave_one_folder(experiment: Experiment, tmp_path: Path) -> None:
    """gloo on the CPU; each rank runs its parent's job. The validation sees each sample once: acc * 270 is a whole number."""
    run = experiment.train(*SHORT, "trainer.accelerator=cpu", "trainer.devices=4")
    assert folders(tmp_path / "runs") == [tmp_path / run.folder]
    assert run.receipt["segments"][0]["devices"] == 4
    assert len(run.out.splitlines()) == 1
    accuracy = run.receipt["results"]["metrics"]["val/acc"]
    assert abs(accuracy * 270 - round(accuracy * 270)) < 1e-4
    assert accuracy > 0.9
    again = experiment.train(*SHORT, "trainer.accelerator=cpu", "trainer.devices=4", "resume=never")
    assert again.digest == run.digest


def test_a_sweep_goes_on_after_a_failing_job_and_ends_badly(experiment: Experiment, tmp_path: Path) -> None:
    """The second job fails in its training; the third is trained; the exit code is not 0."""
    run = experiment.train("-m", *SHORT, "trainer.max_steps=2", "model.dropout=0.1,7,0.2", code=None)
    assert run.code == 1
    assert len(run.out.splitlines()) == 2
    assert "dropout probability has to be between 0 and 1" in run.err
