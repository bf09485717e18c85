"""`labtrain verify`: trained again to the same bits, or the step, phase and tensor named; and what was changed, refused."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from labtrain.project.demo import OLDER_CPU
from labtrain.record import receipt as receipts
from labtrain.record.provenance import machine
from labtrain.record.trail import read_trail
from tests.conftest import LABTRAIN, QUICK, ROOT, Experiment, changed, need
from tests.support.verification import STEPS, TWO_EPOCHS, git, name_a_flipped_bit, verify

pytest_plugins = ["tests.support.verification"]


def test_a_run_of_two_devices_comes_out_again_on_two_and_on_one(trained: tuple[Experiment, Path]) -> None:
    _, run_dir = trained
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for options in ((), ("--devices", "1", "--steps", "7"), ("--from", "15"), ("--from", "5", "--steps", "3")):
        found = verify(run_dir, *options)
        assert "differs" not in found.out
        assert found.out.splitlines()[-1].startswith("yes          the same bits, ")
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
    found = json.loads(verify(copy, "--steps", "0", "--json", code=1).out)
    assert {each["key"] for each in found["differences"] if each["matters"]} == {key.replace("/", ".") for key in wrong}
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
    assert "the receipt" in verify(copy, code=2).err


def test_a_clone_and_the_receipt_give_yes_and_another_line_of_code_is_checked_out_beside(
    copy: Path, tmp_path: Path
) -> None:
    """With an uncommitted change and an untracked source in the receipt's patch; the clone is left as it was."""
    experiment = Experiment(copy.parents[2])
    git(experiment.root, "add", "-A")
    model = experiment.root / "model.py"
    model.write_text("from more import SLOPE\n" + model.read_text().replace("nn.ReLU()", "nn.LeakyReLU(SLOPE)"))
    (experiment.root / "more.py").write_text("SLOPE = 0.02\n")
    run = experiment.train(*TWO_EPOCHS, cwd=experiment.root)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(experiment.root), str(clone))
    shutil.copy(run.folder / "receipt.json", tmp_path / "theirs.json")
    (tmp_path / "given").mkdir()
    shutil.copy(run.folder / "receipt.json", tmp_path / "given" / "receipt.json")
    found = verify(tmp_path / "given" / "receipt.json", cwd=clone)
    assert "with the patch" in found.out
    assert found.out.splitlines()[-1] == "yes          the same bits, to its end"
    assert not subprocess.run(
        ["git", "-C", clone, "status", "--porcelain"], capture_output=True, text=True, check=True
    ).stdout
    assert "trail.jsonl" in verify(tmp_path / "given" / "receipt.json", "--steps", "3", code=2, cwd=clone).err
    changed(tmp_path / "given", "code/patch", "")
    assert "does not give the receipt's code: model.py, more.py" in verify(tmp_path / "given", code=2, cwd=clone).err
    changed(tmp_path / "given", "code/commit", "0" * 40)
    assert "is not in this repository" in verify(tmp_path / "given", code=2, cwd=clone).err
    assert "the experiment is not here" in verify(tmp_path / "given", code=2, cwd=tmp_path).err


def test_a_run_is_verified_while_it_is_trained(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    long = (*QUICK, "trainer.max_epochs=400", "seed=9", "checkpoint.keep_last=1")
    training = subprocess.Popen(experiment.command(*long), cwd=experiment.root, stderr=subprocess.DEVNULL)
    try:
        while not (there := [path for path in copy.parent.glob("*") if path != copy and len(read_trail(path)) > 30]):
            assert training.poll() is None
            time.sleep(0.02)
        found = verify(there[0], "--steps", "25")
        assert training.poll() is None
        assert "running" in found.out
        assert found.out.splitlines()[-1] == "yes          the same bits, steps 1 to 25"
    finally:
        training.kill()
        training.wait()


def test_a_run_that_began_from_a_complete_one_is_verified_from_there(copy: Path) -> None:
    """With other options, which take effect as they did; without the other run's checkpoint it says what is missing."""
    experiment = Experiment(copy.parents[2])
    run = experiment.train(
        *TWO_EPOCHS, "trainer.max_epochs=3", "model.learning_rate=0.02", f"resume={copy}", cwd=experiment.root
    )
    assert run.folder != copy
    found = verify(run.folder).out
    assert f"origin       step-{STEPS:010d} of the run {copy.name}, which is not verified here" in found
    assert f"the same bits, from step {STEPS + 1} to its end" in found
    shutil.rmtree(copy / "checkpoints")
    assert (
        f"the run began from step-{STEPS:010d} of the run {copy.name}, which is neither"
        in verify(run.folder, code=2).err
    )


def test_bad_input_is_refused(copy: Path, tmp_path: Path) -> None:
    for options, says in (
        ((str(tmp_path),), "is no run"),
        ((str(copy), "--from", "3"), "there are 5, 10, 15, 20"),
        ((str(copy), "--steps", "99"), "the trail ends at step 20"),
        ((str(copy), "--from", "5", "--segments"), "without --from"),
    ):
        found = verify(*options, code=2)
        assert says in found.err
        assert "hint: " in found.err
    changed(copy, "config/model/token", "(not recorded)")
    assert (
        "config.model.token" in verify(copy, code=2).err or "model.token names a credential" in verify(copy, code=2).err
    )


def test_the_golden_receipt_alone_comes_out_on_an_older_cpu(shared_experiment: Experiment, tmp_path: Path) -> None:
    """Recorded in portable mode, on another machine; here with this CPU's newer instructions hidden."""
    shutil.copy(ROOT / "tests" / "golden" / "receipt.json", tmp_path)
    found = verify(tmp_path / "receipt.json", cwd=shared_experiment.root, **OLDER_CPU)
    assert "yes          the same bits, to its end" in found.out
    assert "differs      hardware.cpu" not in found.out


def test_who_signed_it_is_said_and_can_be_asked_for(copy: Path, tmp_path: Path) -> None:
    need("ssh-keygen", "openssh-client")
    key, signers = tmp_path / "key", tmp_path / "signers"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    signers.write_text(f"ada@lab {key.with_suffix('.pub').read_text()}")
    few = ("--steps", "1", "--signers", str(signers))
    assert "is not signed" in verify(copy, *few, code=2).err
    subprocess.run([LABTRAIN, "sign", copy, "--key", key], check=True, capture_output=True)
    assert "signature    of ada@lab, SHA256:" in verify(copy, *few).out
    quiet = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    assert "signature    not checked: " in verify(copy, "--steps", "1", **quiet).out
    changed(copy, "run_id", "0" * 12)
    assert "does not sign this receipt.json" in verify(copy, *few, code=2).err


def test_from_a_checkpoint_is_not_the_whole(copy: Path) -> None:
    found = json.loads(verify(copy, "--from", "15", "--json").out)
    assert (found["whole"], found["found"]) == (False, "the same bits, from step 16 to its end")
    assert "it has 20 steps" in verify(copy, "--from", "20", code=2).err


def test_nothing_trained_is_a_no_where_a_cause_differs_and_a_yes_where_none_does(copy: Path) -> None:
    assert verify(copy, "--steps", "0").out.splitlines()[-1].startswith("yes          nothing was trained again")
    found = verify(copy, "--steps", "0", code=1, MKL_ENABLE_INSTRUCTIONS="SSE4_2").out
    assert "differs      determinism.variables.MKL_ENABLE_INSTRUCTIONS  - -> SSE4_2" in found
    assert found.splitlines()[-1].startswith("no           nothing was trained again")
    assert not (copy / "verified.jsonl").exists()


def test_who_verified_is_told_of_this_machine(copy: Path) -> None:
    found = receipts.read(copy)
    assert found is not None
    gpu = {"name": "NVIDIA A100", "memory_bytes": 1, "compute_capability": "8.0"}
    changed(copy, "hardware", found["hardware"] | {"gpus": [gpu], "cpu": "Another"})
    assert "hardware.gpus" in verify(copy, "--steps", "2").out
    told = json.loads((copy / "verified.jsonl").read_text())
    assert told["gpus"] == []
    assert told["cpu"] == machine()["cpu"]


def test_code_that_only_train_py_finds_is_asked_for(own_experiment: Experiment, tmp_path: Path) -> None:
    """It puts a folder into sys.path; verify does not run it, and names the file; what the hint says works."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "lab_utils.py").write_text("WIDTH = 1\n")
    for name, line in (("train.py", "import sys; sys.path.append('../shared')"), ("model.py", "import lab_utils")):
        file = own_experiment.root / name
        file.write_text(file.read_text().replace("\nimport ", f"\n{line}\nimport ", 1))
    run_dir = own_experiment.train("trainer.max_epochs=1", *QUICK, cwd=own_experiment.root).folder
    refused = verify(run_dir, "--steps", "2", code=2, cwd=own_experiment.root).err
    assert "hint: PYTHONPATH=FOLDER before the same command, with the folder that holds lab_utils.py" in refused
    verify(run_dir, "--steps", "2", cwd=own_experiment.root, PYTHONPATH="../shared")
