"""What of a configuration is nobody's own, and what composes without the experiment's code."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import ConfigError
from labtrain.record import receipt as receipts
from labtrain.record.sources import source_digests
from labtrain.review.inspection import called_with, composed, composed_differently
from labtrain.review.replay import _config_of, code_of, with_filters
from labtrain.review.sandbox import Sandbox, is_kept, make_sandbox, shows_a_home
from labtrain.review.trust import LIBRARY, _summary, foreign_targets, is_known
from labtrain.review.verification import VerifyOptions, verify_run
from tests.conftest import LABTRAIN, QUICK, Experiment, need

SOURCES = {
    "model.py": "import os\nimport torch\nfrom parts.layers import Block\nfrom os import system\nclass Net: pass\n"
    "def build(): pass\nalias = os.system\nclass Later: pass\nLater = eval\n",
    "parts/__init__.py": "from .layers import Block as Brick\nfrom . import layers\nfrom subprocess import Popen\n",
    "parts/layers.py": "class Block: pass\n",
    "vendor/hidden.py": "class Evil: pass\n",
    "again.py": "from again import Loop\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "target",
    ["model.Net", "model.build", "model.Block", "parts.Brick", "parts.layers.Block", "torch.nn.Linear", "torch.optim.AdamW",
     "torch.nn.modules.linear.Linear", "torch.optim.lr_scheduler.OneCycleLR", "torchmetrics.Accuracy",
     "torchmetrics.classification.MulticlassAccuracy", "lightning.pytorch.callbacks.EarlyStopping",
     "torch.utils.data.TensorDataset"],
)  # fmt: skip
def test_what_the_experiment_defines_and_what_trainings_are_made_of_is_not_named(target: str, root: Path) -> None:
    assert is_known(target, root, source_digests(root))


@pytest.mark.parametrize(
    "target",
    ["sympy.sympify", "os.system", "functools.partial", "builtins.eval", "hydra.utils.get_method", "hydra.utils.instantiate",
     "torch.load", "torch.hub.load", "torch.utils.cpp_extension.load", "torch.nn.modules.module.functools.partial",
     "torch.nn.Module.load_state_dict", "torch.utils.data.dataloader.multiprocessing.Process", "torch.os.system",
     "model.os.system", "model.torch.hub.load", "model.system", "model.alias", "model.Later", "model.Net.__init__",
     "parts.Popen", "parts.layers", "vendor.hidden.Evil", "again.Loop", "model", "model.Net ", "torch.nn.${x}", "m\u043edel.Net",
     "labtrain.review.replay.Replay", "", ["model.Net"], None],
)  # fmt: skip
def test_what_else_could_run_is_named(target: Any, root: Path) -> None:
    """Functions of libraries, what a module has imported, what is under no digest, and what is no name."""
    assert not is_known(target, root, source_digests(root))


def test_targets_are_found_wherever_hydra_makes_them(root: Path) -> None:
    """In nested mappings and lists, under _args_, and in a text that Hydra resolves when it makes the object."""
    evil = {"_target_": "builtins.eval", "_args_": ["1"]}
    config = {
        "model": {"_target_": "model.Net", "a": [{"b": evil}], "c": "${oc.create:{_target_:os.system}}", "d": "plain"},
        "data": {"_target_": "model.${.name}", "name": "os.system"},
        "callbacks": {"x": {"_target_": "hydra.utils.call", "_partial_": True, "_args_": [evil]}},
    }
    assert foreign_targets(config, root, source_digests(root)) == [
        ("model.a.0.b._target_", "builtins.eval"),
        ("data._target_", "model.${.name}"),
        ("callbacks.x._target_", "hydra.utils.call"),
        ("callbacks.x._args_.0._target_", "builtins.eval"),
        ("model.c", "${oc.create:{_target_:os.system}}"),
    ]


def test_the_classes_that_are_not_named_are_those_libraries_own() -> None:
    """None of the modules has another library's callable under a name with a capital, subprocess.Popen for one."""
    modules = ["torch.nn", "torch.nn.modules", "torch.optim", "torch.utils.data", "lightning.pytorch",
               "lightning.pytorch.callbacks", "torchmetrics", "labtrain", "labtrain.augment"]  # fmt: skip
    for name in ("torch.nn.modules", "torch.optim", "lightning.pytorch.callbacks"):
        package = importlib.import_module(name)
        modules += [f"{name}.{each.name}" for each in pkgutil.iter_modules(package.__path__) if each.name[0] != "_"]
    found = set()
    for name in modules:
        for attribute, value in vars(importlib.import_module(name)).items():
            if callable(value) and LIBRARY.fullmatch(f"{name}.{attribute}"):
                found.add(str(getattr(value, "__module__", "builtins")).partition(".")[0])
    # Types for annotations and exceptions, and containers: none calls what it is given, none opens or starts anything.
    harmless = {"abc", "builtins", "collections", "contextlib", "dataclasses", "datetime", "enum", "packaging", "pathlib",
                "types", "typing", "typing_extensions", "weakref"}  # fmt: skip
    assert found - harmless <= {"torch", "lightning", "lightning_utilities", "torchmetrics", "labtrain"}, found


def test_a_patch_is_summed_up_by_file() -> None:
    patch = (
        "diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n-x\n+y\n+z\n same\n"
        "diff --git a/b.so b/b.so\nindex 1..2\nGIT binary patch\nliteral 3\nzz\n"
    )
    assert _summary(patch) == ["a.py +2 -1", "b.so +0 -0, binary: not shown"]


def test_a_patch_is_summed_up_by_what_git_apply_changes() -> None:
    """Without a header, under another file's header, and with lines that look like headers in a hunk."""
    hunk = "@@ -1,2 +1,2 @@\n--- a/x\n+++ b/y\n same\n"
    assert _summary(f"--- a/m.py\n+++ b/m.py\n{hunk}") == ["m.py +1 -1"]
    lying = f"diff --git a/README.md b/README.md\n--- a/m.py\n+++ b/m.py\n{hunk}"
    assert _summary(lying) == ["README.md +0 -0", "m.py +1 -1"]
    assert _summary("--- /dev/null\n+++ b/n.py\n@@ -0,0 +1 @@\n+x\n") == ["n.py +1 -0"]
    assert _summary("--- a/o.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n") == ["o.py +0 -1"]


def test_where_a_librarys_part_would_write_is_named(root: Path) -> None:
    for place in ("/home/x", "~/x", "../x", "s3://x"):
        made = {"callbacks": {"c": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": place}}}
        assert foreign_targets(made, root, {}) == [("callbacks.c.dirpath", place)]
    made["callbacks"]["c"]["dirpath"] = "kept"
    assert foreign_targets(made, root, {}) == []


# ------------------------------------------------------------------------------------------------------ composed


def test_it_composes_as_train_py_does_and_runs_none_of_it(own_experiment: Experiment, tmp_path: Path) -> None:
    """Not train.py, no plugin of Hydra's and no package that lie beside it, no search path that names one."""
    root, canary = own_experiment.root, tmp_path / "ran"
    done = own_experiment.train(*QUICK, "seed=3", "--cfg", "job", "--resolve", cwd=root)
    (root / "train.py").write_text((root / "train.py").read_text() + f"open({str(canary)!r}, 'w')\n")
    for name in ("evil/__init__.py", "hydra_plugins/evil.py", "logging.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"open({str(canary)!r}, 'w')\n")
    before = Path.cwd(), os.environ.get("LABTRAIN_ROOT")
    os.chdir(root)
    try:
        found = composed(root, "train.py", [*QUICK, "seed=3"])
        import yaml

        assert found == yaml.safe_load(done.out)
        assert composed(root, "train.py", ["--config-name", "config", "seed=3"])["seed"] == 3
        for typed in (["hydra.searchpath=[pkg://evil]"], ["--config-dir=/etc"]):
            with pytest.raises(Exception, match="labtrain does not run that here"):
                composed(root, "train.py", typed)
        conf = root / "conf" / "config.yaml"
        conf.write_text(conf.read_text() + "\nhydra: {searchpath: [pkg://evil]}\n")
        with pytest.raises(Exception, match="labtrain does not run that here"):
            composed(root, "train.py", [])
    finally:
        os.chdir(before[0])
    assert os.environ.get("LABTRAIN_ROOT") == before[1]
    assert not canary.exists()


def test_where_its_configuration_lies_is_read_off_train_py(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import labtrain\nlabtrain.main('settings', config_name='first')\n")
    assert called_with(script) == ("settings", "first")
    script.write_text("from labtrain import main\nmain(config_path=f'{1}')\n")
    assert called_with(script) == ("conf", "config")


# ------------------------------------------------------------------------------------------------------ git's filters


def test_filters_of_git_run_after_the_question_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: Experiment
) -> None:
    """The user's own filters read what a commit of somebody else holds: Git LFS, say."""
    need("git", "git")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    root, canary = tmp_path / "lab", tmp_path / "ran"
    shutil.copytree(experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__", ".git"))
    (root / ".gitattributes").write_text("*.csv filter=x\n")
    (root / "data.csv").write_text("pointer\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    receipt = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())
    code = {"sources": source_digests(root), "commit": commit.strip(), "folder": "", "patch": ""}
    receipt["code"] |= code
    (root / "model.py").write_text("changed = 1\n")
    (tmp_path / "gitconfig").write_text("")
    found, _ = code_of(receipt, root, root, tmp_path)
    assert with_filters(found, receipt, root, root, tmp_path / "without") == found
    shutil.rmtree(tmp_path / "code")
    (tmp_path / "gitconfig").write_text(f'[filter "x"]\n\tsmudge = touch {canary} && echo data\n')
    found, whence = code_of(receipt, root, root, tmp_path)
    assert (whence, (found / "data.csv").read_text()) == (f"commit {commit[:12]}", "pointer\n")
    assert not canary.exists()
    filtered = with_filters(found, receipt, root, root, tmp_path / "filtered")
    assert (filtered / "data.csv").read_text() == "data\n"
    assert source_digests(filtered) == receipt["code"]["sources"]
    assert canary.exists()


def test_changed_code_of_a_run_without_a_commit_is_refused_with_what_to_do(root: Path, tmp_path: Path) -> None:
    """The hint has the commands that give the next run a commit."""
    receipt = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())
    receipt["code"] |= {"sources": {"model.py": "0" * 64}, "commit": None}
    with pytest.raises(
        ConfigError, match="names no commit: the run was trained outside git, or before the first"
    ) as error:
        code_of(receipt, tmp_path / "run", root, tmp_path)
    assert "git init; git add -A; git commit -m first; python train.py" in error.value.hint


# ------------------------------------------------------------------------------------------------------ the sandbox


def test_a_sandbox_is_given_no_value_of_a_variable_that_a_receipt_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user sets that key; those that every sandbox has, and defaults, are as they are."""
    receipt = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())

    def config_of(text: str, **changes: Any) -> Any:
        receipt["config"]["data"]["max_shift"] = text
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return _config_of(receipt, tmp_path, dotted, keep_trail=False, sandboxed=True)[0]["data"]["max_shift"]

    monkeypatch.setenv("LAB_PRIVATE", "17")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("LAB_ABSENT", raising=False)
    for text in ("${oc.env:LAB_PRIVATE}", "${oc.env:LAB_PRIVATE,2}", "a-${oc.env:LAB_ABSENT}"):
        with pytest.raises(
            ConfigError, match=r"--sandbox: data.max_shift is .*, and the sandbox does not have LAB_"
        ) as error:
            config_of(text)
        assert error.value.hint.startswith("--set data.max_shift=VALUE")
    assert config_of("${oc.env:LAB_PRIVATE}", data__max_shift=2) == 2
    assert config_of("${oc.env:LAB_ABSENT,5}") == "5"
    for text in ("${oc.env: LAB_PRIVATE ,2}", "${oc.env:'LAB_PRIVATE',2}", "${oc.env:LAB_ABSENT,${oc.env:\"LAB_PRIVATE\",2}}",
                 "${oc.decode:${oc.env:'LAB_PRIVATE',2}}"):  # fmt: skip
        assert str(config_of(text)) == "2", text
    assert os.environ["LAB_PRIVATE"] == "17"
    assert config_of("${oc.env:OMP_NUM_THREADS}") == "3"


def test_of_the_variables_a_sandbox_has_those_that_a_training_needs() -> None:
    for name in ("PATH", "LC_ALL", "PYTHONPATH", "OMP_NUM_THREADS", "MKL_CBWR", "GLIBC_TUNABLES"):
        assert is_kept(name), name
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS",
                 "XDG_RUNTIME_DIR", "GOOGLE_APPLICATION_CREDENTIALS", "KUBECONFIG", "TORCH_ACCESS_TOKEN", "HOME",
                 "LC_TICKET", "PYTHON_INDEX", "LABTRAIN_S3", "HYDRA_MINE"):  # fmt: skip
        assert not is_kept(name), name
    assert is_kept("PYTHONPATH", "/lab/code")
    assert not is_kept("PYTHONPATH", "https://me:hunter2hunter2@host/simple")


def test_a_sandbox_shows_no_folder_that_a_receipt_alone_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the experiment is found by the name of its script, which the receipt says."""
    receipt = receipts.read(Path(__file__).parents[2] / "golden")
    assert receipt is not None
    receipt["command"] = [".env"]
    run_dir = tmp_path / "lab" / "runs" / "lab" / receipt["run_id"]
    run_dir.mkdir(parents=True)
    receipts.write(run_dir, receipt)
    (tmp_path / ".env").write_text("PRIVATE=1")
    monkeypatch.chdir(tmp_path / "lab")
    with pytest.raises(ConfigError, match=r"--sandbox would show all of .*, a folder that only the receipt names"):
        verify_run(run_dir, VerifyOptions(sandbox=True))


def test_what_a_command_of_somebody_else_refers_to_is_not_shown(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())
    receipt["command"] = ["train.py", "+model.note=a${oc.env:LAB_PRIVATE}b", "+model.other=${oc.env:'LAB_PRIVATE'}"]
    monkeypatch.setenv("LAB_PRIVATE", "sesame-open")
    (found,) = composed_differently(receipt, experiment.root)
    assert "+model.note='a${oc.env:LAB_PRIVATE}b'" in found.b
    assert "sesame" not in str(found)


def test_a_reference_that_was_recorded_is_as_it_is_composed(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = json.loads((Path(__file__).parents[2] / "golden" / "receipt.json").read_text())
    receipt["command"] = ["train.py", "+model.note=${oc.env:LAB_PRIVATE,x}"]
    monkeypatch.setenv("LAB_PRIVATE", "sesame-open")
    before = {each.b for each in composed_differently(receipt, experiment.root)}
    receipt["config"]["model"]["note"] = "${oc.env:LAB_PRIVATE,x}"
    after = {each.b for each in composed_differently(receipt, experiment.root)}
    assert any("+model.note" in text for text in before)
    assert not any("model.note" in text for text in after)


def test_a_sandbox_shows_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for folder in ("/", tmp_path, tmp_path / "home", tmp_path / "home" / "me"):
        assert shows_a_home(Path(folder))
    assert not shows_a_home(tmp_path / "home" / "me" / "lab")
    assert not shows_a_home(tmp_path / "home" / "you")
    monkeypatch.setattr("labtrain.review.sandbox.check_bubblewrap", lambda: None)
    for changes in ({"data.root": "~"}, {"data.roots": [{"a": str(tmp_path)}]}, {"data.root": "/"}):
        with pytest.raises(Exception, match="is a home directory or contains one"):
            make_sandbox(code=tmp_path / "home", home=tmp_path / "home" / "me" / "lab", changes=changes)


def test_data_that_the_receipt_names_is_said_to_be_hidden_and_never_shown(tmp_path: Path) -> None:
    sandbox = Sandbox(home=tmp_path, reads=(tmp_path,))
    config = {"data": {"root": "/usr", "here": str(tmp_path / "x"), "gone": "/nowhere"}, "model": {}, "callbacks": {}}
    assert sandbox.hidden(config) == ["data.root=/usr"]
    command, _ = sandbox.around(["true"], {}, scratch=tmp_path)
    bound = [command[at + 1] for at, word in enumerate(command) if re.fullmatch(r"--(ro-)?bind(-try)?", word)]
    assert str(tmp_path) in bound
    assert "/" not in bound


def test_a_file_that_is_no_receipt_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import torch\n")
    done = subprocess.run([LABTRAIN, "verify", "model.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: model.py is not a receipt: it is not JSON\n\nhint: ask whoever trained the run for its receipt again, if"
        " this was one; else: labtrain verify RUN\n"
    )
