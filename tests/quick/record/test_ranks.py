"""What srun and torchrun say in their variables. The launchers themselves are in test_slurm.py and test_torchrun.py."""

import pytest

from labtrain.base.errors import ConfigError
from labtrain.record.ranks import adopt, alone, find_ranks, first_node

# As Slurm 22.05 set them for the third of `srun -N2 --ntasks-per-node=2` in a job of four nodes.
STEP = {
    "SLURM_JOB_ID": "70123",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[08-11,14]-ib,m3", "n08-ib"),
        ("rack1-n[3,7-9],rack2-n1", "rack1-n3"),
        ("10.0.0.[1-2]", "10.0.0.1"),
    ],
)
def test_rank_0_is_on_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_step_counts_and_not_its_job() -> None:
    ranks = find_ranks(STEP)
    assert ranks is not None
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.node, ranks.nodes) == (2, 4, 0, 1, 2)
    assert (ranks.address, ranks.port, ranks.name) == ("gpu08", 15123, "70123")
    second = find_ranks(STEP | {"SLURM_STEP_ID": "1"})
    assert second is not None
    assert (second.port, second.name) == (15454, "70123-1")
    there = find_ranks(STEP | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "5000"})
    assert there is not None
    assert (there.address, there.port) == ("10.1.1.1", 5000)


def test_one_task_and_a_batch_script_are_processes_by_themselves() -> None:
    assert find_ranks(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}) is None
    assert find_ranks({name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP_")}) is None
    assert find_ranks(STEP | {"SLURM_JOB_NAME": "bash"}) is None  # srun --pty bash
    assert find_ranks(alone(STEP)) is None
    assert find_ranks({}) is None


def test_nodes_with_different_numbers_of_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 processes are not evenly distributed over the nodes"):
        find_ranks(STEP | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"})


def config(devices: object, nodes: int) -> dict:
    return {"trainer": {"devices": devices, "num_nodes": nodes}}


@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), ("auto", 1), ("auto", 2), (2, 1), (2, 2)])
def test_the_launcher_says_how_many(devices: object, nodes: int) -> None:
    taken = config(devices, nodes)
    adopt(taken, find_ranks(STEP))
    assert taken == config(2, 2)
    listed = config([0, 3], nodes)
    adopt(listed, find_ranks(STEP))
    assert listed == config([0, 3], 2)


@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (1, 2), (2, 3), ([0], 1), ([0], 2)])
def test_other_numbers_are_refused(devices: object, nodes: int) -> None:
    with pytest.raises(ConfigError, match="srun started 4 processes on 2 nodes"):
        adopt(config(devices, nodes), find_ranks(STEP))


def test_several_nodes_need_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no launcher started processes on other nodes"):
        adopt(config(1, 2), None)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    adopt(config(1, 1), None)
    assert "warning: this Slurm job has 4 tasks" in capsys.readouterr().err
