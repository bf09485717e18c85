import json
from pathlib import Path

import pytest

from labtrain.base.errors import DamagedError
from labtrain.record import receipt


def whole(**changes: object) -> dict:
    made = {**dict.fromkeys(receipt.KEYS), "schema": receipt.SCHEMA, "status": "running", **changes}
    return made if isinstance(made["run_id"], Unwritable) else {**made, "digest": receipt.digest_of(made)}


class Unwritable:
    """Nothing that JSON has."""


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


def test_keys_that_are_numbers_are_read_as_they_were_digested(tmp_path: Path) -> None:
    """A schedule in a notebook's configuration, say: 10 comes after 4, and "10" before "4"."""
    receipt.write(tmp_path, whole(run_id="abc", config={0: 8, 4: 4, 10: 1}))
    assert receipt.read(tmp_path) is not None


def test_a_change_by_hand_is_found(tmp_path: Path) -> None:
    """One character of any value; its own digest too."""
    receipt.write(tmp_path, whole(run_id="abc", command=["train.py"], results={"steps": 10}))
    text = (tmp_path / "receipt.json").read_text()
    for old, new in (("abc", "abd"), ('"steps": 10', '"steps": 11'), ('"digest": "', '"digest": "0')):
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
    found = json.dumps(receipt.without_secrets({"notes": [text], "code": {"patch": f"+x = '{text}'\n"}}))
    assert value not in found
    assert json.dumps(value)[1:-1] not in found
    assert found.count(receipt.NOT_RECORDED) == 2
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
    found = receipt.without_secrets(config)
    assert value not in json.dumps(found)
    assert found["command"] == ["train.py", f"logger.wandb.{key}={receipt.NOT_RECORDED}"]


def test_what_only_sounds_like_one_is_recorded() -> None:
    plain = {
        "tokenizer": "bert-base-uncased", "max_tokens": 512, "pad_token": "[PAD]", "eos_token": "<|endoftext|>",
        "author": "Ada Lovelace", "url": "s3://bucket/run", "commit": "a" * 40, "path": "/data/secrets/x.npy",
    }  # fmt: skip
    assert receipt.without_secrets(plain) == plain


def test_a_crash_while_writing_leaves_the_old_receipt(tmp_path: Path) -> None:
    """The new one is written beside it and renamed: here it cannot be written at all."""
    receipt.write(tmp_path, whole(run_id="old"))
    with pytest.raises(TypeError):
        receipt.write(tmp_path, whole(run_id=Unwritable()))
    assert receipt.read(tmp_path) == whole(run_id="old")
