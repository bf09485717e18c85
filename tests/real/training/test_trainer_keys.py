"""Keys of `trainer` and callbacks of Lightning's: they do what Lightning says, or are refused in words."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED, ConfigError
from labtrain.record.config import check
from labtrain.record.trail import read_history_lines
from tests.support.exact import Runner, configure, outcome


def validated_at(run_dir: Path | None) -> list[int]:
    """Return the steps after which the monitored validation was measured."""
    assert run_dir is not None
    return sorted({line["step"] for line in read_history_lines(run_dir) if "val/acc" in line["metrics"]})


def across_epochs(**more: Any) -> Any:
    """Validate every 7 of 5 batches an epoch: only across epochs."""
    return configure("mlp", "uneven", trainer={"val_check_interval": 7, "check_val_every_n_epoch": None,
                     "max_epochs": 5}, **more)  # fmt: skip


def test_validation_every_n_steps_goes_across_epochs(runner: Runner) -> None:
    """check_val_every_n_epoch=null reaches Lightning: 7 steps are more than an epoch, and 7, 14 and 21 are validated.

    keep_best does not ask for the metric before it was measured.
    """
    config = across_epochs(checkpoint={"keep_best": 1, "monitor": "val/acc"})
    assert validated_at(runner.run(config)) == [7, 14, 21]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_without_length_has_a_progress_bar(runner: Runner, terminal: bool) -> None:
    """The bar says which batch it is, and of how many only where that is known."""
    config = configure("mlp", "even", trainer={"enable_progress_bar": True}, determinism={"shards": None},
                       data={"loader": "counted"})  # fmt: skip
    if terminal:
        config["callbacks"]["terminal"] = {"_target_": "tests.support.small_models.InTerminal"}
    runner.run(config)
    assert "epoch 3/3  batch 5  " in runner.said()
    assert ("epoch 1/3  batch 2  " in runner.said()) == terminal


@pytest.mark.parametrize("loader", ["shuffled", "weighted"])
def test_overfit_batches_takes_the_same_batches_in_each_epoch(loader: str, runner: Runner, other: Runner) -> None:
    """In the dataset's order, or as torch's sampler yields them first; the same bits when moved and killed."""
    config = configure("mlp", "even", trainer={"overfit_batches": 2, "max_epochs": 4})
    if loader == "weighted":
        config["data"] = {"_target_": "tests.support.overfit_models.Weighted", "batch_size": 8}
    whole = outcome(runner.run(config))
    batches = [line["batch"] for line in whole["trail"]]
    assert len(batches) == 8
    assert len(set(batches)) == 2
    assert batches == batches[:2] * 4
    config["checkpoint"]["every_n_steps"] = 1
    other.run(config, code=None, signal_at=f"3 {int(signal.SIGKILL)} 0", world=2)
    other.run(config, code=EXIT_STOPPED, signal_at=f"5 {int(signal.SIGTERM)} 0")
    assert outcome(other.run(config, world=4)) == whole
    assert "turning off" not in runner.said()


def test_overfit_batches_of_a_fraction_are_those_of_lightning(runner: Runner) -> None:
    """The first samples of the dataset, in its order, as Lightning takes them from a shuffled loader."""
    config = configure("mlp", "even", trainer={"overfit_batches": 0.4, "max_epochs": 1})
    config["data"] = {"_target_": "tests.support.overfit_models.Noted", "folder": str(runner.folder), "batch_size": 8}
    runner.run(config)
    seen = set(map(int, (runner.folder / "seen").read_text().split()))
    assert seen == set(range(16))


def test_fast_dev_run_trains_validates_and_stops(runner: Runner, other: Runner) -> None:
    config = configure("mlp", "even", trainer={"fast_dev_run": 2})
    whole = outcome(runner.run(config))
    assert whole["steps"] == 2
    assert "val/acc" in whole["metrics"]
    assert outcome(other.run(config, world=2)) == whole


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_a_profiler_writes_into_the_runs_folder_and_changes_no_bit(name: str, runner: Runner, other: Runner) -> None:
    config = configure("mlp", "even", trainer={"max_epochs": 1})
    plain = outcome(other.run(config))
    config["trainer"]["profiler"] = name
    before = set(Path.cwd().iterdir())
    run_dir = runner.run(config)
    assert run_dir is not None
    assert outcome(run_dir) == plain
    found = [path for path in (run_dir / "profiler").iterdir() if path.name.startswith("fit-profile")]
    assert any("training_step" in path.read_text() or "run_training_batch" in path.read_text() for path in found)
    assert set(Path.cwd().iterdir()) == before
    assert "Profiler Report" not in runner.said()


LIGHTNINGS = {
    "summary": {"_target_": "lightning.pytorch.callbacks.ModelSummary"},
    "rich_summary": {"_target_": "lightning.pytorch.callbacks.RichModelSummary", "max_depth": 2},
    "devices": {"_target_": "lightning.pytorch.callbacks.DeviceStatsMonitor", "cpu_stats": True},
    "early": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 1,
              "min_delta": 10.0},
    "rates": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor", "logging_interval": "step"},
    "throughput": {"_target_": "tests.support.overfit_models.Throughput", "window_size": 3},
    "own": {"_target_": "tests.support.overfit_models.Remembers"},
}  # fmt: skip


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_lightnings_callbacks_change_no_bit_and_resume(bar: str, runner: Runner, other: Runner) -> None:
    """All at once: EarlyStopping ends at the same step, and a callback has its state, when moved and killed."""
    config = configure("mlp", "even", trainer={"max_epochs": 5, "enable_progress_bar": True, "log_every_n_steps": 1})
    config["logger"] = {"csv": {}}
    config["callbacks"] |= {**LIGHTNINGS, "bar": {"_target_": f"lightning.pytorch.callbacks.{bar}"}}
    run_dir = runner.run(config)
    whole = outcome(run_dir)
    assert whole["steps"] == 10
    assert whole["metrics"]["remembered"] == sum(range(1, 11))
    columns = (run_dir / "metrics.csv").read_text().splitlines()[0]
    for name in ("lr-AdamW", "DeviceStatsMonitor.on_train_batch_end/cpu", "samples_per_sec"):
        assert name in columns, name
    assert "Total params" in runner.said()
    config["checkpoint"]["every_n_steps"] = 1
    other.run(config, code=None, signal_at=f"3 {int(signal.SIGKILL)} 0")
    other.run(config, code=EXIT_STOPPED, signal_at=f"7 {int(signal.SIGTERM)} 0", world=2)
    assert outcome(other.run(config)) == whole


def test_a_progress_bar_of_ones_own_takes_the_place_of_ours(runner: Runner) -> None:
    """TQDM's beside enable_progress_bar=true is the only one; beside false, both keys are named."""
    config = configure("mlp", "even", trainer={"enable_progress_bar": True, "max_epochs": 1})
    config["callbacks"]["bar"] = {"_target_": "lightning.pytorch.callbacks.TQDMProgressBar"}
    runner.run(config)
    assert "5/5" in runner.said()
    assert "samples/s" not in runner.said()
    config["trainer"] |= {"enable_progress_bar": False, "max_epochs": 2}
    runner.run(config, code=2)
    assert "callbacks.bar is a progress bar, but trainer.enable_progress_bar is false" in runner.said()
    config["callbacks"]["rich"] = {"_target_": "lightning.pytorch.callbacks.RichProgressBar"}
    config["trainer"]["enable_progress_bar"] = True
    runner.run(config, code=2)
    assert "callbacks.bar and callbacks.rich are progress bars: a training can have only one" in runner.said()


def test_gradient_accumulation_scheduler_is_exact(runner: Runner, other: Runner) -> None:
    """Its schedule by epochs gives the same bits when stopped inside the accumulated epoch, and on two devices."""
    config = configure("mlp", "uneven")
    config["callbacks"]["accumulate"] = {
        "_target_": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
        "scheduling": {0: 1, 1: 2},
    }
    whole = outcome(runner.run(config))
    assert whole["steps"] == 5 + 3 + 3
    other.run(config, code=EXIT_STOPPED, signal_at=f"7 {int(signal.SIGTERM)} 0")
    assert outcome(other.run(config, world=2)) == whole


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end"])
def test_an_error_of_a_callback_says_what_and_where(runner: Runner, hook: str) -> None:
    """Its name, hook, exception and its own lines: no traceback through Lightning, and exit code 1."""
    config = configure("mlp", "even")
    config["callbacks"]["mine"] = {"_target_": "tests.support.small_models.Boom", "hook": hook}
    runner.run(config, code=1)
    lines = runner.said().splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first] == f"error: callbacks.mine (Boom.{hook}): KeyError: 'missing'"
    assert lines[first + 2].endswith('in helper: raise KeyError("missing")  # the line that an error must name')
    assert "Traceback" not in runner.said()
    assert "lightning" not in "".join(lines[first:])


def test_an_error_of_one_of_lightnings_callbacks_too(runner: Runner) -> None:
    """EarlyStopping with a metric that is not logged."""
    config = configure("mlp", "even")
    config["callbacks"]["stop"] = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "nope"}
    runner.run(config, code=1)
    assert "error: callbacks.stop (EarlyStopping.on_train_epoch_end): RuntimeError: Early stopping" in runner.said()
    assert "Traceback" not in runner.said()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"made": True}, "callbacks.mine._target_=tests.support.small_models.Boom: KeyError: 'missing'\n"),
        ({"nothing": 1}, "TypeError: Boom.__init__() got an unexpected keyword argument 'nothing'"),
        ({"_target_": "tests.support.exact_worker.MLP"}, "makes a MLP, expected a Callback"),
        ({"_target_": None}, "callbacks.mine={'_target_': None}: must be a mapping with _target_, or null"),
    ],
)
def test_a_callback_that_cannot_be_made_is_an_error_of_the_configuration(
    runner: Runner, options: dict[str, Any], says: str
) -> None:
    """Exit code 2, no traceback, and no folder."""
    config = configure("mlp", "even")
    config["callbacks"]["mine"] = {"_target_": "tests.support.small_models.Boom"} | options
    if options.get("_target_", "") is None:
        with pytest.raises(ConfigError, match=re.escape(says)):
            check(config)
        return
    runner.run(config, code=2)
    assert says in runner.said()
    assert "Traceback" not in runner.said()
    assert not list(runner.folder.glob("runs/*/*"))
