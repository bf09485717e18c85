"""Runs on a real Slurm of two nodes: wiring, the time limit, a lost node, a rank that dies, sweeps."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, ROOT, Experiment, Run
from tests.support.servers import wait_until
from tests.support.slurm import NODES, Slurm, break_rank, patient, wait_for_steps

# Some ten seconds of steps on two cores, so that there is a middle.
PORTABLE = ("determinism.mode=portable", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=none")
EPOCHS = "trainer.max_epochs=4"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    server = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def cleared(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.clear()


@pytest.fixture(scope="module")
def alone(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in one process, without Slurm."""
    return shared_experiment.train(*PORTABLE, EPOCHS, f"paths.runs={tmp_path_factory.mktemp('alone')}")


class Cluster:
    """The experiment on the cluster; what it prints is in `out`."""

    def __init__(self, slurm: Slurm, experiment: Experiment, folder: Path) -> None:
        self.slurm, self.root, self.runs, self.out = slurm, experiment.root, folder / "runs", folder / "out.txt"

    def submit(self, *overrides: str, options: tuple[str, ...] = TWO_NODES, **variables: str) -> int:
        script = (*options, f"--output={self.out}", "train.sbatch", *PORTABLE, f"paths.runs={self.runs}", *overrides)
        return self.slurm.submit(*script, cwd=self.root, PYTHON=sys.executable, **variables)

    def result(self) -> tuple[dict, str]:
        """Return the only run's receipt, and the digest that was printed."""
        (line,) = [line for line in self.out.read_text().splitlines() if line.startswith(str(self.runs))]
        folder, digest = line.split()
        return json.loads((Path(folder) / "receipt.json").read_text()), digest


@pytest.fixture
def cluster(slurm: Slurm, shared_experiment: Experiment, tmp_path: Path) -> Cluster:
    return Cluster(slurm, shared_experiment, tmp_path)


def test_two_nodes_with_two_devices_each_give_the_golden_run(cluster: Cluster) -> None:
    job = cluster.submit()
    with patient(cluster.out):
        assert cluster.slurm.ended(job) == "COMPLETED"
    receipt, digest = cluster.result()
    assert digest == json.loads((ROOT / "tests/golden/receipt.json").read_text())["results"]["weights_digest"]
    assert receipt["segments"][0]["devices"] == 4


def test_before_the_time_limit_it_saves_and_goes_on_in_the_same_folder(cluster: Cluster, alone: Run) -> None:
    job = cluster.submit(EPOCHS)
    with patient(cluster.out):
        wait_for_steps(cluster.runs / "digits", 20)
        cluster.slurm.signal(job, "USR1")
        assert cluster.slurm.ended(job) == "COMPLETED"
    receipt, digest = cluster.result()
    assert digest == alone.digest
    assert [(segment["status"], segment["why"]) for segment in receipt["segments"]] == [
        ("interrupted", "SIGUSR1"), ("complete", None)]  # fmt: skip
    assert cluster.slurm.field(job, "Restarts") == "1"


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


def test_a_node_that_dies_starts_the_job_again(cluster: Cluster, alone: Run) -> None:
    job = cluster.submit(EPOCHS, "checkpoint.every_n_steps=5")
    with patient(cluster.out):
        wait_for_steps(cluster.runs / "digits", 20)
        cluster.slurm.kill_node(NODES[1])
        wait_until(lambda: cluster.slurm.field(job, "Restarts") == "1")
        cluster.slurm.start_node(NODES[1])
        assert cluster.slurm.ended(job) == "COMPLETED"
    receipt, digest = cluster.result()
    assert digest == alone.digest
    assert receipt["segments"][-1]["from_step"] >= 15


def test_a_rank_that_dies_takes_the_job_down_with_its_own_traceback(
    slurm: Slurm, own_experiment: Experiment, tmp_path: Path
) -> None:
    """Long before the job's time limit, which is an hour, and the processes' own timeout, half of one."""
    break_rank(own_experiment, 3)
    cluster = Cluster(slurm, own_experiment, tmp_path)
    job = cluster.submit(EPOCHS)
    with patient(cluster.out):
        assert slurm.ended(job) == "FAILED"
    text = cluster.out.read_text()
    assert "ArithmeticError: of rank 3" in text
    assert text.count("Traceback (most recent call last):") == 1, "another rank's as well"


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


def test_a_node_whose_name_is_not_known_is_said_at_once(cluster: Cluster) -> None:
    job = cluster.submit(EPOCHS, MASTER_ADDR="no-such-node.invalid")
    with patient(cluster.out):
        assert cluster.slurm.ended(job) == "FAILED"
    assert "does not know the node no-such-node.invalid" in cluster.out.read_text()
    assert not cluster.runs.exists()


def test_a_port_in_use_is_said_at_once(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = cluster.submit(EPOCHS, MASTER_PORT=str(port))
        with patient(cluster.out):
            assert cluster.slurm.ended(job) == "FAILED"
    text = cluster.out.read_text()
    assert f"error: port {port} of " in text
    assert "is not to be had: Address already in use" in text


def test_devices_that_the_launcher_did_not_start_are_refused(cluster: Cluster) -> None:
    job = cluster.submit(EPOCHS, "trainer.devices=4")
    with patient(cluster.out):
        assert cluster.slurm.ended(job) == "FAILED"
    assert (
        "error: trainer.devices=4 trainer.num_nodes=1, and srun started 4 processes on 2 nodes"
        in cluster.out.read_text()
    )
