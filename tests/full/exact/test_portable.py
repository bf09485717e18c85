"""Operations and the golden run under an emulated CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from labtrain.exact.determinism import variables
from labtrain.record.identity import JOB_VARIABLE
from labtrain.record.resume import make_job
from tests.conftest import ROOT, Experiment, need


def test_the_golden_run_is_golden_on_an_older_cpu(shared_experiment: Experiment, tmp_path: Path) -> None:
    """All 300 steps under the emulated Nehalem. Stage 2 alone: an emulated process that starts another starts a native one."""
    need("qemu-x86_64", "qemu-user")
    first = shared_experiment.train(
        "determinism.mode=portable",
        "trainer.accelerator=cpu",
        "trainer.max_steps=1",
        "logger=none",
        f"paths.runs={tmp_path}",
    )
    config = first.receipt["config"]
    config["trainer"]["max_steps"] = -1
    job = make_job(config, root=shared_experiment.root, command=["test"])
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Nehalem", sys.executable, "-m", "labtrain.launch.job", job.run_dir],
        env={**os.environ, **variables("portable", threads=1), JOB_VARIABLE: job.to_json()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    golden = json.loads((ROOT / "tests/golden/receipt.json").read_text())["results"]["weights_digest"]
    assert done.stdout.split()[1] == golden


def digests(*prefix: str) -> list[str]:
    done = subprocess.run(
        [*prefix, sys.executable, str(ROOT / "tests/support/portable_operations.py")],
        env={**os.environ, **variables("portable", threads=1)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_older_cpu_computes_the_same_bits() -> None:
    """Nehalem (2008) has neither AVX nor FMA, and the emulator rounds RSQRTPS otherwise than any silicon does.

    What it can't show: a CPU whose compliant instructions are wrong, and another glibc.
    """
    need("qemu-x86_64", "qemu-user")
    here, there = digests(), digests("qemu-x86_64", "-cpu", "Nehalem")
    assert len(here) > 100
    assert [line for line in there if line not in here] == []
