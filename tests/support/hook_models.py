"""Models whose hooks write down what they get, and gather outputs for an epoch's end."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import nn

import labtrain


class Part(NamedTuple):
    """A batch as `Named.collate` makes it."""

    rows: torch.Tensor
    more: dict[str, Any]


class Numbered(torch.utils.data.Dataset):
    """Samples that are known by their number: (features, number)."""

    def __init__(self, size: int) -> None:
        self.features = torch.randn(size, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.features[index], index


def collate(samples: list[tuple[torch.Tensor, int]]) -> Part:
    """Return a named tuple with a dict in it: rows, names, and rows that are padded to the longest of their shard."""
    numbers = [number for _, number in samples]
    padded = nn.utils.rnn.pad_sequence([torch.ones(number + 1) for number in numbers], batch_first=True)
    packed = nn.utils.rnn.pack_sequence([torch.ones(number + 1) for number in numbers], enforce_sorted=False)
    more = {
        "packed": packed,
        "number": torch.tensor(numbers),
        "name": [f"sample {number}" for number in numbers],
        "padded": padded,
    }
    return Part(torch.stack([features for features, _ in samples]), more)


class Numbers(pl.LightningDataModule):
    """Training and validation data; with `two`, two loaders of a validation."""

    def __init__(
        self,
        size: int = 22,
        val: int = 11,
        batch_size: int = 8,
        num_workers: int = 0,
        two: bool = False,
        named: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.val, self.batch_size, self.two = size, val, batch_size, two
        self.collate = collate if named else None

    def train_dataloader(self) -> Any:
        return labtrain.DataLoader(Numbered(self.size), self.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        loader = labtrain.DataLoader(Numbered(self.val), self.batch_size, collate_fn=self.collate)
        return [loader, labtrain.DataLoader(Numbered(5), 4, collate_fn=self.collate)] if self.two else loader

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class Plain(pl.LightningModule):
    """A linear model of numbered samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 1)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.net(rows).squeeze(1) - rows.sum(1)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def note(trainer: pl.Trainer, **what: Any) -> None:
    """Append a line to the file of this rank, in the folder that SEEN names."""
    with Path(os.environ["SEEN"], f"{trainer.global_rank}.jsonl").open("a") as file:
        file.write(json.dumps({"stage": str(trainer.state.stage.value), **what}) + "\n")


class Scores:
    """An object of no class that labtrain knows."""

    def __init__(self, best: torch.Tensor) -> None:
        self.best, self.names = best, {"best": [best * 2]}


class Returning(Plain):
    """Returns what it saw of each shard, in all kinds of values; then it changes the batch.

    Args:
        unsendable: returns a function, too.
        manual: optimizes by hand, and returns no loss.
    """

    def __init__(self, unsendable: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.unsendable, self.automatic_optimization = unsendable, not manual

    def _returned(self, batch: Any) -> dict[str, Any]:
        rows, more = batch
        numbers = more["number"]
        mean = numbers.double().mean()
        images = rows.view(-1, 1, 3, 2).expand(-1, 2, -1, -1)
        found = {
            "number": numbers + 0, "names": more["name"], "pair": (rows.sum(1), mean), "mean": mean.item(),
            "last": images.contiguous(memory_format=torch.channels_last), "wide": images, "turned": rows.T[:2].T,
            "array": numbers.numpy() / 3, "scores": Scores(rows[:1] * (1 + 2j)), "nested": [{"odd": numbers % 2 == 1}],
            "packed": more["packed"], "none": None, "count": len(numbers), "kind": "all", "weights": self.net.weight,
        }  # fmt: skip
        numbers.zero_()
        return {**found, "function": lambda: None} if self.unsendable else found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch.rows)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return {"loss": loss, **self._returned(batch)}
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return self._returned(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._returned(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._returned(batch)


def shown(value: Any) -> Any:
    """Return all of a value as JSON: of a tensor its type, layout and bytes, too."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.stride(), value.requires_grad, shown(value.numpy(force=True))]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes().hex()]
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(shown, value)]
    return shown(vars(value)) if isinstance(value, Scores) else repr(value)


class Seeing(pl.Callback):
    """Writes down the batch and the outputs that hooks get."""

    def _start(self, trainer: pl.Trainer, _: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        rows, more = batch
        note(trainer, hook="start", batch=batch_idx, kind=type(batch).__name__, number=more["number"].tolist(),
             name=more["name"], sums=rows.sum(1).tolist(), all=shown(batch))  # fmt: skip
        self.given = batch

    def _end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert batch is self.given
        padded = batch.more["padded"]
        sums, mean = outputs["pair"]
        note(trainer, hook="end", batch=batch_idx, number=outputs["number"].tolist(), name=outputs["names"],
             sums=sums.tolist(), mean=float(mean), as_number=outputs["mean"], all=shown([outputs, batch]),
             padded=len(padded) if isinstance(padded, list) else "tensor")  # fmt: skip
        module.log("seen", outputs["array"].mean(), on_step=False, on_epoch=True)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _start
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = _end


class Collecting(Plain):
    """Appends outputs to a list in a hook, and updates a metric there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.of_steps: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.of_steps.append(batch[1])
        return batch[1] * 2.0

    def on_validation_batch_end(self, outputs: Any, *_: Any) -> None:
        self.seen.append(len(outputs))

    def on_validation_epoch_end(self) -> None:
        self.log("val/seen", float(sum(self.seen)))
        self.log("val/steps", float(sum(map(len, self.of_steps))))
        self.seen.clear()
        self.of_steps.clear()


class Summing(pl.Callback):
    """Adds up outputs in a metric of its own, one for each epoch."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.total = torchmetrics.SumMetric()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.total.update(outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("val/total", self.total.compute())


class Changing(pl.Callback):
    """Adds noise to the batch before the step."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].add_(1.0)


class Noisy(Plain):
    """Augments on the device, with torch's global generator."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + torch.randn_like(batch[0]), batch[1]]


class Idle(pl.Callback):
    """Takes the outputs and the batch, and reads neither."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class Reading(pl.Callback):
    """Reads the outputs, and hands them to the method of its base class."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, None, batch_idx)


class Appending(Plain):
    """Appends outputs to lists and uses them at the epoch's end, as Lightning's own guide to version 2 says."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.val_outputs: dict[int, list[Any]] = {0: [], 1: []}
        self.kept: list[Any] = []  # never cleared
        self.register_buffer("threshold", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = (self.net(batch[0]).squeeze(1) - batch[1]) ** 2
        self.outputs.append({"number": batch[1], "loss": losses.detach()})
        self.kept.append(batch_idx)
        return losses.mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.val_outputs[dataloader_idx].append(self.net(batch[0]).squeeze(1) > self.threshold)

    def on_train_epoch_end(self) -> None:
        note(self.trainer, numbers=[item["number"].tolist() for item in self.outputs])
        losses = torch.cat([item["loss"] for item in self.outputs])
        self.threshold.copy_(losses.quantile(0.9))
        self.log("train/median", losses.median())
        self.outputs.clear()

    def on_validation_epoch_end(self) -> None:
        for number, items in self.val_outputs.items():
            if items:
                self.log(f"val/above{number}", torch.cat(items).float().mean())
            items.clear()


class Gathering(Plain):
    """Gathers outputs in lists, one for all steps of training and one for each loader of a validation."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice
        self.trained: list[Any] = []
        self.lists: dict[int, list[Any]] = {0: [], 1: []}
        self.all: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch[0])
        self.trained.append((batch[1].clone(), f"{batch_idx}", loss.detach()))
        if self.twice:
            self.trained.append("once more")
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.lists[dataloader_idx].append({"number": batch[1], "score": self.net(batch[0]).squeeze(1)})
        self.all.append(dataloader_idx)

    def on_train_epoch_end(self) -> None:
        items = labtrain.gather_outputs(self.trained)
        self.trained.clear()
        note(
            self.trainer,
            numbers=[item[0].tolist() for item in items],
            more=[[*item[1:2], item[2].item()] for item in items],
        )
        self.log("train/mean", torch.stack([item[2] for item in items]).mean())

    def on_validation_epoch_end(self) -> None:
        for number, items in self.lists.items():
            whole = labtrain.gather_outputs(items) if items else []
            items.clear()
            note(self.trainer, loader=number, numbers=[item["number"].tolist() for item in whole])
            if whole:
                self.log(f"val/score{number}", torch.cat([item["score"] for item in whole]).mean(), sync_dist=True)
        note(self.trainer, all=labtrain.gather_outputs(self.all))
        self.all.clear()


class Partial(Plain):
    """Computes metrics of its own outputs alone.

    Args:
        kinds: which: plain, synced, summed, step and train.
    """

    def __init__(self, kinds: str = "") -> None:
        super().__init__()
        self.kinds = kinds.split()
        self.total, self.count = 0.0, 0
        self.seen = torchmetrics.MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.total, self.count = self.total + float(batch[1].sum()), self.count + len(batch[1])
        self.seen(batch[1])
        self.log("val/seen", self.seen)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch[0])
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "step" in self.kinds:
            self.log("step", float(self.global_rank), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        if "train" in self.kinds:
            self.log("train", float(self.global_rank))

    def on_validation_epoch_end(self) -> None:
        value = torch.tensor(self.total / self.count)
        self.total, self.count = 0.0, 0
        self.log("val/computed", self.seen.compute(), sync_dist=True)
        self.log("val/own", value, rank_zero_only=True)
        if "plain" in self.kinds:
            self.log("plain", value)
        if "synced" in self.kinds:
            self.log("synced", value, sync_dist=True)
        if "summed" in self.kinds:
            self.log("summed", 11.0, reduce_fx="sum", sync_dist=True)


class Timing(pl.Callback):
    """Logs what differs between ranks by its nature, to the logger and as one rank's own."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("seconds", float(trainer.global_rank), rank_zero_only=True)
        for logger in trainer.loggers:
            logger.log_metrics({"memory": float(trainer.global_rank)}, step=trainer.global_step)


class Outside(pl.Callback):
    """Gathers from a list that is not the model's: of the losses that a forward hook sees."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.handle = pl_module.net.register_forward_hook(self._seen)

    def _seen(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            self.losses.append(output.mean().item())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        labtrain.gather_outputs(self.losses)


class Backwards(pl.Callback):
    """Counts backward passes."""

    def __init__(self) -> None:
        self.count = 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.count += 1
