"""Runs on a real Slurm of two nodes: more of tests/real/launch/test_slurm.py."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, Experiment, Run
from tests.support.slurm import EPOCHS, PORTABLE, Cluster, Slurm, break_rank, patient, wait_for_steps
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.slurm"]
pytestmark = pytest.mark.usefixtures("cleared")


def test_a_signal_before_the_training_has_begun_loses_no_job(cluster: Cluster, alone: Run) -> None:
    """Sent as soon as the four tasks hold it back, which `env --block-signal` does before Python is there."""
    job = cluster.submit(EPOCHS)
    with patient(cluster.out):
        wait_until(lambda: cluster.slurm.hold_back(signal.SIGUSR1) == 4)
        assert not cluster.runs.exists()
        cluster.slurm.signal(job, "USR1")
        wait_until(lambda: cluster.slurm.field(job, "Restarts") == "1")
        assert cluster.slurm.ended(job) == "COMPLETED"
    receipt, digest = cluster.result()
    assert digest == alone.digest
    assert [segment["status"] for segment in receipt["segments"]] == ["complete"], "the signal came too late"


def test_preempted_it_saves_and_goes_on_when_its_turn_comes(cluster: Cluster, alone: Run) -> None:
    """Slurm sends SIGTERM, waits for the partition's GraceTime and queues the job again."""
    job = cluster.submit(EPOCHS)
    with patient(cluster.out):
        wait_for_steps(cluster.runs / "digits", 20)
        cluster.slurm.submit("--partition=urgent", "--nodes=2", "--wrap=true", "--output=/dev/null", cwd=cluster.root)
        wait_until(lambda: cluster.slurm.field(job, "Restarts") == "1")
        assert cluster.slurm.ended(job) == "COMPLETED"
    receipt, digest = cluster.result()
    assert digest == alone.digest
    assert [(segment["status"], segment["why"]) for segment in receipt["segments"]] == [
        ("interrupted", "SIGTERM"), ("complete", None)]  # fmt: skip


def test_a_sweep_of_four_is_an_array_of_jobs(slurm: Slurm, experiment: Experiment) -> None:
    """A fifth fails, for a model of no width, and is named when the others are there."""
    sweep = ("hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=30")
    sizes, steps = "model.width=2,3,4,5", "trainer.max_steps=4"
    five = ("-m", *PORTABLE, steps, "paths.runs=runs", f"{sizes},0", *sweep)
    done = experiment.train(*five, env=slurm.variables, code=None)
    assert done.code in (1, 143)  # it failed by itself, or srun was faster
    assert re.search(r"^error: runs/digits/\w+ ended with exit code", done.err, re.MULTILINE), done.err
    runs = sorted(Path("runs/digits").iterdir())
    assert len(runs) == 4, done.err
    found = {run.name: json.loads((run / "receipt.json").read_text())["results"]["weights_digest"] for run in runs}
    assert all(json.loads((run / "receipt.json").read_text())["segments"][0]["devices"] == 2 for run in runs)
    alone = experiment.train("-m", *PORTABLE, steps, "paths.runs=alone", sizes)
    assert found == {Path(line.split()[0]).name: line.split()[1] for line in alone.out.splitlines() if line}


def test_a_rank_that_dies_takes_its_job_of_a_sweep_down(
    slurm: Slurm, own_experiment: Experiment, tmp_path: Path
) -> None:
    break_rank(own_experiment, 1)
    sweep = ("-m", *PORTABLE, EPOCHS, "paths.runs=runs", "hydra/launcher=submitit_slurm")
    done = own_experiment.train(*sweep, "hydra.launcher.tasks_per_node=2", env=slurm.variables, code=None, cwd=tmp_path)
    assert done.code in (1, 143)  # it failed by itself, or srun was faster
    assert re.search(r"^error: runs/digits/\w+ ended with exit code", done.err, re.MULTILINE), done.err
    said = "".join(log.read_text() for log in (tmp_path / "runs/.sweep/.submitit").rglob("*_1_log.err"))
    assert "ArithmeticError: of rank 1" in said


def test_a_signalled_job_of_a_sweep_goes_on_and_can_be_verified(
    slurm: Slurm, experiment: Experiment, alone: Run
) -> None:
    sweep = ("-m", *PORTABLE, EPOCHS, "paths.runs=runs", "hydra/launcher=submitit_slurm")
    command = experiment.command(*sweep, "hydra.launcher.tasks_per_node=2")
    process = subprocess.Popen(command, env={**os.environ, **slurm.variables})
    run = wait_for_steps(Path("runs/digits"), 10)
    scripts = list(Path("runs/.sweep/.submitit").rglob("*.sh"))
    assert scripts
    assert all("#SBATCH --signal=USR1@120" in script.read_text() for script in scripts)
    (job,) = slurm.run("squeue", "--noheader", "--format=%A").split()
    slurm.signal(int(job), "USR1")
    assert process.wait(300) == 0
    receipt = json.loads((run / "receipt.json").read_text())
    assert [segment["why"] for segment in receipt["segments"]] == ["SIGUSR1", None]
    assert receipt["results"]["weights_digest"] == alone.digest
    verify = [LABTRAIN, "verify", str(run.resolve()), "--steps", "3"]
    verified = subprocess.run(verify, cwd=experiment.root, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
