"""A run to verify, and ways to verify it."""

import json
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from labtrain.record.trail import read_trail
from tests.conftest import LABTRAIN, QUICK, Experiment, Run
from tests.support.waiting import wait_until

# A fault of the machine, told by a variable that no receipt knows: one bit of a weight, a gradient or a loss at a step.
FAULT = """

_configure = DigitsNet.configure_optimizers


def _with_fault(self):
    import os

    found = _configure(self)
    step, place, bit, *counted = os.environ.get("FAULT", "0 none 0").split()
    count = [0]  # the step that is done; with a fourth word, of this process

    def flip(tensor):
        flat = tensor.detach().view(-1).view(torch.int32)
        flat[len(flat) // 2] ^= 1 << int(bit)

    def before(*_):
        count[0] = count[0] + 1 if counted else self.trainer.global_step + 1
        if count[0] == int(step) and place.startswith("gradient:"):
            flip(dict(self.named_parameters())[place.removeprefix("gradient:")].grad)

    def after(*_):
        if count[0] == int(step) and place.startswith("weight:"):
            flip(self.state_dict()[place.removeprefix("weight:")])
        if count[0] == int(step) and place == "all":
            for weights in self.parameters():
                flip(weights)

    self.on_after_backward = before
    found["optimizer"].register_step_post_hook(after)
    return found


DigitsNet.configure_optimizers = _with_fault
"""
TWO_EPOCHS = (*QUICK, "trainer.max_epochs=2", "data.batch_size=128")  # 20 steps
STEPS = 20


def verify(run: Path | str, *options: str, code: int | None = 0, cwd: Path | None = None, **env: str) -> Run:
    """Run `labtrain verify --trust`: most of what is verified here was copied or changed, so it is nobody's own."""
    done = subprocess.run(
        [LABTRAIN, "verify", str(run), "--trust", *options], capture_output=True, text=True, check=False, timeout=300,
        cwd=cwd, env=os.environ | env,
    )  # fmt: skip
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Run(done.returncode, done.stdout, done.stderr, cwd or Path.cwd())


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def trained(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """An experiment of this module's, in a git repository, and a run of it on two devices."""
    root = tmp_path_factory.mktemp("verify") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (root / "model.py").write_text((root / "model.py").read_text() + FAULT)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    experiment = Experiment(root)
    for _ in range(5):
        run = experiment.train(
            *TWO_EPOCHS, "trainer.devices=2", "checkpoint.every_n_steps=5", "checkpoint.keep_last=9", cwd=root
        )
        steps = [entry["step"] for entry in run.receipt["checkpoints"]]
        if sorted(set(steps)) == [5, 10, 15, STEPS]:
            return experiment, run.folder
        shutil.rmtree(run.folder)  # a save that is due while the one before is being written is made up for later
    pytest.fail(f"the disk is too slow to save every fifth step: {steps}")


@pytest.fixture
def copy(trained: tuple[Experiment, Path], tmp_path: Path) -> Path:
    """A copy of the run, below a copy of the experiment, that a test may change."""
    experiment, run_dir = trained
    shutil.copytree(experiment.root, tmp_path / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "digits" / run_dir.relative_to(experiment.root)


def started(run_dir: Path, *options: str, **env: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """Start `labtrain verify`, and wait for its training to write its trail."""
    process = subprocess.Popen(
        [LABTRAIN, "verify", run_dir, "--trust", *options],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | env,
        # Tests that a script runs in the background inherit an ignored SIGINT, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    found: list[psutil.Process] = []

    def trains() -> bool:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                if "labtrain.launch.job" in child.cmdline() and read_trail(Path(child.cmdline()[-1])):
                    found.append(child)
        return bool(found)

    wait_until(trains, process=process)
    return process, found[0]


def name_a_flipped_bit(copy: Path, kind: str) -> None:
    """Flip a bit, drawn by `kind`, of a weight in a training or of a gradient in its verification: which is found."""
    draw = random.Random(kind)
    step, bit = draw.randrange(2, STEPS), draw.randrange(32)
    tensor = draw.choice(["net.0.weight", "net.1.weight", "net.4.bias", "net.9.weight", "net.9.bias"])
    fault = {"FAULT": f"{step} {kind}:{tensor} {bit}"}
    if kind == "weight":
        experiment = Experiment(copy.parents[2])
        run = experiment.train(*TWO_EPOCHS, "seed=3", env=fault, cwd=experiment.root)
        found = json.loads(verify(run.folder, "--json", code=1).out)
    else:
        found = json.loads(verify(copy, "--json", code=1, **fault).out)
    phase = {"weight": "update", "gradient": "gradient"}[kind]
    assert found["divergence"] == {"step": step, "phase": phase, "tensor": tensor}
    assert "results on this machine are reproducible" in found["found"]
    assert found["to_step"] == step - 1
