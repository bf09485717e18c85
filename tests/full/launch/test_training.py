"""train.py as people start it: more of tests/real/launch/test_training.py."""

import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from labtrain.base.console import shown
from labtrain.record.digests import digest_file
from labtrain.stores.layout import list_checkpoints
from tests.conftest import QUICK, Experiment, Run
from tests.support.training import SHORT, folders, kill_and_go_on, kill_when, same, stop_and_go_on, wait_for_step
from tests.support.waiting import wait_until

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
    assert "stopped by SIGTERM, saved: the same command resumes runs/digits/" in child.stderr.read()
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
    wait_until(
        lambda: any(list_checkpoints(each / "checkpoints") for each in folders(own_experiment.root / "kept")),
        process=child,
    )
    near = folders(own_experiment.root / "kept")
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=300) == 75
    model = own_experiment.root / "model.py"
    model.write_text(f"{model.read_text()}\n# a thought\n")
    new = own_experiment.train(*kept, "trainer.max_epochs=4")
    assert f"note: the unfinished run {shown(near[0])} has this configuration, but other code" in new.err
    assert f"(resume={shown(near[0])} resumes it)" in new.err
    assert new.folder.resolve() != near[0]
    on = own_experiment.train(*kept, f"resume={near[0]}")
    assert on.folder.resolve() == near[0]
    assert "resumes with a different code.sources.model.py" in on.err
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


def test_the_example_learns(experiment: Experiment) -> None:
    """Over 97 % test accuracy, a receipt, checkpoints, a trail and the logs, and one line on stdout."""
    run = experiment.train("paths.runs=runs")
    assert re.fullmatch(r"runs/digits/[0-9a-f]{12} [0-9a-f]{64}\n", run.out)
    receipt = run.receipt
    assert receipt["status"] == "complete"
    assert receipt["results"]["metrics"]["test/acc"] > 0.97
    assert {"train/acc", "train/loss", "val/acc", "val/loss", "test/acc", "test/loss"} == set(
        receipt["results"]["metrics"]
    )
    assert receipt["results"]["weights_digest"] == run.digest == receipt["checkpoints"][-1]["weights_digest"]
    assert [checkpoint["step"] for checkpoint in receipt["checkpoints"]] == [280, 300]
    assert {path.name for path in run.folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "history.jsonl",
        "receipt.json",
        "tensorboard",
        "trail.jsonl",
    }
    assert [line["step"] for line in run.trail()] == list(range(1, 301))
    newest = run.folder / "checkpoints" / "step-0000000300"
    assert digest_file(newest / "weights.safetensors") == run.digest
    assert torch.load(newest / "state.pt", weights_only=True)["global_step"] == 300
    # A log file does not drown: a line an epoch, and the table.
    assert len(run.err.splitlines()) < 30
    assert re.search(r"epoch 15/15  batch 20/20  [\d,]+ samples/s  0:00:00 left  .*val/acc 0\.9", run.err)
    assert re.search(r"metric .* train .* val .* test", run.err)


def test_a_complete_run_says_so_and_trains_nothing(experiment: Experiment, reference: Run) -> None:
    runs = reference.folder.parents[1]
    before = (reference.folder / "receipt.json").read_bytes()
    run = experiment.train(*SHORT, f"paths.runs={runs}")
    assert "is complete: nothing to train" in run.err
    assert run.digest == reference.digest
    assert (reference.folder / "receipt.json").read_bytes() == before


def test_a_monitor_that_is_not_logged_is_an_error(experiment: Experiment) -> None:
    run = experiment.train(*SHORT, "checkpoint.keep_best=1", "checkpoint.monitor=val/f1", code=2)
    assert "checkpoint.monitor=val/f1: no such metric; logged metrics: " in run.err
    assert "val/acc" in run.err


def test_checkpoints_elsewhere(experiment: Experiment, reference: Run, tmp_path: Path) -> None:
    """checkpoint.url holds a folder a run; a run whose local folder is lost goes on from there."""
    run = experiment.train(*SHORT, f"checkpoint.url={tmp_path}/store")
    assert run.digest == reference.digest
    assert [path.name for path in (tmp_path / "store").iterdir()] == [run.folder.name]
    (run.folder / "receipt.json").unlink()
    again = experiment.train(*SHORT, f"checkpoint.url={tmp_path}/store")
    assert again.digest == reference.digest
    assert "resumes from step-0000000080" in again.err


def test_killed_in_mid_epoch_with_workers_and_started_again_at_once(experiment: Experiment, reference: Run) -> None:
    """The lock of the run goes with the process, although its loader's workers were forked from it."""
    often = (*SHORT, "checkpoint.every_n_steps=1", "data.num_workers=2")
    child = subprocess.Popen(experiment.command(*often), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(33)
    child.kill()
    child.wait()
    run = experiment.train(*SHORT)
    same(run, reference)
    assert run.receipt["segments"][1]["from_step"] % 20 != 0


def test_torchs_loader_gives_the_same_bits(own_experiment: Experiment) -> None:
    """Whoever replaces one loader by the other gets another run, since the code differs, and the same weights."""
    quick = ("trainer.max_steps=2", *QUICK)
    ours = own_experiment.train(*quick, cwd=own_experiment.root)
    data = own_experiment.root / "data.py"
    data.write_text(data.read_text().replace("labtrain.DataLoader(", "torch.utils.data.DataLoader("))
    torchs = own_experiment.train(*quick, cwd=own_experiment.root)
    assert torchs.out.split()[0] != ours.out.split()[0]
    assert torchs.out.split()[1] == ours.out.split()[1]
    assert "warning: the training data" not in torchs.err


def test_wandb_without_a_key_is_offline_and_connects_nowhere(experiment: Experiment, tmp_path: Path) -> None:
    """W&B's own address is set to a server of this test, which must hear nothing."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    heard.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        env = {
            "WANDB_BASE_URL": f"http://{address}",
            "HTTP_PROXY": f"http://{address}",
            "HTTPS_PROXY": f"http://{address}",
            "HOME": str(tmp_path),
            "WANDB_API_KEY": "",
        }
        run = experiment.train("logger=many", *SHORT[:1], *SHORT[2:], "trainer.max_epochs=1", env=env)
        server.shutdown(socket.SHUT_RDWR)
    assert heard == []
    assert {"metrics.csv", "tensorboard", "wandb"} <= {path.name for path in run.folder.iterdir()}
    assert list(run.folder.glob("wandb/offline-run-*/*.wandb"))
