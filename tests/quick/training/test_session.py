"""The error that people see is that of the training, whatever fails after it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from labtrain.base.errors import ConfigError
from labtrain.record.identity import Job
from labtrain.training import fit


def broken(error: BaseException) -> Any:
    def close(*_: object, **__: object) -> None:
        raise error

    return close


def test_a_receipt_that_cannot_be_closed_does_not_hide_the_trainings_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    session: Any = object.__new__(fit._Session)
    session.ranks, session.run_dir, session.keep_fetched = None, tmp_path / "run", False
    session.config = {"checkpoint": {"deliver_seconds": 1}, "trainer": {"overfit_batches": 0}}
    session.wishes, session.ended = SimpleNamespace(begun=False, signum=0), None
    session.listening = SimpleNamespace(close=lambda: None)
    session.saver = SimpleNamespace(abandon=lambda: None)
    session.checkpoints = SimpleNamespace(
        heart=SimpleNamespace(close=lambda: None),
        kept=SimpleNamespace(write=lambda **_: None),
        beacon=SimpleNamespace(why="", fail=lambda *_: None),
    )
    session.recorder = SimpleNamespace(close=broken(OSError(28, "No space left on device")), receipt=None)
    session.start = SimpleNamespace(found=None)
    session.experiment = SimpleNamespace(model=None, callbacks={})
    launcher = SimpleNamespace(kill=killed.append)
    session.trainer = SimpleNamespace(is_global_zero=True, global_step=0, strategy=SimpleNamespace(launcher=launcher))
    error = session.fail(FileNotFoundError(2, "No such file or directory", "train.csv"))
    assert isinstance(error, ConfigError)
    assert "train.csv" in str(error)
    assert killed == [9]
    assert "the receipt could not be closed: OSError: " in capsys.readouterr().err


def test_a_data_module_that_cannot_be_made_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_Session", broken(FileNotFoundError(2, "No such file or directory", "train.csv")))
    job = cast(Job, SimpleNamespace(config={"trainer": {"overfit_batches": 0}}))
    with pytest.raises(ConfigError, match=r"No such file or directory: train\.csv\n\nhint: python train\.py --cfg job"):
        fit._make_session(job, "cpu", 1, None)
