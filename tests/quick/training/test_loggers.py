"""The curves of a run that was killed and went on are those of one that was not: each step once, the same numbers."""

import signal
import warnings
from pathlib import Path

import pytest

from labtrain.training.loggers.files import ContinuedCSVLogger
from tests.support.exact import Runner, configure
from tests.support.loggers import check_each_step_once


def test_each_step_once(tmp_path: Path) -> None:
    check_each_step_once(("csv", "tensorboard"), tmp_path)


def test_a_crash_between_the_rows_loses_none(tmp_path: Path) -> None:
    """The kept rows of metrics.csv are put aside before the file is made anew: a start that dies there is made good."""
    config = configure("mlp", "even", logger={"csv": {}}, trainer={"log_every_n_steps": 1})
    config["checkpoint"]["every_n_steps"] = 1
    runner = Runner(tmp_path)
    runner.run(config, code=75, signal_at=f"7 {signal.SIGTERM} 0")
    (run_dir,) = tmp_path.glob("runs/*/*")
    whole = (run_dir / "metrics.csv").read_text()
    (run_dir / "metrics.csv").rename(run_dir / ".metrics.csv")
    runner.run(config)
    assert (run_dir / "metrics.csv").read_text().splitlines()[: len(whole.splitlines())] == whole.splitlines()
    assert not (run_dir / ".metrics.csv").exists()


def test_a_first_start_says_nothing_of_what_lies_in_its_own_folder(tmp_path: Path) -> None:
    """Lightning would warn that it deletes the log files there; what is no metrics.csv stays."""
    (tmp_path / "receipt.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger = ContinuedCSVLogger(str(tmp_path), position=0)
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "receipt.json"]


REFUSED = {
    "csv._target_": "labtrain sets this option, so that the logger writes into the run's folder",
    "csv.save_dir": "labtrain sets this option, so that the logger writes into the run's folder",
    "tensorboard.name": "labtrain sets this option, so that the logger writes into the run's folder",
    "tensorboard.flush": "no such option",
    "wandb.save_dir": "labtrain sets this option, so that the logger writes into the run's folder",
}


@pytest.mark.parametrize("key", REFUSED)
def test_an_option_that_a_logger_does_not_have_is_refused(key: str, tmp_path: Path) -> None:
    """Lightning's _target_ and save_dir, and a misspelt name, are named before the run's folder is made."""
    name, _, option = key.partition(".")
    runner = Runner(tmp_path)
    runner.run(configure("mlp", "even", logger={name: {option: "x"}}), code=2)
    assert f"error: logger.{key}=x: {REFUSED[key]}" in runner.said()
    assert f"hint: remove {option}; " in runner.said()
    assert list(tmp_path.glob("runs/*/*")) == []


def test_an_option_that_it_has_is_used(tmp_path: Path) -> None:
    config = configure("mlp", "even", logger={"csv": {"prefix": "mine"}}, trainer={"max_epochs": 1})
    run_dir = Runner(tmp_path).run(config)
    assert run_dir is not None
    assert "mine-val/loss" in (run_dir / "metrics.csv").read_text().partition("\n")[0]
