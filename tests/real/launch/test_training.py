"""train.py as people start it: real processes, real data, real signals. Bits are compared by digest."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labtrain.base.errors import DeviceError
from labtrain.stores.layout import list_checkpoints
from labtrain.training.fit import explain
from tests.conftest import QUICK, Experiment, Run
from tests.support.training import SHORT, folders, kill_and_go_on, kill_when, same, stop_and_go_on, wait_for_step
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.training"]


# ----------------------------------------------------------------------------------------------------------- one run


# ------------------------------------------------------------------------------------------------------------ devices


def test_out_of_memory_names_the_numbers_and_the_knobs() -> None:
    """The exception is torch's own class with torch's own words; no GPU is at hand to run out of memory on."""
    words = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 3.11 GiB is free. See documentation for x"
    error = explain(
        torch.OutOfMemoryError(words),
        {
            "data": {"batch_size": 64},
            "determinism": {"shards": 4},
            "trainer": {"strategy": "auto", "accelerator": "gpu"},
        },
        started=True,
    )
    assert isinstance(error, DeviceError)
    assert "20.00 GiB" in str(error)
    assert "See documentation" not in str(error)
    for knob in (
        "determinism.shards=8",
        "data.batch_size=32 trainer.accumulate_grad_batches=2",
        "trainer.precision=bf16-mixed",
    ):
        assert knob in error.hint


# ------------------------------------------------------------------------------------------------- stopped and resumed


def test_killed_and_resumed_is_the_same_run(experiment: Experiment, reference: Run) -> None:
    """SIGKILL in the epoch after a checkpoint, whatever that moment is: weights, optimizer, metrics and trail are the same."""
    kill_and_go_on(experiment, reference, checkpoints=1)


def test_killed_ranks_resume_as_one_run(experiment: Experiment, tmp_path: Path) -> None:
    """Two processes; SIGKILL of rank 0 alone. The other does not stay behind, and the run goes on with the same bits."""
    two = (*SHORT, "trainer.accelerator=cpu", "trainer.devices=2")
    whole = experiment.train(*two, "paths.runs=whole")
    assert kill_when(experiment, *two, checkpoints=1) == -signal.SIGKILL
    (folder,) = folders(Path("runs"))
    ranks = ["pgrep", "-f", f"labtrain.launch.job {folder}"]
    wait_until(lambda: subprocess.run(ranks, capture_output=True, check=False).returncode)  # none stays behind
    same(experiment.train(*two), whole)


def test_a_signal_is_written_down_and_the_same_command_goes_on(experiment: Experiment, reference: Run) -> None:
    stop_and_go_on(experiment, reference, signal.SIGTERM)


def test_a_signal_that_goes_on_coming_does_not_end_it_before_its_receipt_is_closed(experiment: Experiment) -> None:
    """As at a launcher's death, which the kernel tells once for each of its threads."""
    child = subprocess.Popen(experiment.command(*SHORT), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(30)
    (folder,) = folders(Path("runs"))
    while child.poll() is None and json.loads((folder / "receipt.json").read_text())["status"] == "running":
        child.send_signal(signal.SIGTERM)
    child.wait(timeout=300)
    assert json.loads((folder / "receipt.json").read_text())["segments"][0]["why"] == "SIGTERM"


def test_a_second_ctrl_c_ends_at_once(own_experiment: Experiment) -> None:
    """In a second step that takes a minute: the first signal waits for it, Ctrl-C after it does not."""
    model, beats = own_experiment.root / "model.py", own_experiment.root / "beats"
    slow = "for _ in range(6000 if self.global_step else 0):\n"
    slow += "            open('beats', 'a').write('.'), __import__('time').sleep(0.01)\n"  # fixed: a long step
    model.write_text(model.read_text().replace("images, labels = batch", f"{slow}        images, labels = batch"))
    child = subprocess.Popen(
        own_experiment.command(*QUICK, "trainer.num_sanity_val_steps=0"),
        cwd=own_experiment.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def wait_for_beats() -> None:
        """Until the step has gone on for two beats: Python runs a signal's handler before the second."""
        seen = beats.stat().st_size
        wait_until(lambda: beats.stat().st_size > seen + 1, process=child)

    wait_until(beats.exists, process=child)
    child.send_signal(signal.SIGTERM)
    wait_for_beats()
    child.send_signal(signal.SIGTERM)  # a parent's death may send it several times
    wait_for_beats()
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) == -signal.SIGINT


@pytest.mark.release
def test_a_damaged_checkpoint_is_passed_over_aloud(experiment: Experiment, reference: Run) -> None:
    """One flipped bit in the newest: the run goes on from the one before, and ends with the same bits."""
    kill_when(experiment, *SHORT, checkpoints=2)
    (folder,) = folders(Path("runs"))
    newest = list_checkpoints(folder / "checkpoints")[-1][0]
    raw = bytearray((newest / "weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "weights.safetensors").write_bytes(raw)
    run = experiment.train(*SHORT)
    assert re.search(
        rf"warning: \S*{newest.name}/weights.safetensors: sha256 [0-9a-f]{{12}}, manifest says [0-9a-f]{{12}}", run.err
    )
    same(run, reference)


def test_a_broken_receipt_stops_the_start(experiment: Experiment) -> None:
    kill_when(experiment, *SHORT, checkpoints=1)
    (folder,) = folders(Path("runs"))
    (folder / "receipt.json").write_text("{")
    run = experiment.train(*SHORT, code=2)
    assert "receipt.json is broken" in run.err
    assert "hint: mv " in run.err


@pytest.mark.release
def test_two_starts_of_one_run_do_not_meet(experiment: Experiment) -> None:
    """The second is refused, names the first, and leaves it alone."""
    first = subprocess.Popen(
        experiment.command(*SHORT, "trainer.max_epochs=400"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: list(Path("runs").glob("*/*/receipt.json")), process=first)
        second = experiment.train(*SHORT, "trainer.max_epochs=400", code=2)
        assert f"is being trained by process {first.pid} on {socket.gethostname()}" in second.err
        assert len(folders(Path("runs"))) == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_data_file_is_named_and_nothing_is_left(own_experiment: Experiment) -> None:
    data = own_experiment.root / "data.py"
    data.write_text(
        data.read_text().replace(
            "        digits = load_digits()\n",
            '        open("/data/no-such-digits.csv")\n        digits = load_digits()\n',
        )
    )
    run = own_experiment.train(cwd=own_experiment.root, code=2)
    assert run.err.startswith("error: No such file or directory: /data/no-such-digits.csv\n\nhint: ")
    assert list((own_experiment.root / "runs").glob("*/*")) == []


def test_a_folder_that_cannot_be_written_is_refused_at_once(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    assert "runs: not a folder" in experiment.train(*SHORT, code=2).err
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    # Root may write anywhere, as long as it has that capability.
    as_others = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    run = experiment.train(*SHORT, f"paths.runs={locked}/runs", code=2, prefix=as_others)
    assert "no write permission" in run.err


def test_an_exception_of_the_model_keeps_its_traceback(own_experiment: Experiment) -> None:
    model = own_experiment.root / "model.py"
    model.write_text(model.read_text().replace('return self._step(batch, "train", self.train_acc)', "return 1 / 0"))
    run = own_experiment.train(*QUICK, cwd=own_experiment.root, code=1)
    assert "ZeroDivisionError" in run.err
    (folder,) = folders(own_experiment.root / "runs")
    assert json.loads((folder / "receipt.json").read_text())["status"] == "failed"


# -------------------------------------------------------------------------------------------------------------- wandb


# ------------------------------------------------------------------------------------------------------ as a function


def test_train_can_be_called(own_experiment: Experiment, reference: Run) -> None:
    """`labtrain.train(cfg)` in a person's own process: the same run, with the same bits, as train.py's."""
    config = {**reference.receipt["config"], "paths": {"runs": str(own_experiment.root / "runs")}}
    script = own_experiment.root / "mine.py"
    script.write_text(
        f"import labtrain\nresult = labtrain.train({config!r})\nprint(result.run_dir, result.weights_digest)\n"
    )
    quiet = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=own_experiment.root
    )
    assert quiet.returncode == 0, quiet.stderr
    folder, digest = quiet.stdout.split()
    assert digest == reference.digest
    assert json.loads((Path(folder) / "receipt.json").read_text())["status"] == "complete"
    again = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=own_experiment.root
    )
    assert again.stdout == quiet.stdout
