"""What .github/workflows says, parsed."""

from collections.abc import Iterator
from typing import Any

import yaml

from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
OF_AN_EXPERIMENT = sorted(ROOT.glob("template/*/.github/workflows/*.yml"))
# What a container has to have before `actions/checkout` can clone into it, and so before there is a Makefile.
BEFORE_CHECKOUT = "apt-get update -qq && apt-get install -y -qq --no-install-recommends git make"


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each job of each workflow, by `file: name`."""
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield f"{path.name}: {name}", job


def run_lines() -> list[str]:
    """Return each distinct `run:` line, in order."""
    return list(dict.fromkeys(step["run"] for _, job in jobs() for step in job["steps"] if "run" in step))
