import json
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from omegaconf.errors import KeyValidationError

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.record import config as configuration
from labtrain.record.config import CONF, check, unknown_key
from tests.conftest import Experiment
from tests.quick.record.test_ranks import STEP

GOOD = {"experiment=digits", "+model._target_=model.Net", "+data._target_=data.Data", "data.batch_size=64"}


def composed(*overrides: str) -> dict:
    with initialize_config_module("labtrain.conf", version_base="1.3"):
        cfg = compose("labtrain", overrides=[*sorted(GOOD), *overrides])
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_composes(path: Path) -> None:
    """Each option of each group, in a whole configuration that is then found good."""
    group = path.parent.relative_to(CONF)
    if path.stem == "labtrain" and group.parts[:1] != ("hydra",):
        check(composed())
    elif group.parts[:1] == ("hydra",):
        assert yaml.safe_load(path.read_text())  # labtrain.yaml, which is composed above, names these
    else:
        check(composed(f"{group}={path.stem}"))


def test_the_keys_of_the_contract_are_there() -> None:
    """So that no override needs a `+`."""
    config = composed()
    for key in [
        "experiment",
        "seed",
        "resume",
        "model",
        "data",
        "callbacks",
        "logger",
        "paths.runs",
        "trail.every_n_steps",
        "data.batch_size",
        "data.num_workers",
        "determinism.mode",
        "determinism.shards",
        "determinism.threads",
        "checkpoint.url",
        "checkpoint.every_n_steps",
        "checkpoint.every_seconds",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.precision",
        "trainer.max_epochs",
        "trainer.max_steps",
        "trainer.gradient_clip_val",
        "trainer.val_check_interval",
        "trainer.limit_train_batches",
        "trainer.limit_val_batches",
        "trainer.limit_test_batches",
        "trainer.log_every_n_steps",
        "trainer.enable_progress_bar",
    ]:
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_the_logger_many_is_all_three() -> None:
    assert set(composed("logger=many")["logger"]) == {"tensorboard", "csv", "wandb"}
    assert composed("logger=none")["logger"] == {}


@pytest.mark.parametrize("name", ["a" * 200, "\u4e00" * 66, "caf\u00e9-2"])
def test_a_name_of_a_folder_may_have_any_letters(name: str, tmp_path: Path) -> None:
    """And with what labtrain adds a file system takes it: `gate` calls a baseline NAME-RUN-2."""
    check(composed(f"experiment='{name}'"))
    (tmp_path / f"{name}-0123456789ab-2").mkdir()


@pytest.mark.parametrize(
    ("overrides", "says", "hint"),
    [
        (["seed=-1"], "seed=-1: must be an integer of at least 0", "seed"),
        (["seed=1.5"], "seed=1.5: must be an integer", "seed"),
        (["data.batch_size=0"], "data.batch_size=0", "data.batch_size"),
        (["data.batch_size=true"], "data.batch_size=True", "data.batch_size"),
        (["trainer.devices=two"], "a number of devices, a list of GPU numbers, or auto", "trainer.devices"),
        (["trainer.devices=0"], "trainer.devices=0", "trainer.devices"),
        (
            ["trainer.max_epochs=three"],
            "trainer.max_epochs=three: must be an integer of at least -1, or null",
            "max_epochs",
        ),
        (["trainer.max_epochs=1e3"], "trainer.max_epochs=1000.0: must be an integer", "trainer.max_epochs"),
        (["trainer.accumulate_grad_batches=0"], "a number of at least 1, or null", "trainer.accumulate_grad_batches"),
        (
            ["trainer.limit_val_batches=all"],
            "trainer.limit_val_batches=all: must be a number",
            "trainer.limit_val_batches",
        ),
        (
            ["trainer.detect_anomaly=yess"],
            "trainer.detect_anomaly=yess: must be true or false",
            "trainer.detect_anomaly",
        ),
        (["trainer.precision=8"], "one of 32-true, 16-mixed, bf16-mixed", "trainer.precision"),
        (["determinism.mode=stict"], "one of off, warn, strict, portable", "determinism.mode"),
        (["determinism.threads=0"], "determinism.threads=0", "determinism.threads"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last=0", "checkpoint.keep_last"),
        (["checkpoint.keep_best=1"], "needs a metric", "checkpoint.monitor"),
        (["experiment=../up"], "experiment=../up", "experiment"),
        (["experiment=.hidden"], "experiment=.hidden", "experiment"),
        (["experiment='" + "\u4e00" * 67 + "'"], "at most 200 bytes of letters", "experiment"),
        ([f"experiment={'a' * 201}"], "at most 200 bytes of letters", "experiment"),
        (["resume=null"], "must be auto, never, or a run", "resume"),
        (["determinism.shards=0"], "a number of shards, or null", "determinism.shards"),
        (
            ["determinism.shards=128"],
            "data.batch_size=64 cannot be cut into determinism.shards=128",
            "data.batch_size=128",
        ),
        (["trainer.devices=5"], "5 devices, but determinism.shards=4", "determinism.shards=5"),
        (
            ["checkpoint.every_n_steps=0"],
            "checkpoint.every_n_steps=0: must be a number above 0",
            "checkpoint.every_n_steps",
        ),
        (["checkpoint.every_seconds=-1"], "checkpoint.every_seconds=-1", "checkpoint.every_seconds"),
        (["+trainer.deterministic=true"], "unknown key trainer.deterministic", "use determinism.mode"),
        (["+trainer.max_epoch=3"], "unknown key trainer.max_epoch", "similar keys: trainer.max_epochs"),
        (["+checkpoint.keep=3"], "unknown key checkpoint.keep", "checkpoint.keep_"),
        (["+sed=1"], "unknown key sed", "similar keys: seed"),
        (["~model._target_"], "model._target_=None: must be a name", "model._target_"),
    ],
)
def test_a_bad_value_is_named_with_what_is_wanted(overrides: list[str], says: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(composed(*overrides))
    assert says in caught.value.args[0]
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("checkpoint.url=s3://key:s3cret@bucket/runs", "the URL s3://bucket contains a password"),
        ("resume='sftp://me:s3cret@host/runs'", "the URL sftp://host contains a password"),
        ("checkpoint.url='reference::file:///tmp/x'", "reference::file is not supported for checkpoints"),
        ("checkpoint.url=http://host/x", "http is not supported for checkpoints"),
        ("checkpoint.url='https://host/runs?token=s3cret'", "must be a URL without \\? and #"),
        ("checkpoint.url=3", "must be a path or a URL"),
        ("checkpoint.spool_bytes=0", "an integer of at least 1"),
        ("checkpoint.deliver_seconds=null", "must be a number above 0"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused(override: str, says: str) -> None:
    """A URL with a credential in it would stand in the receipt, and in this very error."""
    with pytest.raises(ConfigError, match=says) as error:
        check(composed(override))
    assert "s3cret" not in str(error.value)


def test_near_keys_come_from_the_same_group_first() -> None:
    error = unknown_key(
        "trainer.limit_trian_batches", ["trainer.limit_train_batches", "data.limit_train_batches", "seed"]
    )
    assert error.hint == "similar keys: trainer.limit_train_batches, data.limit_train_batches"
    assert unknown_key("zzz", ["seed"]).hint == "python train.py --help lists all keys"


def test_a_stranger_is_not_explained() -> None:
    """Someone's own exception keeps its traceback."""
    assert configuration.explain(ZeroDivisionError("x")) is None
    mine = LabtrainError("mine")
    assert configuration.explain(mine) is mine


# ------------------------------------------------------------------ as a person meets them: train.py, exit code 2, a hint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trainer.max_epoch=3"], r"unknown key trainer.max_epoch\n\nhint: similar keys: trainer.max_epochs"),
        (["model.widht=3"], r"unknown key model.widht\n\nhint: similar keys: model.width"),
        (
            ["logger=tensorbord"],
            r"Could not find 'logger/tensorbord'\n\nhint: choose one of: comet, csv, many, mlflow, none, tensorboard, wandb",
        ),
        (["loger=csv"], r"loger[\s\S]*\n\nhint: "),
        (["seed=[1"], r"cannot read the override 'seed=\[1'[\s\S]*\n\nhint: write key=value"),
        (["seed"], r"cannot read the override 'seed'[\s\S]*\n\nhint: write key=value"),
        (["seed=forty-two"], r"seed=forty-two: must be an integer of at least 0\n\nhint: "),
        (["seed=${nothing}"], r"seed: Interpolation key 'nothing' not found\n\nhint: "),
        (["data.batch_size=???"], r"data.batch_size has no value\n\nhint: "),
        (["model._target_=model.Nothing"], r"model._target_=model.Nothing: [\s\S]*\n\nhint: correct model"),
        (
            ["model._target_=modle.Net"],
            r"model._target_=modle.Net: no module modle next to train.py[\s\S]*\n\nhint: correct model",
        ),
        (["+callbacks.x._target_=nothing.X"], r"callbacks.x._target_=nothing.X: no module nothing[\s\S]*\n\nhint: "),
        (
            ["+model.depth=3"],
            r"model._target_=model.DigitsNet: [\s\S]*unexpected keyword argument 'depth'[\s\S]*\n\nhint: ",
        ),
        (["model._target_=data.Digits"], r"model._target_=data.Digits: [\s\S]*\n\nhint: "),
        (
            ["trainer.accelerator=gpu", "trainer.devices=3"],
            r"trainer.devices=3 asks for GPU \d, but this machine has \d GPUs?\n\nhint: ",
        ),
        (
            ["trainer.accelerator=cpu", "trainer.precision=16-mixed"],
            r"fp16 with loss scaling needs a GPU\n\nhint: trainer.precision=bf16-mixed",
        ),
        (
            ["trainer.accelerator=cpu", "trainer.devices=[0,1]"],
            r"on a CPU it must be a number of processes\n\nhint: trainer.devices=2",
        ),
        (
            ["trainer.accelerator=cpu", "trainer.devices=4", "data.batch_size=3"],
            r"data.batch_size=3 cannot be cut into determinism.shards=4\n\nhint: data.batch_size=4 or more",
        ),
        (
            ["trainer.accelerator=cpu", "trainer.devices=4", "data.batch_size=3", "determinism.shards=null"],
            r"data.batch_size=3 is less than one sample for each of 4 devices",
        ),
        (
            ["resume=runs/digits/0123456789ab"],
            r"no run found: looked for [\s\S]*receipt.json[\s\S]*\n\nhint: labtrain ls ",
        ),
        (["trainer.gradient_clip_algorithm=cut"], r"Lightning's Trainer: [\s\S]*\n\nhint: "),
        (["~data"], r"the configuration lacks data\n\nhint: leave out ~KEY"),
        (["~determinism.shards"], r"the configuration lacks determinism.shards"),
        (["~logger"], r"the configuration lacks logger\n\nhint: logger=none"),
        (["trainer=null"], r"null is not the name of an option"),
        (["+logger.tensorbord={}"], r"unknown logger tensorbord: [\s\S]*\n\nhint: "),
    ],
)
def test_bad_input_ends_with_two_a_hint_and_nothing_written(
    arguments: list[str], says: str, experiment: Experiment, tmp_path: Path
) -> None:
    run = experiment.train("paths.runs=runs", *arguments, code=2)
    assert run.err.startswith("error: ")
    assert "Traceback" not in run.err
    assert re.search(says, run.err), run.err
    assert run.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["model=foo", "data=foo", "callbacks=null", "trail=3"])
def test_a_group_without_options_takes_none(override: str) -> None:
    """Hydra then takes the name for a value: the error says so, and not that _target_ is missing."""
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf": must be a mapping; conf/{key}/ has no options to choose from"):
        check(composed(override))


def test_a_key_that_is_null_is_refused_with_a_hint_that_works() -> None:
    with pytest.raises(KeyValidationError) as found:
        OmegaConf.create("model: {cw: {null: 3}}")
    assert str(configuration.explain(found.value)) == (
        "model.cw: Incompatible key type 'NoneType', not supported by OmegaConf\n\nhint: put the key in quotes,"
        " as a text"
    )
    assert OmegaConf.create('model: {cw: {"null": 3}}').model.cw == {"null": 3}


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("max_epochs: 15", "max_epoch: 15", "unknown key trainer.max_epoch in conf/"),
        ("model:", "sede: 3\nmodel:", "unknown key sede in conf/\n\nhint: similar keys: seed"),
        ("model:", "model: [", "a file in conf/ is not valid YAML"),
    ],
)
def test_a_typo_in_the_experiments_own_yaml(before: str, after: str, says: str, own_experiment: Experiment) -> None:
    """Hydra takes a misspelt key of the file itself as a new one."""
    path = own_experiment.root / "conf" / "config.yaml"
    path.write_text(path.read_text().replace(before, after))
    run = own_experiment.train(code=2)
    assert says in run.err
    assert not (own_experiment.root / "runs").exists()


def test_an_error_in_the_configuration_can_be_traced(experiment: Experiment) -> None:
    run = experiment.train("sed=1", env={"HYDRA_FULL_ERROR": "1"}, code=1)
    assert "Traceback" in run.err


@pytest.mark.parametrize("asked", ["-m", "hydra.mode=MULTIRUN"])
def test_a_sweep_in_each_copy_of_a_launcher_is_refused(asked: str, experiment: Experiment, tmp_path: Path) -> None:
    run = experiment.train(asked, "seed=1,2", "paths.runs=runs", env=STEP, code=2)
    assert "each of 4 processes would run the whole sweep" in run.err
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_too_large_for_the_environment_is_refused(own_experiment: Experiment) -> None:
    path = own_experiment.root / "conf" / "config.yaml"
    path.write_text(path.read_text().replace("data:\n", f"data:\n  names: {json.dumps(['x' * 100] * 1300)}\n"))
    assert "must be at most 120000 bytes" in own_experiment.train(code=2).err
