"""`labtrain lr-find`: Lightning's range test in a real experiment."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, QUICK, Experiment


def lr_find(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [LABTRAIN, "lr-find", "trainer.accelerator=cpu", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if "__pycache__" not in path.parts}


def test_a_rate_is_printed_with_its_key_and_only_the_plot_is_left(own_experiment: Experiment, tmp_path: Path) -> None:
    """The same rate each time, although the training has one epoch, and devices are more; other weights, another."""
    root, plot = own_experiment.root, tmp_path / "rates.png"
    before = files(root)
    arguments = "--steps", "40", "--min", "1e-5", "trainer.max_epochs=1", "data.batch_size=128"
    done = lr_find(root, *arguments, "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    rate = float(done.stdout)
    assert 1e-4 < rate < 1
    assert f"set model.learning_rate={done.stdout.strip()}" in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert files(root) == before
    assert lr_find(root, *arguments, "trainer.devices=2").stdout == done.stdout
    own_experiment.train(*QUICK, "trainer.max_epochs=1", "data.batch_size=256", cwd=root)
    [run] = root.glob("runs/*/*")
    assert lr_find(root, *arguments, f"init_from={run.name}").stdout != done.stdout


def test_models_that_it_cannot_search_are_refused(own_experiment: Experiment) -> None:
    """Without a rate's attribute, and with manual optimization, whose rates the search cannot set."""
    root = own_experiment.root
    text = (root / "model.py").read_text()
    for old, new, says in (
        ("self.learning_rate", "self.speed", "DigitsNet has neither self.lr nor self.learning_rate"),
        ("super().__init__()", "super().__init__(); self.automatic_optimization = False", "uses manual optimization"),
    ):
        (root / "model.py").write_text(text.replace(old, new))
        done = lr_find(root)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert "hint: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("data.batch=4",), "unknown key data.batch"),
        (("trainer.strategy=fsdp",), "lr-find does not support trainer.strategy=fsdp"),
        (("--min", "2"), "--min 2 --max 1: must be above 0, and min below max"),
        (("--plot", "nowhere/a.png"), "--plot nowhere/a.png: must be a .png file in an existing folder"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(
    arguments: tuple[str, ...], says: str, experiment: Experiment
) -> None:
    done = lr_find(experiment.root, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {says}" in done.stderr
