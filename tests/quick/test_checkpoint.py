"""The folder format. What a training does with it is in test_training.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.checkpoints.format import load_folder, write_files
from labtrain.checkpoints.staging import Staging
from labtrain.record.digests import digest, digest_file
from labtrain.stores.layout import list_checkpoints, newest_whole
from labtrain.stores.store import SCHEMA, Checkpoint, Store
from labtrain.training.callbacks.checkpoint import FolderIO


def state(value: float = 1.0, **more: object) -> dict:
    shared = torch.full((2, 3), value)
    return {"state_dict": {"a": shared, "tied": shared, "strided": shared.T}, "optimizer_states": [{"lr": 0.1}], **more}


def write(folder: Path, step: int, **more: object) -> Path:
    path, store = folder / f"step-{step:010d}", Store(folder)
    written = write_files(path, Staging().copy(state(float(step), **more)))
    store.commit(path.name, {"schema": SCHEMA, "run_id": "abc", "step": step, "epoch": 1, **written})
    return path


def newest(folder: Path) -> Path | None:
    found = newest_whole([Store(folder)], into=folder)
    return found[1] if found else None


def fetch(path: Path) -> None:
    store = Store(path.parent)
    store.fetch(Checkpoint(store, path.name, {}), path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Tied and strided weights too; loading needs no code from the file."""
    path = write(tmp_path, 3)
    read = load_folder(path)
    assert digest(read["state_dict"]) == digest(state(3.0)["state_dict"]) == digest_file(path / "weights.safetensors")
    assert read["optimizer_states"] == [{"lr": 0.1}]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["weights_digest"] == digest(state(3.0)["state_dict"])
    assert set(manifest["files"]) == {"weights.safetensors", "state.pt"}
    assert digest(FolderIO().load_checkpoint(path)["state_dict"]) == manifest["weights_digest"]


def test_lightnings_own_files_still_load(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "x.ckpt")
    assert FolderIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["a"] == 1


class Strange:
    """A class of a person's own, in a hyperparameter say."""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Strange(), r"state\.hyper_parameters\.x is a .*Strange"),
        (np.float64(1.5), r"state\.hyper_parameters\.x is a numpy\.float64"),
    ],
)
def test_a_state_that_needs_code_to_load_is_refused_at_save_time(value: object, says: str, tmp_path: Path) -> None:
    """Not years later, by whoever wants to go on."""
    with pytest.raises(LabtrainError, match=says):
        write(tmp_path, 1, hyper_parameters={"x": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_each_damage_is_found_and_the_older_one_taken(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    raw = bytearray((newer / name).read_bytes())
    if damage == "remove":
        (newer / name).unlink()
    else:
        raw[len(raw) // 2] ^= 1
        (newer / name).write_bytes(raw if damage == "flip" else raw[:-1])
    with pytest.raises(DamagedError, match=f"{newer.name}/{name}: .*, manifest says"):
        fetch(newer)
    assert newest(tmp_path) == older
    assert f"{newer.name}/{name}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "labtrain/checkpoint/9"}'])
def test_without_its_manifest_a_checkpoint_does_not_exist(text: str, tmp_path: Path) -> None:
    """It is written last: before that, a crash left an unfinished folder."""
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert list_checkpoints(tmp_path) == []
    assert newest(tmp_path) is None
    with pytest.raises(DamagedError, match="is no manifest of labtrain/checkpoint/1"):
        fetch(path)


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for step in (3, 20, 1):
        write(tmp_path, step)
    assert [manifest["step"] for _, manifest in list_checkpoints(tmp_path)] == [1, 3, 20]
    Store(tmp_path).discard("step-0000000003")
    assert [manifest["step"] for _, manifest in list_checkpoints(tmp_path)] == [1, 20]
    assert list_checkpoints(tmp_path / "nothing") == []
