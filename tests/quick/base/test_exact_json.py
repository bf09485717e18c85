"""JSON that gives back what went in, and what stands on it: a job, a run's name, a receipt."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from labtrain.base import exact_json
from labtrain.base.errors import ConfigError
from labtrain.record import config as configuration
from labtrain.record import receipt
from labtrain.record.identity import Job
from labtrain.record.resume import make_job
from tests.quick.record.test_identity import CONFIG, changed, run_id
from tests.support.exact import configure, outcome

WEIGHTS = {3: 10.0, 7: 2.0}


@pytest.mark.parametrize(
    "value",
    [
        {3: 1, "3": 2, True: {"a": [1.5, None, "x"]}},
        {"a": {2: {1.5: "b"}}, "(items)": 1},
        {"(float)": "nan"},
        [math.inf, -math.inf, {"x": -0.0}],
    ],
)
def test_what_goes_in_comes_out(value: Any) -> None:
    """And every JSON parser reads what is between."""
    text = exact_json.dumps(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert repr(exact_json.loads(text)) == repr(value) or exact_json.loads(text) == value


def test_a_job_keeps_integer_keys_and_nan(tmp_path: Path) -> None:
    """Hydra's instantiate gives a class {3: 10.0}; so does the process that trains."""
    config = changed("model.width", {"weights": WEIGHTS, "fill": math.nan})
    job = Job.from_json(make_job(config, root=tmp_path, command=[]).to_json())
    assert job.config["model"]["width"]["weights"] == WEIGHTS
    assert math.isnan(job.config["model"]["width"]["fill"])


def test_integer_keys_and_texts_are_two_runs() -> None:
    """A class that looks up 3 finds it under one of them alone."""
    assert run_id(changed("model.width", WEIGHTS)) != run_id(
        changed("model.width", {str(key): value for key, value in WEIGHTS.items()})
    )
    assert run_id(CONFIG) == run_id(json.loads(json.dumps(CONFIG)))


def test_the_order_of_keys_reaches_the_code_and_counts(tmp_path: Path) -> None:
    """Layers in a mapping: written the other way round they are another model. labtrain's own groups have no order."""
    layers = {"second": 0.1, 3: 1.0, "first": {7: 1, 5: 2}}
    turned = {key: layers[key] for key in reversed(layers)}
    config = configure()
    config["model"]["width"] = layers
    config["paths"] = {"runs": str(tmp_path / "runs")}
    job = Job.from_json(make_job(config, root=tmp_path, command=[]).to_json())
    assert list(job.config["model"]["width"]) == ["second", 3, "first"]
    assert list(job.config["model"]["width"]["first"]) == [7, 5]
    assert run_id(changed("model.width", layers)) != run_id(changed("model.width", turned))
    trainer = CONFIG["trainer"]
    assert run_id({**CONFIG, "trainer": {key: trainer[key] for key in reversed(trainer)}}) == run_id(CONFIG)


def test_what_json_cannot_carry_is_refused(tmp_path: Path) -> None:
    config = configure()
    config["model"]["file"] = [tmp_path]
    with pytest.raises(
        ConfigError, match=r"model\.file\.0: must be a text, number, bool, list or mapping, got PosixPath"
    ):
        configuration.check(config)


def test_a_loss_that_becomes_nan_is_said_once_and_the_receipt_is_json(runner: Any) -> None:
    """The receipt is valid JSON, and read as it was written; the run's notes name the step."""
    config = configure("mlp", data={"size": 40, "batch_size": 8})
    config["model"]["_target_"] = "tests.support.names_models.TurnsNaN"
    run_dir = runner.run(config)
    assert runner.said().count("the loss of step 4 is nan") == 1
    assert runner.said().count("the loss of step") == 1
    json.loads((run_dir / receipt.FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    found = receipt.read(run_dir)
    assert found is not None
    assert math.isnan(found["results"]["metrics"]["train/loss"])
    assert "the loss of step 4 is nan" in found["determinism"]["notes"]
    receipt.hold_against_schema(found, run_dir)
    for path in run_dir.glob("checkpoints/*/manifest.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_receipt_keeps_integer_keys(runner: Any) -> None:
    """What verify trains again is the configuration that was trained."""
    config = configure("mlp", trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.names_models.Weighted", "class_weights": WEIGHTS}
    run_dir = runner.run(config)
    found = receipt.read(run_dir)
    assert found is not None
    assert found["config"]["model"]["class_weights"] == WEIGHTS
    assert outcome(run_dir)["run_id"] == found["run_id"]
