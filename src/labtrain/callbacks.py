"""What labtrain does at each step, as Lightning callbacks: seeding, the trail, progress."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import xxhash
from lightning.pytorch.callbacks import ProgressBar
from torch.distributed.tensor import DTensor

from labtrain.determinism import seed_place
from labtrain.digests import tensor_bytes
from labtrain.files import is_spread
from labtrain.loader import DataLoader, Sharded


class Seeding(pl.Callback):
    """Makes what hooks draw a function of (seed, place), so that no generator's state has to be saved.

    The steps themselves are seeded by the strategy, a shard at a time; without shards, here.

    Args:
        per_rank: each rank draws its own; with shards all ranks draw the same.
    """

    def __init__(self, *, per_rank: bool) -> None:
        self.per_rank = per_rank

    def _seed(self, trainer: pl.Trainer, *place: int | str) -> None:
        seed_place(*place, trainer.global_rank if self.per_rank else "all")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer, "epoch", trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seed(trainer, "step", trainer.current_epoch, batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "validation", trainer.global_step, dataloader_idx, batch_idx)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "test", dataloader_idx, batch_idx)


class BatchSizes(pl.Callback):
    """Tells Lightning the number of samples of a sharded batch, for what hooks log."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tell(trainer, batch)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tell(trainer, batch)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tell(trainer, batch)

    @staticmethod
    def _tell(trainer: pl.Trainer, batch: Any) -> None:
        if isinstance(batch, Sharded) and trainer._results is not None:
            trainer._results.batch_size = batch.samples


class Trail(pl.Callback):
    """Writes a line a step: step, epoch, loss, digest of the batch's indices, digest of the weights after the step.

    On the CPU the digest is xxh3_128 over the weights' bytes, on a GPU an integer checksum computed there. A resumed
    training first cuts the trail at the step it goes on from.
    """

    def __init__(self, path: Path, *, every_n_steps: int, resumed_step: int = 0) -> None:
        self.path, self.every_n_steps, self.resumed_step = path, every_n_steps, resumed_step
        self.file: IO[str] | None = None
        self.last_step = resumed_step
        self.spread = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.spread = is_spread(pl_module.state_dict())
        if trainer.is_global_zero:
            cut_trail(self.path, last_step=self.resumed_step)
            self.file = self.path.open("a", buffering=1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step or step % self.every_n_steps:
            return
        self.last_step = step
        if self.file is None and not self.spread:
            return
        weights = checksum_of_all(pl_module.state_dict(), spread=self.spread)
        if self.file is None:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        value = loss.item() if isinstance(loss, torch.Tensor) else math.nan
        loader = trainer.train_dataloader
        line = {
            "step": step,
            "epoch": trainer.current_epoch,
            "loss": value if math.isfinite(value) else repr(value),
            "batch": xxhash.xxh3_64_hexdigest(tensor_bytes(loader.indices)) if isinstance(loader, DataLoader) else None,
            "weights": weights,
        }
        self.file.write(json.dumps(line) + "\n")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def cut_trail(path: Path, *, last_step: int) -> None:
    """Keep a trail's lines up to `last_step`; a last line without its end, left by a crash, goes too."""
    if not path.exists():
        return
    kept = bytearray()
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
            break
        kept += line
    path.write_bytes(kept)


def checksum_of_all(weights: dict[str, torch.Tensor], *, spread: bool) -> str:
    """Return a digest of a state dict's bits; where it is spread, of each rank's part, on all of them at once."""
    if not spread:
        return checksum(weights.values())
    parts = [""] * dist.get_world_size()
    dist.all_gather_object(parts, checksum(tensor.to_local() if isinstance(tensor, DTensor) else tensor
                                           for tensor in weights.values()))  # fmt: skip
    return xxhash.xxh3_128_hexdigest("".join(parts).encode())


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """Return a digest of tensors' bits, in their order: fast, not cryptographic."""
    sha = xxhash.xxh3_128()
    for tensor in tensors:
        sha.update(tensor_bytes(tensor if tensor.device.type == "cpu" else device_checksum(tensor)))
    return sha.hexdigest()


def device_checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar that depends on every bit of `tensor`, computed where the tensor is.

    A weighted sum of its bytes modulo 2^64: integers, so that no order of summation can matter.
    """
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
    weight = torch.arange(1, 2 * raw.numel(), 2, device=tensor.device)  # odd, so that each bit reaches the sum
    return ((raw + 1) * weight * (weight ^ 0x5DEECE66C)).sum()


class Progress(ProgressBar):
    """A line that moves in a terminal; in a log file, a line an epoch and at most one every half minute."""

    QUIET_SECONDS = 30.0

    def __init__(self, *, batch_size: int, status: Callable[[], str] = str) -> None:
        super().__init__()
        self.batch_size, self.status = batch_size, status
        self.terminal = sys.stderr.isatty()
        self.enabled = True
        self.started = self.printed = 0.0
        self.first_step = 0
        self.samples = 0

    def disable(self) -> None:  # Lightning's protocol: on every rank but 0
        self.enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.printed = time.monotonic()
        self.first_step, self.samples = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        loader = trainer.train_dataloader
        self.samples += len(loader.indices) if isinstance(loader, DataLoader) else self.batch_size
        if self.enabled and now - self.printed > (0.2 if self.terminal else self.QUIET_SECONDS):
            self.printed = now
            self._print(self._line(trainer, pl_module, batch_idx + 1), moving=self.terminal)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.enabled:
            self.printed = time.monotonic()
            self._print(self._line(trainer, pl_module, int(trainer.num_training_batches)), moving=False)

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> str:
        epoch, per_epoch = trainer.current_epoch, trainer.num_training_batches
        done = trainer.global_step - self.first_step
        seconds = max(time.monotonic() - self.started, 1e-9)
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        total = trainer.estimated_stepping_batches
        left = (total - trainer.global_step) / done * seconds if done and math.isfinite(total) else None
        bar = self._bar(batches / per_epoch) if self.terminal and math.isfinite(per_epoch) else ""
        parts = [
            f"{bar}epoch {epoch + 1}{f'/{epochs}' if epochs else ''}",
            f"batch {batches}/{per_epoch:.0f}",
            f"{self.samples / seconds:,.0f} samples/s",
        ]
        if left is not None:
            parts.append(f"{clock(left)} left")
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        if status := self.status():
            parts.append(status)
        return "  ".join(parts)

    @staticmethod
    def _bar(done: float, width: int = 20) -> str:
        return "━" * round(width * done) + "─" * (width - round(width * done)) + "  "

    def _print(self, line: str, *, moving: bool) -> None:
        erase = "\r\x1b[2K" if self.terminal else ""
        if moving:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be erased
        sys.stderr.write(f"{erase}{line}{'' if moving else chr(10)}")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def warn(text: str) -> None:
    """Print a warning to standard error."""
    sys.stderr.write(f"warning: {text}\n")
