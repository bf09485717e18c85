"""`labtrain batch-size`: Lightning's search, in a real experiment whose model runs out of memory above a size."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, Experiment

# A shard of more than 12 samples is too much: with four of them, a batch of more than 48.
LIMIT = """        if self.training and len(images) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        scores = self(images)"""


def batch_size(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [LABTRAIN, "batch-size", "trainer.accelerator=cpu", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def limited(own_experiment: Experiment) -> Path:
    path = own_experiment.root / "model.py"
    text = path.read_text()
    assert text.count("        scores = self(images)") == 1
    path.write_text(text.replace("        scores = self(images)", LIMIT))
    return own_experiment.root


@pytest.mark.parametrize(("mode", "size"), [("power", "32"), ("binsearch", "45")])
def test_the_largest_that_fits_is_printed_and_nothing_is_left(mode: str, size: str, limited: Path) -> None:
    """binsearch finds 48, and takes 5 % off."""
    before = sorted(path for path in limited.rglob("*") if "__pycache__" not in path.parts)
    done = batch_size(limited, "--mode", mode, "data.batch_size=1000", "trainer.devices=2", "model.width=2")
    assert (done.returncode, done.stdout) == (0, f"{size}\n"), done.stderr
    assert "a CPU does not report full memory" in done.stderr
    assert "Batch size 64 failed" in done.stderr
    each = -(-int(size) // 4)
    assert f"data.batch_size={size}: determinism.shards=4, shards of {each} samples" in done.stderr
    assert sorted(path for path in limited.rglob("*") if "__pycache__" not in path.parts) == before


def test_where_not_even_the_smallest_fits_that_is_said(limited: Path) -> None:
    path = limited / "model.py"
    path.write_text(path.read_text().replace("len(images) > 12", "len(images) > 0"))
    done = batch_size(limited, "model.width=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "out of memory at data.batch_size=4, the smallest size for determinism.shards=4" in done.stderr


def test_a_data_module_without_a_batch_size_is_refused(own_experiment: Experiment) -> None:
    path = own_experiment.root / "data.py"
    path.write_text(path.read_text().replace("self.batch_size", "self.samples"))
    done = batch_size(own_experiment.root)
    assert (done.returncode, done.stdout) == (2, "")
    assert "DigitsData has no attribute batch_size" in done.stderr
    assert "hint: set self.batch_size = batch_size" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("data.batch=4",), "unknown key data.batch"),
        (("trainer.strategy=fsdp",), "batch-size does not support trainer.strategy=fsdp: it searches on one device"),
        (("speed.compile=sometimes",), "speed.compile=sometimes: must be true, false or one of"),
    ],
)
def test_what_cannot_be_searched_is_said_at_once(arguments: tuple[str, ...], says: str, experiment: Experiment) -> None:
    done = batch_size(experiment.root, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {says}" in done.stderr
    assert "hint: " in done.stderr


def test_outside_of_an_experiment(tmp_path: Path) -> None:
    done = batch_size(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not in an experiment: found no train.py in it or above it" in done.stderr
