"""The history of a run that is killed."""

import json
import signal
import subprocess
from pathlib import Path

from labtrain.record.trail import HISTORY, read_trail
from tests.conftest import QUICK, Experiment
from tests.support.waiting import wait_until


def test_a_killed_run_goes_on_with_its_history(experiment: Experiment) -> None:
    command = (*QUICK, "paths.runs=killed", "trainer.max_epochs=6")
    child = subprocess.Popen(experiment.command(*command), stderr=subprocess.DEVNULL)
    wait_until(lambda: any(len(read_trail(path)) >= 50 for path in Path("killed").glob("*/*")), process=child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (run_dir,) = Path("killed").glob("*/*")
    with (run_dir / HISTORY).open("a") as file:
        file.write('{"time": 1, "st')  # as a kill in the middle of a line leaves it
    before = (run_dir / HISTORY).read_text().splitlines()[:-1]
    run = experiment.train(*command)
    after = (run.folder / HISTORY).read_text().splitlines()
    assert after[: len(before)] == before
    told = [json.loads(line) for line in after if line.endswith("}")]
    assert {line["step"] for line in told if "train/loss" in line["metrics"]} == {20, 40, 60, 80, 100, 120}
