"""Plain values come back as they were from a checkpoint, and on every rank; what is not plain is said."""

import io
import json
import signal
import sys
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.base.errors import EXIT_STOPPED, ConfigError
from labtrain.exact.plain_values import Decoder, Encoder, is_plain
from tests.support.exact import Runner, configure, outcome
from tests.support.plain_models import Meter, Options, Phase, Point, State

CPU = torch.device("cpu")


def config(name: str, **more: Any) -> Any:
    found = configure("mlp", "even", **more)
    found["model"] = {"_target_": f"tests.support.plain_models.{name}"}
    return found


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


VALUES: dict[str, Any] = {
    "enum": Phase.MAIN,
    "flag": Options.A | Options.C,
    "no flag": Options(0),
    "named tuple": Point(3, [1.0]),
    "keys": {Phase.MAIN: 1, Point(1): 2, Fraction(1, 3): 3, (Phase.WARM, 1): 4},
    "fraction": Fraction(1, 3),
    "decimal": Decimal("1.10"),
    "path": Path("a/b"),
    "time": datetime(2020, 1, 2, 3, 4, 5, 6),
    "time in a zone": datetime(2020, 1, 2, tzinfo=UTC),
    "span": timedelta(days=-1, microseconds=3),
    "dtype": torch.bfloat16,
    "format": torch.channels_last,
    "device": CPU,
    "range": range(5, 1, -2),
    "size": torch.Size([2, 3]),
    "set": {Phase.MAIN, Phase.WARM},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(name: str) -> None:
    """Its type included, from a file that loads without running code."""
    value = VALUES[name]
    assert is_plain(value)
    found = Decoder(CPU)(through_a_file(Encoder()(value)))
    assert type(found) is type(value)
    assert repr(found) == repr(value) if name != "set" else found == value


def test_a_defaultdict_keeps_its_items_and_takes_the_factory_that_there_is_now() -> None:
    """In a dict too, and one that such a dict makes."""
    saved: Any = defaultdict(lambda: defaultdict(lambda: 1))
    saved["a"]["x"] += 1
    now: Any = defaultdict(lambda: defaultdict(lambda: 5))
    found = Decoder(CPU)(through_a_file(Encoder()({"in": saved})), {"in": now})["in"]
    assert dict(found["a"]) == {"x": 2}
    assert (found["a"]["y"], found["b"]["z"]) == (5, 5)


def test_reading_a_value_runs_no_code() -> None:
    """A name must be that of an Enum, a named tuple; objects come from a rank alone, and their constructor is not run."""
    for node in (
        ("named", [1], "os", "system"),
        ("named", [1], "subprocess", "Popen"),
        ("enum", ["x"], "os", "environ"),
    ):
        with pytest.raises(ConfigError, match="the code no longer defines"):
            Decoder(CPU)(node)
    assert not is_plain(Meter())
    node = Encoder()(State(1, torch.ones(1)))
    with pytest.raises(KeyError):
        Decoder(CPU)(node)
    assert Decoder(CPU, {})(node) == State(1, torch.ones(1))


def test_a_class_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Encoder()(Phase.MAIN)
    monkeypatch.delattr(sys.modules["tests.support.plain_models"], "Phase")
    with pytest.raises(ConfigError, match=r"holds a tests\.support\.plain_models\.Phase\.MAIN") as raised:
        Decoder(CPU)(node)
    assert "hint: restore its former name" in str(raised.value)


def test_a_class_that_cannot_be_found_again_is_not_plain() -> None:
    class Local(Enum):
        A = 1

    assert not is_plain(Local.A)
    assert not is_plain({Local.A: 1})


def test_a_resume_keeps_every_kind(runner: Runner, other: Runner) -> None:
    """Enums, named tuples, defaultdicts, fractions, paths, times, dtypes, devices, ranges: stopped in mid-epoch twice."""
    options = config("Kinds", determinism={"shards": 2})
    whole = outcome(other.run(options))
    for step in (4, 9):
        runner.run(options, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    assert outcome(runner.run(options)) == whole


SHARED = ("list", "in a dict", "tensor", "object", "unchanged", "replaced", "factory", "slots", "made anew")


@pytest.mark.parametrize("kind", SHARED)
def test_what_attributes_share_they_share_on_every_rank(kind: str, runner: Runner, other: Runner) -> None:
    """Changed in place or replaced by a step whose shards differ: two devices end as one does."""
    options = config("Shares", data={"size": 34, "batch_size": 8}, determinism={"shards": 4}, trainer={"max_epochs": 2})
    options["model"]["kind"] = kind
    alone = outcome(runner.run(options))
    assert outcome(other.run(options, world=2)) == alone
    if kind in ("slots", "made anew"):
        assert f"after 10: {'5 0' if kind == 'made anew' else '0 10'}" in runner.said()


def test_what_a_step_sets_and_nobody_can_compare_is_said(runner: Runner) -> None:
    """Once, by name and kind."""
    runner.run(config("Sets", determinism={"shards": 2}))
    assert runner.said().count("training_step sets distribution to a torch.distributions.categorical.Categorical") == 1


@pytest.mark.parametrize(("kind", "name"), [("number", "factor"), ("in a dict", "table"), ("alike", "")])
def test_an_attribute_that_hooks_set_on_some_ranks_is_said(kind: str, name: str, runner: Runner) -> None:
    """Once, with its name. Grown lists, clocks, and what differed when the training began, are not."""
    options = config("OnOneRank", determinism={"shards": 2}, checkpoint={"every_n_steps": 2})
    options["model"]["kind"] = kind
    run_dir = runner.run(options, world=2)
    said = [line for line in runner.said().splitlines() if "the same on all ranks" in line]
    notes = [
        note for note in json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"] if "same on" in note
    ]  # type: ignore[operator]
    assert len(said) == len(notes) == bool(name)
    if name:
        assert said[0].startswith(f"warning: {name} was the same on all ranks when the training began, but differs")
