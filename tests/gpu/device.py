"""Checks of what a device does: waiting, copies, checksums, full memory, statistics, exchanges in a group of one."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import labtrain
from labtrain.data.prefetch import Copies
from labtrain.environment.doctor import kernels
from labtrain.exact.buffers import SENT, broadcast
from labtrain.exact.checksums import BLOCK, INTEGERS, MASK, device_hash, first_unlike, shown_sums, two_sums
from labtrain.record.digests import tensor_bytes
from labtrain.training.callbacks.gpu_stats import Sensors
from labtrain.training.sharded.exchange import of_all_ranks
from tests.gpu.exact import digest_of, gpt, hold, on_device, resnet, runner
from tests.gpu.facts import smi
from tests.gpu.harness import LeftOutError, Place
from tests.support.exact import outcome
from tests.support.servers import free_ports

FIRST, LAST = 5, 9  # steps between which nothing may wait
MIB = 1 << 20

# ------------------------------------------------------------------------------------------------------------- doctor


def doctor(place: Place) -> str:
    """The kernels of `labtrain doctor`, and NCCL where there are two GPUs; gloo between two processes on a CPU."""
    count = torch.cuda.device_count() if place.on_gpu else 2
    found = list(kernels.checks(place.device, count, {}))
    wrong = [f"{check.name}: {check.found}" for check in found if check.status == "failed"]
    assert not wrong, "; ".join(wrong)
    skipped = [check.name for check in found if check.status == "skipped"]
    assert not (place.on_gpu and skipped), f"skipped on a GPU: {', '.join(skipped)}"
    told = [f"{check.name}: {check.found}" for check in found if re.search("attention|Triton|NCCL|gloo", check.name)]
    return "; ".join([f"{len(found)} checks", *told])


# --------------------------------------------------------------------------------------------------- waits and copies


def no_wait(place: Place) -> str:
    """And a step that reads its loss is found, in whatever way it reads: the check can fail."""
    done = []
    for precision, shards in (("32-true", 4), ("bf16-mixed", 4), ("32-true", 1)):
        runner(place, f"{precision}-{shards}").run(_quiet(place, precision, shards))
        done.append(f"{precision} in {shards} shard{'s' if shards > 1 else ''}")
    reads = runner(place, "reads")
    assert reads.run(_quiet(place, "32-true", 4, reads=True), code=None) is None, "a step that reads its loss passed"
    found = re.search(r"reads that are not found: none; found: (.*)\.", reads.said())
    assert found is not None, reads.said()
    on_cpu = "" if place.on_gpu else "on the CPU only reads by Python, not copies with to() and copy_(): "
    return f"{on_cpu}{', '.join(done)}; found where a step has them: {found[1]}"


def _quiet(place: Place, precision: str, shards: int, *, reads: bool = False) -> dict[str, Any]:
    config = resnet(place, precision, "Quiet", reads=reads)
    config["data"] |= {"size": 12 * config["data"]["batch_size"], "length": 16, "validates": False}
    config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1000}
    config["determinism"]["shards"], config["gpu_stats"] = shards, False
    config["callbacks"]["no_wait"] = {"_target_": "tests.gpu.models.NoWait", "first": FIRST, "last": LAST}
    return config


def copies(place: Place) -> str:
    """While the stream that computes is busy, a copy arrives; then all batches are the host's, bit by bit."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    drawn = torch.Generator().manual_seed(0)
    batches = [[torch.randn(256, 4096, generator=drawn), torch.arange(256) + number] for number in range(20)]
    copying = Copies(device)
    copying._start(batches[0])[1].synchronize()  # the first makes the page-locked memory
    torch.cuda._sleep(2_000_000_000)  # about a second
    copied, arrived = copying._start(batches[0])
    arrived.synchronize()
    assert not torch.cuda.current_stream().query(), "the copy waited for the stream that computes"
    torch.cuda.synchronize()
    assert all(torch.equal(one.cpu(), two) for one, two in zip(copied, batches[0], strict=True))
    for batch, (values, numbers) in zip(batches, copying.of(batches), strict=True):
        torch.cuda._sleep(20_000_000)  # the next copies start, and memory that was given back is used again
        doubled = values * 2
        del values
        assert torch.equal(doubled.cpu(), batch[0] * 2), "a batch was changed before it was used"
        assert torch.equal(numbers.cpu(), batch[1]), "a batch was changed before it was used"
    loader = labtrain.DataLoader((torch.arange(64.0), torch.arange(64)), 16)
    assert all(each.is_pinned() for batch in loader for each in batch), "the loader's batches are not page-locked"
    there = labtrain.DataLoader((torch.arange(64.0, device=device), torch.arange(64, device=device)), 16)
    assert all(each.is_cuda for batch in there for each in batch), "a dataset on the GPU"
    return f"{len(batches)} batches of {batches[0][0].nbytes / MIB:.0f} MiB; a copy arrived during a kernel"


# ---------------------------------------------------------------------------------------------------------- checksums


def checksum(place: Place) -> str:
    """By numpy's integers, by torch's on the CPU, on the device; and the last line of a run's trail."""
    tensors = _of_each_dtype()
    for name, tensor in tensors.items():
        expected = _in_numpy(tensor)
        for where in (torch.device("cpu"), torch.device(place.device)):
            found = int(device_hash(tensor.to(where))) & MASK
            assert found == expected, f"{name} on {where}: {found:016x} instead of {expected:016x}"
    sums = _sums(list(tensors.values()))
    if place.on_gpu:
        found = two_sums(enumerate(each.to(place.device) for each in tensors.values()))
        assert shown_sums(found.tolist()) == sums, f"two_sums: {shown_sums(found.tolist())} instead of {sums}"
    run_dir = runner(place, "run").run(resnet(place, "bf16-mixed"))
    assert run_dir is not None
    on_device(place, run_dir)
    receipt = json.loads((run_dir / "receipt.json").read_text())
    weights = labtrain.load_weights(run_dir)
    ordered = [weights[name] for name in receipt["trail"]["tensors"] if name in weights]
    last = json.loads((run_dir / "trail.jsonl").read_text().splitlines()[-1])["weights"]
    here = _sums(ordered) if place.on_gpu else shown_sums(two_sums(enumerate(ordered)).tolist())
    assert last == here, f"the trail ends with {last}, the CPU finds {here}"
    return f"{len(tensors)} tensors; the trail ends with {last[:12]}"


def _of_each_dtype() -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    numbers = torch.randn(1000, generator=drawn)
    found = {str(dtype): (numbers * 50).to(dtype) for dtype in (*SENT, torch.int16, torch.float8_e4m3fn)}
    found |= {"empty": numbers[:0], "a number": numbers[0], "not contiguous": numbers.view(40, 25).T}
    found["channels last"] = numbers.view(5, 8, 5, 5).to(memory_format=torch.channels_last)
    found["two blocks"] = torch.randn(BLOCK + 3, generator=drawn)
    return found


def _in_numpy(tensor: torch.Tensor) -> int:
    """Return the hash of checksums.py, by numpy's integers modulo 2^64."""
    raw = tensor.contiguous().reshape(-1).view(INTEGERS[tensor.element_size()]).numpy().astype(np.int64)
    total = 0
    for number, start in enumerate(range(0, max(len(raw), 1), BLOCK)):
        block = raw[start : start + BLOCK].view(np.uint64)
        odd = np.arange(1, 2 * len(block), 2, dtype=np.uint64)
        weights = odd * (odd ^ np.uint64(0x5DEECE66C))
        total += int((block * weights).sum(dtype=np.uint64)) * (2 * number + 1)
    return total & MASK


def _sums(tensors: list[torch.Tensor]) -> str:
    """Return the two sums that a GPU would give, computed on the CPU."""
    hashes = [_in_numpy(tensor.cpu()) for tensor in tensors]
    return shown_sums([sum(hashes), sum((2 * index + 1) * each for index, each in enumerate(hashes))])


# ------------------------------------------------------------------------------------------------------------- memory


def out_of_memory(place: Place) -> str:
    """On a GPU a shard of two samples takes twice its memory; on a CPU the model raises torch's exception."""
    fails = runner(place, "run")
    fails.run(resnet(place, target="Hungry", samples=1), code=2)
    said = fails.said()
    found = re.search(r"^error: out of GPU memory at data.batch_size=8: (.*)$", said, re.MULTILINE)
    assert found is not None, said
    assert "hint: one of these: determinism.shards=8; trainer.precision=bf16-mixed; data.batch_size=4" in said, said
    return found[1][:90] if place.on_gpu else "raised by the model"


def batch_size(place: Place) -> str:
    """Twelve samples fill the memory: with four shards, powers of two end at 32."""
    root = place.child("experiment")
    (root / "train.py").write_text("import labtrain\n\nlabtrain.main()\n")
    config = resnet(place, target="Hungry", samples=12)
    data = config["data"] | {"size": 1000, "batch_size": 8, "validates": False}
    lines = {"defaults": ["labtrain", "_self_"], "experiment": "hungry", "model": config["model"], "data": data}
    (root / "conf").mkdir()
    (root / "conf/config.yaml").write_text(json.dumps(lines))
    command = [sys.executable, "-c", "from labtrain.cli import main; main()", "batch-size", "--mode", "power",
               f"trainer.accelerator={place.accelerator}"]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode, done.stdout) == (0, "32\n"), said
    assert "shards of 8 samples" in said, said
    return "32 samples, in shards of 8; 16 in a shard do not fit"


def checkpoint_stall(place: Place) -> str:
    """Saves of a state that is large enough to measure: in each second step, unless one is still being written.

    The check holds back each write until the loop has begun its next step. So a loop that waits for a write is found.
    """
    wide = {"width": 1024, "layers": 6, "heads": 16} if place.on_gpu else {"width": 256, "layers": 4}
    config = gpt(place, **wide)
    whole = outcome(runner(place, "whole").run(config))
    config["checkpoint"]["every_n_steps"] = 2
    path = place.folder / "saves.json"
    config["callbacks"]["saves"] = {"_target_": "tests.gpu.models.Saves", "path": str(path)}
    found = outcome(runner(place, "saves").run(config))
    for key in ("weights_digest", "metrics", "trail"):
        assert found[key] == whole[key], f"{key} differ from a run without these saves"
    saves = json.loads(path.read_text())
    assert all(saves["stepped"]), "the loop waits for the write of a save: it began no step before the write"
    assert len(saves["stepped"]) >= 2, saves
    pinned = saves["pinned_bytes"] / saves["bytes"]
    assert not place.on_gpu or pinned > 0.99, f"only {pinned:.0%} of the buffers are page-locked"
    return (
        f"the loop waits {1e3 * saves['copy_s']:.0f} ms for {saves['bytes'] / 1e6:.0f} MB, written in"
        f" {1e3 * saves['write_s']:.0f} ms; median of {saves['saves']}; {len(saves['stepped'])} of them held back until"
        " the loop had begun its next step"
    )


# --------------------------------------------------------------------------------------------------------- statistics


def gpu_stats(place: Place) -> str:
    """What NVML says, beside nvidia-smi; and what a run logs."""
    if shutil.which("nvidia-smi") is None:
        raise LeftOutError("nvidia-smi was not found")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    held = torch.ones(3 << 28, device="cuda")  # 3 GiB
    torch.cuda.synchronize()
    sensors = Sensors({0: uuid})
    try:
        fields = "uuid,memory.total,memory.free,temperature.gpu"
        (card,) = [each for each in smi(fields) if each["uuid"] == f"GPU-{uuid}"]
        used = (float(card["memory.total"]) - float(card["memory.free"])) * MIB / 1e9
        ours, degrees = sensors.newest[0]["memory_used_gb"], sensors.newest[0]["temperature_celsius"]
    finally:
        sensors.close()
    assert ours > held.nbytes / 1e9, f"{ours} GB, and this process holds {held.nbytes / 1e9} GB"
    assert abs(ours - used) < 0.7, f"memory: {ours:.2f} GB, nvidia-smi {used:.2f} GB"
    assert abs(degrees - float(card["temperature.gpu"])) <= 5, (
        f"{degrees} degrees, nvidia-smi {card['temperature.gpu']}"
    )
    logged = _logged(place)
    return f"{ours:.1f} GB, nvidia-smi {used:.1f} GB; {degrees:.0f} degrees; a run logs {len(logged)} values"


def _logged(place: Place) -> set[str]:
    """Return the names of what a run logs about its GPU."""
    config = resnet(place)
    config["trainer"]["log_every_n_steps"], config["gpu_stats"] = 1, True
    config["logger"] = {"mine": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "{run_dir}/mine"}}
    run_dir = runner(place, "run").run(config)
    assert run_dir is not None
    (path,) = run_dir.glob("mine/**/metrics.csv")
    with path.open() as file:
        names = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    found = {name for name in names if name.startswith("gpu/0/")}
    missing = {f"gpu/0/{name}" for name in ("memory_used_gb", "memory_allocated_gb", "temperature_celsius")} - found
    assert not missing, f"not logged: {', '.join(sorted(missing))}"
    return found


# ----------------------------------------------------------------------------------------------------------- exchange


def group_of_one(place: Place) -> str:
    """Exchanges of labtrain as several ranks make them; then a training with the strategy of several devices."""
    whole = outcome(runner(place, "alone", nodes=False).run(resnet(place)))
    within = runner(place, "within", nodes=False)
    hold(outcome(within.run(resnet(place), environment={"GROUP_OF_ONE": "1"})), whole, "in a group of one")
    assert "group of one: ExactDDP" in within.said(), within.said()
    backend = "nccl" if place.on_gpu else "gloo"
    device = torch.device(place.device, 0) if place.on_gpu else torch.device("cpu")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if place.on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{free_ports()}", rank=0, world_size=1)
    try:
        kinds = _exchanged(device)
    finally:
        dist.destroy_process_group()
    return f"{backend}: {kinds} dtypes; {digest_of(whole)} as without a group"


def _exchanged(device: torch.device) -> int:
    """Exchange each kind of tensor in the ways that labtrain uses; return how many dtypes."""
    tensors = {name: each.to(device) for name, each in _of_each_dtype().items()}
    for name, tensor in tensors.items():
        before = tensor.clone()
        broadcast(tensor, src=0)
        assert np.array_equal(tensor_bytes(tensor.cpu()), tensor_bytes(before.cpu())), name
    rows = torch.arange(128, dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(all_rows := torch.empty_like(rows), rows)
    dist.all_gather(gathered := [torch.empty_like(rows)], rows)
    dist.all_reduce(most := torch.arange(7, dtype=torch.int32, device=device), dist.ReduceOp.MAX)
    assert torch.equal(all_rows, rows)
    assert torch.equal(gathered[0], rows)
    assert most.tolist() == list(range(7))
    assert first_unlike(list(tensors.items())) is None
    named = enumerate(tensors.values())
    spread = two_sums(named, spread=True)
    assert spread.device.type == device.type
    (item,) = of_all_ranks([{"a": rows, "b": "text"}], device, what="it")
    assert torch.equal(item["a"], rows)
    dist.all_gather_object(found := [None], {"rank": 0})
    assert found == [{"rank": 0}]
    if device.type == "cuda":  # NCCL sends to the own rank within a group of operations; gloo does not
        parts = torch.arange(9.0, device=device), torch.zeros(9, device=device)
        operations = [dist.P2POp(dist.isend, parts[0], 0), dist.P2POp(dist.irecv, parts[1], 0)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        assert torch.equal(*parts)
    dist.barrier()
    return len({each.dtype for each in tensors.values()})
