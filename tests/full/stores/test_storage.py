"""More kills in saves than each change can wait for."""

import shutil
from pathlib import Path

import pytest

from tests.real.stores.test_storage import receipt_of, variables
from tests.support.exact import Runner, configure, kill_in_saves, outcome
from tests.support.servers import S3


def test_a_hundred_kills_in_saves(runner: Runner, other: Runner) -> None:
    kill_in_saves(runner, other, 100)


def test_resume_names_a_url(runner: Runner, s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """resume=s3://... begins from the run whose checkpoints lie there; with another configuration it is a new run."""
    for name, value in s3.variables().items():
        monkeypatch.setenv(name, value)
    url = f"s3://lab/{tmp_path.name}"
    run_dir = runner.run(configure("mlp", "even", checkpoint={"url": url}), environment=variables())
    assert run_dir is not None
    shutil.rmtree(run_dir)
    longer = configure(
        "mlp", "even", trainer={"max_epochs": 5}, checkpoint={"url": url}, resume=f"{url}/{run_dir.name}"
    )
    new_dir = runner.run(longer, environment=variables())
    assert new_dir != run_dir
    found = outcome(new_dir)
    (segment,) = receipt_of(new_dir)["segments"]
    assert (segment["origin"]["run_id"], segment["origin"]["step"]) == (run_dir.name, 15)
    whole = outcome(Runner(tmp_path).run(configure("mlp", "even", trainer={"max_epochs": 5}, resume="never")))
    assert {**found, "run_id": 0, "trail": 0} == {**whole, "run_id": 0, "trail": 0}
    runner.run(configure("mlp", "even", resume=f"{url}/nothing"), code=2, environment=variables())
