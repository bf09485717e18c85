"""Runs on a real Slurm of two nodes: wiring, the time limit, a lost node, a rank that dies, a sweep."""

import json
import socket
from pathlib import Path

import pytest

from tests.conftest import ROOT, Experiment, Run
from tests.support.slurm import EPOCHS, NODES, Cluster, Slurm, break_rank, patient, wait_for_steps
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.slurm"]
pytestmark = pytest.mark.usefixtures("cleared")


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


@pytest.mark.release
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


@pytest.mark.release
def test_a_node_whose_name_is_not_known_is_said_at_once(cluster: Cluster) -> None:
    job = cluster.submit(EPOCHS, MASTER_ADDR="no-such-node.invalid")
    with patient(cluster.out):
        assert cluster.slurm.ended(job) == "FAILED"
    assert "cannot resolve the node no-such-node.invalid" in cluster.out.read_text()
    assert not cluster.runs.exists()


@pytest.mark.release
def test_a_port_in_use_is_said_at_once(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = cluster.submit(EPOCHS, MASTER_PORT=str(port))
        with patient(cluster.out):
            assert cluster.slurm.ended(job) == "FAILED"
    text = cluster.out.read_text()
    assert f"error: port {port} of " in text
    assert "is not available: Address already in use" in text


def test_devices_that_the_launcher_did_not_start_are_refused(cluster: Cluster) -> None:
    job = cluster.submit(EPOCHS, "trainer.devices=4")
    with patient(cluster.out):
        assert cluster.slurm.ended(job) == "FAILED"
    assert (
        "error: trainer.devices=4 trainer.num_nodes=1, but srun started 4 processes on 2 nodes"
        in cluster.out.read_text()
    )
