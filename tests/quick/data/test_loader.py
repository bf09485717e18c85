import gc
import inspect
import itertools
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import labtrain
from labtrain import augment
from labtrain.base.errors import ConfigError
from labtrain.data.arrays import Rows
from labtrain.data.loader import DataLoader, pinned
from labtrain.data.prefetch import ahead, in_thread, on_tensors
from labtrain.data.sharded import Sharded
from labtrain.exact import determinism
from labtrain.exact.tree_sum import shard_range
from labtrain.record.digests import digest_tree


class Drawing(torch.utils.data.Dataset):
    """A dataset that draws from all three generators, as transforms do."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    determinism.set_run(seed=7, mode="strict")
    yield
    determinism.set_run(seed=0, mode="off")


def epoch(loader: DataLoader, number: int) -> str:
    loader.set_epoch(number)
    return digest_tree(list(loader))


def test_samples_do_not_depend_on_workers_or_on_what_was_drawn_before() -> None:
    """The trap of torch's own loader: with augmentation, another number of workers gives other samples."""
    here, workers = DataLoader(Drawing(30), 8, shuffle=True), DataLoader(Drawing(30), 8, shuffle=True, num_workers=2)
    first = epoch(here, 3)
    torch.rand(5), random.random(), np.random.rand()
    assert epoch(here, 3) == epoch(workers, 3) == first
    assert epoch(here, 4) != first


def test_another_seed_gives_other_samples_and_another_order() -> None:
    loader = DataLoader(Drawing(30), 8, shuffle=True)
    first = epoch(loader, 0)
    determinism.set_run(seed=8, mode="strict")
    assert epoch(loader, 0) != first


def test_an_epoch_holds_each_sample_once_and_says_which() -> None:
    loader = DataLoader(Drawing(21), 8, shuffle=True)
    seen, told = [], []
    for batch in loader:
        seen += batch[:, 0].long().tolist()
        told += loader.indices_of(len(told) // 8).tolist()
    assert sorted(seen) == list(range(21))
    assert told == seen
    assert len(loader) == 3


@pytest.mark.parametrize(
    ("size", "drop_last", "sizes"),
    [(21, False, [8, 8, 5]), (21, True, [8, 8]), (16, False, [8, 8]), (16, True, [8, 8]), (3, True, [])],
)
def test_the_last_batch_is_partial_or_left_out(size: int, drop_last: bool, sizes: list[int]) -> None:
    loader = DataLoader(Drawing(size), 8, drop_last=drop_last)
    assert [len(batch) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 3, 7, 64])
def test_the_ranks_parts_cover_a_batch_without_overlap(size: int, world: int) -> None:
    parts = [list(shard_range(size, rank, world)) for rank in range(world)]
    assert sum(parts, []) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_in_mode_off_no_global_generator_is_touched() -> None:
    determinism.set_run(seed=7, mode="off")
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [(torch.rand(()).item(), random.random(), np.random.rand()) for _ in range(2)]

    class Quiet(Drawing):
        def __getitem__(self, index: int) -> int:
            return index

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    got = []
    for _ in range(2):
        list(DataLoader(Quiet(9), 4, shuffle=True))
        got.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert got == expected


class Collecting(Drawing):
    def __getitem__(self, index: int) -> torch.Tensor:
        gc.collect()
        return super().__getitem__(index)


def test_a_worker_does_not_collect_its_parents_garbage(tmp_path: Path) -> None:
    """A finished training leaves process groups in cycles. Freed in a forked worker they hang, or abort, in a join."""
    file = tmp_path / "freed_by"

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            file.write_text(str(os.getpid()))

    gc.disable()
    try:
        Cycle()
        epoch(DataLoader(Collecting(8), batch_size=4, num_workers=2), 0)
        assert not file.exists()
    finally:
        gc.enable()
    gc.collect()
    assert file.read_text() == str(os.getpid())


def test_what_cannot_be_loaded_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        DataLoader(Drawing(3), 0)
    with pytest.raises(ConfigError, match="not a map-style dataset"):
        DataLoader(iter([1, 2]), 2)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- shards


def parts(loader: DataLoader) -> list[tuple[int, int, int, str]]:
    """(batch, shard, samples, digest of the data) of all that a loader yields."""
    return [
        (number, shard, samples, digest_tree(data))
        for number, batch in enumerate(loader)
        for shard, samples, data in batch.parts
    ]


def sharded(world: int, rank: int, *, size: int = 29, workers: int = 0, start: int = 0) -> DataLoader:
    loader = DataLoader(Drawing(size), 8, shuffle=True, num_workers=workers)
    loader.shard(4, rank=rank, world=world)
    loader.set_epoch(2)
    loader.start_at(2, start)
    return loader


@pytest.mark.parametrize("size", [8, 16, 24, 29, 33, 34])
def test_the_shards_of_all_ranks_are_those_of_one(size: int) -> None:
    """Whatever the number of ranks, with workers too; a smaller last batch is cut evenly, into two samples or more."""
    whole = parts(sharded(1, 0, size=size))
    for world in (2, 3, 4):
        found = [part for rank in range(world) for part in parts(sharded(world, rank, size=size, workers=rank % 2))]
        assert sorted(found) == whole
    assert sum(samples for _, _, samples, _ in whole) == size
    last = [samples for number, _, samples, _ in whole if number == whole[-1][0]]
    assert last == {1: [1], 2: [2], 5: [2, 3], 8: [2, 2, 2, 2]}[size % 8 or 8]
    assert {len(list(sharded(3, rank, size=size))) for rank in range(3)} == {-(-size // 8)}


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_resume_begins_at_its_batch(start: int) -> None:
    whole, rest = sharded(1, 0), sharded(1, 0, start=start)
    assert [part[1:] for part in parts(rest)] == [part[1:] for part in parts(whole) if part[0] >= start]
    assert len(rest) == len(whole)
    rest.set_epoch(3)
    whole.set_epoch(3)
    assert parts(rest) == parts(whole)


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [1, 1, 1]), (1, [1]), (9, [2, 2, 2, 3])])
def test_a_batch_has_no_more_shards_than_samples(batch_size: int, sizes: list[int]) -> None:
    """A validation with batch_size=1 is common; its batches have one shard."""
    loader = DataLoader(Drawing(9), batch_size)
    loader.shard(4, rank=0, world=1)
    for batch in loader:
        assert [samples for _, samples, _ in batch.parts] == sizes
        assert batch.shards == len(sizes)


class Batched(Drawing):
    """Fetches a list of samples in one call."""

    def __getitem__(self, index: int) -> torch.Tensor:
        raise AssertionError("one at a time")

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [Drawing.__getitem__(self, index) for index in indices]


def test_samples_that_are_fetched_together() -> None:
    """`__getitems__` draws for a shard: the same on any number of workers and ranks, and after a resume."""

    def loader(world: int, rank: int, workers: int, start: int = 0) -> DataLoader:
        made = DataLoader(Batched(29), 8, shuffle=True, num_workers=workers)
        made.shard(4, rank=rank, world=world)
        made.start_at(0, start)
        return made

    whole = parts(loader(1, 0, 0))
    assert parts(loader(1, 0, 2)) == whole
    assert sorted(parts(loader(2, 0, 0)) + parts(loader(2, 1, 1))) == whole
    assert [part[1:] for part in parts(loader(1, 0, 0, 2))] == [part[1:] for part in whole if part[0] >= 2]


@pytest.mark.parametrize("kind", ["tensor", "array", "memory map", "tensor dataset"])
def test_rows_are_taken_a_batch_at_a_time(kind: str, tmp_path: Path) -> None:
    """The same batches as of single rows that torch collates."""
    rows = torch.arange(60, dtype=torch.float32).view(20, 3)
    labels = torch.arange(20)
    dataset: Any = {
        "tensor": rows,
        "array": rows.numpy(),
        "tensor dataset": torch.utils.data.TensorDataset(rows, labels),
    }.get(kind)
    if kind == "memory map":
        dataset = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=(20, 3))
        dataset[:] = rows.numpy()
    rows_at_once = list(DataLoader(dataset, 6, shuffle=True))
    one_by_one = list(DataLoader(dataset, 6, shuffle=True, collate_fn=torch.utils.data.default_collate))
    assert digest_tree(rows_at_once) == digest_tree(one_by_one)
    assert len(rows_at_once) == 4


def test_a_dataset_that_draws_nothing_by_declaration_is_held_to_it() -> None:
    class Quiet(Drawing):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([index])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    quiet = list(DataLoader(Quiet(9), 4, draws=False))
    assert digest_tree(quiet) == digest_tree(list(DataLoader(Quiet(9), 4)))
    with pytest.raises(ConfigError, match="draws=False, but Drawing drew random numbers for sample 0"):
        list(DataLoader(Drawing(9), 4, draws=False))
    assert state is not None


def test_it_takes_all_arguments_of_torchs_loader() -> None:
    options = inspect.signature(torch.utils.data.DataLoader).parameters
    given = {name: option.default for name, option in options.items() if name not in ("dataset", "batch_size")}
    assert digest_tree(list(DataLoader(Drawing(9), 4, **given))) == digest_tree(list(DataLoader(Drawing(9), 4)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shuffle": True, "sampler": [1]}, "sampler option is mutually exclusive with shuffle"),
        ({"timeout": -1}, "timeout option should be non-negative"),
        ({"prefetch_factor": 2}, "prefetch_factor option could only be specified in multiprocessing"),
        ({"prefetch": 2}, "unexpected keyword argument 'prefetch'"),
    ],
)
def test_arguments_that_torch_refuses_are_refused_in_its_words(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"labtrain.DataLoader: .*{says}"):
        DataLoader(Drawing(9), 4, **options)


class Endless(torch.utils.data.Dataset):
    """A million million samples, each made when it is asked for."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> int:
        return index


def test_a_dataset_of_any_size_costs_no_memory() -> None:
    """The first batch of 10^12 samples, shuffled, and one in the middle: nothing as long as the dataset is made."""
    loader = DataLoader(Endless(), 1000, shuffle=True, draws=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = next(iter(loader))
    loader.start_at(0, 500_000_000)
    middle = next(iter(loader))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    assert len(set(first.tolist()) | set(middle.tolist())) == 2000
    assert max(first.tolist()) > 10**11


def test_lightning_leaves_a_sharded_batch_as_it_is() -> None:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    batch = Sharded([(0, 1, torch.ones(1))], samples=1, shards=1)
    assert move_data_to_device(batch, torch.device("meta")) is batch


# -------------------------------------------------------------------------------------------- arrays, and their transforms


def arrays(size: int = 29) -> Any:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (size, 1, 6, 6), np.uint8), torch.arange(size)


@pytest.mark.parametrize("shards", [None, 4])
def test_a_tuple_of_arrays_is_a_dataset_of_their_rows(shards: int | None, tmp_path: Path) -> None:
    """A memory map among them, with workers too: the same batches as one by one."""
    images, labels = arrays()
    mapped = np.memmap(tmp_path / "images", np.uint8, "w+", shape=images.shape)
    mapped[:] = images
    loaders = [
        DataLoader((mapped, labels), 8, shuffle=True),
        DataLoader((mapped, labels), 8, shuffle=True, num_workers=2),
        DataLoader((images, labels), 8, shuffle=True, collate_fn=torch.utils.data.default_collate),
    ]
    digests = set()
    for loader in loaders:
        if shards is not None:
            loader.shard(shards, rank=0, world=1)
        assert len(loader) == 4
        digests.add(digest_tree([batch if shards is None else [part[2] for part in batch.parts] for batch in loader]))
    assert len(digests) == 1
    assert labtrain.fingerprint(loaders[0].dataset)["samples"] == 29


def test_arrays_that_torch_cannot_share() -> None:
    """Backwards, and a field of records."""
    records = np.zeros(5, dtype=[("a", np.uint8), ("b", np.int32)])
    records["b"] = np.arange(5)
    for array in (np.arange(5)[::-1], records["b"]):
        assert next(iter(DataLoader(array, 5, transform=None))).tolist() == array.tolist()


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    images, labels = arrays()
    with pytest.raises(ConfigError, match="a tuple of arrays with 29, 28 rows: all must have the same number") as error:
        DataLoader((images, labels[1:]), 8)
    assert error.value.hint
    with pytest.raises(
        ConfigError, match="a tuple of arrays and a list: each must be an array, a memory map or a tensor"
    ):
        DataLoader((images, labels.tolist()), 8)
    with pytest.raises(ConfigError, match="transform=3: must be a callable"):
        DataLoader(images, 8, transform=[3])
    with pytest.raises(ConfigError, match=r"transform=.*Shift.*: must be a callable"):
        DataLoader(images, 8, transform=augment.Shift)


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels last", "one channel last", "reversed", "columns first", "bfloat"]
)
def test_rows_lie_in_memory_as_an_index_lays_them(layout: str) -> None:
    """Kernels are chosen by strides: they are a part of the bits."""
    tensor = {
        "contiguous": torch.arange(240.0).view(5, 3, 4, 4),
        "channels last": torch.arange(240.0).view(5, 3, 4, 4).to(memory_format=torch.channels_last),
        "one channel last": torch.arange(80.0).view(5, 1, 4, 4).to(memory_format=torch.channels_last),
        "reversed": torch.arange(240.0).view(5, 3, 4, 4).flip(0)[::2],
        "columns first": torch.arange(240.0).view(4, 3, 4, 5).permute(3, 2, 1, 0),
        "bfloat": torch.arange(240.0).view(5, 3, 4, 4).bfloat16(),
    }[layout]
    places = np.array([2, 0, 1])
    for array in [tensor] if layout == "bfloat" else [tensor, tensor.numpy()]:
        (taken,) = Rows([array], single=False)(places)
        wanted = torch.as_tensor(array)[torch.from_numpy(places)]
        assert taken.stride() == wanted.stride()
        assert digest_tree(taken) == digest_tree(wanted)


def bytes_read(path: Path, batches: int) -> tuple[int, str]:
    """Return what the first batches of a file that no memory holds have read from the disk, and their digest."""
    rows = np.memmap(path, np.uint8, "r", shape=(65536, 1024))
    with path.open() as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])
    loaded = list(itertools.islice(DataLoader(rows, 32, shuffle=True), batches))
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0]) - before, digest_tree(loaded)


def test_a_map_that_is_larger_than_memory_is_read_by_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB, shuffled: of one that fits, the kernel reads 128 KiB around each row; the batches are the same."""
    path, content = tmp_path / "rows", np.random.default_rng(0).bytes(64 << 20)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    fits, expected = bytes_read(path, 3)
    monkeypatch.setattr("labtrain.data.arrays.memory_bytes", lambda: 100 << 20)
    large, found = bytes_read(path, 3)
    assert expected == found
    assert large <= 5 * 32 * 4096  # four batches' pages: one was asked for ahead
    if fits:  # it lies on a disk
        assert large < fits / 5


def test_the_pages_that_are_asked_for_are_those_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file with a header, and of a part of one."""
    np.save(tmp_path / "rows.npy", np.arange(3_000_000, dtype=np.int32).reshape(-1, 3))
    monkeypatch.setattr("labtrain.data.arrays.memory_bytes", lambda: 1)
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for view, first in ((rows, 0), (rows[500_000:], 500_000)):
        taker = Rows([view], single=True)
        assert taker.advise(shuffle=True)
        (_, start, size), indices = taker.advised[0], np.array([7, 4000])
        assert (start, size) == (128 + first * 12, 12)
        assert taker(indices)[:, 0].tolist() == [(first + index) * 3 for index in indices]
        assert taker.advise(shuffle=False)
        assert not taker.advised
    assert not Rows([rows.T, np.asarray(rows)[::2], np.arange(3)], single=False).advise(shuffle=True)


TRANSFORMS = [augment.Shift(1), augment.Flip(), augment.Scale(), augment.Noise(0.1), augment.Mixup(29, 0.4)]


def transformed(world: int, rank: int, *, workers: int = 0, start: int = 0, dataset: Any = None) -> DataLoader:
    loader = DataLoader(
        arrays() if dataset is None else dataset, 8, shuffle=True, num_workers=workers, transform=TRANSFORMS
    )
    loader.shard(4, rank=rank, world=world)
    loader.set_epoch(2)
    loader.start_at(2, start)
    return loader


class Single(torch.utils.data.Dataset):
    """The same samples, one at a time, with a draw that changes nothing."""

    def __len__(self) -> int:
        return 29

    def __getitem__(self, index: int) -> Any:
        images, labels = arrays()
        return torch.from_numpy(images[index]) + torch.rand(()).byte(), labels[index]


def test_transformed_batches_do_not_depend_on_ranks_workers_or_resumes() -> None:
    """Nor on whether samples come one by one."""
    whole = parts(transformed(1, 0))
    assert parts(transformed(1, 0, workers=2)) == whole
    assert parts(transformed(1, 0, workers=1, dataset=Single())) == whole
    for world in (2, 3, 4):
        found = [part for rank in range(world) for part in parts(transformed(world, rank, workers=rank % 2))]
        assert sorted(found) == whole
    assert [part[1:] for part in parts(transformed(1, 0, start=2))] == [part[1:] for part in whole if part[0] >= 2]


@pytest.mark.parametrize("mode", ["strict", "off"])
def test_a_whole_batch_has_the_samples_of_its_shards(mode: str) -> None:
    """Without shards, as in a notebook: draws depend on seed, epoch and index, in every mode."""
    determinism.set_run(seed=7, mode=mode)
    whole = DataLoader(arrays(), 8, shuffle=True, transform=TRANSFORMS)
    whole.set_epoch(2)
    for number, (batch, sharded) in enumerate(zip(whole, transformed(1, 0), strict=True)):
        joined = [torch.cat(part) for part in zip(*(data for _, _, data in sharded.parts), strict=True)]
        assert digest_tree(joined) == digest_tree(batch)
        assert batch[0].dtype == torch.float32
        assert batch[1].shape == (len(batch[0]), 29)
        assert whole.samples_of(number) == len(batch[0])


def test_a_transform_of_ones_own_may_draw_from_global_generators() -> None:
    """Seeded a part at a time: it may look at the whole part as well."""

    def own(batch: Any, draws: Any) -> Any:
        return batch[0] + torch.rand(()) + random.random() + np.random.rand() - batch[0].float().mean()

    def loaded(world: int) -> list[Any]:
        found = []
        for rank in range(world):
            loader = DataLoader(arrays(), 8, shuffle=True, transform=own)
            loader.shard(4, rank=rank, world=world)
            found += parts(loader)
        return sorted(found)

    assert loaded(1) == loaded(2) == loaded(3)
    assert len({part[3] for part in loaded(1)}) == len(loaded(1))


def test_a_device_gets_bytes_and_transforms_them() -> None:
    """Told apart by the meta device, where nothing but shapes is computed."""
    seen = []

    def look(batch: Any, draws: Any) -> Any:
        seen.append((batch[0].device.type, batch[0].dtype, draws.indices.device.type))
        return batch

    transform = [look, *TRANSFORMS[:4]]
    (batch, *_) = DataLoader(arrays(), 8, shuffle=True, transform=transform, device="meta")
    assert seen[0] == ("meta", torch.uint8, "meta")
    assert [(each.device.type, each.dtype) for each in batch] == [("meta", torch.float32), ("meta", torch.int64)]
    (plain, *_) = DataLoader(arrays(), 8, device="meta")
    assert plain[0].device.type == "meta"


def test_a_copy_begins_before_the_one_before_it_is_used() -> None:
    """What the copies to a GPU are built on: one ahead, in order, none lost; and the thread that reads."""
    told: list[Any] = []
    for number in ahead(range(4), lambda item: (told.append(("begun", item)), item)[1]):
        told.append(("used", number))
    wanted = [("begun", 0), *itertools.chain(*((("begun", n + 1), ("used", n)) for n in range(3))), ("used", 3)]
    assert told == wanted
    assert list(ahead([], str)) == []
    far = ahead(iter(range(9)), told.append, number=4)
    next(far)
    assert told[-5:] == [0, 1, 2, 3, 4]
    assert list(ahead([1], str)) == ["1"]
    assert list(in_thread(lambda item: (item, threading.current_thread().name), [1, 2])) == [
        (1, "labtrain-reader_0"),
        (2, "labtrain-reader_0"),
    ]
    with pytest.raises(ZeroDivisionError):
        list(in_thread(lambda item: 1 / item, [1, 0]))
    assert on_tensors(lambda each: each + 1, {"a": [torch.zeros(1), "b"]}) == {"a": [torch.ones(1), "b"]}


def test_a_batch_that_is_on_a_device_is_not_pinned() -> None:
    """A dataset may live on the GPU; torch page-locks the host's memory alone, and refuses others."""
    batch = {"x": [torch.empty(2, device="meta")], "y": "text"}
    assert pinned(batch) is batch


def test_without_shards_each_rank_needs_a_part_of_each_batch() -> None:
    """The size of an own order's last batch is known before the first batch; that of a sampler's only when it comes."""
    small = r"a batch of Drawing has 1 sample for 2 devices: .*\n\nhint: labtrain.DataLoader\(..., drop_last=True\)"
    with pytest.raises(ConfigError, match=small):
        DataLoader(Drawing(9), 4).need_each_rank(2, most=1.0)
    DataLoader(Drawing(10), 4).need_each_rank(2, most=1.0)
    DataLoader(Drawing(9), 4, drop_last=True).need_each_rank(2, most=1.0)
    DataLoader(Drawing(9), 4).need_each_rank(2, most=2)
    sampled = DataLoader(Drawing(9), batch_sampler=[[0, 1], [2]])
    sampled.need_each_rank(2, most=1.0)
    batches = iter(sampled)
    next(batches)
    with pytest.raises(ConfigError, match=small):
        next(batches)
