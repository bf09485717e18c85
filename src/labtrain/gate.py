"""`labtrain gate`: may the environment be upgraded? Baselines are trained again in today's. No torch here.

The same bits are a yes. Where an upgrade changes bits, and most do, runs of several seeds on both sides are compared by
an equivalence test on their final metric (equivalence.py), within a margin that the person gives.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from labtrain.compare import differences, first_difference, open_run
from labtrain.equivalence import Equivalence, compare_pairs
from labtrain.errors import ConfigError
from labtrain.receipt import Receipt
from labtrain.replay import Replay, code_of, home_of
from labtrain.run import shown, what_counts
from labtrain.verification import results_differently

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A run that has ended: its folder and its receipt."""

    run_dir: Path
    receipt: Receipt

    @property
    def seed(self) -> int:
        return int(self.receipt["config"]["seed"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the gate says of one configuration.

    Attributes:
        experiment: its name.
        before: the recorded runs, and those that the old interpreter trained.
        now: today's, of the same seeds in the same order.
        why: where bits are not the same: which, in words; empty where they are.
        metric: that is compared; None where none is.
        test: of equivalence; None where bits are the same, or no seeds were asked for.
    """

    experiment: str
    before: list[Trained]
    now: list[Trained]
    why: str
    metric: str | None
    test: Equivalence | None

    @property
    def passed(self) -> bool:
        return not self.why or (self.test is not None and self.test.equivalent)

    def values(self) -> list[tuple[int, float, float]]:
        """Return (seed, before, now) of the metric."""
        if self.metric is None:
            return []
        return [(one.seed, value_of(one, self.metric), value_of(other, self.metric))
                for one, other in zip(self.before, self.now, strict=True)]  # fmt: skip


def judge_upgrade(
    baselines: list[Path],
    *,
    scratch: Path,
    seeds: int = 0,
    metric: str | None = None,
    margin: float | None = None,
    alpha: float = 0.05,
    old_python: Path | None = None,
    say: Say = lambda _: None,
) -> list[Outcome]:
    """Train baselines again in today's environment and judge what comes out, a configuration at a time.

    Args:
        baselines: folders of complete runs, or receipts; those that differ in nothing but the seed are one experiment.
        scratch: a folder below which today's runs are made.
        seeds: on how many seeds both sides are compared where bits are not the same; 0: not at all.
        metric: the final metric that is compared; None: `checkpoint.monitor`.
        margin: the largest difference of its mean that does not matter.
        alpha: level of the test.
        old_python: the recorded side's interpreter, which trains the seeds that no baseline has.
        say: is told how it goes.

    Raises:
        ConfigError: a baseline is no complete run, or seeds, metric or margin are missing; before anything is trained.
        LabtrainError: a training fails.
    """
    groups: dict[str, list[Trained]] = defaultdict(list)
    for path in baselines:
        run_dir, receipt = open_run(path)
        if receipt["status"] != "complete":
            raise ConfigError(f"{shown(run_dir)} is {receipt['status']}, a complete run is wanted", hint="finish it")
        rest = {key: value for key, value in what_counts(receipt["config"]).items() if key != "seed"}
        groups[json.dumps([rest, receipt["code"]["sources"]], sort_keys=True)].append(
            Trained(run_dir=run_dir, receipt=receipt)
        )
    for group in groups.values():
        _refuse(group, seeds=seeds, metric=metric, margin=margin, old_python=old_python)
    outcomes = []
    for number, group in enumerate(groups.values()):
        place = scratch / str(number)
        place.mkdir(parents=True)
        outcomes.append(_judge(group, place, seeds, metric, margin, alpha, old_python, say))
    return outcomes


def value_of(run: Trained, metric: str) -> float:
    """Return a run's final metric.

    Raises:
        ConfigError: it has none of that name.
    """
    metrics = run.receipt["results"]["metrics"]
    if metric not in metrics:
        raise ConfigError(
            f"{shown(run.run_dir)} has no metric {metric}; it has {', '.join(sorted(metrics))}", hint="--metric NAME"
        )
    return float(metrics[metric])


def _refuse(
    group: list[Trained], *, seeds: int, metric: str | None, margin: float | None, old_python: Path | None
) -> None:
    first = group[0]
    named = metric or first.receipt["config"]["checkpoint"]["monitor"]
    if not seeds:
        return
    if named is None:
        names = ", ".join(sorted(first.receipt["results"]["metrics"]))
        raise ConfigError(f"which metric is compared? {shown(first.run_dir)} has {names}", hint="--metric NAME")
    for run in group:
        value_of(run, named)
    if margin is None:
        raise ConfigError(f"how large a difference of {named} does not matter?", hint="--margin 0.005, say")
    have = len({run.seed for run in group})
    if have < seeds and old_python is None:
        raise ConfigError(
            f"{seeds} seeds are wanted on both sides, {have} recorded: {shown(first.run_dir)} and its like",
            hint="record more before the upgrade, python train.py -m seed=1,2,3, and name them all;"
            " or --old-python OLD_ENVIRONMENT/bin/python",
        )


def _judge(
    group: list[Trained],
    place: Path,
    seeds: int,
    metric: str | None,
    margin: float | None,
    alpha: float,
    old_python: Path | None,
    say: Say,
) -> Outcome:
    first = group[0]
    home = home_of(first.run_dir, first.receipt)
    root, whence = code_of(first.receipt, first.run_dir, home, place)
    say(f"baseline     {first.receipt['config']['experiment']}, {len(group)} recorded; code {whence}")

    def trained(like: Trained, seed: int, name: str, python: Path | None = None) -> Trained:
        replay = Replay(like.receipt, root, home=home, scratch=place / name, changes={"seed": seed}, python=python)
        with closing(replay.lines()) as lines:
            for _ in lines:
                pass
        receipt = replay.receipt()
        assert receipt is not None
        return Trained(run_dir=replay.run_dir, receipt=receipt)

    now, why = [], ""
    for run in group:
        now.append(trained(run, run.seed, f"seed-{run.seed}"))
        wrong = results_differently(run.receipt, now[-1].receipt, trails=True)
        say(f"seed {run.seed:<7} {'other bits' if wrong else 'the same bits'}")
        if wrong and not why:
            parted = first_difference(run.run_dir, now[-1].run_dir)
            causes = [each.key for each in differences(run.receipt, now[-1].receipt) if each.matters]
            why = (
                f"{parted or ', '.join(wrong)}; not as recorded: {', '.join(causes) or 'nothing that a receipt holds'}"
            )
    outcome = Outcome(experiment=str(first.receipt["config"]["experiment"]), before=group, now=now, why=why,
                      metric=metric or first.receipt["config"]["checkpoint"]["monitor"], test=None)  # fmt: skip
    if not why or not seeds:
        return outcome
    before, taken = list(group), {run.seed for run in group}
    free = (seed for seed in range(first.seed, first.seed + len(group) + seeds) if seed not in taken)
    while len(before) < seeds:
        seed = next(free)
        before.append(trained(first, seed, f"seed-{seed}-before", old_python))
        now.append(trained(first, seed, f"seed-{seed}"))
        say(f"seed {seed:<7} trained on both sides")
    outcome = replace(outcome, before=before, now=now)
    pairs = outcome.values()
    assert margin is not None
    test = compare_pairs([one for _, one, _ in pairs], [other for *_, other in pairs], margin=margin, alpha=alpha)
    return replace(outcome, test=test)


def words_of(outcome: Outcome) -> str:
    """Return what a person reads of an outcome."""
    if not outcome.why:
        return f"yes: {len(outcome.before)} of {len(outcome.before)} give the same bits"
    if outcome.test is None:
        return f"no: other bits, {outcome.why} (--seeds 5 --margin M tells whether they are as good)"
    test, level = outcome.test, 1 - 2 * outcome.test.alpha
    said = (
        f"{outcome.metric} changes by {test.mean:+.6g}, {level:.0%} interval {test.low:+.6g} to {test.high:+.6g},"
        f" margin {test.margin:g}: p {test.p:.2g} of {test.pairs} pairs; power {test.power:.2f}"
    )
    if test.equivalent:
        return f"yes: other bits, statistically the same: {said}; {outcome.why}"
    more = "" if test.power >= 0.8 else "; too few runs or too large a spread to show it: more seeds"
    return f"no: not shown to be the same: {said}{more}; {outcome.why}"


def summary_of(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain values, for --json."""
    return {
        "experiment": outcome.experiment,
        "passed": outcome.passed,
        "same_bits": not outcome.why,
        "why": outcome.why,
        "metric": outcome.metric,
        "values": [{"seed": seed, "before": one, "now": other} for seed, one, other in outcome.values()],
        "test": asdict(outcome.test) if outcome.test else None,
        "found": words_of(outcome),
    }


def keep_runs(outcomes: list[Outcome], folder: Path) -> None:
    """Move today's runs below a folder, the next baselines: EXPERIMENT/RUN.

    Raises:
        ConfigError: one is there already.
    """
    for outcome in outcomes:
        for run in outcome.now:
            target = folder / outcome.experiment / run.run_dir.name
            if target.exists():
                raise ConfigError(f"{shown(target)} is there already", hint="--keep another")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(run.run_dir, target)
