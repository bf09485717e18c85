"""`labtrain verify`: is a receipt true of this machine? First what can be told without running, then the run again.

The trail of the run that is trained again is held against the recorded one line by line, and the training is stopped at
the first difference. Then it is trained once more, from the last common checkpoint: that tells whether this machine
gives the difference again, and, where the trail's sums cannot say which tensor it is, gives tensors to compare.

No verdict is given of what was not compared: it takes at least one line of the trail, or the results of a whole run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from labtrain.base.console import quoted, shown
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.untrusted import scratch_folder
from labtrain.record.differences import Difference, Divergence, open_run, shown_value
from labtrain.record.own_runs import is_own
from labtrain.record.receipt import Receipt
from labtrain.record.trail import BEST_UNSURE, TRAIL, Line, read_trail
from labtrain.review.inspection import check_checkpoints, composed_differently, state_differences
from labtrain.review.replay import Replay, code_of, home_of, with_filters
from labtrain.review.retrace import Case, Reached, Say, follow, narrow
from labtrain.review.sandbox import Sandbox, make_sandbox
from labtrain.review.signature import check_signature
from labtrain.review.trust import Ask, admit
from labtrain.review.verdicts import check_key, note

NOT_COMPARED = "not compared"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What verifying a receipt came to.

    Attributes:
        same: whether the same bits came out, as far as it was trained; None: nothing was compared.
        differences: of what can be told without running, and of the run's own start.
        from_step: that the training began from.
        to_step: the last step that was the same.
        whole: it was trained from the beginning to its end, and its results were compared.
        divergence: where it parts from the receipt.
        results: (receipt's, now) of each result that is not the same.
        found: all that in a sentence.
    """

    same: bool | None
    differences: list[Difference]
    from_step: int
    to_step: int
    whole: bool
    divergence: Divergence | None
    results: dict[str, tuple[object, object]]
    found: str

    @property
    def word(self) -> str:
        """`yes` for steps that were trained here and gave the same bits, alone; where none was trained `unverified`."""
        return {True: "yes", False: "no", None: "unverified"}[self.same]

    @property
    def agrees(self) -> bool:
        """Whether nothing speaks against it: the same bits, or, where nothing was trained, no cause for others."""
        return self.same if self.same is not None else not any(each.matters for each in self.differences)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """How a run is verified.

    Attributes:
        steps: how many to train; None: to its end; 0: none, and nothing of the receipt's runs.
        start: the step of a recorded checkpoint to begin from; 0: the beginning.
        segments: train it in the receipt's own segments, stopped and resumed as it was, on as many devices.
        devices: on how many, in one go; None: as the receipt says.
        signers: an allowed signers file: one of them must have signed the receipt; None: whom git allows may have.
        key: an SSH key, to sign the line of verified.jsonl with.
        changes: keys of the configuration that differ here, dotted: where the data lies, say.
        trust: train it without a question, whoever wrote it.
        sandbox: train it where it finds no network and nothing of the user's (sandbox.py).
    """

    steps: int | None = None
    start: int = 0
    segments: bool = False
    devices: int | None = None
    signers: Path | None = None
    key: Path | None = None
    changes: dict[str, object] = field(default_factory=dict)
    trust: bool = False
    sandbox: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Which steps are trained: `start` to `last`, in the receipt's segments or in one go; to the end if `whole`."""

    start: int
    last: int
    segments: bool
    whole: bool


def verify_run(
    run: Path,
    options: VerifyOptions | None = None,
    *,
    ask: Ask | None = None,
    say: Say = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Verify a run: whether its receipt is true here, and whether training it again gives the same bits.

    Args:
        run: its folder, or its receipt alone, in a clone of the experiment's repository.
        options: the defaults verify all of it.
        ask: shows a person what would run, and returns whether it may; None: only this user's own runs may.
        say: is told what was found, as it is found.
        tick: is told each step that was the same.

    Raises:
        ConfigError: the run, its code or the checkpoint cannot be found, or nothing could be compared.
        DamagedError: receipt, trail or a checkpoint was changed after it was written.
        LabtrainError: the training fails, or was stopped.
    """
    options = options or VerifyOptions()
    _check_can_sign(options)
    run_dir, receipt = open_run(run)
    trail = {line["step"]: line for line in read_trail(run_dir)}
    plan = _planned(receipt, trail, options)
    _say_recorded(run_dir, receipt, trail, options, say)
    home = _home(run_dir, receipt, sandbox=options.sandbox)
    with scratch_folder("labtrain-verify-") as folder:
        root, whence = code_of(receipt, run_dir, home, folder)
        say(f"code         {whence}")
        case = Case(run_dir=run_dir, receipt=receipt, trail=trail, root=root, home=home, scratch=folder,
                    devices=options.devices, changes=options.changes, say=say, tick=tick)  # fmt: skip
        known = options.trust or is_own(receipt, run_dir, home)
        case.tell(state_differences(receipt, root, home, outside=known) + composed_differently(receipt, root))
        if options.steps == 0:
            return _untrained(case, plan)
        if options.sandbox:
            case.sandbox = _sandbox(receipt, root, home, case.changes, say)
        admit(receipt, run_dir=run_dir, root=root, home=home, sandboxed=options.sandbox, trust=options.trust,
              ask=ask, say=say)  # fmt: skip
        if not options.sandbox:  # nobody was asked, and they would run outside of it
            case.root = with_filters(root, receipt, run_dir, home, folder / "filtered")
        return _trained(case, plan, key=options.key)


def _planned(receipt: Receipt, trail: dict[int, Line], options: VerifyOptions) -> _Plan:
    start, segments, origin = options.start, options.segments, receipt["segments"][0].get("origin")
    if origin is not None and not start:
        start, segments = origin["step"], False
    return _Plan(
        start=start,
        last=_last_step(receipt, trail, steps=options.steps, start=start, segments=segments),
        segments=segments,
        whole=options.steps is None and receipt["status"] == "complete",
    )


def _say_recorded(run_dir: Path, receipt: Receipt, trail: dict[int, Line], options: VerifyOptions, say: Say) -> None:
    say(f"receipt      {receipt['run_id']}, {receipt['status']}, {len(trail)} lines in its trail, digest right")
    if (origin := receipt["segments"][0].get("origin")) is not None:
        say(f"origin       {origin['checkpoint']} of the run {origin['run_id']}, which is not verified here")
    _say_signer(run_dir, options.signers, say)
    say(f"checkpoints  {check_checkpoints(run_dir, receipt)}")


def _untrained(case: Case, plan: _Plan) -> Verdict:
    return _verdict(case, None, start=plan.start, reached=plan.start, ended=False, divergence=None, results={}, more="")


def _trained(case: Case, plan: _Plan, *, key: Path | None) -> Verdict:
    """Train the run again, and note the verdict beside it."""
    first = case.replay("first", plan.start)
    legs = legs_of(case.receipt) if plan.segments else [(case.devices, 0)]
    found = follow(case, first, legs, start=plan.start, last=plan.last)
    verdict = _judged(case, first, found, plan)
    note(case.run_dir, case.receipt, hardware=case.hardware, from_step=verdict.from_step, to_step=verdict.to_step,
         whole=verdict.whole, same=bool(verdict.same), found=verdict.found, key=key)  # fmt: skip
    return verdict


def _check_can_sign(options: VerifyOptions) -> None:
    if options.key is not None:
        if options.steps == 0:
            raise ConfigError("--steps 0 trains nothing: there is no verdict to sign", hint="without --key")
        check_key(options.key)


def _home(run_dir: Path, receipt: Receipt, *, sandbox: bool) -> Path:
    """Return the experiment's folder.

    Raises:
        ConfigError: a sandbox would show code all of a folder that only the receipt names.
    """
    home = home_of(run_dir, receipt)
    if sandbox and home != Path.cwd() and not (home / "train.py").is_file():
        raise ConfigError(
            f"--sandbox would show all of {shown(home)}, which the receipt's command alone names",
            hint=f"cd {quoted(home)}, where that is the experiment's folder",
        )
    return home


def _judged(case: Case, first: Replay, found: Reached, plan: _Plan) -> Verdict:
    """Return the verdict of what was trained: where it parted from the trail, or how its results differ."""
    receipt, trail = case.receipt, case.trail
    divergence, results, reached, more = None, dict[str, tuple[object, object]](), found.same, ""
    if found.line is not None:
        divergence, more = narrow(case, found.line, reached=reached, start=plan.start)
    elif plan.whole:
        now, origin = first.receipt(), receipt["segments"][0].get("origin")
        assert now is not None
        every = receipt["config"]["trail"]["every_n_steps"]
        trained = first.trail_sha256(every) if every else None
        from_beginning = plan.start == (origin["step"] if origin else 0)
        results = results_differently(receipt, now, trail=trained if from_beginning else NOT_COMPARED)
        reached = found.trained
        if reached < max(trail, default=0) or reached < receipt["results"]["steps"]:
            divergence = Divergence(step=reached + 1, phase="length", tensor=None)
    elif reached < plan.last:
        raise LabtrainError(
            f"the rerun ended at step {reached}, before step {plan.last}, up to which it was to be compared",
            hint="labtrain verify without --steps; or was it stopped?",
        )
    same = divergence is None and not results.keys() - soft_results(receipt)
    return _verdict(case, same, start=plan.start, reached=reached, ended=plan.whole, divergence=divergence,
                    results=results, more=more)  # fmt: skip


def legs_of(receipt: Receipt) -> list[tuple[int | None, int]]:
    """Return (devices, step at which it stops) of each segment that the run's end came from; 0: its end."""
    segments = receipt["segments"]
    legs = []
    for segment, after in zip_longest(segments, segments[1:]):
        stop_at = after["from_step"] if after else 0
        if after is None or stop_at > segment["from_step"]:
            legs.append((segment["devices"], stop_at))
    return legs


def soft_results(receipt: Receipt) -> set[str]:
    """Return which results can be others without any other bits of the training: they are told as not verified.

    The trail's digest and the best value, where the receipt itself says that a part of what they are read off was lost;
    and the state's digest, where there are callbacks of one's own: Lightning's ModelCheckpoint keeps paths in its.
    """
    notes, own = receipt["determinism"]["notes"], receipt["config"]["callbacks"] or {}
    has_no_best = receipt["results"].get("best") is None or any(note.endswith(BEST_UNSURE) for note in notes)
    found = {"best": has_no_best, "trail's sha256": "missing" in receipt["trail"], "state_digest": any(own.values())}
    return {key for key, is_soft in found.items() if is_soft}


def results_differently(receipt: Receipt, now: Receipt, *, trail: str | None) -> dict[str, tuple[object, object]]:
    """Return (receipt's, now) of each result that is not the same: a metric's key is `metric NAME`.

    Args:
        receipt: of a complete run.
        now: of another.
        trail: the sha256 of the other's trail, with as many lines; None: it has none; NOT_COMPARED.
    """
    mine, theirs = (
        {key: value for key, value in each["results"].items() if key != "metrics"}
        | {f"metric {name}": value for name, value in each["results"]["metrics"].items()}
        | ({"trail's sha256": sha} if trail != NOT_COMPARED else {})
        for each, sha in ((receipt, receipt["trail"]["sha256"]), (now, trail))
    )
    return {
        key: (mine.get(key), theirs.get(key))
        for key in dict.fromkeys([*mine, *theirs])
        if repr(mine.get(key)) != repr(theirs.get(key))  # NaN is itself here
    }


def _last_step(receipt: Receipt, trail: dict[int, Line], *, steps: int | None, start: int, segments: bool) -> int:
    """Return the step at which enough is compared, 0 for its end, and refuse what cannot be told."""
    complete, end = receipt["status"] == "complete", max(trail, default=0)
    if segments and start:
        raise ConfigError("--segments begins at the beginning", hint="without --from")
    config = receipt["config"]
    if config["trainer"]["num_nodes"] > 1 and not receipt["determinism"]["any_number_of_devices"]:
        raise ConfigError(
            f"without shards its bits depend on its {config['trainer']['num_nodes']} nodes, and here is one",
            hint="labtrain verify RUN --steps 0 tells of code and environment on one of those nodes",
        )
    # Where another machine or environment came in the middle, bits may differ; with another configuration it is no run.
    written = ("config.", "code.", "data.")
    changed = [segment["from_step"] for segment in receipt["segments"]
               if any(each["key"].startswith(written) for each in segment["changed"])]  # fmt: skip
    if changed and start < changed[-1]:
        raise ConfigError(
            f"the run went on after changes at step {changed[-1]}: no one configuration gives it from the beginning",
            hint=f"--from {changed[-1]}, where that checkpoint is kept",
        )
    if steps == 0:
        return start
    if steps is None and complete:
        if start >= receipt["results"]["steps"]:
            raise ConfigError(f"it has {receipt['results']['steps']} steps", hint="--from a checkpoint before its end")
        return 0
    last = start + steps if steps is not None else end
    compared = [step for step in trail if start < step <= last]
    if not compared:
        about = f"the trail's lines are of steps {min(trail)} to {end}" if trail else f"no {TRAIL} lies beside it"
        raise ConfigError(
            f"nothing could be compared of steps {start + 1} to {last if last > start else 'its end'}: {about}",
            hint="--steps and --from within the trail"
            if trail
            else f"put {TRAIL} beside the receipt, or without --steps",
        )
    if steps is not None and last > end:
        raise ConfigError(f"the trail ends at step {end}", hint=f"--steps {end - start}")
    return max(compared)


def _sandbox(receipt: Receipt, root: Path, home: Path, changes: dict[str, object], say: Say) -> Sandbox:
    made = make_sandbox(code=root, home=home, changes=changes)
    say(f"sandbox      {made}")
    for place in made.hidden(receipt["config"]):
        if place.partition("=")[0] not in changes:
            say(f"             hides {place}: --set {place} shows it")
    return made


def _say_signer(run_dir: Path, signers: Path | None, say: Say) -> None:
    try:
        found = check_signature(run_dir, signers=signers)
    except DamagedError:
        raise
    except LabtrainError as error:
        if signers is not None:
            raise
        say(f"signature    not checked: {error.args[0]}")
        return
    if found is not None:
        say(f"signature    of {found.principal}, {found.fingerprint}")
    elif signers is not None:
        raise ConfigError(
            f"{shown(run_dir)} is not signed", hint=f"labtrain sign {shown(run_dir)}, by one of {signers}"
        )


def _verdict(
    case: Case,
    same: bool | None,
    *,
    start: int,
    reached: int,
    ended: bool,
    divergence: Divergence | None,
    results: dict[str, tuple[object, object]],
    more: str,
) -> Verdict:
    causes = ", ".join(each.key for each in case.told if each.matters)
    names = ", ".join(f"{key} {shown_value(a)}, now {shown_value(b)}" for key, (a, b) in results.items())
    if same is None:
        told = f"not the same: {causes}" if causes else "the same"
        found = f"nothing was trained again; what can be told without is {told}"
    elif same:
        begun = f"from step {start + 1} " if start else ""
        found = f"the same bits, {begun}to its end" if ended else f"the same bits, steps {start + 1} to {reached}"
        found += f", although these differ: {causes}" if causes else ""
        found += f"; not verified: {names}" if names else ""
    elif divergence is not None:
        found = f"not the same bits: {divergence}" + (f"; {more}" if more else "")
        found += f"; what differs and can be the cause: {causes or 'nothing that the receipt holds'}"
    else:
        found = f"each step that could be compared is the same, the results are not as the receipt says: {names}"
    return Verdict(same=same, differences=case.told, from_step=start, to_step=reached, whole=ended and not start,
                   divergence=divergence, results=results, found=found)  # fmt: skip
