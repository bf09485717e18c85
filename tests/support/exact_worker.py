"""Models, data and a worker for tests that train many small runs: each in processes of its own, with one thread.

The processes are forked from a server that has imported torch and Lightning once (multiprocessing's forkserver), so a run
takes a second instead of five. They call `labtrain.train` with a whole configuration; only Hydra is not in it.
"""

import errno
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
import yaml
from torch import nn

import labtrain
from labtrain import augment
from labtrain.base.errors import EXIT_STOPPED, LabtrainError
from labtrain.base.signals import Stopped
from labtrain.checkpoints import format as files
from labtrain.checkpoints.initial import identify_weights
from labtrain.checkpoints.saver import Saver
from labtrain.exact import tree_sum as reduction
from labtrain.record.config import CONF, init_from
from labtrain.record.resume import make_job
from labtrain.training import fit as training
from labtrain.training import start as start_of
from labtrain.training.callbacks import kept, recorder

VOCABULARY, CONTEXT = 11, 8


class Images(torch.utils.data.Dataset):
    """Noise with labels, augmented from all three generators as torchvision's transforms and others do."""

    def __init__(self, size: int, flip: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 1, 6, 6, generator=generator)
        self.labels = torch.randint(0, 3, (size,), generator=generator)
        if flip is not None:
            self.images[flip] += 1e-3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index] + 0.1 * torch.randn(1, 6, 6) + random.gauss(0, 0.1)
        return image.flip(-1) if np.random.rand() < 0.5 else image, self.labels[index]


class Texts(torch.utils.data.Dataset):
    """Random tokens, shifted by one."""

    def __init__(self, size: int, flip: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, VOCABULARY, (size, CONTEXT + 1), generator=generator)
        if flip is not None:
            self.tokens[flip] = (self.tokens[flip] + 1) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def hard_and_loud(batch: Any, draws: Any) -> Any:
    """A transform of a person's own, which draws from torch's generator and depends on the others in its batch."""
    inputs, labels = batch
    return [inputs - inputs.mean() + 0.01 * torch.randn(inputs.shape), labels.argmax(1)]


def raw_images(size: int, flip: int | None = None) -> Any:
    """Return a tuple of arrays, images in bytes."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (size, 1, 6, 6), np.uint8), generator.integers(0, 3, size)
    return images, torch.from_numpy(labels)


TRANSFORMS = [augment.Shift(1), augment.Flip(), augment.Scale(0.5, 0.2), augment.Noise(0.1), augment.Mixup(3, 0.4)]


class Data(pl.LightningDataModule):
    """Training and validation data of one kind."""

    def __init__(
        self, kind: str, size: int, batch_size: int, num_workers: int = 0, flip: int | None = None, loader: str = "ours"
    ) -> None:
        super().__init__()
        dataset: Any = {"texts": Texts, "images": Images, "raw": raw_images}[kind]
        self.transforms = {"train": [*TRANSFORMS, hard_and_loud], "val": augment.Scale()} if kind == "raw" else {}
        self.train, self.val = dataset(size, flip), dataset(7)
        self.batch_size, self.num_workers, self.loader = batch_size, num_workers, loader

    def train_dataloader(self) -> Any:
        if self.loader == "stateful":
            return Stateful(self.train, self.batch_size)
        if self.loader == "counted":
            return Stateful(self.train, self.batch_size, length=False)
        ours = labtrain.DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            transform=self.transforms.get("train", ()),
        )
        return (batch for batch in ours) if self.loader == "once" else ours

    def val_dataloader(self) -> Any:
        transform = self.transforms.get("val", ())
        loader = labtrain.DataLoader(self.val, self.batch_size, num_workers=self.num_workers, transform=transform)
        return (batch for batch in loader) if self.loader == "val once" else loader


class Stateful:
    """A stream with a state of its own: what torchdata's StatefulDataLoader and mosaicml-streaming promise."""

    def __init__(self, dataset: Any, batch_size: int, length: bool = True) -> None:
        self.dataset, self.batch_size, self.generator = dataset, batch_size, torch.Generator().manual_seed(5)
        self.order: list[int] = []
        self.steps = -(-len(dataset) // batch_size)
        if length:
            self.__class__ = SizedStateful

    def __iter__(self) -> Any:
        if not self.order:
            self.order = torch.randperm(len(self.dataset), generator=self.generator).tolist()
        while self.order:
            part, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
            rows = [(self.dataset.images[i], self.dataset.labels[i]) for i in part]
            yield torch.utils.data.default_collate(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])
        self.generator.set_state(state["generator"])


class SizedStateful(Stateful):
    """The same, and its length is known."""

    def __len__(self) -> int:
        return self.steps


class Net(pl.LightningModule):
    """What the models share: how they log, and how they are trained."""

    classes = 3
    plateau = False

    def __init__(self, plateau: bool = False, break_at: int | None = None) -> None:
        super().__init__()
        self.plateau, self.break_at = plateau, break_at
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=self.classes)
        self.train_mean = torchmetrics.MeanMetric()
        self.val = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.Accuracy("multiclass", num_classes=self.classes),
                "f1": torchmetrics.F1Score("multiclass", num_classes=self.classes, average="macro"),
            },
            prefix="val/",
        )
        self.val_max = torchmetrics.MaxMetric()
        self.val_cat = torchmetrics.CatMetric()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        scores = self(inputs).flatten(0, -2)
        loss = nn.functional.cross_entropy(scores, targets.flatten())
        self.train_acc(scores, targets.flatten())
        self.train_mean(loss.detach(), weight=len(inputs))
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        self.log("train/mean", self.train_mean, on_step=True, on_epoch=True)
        self.log("train/worst", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train/seen", float(len(inputs)), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norm = sum(p.grad.norm() for p in self.parameters() if p.grad is not None)
        self.log("grad", norm + 0 * torch.rand(()), on_step=True, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        scores = self(inputs).flatten(0, -2)
        loss = nn.functional.cross_entropy(scores, targets.flatten())
        self.val(scores, targets.flatten())
        self.val_max(loss)
        self.val_cat(scores.softmax(-1).amax(-1))
        self.log("val/loss", loss, sync_dist=True)
        self.log_dict(self.val)
        self.log("val/max", self.val_max)

    def on_validation_epoch_end(self) -> None:
        self.log("val/cat", self.val_cat.compute().double().mean())
        self.val_cat.reset()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.break_at == self.trainer.global_step:
            with torch.no_grad():
                first = next(self.parameters()).view(-1).view(torch.int32)
                first[0] ^= 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        if self.plateau:
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5) * 0.99**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class MLP(Net):
    """Two layers and dropout; one parameter that is used in some shards only, one that is used in none."""

    def __init__(self, wide: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.wide = wide
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 3))
        self.sometimes, self.never = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scores = self.net(inputs)
        if self.wide:  # a sum that is long enough to be shared by threads
            scores = scores + 1e-3 * (scores.mean() * torch.linspace(0, 1, 100_000)).sin().sum()
        return scores * self.sometimes if inputs.mean() > 0 else scores


class NoDeterministicForward(nn.Module):
    """Uses an operation without a deterministic kernel."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


class _NoDeterministicBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return gradient


class NoDeterministicBackward(nn.Module):
    """Uses one in its backward alone."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _NoDeterministicBackward.apply(inputs)


class Faulty(MLP):
    """What cannot be exact, a fault at a time."""

    def __init__(self, fault: str, **options: Any) -> None:
        super().__init__(**options)
        self.fault = fault
        if fault == "counts":
            self.register_buffer("seen", torch.zeros(3, dtype=torch.long))
        elif fault == "metric":
            self.pearson = torchmetrics.PearsonCorrCoef()
        elif fault in ("forward", "backward"):
            self.net.append(NoDeterministicForward() if fault == "forward" else NoDeterministicBackward())
        elif fault == "benchmark":
            torch.backends.cudnn.benchmark = True
        elif fault == "tf32":
            torch.set_float32_matmul_precision("high")
        elif fault == "threads":
            torch.set_num_threads(2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        loss = super().training_step(batch, batch_idx)
        if self.fault == "counts":
            self.seen += torch.bincount(targets, minlength=3)
        elif self.fault == "names":
            self.log("high" if inputs.mean() > 0 else "low", 1.0)
        elif self.fault == "none" and inputs.mean() > 0:
            return None
        return loss


class TwoLoaders(MLP):
    """Takes a batch from each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


class CNN(Net):
    """Convolutions, BatchNorm and dropout."""

    def __init__(self, channels_last: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
        )  # fmt: skip
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)


class GPT(Net):
    """Two blocks of attention; the embedding and the last layer are one matrix."""

    classes = VOCABULARY

    def __init__(self, width: int = 16, dropout: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=dropout, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.places.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


class At(pl.Callback):
    """Sends its own process a signal once so many steps are done; when and which, no configuration knows.

    A step below 0 means in the validation after it.
    """

    def __init__(self) -> None:
        self.step, self.number, self.rank = map(int, os.environ.get("SIGNAL_AT", "0 0 0").split())

    def state_dict(self) -> dict[str, Any]:
        return {}  # and no word of it: a process that goes on has a signal of its own

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.number and trainer.global_step == self.step and trainer.global_rank == self.rank:
            number, self.number = self.number, 0  # once, where several batches make a step
            os.kill(os.getpid(), number)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.number and trainer.global_step == -self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class Away(pl.Callback):
    """Takes the way to a store away after a step: the port is open no more."""

    def __init__(self, gone: str, step: int) -> None:
        self.gone, self.step = Path(gone), step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.gone.touch()
            time.sleep(0.2)  # fixed: an upload that has begun fails in this step, not in a later one


class Broken(pl.Callback):
    """Divides by zero after the step that BREAK_AT names."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        1 / (trainer.global_step - int(os.environ.get("BREAK_AT", "0")))


class Hub(pl.Callback):
    """Takes a credential, as what talks to a service does."""

    def __init__(self, hub_token: str) -> None:
        assert hub_token


def kill_in_save(number: int, delay: float) -> None:
    """Have this process killed a while after its so many-th save has begun."""
    save, left = Saver.save, [number]

    def watched(self: Saver, *arguments: Any, **options: Any) -> str:
        left[0] -= 1
        if left[0] == 0:
            threading.Thread(
                target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL))  # fixed: the moment
            ).start()
        return save(self, *arguments, **options)

    Saver.save = watched  # type: ignore[method-assign]


def in_a_thread(train: Any) -> Any:
    """Return what calls a function in a thread of its own."""

    def call(*arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(train, *arguments).result()

    return call


def full_in_save(name: str) -> None:
    """Have this process find the disk full in its third save: when it writes its part, or when it has written it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    owner: Any = HuggingFaceStorageWriter if name == "write_data" else files
    real, left = getattr(owner, name), [3]

    def full(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    setattr(owner, name, full)


class Scaled(MLP):
    """Has a parameter without a dimension."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))


class Halve(pl.Callback):
    """Changes the weights after the last step."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter *= 0.5


def default_config() -> dict[str, Any]:
    """Return labtrain's own defaults, as Hydra would compose them."""
    config = yaml.safe_load((CONF / "labtrain.yaml").read_text())
    del config["defaults"], config["hydra"]
    for group in ("trainer", "determinism", "checkpoint", "speed"):
        config[group] = yaml.safe_load((CONF / group / "default.yaml").read_text())
    return {
        **config,
        "experiment": "exact",
        "logger": {},
        "callbacks": {"at": {"_target_": "tests.support.exact_worker.At"}},
    }


# A look at sixty thousand installed files is a third of such a run, and finds the same each time: the server takes it once.
FILES_STATE = functools.cache(recorder.files_state)
FILES_STATE()


def work(
    config: dict[str, Any],
    rank: int,
    world: int,
    port: int,
    log: Path,
    result: Connection,
    signal_at: str,
    bucket_bytes: int | None,
    environment: dict[str, str],
) -> None:
    """Train one rank of a run and end the process with the exit code that train.py would have."""
    os.environ |= environment
    local_rank, node = (0, rank) if config["trainer"]["num_nodes"] > 1 else (rank, 0)
    os.environ |= {"LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world), "NODE_RANK": str(node),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SIGNAL_AT": signal_at}  # fmt: skip
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if "KILL_IN_SAVE" in environment:
        number, delay, *which = environment["KILL_IN_SAVE"].split()
        if which in ([], [str(rank)]):
            kill_in_save(int(number), float(delay))
    if "FULL_IN_SAVE" in environment:
        which, name = environment["FULL_IN_SAVE"].split()
        if which == str(rank):
            full_in_save(name)
    if "COPY_SHARE" in environment:
        kept.SHARE = float(environment["COPY_SHARE"])
    if environment.get("BLIND_RANK") == str(rank):
        start_of.find_checkpoint = lambda *_, **__: None
    recorder.files_state = FILES_STATE
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of its own
    if bucket_bytes:
        reduction.BUCKET_BYTES, reduction.WHOLE_BYTES = bucket_bytes, 0  # and each in pieces
    if config["trainer"]["precision"] == "16-mixed":
        train_in_fp16(config["trainer"]["accelerator"], config["trainer"]["devices"])
    # The sources of the experiment are none: the tests' own would give each run another name while they are written.
    root = Path(config["paths"]["runs"]).parent / "none"
    try:
        train = in_a_thread(training.train) if "IN_A_THREAD" in environment else training.train
        config["init_from"] = init_from(config["init_from"])
        identify_weights(config, root)
        found = train(make_job(config, root=root, command=["test"]))
    except LabtrainError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except Stopped:
        sys.exit(EXIT_STOPPED)
    result.send(str(found.run_dir))
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # as at the end of a process of its own: multiprocessing leaves atexit out
    sys.exit(0)


def train_in_fp16(accelerator: str, devices: int) -> None:
    """Begin with a scale that overflows, so that steps are skipped and the scale comes down.

    And let fp16 run where there is no GPU: torch can, Lightning and labtrain's users have no use for it.
    """
    from lightning.pytorch.plugins.precision import MixedPrecision

    trainer = pl.Trainer

    def make(*, precision: str, plugins: list[Any], **options: Any) -> pl.Trainer:
        device = "cuda" if accelerator == "gpu" else "cpu"
        scaler = torch.amp.GradScaler(device, init_scale=2.0**22, growth_interval=4)
        return trainer(plugins=[*plugins, MixedPrecision("16-mixed", device, scaler)], **options)

    pl.Trainer = make
    if accelerator == "cpu":
        training.choose_accelerator = lambda config: ("cpu", devices)


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}
