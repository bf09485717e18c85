"""Checks for tests of tests.gpu itself: one that passes, and one for each way not to."""

import os
import subprocess
import time
from pathlib import Path

from tests.gpu.harness import Check, LeftOutError, Place

CHECKS = [
    Check(name="passes", shows="it passes", run="tests.support.false_checks:passes"),
    Check(name="fails", shows="it fails", run="tests.support.false_checks:fails"),
    Check(name="hangs", shows="it never ends", run="tests.support.false_checks:hangs", limit_s=2),
    Check(name="dies", shows="its process ends", run="tests.support.false_checks:dies", alone=True),
    Check(name="refuses", shows="it cannot run", run="tests.support.false_checks:refuses"),
    Check(name="many", shows="it needs GPUs", run="tests.support.false_checks:passes", gpus=99),
]


def passes(place: Place) -> str:
    return f"a figure on {place.device}"


def fails(place: Place) -> str:
    raise AssertionError("1 is not 2\nnor 3")


def hangs(place: Place) -> str:
    """And its child, whose number is in the file that PID_FILE names."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["PID_FILE"]).write_text(f"{child.pid}")
    time.sleep(1000)  # fixed: it is killed before
    return ""


def dies(place: Place) -> str:
    os._exit(7)


def refuses(place: Place) -> str:
    raise LeftOutError("there is no such program")
