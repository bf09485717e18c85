"""torch.compile in the experiment's code changes no bit when a run is moved, killed, or meets another size first."""

import copy
import shutil
from typing import Any

import pytest

from tests.support.compiled import gone_on_before_the_last_batch
from tests.support.exact import Runner, configure, outcome, tell

pytest_plugins = ["tests.support.compiled"]


def own(form: str) -> Any:
    found = configure("cnn", "uneven")
    found["model"] = {"_target_": "tests.support.own_compile_models.Compiled", "form": form}
    return found


@pytest.mark.parametrize("form", ["assigned", "in place", "function", "configured"])
def test_it_is_exact_in_each_form(
    form: str, runner: Runner, other: Runner, cache: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed three times, and on 1, 2 and 4 devices."""
    monkeypatch.setattr("tests.support.exact.TIMEOUT_S", 900)
    whole = runner.run(own(form), environment=cache)
    reference = outcome(whole)
    for world, story in ((2, "killed"), (4, "killed twice")):
        found = tell(other, copy.deepcopy(own(form)), world=world, story=story, seed=world, environment=cache)
        assert found == reference
        shutil.rmtree(other.folder / "runs")


@pytest.mark.parametrize("form", ["assigned", "function"])
def test_a_resume_that_meets_the_smaller_batch_first_ends_the_same(
    form: str, runner: Runner, other: Runner, cache: dict[str, str]
) -> None:
    """As torch compiles by itself, its kernels would be others (test_speed.py)."""
    config = own(form)
    config["data"] |= {"size": 66, "batch_size": 64}
    config["trainer"] |= {"max_epochs": None, "max_steps": 3, "limit_val_batches": 0}
    config["checkpoint"] |= {"every_n_steps": 1, "keep_last": 3}
    whole = runner.run(config, environment=cache)
    assert gone_on_before_the_last_batch(whole, other, config, cache, world=2) == outcome(whole)
