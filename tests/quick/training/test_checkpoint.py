"""The folder format. What a training does with it is in test_training.py."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.checkpoints.format import load_folder, write_files
from labtrain.checkpoints.staging import Staging
from labtrain.cli import main
from labtrain.record.digests import digest, digest_file
from labtrain.stores.layout import list_checkpoints, newest_whole, stores_of
from labtrain.stores.store import SCHEMA, Checkpoint, Store, sealed
from labtrain.training.callbacks.checkpoint import FolderIO
from tests.support.saver import saver_of


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
    with pytest.raises(DamagedError, match="is not a labtrain/checkpoint/1 manifest"):
        fetch(path)


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for step in (3, 20, 1):
        write(tmp_path, step)
    assert [manifest["step"] for _, manifest in list_checkpoints(tmp_path)] == [1, 3, 20]
    Store(tmp_path).discard("step-0000000003")
    assert [manifest["step"] for _, manifest in list_checkpoints(tmp_path)] == [1, 20]
    assert list_checkpoints(tmp_path / "nothing") == []


def manifest_of(path: Path) -> dict:
    return dict(json.loads((path / "manifest.json").read_text()))


def test_a_bit_of_a_manifest_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever value it is in: a manifest has its own digest; and one that was moved says another step than its name."""
    older, path = write(tmp_path, 3), write(tmp_path, 55)
    text = (path / "manifest.json").read_text()
    for before, after in (
        ('"step": 55', '"step": 45'),
        ('"epoch": 1', '"epoch": 0'),
        ('"run_id": "abc"', '"run_id": "abb"'),
    ):
        assert before in text
        (path / "manifest.json").write_text(text.replace(before, after))
        assert newest(tmp_path) == older
        assert "step-0000000055/manifest.json was changed after it was written" in capsys.readouterr().err
    (path / "manifest.json").write_text(json.dumps(sealed({**manifest_of(path), "step": 45, "run_id": "abc"})))
    assert newest(tmp_path) == older
    assert "step-0000000055/manifest.json belongs to step 45" in capsys.readouterr().err


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    """By a resume, before anything is written; both runs are named. `store ls` and `store check` show it."""
    write(tmp_path, 3)
    other = write(tmp_path, 5)
    (other / "manifest.json").write_text(json.dumps(sealed({**manifest_of(other), "run_id": "def"})))
    with pytest.raises(LabtrainError, match=r"step-0000000005 is a checkpoint of run def, .* of run abc") as error:
        newest_whole([Store(tmp_path)], into=tmp_path, run_id="abc")
    assert error.value.hint.startswith("mv ")
    saver = saver_of(tmp_path, str(tmp_path))
    with pytest.raises(LabtrainError, match="is a checkpoint of run def"):
        saver.open()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000003", "step-0000000005"]
    write(tmp_path, 1)
    listed = CliRunner().invoke(main, ["store", "ls", str(tmp_path)])
    assert "MB  belongs to run def, not to run abc" in listed.stdout.splitlines()[2]
    checked = CliRunner().invoke(main, ["store", "check", str(tmp_path)])
    assert checked.exit_code == 1
    assert checked.stdout.splitlines()[2].endswith("step-0000000005  belongs to run def, not to run abc")
    assert checked.stdout.count("  ok") == 2


def test_a_checkpoint_of_another_training_of_the_run_is_refused(tmp_path: Path) -> None:
    """Each manifest has the digest of the one before: what was put in its place, whole and of the run, is found."""
    for name in ("mine", "theirs"):
        saver = saver_of(tmp_path / name)
        saver.open()
        for step in (1, 2):
            saver.save(state(float(step), extra=name), {"run_id": "abc", "step": step, "epoch": 0})
            saver.wait()
        saver.close(seconds=1, wanted=True)
    mine, theirs = (tmp_path / name / "checkpoints" for name in ("mine", "theirs"))
    first, second = manifest_of(mine / "step-0000000001"), manifest_of(mine / "step-0000000002")
    assert first["before"] is None
    assert second["before"] == {"run_id": "abc", "name": "step-0000000001", "digest": first["digest"]}
    shutil.rmtree(mine / "step-0000000001")
    saver_of(tmp_path / "mine").open()  # the one before may be gone
    shutil.copytree(theirs / "step-0000000001", mine / "step-0000000001")
    with pytest.raises(
        LabtrainError, match="step-0000000002 was saved after a different step-0000000001: its manifest"
    ):
        saver_of(tmp_path / "mine").open()
    checked = CliRunner().invoke(main, ["store", "check", str(mine)])
    assert "was saved after a different step-0000000001" in checked.stdout
    assert checked.exit_code == 1


def test_a_link_is_neither_read_nor_written_through(tmp_path: Path) -> None:
    """A checkpoint that is one, and a run's folder of checkpoints; a folder that the person has typed may be one."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    path = write(run_dir / "checkpoints", 3)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = {file: file.read_bytes() for file in elsewhere.iterdir()}
    saver = saver_of(run_dir)
    for act in (lambda: newest(run_dir / "checkpoints"), saver.open):
        with pytest.raises(LabtrainError, match=r"checkpoints/step-0000000003 is a symbolic link") as error:
            act()
    assert {file: file.read_bytes() for file in elsewhere.iterdir()} == before
    assert not (run_dir / "checkpoints" / ".writer.json").exists()
    assert (
        "is a symbolic link, skipped"
        in CliRunner().invoke(main, ["store", "check", str(run_dir / "checkpoints")]).stdout
    )
    subprocess.run(error.value.hint.partition("; ")[0], shell=True, check=True)  # what it says to type, helps
    assert newest(run_dir / "checkpoints") == path

    (run_dir / "checkpoints").rename(tmp_path / "moved")
    (run_dir / "checkpoints").symlink_to(tmp_path / "moved")
    for act in (lambda: stores_of(run_dir, str(run_dir / "checkpoints")), saver_of(run_dir).open):
        with pytest.raises(LabtrainError, match="checkpoints is a symbolic link"):
            act()
    assert newest(run_dir / "checkpoints") == run_dir / "checkpoints" / "step-0000000003"  # typed
    saver = saver_of(
        run_dir, str(run_dir / "checkpoints" / "abc")
    )  # checkpoint.url=LINK, below which the run has a folder
    saver.open()
    saver.save(state(), {"run_id": "abc", "step": 1, "epoch": 0})
    saver.wait()
    assert (tmp_path / "moved" / "abc" / "step-0000000001" / "manifest.json").exists()


def test_a_file_of_a_checkpoint_that_is_a_link_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "store", 3)
    (path / "state.pt").rename(tmp_path / "state.pt")
    (path / "state.pt").symlink_to(tmp_path / "state.pt")
    with pytest.raises(DamagedError, match=r"state\.pt: a link, must be a file"):
        fetch(path)
