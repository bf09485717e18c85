"""What loggers have of a run, and a check that a run that was killed has what one has that was not."""

import json
from pathlib import Path
from typing import Any

from labtrain.training.loggers.wandb import wandb_records
from tests.support.exact import Runner, configure, tell

OPTIONS: dict[str, dict[str, str]] = {"tensorboard": {}, "csv": {}, "wandb": {"mode": "offline", "project": "test"}}


def curves_of_tensorboard(run_dir: Path) -> Any:
    """Return steps and values by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves_of_csv(run_dir: Path) -> Any:
    """Return the file."""
    return (run_dir / "metrics.csv").read_text()


def curves_of_wandb(run_dir: Path) -> Any:
    """Return all rows of history in W&B's own files, of each start in turn: what `wandb sync` would send."""
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


def check_each_step_once(
    names: tuple[str, ...], folder: Path, stories: tuple[str, ...] = ("killed twice", "moved")
) -> None:
    """With a validation in mid-epoch and at its end, whose rows are logged after the place that is saved."""
    loggers = {name: OPTIONS[name] for name in names}
    config = configure("mlp", "validated in between", logger=loggers, trainer={"log_every_n_steps": 1})
    found = {}
    for story in ("whole", *stories):
        runner = Runner(folder / story.replace(" ", "-"))
        runner.folder.mkdir()
        tell(runner, config, world=2 if story == "moved" else 1, story=story, seed=11)
        (run_dir,) = runner.folder.glob("runs/*/*")
        found[story] = {name: CURVES[name](run_dir) for name in names}
    for story in stories:
        assert found[story] == found["whole"], story
    assert all(len(curves) > 10 for curves in found["whole"].values())
