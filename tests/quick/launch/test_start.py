"""The start: what it may import before the first step, and what before an error in the configuration."""

import json

import pytest

from tests.conftest import Experiment

# Seconds or tenths of one each, and none is needed to train on a CPU with the defaults. torch._dynamo, scipy.signal and
# matplotlib are not among them: lightning.fabric and torchmetrics import these, whoever uses them (docs/why/benchmarks.md).
NEVER = {
    "torch._inductor.compile_fx": "speed.compile alone",
    "torch.distributed.checkpoint": "trainer.strategy=fsdp alone",
    "deepspeed": "Lightning's strategy of that name",
    "tensorflow": "tensorboard has a stand-in for it",
    "wandb": "logger=wandb",
    "s3fs": "checkpoint.url=s3://; Lightning would import it to write hparams.yaml",
    "boto3": "tensorboard's, for event files on S3",
    "paramiko": "checkpoint.url=sftp://",
    "fastjsonschema": "a run that has a receipt",
    "rocrate": "labtrain crate",
    "plotly": "labtrain report",
    "jinja2": "labtrain new and report",
    "cookiecutter": "labtrain new",
    "optuna": "a sweep of Optuna's",
    "submitit": "a sweep of submitit's",
    "sqlalchemy": "a sweep of Optuna's",
    "IPython": "notebooks",
    "labtrain.launch.sweep": "stage 1",
    "labtrain.review.report": "labtrain report",
}
# Of stage 1, which composes: what is beyond the standard library and Hydra's own.
NOT_BEFORE = {
    "torch",
    "lightning",
    "torchmetrics",
    "numpy",
    "scipy",
    "sklearn",
    "pandas",
    "tensorboard",
    "model",
    "data",
}

AT_FIRST_STEP = """
import json, os, sys
import lightning.pytorch as pl

class Modules(pl.Callback):
    def on_train_batch_end(self, *_):
        sys.stderr.write("modules " + json.dumps(sorted(sys.modules)) + "\\n")
        sys.stderr.flush()
        os._exit(0)
"""
AT_EXIT = """
import atexit, json, sys

@atexit.register
def tell():
    sys.stderr.write("modules " + json.dumps(sorted(sys.modules)) + "\\n")

"""


def modules(printed: str) -> set[str]:
    line = next(line for line in printed.splitlines() if line.startswith("modules "))
    return set(json.loads(line.removeprefix("modules ")))


def test_a_training_on_a_cpu_imports_nothing_that_it_does_not_need(own_experiment: Experiment) -> None:
    (own_experiment.root / "first.py").write_text(AT_FIRST_STEP)
    run = own_experiment.train("trainer.accelerator=cpu", "+callbacks.first._target_=first.Modules")
    found = modules(run.err)
    assert {"torch", "lightning.pytorch", "model", "data"} <= found
    assert {name: why for name, why in NEVER.items() if name in found} == {}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["no_such_key=1"], 2),
        (["determinism.mode=stict"], 2),
        (["trainer.max_epochs=three"], 2),
        (["model._target_=modle.DigitsNet"], 2),
    ],
)
def test_help_and_errors_in_the_configuration_come_before_torch(
    arguments: list[str], code: int, own_experiment: Experiment
) -> None:
    path = own_experiment.root / "train.py"
    path.write_text(AT_EXIT + path.read_text())
    found = modules(own_experiment.train(*arguments, code=code).err)
    assert "hydra" in found
    assert found & NOT_BEFORE == set()
