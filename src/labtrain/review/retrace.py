"""Train a recorded run again and compare each step with its trail, up to the first difference; then train once more.

No torch.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from labtrain.base.console import shown
from labtrain.base.contracts import Hardware, Origin
from labtrain.base.errors import ConfigError, LabtrainError, StoreError
from labtrain.record.differences import Difference, Divergence, shown_value
from labtrain.record.digests import read_weights
from labtrain.record.own_runs import checkpoints_of, opened
from labtrain.record.provenance import machine
from labtrain.record.receipt import Receipt
from labtrain.record.resume import checkpoint_digest
from labtrain.record.trail import Line, differing_tensor, phase_of
from labtrain.review.inspection import told_differences
from labtrain.review.replay import Replay
from labtrain.review.sandbox import Sandbox
from labtrain.stores.layout import list_checkpoints, stores_of
from labtrain.stores.store import Checkpoint, Store

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Case:
    """What is verified, and the findings so far."""

    run_dir: Path
    receipt: Receipt
    trail: dict[int, Line]
    root: Path
    home: Path
    scratch: Path
    devices: int | None
    changes: dict[str, object]
    say: Say
    tick: Callable[[int], None]
    sandbox: Sandbox | None = None
    python: Path | None = None  # of another environment
    told: list[Difference] = field(default_factory=list)
    hardware: Hardware = field(default_factory=machine)

    def tell(self, found: list[Difference]) -> None:
        """Print the differences that were not printed before."""
        known = {each.key for each in self.told}
        new = [each for each in found if each.key not in known]
        self.told += new
        for each in new:
            kind = "differs" if each.matters else "no effect"
            self.say(f"{kind:<11}  {each.key}  {shown_value(each.a)} -> {shown_value(each.b)}")

    def replay(self, name: str, begin: int) -> Replay:
        """Return a rerun that begins at a recorded checkpoint."""
        made = Replay(
            self.receipt,
            self.root,
            home=self.home,
            scratch=self.scratch / name,
            changes=self.changes,
            sandbox=self.sandbox,
            python=self.python,
        )
        if made.others and not self.changes:
            self.tell([Difference(key=f"environment variable {' or '.join(made.others)}", a="the run's value",
                                  b="another value", matters=True)])  # fmt: skip
        if begin:
            made.begin_at(self.fetched(begin))
        return made

    def checkpoints(self) -> dict[int, Checkpoint]:
        """Return the recorded checkpoints that a training can begin from, by step, from every store of the run."""
        place = checkpoints_of(self.run_dir, self.receipt)
        return {each.step: each for store in stores_of(self.run_dir, place) for each in store.checkpoints()
                if not each.finished}  # fmt: skip

    def fetched(self, step: int) -> Path:
        """Return the folder of a recorded checkpoint, after comparing it with its manifest.

        Raises:
            ConfigError: there is no checkpoint of that step.
        """
        there = self.checkpoints()
        if step not in there and self.origin is not None and self.origin["step"] == step:
            return self._fetched_origin(self.origin)
        if step not in there:
            steps = ", ".join(map(str, sorted(there)[-10:])) or "none"
            raise ConfigError(
                f"no checkpoint of step {step}, only of {steps}", hint=f"labtrain store ls {shown(self.run_dir)}"
            )
        return there[step].store.fetch(there[step], self.scratch / there[step].name)[0]

    @property
    def origin(self) -> Origin | None:
        """The receipt's entry about the checkpoint of another run that this run began from."""
        return self.receipt["segments"][0].get("origin")

    def _fetched_origin(self, origin: Origin) -> Path:
        beside = self.run_dir.resolve().parent / origin["run_id"]  # where the runs are now, maybe on another machine
        for store in (*stores_of(beside, str(beside / "checkpoints")), Store(opened(origin["url"]))):
            for checkpoint in store.checkpoints():
                if (
                    checkpoint.name == origin["checkpoint"]
                    and checkpoint_digest(store.manifest(checkpoint)) == origin["digest"]
                ):
                    return store.fetch(checkpoint, self.scratch / checkpoint.name)[0]
        raise ConfigError(
            f"the run began from {origin['checkpoint']} of run {origin['run_id']}, found neither next to it nor"
            f" in {origin['url']}",
            hint=f"put the folder {origin['run_id']} next to this run; or --from STEP of a kept checkpoint",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """How far a rerun was compared.

    Attributes:
        trained: the last step that was trained.
        same: the last step that was compared and was the same.
        line: the first line that differs; None if all are the same.
    """

    trained: int
    same: int
    line: Line | None


def follow(case: Case, replay: Replay, legs: list[tuple[int | None, int]], *, start: int, last: int) -> Reached:
    """Train until a line differs from the trail.

    Args:
        case: has the trail; a step without a line is trained and not compared.
        replay: the rerun.
        legs: (devices, step to stop at, 0: the end) of each leg.
        start: the step to begin from.
        last: the last step to compare; 0: the end.
    """
    trained, same, begun = start, start, False
    end = case.receipt["results"].get("steps") or max(case.trail, default=0)
    for devices, stop_at in legs:
        with closing(replay.lines(devices=devices, stop_at=stop_at)) as lines:
            for line in lines:
                if not begun and (now := replay.receipt()) is not None:
                    begun = True
                    case.hardware = now["hardware"]
                    case.tell(list(told_differences(case.receipt, now)))
                trained = line["step"]
                wanted = case.trail.get(trained)
                if wanted is None and trained > end and not last:
                    return Reached(trained=trained, same=same, line=line)
                if wanted is not None:
                    if phase_of(wanted, line) is not None:
                        return Reached(trained=trained, same=same, line=line)
                    same = trained
                    case.tick(same)
                if last and trained >= last:
                    return Reached(trained=trained, same=same, line=None)
    return Reached(trained=trained, same=same, line=None)


def narrow(case: Case, line: Line, *, reached: int, start: int) -> tuple[Divergence, str]:
    """Return which phase and tensor of a step differ, and whether they differ again from the last common checkpoint.

    If the second rerun fails, the first result is still returned.
    """
    step, wanted = line["step"], case.trail.get(line["step"])
    if wanted is None:
        return Divergence(step=step, phase="length", tensor=None), ""
    tensor = differing_tensor(wanted, line, case.receipt["trail"]["tensors"])
    found = Divergence(step=step, phase=phase_of(wanted, line), tensor=tensor)
    try:
        there, more = set(case.checkpoints()), ""
    except StoreError as error:
        there, more = set(), f"; its checkpoints cannot be read: {error.args[0]}"
    begin = max((each for each in there if start <= each <= reached), default=start)
    after = min((each for each in there if each >= step), default=0) if tensor is None else 0
    try:
        again, second = _again(case, step, begin=begin, after=after)
        names = []
        if after:
            wanted_weights = case.fetched(after)
            with second.left("checkpoint") as made:
                names = different_tensors(wanted_weights, made)
    except LabtrainError as error:
        return found, f"not trained again from step {begin}: {error.args[0]}{more}"
    if again is not None and phase_of(wanted, again) is None:
        told = f"no difference when trained again from step {begin}: results on this machine are not reproducible"
    elif again == line:
        told = f"the same difference when trained again from step {begin}: results on this machine are reproducible"
    else:
        told = f"another difference when trained again from step {begin}: results on this machine are not reproducible"
    if reached + 1 < step:
        told = f"or since step {reached + 1}: the trail has no line for it; {told}"
    if names:
        found = replace(found, tensor=names[0])
        told += f"; {len(names)} tensors differ at step {after}"
    return found, told + more


def _again(case: Case, step: int, *, begin: int, after: int) -> tuple[Line | None, Replay]:
    """Train again from a checkpoint to a step or a later one; return that step's line and the rerun."""
    found: Line | None = None
    second = case.replay("second", begin)
    with closing(second.lines(devices=case.devices, stop_at=after or step)) as lines:
        for each in lines:
            if each["step"] == step:
                found = each
                if not after:
                    break
    return found, second


def different_tensors(checkpoint: Path, run_dir: Path) -> list[str]:
    """Return the names of the weights that differ between a checkpoint and a run's newest one."""
    (newest, _) = list_checkpoints(run_dir / "checkpoints")[-1]
    pairs = zip_longest(read_weights(checkpoint), read_weights(newest))
    return [(mine or theirs or ("",))[0] for mine, theirs in pairs if mine != theirs]
