"""What draws from a generator of its own is found before the first step: the first batch is loaded twice."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from labtrain.base.errors import ConfigError
from labtrain.data.loader import DataLoader
from labtrain.exact import determinism
from labtrain.record.digests import digest_content, digest_tree
from tests.support.exact import Runner, configure


class Plain(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.tensor([index, random.random()]), "y": np.float32(index), "name": str(index)}


class OwnGenerator(Plain):
    """Augments with a generator of its own, as newer augmentation libraries do."""

    def __init__(self, seed: int | None = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.from_numpy(self.generator.standard_normal(2))}


class AllAtOnce(OwnGenerator):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Seeded(Plain):
    """What the hint says: made anew from what is seeded."""

    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng(torch.randint(2**62, ()).item()).standard_normal(2)


class Keeps(Plain):
    """Keeps each sample as it was augmented, by itself or all that are asked for at once."""

    def __init__(self, at_once: bool = False) -> None:
        self.kept: dict[int, Any] = {}
        if at_once:
            self.__class__ = type(
                "KeepsAll", (Keeps,), {"__getitems__": lambda self, indices: [*map(self.get, indices)]}
            )

    def get(self, index: int) -> Any:
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index)
        return self.kept[index]

    def __getitem__(self, index: int) -> Any:
        return self.get(index)


class KeepsRaw(Keeps):
    """Keeps each sample before it is augmented, as people do to spare the disk."""

    def __getitem__(self, index: int) -> Any:
        raw = self.kept.setdefault(index, torch.tensor([index]))
        return raw + torch.rand(1)


class Counts(Plain):
    """Counts its calls, by which it would change its samples later, in a part of it; and notes which was the last."""

    def __init__(self) -> None:
        self.inner, self.last = [Plain()], -1
        self.inner[0].calls = 0  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Any:
        self.inner[0].calls += 1  # type: ignore[attr-defined]
        self.last = index
        return self.inner[0][index]


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    determinism.set_run(seed=7, mode="strict")
    yield
    determinism.set_run(seed=0, mode="off")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("dataset", "draws"), [(OwnGenerator, True), (OwnGenerator, False), (AllAtOnce, True)])
def test_a_generator_held_by_a_dataset_is_refused(dataset: Any, draws: bool, workers: int) -> None:
    """In the main process and in workers, with one error for people: no traceback of a worker."""
    with pytest.raises(ConfigError, match=r"^\w+: sample 0, loaded twice with one seed, differs") as raised:
        list(DataLoader(dataset(), 4, num_workers=workers, draws=draws))
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_dataset_that_keeps_what_it_drew_is_refused(at_once: bool, workers: int) -> None:
    """It gives the same sample twice, and draws once: each worker and each device would keep one of its own."""
    with pytest.raises(
        ConfigError, match=r"^Keeps\w*: the random state after sample 0, loaded twice with one seed"
    ) as raised:
        list(DataLoader(Keeps(at_once), 4, num_workers=workers))
    assert "hint: cache samples before they are augmented" in str(raised.value)
    assert len(list(DataLoader(KeepsRaw(), 4, num_workers=workers))) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_attribute_that_counts_loads_is_known(workers: int) -> None:
    """By name, from a worker too; one that says which sample was the last is not a count."""
    loader = DataLoader(Counts(), 4, num_workers=workers)
    batches = list(loader)
    assert set(loader.counts) == {"Counts.inner.calls"}
    assert digest_content(batches) == digest_content(list(DataLoader(Plain(), 4)))


def test_it_is_said(runner: Runner) -> None:
    """As a warning, and in the receipt."""
    config = configure("mlp", trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.resume_models.Small"}
    config["data"]["_target_"] = "tests.support.data_models.Counted"
    run_dir = runner.run(config, world=2)
    said = "CountedImages.calls changes each time a sample is loaded"
    assert runner.said().count(f"warning: {said}") == 1
    assert run_dir is not None
    assert said in (run_dir / "receipt.json").read_text()


def test_a_collate_fn_with_one_is_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="collate_fn: the first batch, collated twice with one seed"):
        list(DataLoader(Plain(), 4, collate_fn=lambda samples: [default_collate(samples), generator.random()]))


def test_a_collate_fn_that_draws_is_held_to_draws_false() -> None:
    """And is seeded, with draws: the same on any number of workers."""

    class Quiet(Plain):
        def __getitem__(self, index: int) -> Any:
            return index

    def collate(samples: list[Any]) -> Any:
        return default_collate(samples), torch.rand(2)

    with pytest.raises(ConfigError, match="draws=False, but collate_fn drew random numbers"):
        list(DataLoader(Quiet(), 4, collate_fn=collate, draws=False))
    found = [list(DataLoader(Quiet(), 4, collate_fn=collate, num_workers=workers)) for workers in (0, 2)]
    assert digest_tree(found[0]) == digest_tree(found[1])


def test_a_transform_with_one_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def own(batch: Any, draws: Any) -> Any:
        return batch + torch.rand(len(batch), 2, generator=generator)

    with pytest.raises(ConfigError, match="transform: the first batch, transformed twice"):
        list(DataLoader(torch.ones(8, 2), 4, transform=own))
    seeded = DataLoader(torch.ones(8, 2), 4, transform=lambda batch, draws: batch.add_(torch.rand(2)))
    assert len(list(seeded)) == 2


def test_warn_says_it_and_off_does_not_look(capsys: pytest.CaptureFixture[str]) -> None:
    determinism.set_run(seed=7, mode="warn")
    assert len(list(DataLoader(OwnGenerator(), 4))) == 3
    assert capsys.readouterr().err.count("warning: OwnGenerator: sample 0, loaded twice") == 1
    determinism.set_run(seed=7, mode="off")
    dataset = OwnGenerator(0)
    (first, *_) = DataLoader(dataset, 4)
    assert first["x"][0].tolist() == np.random.default_rng(0).standard_normal(2).tolist()
    assert capsys.readouterr().err == ""


def test_what_is_the_same_twice_is_loaded_as_before() -> None:
    """The samples are those of one load; the second epoch is loaded once."""
    seen = []

    class Counted(Plain):
        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counted(), 4)
    first = list(loader)
    assert len(seen) == 12 + 4
    assert digest_content(first) == digest_content(list(DataLoader(Plain(), 4)))
    list(loader)
    assert len(seen) == 12 + 4 + 12
    assert len(list(DataLoader(Seeded(), 4))) == 3


def test_a_training_is_refused_before_its_first_step(runner: Any, tmp_path: Any) -> None:
    """Exit code 2, and no step is in a trail."""
    config = configure("mlp")
    config["model"] = {"_target_": "tests.support.names_models.Tiny"}
    config["data"]["_target_"] = "tests.support.names_models.OwnGenerator"
    runner.run(config, code=2)
    assert "Noisy: sample" in runner.said()
    assert "hint: draw from torch, random or numpy.random" in runner.said()
    assert [trail.read_text() for trail in (tmp_path / "runs").rglob("trail.jsonl")] == [""]


def test_a_dataset_that_makes_its_batches_is_refused() -> None:
    """batch_size=None is torch's way to say it; here the batch is what is cut and ordered."""
    with pytest.raises(ConfigError, match="batch_size=None: must be at least 1"):
        DataLoader(Plain(), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_warn_writes_it_in_the_receipt(runner: Runner, workers: int) -> None:
    """Found by the main process or by a worker, which has no receipt."""
    config = configure("mlp", "even", "32-true", workers, trainer={"max_epochs": 1}, determinism={"mode": "warn"})
    config["data"]["_target_"] = "tests.support.names_models.OwnGenerator"
    run_dir = runner.run(config)
    assert run_dir is not None
    notes = json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"]
    said = [line for line in runner.said().splitlines() if "loaded twice with one seed, differs" in line]
    assert len(said) == 1
    assert said[0].removeprefix("warning: ") in notes
