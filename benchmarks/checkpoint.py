"""What a save costs: the loop's wait, the time until it is on the disk or on S3, the steps meanwhile, and memory.

Ratios of interleaved rounds, medians; `make bench-checkpoint`. The state has 400 MB: eight layers of 2048 x 2048 and
Adam's two moments. For S3 a server is started from .servers (`make servers`). `checkpoint.py files` measures only the
files: against `dd` with fsync, and against a plain parallel upload.
"""

import gc
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

sys.path.insert(0, str(Path(__file__).parents[1]))

from labtrain.base.contracts import Manifest
from labtrain.base.files import sync
from labtrain.checkpoints.beside import InProcess, fork
from labtrain.checkpoints.format import write_files
from labtrain.checkpoints.saver import Saver
from labtrain.checkpoints.staging import Staging
from labtrain.stores.delivery import Delivery
from labtrain.stores.layout import kept
from labtrain.stores.store import MANIFEST, SCHEMA, STATE, WEIGHTS, Store

ROUNDS = 15
MANIFEST_OF_A_SAVE: Manifest = {"run_id": "bench", "step": 0, "epoch": 0, "metrics": {}, "logs": {}}


class Net(pl.LightningModule):
    """Eight layers of 2048 x 2048: 134 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(8)])

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Bench(pl.Callback):
    """Measures in the middle of a real training, at its second step."""

    def __init__(self, folder: Path, io: AsyncCheckpointIO) -> None:
        self.folder, self.io = folder, io
        self.results: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        if rest[-1] == 1:
            self.results = measure_local(trainer, self.folder, self.io)


def measure_local(trainer: pl.Trainer, folder: Path, io: AsyncCheckpointIO) -> dict[str, Any]:
    """Time each way to save the same state, in turn."""

    def state() -> dict[str, Any]:
        dumped: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        del dumped["loops"]
        return dumped

    warm, saver = Staging(), saver_of(folder / "ours")
    saver.open()
    step = turn = 0
    others = folder / "others"
    others.mkdir()

    def copy() -> Callable[[], None]:
        warm.copy(state())
        return lambda: None

    def ours() -> Callable[[], None]:
        nonlocal step
        step += 1
        name = saver.save(state(), {**MANIFEST_OF_A_SAVE, "step": step})
        manifest = folder / "ours" / "checkpoints" / name / MANIFEST

        def durable() -> None:
            while not manifest.exists():
                time.sleep(0.001)

        return durable

    # Each writes a new file, as checkpoints are: over one that is there the kernel has the pages at hand.
    def torch_save(durable: bool) -> Callable[[], None]:
        path = others / f"{turn}-{durable}.pt"
        torch.save(state(), path)
        if durable:
            sync(path)
        return lambda: None

    def blocking() -> Callable[[], None]:
        dumped = trainer._checkpoint_connector.dump_checkpoint()
        TorchCheckpointIO().save_checkpoint(dumped, others / f"{turn}-blocking.ckpt")
        return lambda: None

    def asynchronous() -> Callable[[], None]:
        trainer.save_checkpoint(others / f"{turn}-async.ckpt")
        assert io._executor is not None
        return io._executor.submit(lambda: None).result

    sides: dict[str, Callable[[], Callable[[], None]]] = {
        "copy": copy,
        "labtrain": ours,
        "torch.save": partial(torch_save, False),
        "torch.save and fsync": partial(torch_save, True),
        "Lightning blocking": blocking,
        "Lightning async": asynchronous,
    }
    seconds: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for turn in range(ROUNDS + 1):
        for side in sides if turn % 2 else reversed(sides):
            began, cpu = time.perf_counter(), time.thread_time()
            finish = sides[side]()
            waited, waited_cpu = time.perf_counter() - began, time.thread_time() - cpu
            finish()
            if turn:
                seconds[side].append((waited, waited_cpu, time.perf_counter() - began))
            saver.wait()  # what is superseded is removed after that
            for path in others.iterdir():
                path.unlink()
            os.sync()
    saver.close(seconds=0, wanted=True)

    def ratio(side: str, base: str, what: int) -> float:
        return statistics.median(a[what] / b[what] for a, b in zip(seconds[side], seconds[base], strict=True))

    return {
        side: {
            "wait_ms": 1e3 * statistics.median(row[0] for row in rows),
            "wait_of_a_copy": ratio(side, "copy", 0),
            "wait_cpu_of_a_copy": ratio(side, "copy", 1),
            "total_ms": 1e3 * statistics.median(row[2] for row in rows),
            "total_of_torch_save": ratio(side, "torch.save", 2),
            "total_of_torch_save_and_fsync": ratio(side, "torch.save and fsync", 2),
        }
        for side, rows in seconds.items()
    }


def saver_of(folder: Path) -> Saver:
    folder.mkdir(parents=True, exist_ok=True)
    return Saver(folder, str(folder / "checkpoints"), run_id="bench", keep=partial(kept, last=1), spool_bytes=1 << 40)


def measure_steps(folder: Path) -> dict[str, float]:
    """Compare steps while a save is written with steps while none is: seconds a step, and memory over the state."""
    gc.freeze()
    fork()  # as launch/job.py does, before the training has memory of its own
    torch.manual_seed(0)
    model = Net()
    optimizer = model.configure_optimizers()
    batch = torch.randn(64, 2048)

    def train_step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model.net(batch).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - began

    for _ in range(3):
        train_step()
    saver, quiet, busy, peak = saver_of(folder), [], [], 0
    assert isinstance(saver.host, InProcess)
    saver.open()
    before = memory_bytes(saver.host.pid)
    state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    size = sum(p.numel() * 4 for p in model.parameters()) * 3
    for step in range(1, ROUNDS + 2):
        alone = [train_step() for _ in range(4)]
        saver.save(state, {**MANIFEST_OF_A_SAVE, "step": step})
        meanwhile = []
        while saver.busy:
            meanwhile.append(train_step())
            peak = max(peak, memory_bytes(saver.host.pid))
        if step > 1 and meanwhile:
            quiet.append(statistics.median(alone))
            busy.append(statistics.mean(meanwhile))
    saver.close(seconds=0, wanted=True)
    saver.end()
    return {
        "slow_down": statistics.median(b / q for b, q in zip(busy, quiet, strict=True)),
        "state_bytes": size,
        "memory_over_training_bytes": peak - before,
    }


def memory_bytes(*others: int) -> int:
    """Return the memory of this process and others: each page once, shared by how many map it (Pss, proc(5))."""
    texts = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in ("self", *others)]
    return sum(int(line.split()[1]) * 1024 for text in texts for line in text.splitlines() if line.startswith("Pss:"))


def measure_files(folder: Path) -> dict[str, dict[str, float]]:
    """Compare the writing of states with `dd conv=fsync` of the same bytes; and its memory over the state."""
    moments = [torch.randn(2048, 2048) for _ in range(16)]
    names = [f"layer{index}.weight" for index in range(10_000)]
    states: dict[str, Callable[[], dict[str, Any]]] = {
        "24 tensors": lambda: {"state_dict": {f"w{i}": torch.randn(2048, 2048) for i in range(8)}, "rest": moments},
        "one tensor": lambda: {"state_dict": {"w": torch.randn(1 << 28)}, "rest": []},
        "30,000 tensors": lambda: {
            "state_dict": {name: torch.randn(64) for name in names},
            "rest": [[torch.randn(64), torch.randn(64)] for _ in names],
        },
    }
    return {name: measure_write(folder / name, make()) for name, make in states.items()}


def measure_write(folder: Path, state: dict[str, Any]) -> dict[str, float]:
    folder.mkdir(parents=True)
    write_files(folder / "first", state)
    size = sum(path.stat().st_size for path in (folder / "first").iterdir())
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of memory counts from here
    before = peak_now()
    write_files(folder / "second", state)
    memory = peak_now() - before
    seconds: dict[str, list[float]] = {"labtrain": [], "dd": []}
    cpu = []
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
        for path in (folder / "first").iterdir():
            with path.open("rb") as file:
                shutil.copyfileobj(file, source)
        source.flush()
        command = ["dd", f"if={source.name}", f"of={folder / 'dd'}", "bs=1M", "conv=fsync", "status=none"]
        for turn in range(ROUNDS):
            for side in ("labtrain", "dd")[:: 1 if turn % 2 else -1]:
                began, spent = time.perf_counter(), time.process_time()
                if side == "dd":
                    subprocess.run(command, check=True)
                else:
                    write_files(folder / str(turn), state)
                    cpu.append(time.process_time() - spent)
                seconds[side].append(time.perf_counter() - began)
                shutil.rmtree(folder / str(turn), ignore_errors=True)
                (folder / "dd").unlink(missing_ok=True)
                os.sync()
    return {
        "megabytes": size / 1e6,
        "seconds": statistics.median(seconds["labtrain"]),
        "cpu_seconds": statistics.median(cpu),
        "throughput_of_dd": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)),
        "memory_over_state_megabytes": memory / 1e6,
    }


def peak_now() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure_s3(folder: Path) -> dict[str, float]:
    """Compare the delivery of a checkpoint with a plain parallel upload of the same two files; time a listing.

    Plain: s3transfer's defaults, parts of 8 MB, ten at once, where boto3 is installed; else s3fs's put.
    """
    from tests.support.servers import S3

    server = S3(folder / "s3")
    server.start()
    server.make_bucket()
    os.environ |= server.variables()
    try:
        run = saver_of(folder / "run")
        run.open()
        weights = {f"w{index}": torch.randn(2048, 2048) for index in range(25)}
        manifest: Manifest = {**MANIFEST_OF_A_SAVE, "step": 1}
        name = run.save({"state_dict": weights, "more": [torch.randn(10)]}, manifest)
        run.wait()
        source = folder / "run" / "checkpoints" / name
        uploader = boto3.client("s3") if (boto3 := boto3_or_none()) else None
        plain: list[float] = []
        delivered: list[float] = []
        for turn in range(4):
            spool, remote = Store(folder / f"spool{turn}"), Store(f"s3://lab/{turn}")
            shutil.copytree(source, Path(spool.root, name))
            token = spool.take_over()
            remote.renew(token, seen=remote.seen())
            delivery = Delivery(spool, Store(remote.url), token=token, spool_bytes=1 << 40)

            def put(store: Store = remote, turn: int = turn) -> None:
                for file in (WEIGHTS, STATE):
                    if uploader is None:
                        store.fs.put(str(source / file), f"{store.root}/plain/{file}")
                    else:
                        uploader.upload_file(str(source / file), "lab", f"{turn}/plain/{file}")

            def deliver(delivery: Delivery = delivery) -> None:
                delivery.add(name, run.manifests[name])
                assert delivery.wait(300)

            for side, seconds in ((put, plain), (deliver, delivered))[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                side()
                if turn:
                    seconds.append(time.perf_counter() - began)
            delivery.stop()
            remote.fs.rm(remote.root, recursive=True)
        many = Store("s3://lab/many")
        data = json.dumps({"schema": SCHEMA}).encode()
        many.fs.pipe(
            {f"{many.root}/step-{step:010d}/{file}": data for step in range(1000) for file in (MANIFEST, STATE)}
        )
        began = time.perf_counter()
        assert len(many.checkpoints()) == 1000
        listed = time.perf_counter() - began
    finally:
        server.kill()
    size = sum(path.stat().st_size for path in source.iterdir())
    return {
        "throughput_of_plain_upload": statistics.median(a / b for a, b in zip(plain, delivered, strict=True)),
        "megabytes_per_second": size / 1e6 / statistics.median(delivered),
        "listing_1000_s": listed,
    }


def boto3_or_none() -> Any:
    try:
        return importlib.import_module("boto3")  # not in the locks
    except ImportError:
        return None


def main() -> None:
    """Print the tables and write them beside this file."""
    torch.set_num_threads(1)
    place = Path(os.environ.get("BENCH_DIR", tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix="labtrain-bench-", dir=place))
    kept_results = Path(__file__).with_name("results-checkpoint.json")
    results: dict[str, Any]
    try:
        steps = measure_steps(folder / "steps")
        if sys.argv[1:] == ["files"]:
            results = json.loads(kept_results.read_text())
            results |= {"files": measure_files(folder), "s3": measure_s3(folder)}
            say_files(results)
            kept_results.write_text(json.dumps(results, indent=1) + "\n")
            return
        steps = measure_steps(folder / "steps")  # first: it looks at the peak of memory
        io = AsyncCheckpointIO(TorchCheckpointIO())
        bench = Bench(folder, io)
        data = torch.utils.data.TensorDataset(torch.randn(16, 2048))
        trainer = pl.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False,
                             enable_model_summary=False, enable_checkpointing=False, callbacks=[bench], plugins=[io],
                             default_root_dir=folder)  # fmt: skip
        trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=4))
        results = {"local": bench.results, "steps": steps, "files": measure_files(folder), "s3": measure_s3(folder)}
    finally:
        shutil.rmtree(folder)
    print(f"{'':22}{'wait':>8}{'of a copy':>11}{'(CPU)':>8}{'to disk':>10}{'of torch.save':>15}{'with fsync':>12}")
    for side, row in results["local"].items():
        print(
            f"{side:22}{row['wait_ms']:5.0f} ms{row['wait_of_a_copy']:11.2f}{row['wait_cpu_of_a_copy']:8.2f}"
            f"{row['total_ms']:7.0f} ms{row['total_of_torch_save']:15.2f}{row['total_of_torch_save_and_fsync']:12.2f}"
        )
    print(f"a step while a save is written: {steps['slow_down']:.2f} of one while none is")
    more = steps["memory_over_training_bytes"] / steps["state_bytes"]
    print(f"memory over the training's own: {more:.2f} of the state ({steps['state_bytes'] / 1e6:.0f} MB)")
    say_files(results)
    kept_results.write_text(json.dumps(results, indent=1) + "\n")


def say_files(results: dict[str, Any]) -> None:
    for name, row in results["files"].items():
        print(
            f"{name} of {row['megabytes']:.0f} MB: {row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s CPU),"
            f" {row['throughput_of_dd']:.2f} of dd with fsync, {row['memory_over_state_megabytes']:.0f} MB over it"
        )
    s3 = results["s3"]
    print(
        f"S3: {s3['megabytes_per_second']:.0f} MB/s, {s3['throughput_of_plain_upload']:.2f} of a plain parallel upload"
    )
    print(f"1,000 checkpoints listed in {s3['listing_1000_s']:.2f} s")


if __name__ == "__main__":
    main()
