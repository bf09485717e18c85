"""What identifies a dataset's data, and what does not."""

import copy
import datetime
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from labtrain import fingerprint as public
from labtrain.base.errors import ConfigError
from labtrain.record.fingerprints import fingerprint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "labtrain" / "files.sqlite"


class Flip:
    """A transform with a setting, and one of itself inside."""

    def __init__(self, p: float) -> None:
        self.p, self.me = p, self


class Images(Dataset[Any]):
    """As people write them: a folder, a list of its files, arrays, a transform."""

    def __init__(self, folder: Path, p: float = 0.5, scale: Callable[[Any], Any] = abs) -> None:
        self.root, self.names = str(folder), sorted(path.name for path in folder.iterdir())
        self.labels, self.table = np.arange(6).reshape(2, 3), {"mean": torch.ones(2), "kinds": {"b", "a"}}
        self.transform, self.scale = Flip(p), scale

    def __len__(self) -> int:
        return len(self.names)


def images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def digest_of(dataset: Any) -> str:
    return str(fingerprint(dataset)["digest"])


def test_it_tells_what_it_read(tmp_path: Path) -> None:
    found = fingerprint(Images(images(tmp_path / "data" / "x")))
    assert found["samples"] == 2
    assert found["files"] == 2
    assert found["bytes"] == 1000 + 6 * 8 + 2 * 4
    assert found["type"] == "Images"
    assert found["opaque"] == []
    assert public is fingerprint


def test_where_it_lies_does_not_matter_and_each_byte_does(tmp_path: Path) -> None:
    one, other = images(tmp_path / "data" / "x"), tmp_path / "elsewhere" / "deep" / "y"
    shutil.copytree(one, other)
    first = digest_of(Images(one))
    assert digest_of(Images(one)) == digest_of(Images(other)) == first
    raw = bytearray((other / "b.png").read_bytes())
    raw[77] ^= 1
    (other / "b.png").write_bytes(raw)
    assert digest_of(Images(other)) != first


@pytest.mark.parametrize("change", ["p", "label", "tensor", "function", "dtype", "shape"])
def test_whatever_it_holds_matters(change: str, tmp_path: Path) -> None:
    folder = images(tmp_path / "data" / "x")
    changed = Images(folder, p=0.25 if change == "p" else 0.5, scale=len if change == "function" else abs)
    if change == "label":
        changed.labels[1, 2] += 1
    elif change == "tensor":
        changed.table["mean"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    elif change == "dtype":
        changed.labels = changed.labels.view(np.uint64)
    elif change == "shape":
        changed.labels = changed.labels.reshape(3, 2)
    assert digest_of(changed) != digest_of(Images(folder))


def test_datasets_of_datasets(tmp_path: Path) -> None:
    rows = TensorDataset(torch.arange(6.0))
    assert digest_of(Subset(rows, [0, 1])) != digest_of(Subset(rows, [0, 2]))
    assert digest_of(ConcatDataset([rows, rows])) != digest_of(ConcatDataset([rows, TensorDataset(torch.arange(6.0))]))
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(1000, 3))
    array[:] = 1
    whole = digest_of(array)
    array[999, 2] = 2
    assert digest_of(array) != whole
    assert digest_of(np.float32(1)[()]) != digest_of(np.empty((0, 3)))


def test_tables_and_arrays_of_objects() -> None:
    tables = [pd.DataFrame({"x": [1, 2], "y": ["a", last]}) for last in ("b", "c")]
    assert digest_of(tables[0]) == digest_of(tables[0].copy()) != digest_of(tables[1])
    assert digest_of(tables[0].rename(columns={"x": "z"})) != digest_of(tables[0])
    assert digest_of(tables[0]["y"]) != digest_of(tables[1]["y"])
    assert digest_of(np.array(["a", 1], object)) != digest_of(np.array(["a", 2], object))
    assert fingerprint([*tables, np.array(["a", 1], object)])["opaque"] == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (range(800), range(200, 1000)),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        (random.Random(1), random.Random(2)),
        (torch.float32, torch.float64),
        (pd.DataFrame({"x": np.arange(3, dtype=np.int32)}), pd.DataFrame({"x": np.arange(3, dtype=np.int64)})),
        (
            pd.DataFrame(0, [0], [f"c{n}" for n in range(300)]),
            pd.DataFrame(0, [0], [f"c{n + n // 150}" for n in range(300)]),
        ),
        (np.zeros(0, np.float32), np.zeros(0, np.float64)),
    ],
)
def test_what_looks_alike_is_told_apart(one: Any, other: Any) -> None:
    assert digest_of([one]) == digest_of([copy.copy(one)]) != digest_of([other])
    assert fingerprint([one])["opaque"] == []


class Named(dict):  # type: ignore[type-arg]
    """A dict with something of its own."""

    def __init__(self, word: str) -> None:
        super().__init__(x=1)
        self.word = word


class Slots:
    __slots__ = ("x",)


def test_what_is_no_data_does_not_matter_and_what_is_hidden_is_listed() -> None:
    """A logger is its name, not what the process does with it; nothing that is held ends a training."""
    before = digest_of([logging.getLogger("x")])
    logging.getLogger("x.y").addHandler(logging.NullHandler())
    logging.getLogger("x").setLevel(logging.CRITICAL)
    assert digest_of([logging.getLogger("x")]) == before
    assert digest_of([Named("a")]) != digest_of([Named("b")])
    sparse = torch.eye(3).to_sparse()
    found = fingerprint([sparse, torch.empty(2, device="meta"), pd.Categorical(["a"]), Slots(), pd.Timestamp(0)])
    assert set(found["opaque"]) >= {"torch.Tensor", "tests.quick.record.test_fingerprints.Slots"}


def test_links_are_followed_and_lead_nowhere_twice(tmp_path: Path) -> None:
    real = images(tmp_path / "data" / "real")
    (tmp_path / "data" / "x").mkdir()
    (tmp_path / "data" / "x" / "train").symlink_to(real)
    (real / "back").symlink_to(tmp_path / "data" / "x")
    before = fingerprint(tmp_path / "data" / "x")
    assert before["files"] == 2
    (real / "a.png").write_bytes(b"other")
    assert digest_of(tmp_path / "data" / "x") != before["digest"]


def test_its_own_word_counts() -> None:
    class Own:
        said: Any = "v1"

        def fingerprint(self) -> Any:
            return self.said

    own, other = Own(), Own()
    other.said = "v2"
    assert digest_of(own) != digest_of(other)
    other.said = 3
    with pytest.raises(ConfigError, match="must return a text, got 3"):
        fingerprint(other)


def test_what_cannot_be_told_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        generator = None
        folder = ""

    holder = Holder()
    holder.generator, holder.folder = torch.Generator(), "/"
    monkeypatch.setattr("labtrain.record.fingerprints.MOST_FILES", 1)
    many = Images(images(tmp_path / "data" / "x"))
    assert fingerprint(holder)["opaque"] == ["folder /", "torch._C.Generator"]
    assert fingerprint(many)["opaque"] == [f"folder {tmp_path}/data/x"]


def test_files_are_hashed_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more where they changed, or where they are so new that a change might not show."""
    dataset = Images(images(tmp_path / "data" / "x"))
    new = digest_of(dataset)
    with sqlite3.connect(own_cache) as database:
        assert database.execute("select count(*) from files").fetchone() == (0,)
    monkeypatch.setattr("labtrain.record.fingerprints.SETTLED_NS", 0)
    assert digest_of(dataset) == new
    with sqlite3.connect(own_cache) as database:
        assert database.execute("select count(*) from files").fetchone() == (2,)
        database.execute("update files set sha256 = 'known'")
    assert digest_of(dataset) != new
    os.utime(Path(dataset.root, "a.png"), (2e9, 2e9))
    os.utime(Path(dataset.root, "b.png"), (2e9, 2e9))
    assert digest_of(dataset) == new
    own_cache.unlink()
    own_cache.mkdir()  # no database can be made there
    assert digest_of(dataset) == new


def test_an_edit_in_place_is_seen_whatever_its_time_says(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rsync -t`, `cp -p` and `touch -r` leave size, inode and time of the content as they were."""
    monkeypatch.setattr("labtrain.record.fingerprints.SETTLED_NS", 0)
    dataset = Images(images(tmp_path / "data" / "x"))
    path = Path(dataset.root, "a.png")
    before, status = digest_of(dataset), path.stat()
    with path.open("r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (status.st_mtime_ns, status.st_size)
    assert digest_of(dataset) != before


def test_a_memory_map_is_its_file_which_is_hashed_once(tmp_path: Path, own_cache: Path) -> None:
    """Whatever it is called; another shape, offset or byte is another. A part of one is told by its content."""
    values = np.arange(60, dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(values.tobytes())
    maps = [np.memmap(tmp_path / name, np.uint8, "r", shape=(10, 6)) for name in ("a", "b")]
    assert fingerprint(maps[0])["files"] == 1
    assert digest_of(maps[0]) == digest_of(maps[1])
    others = [
        np.memmap(tmp_path / "a", np.uint8, "r", shape=(6, 10)),
        np.memmap(tmp_path / "a", np.uint8, "r", shape=(9, 6), offset=6),
        np.memmap(tmp_path / "a", np.int8, "r", shape=(10, 6)),
        maps[0][:5],
        np.memmap(tmp_path / "a", np.uint8, "c", shape=(10, 6)),
    ]
    digests = [digest_of(each) for each in [maps[0], *others]]
    assert len(set(digests)) == len(digests)
    assert digests[4] == digest_of(values.reshape(10, 6)[:5])
    assert digests[5] == digest_of(values.reshape(10, 6))
    (tmp_path / "b").write_bytes(bytes(60))
    assert digest_of(np.memmap(tmp_path / "b", np.uint8, "r", shape=(10, 6))) != digests[0]
