"""`labtrain verify`, of runs that are stopped, lack a trail, or have their code and data elsewhere."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

from labtrain.project.demo import OLDER_CPU
from labtrain.record import receipt as receipts
from labtrain.record.provenance import machine
from labtrain.record.trail import read_trail
from tests.conftest import LABTRAIN, QUICK, ROOT, Experiment, changed
from tests.support.verification import STEPS, TWO_EPOCHS, git, name_a_flipped_bit, started, verify
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.verification"]


def test_one_run_may_be_verified_by_two_at_once(copy: Path) -> None:
    command = [LABTRAIN, "verify", copy, "--steps", "5", "--trust"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [each.wait(timeout=300) for each in both] == [0, 0]
    assert len((copy / "verified.jsonl").read_text().splitlines()) == 2


def test_what_was_stopped_gives_no_verdict(copy: Path, tmp_path: Path) -> None:
    """Its training by a SIGTERM; verify itself by SIGTERM or Ctrl-C, and then nothing is left behind."""
    experiment = Experiment(copy.parents[2])
    long = experiment.train(*QUICK, "trainer.max_epochs=40", cwd=experiment.root).folder
    process, child = started(long)
    child.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    assert "was stopped by a signal" in err
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process, child = started(long, TMPDIR=str(scratch))
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, out + err
        assert "yes" not in out
        assert not list(scratch.iterdir())
        assert not child.is_running()
    assert not (long / "verified.jsonl").exists()


def test_a_trail_that_lacks_its_beginning_is_compared_where_it_has_lines(copy: Path, tmp_path: Path) -> None:
    """The run's folder was lost, and its checkpoints elsewhere were not."""
    experiment = Experiment(copy.parents[2])
    command = (*QUICK, "trainer.max_epochs=20", "seed=4", "checkpoint.every_n_steps=10", f"checkpoint.url={tmp_path / 'store'}",
               f"paths.runs={tmp_path / 'runs'}", "checkpoint.monitor=val/acc")  # fmt: skip
    training = subprocess.Popen(experiment.command(*command), cwd=experiment.root, stderr=subprocess.DEVNULL)
    there = lambda: [path for path in (tmp_path / "runs").glob("*/*") if len(read_trail(path)) > 45]  # noqa: E731
    wait_until(there, process=training)
    training.kill()
    training.wait()
    shutil.rmtree(there()[0])
    run = experiment.train(*command, cwd=experiment.root)
    first = run.trail()[0]["step"]
    assert first > 10
    assert "the same bits to the end" in verify(run.folder, cwd=experiment.root).out
    assert "nothing to compare in steps 1 to 5" in verify(run.folder, "--steps", "5", code=2, cwd=experiment.root).err
    (weights,) = (tmp_path / "store").glob("*/step-0000000400/weights.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-10] ^= 1
    weights.write_bytes(raw)
    assert "manifest says" in verify(run.folder, code=2, cwd=experiment.root).err


def test_a_trail_of_every_seventh_step_is_compared_at_those(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    command = (*TWO_EPOCHS, "trail.every_n_steps=7", "checkpoint.every_n_steps=5", "checkpoint.keep_last=9", "seed=6")
    run = experiment.train(*command, cwd=experiment.root, env={"FAULT": "9 weight:net.9.bias 3"})
    assert [line["step"] for line in run.trail()] == [7, 14]
    found = json.loads(verify(run.folder, "--json", code=1).out)
    assert (found["divergence"]["step"], found["to_step"]) == (14, 7)
    assert "or since step 8: the trail has no line for it" in found["found"]
    assert "results on this machine are reproducible" in found["found"]
    assert "nothing to compare in steps 1 to 3" in verify(run.folder, "--steps", "3", code=2).err
    sound = experiment.train(*command, "resume=never", cwd=experiment.root)
    assert "the same bits to the end" in verify(sound.folder).out


def test_a_run_without_a_trail_is_compared_by_its_results(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    run = experiment.train(*TWO_EPOCHS, "trail.every_n_steps=0", "seed=7", cwd=experiment.root)
    assert "the same bits to the end" in verify(run.folder).out
    assert json.loads((run.folder / "verified.jsonl").read_text())["to_step"] == STEPS
    assert "there is no trail.jsonl" in verify(run.folder, "--steps", "5", code=2).err
    changed(run.folder, "results/metrics", {**run.receipt["results"]["metrics"], "test/acc": 1.0})
    assert "but these results differ: metric test/acc 1.0, now 0." in verify(run.folder, code=1).out


def test_results_that_were_changed_are_no_yes_whatever_else_the_receipt_claims(copy: Path) -> None:
    """A second segment, or an empty entry of callbacks, does not make a best value or a state's digest soft."""
    experiment = Experiment(copy.parents[2])
    run = experiment.train(*TWO_EPOCHS, "seed=8", "checkpoint.monitor=val/acc", cwd=experiment.root)
    found = run.receipt
    changed(run.folder, "segments", [*found["segments"], found["segments"][0] | {"from_step": 3}])
    assert "the same bits to the end" in verify(run.folder).out
    changed(run.folder, "results/best", {**found["results"]["best"], "value": 1.0})
    assert "but these results differ: best" in verify(run.folder, code=1).out
    changed(run.folder, "results/best", found["results"]["best"])
    changed(run.folder, "config/callbacks", {"nothing": None})
    changed(run.folder, "results/state_digest", "0" * 64)
    assert "but these results differ: state_digest 0000" in verify(run.folder, code=1).out


def test_callbacks_with_paths_and_a_model_that_logs_by_itself_are_verified(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    (experiment.root / "more.py").write_text(
        "import lightning.pytorch as pl\n\n\nclass Draw(pl.Callback):\n"
        "    def on_train_epoch_end(self, trainer, pl_module):\n"
        "        trainer.logger.experiment.add_scalar('drawn', 1.0, trainer.global_step)\n"
    )
    run = experiment.train(
        "trainer.enable_progress_bar=false", *TWO_EPOCHS[2:], "+callbacks.draw._target_=more.Draw",
        "+callbacks.keep={_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/acc}",
        cwd=experiment.root)  # fmt: skip
    found = verify(run.folder).out
    assert "the same bits to the end; not verified: state_digest" in found


def test_a_path_of_the_data_can_be_another_here(copy: Path) -> None:
    assert "the same bits" in verify(copy, "--steps", "3", "--set", "data.num_workers=1").out
    found = verify(copy, "--steps", "3", "--set", "data.max_shift=2", code=1).out
    assert "differs      config.data.max_shift  1 -> 2" in found
    assert "has no such key" in verify(copy, "--set", "data.no=1", code=2).err
    assert "must be KEY=VALUE" in verify(copy, "--set", "data", code=2).err


def test_code_below_pythonpath_is_that_of_the_commit(copy: Path) -> None:
    """With a src layout and a relative PYTHONPATH, not what lies in the working tree today."""
    experiment = Experiment(copy.parents[2])
    source = experiment.root / "src" / "slopes.py"
    source.parent.mkdir()
    source.write_text("SLOPE = 0.02\n")
    model = experiment.root / "model.py"
    model.write_text("from slopes import SLOPE\n" + model.read_text().replace("nn.ReLU()", "nn.LeakyReLU(SLOPE)"))
    git(experiment.root, "add", "-A")
    git(experiment.root, "commit", "-qm", "src")
    path = {"PYTHONPATH": "src"}
    run = experiment.train(*TWO_EPOCHS, cwd=experiment.root, env=path)
    source.write_text("SLOPE = 0.5\n")
    found = verify(run.folder, cwd=experiment.root, **path)
    assert "code         commit " in found.out
    assert "the same bits to the end" in found.out
    diff = experiment.train(*TWO_EPOCHS, cwd=experiment.root, env=path).folder
    done = subprocess.run([LABTRAIN, "diff", run.folder, diff], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "  code.sources.src/slopes.py  " in done.stdout


def test_where_all_tensors_differ_the_first_and_their_number_come_from_the_next_checkpoint(copy: Path) -> None:
    found = json.loads(verify(copy, "--json", code=1, FAULT="7 all 3").out)
    assert found["divergence"] == {"step": 7, "phase": "update", "tensor": "net.0.weight"}
    assert "tensors differ at step 10" in found["found"]


def test_a_machine_that_does_not_repeat_itself_is_said_so(copy: Path) -> None:
    """From the last checkpoint the fault's own count of steps begins anew: it does not come again."""
    found = json.loads(verify(copy, "--json", code=1, FAULT="8 weight:net.9.bias 4 counted").out)
    assert found["divergence"] == {"step": 8, "phase": "update", "tensor": "net.9.bias"}
    assert (
        "no difference when trained again from step 5: results on this machine are not reproducible" in found["found"]
    )


def test_each_wrong_result_is_named(copy: Path) -> None:
    (copy / "trail.jsonl").unlink()
    shutil.rmtree(copy / "checkpoints")
    wrong = {
        "results/weights_digest": "0" * 64,
        "results/state_digest": "1" * 64,
        "results/steps": 21,
        "trail/sha256": "2" * 64,
    }
    for key, value in wrong.items():
        changed(copy, key, value)
    found = json.loads(verify(copy, "--json", code=1).out)
    assert "not the same bits: first at step 21, in the length" in found["found"]
    assert list(found["results"]) == ["steps", "weights_digest", "state_digest", "trail's sha256"]
    changed(copy, "results/steps", 20)
    assert "but these results differ: weights_digest 0000" in verify(copy, code=1).out
    changed(copy, "results/weights_digest", found["results"]["weights_digest"][1])
    changed(copy, "results/state_digest", found["results"]["state_digest"][1])
    assert "trail's sha256 2222" in verify(copy, code=1).out


def test_a_seed_that_is_not_the_runs_parts_in_the_first_batch(copy: Path) -> None:
    changed(copy, "config/seed", 7)
    found = json.loads(verify(copy, "--steps", "3", "--json", code=1).out)
    assert found["divergence"]["step"] == 1
    assert found["divergence"]["phase"] == "batch"
    assert {"key": "config", "a": "this", "b": "seed=42", "matters": False} in found["differences"]


def test_killed_and_moved_runs_come_out_in_their_own_segments_and_in_one_go(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    command = (*TWO_EPOCHS, "seed=5", "checkpoint.every_n_steps=4", "checkpoint.keep_last=9")
    first = subprocess.Popen(
        experiment.command(*command, "trainer.devices=2"), cwd=experiment.root, stderr=subprocess.DEVNULL
    )
    folders = lambda: [path for path in copy.parent.glob("*") if path != copy]  # noqa: E731
    wait_until(lambda: any(len(read_trail(folder)) >= 10 for folder in folders()), process=first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    run = experiment.train(*command, cwd=experiment.root)
    segments = run.receipt["segments"]
    assert [(each["devices"], each["status"]) for each in segments] == [(2, "killed"), (1, "complete")]
    assert 0 < segments[1]["from_step"] < STEPS
    for options in ((), ("--segments",)):
        assert "yes          the same bits to the end" in verify(run.folder, *options).out


def test_what_was_found_stands_where_the_store_is_away(copy: Path) -> None:
    """The step, phase and tensor are known from the trail; that the checkpoints cannot be read is said beside it."""
    changed(copy, "config/checkpoint/url", "sftp://127.0.0.1:1/gone")
    found = json.loads(verify(copy, "--json", code=1, FAULT="7 weight:net.9.bias 3").out)
    assert found["divergence"] == {"step": 7, "phase": "update", "tensor": "net.9.bias"}
    assert "the same difference when trained again from step 0" in found["found"]
    assert "its checkpoints cannot be read: sftp://127.0.0.1:1/gone/" in found["found"]


def test_what_went_on_after_a_change_is_verified_from_there(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    command = (*QUICK, "trainer.max_epochs=6", "seed=8", "checkpoint.every_n_steps=1", "checkpoint.keep_last=999")
    training = subprocess.Popen(experiment.command(*command), cwd=experiment.root, stderr=subprocess.DEVNULL)
    there = lambda: [path for path in copy.parent.glob("*") if path != copy and len(read_trail(path)) > 5]  # noqa: E731
    wait_until(there, process=training)
    training.send_signal(signal.SIGTERM)
    assert training.wait(timeout=300) == 75
    run = experiment.train(*command, "model.dropout=0.1", f"resume={there()[0]}", cwd=experiment.root)
    (after,) = [segment["from_step"] for segment in run.receipt["segments"] if segment["changed"]]
    assert f"the run resumed with changes at step {after}" in verify(run.folder, code=2).err
    assert f"the same bits from step {after + 1} to the end" in verify(run.folder, "--from", str(after)).out


def test_one_flipped_bit_is_named_by_step_and_tensor(copy: Path) -> None:
    """In a gradient before the step, when run again."""
    name_a_flipped_bit(copy, "gradient")


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
    assert found.out.splitlines()[-1] == "yes          the same bits to the end"
    assert not subprocess.run(
        ["git", "-C", clone, "status", "--porcelain"], capture_output=True, text=True, check=True
    ).stdout
    assert "trail.jsonl" in verify(tmp_path / "given" / "receipt.json", "--steps", "3", code=2, cwd=clone).err
    changed(tmp_path / "given", "code/patch", "")
    assert "does not match the receipt: model.py, more.py" in verify(tmp_path / "given", code=2, cwd=clone).err
    changed(tmp_path / "given", "code/commit", "0" * 40)
    assert "is not in this repository" in verify(tmp_path / "given", code=2, cwd=clone).err
    assert "cannot find the experiment" in verify(tmp_path / "given", code=2, cwd=tmp_path).err


def test_a_run_is_verified_while_it_is_trained(copy: Path) -> None:
    experiment = Experiment(copy.parents[2])
    long = (*QUICK, "trainer.max_epochs=400", "seed=9", "checkpoint.keep_last=1")
    training = subprocess.Popen(experiment.command(*long), cwd=experiment.root, stderr=subprocess.DEVNULL)
    try:
        there = lambda: [path for path in copy.parent.glob("*") if path != copy and len(read_trail(path)) > 30]  # noqa: E731
        wait_until(there, process=training)
        found = verify(there()[0], "--steps", "25")
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
    assert f"origin       step-{STEPS:010d} of run {copy.name}, which is not verified here" in found
    assert f"the same bits from step {STEPS + 1} to the end" in found
    assert "differ" not in found
    shutil.rmtree(copy / "checkpoints")
    assert f"the run began from step-{STEPS:010d} of run {copy.name}, found neither" in verify(run.folder, code=2).err


def test_the_golden_receipt_alone_comes_out_on_an_older_cpu(shared_experiment: Experiment, tmp_path: Path) -> None:
    """Recorded in portable mode, on another machine; here with this CPU's newer instructions hidden."""
    shutil.copy(ROOT / "tests" / "golden" / "receipt.json", tmp_path)
    found = verify(tmp_path / "receipt.json", cwd=shared_experiment.root, **OLDER_CPU)
    assert "yes          the same bits to the end" in found.out
    assert "differs      hardware.cpu" not in found.out


def test_code_that_only_train_py_finds_is_asked_for(own_experiment: Experiment, tmp_path: Path) -> None:
    """It puts a folder into sys.path; verify does not run it, and names the file; what the hint says works."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "lab_utils.py").write_text("WIDTH = 1\n")
    for name, line in (("train.py", "import sys; sys.path.append('../shared')"), ("model.py", "import lab_utils")):
        file = own_experiment.root / name
        file.write_text(file.read_text().replace("\nimport ", f"\n{line}\nimport ", 1))
    run_dir = own_experiment.train("trainer.max_epochs=1", *QUICK, cwd=own_experiment.root).folder
    refused = verify(run_dir, "--steps", "2", code=2, cwd=own_experiment.root).err
    assert "hint: PYTHONPATH=FOLDER before the same command, with the folder that contains lab_utils.py" in refused
    verify(run_dir, "--steps", "2", cwd=own_experiment.root, PYTHONPATH="../shared")


def test_from_a_checkpoint_is_not_the_whole(copy: Path) -> None:
    found = json.loads(verify(copy, "--from", "15", "--json").out)
    assert (found["whole"], found["found"]) == (False, "the same bits from step 16 to the end")
    assert "the run has 20 steps" in verify(copy, "--from", "20", code=2).err


def test_who_verified_is_told_of_this_machine(copy: Path) -> None:
    found = receipts.read(copy)
    assert found is not None
    gpu = {"name": "NVIDIA A100", "memory_bytes": 1, "compute_capability": "8.0"}
    changed(copy, "hardware", found["hardware"] | {"gpus": [gpu], "cpu": "Another"})
    assert "hardware.gpus" in verify(copy, "--steps", "2").out
    told = json.loads((copy / "verified.jsonl").read_text())
    assert told["gpus"] == []
    assert told["cpu"] == machine()["cpu"]


def test_a_receipt_of_any_name_is_verified(copy: Path, tmp_path: Path) -> None:
    """Beside other receipts, in a clone: with its trail and signature if they are its own; the verdict is beside it."""
    root = copy.parents[2]
    paper = root / "paper"
    paper.mkdir()
    row = paper / "table2-row3.json"
    shutil.copy(copy / "receipt.json", row)
    (paper / "receipt.json").write_text("{}")
    shutil.rmtree(root / "runs")
    done = verify(row, "--steps", "0", cwd=root, code=None)
    assert "0 lines in its trail, digest correct" in done.out
    assert not (paper / "table2-row3.verified.jsonl").exists()
    (paper / "trail.jsonl").write_text("{}")  # of some other run
    assert "0 lines in its trail" in verify(row, "--steps", "0", cwd=root, code=None).out
    done = verify(row, cwd=root)
    assert "yes          the same bits to the end" in done.out
    assert len((paper / "table2-row3.verified.jsonl").read_text().splitlines()) == 1
    assert sorted(file.name for file in paper.iterdir()) == [
        "receipt.json",
        row.name,
        "table2-row3.verified.jsonl",
        "trail.jsonl",
    ]


def test_a_run_that_began_with_weights_is_trained_again_with_them(own_experiment: Experiment) -> None:
    """Also in a clone, since the path is relative; with weights of another digest it is refused."""
    root = own_experiment.root
    first = own_experiment.train(*QUICK, "trainer.max_epochs=1", "data.batch_size=256", cwd=root)
    weights = root / "weights.safetensors"
    shutil.copy(next(first.folder.glob("checkpoints/*/weights.safetensors")), weights)
    begun = (*QUICK, "trainer.max_epochs=1", "data.batch_size=256", "seed=3")
    run = own_experiment.train(*begun, f"init_from={first.folder.name}", cwd=root)
    again = own_experiment.train(*begun, "init_from.path=weights.safetensors", cwd=root)
    assert "is complete: nothing to train" in again.err
    assert again.out == run.out
    found = verify(run.folder, cwd=root)
    assert found.out.splitlines()[-1].startswith("yes          the same bits")
    assert "no effect" not in found.out
    assert "init_from" not in found.out
    shutil.rmtree(first.folder)
    found = verify(run.folder, "--set", f"init_from.path={weights}", cwd=root)
    assert found.out.splitlines()[-1].startswith("yes          the same bits")
    found = verify(run.folder, cwd=root, code=2)
    assert f"init_from={first.folder}: no such file or run" in found.err
    shutil.copy(next(run.folder.glob("checkpoints/*/weights.safetensors")), weights)
    found = verify(run.folder, "--set", f"init_from.path={weights}", cwd=root, code=2)
    assert f"the digest of its weights is {run.digest[:12]}, expected {first.digest[:12]}" in found.err
