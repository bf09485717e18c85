"""`labtrain verify`: is a receipt true of this machine? First what can be told without running, then the run again.

The trail of the run that is trained again is held against the recorded one line by line, and the training is stopped at
the first difference. Then it is trained once more, from the last common checkpoint: that tells whether this machine
gives the difference again, and, where the trail's sums cannot say which tensor it is, gives tensors to compare.
"""

import getpass
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from labtrain import __version__
from labtrain.catalog import checkpoint_place, list_checkpoints, stores_of
from labtrain.compare import Difference, Divergence, open_run, shown_value
from labtrain.digests import read_weights
from labtrain.errors import ConfigError, DamagedError, LabtrainError
from labtrain.inspection import check_checkpoints, composed_differently, state_differences, told_differences
from labtrain.provenance import machine, timestamp
from labtrain.receipt import Receipt
from labtrain.replay import Replay, code_of, home_of
from labtrain.run import shown
from labtrain.signature import check_signature
from labtrain.trail import TRAIL, Line, differing_tensor, phase_of, read_trail

VERIFIED = "verified.jsonl"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What verifying a receipt came to.

    Attributes:
        same: whether the same bits came out, as far as it was trained; None: nothing was trained.
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
    results: dict[str, tuple[Any, Any]]
    found: str


def verify_run(
    run: Path,
    *,
    steps: int | None = None,
    start: int = 0,
    segments: bool = False,
    devices: int | None = None,
    signers: Path | None = None,
    say: Say = lambda _: None,
) -> Verdict:
    """Verify a run: whether its receipt is true here, and whether training it again gives the same bits.

    Args:
        run: its folder, or its receipt alone, in a clone of the experiment's repository.
        steps: how many to train; None: to its end; 0: none, only what the start of the run tells.
        start: the step of a recorded checkpoint to begin from; 0: the beginning.
        segments: train it in the receipt's own segments, stopped and resumed as it was, on as many devices.
        devices: on how many, in one go; None: as the receipt says.
        signers: of an allowed signers file: one of them must have signed the receipt; None: whom git allows may have.
        say: is told what was found, as it is found.

    Raises:
        ConfigError: the run, its code or the checkpoint cannot be found.
        DamagedError: receipt, trail or a checkpoint was changed after it was written.
        LabtrainError: the training fails.
    """
    run_dir, receipt = open_run(run)
    trail = {line["step"]: line for line in read_trail(run_dir)}
    end = max(trail, default=0)
    _refuse(receipt, end, steps=steps, start=start, segments=segments)
    say(f"receipt      {receipt['run_id']}, {receipt['status']}, {end} steps in its trail, digest right")
    _say_signer(run_dir, signers, say)
    checked = check_checkpoints(run_dir, receipt)
    say(
        f"checkpoints  {checked} here, each as its manifest and the receipt say"
        if checked
        else "checkpoints  none here"
    )
    home = home_of(run_dir, receipt)
    whole = steps is None and receipt["status"] == "complete"
    last = 0 if whole else end if steps is None else start + max(steps, 1)
    with tempfile.TemporaryDirectory(prefix="labtrain-verify-") as folder:
        root, whence = code_of(receipt, run_dir, home, Path(folder))
        say(f"code         {whence}")
        told = [*state_differences(receipt, root), *composed_differently(receipt, root)]
        _say_differences(told, say)

        def at_start(now: Receipt) -> None:
            keys = {each.key for each in told}
            new = [each for each in told_differences(receipt, now) if each.key not in keys]
            told.extend(new)
            _say_differences(new, say)

        def replay(name: str, begin: int) -> Replay:
            made = Replay(receipt, root, home=home, scratch=Path(folder, name))
            if begin:
                made.begin_at(_checkpoint(run_dir, receipt, begin, Path(folder)))
            return made

        first = replay("first", start)
        legs = legs_of(receipt) if segments else [(devices, 0)]
        reached, line = follow(first, trail, legs, start=start, last=last, at_start=at_start)
        if steps == 0:
            return _verdict(None, told, start, 0, False, None, {}, "nothing was trained again")
        results, divergence, more = {}, None, ""
        if line is not None:
            divergence, more = narrow(line, trail, run_dir, receipt, replay, start=start, devices=devices)
        elif whole:
            now = first.receipt()
            assert now is not None
            recorded = receipt["config"]["trail"]["every_n_steps"] > 0
            results = results_differently(receipt, now, trails=recorded and not start)
            if reached < end:
                divergence = Divergence(step=reached + 1, phase="length", tensor=None)
        same = line is None and not results and divergence is None
        verdict = _verdict(same, told, start, reached, whole, divergence, results, more)
        note(run_dir, receipt, verdict)
        return verdict


def follow(
    replay: Replay,
    trail: dict[int, Line],
    legs: list[tuple[int | None, int]],
    *,
    start: int,
    last: int,
    at_start: Callable[[Receipt], None],
) -> tuple[int, Line | None]:
    """Train until a line is not as in the trail; return the last step that was the same, and that line.

    Args:
        replay: what is trained.
        trail: recorded, by step; a step that it lacks is not compared.
        legs: (devices, step at which it stops, 0: its end) of each.
        start: the step that it begins from.
        last: the step at which it is enough; 0: its end.
        at_start: gets its receipt, when it has begun.
    """
    same, begun, end = start, False, max(trail, default=0)
    for devices, stop_at in legs:
        if stop_at and stop_at <= start:
            continue
        with closing(replay.lines(devices=devices, stop_at=stop_at)) as lines:
            for line in lines:
                if not begun:
                    begun = True
                    at_start(replay.receipt() or {})
                wanted = trail.get(line["step"])
                if wanted is None and 0 < end < line["step"] and not last:
                    return same, line
                if wanted is not None and phase_of(wanted, line) is not None:
                    return same, line
                same = line["step"]
                if last and same >= last:
                    return same, None
    return same, None


def narrow(
    line: Line,
    trail: dict[int, Line],
    run_dir: Path,
    receipt: Receipt,
    replay: Callable[[str, int], Replay],
    *,
    start: int,
    devices: int | None,
) -> tuple[Divergence, str]:
    """Say which phase and tensor of a step differ, and whether they do again, from the last common checkpoint on."""
    step = line["step"]
    wanted = trail.get(step)
    if wanted is None:
        return Divergence(step=step, phase="length", tensor=None), ""
    phase, tensor = phase_of(wanted, line), differing_tensor(wanted, line, receipt["trail"]["tensors"])
    here = {manifest["step"]: folder for folder, manifest in list_checkpoints(run_dir / "checkpoints")
            if not manifest.get("finished")}  # fmt: skip
    begin = max((each for each in here if start <= each < step), default=start)
    after = min((each for each in here if each >= step), default=0) if tensor is None else 0
    again: Line | None = None
    second = replay("second", begin)
    with closing(second.lines(devices=devices, stop_at=after or step)) as lines:
        for each in lines:
            if each["step"] == step:
                again = each
                if not after:
                    break
    if again is not None and phase_of(wanted, again) is None:
        more = f"not when trained again from step {begin}: this machine does not give the same bits twice"
    elif again == line:
        more = f"the same bits again when trained again from step {begin}: this machine agrees with itself"
    else:
        more = f"other bits again when trained again from step {begin}: this machine does not agree with itself"
    if after and (names := different_tensors(here[after], second.run_dir)):
        tensor = names[0]
        more += f"; {len(names)} tensors differ at step {after}"
    return Divergence(step=step, phase=phase, tensor=tensor), more


def different_tensors(checkpoint: Path, run_dir: Path) -> list[str]:
    """Return the names of the weights that differ between a checkpoint and the newest one of a run."""
    (newest, _) = list_checkpoints(run_dir / "checkpoints")[-1]
    pairs = zip_longest(read_weights(checkpoint), read_weights(newest))
    return [(mine or theirs or ("",))[0] for mine, theirs in pairs if mine != theirs]


def results_differently(receipt: Receipt, now: Receipt, *, trails: bool) -> dict[str, tuple[Any, Any]]:
    """Return (receipt's, now) of each result that is not the same, with `trails` of the trail's sha256 as well."""
    mine, theirs = (
        {key: value for key, value in each["results"].items() if key != "metrics"}
        | each["results"]["metrics"]
        | ({"trail's sha256": each["trail"]["sha256"]} if trails else {})
        for each in (receipt, now)
    )
    return {
        key: (mine.get(key), theirs.get(key))
        for key in dict.fromkeys([*mine, *theirs])
        if repr(mine.get(key)) != repr(theirs.get(key))  # NaN is itself here
    }


def legs_of(receipt: Receipt) -> list[tuple[int | None, int]]:
    """Return (devices, step at which it stops) of each segment that the run's end came from; 0: its end."""
    segments = receipt["segments"]
    legs = []
    for segment, after in zip_longest(segments, segments[1:]):
        stop_at = after["from_step"] if after else 0
        if after is None or stop_at > segment["from_step"]:
            legs.append((segment["devices"], stop_at))
    return legs


def _checkpoint(run_dir: Path, receipt: Receipt, step: int, into: Path) -> Path:
    """Return the folder of a recorded checkpoint of a step, fetched where it is elsewhere."""
    place = checkpoint_place(run_dir, receipt["config"]["checkpoint"]["url"])
    there = [each for store in stores_of(run_dir, place) for each in store.checkpoints() if not each.finished]
    for each in there:
        if each.step == step:
            return each.store.fetch(each, into / each.name)[0]
    steps = ", ".join(str(each.step) for each in there) or "none"
    raise ConfigError(f"no checkpoint of step {step} in {place}: there are {steps}", hint=f"labtrain store ls {place}")


def _refuse(receipt: Receipt, end: int, *, steps: int | None, start: int, segments: bool) -> None:
    """Refuse what cannot be told."""
    if not end and (steps or receipt["status"] != "complete"):
        raise ConfigError(
            f"no {TRAIL} lies beside the receipt, of a run that is {receipt['status']}: there is nothing to compare"
            + (f" {steps} steps with" if steps else ""),
            hint=f"put {TRAIL} beside it" + (", or without --steps" if steps else ""),
        )
    if start >= end > 0 or (steps and start + steps > end):
        raise ConfigError(f"the trail ends at step {end}", hint=f"--from and --steps within {end}")
    changed = [segment["from_step"] for segment in receipt["segments"] if segment["changed"]]
    if changed and start < changed[-1]:
        raise ConfigError(
            f"the run went on after changes at step {changed[-1]}: no one configuration gives it from the beginning",
            hint=f"--from {changed[-1]}, where that checkpoint is kept",
        )
    if segments and start:
        raise ConfigError("--segments begins at the beginning", hint="without --from")


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


def _say_differences(found: list[Difference], say: Say) -> None:
    for each in found:
        kind = "differs" if each.matters else "no cause"
        say(f"{kind:<11}  {each.key}  {shown_value(each.a)} -> {shown_value(each.b)}")


def _verdict(
    same: bool | None,
    told: list[Difference],
    start: int,
    reached: int,
    whole: bool,
    divergence: Divergence | None,
    results: dict[str, tuple[Any, Any]],
    more: str,
) -> Verdict:
    causes = ", ".join(each.key for each in told if each.matters)
    if same is None:
        found = f"{more}; what can be told without is {f'not the same: {causes}' if causes else 'the same'}"
    elif same:
        found = f"the same bits, {'to its end' if whole else f'steps {start + 1} to {reached}'}"
        found += f", although these differ: {causes}" if causes else ""
    elif divergence is not None:
        found = f"not the same bits: {divergence}" + (f"; {more}" if more else "")
        found += f"; what differs and can be the cause: {causes or 'nothing that the receipt holds'}"
    else:
        names = ", ".join(f"{key} {shown_value(a)}, now {shown_value(b)}" for key, (a, b) in results.items())
        found = f"each step that could be compared is the same, the results are not as the receipt says: {names}"
    return Verdict(same=same, differences=told, from_step=start, to_step=reached, whole=whole, divergence=divergence,
                   results=results, found=found)  # fmt: skip


def note(run_dir: Path, receipt: Receipt, verdict: Verdict) -> None:
    """Append a verdict to verified.jsonl beside the receipt, for the report; where that cannot be written, say so."""
    hardware = receipt["hardware"] | machine()
    line = {
        "when": timestamp(),
        "by": getpass.getuser(),
        "host": os.uname().nodename,
        "cpu": hardware["cpu"],
        "gpus": [gpu["name"] for gpu in hardware.get("gpus", [])],
        "labtrain": __version__,
        "receipt": receipt["digest"],
        **{key: getattr(verdict, key) for key in ("from_step", "to_step", "whole", "same", "found")},
    }
    try:
        with (run_dir / VERIFIED).open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        sys.stderr.write(f"warning: {shown(run_dir / VERIFIED)}: {error.strerror}: the verdict is not kept\n")
