"""What real runs leave in their receipts."""

import json
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from labtrain.base.credentials import NOT_RECORDED
from labtrain.base.errors import EXIT_STOPPED
from labtrain.base.files import file_sha256
from labtrain.record import receipt
from tests.support.exact import Runner, configure

SCHEMA = json.loads(Path(receipt.__file__).with_name("receipt.schema.json").read_text())


def read(runner: Runner) -> dict[str, Any]:
    """Return the one receipt, once it has been held against the schema and its own digest."""
    (path,) = runner.folder.glob("runs/*/*/receipt.json")
    found = receipt.read(path.parent)
    assert found is not None
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def test_the_schema_is_one_and_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert tuple(SCHEMA["properties"]) == receipt.KEYS
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate({"schema": receipt.SCHEMA})


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_a_complete_one(runner: Runner, model: str) -> None:
    run_dir = runner.run(configure(model, "even"))
    assert run_dir is not None
    found = read(runner)
    assert found["trail"]["sha256"] == file_sha256(run_dir / "trail.jsonl")
    assert found["environment"]["files"] > 10_000
    assert found["data"]["train"]["samples"] == 40
    assert found["data"]["val"]["samples"] == 7
    assert found["data"]["train"]["opaque"] == []
    (segment,) = found["segments"]
    assert (segment["status"], segment["why"], segment["from_step"], segment["to_step"]) == ("complete", None, 0, 15)


def test_one_byte_of_the_data_is_another_digest(runner: Runner) -> None:
    """And it is said where the run goes on with it."""
    config = configure("mlp", "even", resume="never")
    runner.run(config, code=EXIT_STOPPED, signal_at=f"7 {int(signal.SIGTERM)} 0")
    before = read(runner)["data"]
    (path,) = runner.folder.glob("runs/*/*")
    runner.run(configure("mlp", "even", resume=str(path), data={"flip": 3}))
    found = read(runner)
    assert found["data"]["train"]["digest"] != before["train"]["digest"]
    assert found["data"]["val"] == before["val"]
    assert {"config.data.flip", "data.train.digest"} <= {each["key"] for each in found["segments"][1]["changed"]}


def test_each_end_is_told(runner: Runner) -> None:
    """Stopped, killed, broken, complete: the next start closes what was killed."""
    config = configure("mlp", "even", checkpoint={"every_n_steps": 1})
    config["callbacks"]["broken"] = {"_target_": "tests.support.exact_worker.Broken"}
    runner.run(config, code=EXIT_STOPPED, signal_at=f"3 {int(signal.SIGTERM)} 0")
    assert read(runner)["status"] == "interrupted"
    runner.run(config, code=None, signal_at=f"7 {int(signal.SIGKILL)} 0")
    assert read(runner)["segments"][-1]["status"] == "running"
    runner.run(config, code=1, environment={"BREAK_AT": "9"})
    assert read(runner)["status"] == "failed"
    runner.run(config)
    found = read(runner)
    told = [(each["status"], each["why"], each["to_step"]) for each in found["segments"]]
    assert told == [("interrupted", "SIGTERM", 3), ("killed", None, 7), ("failed", "ZeroDivisionError", 9),
                    ("complete", None, 15)]  # fmt: skip
    assert all(each["ended"] for each in found["segments"])


def test_no_credential_is_in_what_a_run_leaves(runner: Runner) -> None:
    """In variables, the configuration and the command."""
    value = "s3cr3t-abcdefgh-0123"
    config = configure("mlp", "even")
    config["callbacks"]["hub"] = {"_target_": "tests.support.exact_worker.Hub", "hub_token": value}
    variables = {"WANDB_API_KEY": value, "AWS_SECRET_ACCESS_KEY": value, "DB_PASSWORD": value}
    run_dir = runner.run(config, environment=variables)
    assert run_dir is not None
    for path in run_dir.rglob("*"):
        assert not path.is_file() or value.encode() not in path.read_bytes(), path
    assert read(runner)["config"]["callbacks"]["hub"]["hub_token"] == NOT_RECORDED
