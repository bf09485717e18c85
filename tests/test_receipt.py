import json
from pathlib import Path

import pytest

from labtrain import receipt
from labtrain.errors import DamagedError


def whole(**changes: object) -> dict:
    return {**dict.fromkeys(receipt.KEYS), "schema": receipt.SCHEMA, "status": "running", **changes}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    receipt.write(tmp_path, whole(run_id="abc"))
    assert receipt.read(tmp_path) == whole(run_id="abc")
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
        ("{}", "is broken: KeyError"),
        (
            json.dumps(whole(schema="labtrain/receipt/2")),
            "schema 'labtrain/receipt/2', this labtrain reads 'labtrain/receipt/1'",
        ),
        (json.dumps({key: value for key, value in whole().items() if key != "trail"}), "is broken: without trail"),
        (json.dumps(whole(status="done")), "is broken: with status 'done'"),
    ],
)
def test_a_broken_receipt_is_named_and_helped(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_text(text)
    with pytest.raises(DamagedError) as caught:
        receipt.read(tmp_path)
    assert says in str(caught.value)
    assert caught.value.hint


def test_a_crash_while_writing_leaves_the_old_receipt(tmp_path: Path) -> None:
    """The new one is written beside it and renamed: here it cannot be written at all."""
    receipt.write(tmp_path, whole(run_id="old"))
    with pytest.raises(TypeError):
        receipt.write(tmp_path, whole(run_id=object()))
    assert receipt.read(tmp_path) == whole(run_id="old")
