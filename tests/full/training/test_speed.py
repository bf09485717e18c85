"""Trainings of compiled models in every way that a run can go; and what torch would do by itself."""

import copy
import os
import subprocess
import sys

import pytest

from tests.real.training.test_speed import bits
from tests.support.compiled import compiled, gone_on_before_the_last_batch
from tests.support.exact import Runner, configure, outcome, tell

pytest_plugins = ["tests.support.compiled"]


def test_compiled_it_ends_the_same_where_a_resume_meets_the_smaller_batch_first(
    runner: Runner, other: Runner, cache: dict[str, str]
) -> None:
    """And on two processes, of which the first then begins with 2 samples and the second with 16."""
    whole = runner.run(compiled(), environment=cache)
    reference = outcome(whole)
    assert gone_on_before_the_last_batch(whole, other, compiled(), cache, world=2) == reference
    eager = {**compiled(), "speed": configure()["speed"]}
    assert outcome(runner.run(eager))["weights_digest"] != reference["weights_digest"]


def test_as_torch_compiles_by_itself_it_would_not(runner: Runner, other: Runner, cache: dict[str, str]) -> None:
    """The same with sizes that become dynamic, which warn leaves to torch: what the test above must be able to find."""
    config = compiled(determinism={"mode": "warn"})
    whole = runner.run(config, environment=cache)
    assert "its kernels depend on the sizes that a process has seen" in runner.said()
    found = gone_on_before_the_last_batch(whole, other, config, cache, world=1)
    assert found["weights_digest"] != outcome(whole)["weights_digest"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("model", "speed"),
    [("gpt", {}), ("cnn", {}), ("gpt", {"checkpoint_activations": True}), ("cnn", {"channels_last": True})],
)
def test_compiled_however_it_ran(
    model: str, precision: str, speed: dict[str, bool], runner: Runner, other: Runner, cache: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Moved and killed, with dropout and the other switches."""
    monkeypatch.setattr("tests.support.exact.TIMEOUT_S", 600)
    config = configure(model, "uneven", precision, speed={"compile": True, **speed})
    reference = outcome(runner.run(config, environment=cache))
    runner_of = {world: Runner(other.folder / str(world)) for world in (2, 3)}
    for world, story in ((2, "moved"), (3, "killed")):
        runner_of[world].folder.mkdir()
        found = tell(runner_of[world], copy.deepcopy(config), world=world, story=story, seed=world, environment=cache)
        assert found == reference


def test_more_sizes_than_are_compiled_end_in_an_error(cache: dict[str, str]) -> None:
    """Torch would go on without, and what a process has met would decide. The nn.Sequential is one of torch's own modules."""
    code = """if True:
        import torch
        from labtrain.training import speed
        from tests.support.speed_models import Normed
        speed.COMPILED_SIZES = 1
        model = Normed().eval()
        speed.compile_parts(model, mode=True, exact=True)
        with torch.no_grad():
            print(model.net(torch.zeros(2, 36)).shape, flush=True)
            try:
                model.net(torch.zeros(3, 36))
            except BaseException as error:
                print(speed.explain_compile(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **cache}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 3])\ntorch.compile: a function was compiled for 1 different sizes")
    assert "hint: pad the inputs" in done.stdout


def test_under_fsdp_they_change_no_bit_either(runner: Runner) -> None:
    reference = configure("gpt", trainer={"strategy": "fsdp", "max_epochs": 1})
    config = copy.deepcopy(reference)
    config["speed"]["checkpoint_activations"] = True
    assert bits(outcome(runner.run(config, world=2))) == bits(outcome(runner.run(reference, world=2)))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("Adam", "32-true"), ("AdamW", "16-mixed"), ("SGD", "bf16-mixed"), ("Adagrad", "32-true")],
)
def test_a_fused_optimizer_is_exact(optimizer: str, precision: str, runner: Runner, other: Runner) -> None:
    """Other bits than torch's loop over operations, perhaps; the same however it ran. In fp16 it unscales by itself."""
    config = configure("cnn", "uneven", precision)
    config["model"] = {"_target_": "tests.support.speed_models.Fused", "optimizer": optimizer}
    reference = outcome(runner.run(config))
    assert tell(other, config, world=3, story="killed", seed=3) == reference
