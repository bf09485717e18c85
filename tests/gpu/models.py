"""A GPT with SDPA and a ResNet with BatchNorm, in the sizes of a test; what they log is exact_worker's."""

import json
import operator
import statistics
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast
from unittest import mock

import lightning.pytorch as pl
import numpy as np
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
    """Logs its loss as a mean over an epoch, so that no step waits for the device; `reads` makes it wait.

    Then each step tries all ways to read a tensor. The training fails when it has come to the steps that may not wait.
    """

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
            _try_reads(loss.detach(), targets)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


READS: dict[str, Callable[[Tensor], object]] = {
    "item": Tensor.item, "tolist": lambda x: x.tolist(), "cpu": lambda x: x.cpu(), "bool": bool, "float": float,
    "int": int, "index": operator.index,
}  # fmt: skip
READS_OF_THE_HOST: dict[str, Callable[[Tensor], object]] = {"numpy": lambda x: x.numpy(), "asarray": np.asarray}


def _try_reads(loss: Tensor, targets: Tensor) -> None:
    """Read in each way; raise an error if one of them was refused."""
    refused, reads = [], READS | (READS_OF_THE_HOST if loss.is_cpu else {})
    for name, read in reads.items():
        try:
            read(targets[0] if name == "index" else loss)
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            refused.append(name)
    if refused:
        missed = ", ".join(reads.keys() - refused) or "none"
        raise RuntimeError(f"reads that are not found: {missed}; found: {', '.join(refused)}.")


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

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let the training end: it moves the model to the CPU."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        elif trainer.global_step in range(self.first, self.last):
            self.reads.__exit__(None, None, None)


class Reads(TorchDispatchMode):
    """Raises torch's error for what reads values of a tensor, for which a GPU's step would wait.

    Optimizers have their steps on the CPU also on a GPU; the trail is written when the GPU has sent its numbers; and on
    a GPU it has checksums of the GPU. Copies with `to` and `copy_` cannot be seen on a CPU: both places are the CPU.
    """

    OPERATIONS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")  # item, bool, int, index
    METHODS = ("tolist", "numpy", "cpu", "__array__")  # on a CPU they are no operations

    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()

    def __enter__(self) -> "Reads":
        for name in self.METHODS:
            self.patches.enter_context(mock.patch.object(Tensor, name, _refused(name, getattr(Tensor, name))))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.patches.close()
        super().__exit__(*exception)

    def __torch_dispatch__(self, operation: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket.__name__ in self.OPERATIONS:
            _refuse_read(str(operation), sys._getframe(1))
        return operation(*args, **(kwargs or {}))


def _refused(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    def read(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        _refuse_read(name, sys._getframe(1))
        return usual(tensor, *arguments, **options)

    return read


def _refuse_read(what: str, frame: types.FrameType) -> None:
    file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
    place = file.name, function
    if file.parts[-3:-1] == ("torch", "optim") or place in (("steps.py", "flush"), ("digests.py", "tensor_bytes")):
        return
    raise RuntimeError(f"called a synchronizing CUDA operation: {what} in {file}:{frame.f_lineno}")


class Recomputes(pl.Callback):
    """Raises an error after a step in which a layer of the GPT was not computed again in the backward."""

    def __init__(self) -> None:
        # Of each call: the layer, and whether in a backward. No list, since labtrain refuses steps that change one.
        self.calls: SimpleQueue[tuple[int, bool]] = SimpleQueue()
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        usual = Layer.forward

        def counted(layer: Layer, x: Tensor) -> Tensor:
            self.calls.put((id(layer), torch._C._current_graph_task_id() != -1))
            return usual(layer, x)

        Layer.forward = counted  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        counted = Counter(self.calls.get() for _ in range(self.calls.qsize()))
        for name, layer in pl_module.named_modules():
            if isinstance(layer, Layer):
                calls, again = counted[id(layer), False], counted[id(layer), True]
                assert bool(calls) is bool(again), f"{name}: {calls} calls, {again} of them again in the backward"
                self.seen += again

    def on_train_end(self, *_: Any) -> None:
        assert self.seen, "no layer was computed"


class ChannelsLast(pl.Callback):
    """Raises an error after a step if a weight, or what the first convolution returned, has not its channels last."""

    def __init__(self) -> None:
        self.images: list[bool] = []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first = next(each for each in pl_module.modules() if isinstance(each, nn.Conv2d))
        first.register_forward_hook(lambda module, inputs, output: self.images.append(_has_channels_last(output)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.dim() == 4 and weight.shape[2:] != (1, 1):  # of 1 x 1 both layouts are one
                assert _has_channels_last(weight), f"{name} has not its channels last"
        assert all(self.images), "the first convolution returned images that have not their channels last"

    def on_train_end(self, *_: Any) -> None:
        assert self.images, "no convolution was computed"


def _has_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


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
    """Writes how long the loop waited for the copies of its saves, how long their files took, and the buffers' bytes.

    Each write is held back until the loop has begun its next step, or until HELD_S are over: then the loop waits for
    the write. The last step has no next one.
    """

    HELD_S = 10

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.copies_s: list[float] = []
        self.writes_s: list[float] = []
        self.stepped: list[bool] = []  # of each write that was held back: whether the loop began a step before it
        self.next_step = threading.Event()
        self.staging = Staging()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        saver = next(each for each in trainer.callbacks if isinstance(each, Checkpoints)).saver
        self.staging = saver.staging
        copy, write = _timed(saver.staging.copy, self.copies_s), _timed(saver._write, self.writes_s)
        last = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)

        def copied(state: Any) -> Any:
            self.next_step.clear()
            return copy(state)

        def held(name: str, state: Any, manifest: Any, sizes: Any) -> None:
            if not manifest["finished"] and manifest["step"] < last and all(self.stepped):
                self.stepped.append(self.next_step.wait(self.HELD_S))
            write(name, state, manifest, sizes)

        saver.staging.copy, saver._write = copied, held

    def on_train_batch_start(self, *_: Any) -> None:
        self.next_step.set()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.copies_s:
            return
        buffers = self.staging.buffers.values()
        found = {
            "saves": len(self.copies_s),
            "stepped": self.stepped,
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
