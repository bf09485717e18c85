"""Credentials in real runs: what training, W&B, TensorBoard, CSV, a sweep and a failure leave holds none."""

import base64
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from labtrain.base.credentials import NOT_RECORDED
from labtrain.record import receipt
from tests.conftest import LABTRAIN, QUICK, Experiment
from tests.quick.base.test_credentials import SECRETS
from tests.real.training.test_recorder import git

FREE = [f"Pl4nted{number:02}S3cretV4lue" for number in range(14)]
BASIC = base64.b64encode(f"ada:{FREE[0]}".encode()).decode()
# Of the table, those that stand in a text of their own: a configuration has them under innocent keys.
TEXTS = {kind: given for kind, given in SECRETS.items() if isinstance(given[0], str) and "${" not in given[0]}
PLANTED = [BASIC, *FREE, *(secret for _, secret in TEXTS.values() if len(secret) > 7)]
SHORT = ("trainer.max_steps=2", "trainer.enable_progress_bar=false", "trainer.limit_val_batches=1")


def plant(root: Path) -> None:
    """Give an experiment credentials in each way; its model keeps all of them as hyperparameters."""
    git(root, "init", "-q")
    git(root, "remote", "add", "origin", f"https://{FREE[9]}:x-oauth-basic@git.lab/x.git")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    model = (root / "model.py").read_text()
    model = model.replace("learning_rate: float = 0.01) -> None:", "learning_rate: float = 0.01, **more) -> None:")
    model = model.replace("super().__init__()", "super().__init__()\n        self.save_hyperparameters()")
    model = model.replace("        scores = self(images)", f'        password = "{FREE[10]}"\n        if self.hparams.get("fail"):\n'
                          "            raise RuntimeError('401 for ' + self.hparams['api_key'])\n        scores = self(images)")  # fmt: skip
    (root / "model.py").write_text(model)
    config = yaml.safe_load((root / "conf" / "config.yaml").read_text())
    config["model"] |= {
        "api_key": FREE[1], "auth": {"user": "ada", "password": FREE[2]}, "tokens": ["a", FREE[3]],
        "headers": {"Authorization": f"Basic {BASIC}", "Cookie": f"sid={FREE[4]}"}, "by.dots.api_key": FREE[5],
        "db": f"redis://:{FREE[6]}@h", "texts": {f"t{number}": text for number, (text, _) in enumerate(TEXTS.values())},
        "again": [f"said {FREE[1]} again", f"and {FREE[11]} of a variable"], "referred": "${oc.env:PLANTED_A}",
    }  # fmt: skip
    (root / "conf" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def holding(folder: Path) -> list[tuple[str, str]]:
    """Return (file, credential) of each that is there."""
    return [(path.relative_to(folder).as_posix(), secret) for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink() for secret in PLANTED if secret.encode() in path.read_bytes()]  # fmt: skip


def test_what_a_run_leaves_holds_no_credential(own_experiment: Experiment, tmp_path: Path) -> None:
    """Forty in a configuration, a command, a patch, a remote's URL and a variable: not one in any byte of any file.

    The run itself has them all: its model is made from them, and a resume goes on with them.
    """
    root = own_experiment.root
    runs = root / "runs"
    plant(root)
    assert len(PLANTED) > 40
    variables = {"WANDB_MODE": "offline", "PLANTED_A": FREE[12], "LAB_TOKEN": FREE[11]}
    command = ("logger=many", f"+logger.wandb.notes='password={FREE[7]}'", *SHORT)
    command = (*command, f"+logger.wandb.settings={{api_key: {FREE[8] * 2}}}")
    failed = own_experiment.train(*command, "+model.fail=true", env=variables, code=1, cwd=root)
    assert "RuntimeError: 401 for (not recorded)" in failed.err
    run = own_experiment.train(*command, env=variables, cwd=root)
    for each in (failed, run):
        assert not [secret for secret in PLANTED if secret in each.err + each.out]
    names = {path.name for path in runs.rglob("*")}
    assert {"hparams.yaml", "state.pt", "output.log", "code.patch", "config.yaml"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert holding(runs) == []
    assert run.receipt["config"]["model"]["referred"] == "${oc.env:PLANTED_A}"
    assert "password = " in run.receipt["code"]["patch"]

    more = own_experiment.train(*command, f"resume={run.folder}", "trainer.max_steps=3", env=variables, cwd=root)
    assert more.receipt["segments"][0]["from_step"] == 2
    for name in ("report", "crate"):
        file = tmp_path / f"made.{'zip' if name == 'crate' else 'html'}"
        subprocess.run([LABTRAIN, name, str(run.folder), "-o", str(file)], cwd=root, check=True, capture_output=True)
        if name == "crate":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(tmp_path / "crate")
    alphabet = ("made.html", "abcdefghij")  # of the page's scripts
    made = [each for each in holding(tmp_path) if not each[0].startswith("digits/") and each != alphabet]
    assert holding(runs) + made == []


COUNTS = """
import lightning.pytorch as pl


class Counts(pl.Callback):
    def __init__(self, name):
        self.name, self.steps = name, 0

    @property
    def state_key(self):
        return self._generate_state_key(name=self.name)

    def on_train_batch_end(self, *_):
        self.steps += 1

    def state_dict(self):
        return {"name": self.name, "steps": self.steps}

    def load_state_dict(self, state):
        assert state["name"] == self.name
        self.steps = state["steps"]

    def on_train_end(self, *_):
        print(f"{self.steps} steps were counted")
"""


@pytest.mark.release
def test_a_callbacks_option_from_the_environment_is_in_no_checkpoint(own_experiment: Experiment) -> None:
    """Its state's key is made of its options; a training that goes on finds the state all the same."""
    root = own_experiment.root
    (root / "counts.py").write_text(COUNTS)
    given = ("+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping", "+callbacks.stop.monitor=${oc.env:X}",
             "+callbacks.stop.strict=false", "+callbacks.counts._target_=counts.Counts",
             "+callbacks.counts.name=${oc.env:LAB_TOKEN}", *SHORT, *QUICK)  # fmt: skip
    variables = {"X": FREE[0], "LAB_TOKEN": FREE[1]}
    run = own_experiment.train(*given, env=variables, cwd=root)
    assert "2 steps were counted" in run.out + run.err
    assert holding(root / "runs") == []
    more = own_experiment.train(*given, "trainer.max_steps=5", f"resume={run.folder}", env=variables, cwd=root)
    assert "5 steps were counted" in more.out + more.err
    assert "callbacks used to create the checkpoint" not in more.err
    assert holding(root / "runs") == []


@pytest.mark.release
def test_what_a_sweep_leaves_and_says_holds_no_credential(own_experiment: Experiment, tmp_path: Path) -> None:
    """In multirun.yaml, in Hydra's line of each job, in the text of an error; the jobs are given them."""
    root = own_experiment.root
    plant(root)
    sweep = (
        "-m",
        "seed=1",
        f"+model.other={{secret_key: {FREE[13]}}}",
        f"paths.runs={tmp_path / 'runs'}",
        *SHORT,
        *QUICK,
    )
    run = own_experiment.train(
        *sweep, "+model.fail=true", env={"PLANTED_A": FREE[12], "LAB_TOKEN": FREE[11]}, code=1, cwd=root
    )
    assert "401 for (not recorded)" in run.err
    assert f"#0 : seed=1 +model.other={{secret_key:{NOT_RECORDED}}}" in run.err
    wrong = own_experiment.train(
        *sweep, f"model.api_key={FREE[13]}}}", env={"PLANTED_A": FREE[12], "LAB_TOKEN": FREE[11]}, code=2, cwd=root
    )
    for each in (run, wrong):
        assert not [secret for secret in PLANTED if secret in each.err + each.out]
    assert (tmp_path / "runs" / ".sweep" / "multirun.yaml").is_file()
    assert holding(tmp_path / "runs") == []


def verify(run_dir: Path, *options: str, **variables: str) -> tuple[int, str]:
    done = subprocess.run([LABTRAIN, "verify", str(run_dir), *options], env=os.environ | variables, cwd=run_dir.parents[2],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.release
def test_a_reference_is_recorded_and_read_where_the_run_is_trained_again(own_experiment: Experiment) -> None:
    """The name is that of the value; another value, or none, is named; with the value the bits are the same."""
    root = own_experiment.root
    model = (root / "model.py").read_text()
    model = model.replace("learning_rate: float = 0.01) -> None:", 'learning_rate: float = 0.01, scale: str = "1", token: str = ""'
                          ") -> None:\n        assert token == 'Pl4nted-token'")  # fmt: skip
    model = model.replace("self.learning_rate = learning_rate", "self.learning_rate = learning_rate * float(scale)")
    (root / "model.py").write_text(model)
    given = ("+model.scale=${oc.env:SCALE,2}", "+model.token=${oc.env:LAB_TOKEN}", *SHORT, *QUICK)
    run = own_experiment.train(*given, env={"LAB_TOKEN": "Pl4nted-token", "SCALE": "3"}, cwd=root)
    recorded = run.receipt["config"]["model"]
    assert (recorded["scale"], recorded["token"]) == ("${oc.env:SCALE,2}", "${oc.env:LAB_TOKEN}")
    assert "Pl4nted-token" not in (run.folder / receipt.FILE).read_text() + (run.folder / "config.yaml").read_text()
    literal = own_experiment.train("+model.scale='3'", "+model.token=Pl4nted-token", *SHORT, *QUICK, cwd=root)
    assert literal.folder == run.folder  # complete: nothing to train

    code, said = verify(run.folder, SCALE="3", LAB_TOKEN="Pl4nted-token")
    assert code == 0, said
    assert "environment variable" not in said
    code, said = verify(run.folder, LAB_TOKEN="Pl4nted-token")  # SCALE has its default: 2
    assert code == 1, said
    assert "differs      environment variable LAB_TOKEN or SCALE" in said
    assert "Pl4nted-token" not in said
    code, said = verify(run.folder, SCALE="3")
    assert code == 2, said
    assert "model.token is ${oc.env:LAB_TOKEN} in the receipt, but LAB_TOKEN is not set here" in said


@pytest.mark.release
def test_a_start_with_another_value_is_another_run(own_experiment: Experiment) -> None:
    """The command is the same, and the recorded configuration: the run's name tells."""
    root = own_experiment.root
    model = (root / "model.py").read_text()
    (root / "model.py").write_text(
        model.replace("learning_rate: float = 0.01)", 'learning_rate: float = 0.01, x: str = "")')
    )
    given = ("+model.x=a-${oc.env:X}", *SHORT, *QUICK)
    run = own_experiment.train(*given, env={"X": "one"}, cwd=root)
    more = ("trainer.max_steps=3", f"resume={run.folder}")
    other = own_experiment.train(*given, *more, env={"X": "two"}, cwd=root)
    assert other.folder != run.folder
    assert own_experiment.train(*given, *more, env={"X": "one"}, cwd=root).folder != other.folder
    same = own_experiment.train(*given, f"resume={run.folder}", env={"X": "one"}, cwd=root)
    assert same.folder == run.folder
