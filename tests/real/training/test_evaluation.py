"""`validate=RUN`, `test=RUN`, `predict=RUN`: the numbers of the training, to the bit, on any number of devices."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, Experiment, Run

# Draws in evaluations, an attribute and a callback that the training changes; weights that change after the last step.
DRAWING = """
import sys

class Drawing(DigitsNet):
    def __init__(self, **options):
        super().__init__(**options)
        self.scale = 0.0

    def on_train_epoch_start(self):
        self.scale += 0.25

    def _step(self, batch, stage, accuracy):
        if stage != "train":
            images = batch[0] + self.scale * torch.rand(batch[0].shape)
            counting = next(each for each in self.trainer.callbacks if isinstance(each, Counting))
            self.log(f"{stage}/seen", counting.epochs + torch.rand(()), on_epoch=True)
            batch = images, batch[1]
        return super()._step(batch, stage, accuracy)

    def predict_step(self, batch, batch_idx):
        scores = self(batch[0] + self.scale * torch.rand(batch[0].shape))
        return {"scores": scores, "labels": (batch[1], [str(int(each)) for each in batch[1]])}

    def on_predict_batch_end(self, outputs, batch, batch_idx):
        seen = batch_idx, float(outputs["scores"].sum()), float(batch[0].sum()), "".join(outputs["labels"][1])
        sys.stderr.write(f"seen {seen}\\n")


class Counting(pl.Callback):
    epochs = 0

    def on_train_epoch_start(self, *_):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class Ending(pl.Callback):
    def on_train_end(self, trainer, module):
        with torch.no_grad():
            module.net[-1].bias += 0.01
"""
OPTIONS = (
    "model._target_=model.Drawing",
    "+callbacks.counting._target_=model.Counting",
    "trainer.max_epochs=2",
    "data.batch_size=100",
)


@pytest.fixture(scope="module")
def trained(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Run]:
    root = tmp_path_factory.mktemp("evaluated") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (root / "model.py").write_text((root / "model.py").read_text() + DRAWING)
    experiment = Experiment(root)
    return experiment, experiment.train(*QUICK, *OPTIONS, cwd=root)


def stage(found: dict[str, float], name: str) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.startswith(f"{name}/")}


def test_predictions_are_one_file_on_any_devices(trained: tuple[Experiment, Run], tmp_path: Path) -> None:
    """In the order of the test's samples; weights_only reads it; the digest is that of the file.

    on_predict_batch_end sees whole batches on each device.
    """
    experiment, run = trained
    seen = []
    places = [run.folder / "predictions.pt", tmp_path / "two.pt", tmp_path / "four.pt"]
    for devices, place in zip((1, 2, 4), places, strict=True):
        asked = (f"trainer.devices={devices}", *([] if devices == 1 else [f"predictions={place}"]))
        found = experiment.train(f"predict={run.folder}", *asked, *QUICK, cwd=experiment.root)
        seen.append([line for line in found.err.splitlines() if line.startswith("seen ")])
        assert len(seen[-1]) == 3 * devices
        assert Path(experiment.root, found.folder) == place
        assert found.digest == hashlib.sha256(place.read_bytes()).hexdigest()
    assert len({place.read_bytes() for place in places}) == 1
    assert set(seen[0]) == set(seen[1]) == set(seen[2])
    read = torch.load(places[0], weights_only=True)
    assert read["scores"].shape == (270, 10)
    assert read["labels"][1] == [str(int(label)) for label in read["labels"][0]]


def test_a_typed_key_and_changed_code_count(trained: tuple[Experiment, Run]) -> None:
    """One key takes its composed value, and all others stay the run's; a changed file is named."""
    experiment, run = trained
    other = experiment.train(f"test={run.folder.name[:8]}", "seed=3", *QUICK, cwd=experiment.root)
    assert json.loads(other.out) != stage(run.receipt["results"]["metrics"], "test")
    model = experiment.root / "model.py"
    text = model.read_text()
    model.write_text(text.replace("0.25\n", "0.25  # the same\n"))
    try:
        found = experiment.train(f"test={run.folder}", *QUICK, cwd=experiment.root)
    finally:
        model.write_text(text)
    assert f"warning: not as when {run.folder.relative_to(experiment.root)} was trained" in found.err
    assert "so the numbers can differ: model.py\n" in found.err
    assert json.loads(found.out) == stage(run.receipt["results"]["metrics"], "test")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("test=000000000000",), "000000000000: no run of this id in"),
        (("test={run}", "experiment=other"), "experiment=other has no effect with test="),
        (("test={run}", "resume=never"), "resume=never has no effect with test="),
        (("test={run}", "~callbacks"), "~callbacks: with test="),
        (("test={run}", "validate={run}"), ": a command does one of them"),
        (("predictions=a.pt",), "predictions=a.pt, but there is no predict=RUN"),
        (("test={run}", "data.batch_sise=3"), "unknown key data.batch_sise"),
        (("test={run}", "trainer.strategy=fsdp"), "test=RUN with trainer.strategy=fsdp: not implemented"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: tuple[str, ...], says: str, trained: tuple[Experiment, Run]
) -> None:
    experiment, run = trained
    words = tuple(word.format(run=run.folder) for word in words)
    found = experiment.train(*words, *QUICK, cwd=experiment.root, code=2)
    assert found.out == ""
    assert says in found.err
    assert "hint: " in found.err
    assert "Traceback" not in found.err
