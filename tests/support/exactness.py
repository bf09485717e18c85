"""The matrix of exactness: what may befall a training, and a check that its result is the same all the same.

A case is a model, a number of processes and of loader workers, a precision, a shape of the data and of the training, and a
story: whole, killed, moved. `tests/quick` runs cases in which each value occurs, `tests/real` twenty in which most
pairs of values meet, `tests/full` all the rest.
"""

import itertools
import random
import signal
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import SHAPES, STORIES, Runner, configure, newest_manifest, outcome, tell
from tests.support.loader_models import LOADERS
from tests.support.own_code import MANUAL, SAMPLERS, manual, of_whole_batches, with_loader

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("mlp", "cnn", "gpt"),
    "world": (1, 2, 3, 4),
    "workers": (0, 2),
    "story": STORIES,
    "precision": ("32-true", "bf16-mixed"),
    "shape": tuple(SHAPES),
}
Case = tuple[Any, ...]
EVERY: list[Case] = list(itertools.product(*FACTORS.values()))


# The same for what people bring: loaders of torch with each of its samplers, streams, manual optimization, steps that
# meet. Their shape is "uneven".
OWN_FACTORS: dict[str, tuple[Any, ...]] = {
    "program": (*SAMPLERS, "resumable stream", "stream in parts", "gan", "wgan-gp", "clip", "norm"),
    "world": (1, 2, 3, 4),
    "story": STORIES,
    "precision": ("32-true", "bf16-mixed"),
}
EVERY_OWN: list[Case] = list(itertools.product(*OWN_FACTORS.values()))


def own_program(program: str, precision: str) -> dict[str, Any]:
    """Return the configuration of a case of EVERY_OWN."""
    if program in LOADERS:
        config = with_loader(program)
    else:
        config = manual(program) if program in MANUAL else of_whole_batches(program)
    config["trainer"]["precision"] = precision
    return dict(config)


def meetings(case: Case, count: int) -> set[Any]:
    """Return the sets of `count` values that meet in a case, each value with its factor."""
    return set(itertools.combinations(enumerate(case), count))


@cache
def cover(count: int, own: bool = False) -> tuple[Case, ...]:
    """Return cases in which any `count` values of different factors meet: greedily, the case with most new ones next."""
    draw, every = random.Random(0), EVERY_OWN if own else EVERY
    missing = set().union(*(meetings(case, count) for case in every))
    chosen = []
    while missing:
        best = max(draw.sample(every, 400), key=lambda case: len(meetings(case, count) & missing))
        chosen.append(best)
        missing -= meetings(best, count)
    return tuple(chosen)


def most_pairs() -> tuple[Case, ...]:
    """Return the cases of tests/real: the first, and so the richest, of those in which any two values meet."""
    return cover(2)[:10]


def each(cases: list[Case] | tuple[Case, ...]) -> pytest.MarkDecorator:
    """Return what runs a test once for each case, named by its values."""
    return pytest.mark.parametrize("case", cases, ids=["-".join(map(str, case)).replace(" ", "_") for case in cases])


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What one process without workers comes to, that nothing befell."""

    @cache
    def reference(model: str, shape: str, precision: str) -> dict[str, Any]:
        return outcome(Runner(tmp_path_factory.mktemp("reference")).run(configure(model, shape, precision)))

    return reference


@pytest.fixture
def is_exact(references: Callable[..., dict[str, Any]], runner: Runner) -> Callable[[Case], None]:
    """Train a case and compare: weights, optimizer and all other state, metrics, trail and name, by digest.

    What befalls it is drawn from the case itself, so a case is the same whichever others are run.
    """

    def check(case: Case) -> None:
        model, world, workers, story, precision, shape = case
        config = configure(model, shape, precision, workers)
        found = tell(runner, config, world=world, story=story, seed=zlib.crc32(repr(case).encode()))
        assert found == references(model, shape, precision)

    return check


@pytest.fixture(scope="session")
def own_references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """The same of a case of EVERY_OWN."""

    @cache
    def reference(program: str, precision: str) -> dict[str, Any]:
        return outcome(Runner(tmp_path_factory.mktemp("reference")).run(own_program(program, precision)))

    return reference


@pytest.fixture
def is_exact_own(own_references: Callable[[str, str], dict[str, Any]], runner: Runner) -> Callable[[Case], None]:
    """Train a case of EVERY_OWN and compare."""

    def check(case: Case) -> None:
        program, world, story, precision = case
        config = own_program(program, precision)
        found = tell(runner, config, world=world, story=story, seed=zlib.crc32(repr(case).encode()))
        assert found == own_references(program, precision)

    return check


@pytest.fixture(scope="module")
def goes_on_after(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], None]:
    """Stop a training after a step and go on, with a validation and a plateau at the epoch's end; compare by digest.

    Lightning's own checkpoint of an epoch's last batch skips the next epoch; its averages of an epoch forget what was
    before the resume.
    """
    config = configure("cnn", "even", model={"plateau": True})
    undisturbed = outcome(Runner(tmp_path_factory.mktemp("undisturbed")).run(config))

    def check(step: int) -> None:
        runner = Runner(tmp_path_factory.mktemp(f"after-{step}"))
        assert runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0") is None
        manifest = newest_manifest(runner)
        assert (manifest["step"], manifest["epoch"], manifest["batch"]) == (step, (step - 1) // 5, (step - 1) % 5 + 1)
        assert outcome(runner.run(config)) == undisturbed

    return check
