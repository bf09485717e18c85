"""Trainings of compiled models, and the cache of what was compiled."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.support.exact import Runner, configure, outcome

# Shards of 16 samples; the last batch of an epoch is 2 samples, which are one shard.
COMPILED = {
    "data": {"size": 66, "batch_size": 64},
    "trainer": {"max_epochs": None, "max_steps": 3, "limit_val_batches": 0},
    "speed": {"compile": True},
    "checkpoint": {"every_n_steps": 1, "keep_last": 3},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the compiler keeps what it has compiled, for all tests of this process: its results, not what it decides."""
    need("g++", "g++")
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def compiled(**more: Any) -> Any:
    config = configure("cnn", **COMPILED, **more)
    config["model"] = {"_target_": "tests.support.speed_models.Normed"}
    return config


def gone_on_before_the_last_batch(
    whole: Path, runner: Runner, config: Any, cache: dict[str, str], *, world: int
) -> Any:
    """Go on from a run's first step, in a process that compiled nothing of it."""
    run_dir = runner.folder / "runs" / "exact" / whole.name
    shutil.copytree(whole, run_dir)
    (run_dir / "receipt.json").unlink()
    for later in sorted(run_dir.glob("checkpoints/step-*"))[1:]:
        shutil.rmtree(later)
    found = outcome(runner.run(config, world=world, environment=cache))
    assert "resumes from step-0000000001" in runner.said()
    return found
