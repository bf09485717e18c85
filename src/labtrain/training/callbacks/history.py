"""Records time, throughput, memory, learning rates and metrics of a training, in a few thousand lines a start.

The trail is the same each time a run is trained. The history describes one machine at one time: the report draws it
(report/), and no result depends on it. A resumed training appends to it. Lines of a killed training after its last
checkpoint stay, since that time was spent.
"""

import json
import math
import time
from pathlib import Path

import lightning.pytorch as pl
import psutil
import torch

from labtrain.base.console import warn
from labtrain.base.contracts import Best
from labtrain.base.errors import DamagedError
from labtrain.base.files import Lines
from labtrain.data.sharded import Loader
from labtrain.record.trail import HISTORY, read_history_lines
from labtrain.training.lightning import active_results, peak_of_device


class History(pl.Callback):
    """Writes history.jsonl on rank 0.

    Args:
        run_dir: the run's folder.
        batch_size: samples of a step, if the loader is not labtrain's.
    """

    EVERY_SECONDS = 1.0  # at first; then a two-thousandth of the time that has passed

    def __init__(self, run_dir: Path, *, batch_size: int) -> None:
        self.path, self.batch_size = run_dir / HISTORY, batch_size
        self.file: Lines | None = None
        self.process = psutil.Process()
        self.started = self.written = 0.0
        self.samples = 0
        self.flops_per_sample: float | None = None
        self.peak_flops_per_s: int | None = None  # of all devices

    def put_flops(self, per_sample: float | None) -> None:
        """Take the floating-point operations of one sample, forward and backward; None: unknown."""
        self.flops_per_sample = per_sample

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file = Lines(self.path)
            if self.path.stat().st_size:
                self.file.add("")  # a line that a kill cut short ends here
            self.started = self.written = time.monotonic()
            self.samples = 0
            peak = peak_of_device(trainer)
            self.peak_flops_per_s = peak * trainer.world_size if peak else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        self.samples += loader.samples_of(batch_idx) if isinstance(loader, Loader) else self.batch_size
        now = time.monotonic()
        if now - self.written >= max(self.EVERY_SECONDS, (now - self.started) / 2000):
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, metrics=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, metrics=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, trainer: pl.Trainer, *, metrics: bool = False) -> None:
        if self.file is None:
            return
        now = time.monotonic()
        seconds = now - self.written
        device = trainer.strategy.root_device
        samples_per_s = self.samples / seconds if self.samples and seconds else None
        flops = self._flops_of_sample(trainer) if samples_per_s else None
        line: dict[str, object] = {
            "time": round(time.time(), 3),
            "step": trainer.global_step,
            "samples_per_s": round(samples_per_s, 1) if samples_per_s else None,
            "flops_per_s": round(samples_per_s * flops) if samples_per_s and flops else None,
            "peak_flops_per_s": self.peak_flops_per_s,
            "memory_bytes": self.process.memory_info().rss,
            "gpu_memory_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
            "lr": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
            "metrics": {},
        }
        if metrics and (results := active_results(trainer)) is not None:
            # What this loop logged: callback_metrics holds the other loop's last values as well.
            logged = results.metrics(on_step=False)["callback"]
            found = {name: float(value) for name, value in sorted(logged.items())}
            line["metrics"] = {name: value for name, value in found.items() if math.isfinite(value)}
        self.file.add(json.dumps(line, default=float))
        self.written, self.samples = now, 0

    def _flops_of_sample(self, trainer: pl.Trainer) -> float | None:
        """Return the floating-point operations of a sample: from the model's `flops_per_batch`, else as counted.

        Lightning's ThroughputMonitor reads that attribute too. It may be a property, so it is read each time.
        """
        try:
            per_batch = getattr(trainer.lightning_module, "flops_per_batch", None)
            given = 0.0 if per_batch is None else float(per_batch)
        except Exception:  # of the property: no result of a training depends on it
            given = 0.0
        if not (math.isfinite(given) and given > 0):
            return self.flops_per_sample
        loader = trainer.train_dataloader
        return given / (loader.samples_of(0) if isinstance(loader, Loader) else self.batch_size)


def best_of(run_dir: Path, *, monitor: str | None, mode: str) -> Best | None:
    """Return the best value of a run's monitored metric: metric, value, and the first step with it.

    Warns and returns None if the history is damaged: no result of a training depends on it.
    """
    try:
        found = [(line["metrics"][monitor], line["step"]) for line in read_history_lines(run_dir)
                 if monitor in line["metrics"]]  # fmt: skip
    except DamagedError as error:
        warn(f"{error.args[0]}: the best value is unknown")
        return None
    if monitor is None or not found:
        return None
    value = (max if mode == "max" else min)(value for value, _ in found)
    return {"metric": monitor, "value": value, "step": min(step for other, step in found if other == value)}
