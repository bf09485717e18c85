"""resume=RUN, the near run, and what is said when something changed. `resume=auto` is in test_exact.py."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED, ConfigError
from labtrain.record import receipt as receipts
from labtrain.record.resume import checkpoint_digest, find_origin, make_job, near_run
from labtrain.stores.store import sealed
from tests.support.exact import Runner, configure, outcome


def stop(runner: Runner, config: Any, step: int = 7) -> Path:
    runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    (run_dir,) = runner.folder.glob("runs/exact/*")
    return run_dir


def receipt(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "receipt.json").read_text()))


def test_going_on_with_a_run_although_something_changed(runner: Runner) -> None:
    """In its own folder, under its own name; the difference is said, and stands in the receipt."""
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    longer = configure("mlp", "even", trainer={"max_epochs": 4}, resume=str(run_dir))
    assert runner.run(longer) == run_dir
    assert "resumes from step-0000000007" in runner.said()
    assert "warning: resumes with a different config.trainer.max_epochs: was 3, now 4" in runner.said()
    found = receipt(run_dir)
    assert found["run_id"] == run_dir.name
    assert [segment["changed"] for segment in found["segments"]] == [
        [],
        [{"key": "config.trainer.max_epochs", "before": 3, "now": 4}],
    ]
    assert found["results"]["steps"] == 20


def test_beyond_a_complete_run_is_a_new_one(runner: Runner) -> None:
    """Three epochs and two more are five, with the same bits; the complete run's folder is as it was."""
    whole = outcome(runner.run(configure("mlp", "even", trainer={"max_epochs": 5})))
    run_dir = runner.run(configure("mlp", "even"))
    assert run_dir is not None
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    longer = configure("mlp", "even", trainer={"max_epochs": 5}, resume=run_dir.name)
    new = runner.run(longer)
    assert new not in (None, run_dir)
    assert (
        f"; it starts from checkpoint step-0000000015 of run {run_dir.name}. Run {run_dir.name} is not modified."
        in runner.said()
    )
    found = outcome(new)
    assert {**found, "run_id": None, "trail": None} == {**whole, "run_id": None, "trail": None}
    assert found["trail"] == whole["trail"][15:]
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == files
    (segment,) = receipt(new)["segments"]  # type: ignore[arg-type]
    manifest = json.loads((run_dir / "checkpoints/step-0000000015/manifest.json").read_text())
    assert segment["origin"] | {"url": None} == {
        "run_id": run_dir.name,
        "checkpoint": "step-0000000015",
        "step": 15,
        "digest": checkpoint_digest(manifest),
        "url": None,
    }
    again = runner.run(longer)  # the same command is the same run, and that is complete
    assert again == new
    assert len(receipt(new)["segments"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "longer"),
    [({"max_epochs": 3}, "trainer.max_epochs=4"), ({"max_epochs": None, "max_steps": 15}, "trainer.max_steps=16")],
)
def test_a_new_run_without_a_step_of_its_own_is_refused(limit: dict[str, Any], longer: str, runner: Runner) -> None:
    """Another option alone trains no further than the complete run did: nothing is left of it, and the hint works."""
    run_dir = runner.run(configure("mlp", "even", trainer=limit))
    assert run_dir is not None
    before = sorted(runner.folder.rglob("*"))
    other = configure("mlp", "even", trainer=limit, resume=run_dir.name, seed=7)
    runner.run(other, code=2)
    assert f"resume={run_dir.name}: that run ended at step 15, and this command trains no further step" in runner.said()
    assert f"hint: the same command with {longer}" in runner.said()
    assert "Traceback" not in runner.said()
    assert set(runner.folder.rglob("*")) - {*before, *runner.logs} == set()
    key, _, value = longer.removeprefix("trainer.").partition("=")
    assert receipt(runner.run(configure("mlp", "even", trainer=limit | {key: int(value)}, resume=run_dir.name, seed=7)))


def test_a_new_run_that_was_stopped_goes_on_itself(runner: Runner) -> None:
    """With the same command; another configuration, or another checkpoint that it begins from, is another run."""
    run_dir = runner.run(configure("mlp", "even"))
    assert run_dir is not None
    longer = configure("mlp", "even", trainer={"max_epochs": 5}, resume=run_dir.name)
    runner.run(longer, code=EXIT_STOPPED, signal_at=f"18 {signal.SIGTERM} 0")
    new = runner.run(longer)
    assert new not in (None, run_dir)
    assert [segment["from_step"] for segment in receipt(new)["segments"]] == [15, 18]  # type: ignore[arg-type]
    other = runner.run(configure("mlp", "even", trainer={"max_epochs": 4}, resume=run_dir.name))
    assert other not in (new, run_dir)


def test_a_complete_run_with_its_own_configuration_has_nothing_to_train(runner: Runner) -> None:
    run_dir = runner.run(configure("mlp", "even"))
    assert run_dir is not None
    before = (run_dir / "receipt.json").read_bytes()
    assert runner.run(configure("mlp", "even", resume=str(run_dir))) == run_dir
    assert (run_dir / "receipt.json").read_bytes() == before


@pytest.mark.parametrize("status", ["interrupted", "killed"])
def test_a_start_that_fails_before_its_first_step_leaves_the_run_as_it_was(runner: Runner, status: str) -> None:
    """Receipt, trail and what lies beside them; one that then gets further goes on as ever."""
    config = configure("mlp", "even", checkpoint={"every_n_steps": 5})
    run_dir = stop(runner, config, 7)
    if status == "killed":
        runner.run(config, code=None, signal_at=f"9 {int(signal.SIGKILL)} 0")
    kept = ("receipt.json", "trail.jsonl", "config.yaml")
    before = {name: (run_dir / name).read_bytes() for name in kept}
    broken = configure("mlp", "even", checkpoint={"every_n_steps": 5}, resume=str(run_dir))
    broken["callbacks"]["fails"] = {"_target_": "tests.support.resume_models.FailsAtOnce"}
    runner.run(broken, code=1)
    assert {name: (run_dir / name).read_bytes() for name in kept} == before
    runner.run(config)
    found = receipt(run_dir)
    ends = ["interrupted", "killed"] if status == "killed" else ["interrupted"]
    assert [segment["status"] for segment in found["segments"]] == [*ends, "complete"]
    assert found["results"]["steps"] == 15


def test_a_launchers_restart_goes_on_from_what_it_has_saved_since(runner: Runner, tmp_path: Path) -> None:
    """A job with resume=CHECKPOINTS is queued again with the same words: they name where it began, not where it stands."""
    run_dir = stop(runner, configure("mlp", "even"), 3)
    shutil.move(run_dir / "checkpoints", tmp_path / "kept")
    shutil.rmtree(run_dir)
    config = configure("mlp", "even", resume=str(tmp_path / "kept"))
    stop(runner, config, 7)
    runner.run(config, code=EXIT_STOPPED, signal_at=f"9 {signal.SIGTERM} 0", environment={"SLURM_RESTART_COUNT": "1"})
    assert [segment["from_step"] for segment in receipt(run_dir)["segments"]] == [3, 7]
    runner.run(config)  # a person's own start means what it says
    assert receipt(run_dir)["segments"][-1]["from_step"] == 3


def test_checkpoints_alone_are_a_run_too(runner: Runner, tmp_path: Path) -> None:
    config = configure("mlp", "even")
    reference = outcome(runner.run(configure("mlp", "even", paths={"runs": "elsewhere"}, resume="never")))
    shutil.rmtree(tmp_path / "runs")
    run_dir = stop(runner, config)
    shutil.move(run_dir / "checkpoints", tmp_path / "kept")
    shutil.rmtree(run_dir)
    config["resume"] = f"file://{tmp_path}/kept"
    found = outcome(runner.run(config))
    assert found["state_digest"] == reference["state_digest"]
    assert found["trail"] == reference["trail"][7:]  # the first lines went with the folder


def test_the_same_command_after_it_was_gone_on_with_says_so(runner: Runner) -> None:
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    runner.run(configure("mlp", "even", seed=43, resume=str(run_dir)))
    assert "different config.seed: was 42, now 43" in runner.said()


def test_another_machine_or_environment_is_said(runner: Runner) -> None:
    """A run that goes on on another processor, in strict mode, may get other bits: it is in the receipt."""
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    found = receipt(run_dir)
    found["hardware"]["cpu"] = "Another CPU"
    found["environment"]["distributions"]["torch"] = "2.8.0"
    receipts.write(run_dir, found)
    runner.run(config)
    assert "resumes with a different hardware.cpu: was Another CPU, now " in runner.said()
    assert "environment.distributions.torch: was 2.8.0" in runner.said()
    changed = {change["key"] for change in receipt(run_dir)["segments"][1]["changed"]}
    assert changed == {"hardware.cpu", "environment.distributions.torch"}


def test_nothing_is_said_of_another_number_of_devices(runner: Runner) -> None:
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    runner.run(config, world=2)
    assert "resumes with a different" not in runner.said()
    assert [segment["devices"] for segment in receipt(run_dir)["segments"]] == [1, 2]
    assert receipt(run_dir)["segments"][1]["changed"] == []


PLAIN: dict[str, Any] = {"determinism": {"shards": None, "mode": "warn"}}


def test_another_number_of_devices_is_said_where_it_changes_bits(runner: Runner) -> None:
    """Without shards, plain Lightning's sum over devices is another one, and the epoch's averages begin anew."""
    run_dir = stop(runner, configure("cnn", "even", **PLAIN))
    moved = configure("cnn", "even", **PLAIN, trainer={"devices": 2}, resume=str(run_dir))
    assert runner.run(moved, world=2) == run_dir
    assert "different config.trainer.devices: was 1, now 2" in runner.said()
    assert receipt(run_dir)["results"]["steps"] == 15


def test_a_stream_does_not_go_on_for_other_ranks(runner: Runner) -> None:
    """Each rank's loader has a state of its own: there is none for a second rank."""
    stream: dict[str, Any] = {"data": {"loader": "stateful"}, **PLAIN}
    run_dir = stop(runner, configure("cnn", "even", **stream))
    stream["determinism"] = {"shards": None, "mode": "warn"}
    moved = configure("cnn", "even", **stream, trainer={"devices": 2}, resume=str(run_dir))
    runner.run(moved, world=2, code=2)
    assert "the checkpoint holds the data's state for 1 ranks, this training has 2" in runner.said()
    assert "hint: trainer.devices=1, or resume=never" in runner.said()


@pytest.mark.parametrize(("before", "now"), [(PLAIN, {}), ({}, PLAIN)])
def test_shards_can_be_taken_up_and_given_up(runner: Runner, before: dict[str, Any], now: dict[str, Any]) -> None:
    run_dir = stop(runner, configure("mlp", "even", **before))
    assert runner.run(configure("mlp", "even", **now, resume=str(run_dir))) == run_dir
    assert "different config.determinism.shards" in runner.said()
    assert receipt(run_dir)["results"]["steps"] == 15


def test_a_near_run_is_found(runner: Runner, tmp_path: Path) -> None:
    """Same experiment and configuration, other code, not complete."""
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    config = receipt(run_dir)["config"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text("x = 1\n")
    job = make_job(config, root=tmp_path / "code", command=[])
    assert near_run(job) == run_dir
    assert near_run(make_job({**config, "seed": 43}, root=tmp_path / "code", command=[])) is None
    found = receipt(run_dir) | {"status": "complete"}
    receipts.write(run_dir, found)
    assert near_run(job) is None


def test_a_run_that_is_not_there_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run found: looked for ") as caught:
        find_origin("0123456789ab", tmp_path / "runs" / "digits")
    assert "runs/digits/0123456789ab/receipt.json" in str(caught.value)
    assert "ls " in caught.value.hint


def test_a_run_without_a_checkpoint_cannot_be_gone_on_with(runner: Runner) -> None:
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    shutil.rmtree(run_dir / "checkpoints")
    config["resume"] = str(run_dir)
    runner.run(config, code=2)
    assert "that run has no checkpoint yet" in runner.said()


def test_ranks_that_see_other_checkpoints_do_not_go_on(runner: Runner) -> None:
    """Nodes without a common folder: each would go on from its own."""
    config = configure("mlp", "even")
    stop(runner, config)
    runner.run(config, world=2, code=None, environment={"BLIND_RANK": "1"})
    assert "rank 1 resumes from step 0, rank 0 from 7: they see different checkpoints" in runner.said()
    assert "hint: set paths.runs to a folder that all nodes share" in runner.said()


def test_a_trail_that_does_not_reach_is_said_and_recorded(runner: Runner) -> None:
    """Which steps, on standard error and in the receipt; also by each start after it. test_trail.py has the ways."""
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    lines = (run_dir / "trail.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "trail.jsonl").write_bytes(b"".join(lines[:3]))
    said = "warning: trail.jsonl was changed after step-0000000007 was saved: the lines of these steps are missing"
    runner.run(config, code=EXIT_STOPPED, signal_at=f"9 {signal.SIGTERM} 0")
    assert said in runner.said()
    assert receipt(run_dir)["trail"]["missing"] == [[4, 7]]
    runner.run(config)
    assert "different: 4 to 7" in runner.said()
    assert receipt(run_dir)["trail"]["missing"] == [[4, 7]]
    receipts.hold_against_schema(receipt(run_dir), run_dir)


def test_another_runs_checkpoint_is_not_adopted(runner: Runner) -> None:
    """The start ends with exit code 2 and both names, and what is there stays."""
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    put = run_dir / "checkpoints" / "step-0000000009"
    shutil.copytree(run_dir / "checkpoints" / "step-0000000007", put)
    manifest = json.loads((put / "manifest.json").read_text()) | {"run_id": "0123456789ab", "step": 9}
    (put / "manifest.json").write_text(json.dumps(sealed(manifest)))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    runner.run(config, code=2)
    assert f"is a checkpoint of run 0123456789ab, but it is in the folder of run {run_dir.name}" in runner.said()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
