"""train.py as people start it: more of tests/real/test_training.py."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from labtrain.record.identity import shown
from labtrain.stores.layout import list_checkpoints
from tests.conftest import Experiment, Run
from tests.support.training import SHORT, folders, kill_and_go_on, kill_when, same, stop_and_go_on, wait_for_step

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


def test_never_starts_anew_beside(experiment: Experiment) -> None:
    quick = (*SHORT, "trainer.max_steps=2")
    first, second = experiment.train(*quick), experiment.train(*quick, "resume=never")
    assert second.folder.name == f"{first.folder.name}-2"
    assert second.digest == first.digest


def test_the_best_checkpoints_are_kept_beside_the_last(experiment: Experiment) -> None:
    run = experiment.train(
        *SHORT,
        "trainer.max_epochs=8",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=2",
        "checkpoint.monitor=val/loss",
        "checkpoint.mode=min",
    )
    kept = list_checkpoints(run.folder / "checkpoints")
    # Unchanged by how much is kept: the same run with all of them.
    monitored = ("checkpoint.keep_best=1", "checkpoint.monitor=val/loss", "checkpoint.keep_last=99")
    every = experiment.train(*SHORT, "trainer.max_epochs=8", "paths.runs=every", *monitored)
    losses = {entry["step"]: entry["score"] for entry in every.receipt["checkpoints"]}
    assert len(losses) == 8
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert {manifest["step"] for _, manifest in kept} == {*best, 160}


def test_a_metric_that_comes_every_second_epoch_is_waited_for(experiment: Experiment) -> None:
    """After the first epoch there is no validation yet, which is no error."""
    best = ("checkpoint.keep_last=1", "checkpoint.keep_best=1", "checkpoint.monitor=val/acc")
    run = experiment.train(*SHORT, "trainer.check_val_every_n_epoch=2", *best)
    assert list_checkpoints(run.folder / "checkpoints")[-1][1]["step"] == 80


def test_bf16_trains_and_gives_other_bits(experiment: Experiment, reference: Run) -> None:
    run = experiment.train(*SHORT, "trainer.precision=bf16-mixed")
    assert run.digest != reference.digest
    assert run.receipt["results"]["metrics"]["train/loss"] < 1


def test_a_sweep_on_two_processes_leaves_a_folder_a_run(experiment: Experiment, tmp_path: Path) -> None:
    """The known trap: ranks re-run the command line, and with it the sweep. The bits are those of one process."""
    sweep = ("-m", *SHORT, "trainer.max_epochs=1", "seed=1,2", "trainer.accelerator=cpu")
    run = experiment.train(*sweep, "trainer.devices=2")
    lines = [line.split() for line in run.out.splitlines()]
    assert sorted(tmp_path / line[0] for line in lines) == folders(tmp_path / "runs")
    assert len({line[1] for line in lines}) == 2
    assert len(lines) == 2
    alone = experiment.train(*sweep, "paths.runs=alone")
    assert alone.out.replace("alone/", "runs/") == run.out


def test_two_processes_stop_together_and_one_goes_on(experiment: Experiment, reference: Run) -> None:
    """SIGTERM to the first process alone, as `kill` sends it: both finish the step, one exit code, no rank stays behind."""
    one = (*SHORT, "trainer.accelerator=cpu")
    child = subprocess.Popen(
        experiment.command(*one, "trainer.devices=2"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(30)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=300) == 75
    assert child.stderr is not None
    assert "stopped by SIGTERM, saved: the same command goes on with runs/digits/" in child.stderr.read()
    (folder,) = folders(Path("runs"))
    assert subprocess.run(
        ["pgrep", "-f", f"labtrain.launch.job {folder}"], check=False, stdout=subprocess.DEVNULL
    ).returncode
    at = list_checkpoints(folder / "checkpoints")[-1][1]["step"]
    assert at >= 30
    run = experiment.train(*one)
    same(run, reference)
    assert [segment["devices"] for segment in run.receipt["segments"]] == [2, 1]
    assert run.receipt["segments"][1]["from_step"] == at


def test_a_run_of_edited_code_names_the_near_one(own_experiment: Experiment) -> None:
    """One line says which, and how to go on with it; and so it does."""
    kept = (*SHORT, f"paths.runs={own_experiment.root}/kept")
    child = subprocess.Popen(own_experiment.command(*kept), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    near: list[Path] = []
    while not near or not list_checkpoints(near[0] / "checkpoints"):
        near = folders(own_experiment.root / "kept")
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=300) == 75
    model = own_experiment.root / "model.py"
    model.write_text(f"{model.read_text()}\n# a thought\n")
    new = own_experiment.train(*kept, "trainer.max_epochs=4")
    assert f"near: {shown(near[0])}, unfinished, has this configuration and other code" in new.err
    assert f"(resume={shown(near[0])} goes on with it)" in new.err
    assert new.folder.resolve() != near[0]
    on = own_experiment.train(*kept, f"resume={near[0]}")
    assert on.folder.resolve() == near[0]
    assert "goes on with another code.sources.model.py" in on.err
    assert on.digest == new.digest  # a comment changes no bit


def test_the_curves_of_a_resumed_run_are_continued(experiment: Experiment) -> None:
    """metrics.csv holds each step once, with the numbers of the uninterrupted run."""
    logged = ("logger=csv", *SHORT[:1], *SHORT[2:], "trainer.log_every_n_steps=1")
    whole = experiment.train(*logged, "paths.runs=whole")
    kill_when(experiment, *logged, checkpoints=2)
    run = experiment.train(*logged)
    assert (run.folder / "metrics.csv").read_text() == (whole.folder / "metrics.csv").read_text()


def test_killed_and_resumed_is_the_same_run(experiment: Experiment, reference: Run) -> None:
    """SIGKILL in the epoch after the third checkpoint, whatever that moment is: weights, optimizer, metrics and trail are the same."""
    kill_and_go_on(experiment, reference, checkpoints=3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_written_down_and_the_same_command_goes_on(
    number: int, experiment: Experiment, reference: Run
) -> None:
    stop_and_go_on(experiment, reference, number)
