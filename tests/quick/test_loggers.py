"""The curves of a run that was killed and went on are those of one that was not: each step once, the same numbers."""

import signal
from pathlib import Path

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
