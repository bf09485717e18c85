"""W&B's curves of a run that was killed; its service takes seconds to start."""

from pathlib import Path

from tests.support.loggers import check_each_step_once


def test_each_step_once(tmp_path: Path) -> None:
    check_each_step_once(("wandb",), tmp_path)
