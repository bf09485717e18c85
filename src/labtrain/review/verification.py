"""`labtrain verify`: check whether a receipt is true on this machine, first without training, then by training again.

The rerun's trail is compared with the recorded one line by line, and the rerun stops at the first difference. Then it
trains once more, from the last common checkpoint. This shows whether this machine gives the same difference again. If
the trail's sums cannot identify the tensor, it also gives tensors to compare.

A verdict needs a comparison: at least one line of the trail, or the results of a whole run.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from labtrain.base import untrusted
from labtrain.base.console import quoted, shown, warn
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.permissions import open_inside
from labtrain.base.untrusted import damage_of, scratch_folder
from labtrain.environment.from_lock import Interpreter
from labtrain.record.differences import Difference, Divergence, open_run, shown_value
from labtrain.record.own_runs import is_own
from labtrain.record.provenance import PATCH
from labtrain.record.receipt import FILE, Receipt, find, read
from labtrain.record.trail import BEST_UNSURE, TRAIL, Line, read_trail
from labtrain.review.inspection import check_checkpoints, composed_differently, state_differences
from labtrain.review.replay import Replay, code_of, home_of, with_filters
from labtrain.review.retrace import Case, Reached, Say, follow, narrow
from labtrain.review.sandbox import Sandbox, make_sandbox
from labtrain.review.signature import FILE as SIGNATURE
from labtrain.review.signature import check_signature
from labtrain.review.trust import Ask, admit
from labtrain.review.verdicts import VERIFIED, check_key, note

NOT_COMPARED = "not compared"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The result of verifying a receipt.

    Attributes:
        same: whether the rerun gave the same bits, as far as it trained; None: nothing was compared.
        differences: found without training, and at the rerun's start.
        from_step: the step that the rerun began from.
        to_step: the last step that was the same.
        whole: it trained from the beginning to the end, and the results were compared.
        divergence: the first difference from the trail.
        results: (receipt's, now) of each result that differs.
        found: the result as a sentence.
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
        """`yes` only if steps were trained here and gave the same bits; `unverified` if none was trained."""
        return {True: "yes", False: "no", None: "unverified"}[self.same]

    @property
    def agrees(self) -> bool:
        """Whether the bits are the same, or, if nothing was trained, no difference can change them."""
        return self.same if self.same is not None else not any(each.matters for each in self.differences)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """How to verify a run.

    Attributes:
        steps: number of steps to train; None: to the end; 0: none, and no code of the receipt runs.
        start: the step of a recorded checkpoint to begin from; 0: the beginning.
        segments: stop and resume as the recorded run did, on the same number of devices each time.
        devices: number of devices, in one go; None: as in the receipt.
        signers: an allowed signers file: one of them must have signed the receipt; None: use git's, if there is one.
        key: an SSH key to sign the line of verified.jsonl with.
        changes: configuration keys that differ here, dotted, such as the place of the data.
        trust: train without asking, whoever wrote the code.
        sandbox: train without network and without the user's files (sandbox.py).
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
class Elsewhere:
    """What a run is verified with, if it came from elsewhere or is trained in the environment of its lock.

    Attributes:
        home: the experiment's folder, in a clone or an unpacked bundle; None: the one here.
        root: the folder of the receipt's code and its lock.
        whence: where that is from, in words.
        interpreter: the environment of its lock; None: nothing is trained.
        verdicts: the folder in which the verdict is recorded; None: it is not.
    """

    home: Path | None
    root: Path
    whence: str
    interpreter: Interpreter | None
    verdicts: Path | None

    @property
    def other(self) -> Interpreter | None:
        """The interpreter, if it is not this process's."""
        return None if self.interpreter is None or self.interpreter.current else self.interpreter


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Which steps to train: `start` to `last`, in the receipt's segments or in one go; to the end if `whole`."""

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
    elsewhere: Elsewhere | None = None,
) -> Verdict:
    """Verify a run: check its receipt here, train it again, and compare the bits.

    Args:
        run: its folder or id, or only its receipt, of any name, in a clone of the experiment's repository.
        options: by default the whole run is verified.
        ask: shows the user what would run, and returns whether it may; None: only this user's own runs may.
        say: receives each finding.
        tick: receives each step that was the same.
        elsewhere: the run came from elsewhere, or is trained in another environment.

    Raises:
        ConfigError: the run, its code or the checkpoint cannot be found, or there is nothing to compare.
        DamagedError: the receipt, the trail or a checkpoint was changed after it was written.
        LabtrainError: the training failed or was stopped.
    """
    options = options or VerifyOptions()
    _check_can_sign(options)
    if elsewhere is None and options.steps != 0 and importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"{shown(run)} is trained again, but this is labtrain without its training packages",
            hint=f"labtrain verify {quoted(shown(run))} --locked, which makes the run's own environment",
        )
    with alone(run) as (place, above):
        return _verify(place, above, options, elsewhere, ask=ask, say=say, tick=tick)


def _verify(
    run: Path,
    above: Path,
    options: VerifyOptions,
    elsewhere: Elsewhere | None,
    *,
    ask: Ask | None,
    say: Say,
    tick: Callable[[int], None],
) -> Verdict:
    run_dir, receipt = open_run(run)
    trail = {line["step"]: line for line in read_trail(run_dir)}
    plan = _planned(receipt, trail, options)
    _say_recorded(run_dir, receipt, trail, options, say)
    home = (elsewhere and elsewhere.home) or _home(above, receipt, sandbox=options.sandbox)
    other = elsewhere.other if elsewhere else None
    with scratch_folder("labtrain-verify-", of=shown(run)) as folder:
        if elsewhere is None:
            root, whence = code_of(receipt, run_dir, home, folder)
        else:
            root, whence = elsewhere.root, elsewhere.whence
        say(f"code         {whence}")
        case = Case(run_dir=run_dir, receipt=receipt, trail=trail, root=root, home=home, scratch=folder,
                    devices=options.devices, changes=options.changes, say=say, tick=tick,
                    python=other.python if other else None)  # fmt: skip
        known = options.trust or is_own(receipt, run_dir, home)
        is_here = elsewhere is None or (elsewhere.interpreter is not None and other is None)
        case.tell(state_differences(receipt, root, home, outside=known, here=is_here))
        case.tell(composed_differently(receipt, root) if is_here else [])
        if options.steps == 0:
            return _untrained(case, plan, more="" if is_here else "; the environment was not compared")
        if options.sandbox:
            case.sandbox = _sandbox(case, say, other)
        admit(receipt, run_dir=run_dir, root=root, home=home, sandboxed=options.sandbox, trust=options.trust,
              ask=ask, say=say)  # fmt: skip
        if not options.sandbox:  # in a sandbox nobody is asked, and filters would run outside it
            case.root = with_filters(root, receipt, run_dir, home, folder / "filtered")
        return _trained(case, plan, verdicts=elsewhere.verdicts if elsewhere else run_dir, key=options.key)


@contextmanager
def alone(run: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a run's folder, or its receipt, and the place whose parents may be the experiment.

    A receipt of any other name than receipt.json is verified in a folder of its own, because other receipts may be
    beside it. Its signature NAME.sig counts. A trail and a patch beside it count if they fit. The verdict is added to
    NAME.verified.jsonl.

    Args:
        run: a run's folder or id, or a receipt.

    Raises:
        ConfigError: the file cannot be read.
    """
    if run.name == FILE or not run.is_file():
        found = run if run.name == FILE else find(run)
        yield found, found.parent if found.name == FILE else found
        return
    with scratch_folder("labtrain-receipt-", of=shown(run)) as folder:
        hint = "name a run's folder, its id, or a receipt, which is a JSON file"
        with damage_of(shown(run), hint=hint):
            (folder / FILE).write_bytes(untrusted.read(run))
        for name, beside in ((SIGNATURE, run.with_name(f"{run.name}.sig")), (PATCH, run.with_name(PATCH))):
            with suppress(FileNotFoundError), damage_of(shown(beside), hint=f"ls -l {quoted(beside)}"):
                (folder / name).write_bytes(untrusted.read(beside))
        said, trail = _trail_sha256(folder, run), run.with_name(TRAIL)
        with suppress(FileNotFoundError), damage_of(shown(trail), hint=f"ls -l {quoted(trail)}"):
            if hashlib.sha256(text := untrusted.read(trail, untrusted.LINES_BYTES)).hexdigest() == said:
                (folder / TRAIL).write_bytes(text)
        yield folder, run.absolute()
        if (verdict := folder / VERIFIED).exists():
            append_verdict(run.with_name(f"{run.stem}.{VERIFIED}"), verdict.read_bytes())


def append_verdict(path: Path, line: bytes) -> bool:
    """Append a verdict to a file, following no link; warn and return False if that is not possible."""
    try:
        with open_inside(path.parent, path.name, flags=os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            file.write(line)
    except (OSError, DamagedError) as error:
        why = f"{shown(path)}: {error.strerror}" if isinstance(error, OSError) else error.args[0]
        warn(f"{why}: the verdict is not recorded")
        return False
    return True


def _trail_sha256(folder: Path, run: Path) -> str | None:
    """Return the sha256 of the trail in a receipt, after checking the receipt.

    Raises:
        DamagedError: it is not a valid receipt; names the file.
    """
    try:
        found = read(folder)
    except DamagedError as error:
        if isinstance(error.__cause__, json.JSONDecodeError | UnicodeDecodeError):
            hint = "ask whoever trained the run for its receipt again, if this was one; else: labtrain verify RUN"
            raise DamagedError(f"{shown(run)} is not a receipt: it is not JSON", hint=hint) from None
        said = str(error.args[0]).replace(str(folder / FILE), shown(run))
        raise DamagedError(said, hint="ask whoever trained the run for its receipt again") from None
    return found["trail"]["sha256"] if found else None


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
    say(f"receipt      {receipt['run_id']}, {receipt['status']}, {len(trail)} lines in its trail, digest correct")
    if (origin := receipt["segments"][0].get("origin")) is not None:
        say(f"origin       {origin['checkpoint']} of run {origin['run_id']}, which is not verified here")
    _say_signer(run_dir, options.signers, say)
    say(f"checkpoints  {check_checkpoints(run_dir, receipt)}")


def _untrained(case: Case, plan: _Plan, *, more: str) -> Verdict:
    return _verdict(case, None, start=plan.start, reached=plan.start, ended=False, divergence=None, results={},
                    more=more)  # fmt: skip


def _trained(case: Case, plan: _Plan, *, verdicts: Path | None, key: Path | None) -> Verdict:
    """Train the run again, and record the verdict in verified.jsonl.

    Args:
        case: what is verified.
        plan: which steps.
        verdicts: the folder to record the verdict in; None: do not record it.
        key: to sign the verdict with.
    """
    first = case.replay("first", plan.start)
    legs = legs_of(case.receipt) if plan.segments else [(case.devices, 0)]
    found = follow(case, first, legs, start=plan.start, last=plan.last)
    verdict = _judged(case, first, found, plan)
    if verdicts is not None:
        note(verdicts, case.receipt, hardware=case.hardware, from_step=verdict.from_step, to_step=verdict.to_step,
             whole=verdict.whole, same=bool(verdict.same), found=verdict.found, key=key)  # fmt: skip
    return verdict


def _check_can_sign(options: VerifyOptions) -> None:
    if options.key is not None:
        if options.steps == 0:
            raise ConfigError("--steps 0 trains nothing, so there is no verdict to sign", hint="leave out --key")
        check_key(options.key)


def _home(run_dir: Path, receipt: Receipt, *, sandbox: bool) -> Path:
    """Return the experiment's folder.

    Raises:
        ConfigError: the sandbox would show a whole folder that only the receipt names.
    """
    home = home_of(run_dir, receipt)
    if sandbox and home != Path.cwd() and not (home / "train.py").is_file():
        raise ConfigError(
            f"--sandbox would show all of {shown(home)}, a folder that only the receipt names",
            hint=f"cd {quoted(home)}, if that is the experiment's folder",
        )
    return home


def _judged(case: Case, first: Replay, found: Reached, plan: _Plan) -> Verdict:
    """Return the verdict: where the rerun first differed from the trail, or how its results differ."""
    receipt, trail = case.receipt, case.trail
    divergence, results, reached, more = None, dict[str, tuple[object, object]](), found.same, ""
    if found.line is not None:
        divergence, more = narrow(case, found.line, reached=reached, start=plan.start)
    elif plan.whole:
        now, origin = first.final_receipt(), receipt["segments"][0].get("origin")
        every = receipt["config"]["trail"]["every_n_steps"]
        trained = first.trail_sha256(every) if every else None
        from_beginning = plan.start == (origin["step"] if origin else 0)
        results = results_differently(receipt, now, trail=trained if from_beginning else NOT_COMPARED)
        reached = found.trained
        if reached < max(trail, default=0) or reached < receipt["results"]["steps"]:
            divergence = Divergence(step=reached + 1, phase="length", tensor=None)
    elif reached < plan.last:
        raise LabtrainError(
            f"the rerun ended at step {reached}, expected step {plan.last}",
            hint="labtrain verify without --steps; or start it again, if it was stopped",
        )
    same = divergence is None and not results.keys() - soft_results(receipt)
    return _verdict(case, same, start=plan.start, reached=reached, ended=plan.whole, divergence=divergence,
                    results=results, more=more)  # fmt: skip


def legs_of(receipt: Receipt) -> list[tuple[int | None, int]]:
    """Return (devices, step to stop at, 0: the end) of each segment that contributed to the final state."""
    segments = receipt["segments"]
    legs = []
    for segment, after in zip_longest(segments, segments[1:]):
        stop_at = after["from_step"] if after else 0
        if after is None or stop_at > segment["from_step"]:
            legs.append((segment["devices"], stop_at))
    return legs


def soft_results(receipt: Receipt) -> set[str]:
    """Return the results that can differ although the training's bits are the same; they are reported as not verified.

    These are the trail's digest and the best value, if the receipt says that part of their source was lost; and the
    state's digest, if there are user callbacks: Lightning's ModelCheckpoint has paths in its state.
    """
    notes, own = receipt["determinism"]["notes"], receipt["config"]["callbacks"] or {}
    has_no_best = receipt["results"].get("best") is None or any(note.endswith(BEST_UNSURE) for note in notes)
    found = {"best": has_no_best, "trail's sha256": "missing" in receipt["trail"], "state_digest": any(own.values())}
    return {key for key, is_soft in found.items() if is_soft}


def results_differently(receipt: Receipt, now: Receipt, *, trail: str | None) -> dict[str, tuple[object, object]]:
    """Return (receipt's, now) of each result that differs; a metric's key is `metric NAME`.

    Args:
        receipt: of a complete run.
        now: of the rerun.
        trail: the sha256 of the rerun's trail, with lines of the same steps; None: no trail; NOT_COMPARED.
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
        if repr(mine.get(key)) != repr(theirs.get(key))  # by repr, NaN equals NaN
    }


def _last_step(receipt: Receipt, trail: dict[int, Line], *, steps: int | None, start: int, segments: bool) -> int:
    """Return the last step to compare, 0 for the end; raise ConfigError if nothing can be compared."""
    complete, end = receipt["status"] == "complete", max(trail, default=0)
    if segments and start:
        raise ConfigError("--segments always begins at step 1, so --from cannot be used", hint="leave out --from")
    config = receipt["config"]
    if config["trainer"]["num_nodes"] > 1 and not receipt["determinism"]["any_number_of_devices"]:
        raise ConfigError(
            f"without shards the bits depend on the run's {config['trainer']['num_nodes']} nodes, and verify uses one",
            hint="labtrain verify RUN --steps 0 on one of those nodes checks code and environment",
        )
    # If the machine or environment changed midway, bits may differ. If the configuration changed, no rerun gives them.
    written = ("config.", "code.", "data.")
    changed = [segment["from_step"] for segment in receipt["segments"]
               if any(each["key"].startswith(written) for each in segment["changed"])]  # fmt: skip
    if changed and start < changed[-1]:
        raise ConfigError(
            f"the run resumed with changes at step {changed[-1]}, so it cannot be trained again from the beginning",
            hint=f"--from {changed[-1]}, if that checkpoint is kept",
        )
    if steps == 0:
        return start
    if steps is None and complete:
        if start >= receipt["results"]["steps"]:
            raise ConfigError(
                f"the run has {receipt['results']['steps']} steps",
                hint="--from STEP of a checkpoint before the last step",
            )
        return 0
    last = start + steps if steps is not None else end
    compared = [step for step in trail if start < step <= last]
    if not compared:
        about = f"the trail has steps {min(trail)} to {end}" if trail else f"there is no {TRAIL}"
        raise ConfigError(
            f"nothing to compare in steps {start + 1} to {last if last > start else 'the end'}: {about}",
            hint="--steps and --from within the trail"
            if trail
            else f"put {TRAIL} next to the receipt, or leave out --steps",
        )
    if steps is not None and last > end:
        raise ConfigError(f"the trail ends at step {end}", hint=f"--steps {end - start}")
    return max(compared)


def _sandbox(case: Case, say: Say, other: Interpreter | None) -> Sandbox:
    made = make_sandbox(
        code=case.root, home=case.home, changes=case.changes, interpreter=other.reads if other else None
    )
    say(f"sandbox      {made}")
    for place in made.hidden(case.receipt["config"]):
        if place.partition("=")[0] not in case.changes:
            say(f"             hidden: {place} (--set {place} shows it)")
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
        say(f"signature    by {found.principal}, {found.fingerprint}")
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
        told = f"different: {causes}" if causes else "no difference that can change bits"
        found = f"metadata only, nothing was trained; {told}{more}"
    elif same:
        begun = f"from step {start + 1} " if start else ""
        found = f"the same bits {begun}to the end" if ended else f"the same bits, steps {start + 1} to {reached}"
        found += f", although these differ: {causes}" if causes else ""
        found += f"; not verified: {names}" if names else ""
    elif divergence is not None:
        found = f"not the same bits: {divergence}" + (f"; {more}" if more else "")
        found += f"; possible causes: {causes or 'none recorded in the receipt'}"
    else:
        found = f"all compared steps are the same, but these results differ: {names}"
    return Verdict(same=same, differences=case.told, from_step=start, to_step=reached, whole=ended and not start,
                   divergence=divergence, results=results, found=found)  # fmt: skip
