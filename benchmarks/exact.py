"""What exactness costs: against Lightning's DDP over the same micro-batches, and against plain Lightning on one device.

Both sides of a ratio train the same model on as many samples, on one thread a process. On one device they take turns, a
step each, in one process; with two processes over gloo they take turns by runs. The median step of a run counts, and
the median ratio of six rounds, in half of which Lightning begins. Prints a table, writes results-exact.json beside it.

Run: make bench-exact
"""

import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from labtrain.base.signals import Wishes
from labtrain.data.loader import DataLoader
from labtrain.exact import determinism
from labtrain.record.provenance import machine
from labtrain.training.callbacks.checkpoint import FolderIO
from labtrain.training.callbacks.steps import BatchSizes, Seeding
from labtrain.training.epoch_loop import EpochLoop
from labtrain.training.sharded.strategy import ExactDDP, ExactSingleDevice
from labtrain.training.state.step_changes import Watch

HERE = Path(__file__).resolve().parent
STEPS, WARMUP, ROUNDS = 30, 5, 6
SHARDS = 4


class Timed(pl.Callback):
    """Keeps the seconds of each optimizer step: of the clock, and of CPU time.

    Args:
        batons: two trainings in one process hand each other these after each step, so that they take turns; their CPU
            time is then that of their threads.
    """

    def __init__(self, batons: tuple[threading.Semaphore, threading.Semaphore] | None = None) -> None:
        self.batons = batons
        self.cpu_time = time.thread_time if batons else time.process_time
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.began = (0.0, 0.0)
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batons:
            self.batons[0].acquire()
        self.began = time.perf_counter(), self.cpu_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(self.cpu_time() - self.began[1])
        if self.batons:
            self.batons[1].release()
            if self.step < STEPS + WARMUP:
                self.batons[0].acquire()
        self.began = time.perf_counter(), self.cpu_time()

    def medians(self) -> tuple[float, float]:
        """Return the medians, without the first steps."""
        return statistics.median(self.wall[WARMUP:]), statistics.median(self.cpu[WARMUP:])


class Net(pl.LightningModule):
    """A model, its loss, one logged average."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if kind == "mlp":  # 3.4 million parameters
            for width in (1024, 1024, 1024, 1024):
                layers += [nn.LazyLinear(width), nn.ReLU(), nn.Dropout(0.1)]
            layers.append(nn.LazyLinear(10))
        else:  # convolutions and BatchNorm
            for width in (32, 64, 64):
                layers += [nn.LazyConv2d(width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)]
        self.net = nn.Sequential(*layers)
        self.net(torch.zeros(2, *shape_of(kind)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Batches:
    """Batches in memory: nothing to load."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def shape_of(kind: str) -> tuple[int, ...]:
    return (256,) if kind == "mlp" else (3, 16, 16)


def data(kind: str, batch_size: int) -> torch.utils.data.TensorDataset:
    size = batch_size * (STEPS + WARMUP + 1)
    return torch.utils.data.TensorDataset(torch.randn(size, *shape_of(kind)), torch.randint(0, 10, (size,)))


def fit(kind: str, side: str, batch_size: int, shards: int, rank: int, world: int, timed: Timed) -> None:
    """Train one side, `exact` or `lightning`."""
    dataset, wishes = data(kind, batch_size), Wishes()
    callbacks: list[pl.Callback] = [timed]
    strategy: Any
    loader: Any
    if side == "exact":
        callbacks += [Seeding(per_rank=False), BatchSizes()]
        options: dict[str, Any] = {"shards": shards, "wishes": wishes}
        strategy = ExactDDP(**options) if world > 1 else ExactSingleDevice(torch.device("cpu"), **options)
        loader = DataLoader(dataset, batch_size, shuffle=True)
    else:
        strategy = DDPStrategy() if world > 1 else SingleDeviceStrategy(torch.device("cpu"))
        size = batch_size // shards
        parts = range(rank, len(dataset) // size, world)
        order = torch.randperm(len(dataset))
        rows = [order[part * size : (part + 1) * size] for part in parts]
        loader = Batches([[tensor[indices] for tensor in dataset.tensors] for indices in rows])
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=STEPS + WARMUP,
        accumulate_grad_batches=1 if side == "exact" else shards // world,
        callbacks=callbacks,
        plugins=[FolderIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if side == "exact":
        trainer.fit_loop.epoch_loop = EpochLoop(trainer, save=lambda required: None, every_n_steps=None, wishes=wishes)
    trainer.fit(Net(kind), loader)


def begin(rank: int, world: int, port: int) -> None:
    """Make this process a rank that trains on one thread and is quiet."""
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # gloo and Lightning speak
    determinism.set_run(seed=1, mode="strict")
    determinism.apply("strict", threads=1)
    determinism.seed_all(1, "data")


def work(
    kind: str, side: str, batch_size: int, shards: int, rank: int, world: int, port: int, result: Connection
) -> None:
    """Train one rank of one side, and send its medians."""
    begin(rank, world, port)
    timed = Timed()
    fit(kind, side, batch_size, shards, rank, world, timed)
    result.send(timed.medians())
    os._exit(0)


def work_in_turn(kind: str, batch_size: int, first: str, result: Connection) -> None:
    """Train both sides on one device in one process, a step of each in turn, and send their medians."""
    begin(0, 1, 0)
    one, other = threading.Semaphore(1), threading.Semaphore(0)
    timed = {first: Timed((one, other))}
    timed["lightning" if first == "exact" else "exact"] = Timed((other, one))
    threads = [
        threading.Thread(target=fit, args=(kind, side, batch_size, 1, 0, 1, each)) for side, each in timed.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.send({side: each.medians() for side, each in timed.items()})
    os._exit(0)


def start(target: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    """Run a process for each tuple of arguments, and return what each sends."""
    context = multiprocessing.get_context("forkserver")
    modules = ["lightning.pytorch", "labtrain.training.sharded.strategy", "labtrain.training.epoch_loop"]
    context.set_forkserver_preload(modules)
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    processes = [
        context.Process(target=target, args=(*each, sender)) for each, (_, sender) in zip(arguments, pipes, strict=True)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    found = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    return found


def measure(kind: str, side: str, batch_size: int, shards: int, world: int) -> tuple[float, float]:
    """Return the slowest rank's seconds of a step, and the sum of all ranks' CPU seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = start(work, *((kind, side, batch_size, shards, rank, world, port) for rank in range(world)))
    return max(wall for wall, _ in found), sum(cpu for _, cpu in found)


def seeding_microseconds() -> float:
    """Return what the seeding of one sample takes: three generators."""
    count = 20_000
    started = time.thread_time()
    for index in range(count):
        determinism.seed_all(1, "sample", 3, index)
    return (time.thread_time() - started) / count * 1e6


def watching_microseconds() -> float:
    """Return what a step of 4 shards pays for looking at what it changed: a small network, its metric and its log."""
    sys.path.insert(0, str(HERE / "fashion"))
    from model import FashionNet

    ignored: Any = print  # nothing is found
    module = FashionNet()
    made: Any = {"optimizers": [torch.optim.AdamW(module.parameters())], "judge": ignored, "say": ignored}
    watch = Watch(module, device=torch.device("cpu"), rank=0, world=1, **made)
    times = []
    for _ in range(ROUNDS * 200):  # each hundredth looks at more
        started = time.thread_time()
        watch.begin()
        for shard in range(SHARDS):
            if shard:
                watch.restore()
            watch.leave(shard, 1, last=shard == SHARDS - 1)
        watch.end(watch.numbers, [range(SHARDS)])
        times.append(time.thread_time() - started)
    return statistics.fmean(times) * 1e6


class Endless(torch.utils.data.Dataset[int]):
    """10^12 samples."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> int:
        return index


def first_batch_milliseconds() -> tuple[float, float]:
    """Return the CPU time to the first batch of 10^12 shuffled samples, and the memory that it took, in MiB."""
    times = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        started = time.thread_time()
        next(iter(DataLoader(Endless(), 256, shuffle=True)))
        times.append(time.thread_time() - started)
    return statistics.median(times) * 1e3, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


CASES = [
    ("DDP, 2 processes, MLP", "mlp", 256, SHARDS, 2, 1.05),
    ("DDP, 2 processes, CNN with BatchNorm", "cnn", 64, SHARDS, 2, 1.05),
    ("one device, shards=1, MLP", "mlp", 128, 1, 1, 1.03),
    ("one device, shards=1, CNN with BatchNorm", "cnn", 32, 1, 1, 1.03),
]


def main() -> None:
    """Measure, print and write."""
    table: dict[str, Any] = {}
    rounds: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {name: [] for name, *_ in CASES}
    for number in range(ROUNDS):
        for name, kind, batch_size, shards, world, _ in CASES:
            sides = ("exact", "lightning") if number % 2 else ("lightning", "exact")
            if world == 1:
                (found,) = start(work_in_turn, (kind, batch_size, sides[0]))
            else:
                found = {side: measure(kind, side, batch_size, shards, world) for side in sides}
            rounds[name].append((found["exact"], found["lightning"]))
            sys.stderr.write(f"round {number + 1} of {ROUNDS}: {name}\n")
    print(f"{'step time against Lightning':<44}{'clock':>8}{'CPU':>8}{'at most':>9}{'ms a step':>11}")
    for name, _, _, _, _, at_most in CASES:
        clock, cpu = (statistics.median(ours[i] / theirs[i] for ours, theirs in rounds[name]) for i in (0, 1))
        milliseconds = statistics.median(ours[0] for ours, _ in rounds[name]) * 1e3
        table[name] = {
            "clock_ratio": round(clock, 3),
            "cpu_ratio": round(cpu, 3),
            "milliseconds": round(milliseconds, 1),
        }
        print(f"{name:<44}{clock:>8.3f}{cpu:>8.3f}{at_most:>9.2f}{milliseconds:>11.1f}")
    seeding, (first, memory) = seeding_microseconds(), first_batch_milliseconds()
    print(f"{'seeding of a sample, microseconds':<52}{seeding:>8.1f}{15:>9}")
    watching = watching_microseconds()
    print(f"{'watching a step of 4 shards, microseconds':<52}{watching:>8.1f}{40:>9}")  # 2 % of a step of 2 ms
    print(f"{'first batch of 10^12 samples, milliseconds':<52}{first:>8.1f}{10:>9}")
    print(f"{'memory that it took, MiB':<52}{memory:>8.1f}")
    results = {
        "step_time_ratios": table,
        "seeding_microseconds": round(seeding, 1),
        "watching_microseconds": round(watching, 1),
        "first_batch_of_10e12_milliseconds": round(first, 1),
        "first_batch_memory_mib": round(memory, 1),
        "cpu": machine()["cpu"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "rounds": ROUNDS,
        "steps": STEPS,
    }
    (HERE / "results-exact.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
