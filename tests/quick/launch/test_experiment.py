"""`labtrain.compose`: the configuration of an experiment, as its train.py would compose it."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import labtrain
from labtrain.launch.experiment import composed_at
from tests.conftest import Experiment

OVERRIDES = ["seed=7", "experiment=other", "+data.more=${hydra:job.name}", "+data.place=${oc.env:HOME}/data"]


def test_it_is_what_train_py_composes(shared_experiment: Experiment) -> None:
    """Also from a folder in the experiment; references to the environment stay references, for the receipt."""
    printed = yaml.safe_load(shared_experiment.train(*OVERRIDES, "--cfg", "job", "--resolve").out)
    cfg = labtrain.compose(OVERRIDES, path=shared_experiment.root / "notebooks")
    found: Any = OmegaConf.to_container(cfg, resolve=True)
    found["data"]["more"] = printed["data"]["more"]  # the name of the program
    assert found == printed
    assert found["paths"]["runs"] == str(shared_experiment.root / "runs")
    assert OmegaConf.to_container(cfg, resolve=False)["data"]["place"] == "${oc.env:HOME}/data"  # type: ignore[index]
    assert cfg.experiment == "other"


def test_two_experiments_in_one_process_keep_apart(own_experiment: Experiment, shared_experiment: Experiment) -> None:
    """Each configuration knows its folder, also a copy, a merge and one that was changed."""
    first, second = (labtrain.compose(path=each.root) for each in (own_experiment, shared_experiment))
    first.trainer.max_epochs = 2
    assert first.paths.runs == str(own_experiment.root / "runs")
    for each in (first, copy.deepcopy(first), OmegaConf.merge(first, {"seed": 3})):
        assert composed_at(each) == own_experiment.root  # type: ignore[arg-type]
    assert composed_at(second) == shared_experiment.root
    assert composed_at(OmegaConf.create({})) is None


def test_the_callers_own_hydra_is_as_before(shared_experiment: Experiment) -> None:
    before, path = os.environ.get("LABTRAIN_ROOT"), sys.path[:]
    with initialize_config_dir(str(shared_experiment.root / "conf"), version_base="1.3"):
        labtrain.compose(path=shared_experiment.root)
        assert GlobalHydra.instance().is_initialized()
        assert compose("config", ["experiment=mine"]).seed == 42
    assert (os.environ.get("LABTRAIN_ROOT"), sys.path) == (before, path)


def test_the_folder_of_the_configuration_is_that_in_train_py(own_experiment: Experiment) -> None:
    script = own_experiment.root / "train.py"
    (own_experiment.root / "conf").rename(own_experiment.root / "settings")
    script.write_text(script.read_text().replace('config_path="conf"', 'config_path="settings"'))
    assert labtrain.compose(path=own_experiment.root).seed == 42


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"overrides": "seed=1"}, "overrides='seed=1': must be a list of texts\n\nhint: compose(['seed=1'])"),
        ({"overrides": ["sed=1"]}, "unknown key sed\n\nhint: similar keys: seed"),
        ({"overrides": ["seed"]}, "cannot read the override 'seed'"),
        ({"overrides": ["seed=1,2"]}, "Ambiguous value for argument 'seed=1,2'"),
        ({"overrides": ["logger=nope"]}, "Could not find 'logger/nope'\n\nhint: choose one of: "),
        ({"path": "/"}, "/ is not in an experiment: found no train.py in it or above it\n\nhint: cd to an experiment"),
        ({"path": "/no/such/folder"}, "/no/such/folder is not in an experiment"),
    ],
)
def test_what_cannot_be_composed_is_an_error_with_a_hint(
    arguments: dict[str, Any], says: str, shared_experiment: Experiment
) -> None:
    with pytest.raises(labtrain.LabtrainError, match=re.escape(says)):
        labtrain.compose(**{"path": shared_experiment.root, **arguments})


def test_a_folder_without_a_configuration_is_an_error(own_experiment: Experiment) -> None:
    (own_experiment.root / "conf" / "config.yaml").unlink()
    with pytest.raises(labtrain.LabtrainError, match="config"):
        labtrain.compose(path=own_experiment.root)
    (own_experiment.root / "train.py").write_text("def (\n")
    with pytest.raises(labtrain.LabtrainError, match=r"train\.py"):
        labtrain.compose(path=own_experiment.root)


def test_composing_imports_no_torch(shared_experiment: Experiment, tmp_path: Path) -> None:
    code = f"import sys, labtrain; labtrain.compose(path={str(shared_experiment.root)!r}); labtrain.train"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
