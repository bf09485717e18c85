import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from labtrain.base import exact_json
from labtrain.base.credentials import NOT_RECORDED, without_secrets
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.record import receipt
from labtrain.review.verification import NOT_COMPARED, results_differently

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())


def whole(**changes: Any) -> dict[str, Any]:
    """A receipt as labtrain writes it, with parts replaced."""
    made = copy.deepcopy(GOLDEN) | changes
    return made if isinstance(made["run_id"], Unwritable) else {**made, "digest": exact_json.digest_of(made)}


def with_value(place: str, value: Any) -> dict[str, Any]:
    """A receipt with a right digest and a value of somebody's choice at a dotted place."""
    made = copy.deepcopy(GOLDEN)
    *parents, last = place.split(".")
    node = made
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    if value is ABSENT:
        del node[last]
    else:
        node[last] = value
    return {**made, "digest": exact_json.digest_of(made)}


ABSENT = object()


class Unwritable:
    """Nothing that JSON has."""


def test_what_was_written_is_read(tmp_path: Path) -> None:
    receipt.write(tmp_path, whole())
    assert receipt.read(tmp_path) == whole()
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]


def test_no_folder_and_no_receipt_are_none(tmp_path: Path) -> None:
    assert receipt.read(tmp_path) is None
    assert receipt.read(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is broken"),
        ("{", "is broken"),
        ("[]", "is broken"),
        ("[" * 100_000, "is broken"),
        ("9" * 5_000, "is broken"),
        ("{}", "is broken: 'schema' is missing"),
        (
            json.dumps(whole(schema="labtrain/receipt/2")),
            "schema 'labtrain/receipt/2', but this labtrain reads only 'labtrain/receipt/1'",
        ),
        (json.dumps(with_value("trail", ABSENT)), "must contain ['trail'] properties"),
        (json.dumps(whole(status="done")), "status must be one of"),
    ],
)
def test_a_broken_receipt_is_named_and_helped(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_text(text)
    with pytest.raises(DamagedError) as caught:
        receipt.read(tmp_path)
    assert says in str(caught.value)
    assert caught.value.hint


OUTSIDE = ["../../x", "/etc", "a/b", "a\x00b", "..", "", "x\n", "~", "a" * 300]


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("place", ["config.experiment", "run_id", "code.commit", "code.digest", "trail.file"])
def test_a_name_in_a_receipt_cannot_hold_a_path(place: str, value: str, tmp_path: Path) -> None:
    """Whoever forged it has written its digest anew; the receipt is refused by each command that reads it."""
    (tmp_path / "receipt.json").write_text(json.dumps(with_value(place, value)))
    with pytest.raises(DamagedError) as caught:
        receipt.read(tmp_path)
    assert f"receipt.json: {place} " in str(caught.value)


@pytest.mark.parametrize("value", ["../x", "/x", "a/../../x", "a/..", ".."])
def test_the_folder_of_the_code_lies_in_its_repository(value: str, tmp_path: Path) -> None:
    """An ordinary folder below its top is read."""
    (tmp_path / "receipt.json").write_text(json.dumps(with_value("code.folder", value)))
    with pytest.raises(DamagedError, match=r"code\.folder must match"):
        receipt.read(tmp_path)
    (tmp_path / "receipt.json").write_text(json.dumps(with_value("code.folder", "papers/..one/x")))
    assert receipt.read(tmp_path) is not None


def test_the_origin_of_a_run_is_an_id_and_a_checkpoint(tmp_path: Path) -> None:
    """They name a folder beside the run, from which verify reads."""
    origin = {
        "run_id": "0123456789ab-2",
        "checkpoint": "step-0000000020.1",
        "step": 20,
        "digest": "0" * 64,
        "url": "/x",
    }
    (tmp_path / "receipt.json").write_text(json.dumps(with_value("segments.0.origin", origin)))
    assert receipt.read(tmp_path) is not None
    for key, value in (("run_id", "../other"), ("checkpoint", "../step-0000000020"), ("digest", "x")):
        (tmp_path / "receipt.json").write_text(json.dumps(with_value("segments.0.origin", origin | {key: value})))
        with pytest.raises(DamagedError, match=f"origin.{key} must match"):
            receipt.read(tmp_path)


@pytest.mark.parametrize(
    "place", ["config", "config.checkpoint", "config.trainer", "config.seed", "results", "segments"]
)
@pytest.mark.parametrize("value", [None, [], "text", 1.5, ABSENT])
def test_a_part_of_another_kind_is_refused(place: str, value: Any, tmp_path: Path) -> None:
    """No command meets a list where it expects a mapping."""
    (tmp_path / "receipt.json").write_text(json.dumps(with_value(place, value)))
    with pytest.raises(DamagedError):
        receipt.read(tmp_path)


@pytest.mark.parametrize("group", [key for key, value in GOLDEN["config"].items() if isinstance(value, dict)])
def test_each_group_of_a_configuration_is_a_mapping(group: str, tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_text(json.dumps(with_value(f"config.{group}", ["a"])))
    with pytest.raises(DamagedError, match=f"config.{group} must be object"):
        receipt.read(tmp_path)


def test_keys_that_are_numbers_are_read_as_they_were_digested(tmp_path: Path) -> None:
    """A schedule in a notebook's configuration, say: 10 comes after 4, and "10" before "4"."""
    config = GOLDEN["config"] | {"model": {0: 8, 4: 4, 10: 1}}
    receipt.write(tmp_path, whole(config=config))
    assert receipt.read(tmp_path) is not None


@pytest.mark.parametrize("status", ["interrupted", "running", "failed"])
def test_a_run_that_is_not_complete_has_no_results(status: str, tmp_path: Path) -> None:
    """They would be shown beside a yes, and nothing compares them."""
    (tmp_path / "receipt.json").write_text(json.dumps(whole(status=status)))
    with pytest.raises(DamagedError, match="results must contain less than or equal to 0 properties"):
        receipt.read(tmp_path)
    receipt.write(tmp_path, whole(status=status, results={}))
    assert receipt.read(tmp_path) is not None


def test_results_are_compared_whatever_a_metric_is_called() -> None:
    """A metric named weights_digest stood for the digest; a trail that nobody wrote had any digest."""
    now = whole()
    forged = copy.deepcopy(now)
    for each in (now, forged):
        each["results"]["metrics"] |= {"weights_digest": 1.0, "best": 2.0}
    forged["results"] |= {"weights_digest": "0" * 64}
    forged["results"]["metrics"] |= {"best": 3.0}
    found = results_differently(forged, now, trail=forged["trail"]["sha256"])
    assert found == {"weights_digest": ("0" * 64, GOLDEN["results"]["weights_digest"]), "metric best": (3.0, 2.0)}
    assert list(results_differently(now, now, trail=None)) == ["trail's sha256"]
    assert list(results_differently(now, now, trail=NOT_COMPARED)) == []


def test_a_segment_begins_before_the_runs_end(tmp_path: Path) -> None:
    """Else a training that follows the segments has nothing to stop at."""
    (tmp_path / "receipt.json").write_text(json.dumps(with_value("segments.0.from_step", 10**18)))
    with pytest.raises(DamagedError, match="a segment begins at step 1000000000000000000, but the run has 300 steps"):
        receipt.read(tmp_path)


def test_a_change_by_hand_is_found(tmp_path: Path) -> None:
    """One character of any value; its own digest too."""
    receipt.write(tmp_path, whole())
    text = (tmp_path / "receipt.json").read_text()
    for old, new in (('"golden"', '"golder"'), ('"steps": 300', '"steps": 301'), ('"digest": "', '"digest": "0')):
        assert old in text
        (tmp_path / "receipt.json").write_text(text.replace(old, new))
        with pytest.raises(DamagedError, match="was changed after it was written"):
            receipt.read(tmp_path)
    (tmp_path / "receipt.json").write_text(json.dumps(json.loads(text)))  # another layout is the same receipt
    assert receipt.read(tmp_path) is not None


CREDENTIALS = {
    "an AWS key id": "AKIAIOSFODNN7EXAMPLE",
    "a GitHub token": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "a GitLab token": "glpat-abcdefghij0123456789",
    "a Hugging Face token": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "an OpenAI key": "sk-abcdefghijklmnopqrstuvwxyz0123456789",
    "a Slack token": "xoxb-123456789012-abcdefghijkl",
    "a Google key": "AIzaSyA-1234567890abcdefghijklmnopqrstu",
    "a JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghij",
    "a URL's password": "lab:hunter2hunter2",
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjE\n-----END OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_credentials_are_not_recorded(kind: str) -> None:
    """By their form, wherever they stand; what a text has beside them stays."""
    value = CREDENTIALS[kind]
    text = f"https://{value}@host/x" if "URL" in kind else f"uses {value} here"
    found = json.dumps(without_secrets({"notes": [text], "code": {"patch": f"+x = '{text}'\n"}}))
    assert value not in found
    assert json.dumps(value)[1:-1] not in found
    assert found.count(NOT_RECORDED) == 2
    assert "here" in found or "@host/x" in found


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "wandb_api_key",
        "AWS_SECRET_ACCESS_KEY",
        "token",
        "hf_token",
        "password",
        "db-passwd",
        "client_secret",
    ],
)
@pytest.mark.parametrize("value", ["0123abcd4567", "Tr0ub4dor&3!", "hunter2", "abc$def#ghij", "two words"])
def test_values_of_keys_that_name_a_credential_are_not_recorded(key: str, value: str) -> None:
    config = {"logger": {"wandb": {key: value, f"{key}": {"value": value} if value == "hunter2" else value}},
              "command": ["train.py", f"logger.wandb.{key}={value}"]}  # fmt: skip
    found = without_secrets(config)
    assert value not in json.dumps(found)
    assert found["command"] == ["train.py", f"logger.wandb.{key}={NOT_RECORDED}"]


def test_what_only_sounds_like_one_is_recorded() -> None:
    plain = {
        "tokenizer": "bert-base-uncased", "max_tokens": 512, "pad_token": "[PAD]", "eos_token": "<|endoftext|>",
        "author": "Ada Lovelace", "url": "s3://bucket/run", "commit": "a" * 40, "path": "/data/secrets/x.npy",
    }  # fmt: skip
    assert without_secrets(plain) == plain


def test_a_crash_while_writing_leaves_the_old_receipt(tmp_path: Path) -> None:
    """The new one is written beside it and renamed: here it cannot be written at all."""
    receipt.write(tmp_path, whole())
    with pytest.raises(TypeError):
        receipt.write(tmp_path, whole(run_id=Unwritable()))
    assert receipt.read(tmp_path) == whole()


IDS = ("906ca0b1c2d3", "906ca0b1c2d3-2", "906cffffffff", "0b6395aaaaaa")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment's folder with runs of two experiments, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    Path("notebooks").mkdir()
    for experiment, name in (*(("digits", each) for each in IDS), ("other", "0b6395bbbbbb"), ("other", IDS[2])):
        folder = tmp_path / "runs" / experiment / name
        folder.mkdir(parents=True)
        (folder / receipt.FILE).write_text(json.dumps(GOLDEN))
    (tmp_path / "runs" / "digits" / "abcdabcdabcd").mkdir()  # no receipt
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (IDS[0], f"digits/{IDS[0]}"),
        (IDS[1], f"digits/{IDS[1]}"),
        ("0b6395a", f"digits/{IDS[3]}"),
        ("0b6395b", "other/0b6395bbbbbb"),
    ],
)
def test_a_run_is_found_by_its_id_or_its_beginning(
    name: str, folder: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the experiment's runs, from a folder in the experiment too; a whole id is not the beginning of another."""
    assert receipt.find(name).samefile(runs / folder)
    monkeypatch.chdir("notebooks")
    assert receipt.find(name).samefile(runs / folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "0b6395",
            "0b6395: 2 runs begin with it: runs/digits/0b6395aaaaaa; runs/other/0b6395bbbbbb\n\nhint: for example",
        ),
        (IDS[2], f"{IDS[2]}: 2 runs begin with it: runs/digits/{IDS[2]}; runs/other/{IDS[2]}"),
        ("dead", "dead: no run of this id in runs, which has runs/digits/0b6395aaaaaa; "),
        ("abcdabcdabcd", "abcdabcdabcd: no run of this id in runs"),
    ],
)
def test_an_id_of_no_run_or_of_several_is_an_error_with_candidates(name: str, says: str, runs: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        receipt.find(name)


def test_what_is_no_id_and_what_exists_is_left_alone(runs: Path) -> None:
    """A folder goes before a run of that id; three digits are too few."""
    Path("0b6395").mkdir()
    for name in ("0b6395", "906", "best", "runs/digits/906ca0b1c2d3", "906CA0"):
        assert receipt.find(name) == Path(name)


def test_ids_are_looked_up_where_the_configuration_puts_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("conf").mkdir()
    monkeypatch.setenv("SCRATCH", str(runs.parent / "scratch"))
    runs.rename("scratch")
    for text in ("scratch", "${oc.env:SCRATCH}", "${oc.env:NO_SUCH,scratch}", "${oc.env:LABTRAIN_ROOT}/scratch"):
        Path("conf/config.yaml").write_text(f"paths: {{runs: '{text}'}}\n")
        assert receipt.find(IDS[0]).samefile(f"scratch/digits/{IDS[0]}"), text
    for text in ("paths: 3", "paths: {runs: 3}", "[", "paths:"):
        Path("conf/config.yaml").write_text(text)
        assert receipt.runs_folder() == runs
