"""`make test-gpu` on a CPU: how it reports, and the checks that a CPU can stand in for within seconds."""

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

from labtrain.training import speed
from tests.conftest import ROOT
from tests.gpu import device, exact, models
from tests.gpu.checks import CHECKS
from tests.gpu.facts import smi
from tests.gpu.harness import Place
from tests.gpu.wheels import LACKING, pinned


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_list_names_each_check_and_each_has_its_function() -> None:
    done = run("--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [check.name for check in CHECKS]
    for check in CHECKS:
        module, _, name = check.run.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), check.name
    assert run("--only", "nothing").returncode == 2


def test_a_report_says_what_passed_failed_and_was_left_out(tmp_path: Path) -> None:
    """A failure gives exit code 1; a check over its limit is killed with its children."""
    output, pid = tmp_path / "results.json", tmp_path / "pid"
    done = run("--checks", "tests.support.false_checks", "-o", str(output), PID_FILE=str(pid))
    assert done.returncode == 1, done.stderr
    found = {each["name"]: (each["result"], each["figure"]) for each in json.loads(output.read_text())["checks"]}
    assert found.pop("passes")[0] == "passed"
    died = found.pop("dies")
    assert (died[0], died[1].splitlines()[0]) == ("failed", "its process ended with 7")
    assert found.pop("many")[0] == "left out"
    assert found == {
        "fails": ("failed", "AssertionError: 1 is not 2\nnor 3"),
        "hangs": ("failed", "killed after 2 s"),
        "refuses": ("left out", "there is no such program"),
    }
    for name, result in (("passes", "passed"), ("fails", "failed"), ("hangs", "failed"), ("refuses", "left out")):
        assert re.search(rf"^{name} +{result} ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^1 passed, 3 failed, 2 left out, in \d+ s$", done.stdout, re.MULTILINE)
    child = int(pid.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_what_does_not_fit_into_the_budget_is_left_out(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = run("--checks", "tests.support.false_checks", "--only", "passes", "--budget", "0", "-o", str(output))
    (only,) = json.loads(output.read_text())["checks"]
    assert (done.returncode, only["result"], only["figure"]) == (1, "left out", "no time left")
    assert done.stdout.endswith("incomplete: no time for 1 checks; --budget SECONDS gives them more\n")


@pytest.mark.parametrize("check", [exact.gpt_in_fp16, device.no_wait, device.checksum])
def test_a_check_passes_on_the_cpu(check: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One digest with two processes whose exchange passes through the host; no step waits; the trail's checksums."""
    assert callable(check)
    assert check(Place(device="cpu", folder=tmp_path))


def test_a_model_without_its_speed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the checks `channels-last` and `checkpoint-activations` see after a step."""
    monkeypatch.setattr(models.Layer, "forward", models.Layer.forward)  # and back at the end
    trainer = cast(Any, None)
    images, tokens = models.ResNet(8), models.GPT(32, 32)
    for last in (False, True):
        images.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        seen = models.ChannelsLast()
        seen.on_train_start(trainer, images)
        images(torch.zeros(2, 3, 16, 16))
        with nullcontext() if last else pytest.raises(AssertionError, match=r"net\.0\.weight has not"):
            seen.on_train_batch_end(trainer, images)
    again = models.Recomputes()
    again.on_train_start(trainer)
    tokens(torch.zeros(1, 32, dtype=torch.long)).sum().backward()
    with pytest.raises(AssertionError, match=r"layers\.0: 1 calls, 0 of them again"):
        again.on_train_batch_end(trainer, tokens)
    speed.recompute_blocks(tokens, lambda text: None)
    tokens(torch.zeros(1, 32, dtype=torch.long)).sum().backward()
    again.on_train_batch_end(trainer, tokens)
    again.on_train_end()


def test_a_read_is_found_by_its_place() -> None:
    with models.Reads(), pytest.raises(RuntimeError, match=r"operation: tolist in .*test_gpu_checks\.py:\d+"):
        torch.zeros(2).tolist()
    with models.Reads(), pytest.raises(RuntimeError, match=r"_local_scalar_dense\.default in .*test_gpu_checks"):
        bool(torch.zeros(()))
    assert torch.zeros(2).tolist() == [0, 0]


def test_what_nvidia_smi_prints_is_read() -> None:
    text = "GPU-1f, 143771, 142000, 31\nGPU-2e, 143771, 100, [N/A]\n\n"
    first, second = smi("uuid,memory.total,memory.free,temperature.gpu", text)
    assert first == {"uuid": "GPU-1f", "memory.total": "143771", "memory.free": "142000", "temperature.gpu": "31"}
    assert second["temperature.gpu"] == "[N/A]"


def test_the_wheels_are_those_of_the_lock() -> None:
    """By version and hashes; a marker of another Python is left out."""
    text = pinned(LACKING, (ROOT / "requirements.lock").read_text())
    for name in LACKING:
        assert re.search(
            rf"^{re.escape(name)}==[\w.]+ \\\n( +--hash=sha256:[0-9a-f]{{64}}( \\)?\n)+", text, re.MULTILINE
        )
    with pytest.raises(SystemExit, match=r"not in requirements\.lock: nothing"):
        pinned(("nothing",), text)
