"""`labtrain gate`: decide whether an environment may be upgraded, by training baselines again in it. No torch.

The same bits mean yes. Most upgrades change bits. Then runs of several seeds on both sides are compared by an
equivalence test on their final metric (equivalence.py), within a margin that the user gives.
"""

import json
import math
import shutil
import subprocess
from collections import defaultdict
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from labtrain.base.console import shown
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.permissions import make_folder
from labtrain.record.differences import differences, first_difference, open_run
from labtrain.record.identity import first_free, what_counts
from labtrain.record.receipt import Receipt
from labtrain.review.equivalence import Equivalence, check_levels, compare_pairs
from labtrain.review.replay import Replay, code_of, home_of, with_filters
from labtrain.review.report import write_report
from labtrain.review.report.page import ShownVerdict
from labtrain.review.retrace import Say
from labtrain.review.trust import Ask, admit
from labtrain.review.verification import NOT_COMPARED, results_differently, soft_results


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A complete run: its folder and its receipt."""

    run_dir: Path
    receipt: Receipt

    @property
    def seed(self) -> int:
        return int(self.receipt["config"]["seed"])


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """How an upgrade is judged.

    Attributes:
        seeds: number of seeds to compare on both sides if bits differ; 0: do not compare.
        metric: the final metric to compare; None: `checkpoint.monitor`.
        margin: the largest difference of its mean that does not matter.
        alpha: level of the test.
        old_python: interpreter of the recorded environment; it trains the seeds that have no baseline.
        trust: train baselines without asking, whoever wrote them.
    """

    seeds: int = 0
    metric: str | None = None
    margin: float | None = None
    alpha: float = 0.05
    old_python: Path | None = None
    trust: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The gate's result for one configuration.

    Attributes:
        experiment: its name.
        before: the recorded runs, and those that the old interpreter trained.
        now: today's runs, of the same seeds in the same order.
        why: which bits differ, in words; empty if none do.
        metric: the compared metric; None if no metric is compared.
        test: the equivalence test; None if bits are the same, or no seeds were requested.
        bits: for each of today's runs, where it first differs from the recorded one; empty: the same bits.
    """

    experiment: str
    before: list[Trained]
    now: list[Trained]
    why: str
    metric: str | None
    test: Equivalence | None
    bits: list[str]

    @property
    def passed(self) -> bool:
        return not self.why or (self.test is not None and self.test.equivalent)

    def values(self) -> list[tuple[int, float, float]]:
        """Return (seed, before, now) of the metric for each complete pair."""
        if self.metric is None:
            return []
        return [(one.seed, value_of(one, self.metric), value_of(other, self.metric))
                for one, other in zip(self.before, self.now, strict=False)]  # fmt: skip


def judge_upgrade(
    baselines: list[Path],
    options: GateOptions,
    *,
    scratch: Path,
    ask: Ask | None = None,
    say: Say = lambda _: None,
) -> list[Outcome]:
    """Train baselines again in today's environment and judge the results, one configuration at a time.

    A baseline that cannot be trained or compared gives "no" with the reason. The other experiments are still judged.

    Args:
        baselines: folders of complete runs, or receipts; those that differ only in the seed are one experiment.
        options: how the upgrade is judged.
        scratch: the folder below which today's runs are made.
        ask: shows the user what would run, and returns whether it may; None: only this user's own runs may.
        say: receives progress lines.

    Raises:
        ConfigError: a baseline is not complete or may not run, or seeds, metric or margin are missing. Raised before
            anything is trained.
    """
    ready = _ready(baselines, options, scratch, ask, say)
    return [made if isinstance(made, Outcome) else made.judged(say) for made in ready]


def admit_baselines(
    baselines: list[Path], options: GateOptions, *, scratch: Path, ask: Ask | None = None, say: Say = lambda _: None
) -> None:
    """Refuse what `judge_upgrade` would refuse, and ask what it would ask. Trains nothing.

    Raises:
        ConfigError: like `judge_upgrade`.
    """
    _ready(baselines, options, scratch, ask, say)


def _ready(
    baselines: list[Path], options: GateOptions, scratch: Path, ask: Ask | None, say: Say
) -> "list[Outcome | _Sides]":
    """Return what is ready to be judged, or already judged, once all baselines may run."""
    if options.old_python is not None:
        options = replace(options, old_python=options.old_python.absolute())
    groups = _grouped(baselines)
    for group in groups:
        _refuse(group, options)
    return [_prepared(group, options, scratch / str(number), ask, say) for number, group in enumerate(groups)]


def _prepared(group: list[Trained], options: GateOptions, place: Path, ask: Ask | None, say: Say) -> "Outcome | _Sides":
    """Find an experiment's code and ask whether it may run; return an outcome if the code is not found."""
    place.mkdir(parents=True)
    first = group[0]
    made = Outcome(experiment=str(first.receipt["config"]["experiment"]), before=list(group), now=[], why="",
                   metric=_metric_of(group, options), test=None, bits=[])  # fmt: skip
    try:
        home = home_of(first.run_dir, first.receipt)
        root, whence = code_of(first.receipt, first.run_dir, home, place)
    except LabtrainError as error:
        return replace(made, why=str(error.args[0]))
    say(f"baseline     {made.experiment}, {len(group)} recorded; code {whence}")
    for run in group:
        admit(run.receipt, run_dir=run.run_dir, root=root, home=home, trust=options.trust, ask=ask, say=say,
              ways=f"labtrain gate {shown(run.run_dir)} --trust, after you have read the code")  # fmt: skip
    root = with_filters(root, first.receipt, first.run_dir, home, place / "filtered")
    return _Sides(made=made, place=place, home=home, root=root, options=options)


def _grouped(baselines: list[Path]) -> list[list[Trained]]:
    """Group runs by experiment: the same configuration and code, different seeds.

    Raises:
        ConfigError: a run is not complete, or is named twice.
    """
    groups: dict[str, list[Trained]] = defaultdict(list)
    for path in baselines:
        run_dir, receipt = open_run(path)
        if receipt["status"] != "complete":
            raise ConfigError(
                f"{shown(run_dir)} is {receipt['status']}: a baseline must be complete",
                hint="resume it: start the same command again",
            )
        rest = {key: value for key, value in what_counts(receipt["config"]).items() if key != "seed"}
        group = groups[json.dumps([rest, receipt["code"]["sources"]], sort_keys=True)]
        run = Trained(run_dir=run_dir, receipt=receipt)
        for other in group:
            if other.seed == run.seed:
                raise ConfigError(
                    f"{shown(other.run_dir)} and {shown(run_dir)} are the same run: same configuration, code and seed",
                    hint="name only one of them",
                )
        group.append(run)
    return list(groups.values())


def _metric_of(group: list[Trained], options: GateOptions) -> str | None:
    """Return the metric to compare: the one the user named, or the first baseline's `checkpoint.monitor`."""
    return options.metric or group[0].receipt["config"]["checkpoint"]["monitor"]


def value_of(run: Trained, metric: str) -> float:
    """Return a run's final metric.

    Raises:
        ConfigError: the run has no metric of that name.
    """
    metrics = run.receipt["results"]["metrics"]
    if metric not in metrics:
        raise ConfigError(
            f"{shown(run.run_dir)} has no metric {metric}; it has {', '.join(sorted(metrics))}", hint="--metric NAME"
        )
    return float(metrics[metric])


def _refuse(group: list[Trained], options: GateOptions) -> None:
    """Raise ConfigError for what could not be judged, before anything is trained."""
    first, metric = group[0], _metric_of(group, options)
    if metric is not None and (options.metric or options.seeds):
        for run in group:
            if not math.isfinite(value_of(run, metric)):
                raise ConfigError(f"{shown(run.run_dir)}: {metric} is not finite", hint="leave out this baseline")
    if not options.seeds:
        return
    if metric is None:
        names = ", ".join(sorted(first.receipt["results"]["metrics"]))
        raise ConfigError(f"no metric to compare: {shown(first.run_dir)} has {names}", hint="--metric NAME")
    if options.margin is None:
        raise ConfigError(f"--seeds needs --margin, the largest acceptable change of {metric}", hint="--margin 0.005")
    check_levels(options.margin, options.alpha)
    if options.old_python is None and len(group) < options.seeds:
        raise ConfigError(
            f"--seeds {options.seeds} needs {options.seeds} baselines with the configuration of {shown(first.run_dir)},"
            f" found {len(group)}",
            hint="train more before the upgrade (python train.py -m seed=1,2,3) and name them all;"
            " or --old-python OLD_ENVIRONMENT/bin/python",
        )
    if options.old_python is not None:
        there, recorded = distributions_of(options.old_python), first.receipt["environment"]["distributions"]
        if other := sorted(name for name in {*there, *recorded} if there.get(name) != recorded.get(name)):
            raise ConfigError(
                f"{options.old_python} is not the environment of {shown(first.run_dir)}: {', '.join(other[:8])}",
                hint="--old-python PYTHON of the environment that recorded the baselines",
            )


def distributions_of(python: Path) -> dict[str, str]:
    """Return the version of each distribution of another environment.

    Raises:
        ConfigError: `python` is not a Python interpreter, or has no labtrain.
    """
    code = "import json; from labtrain.record.provenance import distributions; print(json.dumps(distributions()))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        words = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        said = (words.strip() or str(error)).splitlines()[-1]
        raise ConfigError(f"{python}: {said}", hint="--old-python OLD_ENVIRONMENT/bin/python") from error
    return dict(json.loads(done.stdout))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sides:
    """Trains one experiment in the recorded and in today's environment."""

    made: Outcome
    place: Path
    home: Path
    root: Path
    options: GateOptions

    def train_now(self, like: Trained, seed: int) -> str:
        """Train one seed in today's environment; return an error text, or an empty one."""
        trained = len(self.made.now)
        wrong = self._add(self.made.now, "today's environment", like, seed, f"seed-{seed}", None)
        if len(self.made.now) > trained:
            recorded = like if like.seed == seed else self.made.before[-1]
            self.made.bits.append(other_bits(recorded, self.made.now[-1]))
        return wrong

    def train_before(self, like: Trained, seed: int) -> str:
        """Train one seed in the old environment; return an error text, or an empty one."""
        python = self.options.old_python
        return self._add(self.made.before, f"the environment of {python}", like, seed, f"seed-{seed}-before", python)

    def _add(self, side: list[Trained], where: str, like: Trained, seed: int, name: str, python: Path | None) -> str:
        try:
            replay = Replay(like.receipt, self.root, home=self.home, scratch=self.place / name,
                            changes={"seed": seed}, python=python, keep_trail=True)  # fmt: skip
            with closing(replay.lines()) as lines:
                for _ in lines:
                    pass
        except LabtrainError as error:
            return f"seed {seed} cannot be trained in {where}: {error.args[0]}"
        receipt, metric = replay.receipt(), self.made.metric
        assert receipt is not None
        side.append(Trained(run_dir=replay.run_dir, receipt=receipt))
        value = receipt["results"]["metrics"].get(metric) if metric else 0.0
        return "" if value is not None and math.isfinite(value) else f"seed {seed}: {metric} is {value} in {where}"

    def judged(self, say: Say) -> Outcome:
        """Train the recorded runs again and return the judged outcome."""
        try:
            return self._judged(say)
        except LabtrainError as error:
            return replace(self.made, why=str(error.args[0]))

    def _judged(self, say: Say) -> Outcome:
        made, options = self.made, self.options
        group, first, why = list(made.before), made.before[0], ""
        for run in group:
            if broken := self.train_now(run, run.seed):
                return replace(made, why=broken)
            say(f"seed {run.seed:<7} {'different bits' if made.bits[-1] else 'the same bits'}")
            why = why or made.bits[-1]
        if not why:
            return made
        if options.margin is None or not options.seeds:
            return replace(made, why=f"{why} (--seeds 5 --margin M tests whether results are equivalent)")
        taken = {run.seed for run in group}
        free = (seed for seed in range(first.seed, first.seed + len(group) + options.seeds) if seed not in taken)
        while len(made.before) < options.seeds:
            seed = next(free)
            if broken := self.train_before(first, seed) or self.train_now(first, seed):
                return replace(made, why=f"{broken}; {why}")
            say(f"seed {seed:<7} trained before and after")
        pairs = replace(made, why=why).values()
        test = compare_pairs([one for _, one, _ in pairs], [other for *_, other in pairs],
                             margin=options.margin, alpha=options.alpha)  # fmt: skip
        return replace(made, why=why, test=test)


def write_page(outcomes: list[Outcome], page: Path) -> None:
    """Write the report of all runs, with the gate's result for each experiment."""
    runs = [run.run_dir for outcome in outcomes for run in (*outcome.before, *outcome.now)]
    said = [f"Gate, {each.experiment}: {words_of(each)}." for each in outcomes]
    write_report(runs, page, said=said, verdicts=verdicts_of(outcomes))


def other_bits(recorded: Trained, now: Trained) -> str:
    """Return where two trainings of a run first differ, and the causes; empty if the bits are the same."""
    parted = first_difference(recorded.run_dir, now.run_dir)
    wrong = _other_results(recorded, now).keys() - soft_results(recorded.receipt)
    if not parted and not wrong:
        return ""
    causes = [each.key for each in differences(recorded.receipt, now.receipt) if each.matters]
    where = str(parted) if parted else ", ".join(sorted(wrong))
    return f"different bits, {where}; possible causes: {', '.join(causes) or 'none recorded in the receipt'}"


def _other_results(recorded: Trained, now: Trained) -> dict[str, tuple[object, object]]:
    return results_differently(recorded.receipt, now.receipt, trail=NOT_COMPARED)


def words_of(outcome: Outcome) -> str:
    """Return an outcome as one line of text."""
    if not outcome.why:
        soft = {key for pair in zip(outcome.before, outcome.now, strict=True) for key in _other_results(*pair)}
        said = f"yes: {len(outcome.before)} of {len(outcome.before)} give the same bits"
        return f"{said}; not verified: {', '.join(sorted(soft))}" if soft else said
    if outcome.test is None:
        return f"no: {outcome.why}"
    test, level = outcome.test, 1 - 2 * outcome.test.alpha
    said = (
        f"{outcome.metric} changes by {test.mean:+.6g}, {level:.0%} interval {test.low:+.6g} to {test.high:+.6g},"
        f" margin {test.margin:g}: p {test.p:.2g} of {test.pairs} pairs; power {test.power:.2f}"
    )
    if test.equivalent:
        return f"yes: statistically the same: {said}; {outcome.why}"
    more = "" if test.power >= 0.8 else "; too few runs or too large a spread: use more seeds"
    if test.low == test.high:
        more = "; all pairs differ by the same amount, so there is no spread: use a finer metric or more seeds"
    return f"no: not shown to be the same: {said}{more}; {outcome.why}"


def summary_of(outcome: Outcome) -> dict[str, object]:
    """Return an outcome as plain values for --json."""
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


def verdicts_of(outcomes: list[Outcome]) -> dict[Path, ShownVerdict]:
    """Return the page's verdict for each compared run, by folder."""
    found = {}
    for outcome in outcomes:
        for before, now, bits in zip(outcome.before, outcome.now, outcome.bits, strict=False):
            mark, word = ("differs", "Differs") if bits else ("same", "The same bits now")
            told = f"{bits[0].upper()}{bits[1:]}" if bits else "The same bits"
            pair = ((before, "Trained again in the current environment by this gate"),
                    (now, f"Trained by this gate, compared with {before.receipt['run_id']}"))  # fmt: skip
            for run, how in pair:
                found[run.run_dir] = ShownVerdict(mark=mark, word=word, text=f"{how}. {told}.", command="")
    return found


def keep_runs(outcomes: list[Outcome], folder: Path) -> list[Path]:
    """Move today's runs to a folder as the next baselines: EXPERIMENT-RUN, or EXPERIMENT-RUN-2 if that exists.

    Returns:
        their new folders.
    """
    kept = []
    for outcome in outcomes:
        for run in outcome.now:
            kept.append(first_free(folder / f"{outcome.experiment}-{run.run_dir.name}"))
            make_folder(kept[-1].parent)
            shutil.move(run.run_dir, kept[-1])
    return kept
