"""torch's DataLoader in the forms that people have: with each sampler of torch and their own, several at once."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from tests.support.exact_worker import MLP, Images

SIZE, BATCH = 37, 8


class ByLength(Sampler[list[int]]):
    """Batches of samples of one kind, in a random order: batches of several sizes, one of a single sample."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.groups = [torch.nonzero(labels == label).flatten().tolist() for label in range(3)]

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for group in self.groups:
            order = random.sample(group, len(group))
            batches += [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        random.shuffle(batches)
        yield from batches

    def __len__(self) -> int:
        return sum(-(-len(group) // BATCH) for group in self.groups)


class Seeded(Sampler[int]):
    """An order from the epoch, as many people write it; the epoch comes from set_epoch, or is counted."""

    def __init__(self, size: int, *, counts: bool) -> None:
        self.size, self.counts, self.epoch = size, counts, 0
        if not counts:
            self.set_epoch = lambda epoch: setattr(self, "epoch", epoch)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += self.counts
        yield from order

    def __len__(self) -> int:
        return self.size


class OwnGenerator(Sampler[int]):
    """Draws from a generator of numpy that it keeps."""

    def __init__(self, size: int) -> None:
        self.size, self.generator = size, np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(self.size).tolist())

    def __len__(self) -> int:
        return self.size


class Endless(Sampler[int]):
    """Draws while it is iterated, and has no end and no length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(self.size, ()))


class Named(Dataset[Any]):
    """Samples by name."""

    def __init__(self, images: Images) -> None:
        self.images = {f"image {index}": images[index] for index in range(len(images))}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, name: str) -> Any:
        image, label = self.images[name]
        return image + 0.1 * torch.rand(()), label


class Listed(Dataset[Any]):
    """Makes a batch of a list of indices."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> Any:
        return default_collate([self.images[index] for index in indices])


class Split(IterableDataset[Any]):
    """A stream that each worker reads a part of, shuffled in a small buffer and augmented."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        waiting = []
        for index in range(first, len(self.images), step):
            waiting.append(self.images[index])
            if len(waiting) > 4:
                yield waiting.pop(random.randrange(len(waiting)))
        yield from waiting


class Resumable(IterableDataset[Any]):
    """A stream with a generator and a place of its own, which it can save."""

    def __init__(self, images: Images) -> None:
        self.images, self.generator, self.order = images, np.random.default_rng(1), list[int]()

    def __iter__(self) -> Iterator[Any]:
        if not self.order:
            self.order = self.generator.permutation(len(self.images)).tolist()
        while self.order:
            yield self.images.images[self.order[0]], self.images.labels[self.order.pop(0)]

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.generator.bit_generator.state = list(state["order"]), state["generator"]


class Drawing(Resumable):
    """A stream that augments from the global generators, in the middle of an epoch."""

    def __iter__(self) -> Iterator[Any]:
        for image, label in super().__iter__():
            yield image + 0.1 * torch.rand(()) + random.random(), label


class InParts(Drawing):
    """A stream that can be split at fixed places; its parts have different lengths."""

    def shard(self, index: int, count: int) -> "Drawing":
        part = Images(1)
        part.images, part.labels = self.images.images[index::count], self.images.labels[index::count]
        return Drawing(part)


class Playing(IterableDataset[Any]):
    """A stream without a state that depends on what happened in this process."""

    def __init__(self, images: Images) -> None:
        self.images, self.played = images, 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.images)):
            self.played += 1
            yield self.images.images[index] + self.played, self.images.labels[index]


class ByRank(IterableDataset[Any]):
    """A stream that gives each process other samples."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield from (self.images[index] for index in range(rank, len(self.images), world))


class Plain:
    """Ready batches from an object that knows nothing of torch."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        order = np.random.permutation(len(self.images)).tolist()
        for start in range(0, len(order), BATCH):
            yield default_collate([self.images[index] for index in order[start : start + BATCH]])


def own_seeds(worker: int) -> None:
    """Do what torch's notes on reproducibility say."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Images)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torch_loader(images: Images, sampler: Any = None, **options: Any) -> Any:
    return DataLoader(images, BATCH, sampler=sampler, **options)


LOADERS: dict[str, Callable[[Images], Any]] = {
    "shuffle": lambda images: torch_loader(images, shuffle=True),
    "sequential": lambda images: torch_loader(images, SequentialSampler(images)),
    "replacement": lambda images: torch_loader(images, RandomSampler(images, replacement=True, num_samples=50)),
    "fewer": lambda images: torch_loader(images, RandomSampler(images, num_samples=20), drop_last=True),
    "subset": lambda images: torch_loader(images, SubsetRandomSampler(range(5, 30))),
    "weighted": lambda images: torch_loader(images, WeightedRandomSampler(torch.arange(1.0, 38.0), 40)),
    "distributed": lambda images: torch_loader(images, DistributedSampler(images, num_replicas=1, rank=0)),
    "batch sampler": lambda images: DataLoader(images, batch_sampler=BatchSampler(RandomSampler(images), 8, True)),
    "by length": lambda images: DataLoader(images, batch_sampler=ByLength(images.labels)),
    "generator": lambda images: torch_loader(
        images, shuffle=True, generator=generator(), worker_init_fn=own_seeds, num_workers=2, persistent_workers=True
    ),
    "generator of the sampler": lambda images: torch_loader(images, RandomSampler(images, generator=generator())),
    "set_epoch": lambda images: torch_loader(images, Seeded(len(images), counts=False)),
    "counts epochs": lambda images: torch_loader(images, Seeded(len(images), counts=True)),
    "own generator": lambda images: torch_loader(images, OwnGenerator(len(images))),
    "endless": lambda images: torch_loader(images, Endless(len(images))),
    "list of names": lambda images: torch_loader(Named(images), [f"image {index}" for index in range(20)]),  # type: ignore[arg-type]
    "no batch size": lambda images: DataLoader(
        Listed(images), batch_size=None, sampler=BatchSampler(RandomSampler(images), BATCH, False)
    ),
    "rows": lambda images: torch_loader(TensorDataset(images.images, images.labels), shuffle=True),  # type: ignore[arg-type]
    "spawned": lambda images: torch_loader(
        images, shuffle=True, num_workers=1, multiprocessing_context="spawn", prefetch_factor=1, timeout=60
    ),
}
STREAMS: dict[str, Callable[[Images], Any]] = {
    "stream": lambda images: DataLoader(Split(images), BATCH),
    "stream in workers": lambda images: DataLoader(Split(images), BATCH, num_workers=2, generator=generator()),
    "resumable stream": lambda images: DataLoader(Resumable(images), BATCH),
    "drawing stream": lambda images: DataLoader(Drawing(images), BATCH),
    "stream in parts": lambda images: DataLoader(InParts(images), BATCH),
    "plain iterable": Plain,
}
LOADERS |= STREAMS | {
    "playing": lambda images: DataLoader(Playing(images), BATCH),
    "by rank": lambda images: DataLoader(ByRank(images), BATCH),
}
# Several at once: the step gets two batches.
SEVERAL: dict[str, Callable[[Images, Images], Any]] = {
    "list": lambda one, two: [torch_loader(one, shuffle=True), torch_loader(two, shuffle=True)],
    "dict": lambda one, two: {"one": torch_loader(one, shuffle=True), "two": DataLoader(two, 5, shuffle=True)},
    "min_size": lambda one, two: CombinedLoader(
        {"one": torch_loader(one, shuffle=True), "two": torch_loader(two, WeightedRandomSampler(torch.ones(20), 20))},
        "min_size",
    ),
    "max_size": lambda one, two: CombinedLoader([torch_loader(one), torch_loader(two, shuffle=True)], "max_size"),
}


class Data(pl.LightningDataModule):
    """Gives one of the loaders above to the training; a loader of torch to the validation."""

    def __init__(
        self, loader: str, size: int = SIZE, batch_size: int = BATCH, kind: str = "", num_workers: int = 0
    ) -> None:
        super().__init__()
        self.loader, self.train, self.val = loader, Images(size), Images(7)

    def train_dataloader(self) -> Any:
        if self.loader in SEVERAL:
            return SEVERAL[self.loader](self.train, Images(20))
        return LOADERS[self.loader](self.train)

    def val_dataloader(self) -> Any:
        if self.loader in SEVERAL:
            return [DataLoader(self.val, 4), DataLoader(self.val, 1)]
        return DataLoader(self.val, 4)


class Several(MLP):
    """Trains on two batches at once, one of which may have ended."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        losses = []
        for each in batch.values() if isinstance(batch, dict) else batch:
            if each is not None:
                inputs, targets = each
                losses.append(torch.nn.functional.cross_entropy(self(inputs), targets))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets = batch
        self.log("val/loss", torch.nn.functional.cross_entropy(self(inputs), targets))

    def on_validation_epoch_end(self) -> None:
        pass
