"""Assemble the page. Text from a run is untrusted: it is escaped and never runs.

The page's Content-Security-Policy allows two scripts, by hash, and loads nothing.
"""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from labtrain import __version__
from labtrain.base import exact_json
from labtrain.base.console import shown
from labtrain.base.contracts import CodeRecord, DataRecord, Determinism, Installed, Options, Receipt, Segment
from labtrain.record.differences import shown_value
from labtrain.record.identity import get
from labtrain.review.report.charts import DIGITS, curves_of, machine_of, timeline_of
from labtrain.review.report.data import Run, seconds_of
from labtrain.review.verdicts import VERIFIED, Verification

HERE = Path(__file__).parent
SHORT = 12  # characters of a digest until the reader opens it
DASHES = ("", "6 3", "2 2", "8 3 2 3", "11 4", "11 3 2 3 2 3")  # of the runs' lines, in turn; page.css has the colours
COLOURS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A table cell.

    Attributes:
        text: what it shows.
        code: show it as code, for copying.
        number: do not break it into two lines.
        full: the whole digest that `text` abbreviates or names.
        mark: status or verdict whose icon precedes the text.
    """

    text: str
    code: bool = False
    number: bool = False
    full: str = ""
    mark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownVerdict:
    """Whether a run was verified.

    Attributes:
        mark: same, differs, partly or none.
        word: the mark, in words.
        text: a sentence: when, by whom, on what.
        command: a command that verifies more; empty if nothing is left to verify.
    """

    mark: str
    word: str
    text: str
    command: str


def render(runs: list[Run], *, said: Sequence[str], verdicts: Mapping[Path, ShownVerdict]) -> str:
    """Return the page of runs; `verdicts` has those that are not read from a run's files, by folder."""
    curves, machine = curves_of(runs), machine_of(runs)
    drawn = [timeline_of(runs), *(chart.drawn for chart in [*curves, *machine])]
    names = [f"{run.label} {run.receipt['run_id']}" for run in runs]
    scripts = [_script(get_plotlyjs()), _script((HERE / "page.js").read_text())]
    experiments = {str(get(run.receipt["config"], "experiment") or run.folder.resolve().parent.name) for run in runs}
    told = [verdicts.get(run.folder) or verdict_of(run) for run in runs]
    words = Counter(verdict.word for verdict in told)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string((HERE / "page.html.j2").read_text()).render(
        experiment=", ".join(sorted(experiments)),
        runs=runs,
        facts=facts_of(runs),
        said=said,
        verdicts=told,
        tally=f"{len(runs)} runs: {', '.join(f'{count} {word.lower()}' for word, count in words.items())}.",
        segments=[(run, segment, _span(segment)) for run in runs for segment in run.receipt["segments"]],
        curves=curves,
        machine=machine,
        receipts=[exact_json.dumps(run.receipt, indent=1) + "\n" for run in runs],
        data=_json({"names": names, "dashes": DASHES, "colours": COLOURS, "charts": drawn}),
        dashes=DASHES,
        colours=COLOURS,
        digits=DIGITS,
        style=Markup((HERE / "page.css").read_text()),
        scripts=scripts,
        policy=_policy(scripts),
        version=__version__,
        plotly_version=get_plotlyjs_version(),
        when=when,
        folder=lambda run: shown(run.folder),
        shown_value=partial(shown_value, most=None),
        typed=lambda overrides: " ".join(map(shlex.quote, overrides)),
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a lone surrogate, from a path that is not UTF-8


def facts_of(runs: list[Run]) -> list[tuple[str, list[Cell]]]:
    """Return the rows of the table of runs: what was run, and the results."""
    receipts = [run.receipt for run in runs]
    rows = [
        ("Run", [Cell(text=receipt["run_id"], code=True) for receipt in receipts]),
        ("Status", [_status(run) for run in runs]),
        ("Folder", [Cell(text=shown(run.folder), code=True) for run in runs]),
        ("Started", [Cell(text=when(receipt["segments"][0]["started"])) for receipt in receipts]),
        ("Ended", [Cell(text=when(receipt["segments"][-1]["ended"])) for receipt in receipts]),
        ("Host", [Cell(text=_in_turn(segment["host"] for segment in receipt["segments"])) for receipt in receipts]),
        ("Command", [Cell(text=_command(receipt["command"]), code=True) for receipt in receipts]),
        ("Seed", [Cell(text=str(receipt["determinism"]["seed"])) for receipt in receipts]),
        ("Devices", [Cell(text=_in_turn(each["devices"] for each in receipt["segments"])) for receipt in receipts]),
        ("Steps", [Cell(text=_steps(run)) for run in runs]),
        ("Commit", [_commit(receipt["code"]) for receipt in receipts]),
        ("Code", [_digest(receipt["code"]["digest"]) for receipt in receipts]),
        ("Environment", [Cell(text=_environment(receipt["environment"])) for receipt in receipts]),
        ("Lock", [_digest(receipt["environment"]["lock_digest"]) for receipt in receipts]),
        ("Processor", [Cell(text=receipt["hardware"]["cpu"]) for receipt in receipts]),
        (
            "GPUs",
            [Cell(text=_gpus(each["name"] for each in receipt["hardware"].get("gpus", []))) for receipt in receipts],
        ),
        ("Determinism", [Cell(text=_determinism(receipt["determinism"])) for receipt in receipts]),
        ("Training data", [_train_digest(receipt["data"].get("train")) for receipt in receipts]),
        ("Weights", [_digest(receipt["results"].get("weights_digest")) for receipt in receipts]),
    ]
    if any(run.note for run in runs):
        rows.insert(1, ("Note", [Cell(text=run.note) for run in runs]))
    if any(origins := [_origin(receipt) for receipt in receipts]):
        rows.insert(3, ("Begins from", [cell or Cell(text="nothing") for cell in origins]))
    if any(receipt["determinism"]["notes"] for receipt in receipts):
        notes = [Cell(text="; ".join(receipt["determinism"]["notes"]) or "nothing") for receipt in receipts]
        rows.append(("Not exact", notes))
    metrics = {name: None for receipt in receipts for name in receipt["results"].get("metrics", {})}
    for name in metrics:
        rows.append((name, [_number(receipt["results"].get("metrics", {}), name) for receipt in receipts]))
    return rows


def _command(words: list[str]) -> str:
    return shlex.join(["python", *words]) if words else "labtrain.train(cfg)"


def verdict_of(run: Run) -> ShownVerdict:
    """Return whether a run was verified, by the newest signed verification of exactly this receipt.

    Without a signature, a line of verified.jsonl counts only as a claim of whoever could write the file.
    """
    trained = [each for each in run.verifications if each.same is not None]
    of_this = [each for each in trained if each.receipt == run.receipt["digest"]]
    signed = [each for each in of_this if each.signer is not None]
    earlier = len(trained) - len(of_this)
    more = []
    if earlier:
        found, tell = ("a verification is", "says") if earlier == 1 else (f"{earlier} verifications are", "say")
        more.append(
            f"{found[0].upper()}{found[1:]} about an earlier state of this receipt and {tell} nothing about this one."
        )
    command = f"labtrain verify {shlex.quote(shown(run.folder))}"
    if not of_this:
        text = " ".join(["No rerun of this receipt is recorded.", *more])
        return ShownVerdict(mark="none", word="Not verified yet", text=text, command=command)
    counted = signed or of_this
    newest = counted[0]
    if others := sum(each.same != newest.same for each in counted[1:]):
        said = "differed" if newest.same else "gave the same bits"
        more.append(f"Of {len(counted)} verifications of this receipt, {others} {said}.")
    steps = f"steps {newest.from_step + 1} to {newest.to_step}"
    if not newest.same:
        found, mark, word = f"A rerun differed: {newest.found.rstrip('.')}.", "differs", "Differs"
    elif newest.whole:
        found, mark, word = f"A rerun to the end, {steps}, gave the same bits.", "same", "Verified"
    else:
        found = f"A rerun of {steps}, not to the end, gave the same bits."
        mark, word = "partly", "Verified in part"
    where = f"on {_machine(newest)}, {when(newest.when.isoformat())}, labtrain {newest.labtrain}"
    if newest.signer is None:
        claim = f"{VERIFIED} claims: {found} By {newest.by} {where}."
        text = " ".join([claim, f"Nothing proves this claim: {newest.doubt}.", *more])
        return ShownVerdict(mark="none", word="Claimed, not verified", text=text, command=command)
    by = f"By {newest.signer.principal}, who signed it with the key {newest.signer.fingerprint}, {where}."
    if claims := len(of_this) - len(signed):
        are = "is a claim" if claims == 1 else "are claims"
        more.append(f"{claims} more in {VERIFIED} {are} without a known signer.")
    return ShownVerdict(
        mark=mark, word=word, text=" ".join([found, by, *more]), command=command if mark == "partly" else ""
    )


def when(text: str | None) -> str:
    """Format a receipt's time for people."""
    return "not yet" if text is None else text[:19].replace("T", " ") + text[19:].replace("+00:00", " UTC")


def _machine(found: Verification) -> str:
    gpus = f", {_gpus(found.gpus)}" if found.gpus else ""
    return f"{found.host} ({found.cpu}{gpus})"


def _status(run: Run) -> Cell:
    status, last = run.receipt["status"], run.receipt["segments"][-1]
    if status == "running":  # the receipt of a killed run says this too
        return Cell(text="running, or killed and not resumed", mark=status)
    return Cell(text=f"{status}: {last['why']}" if last["why"] else status, mark=status)


def _origin(receipt: Receipt) -> Cell | None:
    """Return the checkpoint of another run that a run began from; None if there is none."""
    found = next((segment["origin"] for segment in receipt["segments"] if segment.get("origin")), None)
    if found is None:
        return None
    return Cell(text=f"{found['checkpoint']} of the run {found['run_id']}", full=found["digest"])


def _steps(run: Run) -> str:
    steps = run.receipt["results"].get("steps")
    if steps is not None:
        return str(steps)
    return f"{run.loss.x[-1]:.0f} so far" if len(run.loss.x) else "none so far"


def _commit(code: CodeRecord) -> Cell:
    if not code["commit"]:
        return Cell(text="not in a commit")
    return Cell(text=code["commit"][:SHORT] + (", with changes" if code["dirty"] else ""), full=code["commit"])


def _digest(digest: str | None) -> Cell:
    return Cell(text=digest[:SHORT], full=digest, code=True) if digest else Cell(text="none")


def _train_digest(data: DataRecord | None) -> Cell:
    return _digest(data["digest"] if data else None)


def _environment(environment: Installed) -> str:
    torch = environment["distributions"].get("torch")
    changed = environment.get("changed_files")
    parts = [environment["route"], f"Python {environment['python']}", *([f"torch {torch}"] if torch else [])]
    return ", ".join(parts + ([f"{len(changed)} changed files"] if changed else []))


def _determinism(found: Determinism) -> str:
    shards = "no shards" if found["shards"] is None else f"{found['shards']} shards"
    return f"{found['mode']}, {shards}, {found['threads']} thread{'' if found['threads'] == 1 else 's'}"


def _gpus(names: Iterable[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in Counter(map(str, names)).items()) or "none"  # noqa: RUF001


def _in_turn(values: Iterable[object]) -> str:
    """Join values in order, without repeats."""
    found: list[str] = []
    for value in map(str, values):
        if not found or found[-1] != value:
            found.append(value)
    return ", then ".join(found)


def _number(metrics: Options, name: str) -> Cell:
    return Cell(text=repr(metrics[name]), code=True, number=True) if name in metrics else Cell(text="none")


def _span(segment: Segment) -> str:
    end = seconds_of(segment["ended"])
    if end is None:
        return "not known"
    seconds = int(end - (seconds_of(segment["started"]) or end))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _json(data: object) -> Markup:
    """Return data for a script element; no text in it can close the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _script(text: str) -> Markup:
    return Markup(text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _policy(scripts: list[Markup]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    sources = " ".join(f"'sha256-{found}'" for found in hashes)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {sources}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
