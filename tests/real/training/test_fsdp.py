"""A state that is spread over the ranks: trained, killed, gone on with, moved, read whole. With gloo, on the CPU."""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import labtrain
from labtrain.base.errors import EXIT_STOPPED, DamagedError
from labtrain.checkpoints.format import PARTS, _load_parts, in_parts, load_folder
from labtrain.record.digests import digest
from labtrain.stores.layout import list_checkpoints
from labtrain.stores.store import STATE, Store
from labtrain.training.sharded.fsdp import shard
from tests.conftest import LABTRAIN, Experiment
from tests.real.stores.test_storage import variables
from tests.support.exact import Runner, configure, forkserver, outcome, tell
from tests.support.exact_worker import GPT, MLP


def fsdp(model: str = "cnn", shape: str = "even", **more: Any) -> Any:
    config = configure(model, shape, **more)
    config["trainer"]["strategy"] = "fsdp"
    return config


def stopped(runner: Runner, config: Any, *, world: int, step: int = 7) -> tuple[Path, dict[str, Any]]:
    """Train until a signal, and return the folder and the manifest of the checkpoint that is left."""
    runner.run(config, world=world, code=EXIT_STOPPED, signal_at=f"{step} {int(signal.SIGTERM)} 0")
    (run_dir,) = runner.folder.glob("runs/exact/[0-9a-f]*")
    return list_checkpoints(run_dir / "checkpoints")[-1]


@pytest.mark.parametrize(
    ("model", "shape", "world", "story"), [("cnn", "even", 2, "terminated"), ("gpt", "clipped", 3, "killed twice")]
)
def test_a_run_goes_on_with_the_same_bits(runner: Runner, model: str, shape: str, world: int, story: str) -> None:
    """Each rank's own parts, moments, buffers and averages; on three, one of which has no row of some weights."""
    same_bits(runner, model, shape, world, story)


def same_bits(runner: Runner, model: str, shape: str, world: int, story: str) -> None:
    """Train once whole, once by a story, and compare."""
    reference = Runner(runner.folder / "reference")
    reference.folder.mkdir()
    whole = tell(reference, fsdp(model, shape), world=world, story="whole", seed=0)
    assert tell(runner, fsdp(model, shape), world=world, story=story, seed=len(story)) == whole


def test_a_full_disk_on_one_rank_ends_all(runner: Runner) -> None:
    full_disk(runner, "write_data")


def full_disk(runner: Runner, name: str) -> None:
    """No part of that save counts; the one before is whole, and is gone on from."""
    config = fsdp("gpt", checkpoint={"every_n_steps": 2})
    reference = Runner(runner.folder / "reference")
    reference.folder.mkdir()
    whole = outcome(reference.run(config, world=2))
    runner.run(config, world=2, code=2, environment={"FULL_IN_SAVE": f"1 {name}"})
    assert "No space left on device" in runner.said()
    assert "hint: " in runner.said()
    (run_dir,) = runner.folder.glob("runs/exact/[0-9a-f]*")
    found = Store(run_dir / "checkpoints").checkpoints()
    assert found
    assert all(load_folder(checkpoint.folder)["global_step"] == checkpoint.step for checkpoint in found)
    assert outcome(runner.run(config, world=2)) == whole


def read_in_a_rank(rank: int, world: int, folder: Path, store: str, result: Any) -> None:
    """Read every tensor of a checkpoint as `world` ranks have it, each its rows; rank 0 sends what they come to."""
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    whole = _load_parts(folder, names_of(folder), {}, alone=True)
    now = {name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)] if tensor.dim() else [Replicate()])
           for name, tensor in whole.items()}  # fmt: skip
    read = _load_parts(folder, list(whole), now, alone=False)
    digests = digest({name: tensor.full_tensor() for name, tensor in read.items()}), digest(whole)
    if rank == 0:
        result.send((len(whole), *digests))
    dist.destroy_process_group()


def names_of(folder: Path) -> list[str]:
    return ["/".join(map(str, path)) for path in torch.load(folder / STATE, weights_only=True)[PARTS]]


def test_saved_by_three_it_is_read_by_two_and_by_one(runner: Runner, tmp_path: Path) -> None:
    """Weights and moments, and then they are gone on with."""
    config = fsdp("cnn")
    folder, manifest = stopped(runner, config, world=3)
    assert sorted(manifest["files"]) == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2, 3)] + [
        "state.pt"
    ]
    weights = labtrain.load_weights(folder)
    assert digest(weights) == manifest["weights_digest"]
    assert digest(load_folder(folder)["state_dict"]) == manifest["weights_digest"]

    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    store = str(tmp_path / "store")
    ranks = [context.Process(target=read_in_a_rank, args=(rank, 2, folder, store, sender)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    number, of_two, of_one = receiver.recv()
    assert number > 2 * len(weights)  # AdamW's moments too
    assert of_two == of_one

    copy = tmp_path / "copy" / folder.parents[1].name
    shutil.copytree(folder.parents[1], copy)
    first, again = (
        outcome(runner.run({**config, "resume": str(origin)}, world=2)) for origin in (copy, folder.parents[1])
    )
    assert first == again
    assert first["steps"] == 15


def test_without_fsdp_it_goes_on_with_the_whole(runner: Runner, tmp_path: Path) -> None:
    """An optimizer's moments find their parameters: saved by name, they are put in by number."""
    folder, manifest = stopped(runner, fsdp("gpt"), world=2)
    whole = load_folder(folder)
    (optimizer,) = whole["optimizer_states"]
    parameters = list(GPT().parameters())
    assert len(optimizer["state"]) == len(parameters)
    for number, parameter in enumerate(parameters):
        assert optimizer["state"][number]["exp_avg"].shape == parameter.shape
    done = subprocess.run(
        [LABTRAIN, "store", "export", str(folder), str(tmp_path / "x.ckpt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = GPT.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert digest(model) == manifest["weights_digest"]
    config = configure("gpt", "even", resume=str(folder.parents[1]), trainer={"max_steps": 7, "max_epochs": None})
    assert outcome(runner.run(config))["weights_digest"] == manifest["weights_digest"]


def test_a_whole_state_is_not_gone_on_with_under_it(runner: Runner) -> None:
    run_dir = runner.run(configure("gpt", "even"))
    runner.run(fsdp("gpt", resume=str(run_dir), trainer={"max_epochs": 5}), world=2, code=2)
    assert "holds a whole state: trainer.strategy=fsdp resumes only from its own checkpoints" in runner.said()


def test_damage_of_a_part_is_found(runner: Runner) -> None:
    folder, _ = stopped(runner, fsdp("gpt"), world=2)
    part = folder / "shard-00002-model-00001-of-00001.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(DamagedError, match=r"shard-00002.*: sha256"):
        labtrain.load_weights(folder)
    part.unlink()
    with pytest.raises(DamagedError, match=r"shard-00002.*: no file"):
        labtrain.load_weights(folder)
    done = subprocess.run([LABTRAIN, "digest", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, "digest mismatch" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_its_parts_are_delivered(url: str, runner: Runner) -> None:
    reference = Runner(runner.folder / "reference")
    reference.folder.mkdir()
    whole = outcome(reference.run(fsdp("gpt"), world=2))
    config = fsdp("gpt", checkpoint={"url": url})
    runner.run(config, world=2, code=EXIT_STOPPED, signal_at=f"7 {int(signal.SIGTERM)} 1", environment=variables())
    run_dir = runner.run(config, world=2, environment=variables())
    assert {**outcome(run_dir), "run_id": 0} == {**whole, "run_id": 0}
    assert run_dir is not None
    assert digest(labtrain.load_weights(f"{url}/{run_dir.name}")) == whole["weights_digest"]


def test_weights_that_a_callback_changed_at_the_end_are_saved(runner: Runner) -> None:
    config = fsdp("gpt")
    config["callbacks"]["halve"] = {"_target_": "tests.support.exact_worker.Halve"}
    run_dir = runner.run(config, world=2)
    assert run_dir is not None
    (last,) = (run_dir / "checkpoints").glob("step-*-end")
    assert in_parts(last)
    assert digest(labtrain.load_weights(run_dir)) == outcome(run_dir)["weights_digest"]
    assert runner.run(config, world=2) == run_dir


def test_what_cannot_be_cut_is_refused(runner: Runner) -> None:
    config = fsdp("mlp")
    config["model"]["_target_"] = "tests.support.exact_worker.Scaled"
    runner.run(config, world=2, code=2)
    assert "scale is a scalar" in runner.said()
    assert "hint: give scale the shape (1,)" in runner.said()


def test_large_blocks_are_brought_together_one_at_a_time() -> None:
    """Not the small ones, not twice, and nothing where a person has done it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = MLP()
        model.net = nn.Sequential(
            nn.Linear(1000, 1000), nn.ReLU(), nn.Sequential(nn.Linear(1000, 1100)), nn.Linear(3, 3)
        )
        shard(model, mesh)
        shard(model, mesh)
        sharded = [name for name, part in model.named_modules() if isinstance(part, FSDPModule)]
        assert sharded == ["", "net.0", "net.2", "net.2.0"]
        own = MLP()
        fully_shard(own.net, mesh=mesh)
        shard(own, mesh)
        assert [name for name, part in own.named_modules() if isinstance(part, FSDPModule)] == ["net"]
    finally:
        dist.destroy_process_group()


def test_tied_weights_stay_tied_and_lists_of_lists_are_cut() -> None:
    """A head that is the embedding, both large: sharded apart they would be two. torch shards no container."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tied = MLP()
        tied.net = nn.Sequential(nn.Embedding(1100, 1000), nn.Linear(1000, 1100, bias=False))
        tied.net[1].weight = tied.net[0].weight
        before = len(list(tied.parameters()))
        shard(tied, mesh)
        assert len(list(tied.parameters())) == before
        assert tied.net[1].weight is tied.net[0].weight
        deep = MLP()
        deep.net = nn.ModuleList([nn.ModuleList([nn.Linear(1000, 1100), nn.Linear(3, 3)])])
        shard(deep, mesh)
        assert [name for name, part in deep.named_modules() if isinstance(part, FSDPModule)] == ["", "net.0.0"]
    finally:
        dist.destroy_process_group()


def test_in_a_generated_experiment(experiment: Experiment) -> None:
    """With a logger, through Lightning's launcher, and complete a second time; the receipt says what is off."""
    command = ("paths.runs=runs", "trainer.strategy=fsdp", "trainer.devices=2", "trainer.max_steps=12", "logger=csv")
    run = experiment.train(*command)
    (note,) = run.receipt["determinism"]["notes"]
    assert "trainer.strategy=fsdp" in note
    assert "results then depend on the number of devices" in note
    assert "test/acc" in run.receipt["results"]["metrics"]
    assert experiment.train(*command).digest == run.digest == digest(labtrain.load_weights(run.folder))
