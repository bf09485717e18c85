"""Trainings whose checkpoints lie elsewhere: on S3, over SFTP, and with a store that goes away. By digest, as always."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import labtrain
from labtrain.base.errors import EXIT_STOPPED, DamagedError, LabtrainError
from labtrain.record.digests import digest
from labtrain.stores.store import Store
from tests.conftest import LABTRAIN, Experiment
from tests.real.stores.test_store import names
from tests.support.exact import Runner, configure, kill_in_saves, outcome
from tests.support.servers import KEY, S3, SECRET, Proxy

BEST = {"keep_last": 1, "keep_best": 1, "monitor": "val/loss", "mode": "min"}


def variables(names: tuple[str, ...] = ("AWS_", "HOME")) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def same(found: dict[str, Any], reference: dict[str, Any], *, trail_from: int = 0) -> None:
    assert {**found, "trail": None} == {**reference, "trail": None}
    assert found["trail"] == reference["trail"][trail_from:]


@pytest.mark.parametrize("url", ["local", "s3", "sftp"], indirect=True)
def test_a_run_goes_on_elsewhere_from_its_store_alone(url: str, runner: Runner, tmp_path: Path) -> None:
    """Killed, and its folder lost; then moved to two processes. The same bits."""
    reference = outcome(runner.run(configure("cnn", "even", paths={"runs": "x"}, resume="never")))
    shutil.rmtree(tmp_path / "runs")
    config = configure("cnn", "even", checkpoint={"url": url})
    runner.run(config, code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0", environment=variables())
    (run_dir,) = (tmp_path / "runs").glob("exact/*")
    store = Store(f"{url}/{run_dir.name}")
    assert [checkpoint.step for checkpoint in store.checkpoints()][-1] == 7
    assert not list((run_dir / "spool").glob("step-*"))
    assert store.writer() is None
    shutil.rmtree(run_dir)
    assert runner.run(config, world=2, environment=variables()) == run_dir
    assert "resumes from step-0000000007" in runner.said()
    same(outcome(run_dir), reference, trail_from=7)
    paths = [entry["path"] for entry in json.loads((run_dir / "receipt.json").read_text())["checkpoints"]]
    assert paths == [f"{url}/{run_dir.name}/step-{step:010d}" for step in (10, 15)]
    weights = labtrain.load_weights(store.url)
    assert digest(weights) == reference["weights_digest"]
    done = subprocess.run(
        [LABTRAIN, "digest", f"{store.url}/step-0000000015"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == reference["weights_digest"]


def receipt_of(run_dir: Path | None) -> dict[str, Any]:
    assert run_dir is not None
    return dict(json.loads((run_dir / "receipt.json").read_text()))


def test_many_kills_in_saves(runner: Runner, other: Runner) -> None:
    kill_in_saves(runner, other, 10)


def test_a_store_that_is_away_at_the_start_is_refused(runner: Runner, tmp_path: Path) -> None:
    """Whether there is a checkpoint to go on from cannot be known; nothing is written."""
    for url in ("sftp://127.0.0.1:9/x", "s3://lab/x"):
        environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": KEY,
                       "AWS_SECRET_ACCESS_KEY": SECRET, "HOME": str(tmp_path)}  # fmt: skip
        runner.run(configure("mlp", "even", checkpoint={"url": url}), code=2, environment=environment)
        assert f"error: {url}" in runner.said()
        assert "hint: " in runner.said()
        assert not list((tmp_path / "runs").glob("exact/[0-9a-f]*"))


def test_a_store_that_goes_away_in_mid_run(runner: Runner, s3: S3, tmp_path: Path) -> None:
    """The training goes on to its end, which is not delivered: exit code 2, kept and named; and once more it is."""
    gone, url = tmp_path / "gone", f"s3://lab/{tmp_path.name}"
    proxy = Proxy(s3.port, gone=gone)
    environment = {**s3.variables(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    reference = outcome(runner.run(configure("mlp", "even")))
    shutil.rmtree(tmp_path / "runs")
    config = configure("mlp", "even", checkpoint={"url": url, "deliver_seconds": 4.0})
    config["callbacks"]["away"] = {"_target_": "tests.support.exact_worker.Away", "gone": str(gone), "step": 6}
    try:
        runner.run(config, code=2, environment=environment)
        said = runner.said()
        assert f"error: not delivered to {url}" in said
        assert "step-0000000015" in said.partition("error: not delivered")[2]
        assert SECRET not in said
        (run_dir,) = (tmp_path / "runs").glob("exact/*")
        assert names(Store(run_dir / "spool"))[-1] == "step-0000000015"
        gone.unlink()
        assert runner.run({**config, "checkpoint": {**config["checkpoint"], "deliver_seconds": 60.0}},
                          environment=environment) == run_dir  # fmt: skip
        assert {**outcome(run_dir), "run_id": 0} == {**reference, "run_id": 0}
        assert not list((run_dir / "spool").glob("step-*"))
    finally:
        proxy.close()


def test_in_a_generated_experiment_only_the_credentials_are_needed(
    experiment: Experiment, s3: S3, tmp_path: Path
) -> None:
    """And they are in nothing that the run leaves."""
    url = f"s3://lab/{tmp_path.name}"
    quick = ("paths.runs=runs", "trainer.max_steps=6", "logger=csv", f"checkpoint.url={url}")
    run = experiment.train(*quick, env=s3.variables())
    again = experiment.train(*quick, env=s3.variables())
    assert (again.digest, again.folder) == (run.digest, run.folder)
    done = subprocess.run(
        [LABTRAIN, "store", "ls", url], env={**os.environ, **s3.variables()}, capture_output=True, text=True, check=True
    )
    assert f"{url}/{run.folder.name}/step-0000000006" in done.stdout.split()
    for path in [*run.folder.rglob("*"), *(s3.folder / "none").rglob("*")]:
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
            assert KEY.encode() not in path.read_bytes(), path
    assert SECRET not in run.err
    wrong = experiment.train(*quick, "seed=2", env={**s3.variables(), "AWS_SECRET_ACCESS_KEY": "wrong-secret"}, code=2)
    assert f"error: {url}" in wrong.err
    assert "wrong-secret" not in wrong.err
    assert "Traceback" not in wrong.err


# ------------------------------------------------------------------------------------------ Lightning's own files


def test_to_lightning_and_back(experiment: Experiment, tmp_path: Path) -> None:
    run = experiment.train("paths.runs=runs", "trainer.max_steps=2", "logger=none")

    def store(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([LABTRAIN, "store", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    store("export", str(run.folder), "x.ckpt")
    assert "already exists" in store("export", str(run.folder), "x.ckpt", code=2).stderr
    import torch

    loaded = torch.load("x.ckpt", weights_only=True)
    assert digest(loaded["state_dict"]) == run.digest
    assert loaded["global_step"] == 2
    made = store("import", "x.ckpt", "imported").stdout.strip()
    assert digest(labtrain.load_weights(made)) == run.digest
    assert digest(labtrain.load_weights("imported")) == run.digest
    assert store("ls", "imported").stdout.split()[0] == made


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"state_dict": {"w": Evil()}}, tmp_path / "evil.ckpt")
    for name in ("evil.ckpt", "missing.ckpt"):
        done = subprocess.run(
            [LABTRAIN, "store", "import", str(tmp_path / name), str(tmp_path / "to")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "hint: " in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "to").exists()


def test_weights_that_are_damaged_are_not_loaded(runner: Runner) -> None:
    run_dir = runner.run(configure("mlp", "even"))
    assert run_dir is not None
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    whole = labtrain.load_weights(newest / "weights.safetensors")
    assert digest(labtrain.load_weights(run_dir)) == digest(whole)
    raw = bytearray((newest / "weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "weights.safetensors").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"weights\.safetensors: sha256"):
        labtrain.load_weights(newest)
    assert digest(labtrain.load_weights(run_dir)) != digest(whole)  # the one before
    with pytest.raises(LabtrainError, match="neither a run nor a checkpoint"):
        labtrain.load_weights(run_dir / "nothing")
