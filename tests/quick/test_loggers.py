"""The curves of a run that was killed and went on are those of one that was not: each step once, the same numbers."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from labtrain.loggers import wandb_records
from tests.support.exact import Runner, configure, tell


def curves_of_tensorboard(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves_of_csv(run_dir: Path) -> Any:
    return (run_dir / "metrics.csv").read_text()


def curves_of_wandb(run_dir: Path) -> Any:
    """All rows of history in W&B's own files, of each start in turn: what `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


CURVES = {"tensorboard": curves_of_tensorboard, "csv": curves_of_csv, "wandb": curves_of_wandb}


@pytest.mark.parametrize("story", ["killed twice", "moved"])
@pytest.mark.parametrize("name", list(CURVES))
def test_each_step_once(name: str, story: str, tmp_path: Path) -> None:
    """With a validation in mid-epoch and at its end, whose rows are logged after the place that is saved."""
    options = {"mode": "offline", "project": "test"} if name == "wandb" else {}
    config = configure("mlp", "validated in between", logger={name: options}, trainer={"log_every_n_steps": 1})
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        runner = Runner(folder)
        if folder.name == "one":
            runner.run(config)
        else:
            tell(runner, config, world=2 if story == "moved" else 1, story=story, seed=11)
        (run_dir,) = folder.glob("runs/*/*")
        found.append(CURVES[name](run_dir))
    assert found[0] == found[1]
    assert len(found[0]) > 10


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
