"""`labtrain diff`: each fact under its own name, what cannot matter told apart, and the step where runs part."""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from labtrain.base.errors import ConfigError, DamagedError
from labtrain.record import receipt
from labtrain.record.differences import compare, first_difference, overrides
from labtrain.record.trail import TRAIL
from tests.conftest import LABTRAIN
from tests.conftest import changed as change
from tests.support.exact import Runner, configure


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 15 steps, of portable mode's mode word: what each test changes is a copy's."""
    found = Runner(tmp_path_factory.mktemp("run")).run(configure("mlp", "even"))
    assert found is not None
    return found


def changed(run_dir: Path, folder: Path, key: str, value: Any) -> Path:
    """Return a copy of a run whose receipt says something else."""
    shutil.copytree(run_dir, folder / "copy", ignore=shutil.ignore_patterns(".lock"))
    change(folder / "copy", key, value)
    return folder / "copy"


def test_a_run_is_the_same_as_itself(run_dir: Path) -> None:
    found = compare(run_dir, run_dir / receipt.FILE)
    assert found.same
    assert (found.differences, found.overrides, found.divergence, found.metrics) == ([], [], None, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("environment/distributions/numpy", "1.0"),
        ("environment/changed_files", ["torch/nn/functional.py of torch was changed"]),
        ("environment/python", "3.9.0"),
        ("environment/route", "conda"),
        ("code/labtrain", "0" * 64),
        ("hardware/cpu", "Another CPU"),
        ("hardware/instruction_sets", ["avx2"]),
        ("hardware/libc", "glibc 2.17"),
        ("hardware/driver", "530.30.02"),
        ("determinism/variables/NVIDIA_TF32_OVERRIDE", "1"),
        ("determinism/float32_matmul_precision", "high"),
        ("data/train/digest", "0" * 64),
    ],
)
def test_each_cause_has_its_own_name(run_dir: Path, tmp_path: Path, key: str, value: Any) -> None:
    found = compare(run_dir, changed(run_dir, tmp_path, key, value))
    assert [(each.key, each.b, each.matters) for each in found.differences] == [(key.replace("/", "."), value, True)]
    assert not found.same


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config/trainer/devices", 4),
        ("config/data/num_workers", 3),
        ("config/logger", {"csv": {}}),
        ("config/checkpoint/url", "s3://lab/x"),
        ("config/paths/runs", "elsewhere"),
        ("hardware/memory_bytes", 1),
        ("hardware/cores", 99),
        ("code/branch", "other"),
    ],
)
def test_what_cannot_matter_is_no_cause(run_dir: Path, tmp_path: Path, key: str, value: Any) -> None:
    found = compare(run_dir, changed(run_dir, tmp_path, key, value))
    assert found.differences
    assert not any(each.matters for each in found.differences)
    assert all(each.key.startswith(key.replace("/", ".")) for each in found.differences)
    assert found.same


def test_devices_are_a_cause_without_shards_and_the_processor_none_in_portable_mode(run_dir: Path) -> None:
    from labtrain.record.differences import differences

    a = receipt.read(run_dir)
    assert a is not None
    for key, value, wanted in (("shards", None, True), ("shards", 4, False)):
        one, other = copy.deepcopy(a), copy.deepcopy(a)
        one["config"]["determinism"][key] = other["config"]["determinism"][key] = value
        other["config"]["trainer"]["devices"] = 2
        assert [each.matters for each in differences(one, other)] == [wanted]
    one, other = copy.deepcopy(a), copy.deepcopy(a)
    one["determinism"]["mode"] = other["determinism"]["mode"] = "portable"
    other["hardware"]["cpu"] = "Another CPU"
    assert [each.matters for each in differences(one, other)] == [False]


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({"seed": 43}, {"config.seed"}),
        ({"determinism": {"shards": 2}}, {"config.determinism.shards"}),
        ({"determinism": {"threads": 2}}, {"config.determinism.threads"}),
        ({"data": {"flip": 3}}, {"config.data.flip", "data.train.digest"}),
    ],
)
def test_real_runs(run_dir: Path, tmp_path: Path, more: dict[str, Any], keys: set[str]) -> None:
    other = Runner(tmp_path).run(configure("mlp", "even", **more))
    assert other is not None
    found = compare(run_dir, other)
    causes = {each.key for each in found.differences if each.matters}
    assert causes == keys
    if "config.determinism.threads" not in keys:  # which changes no bit of so small a model
        assert found.divergence is not None
        assert found.same_weights is False
    done = subprocess.run([LABTRAIN, "diff", str(run_dir), str(other)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert all(key in done.stdout for key in keys)
    done = subprocess.run(
        [LABTRAIN, "diff", "--json", str(run_dir), str(other)], capture_output=True, text=True, check=False
    )
    assert {each["key"] for each in json.loads(done.stdout)["differences"] if each["matters"]} == causes
    assert json.loads(done.stdout)["same"] is False


def test_on_other_devices_it_is_the_same(run_dir: Path, tmp_path: Path) -> None:
    other = Runner(tmp_path).run(configure("mlp", "even"), world=2)
    done = subprocess.run([LABTRAIN, "diff", str(run_dir), str(other)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "config.trainer.devices  1 -> 2" in done.stdout
    assert "other differences: cannot change bits" in done.stdout
    assert "cause" not in done.stdout


def test_weights_that_were_changed_at_the_end_are_compared_with_such(tmp_path: Path) -> None:
    """A run and its like, each with a checkpoint of its last step and another of what a callback made of it."""
    config = configure("mlp", "even")
    config["callbacks"]["halve"] = {"_target_": "tests.support.exact_worker.Halve"}
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append(Runner(tmp_path / name).run(config))
    assert runs[0] is not None
    assert runs[1] is not None
    assert compare(*runs).same


def test_a_run_that_has_not_ended_has_no_cause_for_that(run_dir: Path, tmp_path: Path) -> None:
    stopped = changed(run_dir, tmp_path, "environment", {
        key: value for key, value in (receipt.read(run_dir) or {})["environment"].items() if "files" not in key
    })  # fmt: skip
    assert not [each for each in compare(run_dir, stopped).differences if each.matters]


def test_what_is_no_number_is_itself(run_dir: Path, tmp_path: Path) -> None:
    runs = [changed(run_dir, tmp_path / name, "results/metrics/val/loss".replace("val/loss", "nan"), float("nan"))
            for name in ("a", "b")]  # fmt: skip
    assert compare(*runs).same


def test_a_receipt_with_a_right_digest_and_a_missing_key_is_refused(run_dir: Path, tmp_path: Path) -> None:
    lacking = changed(run_dir, tmp_path, "trail", {"file": TRAIL})
    with pytest.raises(DamagedError, match=r"trail must contain \['every_n_steps', 'sha256', 'tensors'\] properties"):
        compare(run_dir, lacking)


def test_overrides_turn_one_configuration_into_the_other() -> None:
    """Hydra reads them back as they were meant."""
    values = [
        "a b",
        "null",
        "12",
        "1e3",
        "it's",
        "back\\slash",
        "end\\",
        "\\'",
        "",
        "s3://lab/x",
        [1, "two", None],
        True,
        None,
        0.1,
        -3,
    ]
    a = {"same": 1, "gone": 2, "deep": {f"k{index}": "before" for index in range(len(values))}}
    b = {"same": 1, "new": "x", "deep": {f"k{index}": value for index, value in enumerate(values)}}
    parsed = OverridesParser.create().parse_overrides(overrides(a, b))
    found = {each.key_or_group: each.value() for each in parsed if not each.is_delete()}
    assert found == {**{f"deep.k{index}": value for index, value in enumerate(values)}, "new": "x"}
    assert [each.key_or_group for each in parsed if each.is_delete()] == ["gone"]
    assert [each.key_or_group for each in parsed if each.is_add()] == ["new"]


def test_what_is_no_run_or_was_changed_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run: looked for receipt\.json"):
        compare(run_dir, tmp_path)
    copied = tmp_path / "copy"
    shutil.copytree(run_dir, copied)
    lines = (copied / TRAIL).read_text().splitlines(keepends=True)
    (copied / TRAIL).write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    with pytest.raises(DamagedError, match=r"trail.jsonl is broken"):
        first_difference(run_dir, copied)
    with pytest.raises(DamagedError, match=r"trail.jsonl was changed after it was written"):
        compare(run_dir, copied)
    (copied / "receipt.json").write_text((copied / "receipt.json").read_text().replace('"steps": 15', '"steps": 16'))
    done = subprocess.run([LABTRAIN, "diff", str(run_dir), str(copied)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "was changed after it was written" in done.stderr
    assert "hint: " in done.stderr


@pytest.mark.parametrize("url", ["{}/store", "local://{}/store"])
def test_checkpoints_are_compared_where_checkpoint_url_says(
    runner: Runner, url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without a trail only they tell of the difference; of a store that is away, that they were not compared is said."""
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": True})
    config = configure("mlp", "even", checkpoint={"url": url.format(runner.folder)}, trail={"every_n_steps": 0})
    config["callbacks"] = {"here": {"_target_": "tests.support.small_models.Here"}}
    one, other, same = (runner.run(config | {"seed": seed, "resume": "never"}) for seed in (1, 2, 1))
    assert one and other and same  # noqa: PT018
    found = compare(one, other)
    assert found.divergence is not None
    assert (found.divergence.step, found.divergence.tensor) == (None, "net.1.bias")
    assert compare(one, same).divergence is None
    change(other, "config/checkpoint/url", "sftp://127.0.0.1:1/gone")
    assert compare(one, other).divergence is None
    assert "warning: checkpoints are not compared: sftp://127.0.0.1:1/gone" in capsys.readouterr().err
