"""`labtrain verify`: trained again to the same bits, or the step, phase and tensor named; and what was changed, refused."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from labtrain.record import receipt as receipts
from tests.conftest import LABTRAIN, ROOT, Experiment, changed, need
from tests.support.verification import STEPS, name_a_flipped_bit, verify

pytest_plugins = ["tests.support.verification"]


@pytest.mark.release
def test_a_run_of_two_devices_comes_out_again_on_two_and_on_one(trained: tuple[Experiment, Path]) -> None:
    _, run_dir = trained
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for options in ((), ("--devices", "1", "--steps", "7"), ("--from", "15"), ("--from", "5", "--steps", "3")):
        found = verify(run_dir, *options)
        assert "differs" not in found.out
        assert found.out.splitlines()[-1].startswith("yes          the same bits")
    told = [json.loads(line) for line in (run_dir / "verified.jsonl").read_text().splitlines()]
    (run_dir / "verified.jsonl").unlink()
    assert [(each["from_step"], each["to_step"], each["whole"], each["same"]) for each in told] == [
        (0, 20, True, True), (0, 7, False, True), (15, 20, False, True), (5, 8, False, True)]  # fmt: skip
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_one_flipped_bit_is_named_by_step_and_tensor(copy: Path) -> None:
    """In a weight after the step, recorded by the machine that flipped it."""
    name_a_flipped_bit(copy, "weight")


def test_what_is_not_as_recorded_has_its_own_name(copy: Path) -> None:
    wrong = {
        "environment/distributions/numpy": "1.0",
        "environment/changed_files": ["torch/nn/functional.py of torch was changed"],
        "environment/lock_digest": "0" * 64,
        "hardware/libc": "glibc 2.17",
        "hardware/driver": "530.30.02",
        "determinism/variables/NVIDIA_TF32_OVERRIDE": "1",
        "data/train/digest": "0" * 64,
        "code/labtrain": "0" * 64,
    }
    for key, value in wrong.items():
        changed(copy, key, value)
    told = {key.replace("/", ".") for key in wrong}
    found = json.loads(verify(copy, "--steps", "1", "--json").out)
    assert {each["key"] for each in found["differences"] if each["matters"]} == told
    assert found["same"] is True
    found = json.loads(verify(copy, "--steps", "0", "--json", code=1).out)  # what a training alone can tell is not told
    assert {each["key"] for each in found["differences"] if each["matters"]} == told - {
        "hardware.driver", "data.train.digest"}  # fmt: skip
    assert found["same"] is None


@pytest.mark.parametrize("file", ["receipt.json", "trail.jsonl", "checkpoints/step-0000000010/weights.safetensors"])
def test_what_was_changed_since_is_refused(copy: Path, file: str) -> None:
    path = copy / file
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    found = verify(copy, code=2)
    assert file.rpartition("/")[2].partition(".")[0] in found.err
    assert "hint: " in found.err


def test_a_checkpoint_that_was_exchanged_with_its_manifest_is_refused(copy: Path) -> None:
    """Whole in itself, and not the receipt's."""
    shutil.rmtree(copy / "checkpoints" / "step-0000000010")
    shutil.copytree(copy / "checkpoints" / "step-0000000005", copy / "checkpoints" / "step-0000000010")
    assert "belongs to step 5" in verify(copy, code=2).err


@pytest.mark.parametrize(
    "trail",
    [
        "with its trail",
        pytest.param("without its trail", marks=pytest.mark.release),
        pytest.param("with a trail cut and hashed anew", marks=pytest.mark.release),
    ],
)
def test_a_result_that_no_training_gave_is_a_no(copy: Path, trail: str) -> None:
    """The forger has written each digest anew, and a complete run lies where the receipt would have it trained."""
    found = receipts.read(copy)
    assert found is not None
    if trail == "with its trail":
        shutil.rmtree(copy / "checkpoints")  # the last one tells
        found["results"] |= {"weights_digest": "f" * 64, "metrics": found["results"]["metrics"] | {"test/acc": 1.0}}
    if trail != "with its trail":
        lines = (copy / "trail.jsonl").read_bytes().splitlines(keepends=True)[: STEPS // 2]
        (copy / "trail.jsonl").write_bytes(b"".join(lines))
        found["trail"]["sha256"] = hashlib.sha256(b"".join(lines)).hexdigest()
    if trail == "without its trail":
        (copy / "trail.jsonl").unlink()
    receipts.write(copy, found)
    said = verify(copy, code=1).out.splitlines()[-1]
    assert said.startswith("no           ")
    assert ("weights_digest" if trail == "with its trail" else "trail's sha256") in said


def test_the_last_checkpoint_has_the_weights_of_the_results(copy: Path) -> None:
    """Where each digest was written anew, in the manifest and in the receipt's list of checkpoints too."""
    found = receipts.read(copy)
    assert found is not None
    found["results"]["weights_digest"] = "f" * 64
    receipts.write(copy, found)
    assert "weights digest of the receipt's results ffffff" in verify(copy, "--steps", "0", code=2).err


def test_a_run_of_mine_is_no_place_for_a_replay(copy: Path, tmp_path: Path) -> None:
    """A receipt whose experiment's name is a path to it is refused, and the run is as it was."""
    (tmp_path / "mail").mkdir()
    shutil.copy(copy / "receipt.json", tmp_path / "mail")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    found = receipts.read(copy)
    assert found is not None
    for name in (str(copy.parent), f"../../../../../../../../../../{copy.parent}"):
        found["config"]["experiment"] = name
        receipts.write(tmp_path / "mail", found)
        assert "config.experiment must match" in verify(tmp_path / "mail", code=2, cwd=copy.parents[2]).err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_bad_input_is_refused(copy: Path, tmp_path: Path) -> None:
    for options, says in (
        ((str(tmp_path),), "is not a run"),
        ((str(copy), "--from", "3"), "only of 5, 10, 15, 20"),
        ((str(copy), "--steps", "99"), "the trail ends at step 20"),
        ((str(copy), "--from", "5", "--segments"), "leave out --from"),
    ):
        found = verify(*options, code=2)
        assert says in found.err
        assert "hint: " in found.err
    changed(copy, "config/model/token", "(not recorded)")
    assert "config.model.token" in verify(copy, code=2).err or "model.token is a credential" in verify(copy, code=2).err


@pytest.mark.release
def test_who_signed_it_is_said_and_can_be_asked_for(copy: Path, tmp_path: Path) -> None:
    need("ssh-keygen", "openssh-client")
    key, signers = tmp_path / "key", tmp_path / "signers"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    signers.write_text(f"ada@lab {key.with_suffix('.pub').read_text()}")
    few = ("--steps", "1", "--signers", str(signers))
    assert "is not signed" in verify(copy, *few, code=2).err
    subprocess.run([LABTRAIN, "sign", copy, "--key", key], check=True, capture_output=True)
    assert "signature    by ada@lab, SHA256:" in verify(copy, *few).out
    quiet = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    assert "signature    not checked: " in verify(copy, "--steps", "1", **quiet).out
    changed(copy, "run_id", "0" * 12)
    assert "is not a signature of this receipt.json" in verify(copy, *few, code=2).err


def test_where_nothing_was_trained_the_word_is_unverified(copy: Path) -> None:
    """Exit code 0 if nothing recorded differs, else 1; a yes is for steps that were trained alone."""
    assert (
        verify(copy, "--steps", "0").out.splitlines()[-1].startswith("unverified   metadata only, nothing was trained")
    )
    found = verify(copy, "--steps", "0", code=1, MKL_ENABLE_INSTRUCTIONS="SSE4_2").out
    assert "differs      determinism.variables.MKL_ENABLE_INSTRUCTIONS  - -> SSE4_2" in found
    assert found.splitlines()[-1].startswith("unverified   metadata only, nothing was trained")
    assert not (copy / "verified.jsonl").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", "no json", "changed"])
def test_a_file_that_is_no_receipt_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    row = tmp_path / "table2-row3.json"
    golden = (ROOT / "tests" / "golden" / "receipt.json").read_text()
    row.write_text(golden.replace("300", "301") if text == "changed" else text)
    said = verify(row, code=2, cwd=tmp_path).err
    assert "table2-row3.json " in said
    assert "labtrain-receipt-" not in said
    assert "\n\nhint: ask whoever trained the run" in said
