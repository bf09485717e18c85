"""Lightning's private names are used in one file, and each is there with the arguments that it is called with.

Where this fails after an upgrade of Lightning: change `src/labtrain/training/lightning.py` until it passes, then run the
tests of training.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies.launchers.subprocess_script import _launch_process_observer
from lightning.pytorch.trainer.call import _call_lightning_module_hook
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import CombinedLoader

from labtrain import training
from labtrain.exact import attributes
from labtrain.training.state.snapshots import LOOKED_INTO

SRC = Path(attributes.__file__).parents[1]
ADAPTER = SRC / "training" / "lightning.py"

# What Lightning keeps in an instance, under the names that lightning.py reads or writes.
ATTRIBUTES: dict[str, set[str]] = {
    "trainer": {
        "_checkpoint_connector",
        "_logger_connector",
        "_loggers",
        "_signal_connector",
    },
    "fit loop": {"_combined_loader"},
    "epoch loop": {"_batches_that_stepped"},
    "evaluation loop": {"_combined_loader"},
    "logger connector": {"_callback_metrics", "_current_fx", "_first_loop_iter"},
    "checkpoint connector": {"_loaded_checkpoint"},
    "combined loader": {"_mode"},
    "strategy": {"_lightning_optimizers"},
    "module": {"_current_fx_name", "_dtype", "_param_requires_grad_state", "_trainer"},
    "entry": {"_computed", "_defaults", "_forward_cache", "_update_count"},
    "metadata": {"_sync"},
    "csv logger": {"_experiment"},
}
# Those that only some configurations have, and the properties: of the class, or by name in its source.
IN_SOURCE: list[tuple[Any, str]] = [
    (pl.Trainer, "_active_loop"),
    (pl.Trainer, "_evaluation_loop"),
    (pl.Trainer, "_results"),
    (_FitLoop, "_can_stop_early"),
    (_TrainingEpochLoop, "_is_training_done"),
    (_TrainingEpochLoop, "_results"),
    (_EvaluationLoop, "_results"),
    (WandbLogger, "_experiment"),
    (WandbLogger, "_offline"),
    (MLFlowLogger, "_experiment_name"),
    (MLFlowLogger, "_initialized"),
    (MLFlowLogger, "_mlflow_client"),
    (MLFlowLogger, "_run_id"),
    (inspect.getmodule(_sync_module_states), "_ddp_params_and_buffers_to_ignore"),
]
SIGNATURES: list[tuple[Any, str]] = [
    (_TrainingEpochLoop.__init__, "(self, trainer, min_steps, max_steps)"),
    (_TrainingEpochLoop._should_accumulate, "(self)"),
    (_TrainingEpochLoop._should_check_val_fx, "(self, data_fetcher)"),
    (_TrainingEpochLoop._broadcast_sigterm_tensor, "(self)"),
    (_CheckpointConnector.__init__, "(self, trainer)"),
    (_CheckpointConnector._restore_modules_and_callbacks, "(self, checkpoint_path, weights_only)"),
    (_CheckpointConnector.dump_checkpoint, "(self, weights_only)"),
    (_LoggerConnector.on_epoch_end, "(self)"),
    (_SignalConnector.register_signal_handlers, "(self)"),
    (_ResultMetric.__init__, "(self, metadata, is_tensor)"),
    (_ResultMetric.forward, "(self, value, batch_size)"),
    (_ResultMetric.to, "(self, args, kwargs)"),
    (_ResultCollection.__init__, "(self, training)"),
    (_ResultCollection.metrics, "(self, on_step)"),
    (_Sync.__init__, "(self, fn, _should, rank_zero_only, _op, _group)"),
    (ExperimentWriter._check_log_dir_exists, "(self)"),
    (_plugin_to_compute_dtype, "(plugin)"),
    (_sync_module_states, "(module)"),
    (_launch_process_observer, "(child_processes)"),
    (_call_lightning_module_hook, "(trainer, hook_name, args, pl_module, kwargs)"),
    (_ManualOptimization._on_before_step, "(self)"),
    (_ManualOptimization._on_after_step, "(self)"),
    (pl.LightningModule._on_before_batch_transfer, "(self, batch, dataloader_idx)"),
]


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lightning")
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=folder)
    meta = _Metadata("training_step", "loss")
    return {
        "trainer": trainer,
        "fit loop": trainer.fit_loop,
        "epoch loop": trainer.fit_loop.epoch_loop,
        "evaluation loop": trainer.fit_loop.epoch_loop.val_loop,
        "logger connector": trainer._logger_connector,
        "checkpoint connector": trainer._checkpoint_connector,
        "combined loader": CombinedLoader([]),
        "strategy": trainer.strategy,
        "module": pl.LightningModule(),
        "entry": _ResultMetric(meta, is_tensor=True),
        "metadata": meta,
        "csv logger": CSVLogger(folder),
    }


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_each_attribute_is_there(owner: str, instances: dict[str, Any]) -> None:
    assert ATTRIBUTES[owner] <= vars(instances[owner]).keys()


@pytest.mark.parametrize(("owner", "name"), IN_SOURCE, ids=[name for _, name in IN_SOURCE])
def test_each_property_is_there(owner: Any, name: str) -> None:
    assert hasattr(owner, name) or re.search(rf"\b{name}\b", inspect.getsource(owner))


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=[each.__qualname__ for each, _ in SIGNATURES])
def test_each_method_takes_what_it_is_called_with(function: Any, expected: str) -> None:
    assert f"({', '.join(inspect.signature(function).parameters)})" == expected


def test_a_time_between_validations_has_its_name(tmp_path: Path) -> None:
    trainer = pl.Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path, val_check_interval="00:00:01:00")
    assert vars(trainer)["_val_check_time_interval"] == 60


def test_the_fields_of_an_entry_are_those_that_a_checkpoint_holds() -> None:
    """A new one would be missing from older checkpoints."""
    assert list(inspect.signature(_Metadata).parameters) == [
        "fx",
        "name",
        "prog_bar",
        "logger",
        "on_step",
        "on_epoch",
        "reduce_fx",
        "enable_graph",
        "add_dataloader_idx",
        "dataloader_idx",
        "metric_attribute",
        "_sync",
    ]


def test_what_lightning_keeps_in_a_module_is_no_attribute_of_the_experiment() -> None:
    assert set(vars(torch.nn.Module())) | set(vars(pl.LightningModule())) <= attributes.PRIVATE


def test_an_optimizer_of_lightnings_gives_its_own() -> None:
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert LightningOptimizer(own).optimizer is own


def _private(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the private names that a file uses of other objects, and imports, with their lines."""
    tree = ast.parse(file.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            own.add(node.attr) if isinstance(node.ctx, ast.Store) else None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not (of_self and node.attr in own):
                yield node.attr, node.lineno
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"_[a-z]\w+", node.value):
            yield node.value, node.lineno  # getattr, setattr, vars(...)[...]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.startswith("_"))


def _of_lightning() -> set[str]:
    """Return the private names that Lightning gives to functions, classes and attributes."""
    found = set()
    for folder in ("pytorch", "fabric"):
        for file in (Path(lightning.__file__).parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


# Names that Lightning has too, but these are of other libraries' objects, or of labtrain's.
ELSEWHERE = {
    "_computed": ("exact/metric_states.py", "training/sharded/step_log.py"),  # torchmetrics.Metric
    "_forward_cache": ("exact/metric_states.py", "training/sharded/step_log.py"),  # torchmetrics.Metric
    "_modules": (
        "exact/buffers.py",
        "training/sharded/step_log.py",
        "training/state/step_changes.py",
    ),  # torch.nn.Module
    "_version": (
        "exact/buffers.py",
        "exact/collate.py",
        "exact/metric_states.py",
        "training/speed.py",
        "training/state/changed_weights.py",
        "training/state/trainer_state.py",
        "training/state/step_changes.py",
    ),  # torch.Tensor
    "_start": ("data/substreams.py",),  # labtrain's
    "_metadata": ("launch/experiment.py",),  # omegaconf.DictConfig
    "_device": ("training/callbacks/checkpoint.py",),  # labtrain's
    "_spec": ("checkpoints/staging.py", "training/state/extra_state.py"),  # labtrain's
}


# Names of attributes as text. The first test above compares them with those of a module of Lightning's.
AS_TEXT = {
    "exact/attributes.py": attributes.PRIVATE,
    "exact/metric_states.py": {"_computed", "_forward_cache"},  # torchmetrics.Metric
    "launch/job.py": {"_step"},  # of the name of a metric
    "training/epoch_loop.py": {"_computed", "_forward_cache"},  # torchmetrics.Metric
    "training/sharded/step_log.py": {"_computed", "_forward_cache"},  # torchmetrics.Metric
    "training/state/snapshots.py": LOOKED_INTO,
    "training/sharded/gathering.py": {"_step"},  # training_step, validation_step
    "training/sharded/hooks.py": {"_batch", "_start"},  # on_train_batch_start
}


def test_no_other_file_uses_a_private_name_of_lightning() -> None:
    names = _of_lightning()
    assert {"_results", "_combined_loader", "_checkpoint_connector"} <= names
    used = [
        f"{file.relative_to(SRC)}:{line}: {name}"
        for file in sorted(SRC.rglob("*.py"))
        if file != ADAPTER
        for name, line in _private(file)
        if name in names
        and str(file.relative_to(SRC)) not in ELSEWHERE.get(name, ())
        and name not in AS_TEXT.get(str(file.relative_to(SRC)), ())
    ]
    assert not used


def test_no_class_overrides_a_private_method_of_lightning() -> None:
    """But those of the adapter."""
    found = []
    for module in pkgutil.walk_packages(training.__path__, "labtrain.training."):
        for cls in vars(importlib.import_module(module.name)).values():
            if (
                not isinstance(cls, type)
                or cls.__module__ != module.name
                or module.name == "labtrain.training.lightning"
            ):
                continue
            bases = [each for each in cls.__mro__ if each.__module__.partition(".")[0] == "lightning"]
            own = [name for name in vars(cls) if re.match(r"_[a-z]", name)]
            found += [
                f"{module.name}.{cls.__name__}.{name}" for name in own if any(name in vars(each) for each in bases)
            ]
    assert [name for name in found if not name.endswith("._abc_impl")] == []


def test_each_private_name_is_held_here() -> None:
    held = {name for names in ATTRIBUTES.values() for name in names}
    held |= {name for _, name in IN_SOURCE} | {function.__name__ for function, _ in SIGNATURES}
    held |= {"_Metadata", "_ResultCollection", "_ResultMetric", "_Sync", "_TrainingEpochLoop", "_CheckpointConnector"}
    held |= {"_DataFetcher", "_EvaluationLoop", "_val_check_time_interval"}
    assert {name for name, _ in _private(ADAPTER)} - held == set()
