"""`labtrain rm` of runs that a real training makes, in a real store."""

import signal
import subprocess
from pathlib import Path
from typing import Any

from labtrain.stores.store import Store
from tests.conftest import LABTRAIN, QUICK, Experiment
from tests.support.training import folders, wait_for_step


def rm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LABTRAIN, "rm", "--yes", *arguments], capture_output=True, text=True, check=False)


def test_a_run_that_is_training_stays(experiment: Experiment) -> None:
    child = subprocess.Popen(
        experiment.command(*QUICK, "paths.runs=runs", "trainer.max_epochs=5000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(5)
    (folder,) = folders(Path("runs"))
    refused = rm(folder.name)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=300) == 75, "it was not disturbed"
    assert refused.returncode == 2
    assert f"error: {folder} is training\n\nhint: stop it first" in refused.stderr
    done = rm(folder.name)
    assert done.stdout.startswith(f"{folder}  interrupted, ")
    assert not list(folder.parent.iterdir())


def test_its_checkpoints_on_s3_are_removed(experiment: Experiment, s3: Any, monkeypatch: Any) -> None:
    for name, value in s3.variables().items():
        monkeypatch.setenv(name, value)
    url = "s3://lab/removed"
    runs = [
        experiment.train(
            *QUICK, "paths.runs=runs", "trainer.max_steps=2", f"checkpoint.url={url}", f"seed={seed}"
        ).folder
        for seed in (1, 2)
    ]
    assert {each.run for each in Store(url).checkpoints()} == {run.name for run in runs}
    done = rm(runs[0].name)
    assert done.returncode == 0, done.stderr
    assert f" in {url}/{runs[0].name}, " in done.stdout
    assert {each.run for each in Store(url).find()} == {runs[1].name}
    assert not [name for name in Store(url).fs.find("lab/removed") if runs[0].name in name]
