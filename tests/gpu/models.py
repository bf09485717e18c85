"""A GPT with SDPA and a ResNet with BatchNorm, in the sizes of a test; what they log is exact_worker's."""

import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import labtrain
from labtrain.checkpoints.staging import Staging
from labtrain.stores.layout import list_checkpoints
from labtrain.training.callbacks.checkpoint import Checkpoints
from tests.support.exact_worker import VOCABULARY, At, Net
from tests.support.waiting import wait_until


class Layer(nn.Module):
    """Attention and a perceptron, each beside an identity."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mixed(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True, dropout_p=dropped)  # (B, heads, T, D)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.perceptron(self.before_perceptron(x)))


class GPT(Net):
    """Tokens (B, T) to scores (B, T, VOCABULARY); the embedding and the last layer are one matrix."""

    classes = VOCABULARY

    def __init__(
        self, width: int, context: int, layers: int = 2, heads: int = 4, dropout: float = 0.1, **options: Any
    ) -> None:
        super().__init__(**options)
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return cast(Tensor, self.head(x))


class Residual(nn.Module):
    """Two convolutions beside an identity, or beside one of 1 x 1 where the shape changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.side: nn.Module = nn.Identity()
        if stride != 1:
            self.side = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.side(x))


class ResNet(Net):
    """Images (B, 3, H, W) to scores (B, 3)."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1), Residual(width, width), Residual(width, 2 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, self.classes),
        )  # fmt: skip


class Scattered(Net):
    """Adds 4,096 numbers into 8 places: on a GPU in any order, unless torch is told otherwise."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net, self.head = nn.Linear(3, 4096), nn.Linear(8, self.classes)
        self.register_buffer("places", torch.arange(4096) % 8)

    def forward(self, inputs: Tensor) -> Tensor:
        numbers = self.net(inputs.mean((2, 3)))  # (B, 4096)
        return cast(Tensor, self.head(numbers.new_zeros(len(inputs), 8).index_add(1, self.places, numbers)))


class Hungry(Net):
    """Takes a part of a card's memory for each sample; on a CPU it raises what torch would."""

    def __init__(self, samples: int, **options: Any) -> None:
        super().__init__(**options)
        self.samples, self.net = samples, nn.Linear(3, self.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and inputs.is_cuda:
            whole = torch.cuda.get_device_properties(inputs.device).total_memory
            taken = torch.empty(len(inputs) * whole // self.samples, dtype=torch.uint8, device=inputs.device)
            del taken
        elif self.training and len(inputs) > self.samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return cast(Tensor, self.net(inputs.mean((2, 3))))


class Quiet(pl.LightningModule):
    """Logs its loss as a mean over an epoch, so that no step waits for the device; `reads` makes it wait."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.LazyLinear(3)
        )
        self.net(torch.zeros(2, 3, 16, 16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = functional.cross_entropy(self.net(inputs), targets)
        if self.reads:
            loss.item()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Data(pl.LightningDataModule):
    """Random tokens (B, T), or random images (B, 3, H, H) of bytes that are scaled on the device."""

    def __init__(
        self, kind: str, size: int, batch_size: int, length: int, num_workers: int = 0, validates: bool = True
    ) -> None:
        super().__init__()
        self.kind, self.size, self.length, self.validates = kind, size, length, validates
        self.batch_size, self.num_workers = batch_size, num_workers

    def _loader(self, size: int, *, shuffle: bool) -> labtrain.DataLoader:
        generator = torch.Generator().manual_seed(size)
        if self.kind == "tokens":
            tokens = torch.randint(0, VOCABULARY, (size, self.length + 1), generator=generator)
            return labtrain.DataLoader(
                (tokens[:, :-1], tokens[:, 1:]), self.batch_size, shuffle=shuffle, num_workers=self.num_workers
            )
        shape = size, 3, self.length, self.length
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (size,), generator=generator)
        transform = [labtrain.augment.Flip(), labtrain.augment.Scale(0.5, 0.2)]
        options: dict[str, Any] = {"shuffle": shuffle, "num_workers": self.num_workers, "transform": transform}
        return labtrain.DataLoader((images, labels), self.batch_size, **options)

    def train_dataloader(self) -> labtrain.DataLoader:
        return self._loader(self.size, shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(7, shuffle=False) if self.validates else []


class NoWait(pl.Callback):
    """Lets torch raise an error if a step waits for the device, from the end of one step to that of another.

    On a CPU `Reads` raises it.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.reads = first, last, Reads()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        begins, ends = trainer.global_step == self.first, trainer.global_step == self.last
        if trainer.strategy.root_device.type == "cuda" and (begins or ends):
            torch.cuda.set_sync_debug_mode("error" if begins else "default")
        elif begins:
            self.reads.__enter__()
        elif ends:
            self.reads.__exit__(None, None, None)


class Reads(TorchDispatchMode):
    """Raises torch's error for an operation that reads values of a tensor, for which a GPU's step would wait.

    Optimizers have their steps on the CPU also on a GPU; and the trail is written when the GPU has sent its numbers.
    Copies to a GPU cannot be seen on a CPU.
    """

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = operation.overloadpacket.__name__ in self.NAMES
        if reads and not _may_read(*traceback.extract_stack(limit=2)[:1]):  # the caller
            raise RuntimeError(f"called a synchronizing CUDA operation: {operation}")
        return operation(*args, **(kwargs or {}))


def _may_read(frame: traceback.FrameSummary) -> bool:
    file = Path(frame.filename)
    return file.parts[-3:-1] == ("torch", "optim") or (file.name, frame.name) == ("steps.py", "flush")


class Kill(At):
    """As `At`, and waits for a checkpoint that is newer than this start: a GPU's steps are faster than a disk."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.start = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.number and trainer.global_step == self.step and trainer.global_rank == self.rank:
            folder = Path(trainer.default_root_dir, "checkpoints")
            wait_until(lambda: any(found["step"] > self.start for _, found in list_checkpoints(folder)), 60)
        super().on_train_batch_end(trainer)


class Saves(pl.Callback):
    """Writes how long the loop waited for the copies of its saves, how long their files took, and the buffers' bytes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.copies_s: list[float] = []
        self.writes_s: list[float] = []
        self.staging = Staging()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        saver = next(each for each in trainer.callbacks if isinstance(each, Checkpoints)).saver
        self.staging = saver.staging
        saver.staging.copy = _timed(saver.staging.copy, self.copies_s)
        saver._write = _timed(saver._write, self.writes_s)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.copies_s:
            return
        buffers = self.staging.buffers.values()
        found = {
            "saves": len(self.copies_s),
            "copy_s": statistics.median(self.copies_s),
            "write_s": statistics.median(self.writes_s),
            "bytes": sum(each.nbytes for each in buffers),
            "pinned_bytes": sum(each.nbytes for each in buffers if each.is_pinned()),
        }
        self.path.write_text(json.dumps(found))


def _timed(function: Any, into: list[float]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            into.append(time.perf_counter() - began)

    return call
