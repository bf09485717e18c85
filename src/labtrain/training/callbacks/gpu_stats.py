"""Logs the GPUs' memory, load, temperature and power, and warns before a card is full.

torch reports its own memory without waiting for the GPU. The driver reports the rest, through NVML
(https://docs.nvidia.com/deploy/nvml-api/). Its calls take milliseconds, so a thread asks once a second and a step uses
the last answer. Nothing here goes through `self.log`, so no metric, monitor, checkpoint or digest depends on it.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import lightning.pytorch as pl
import pynvml
import torch

from labtrain.base.console import warn
from labtrain.base.nvml import NoDriverError, nvml

EVERY_SECONDS = 1.0
FULL = 0.95  # of a card's memory

READINGS: dict[str, Callable[[object], float]] = {
    "memory_used_gb": lambda card: pynvml.nvmlDeviceGetMemoryInfo(card).used / 1e9,
    "utilization_percent": lambda card: pynvml.nvmlDeviceGetUtilizationRates(card).gpu,
    "temperature_celsius": lambda card: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
    "power_watts": lambda card: pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
}


class GpuStats(pl.Callback):
    """Logs `gpu/N/...` on rank 0, every trainer.log_every_n_steps: N is torch's number, of the GPUs of its node.

    Args:
        cards: returns the UUID of each GPU that a training uses on this node, by torch's number.
    """

    def __init__(self, cards: Callable[[pl.Trainer], dict[int, str]] | None = None) -> None:
        self.cards = cards or cards_of
        self.sensors: Sensors | None = None
        self.warned: set[int] = set()
        self.last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last_step = trainer.global_step
        if trainer.is_global_zero and (cards := self.cards(trainer)):
            self.sensors = Sensors(cards)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.sensors is None or step == self.last_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.last_step = step
        device = trainer.strategy.root_device
        found = {number: dict(readings) for number, readings in self.sensors.newest.items()}
        found.setdefault(device.index or 0, {}).update(held(device))
        metrics = {f"gpu/{number}/{name}": value for number, values in found.items() for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # Lightning logs the first step as 0
        for number, values in found.items():
            used, total = values.get("memory_used_gb", 0.0), self.sensors.total_gb.get(number, 0.0)
            if used > FULL * total and total and number not in self.warned:
                self.warned.add(number)
                warn(nearly_full(number, values, total))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.sensors is not None:
            self.sensors.close()
            self.sensors = None


class Sensors:
    """The driver's readings of some GPUs: taken now, and once a second by a thread.

    Readings that a card, or a slice of one under MIG, does not report are left out.

    Args:
        cards: UUIDs by number.

    Attributes:
        newest: the last readings by the card's number and their names.
        total_gb: memory of each card.
    """

    def __init__(self, cards: dict[int, str]) -> None:
        self.newest: dict[int, dict[str, float]] = {}
        self.total_gb: dict[int, float] = {}
        self.handles: dict[int, object] = {}
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.driver = ExitStack()
        try:
            self.driver.enter_context(nvml())
        except NoDriverError as error:
            warn(f"gpu_stats: the driver does not report the GPUs ({error}): only torch's own numbers are logged")
            return
        for number, uuid in cards.items():
            if (handle := handle_of(uuid)) is not None:
                self.handles[number] = handle
                with suppress(pynvml.NVMLError):
                    self.total_gb[number] = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
        self._read()
        self.thread = threading.Thread(target=self._run, name="labtrain-gpu-stats", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the thread."""
        self.stop.set()
        if self.thread is not None:
            self.thread.join(timeout=5)  # a driver that hangs does not hold up the end of a training
            self.driver.close()

    def _run(self) -> None:
        while not self.stop.wait(EVERY_SECONDS):
            self._read()

    def _read(self) -> None:
        self.newest = {number: readings_of(handle) for number, handle in self.handles.items()}


def readings_of(handle: object) -> dict[str, float]:
    """Return the readings of a card, by name."""
    found = {}
    for name, read in READINGS.items():
        try:
            found[name] = float(read(handle))
        except pynvml.NVMLError:
            continue
    return found


def handle_of(uuid: str) -> object:
    """Return NVML's handle of the GPU, or the slice of one, that torch knows by `uuid`; None if NVML does not.

    By UUID, since CUDA_VISIBLE_DEVICES renumbers torch's GPUs and not NVML's.
    """
    for kind in ("GPU", "MIG"):
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
        except pynvml.NVMLError:
            continue
    return None


def cards_of(trainer: pl.Trainer) -> dict[int, str]:
    """Return the UUID of each GPU that a training uses on this node, by torch's number; none on a CPU."""
    if trainer.strategy.root_device.type != "cuda":
        return {}
    return {number: str(torch.cuda.get_device_properties(number).uuid) for number in trainer.device_ids}


def held(device: torch.device) -> dict[str, float]:
    """Return torch's memory on this process's GPU, now and at its peak; does not wait for the GPU."""
    if device.type != "cuda":
        return {}
    return {
        "memory_allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
        "memory_reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
        "memory_peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }


def nearly_full(number: int, values: dict[str, float], total_gb: float) -> str:
    """Return the warning for a card whose memory is nearly full."""
    used = values["memory_used_gb"]
    own = ""
    if "memory_reserved_gb" in values:
        reserved, peak = values["memory_reserved_gb"], values["memory_peak_gb"]
        own = f"; this process has {reserved:.1f} GB of it and used {peak:.1f} at most"
    return (
        f"GPU {number} is nearly full: {used:.1f} of {total_gb:.1f} GB, other processes included{own}"
        " (labtrain batch-size finds what fits; nvidia-smi shows the processes)"
    )
