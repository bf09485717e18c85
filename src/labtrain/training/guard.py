"""Find what cannot be exact, before the first step: strict mode refuses it, warn mode reports and records it.

=========================== ============================================================================================
found                       because
=========================== ============================================================================================
a loader without an end     an iterator has one epoch, and a resume cannot begin that again
several other loaders       a resume cannot restore the position of each in its cycle
torch.compile before        compiled before the training: chooses kernels by the shapes that this process has seen
flags that code has changed cudnn.benchmark chooses kernels by timing; the number of threads changes the order of sums
asserts left out            by python -O: the code does something else, and the run has the same name
TF32 set from outside       NVIDIA_TF32_OVERRIDE and its like change bits, and are not part of the run's name
times                       a validation or an end by the clock comes at a different step each time
modules without a digest    imported by a computed name or from a file on no path: the run's name does not cover them
modules unlike their files  edited since they were imported, in a notebook; or while the training started
reloaded loaders            a new loader may depend on the epoch in which a process started
BatchSizeFinder             the batch size then depends on the machine's memory, not on the run's name
too few samples for ranks   without shards, a rank without a part of a batch leaves the other ranks waiting
fused, mixed and clipped    in mixed precision Lightning does not clip the gradients of a fused optimizer
=========================== ============================================================================================

TF32 set in code (torch.set_float32_matmul_precision) and channels_last are exact, since they depend on the code alone.
The receipt's flags show them. speed.compile comes after these checks, and is exact: speed.py. torch itself stops an
operation without a deterministic kernel; this module finds the layer that uses it.
"""

import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.overrides import TorchFunctionMode

from labtrain.base.console import full_name
from labtrain.base.errors import ConfigError
from labtrain.data.combined import parts_of
from labtrain.data.sharded import Loader
from labtrain.data.stream import Stream
from labtrain.exact.determinism import STRICT_MODES
from labtrain.record.sources import Code, can_be_found, count_of_code, stale_modules, unnamed_modules
from labtrain.training.lightning import (
    checks_validation_by_time,
    eval_loaders,
    test_loaders,
    train_loaders,
    val_loaders,
)
from labtrain.training.speed import COMPILED

TF32_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")

Finding = tuple[str, str]  # what, hint
OURS = "return labtrain.DataLoader(dataset, batch_size, shuffle=True)"


class Guard(pl.Callback):
    """Checks the training and the test when they start.

    Args:
        mode: strict and portable refuse, warn logs, off skips.
        shards: determinism.shards, if they are in use.
        threads: determinism.threads.
        say: called with each warning, which is printed and goes into the receipt.
        code: the code that names the run; None in mode off.
        there: the names of the modules that were imported before the training.
        root: the experiment's folder.

    Raises:
        ConfigError: in strict mode, for the first finding.
    """

    def __init__(
        self,
        *,
        mode: str,
        shards: int | None,
        threads: int,
        say: Callable[[str], None],
        code: Code | None,
        there: set[str],
        root: Path,
    ) -> None:
        self.mode, self.shards, self.threads, self.say = mode, shards, threads, say
        self.code, self.there, self.root = code, there, root
        self.stepped, self.count = False, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._refuse(batch_size_finders(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.code is not None:
            self._judge(stale(self.code))
            if self.code.shadows:
                names = ", ".join(self.code.shadows)
                self.say(f"these modules hide the environment's: {names} (unset PYTHONPATH, or rename them)")
        self._judge(left_out_asserts())
        self._refuse(uncuttable_loaders(trainer, self.shards))
        self._refuse(unclippable(trainer))
        self._judge(single_samples(trainer, pl_module, self.shards))
        self._need_each_rank(trainer, train_loaders(trainer), trainer.limit_train_batches)
        self._need_each_rank_to_evaluate(trainer, val_loaders(trainer), trainer.limit_val_batches)
        self._judge(training_loaders(trainer))
        for text in stateless_streams(trainer) if self.mode != "off" else ():
            self.say(text)
        self._judge(evaluation_loaders("validation", val_loaders(trainer)))
        self._judge(compiled(pl_module))
        self._judge(changed_flags(self.threads))
        self._judge(clocks(trainer))
        self._say_device_reads(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self.stepped:
            self.stepped = True
            self._judge_code()
            if self.code is not None:
                self._say_counts(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._need_each_rank_to_evaluate(trainer, eval_loaders(trainer), trainer.limit_val_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._need_each_rank_to_evaluate(trainer, test_loaders(trainer), trainer.limit_test_batches)
        self._judge(evaluation_loaders("test", test_loaders(trainer)))
        self._say_device_reads(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge_code()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge_code()
        self._say_device_reads(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self._judge(changed_flags(self.threads))

    def _need_each_rank(self, trainer: pl.Trainer, loaders: Iterable[object], most: float) -> None:
        """Refuse batches that leave a rank without samples, in any mode: the other ranks would wait for it."""
        if self.shards is None and trainer.world_size > 1:
            for loader in [part for each in loaders for part in parts_of(each)]:
                loader.need_each_rank(trainer.world_size, most=most)

    def _need_each_rank_to_evaluate(self, trainer: pl.Trainer, loaders: Iterable[object], most: float) -> None:
        if not isinstance(trainer.strategy, DDPStrategy):  # whose ranks evaluate by themselves
            self._need_each_rank(trainer, loaders, most)

    def _judge_code(self) -> None:
        """Look for code that has run and is not part of the run's name; only if there is more code than last time."""
        if self.code is None or self.count == count_of_code():
            return
        self.count = count_of_code()
        for name, finding in unnamed(self.code, self.there, self.root):
            self.there.add(name)
            self.judge(*finding)

    def _say_counts(self, trainer: pl.Trainer) -> None:
        """Warn of attributes of the training data that count how often a sample was loaded."""
        for loader in [part for each in train_loaders(trainer) for part in parts_of(each)]:
            for name in dict.fromkeys(loader.counts):
                self.say(
                    f"{name} changes each time a sample is loaded, separately in each worker and on each device:"
                    " samples computed from it depend on the number of workers and devices (compute them from the index"
                    " and random numbers)"
                )

    def _say_device_reads(self, trainer: pl.Trainer) -> None:
        """Warn of code that uses the number of devices; each line once."""
        for (file, line), name in getattr(trainer.strategy, "device_reads", {}).items():
            path = Path(file)
            shown = path.relative_to(self.root) if path.is_relative_to(self.root) else path
            if name == "global_rank":
                self.say(
                    f"{shown}:{line} reads trainer.global_rank: values computed from it differ between devices, so the"
                    " result depends on the number of devices (remove it; use trainer.is_global_zero to print or write"
                    " once)"
                )
                continue
            self.say(
                f"{shown}:{line} reads trainer.{name}: a learning rate or a batch size computed from the number of"
                " devices makes the result depend on it (remove it: data.batch_size and the learning rate are those of"
                " the whole batch of all devices)"
            )

    def judge(self, what: str, hint: str) -> None:
        """Refuse what cannot be exact in strict mode, and warn in mode warn."""
        if self.mode in STRICT_MODES:
            raise ConfigError(what, hint=hint)
        if self.mode == "warn":
            self.say(what)

    def _judge(self, findings: Iterator[Finding]) -> None:
        if self.mode != "off":
            for finding in findings:
                self.judge(*finding)

    @staticmethod
    def _refuse(findings: Iterator[Finding]) -> None:
        for what, hint in findings:
            raise ConfigError(what, hint=hint)


def stale(code: Code) -> Iterator[Finding]:
    """Find modules that differ from the file that names the run."""
    for name in stale_modules(code):
        yield (
            f"{name} differs from its file: it was edited after the import, or loaded from bytecode",
            "start again; in a notebook, restart the kernel",
        )


def unnamed(code: Code, there: set[str], root: Path) -> Iterator[tuple[str, Finding]]:
    """Find code that has run and is not part of the run's name, with its module's name."""
    for name, file in unnamed_modules(code, there):
        late = [entry for entry in sys.path if entry not in code.path and can_be_found(name, file, [entry])]
        if can_be_found(name, file, code.path):
            hint = f"write `import {name}` in the module that uses it"
        elif late:  # code that ran has changed sys.path
            before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
            path = os.pathsep.join([os.path.abspath(late[0]), *before])  # noqa: PTH100
            hint = f"PYTHONPATH={path} python train.py; labtrain looks for code before it imports model and data"
        else:
            hint = f"put {file} into {root} and import it by its name"
        what = f"{name} was imported from {file}: it is neither in the environment nor in the run's name"
        yield name, (what, hint)


def uncuttable_loaders(trainer: pl.Trainer, shards: int | None) -> Iterator[Finding]:
    """Find training loaders whose batches cannot be cut into shards, in any mode."""
    loaders = list(train_loaders(trainer))
    if shards in (None, 1) or (len(loaders) == 1 and isinstance(loaders[0], Loader)):
        return
    kinds = " and ".join(full_name(type(loader)) for loader in loaders)
    yield (
        f"the training data comes from {kinds}: its batches cannot be cut into determinism.shards={shards}, and its"
        " order and draws are not a function of seed and epoch",
        f"{OURS}, or determinism.shards=null determinism.mode=warn",
    )


def single_samples(trainer: pl.Trainer, module: torch.nn.Module, shards: int | None) -> Iterator[Finding]:
    """Find shards of one sample, whose statistics BatchNorm cannot compute.

    Plain PyTorch has a last batch of one sample too: only BatchNorm1d raises for it.
    """
    norms = [part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    norms = [part for part in norms if part.training and not isinstance(part, torch.nn.SyncBatchNorm)]
    for loader in [part for each in train_loaders(trainer) for part in parts_of(each)] if norms else ():
        whole, last = loader.shard_sizes()
        if 1 in whole:
            hint = f"data.batch_size={2 * (shards or 1)} or more, or fewer determinism.shards"
            yield f"batch_size={loader.batch_size} gives BatchNorm shards of 1 sample", hint
        if 1 in last and any(isinstance(part, torch.nn.BatchNorm1d) for part in norms):
            yield "the last batch of an epoch gives BatchNorm1d 1 sample", "labtrain.DataLoader(..., drop_last=True)"


def unclippable(trainer: pl.Trainer) -> Iterator[Finding]:
    """Find a fused optimizer whose gradients Lightning would not clip, since it may unscale them itself; in any mode.

    Lightning 2.6: plugins/precision/amp.py.
    """
    if trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MixedPrecision):
        for optimizer in trainer.optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                yield (
                    f"trainer.gradient_clip_val={trainer.gradient_clip_val} with trainer.precision="
                    f"{trainer.precision}: Lightning cannot clip for a fused {type(optimizer).__name__}",
                    "fused=False in configure_optimizers, or trainer.gradient_clip_val=null",
                )


def training_loaders(trainer: pl.Trainer) -> Iterator[Finding]:
    """Find training loaders whose batches a resume cannot repeat."""
    loaders = list(train_loaders(trainer))
    hint = f"{OURS}, or determinism.mode=warn"
    if len(loaders) > 1:
        yield f"{len(loaders)} training loaders at once: a resume cannot restore the position of each", hint
    for loader in loaders:
        if not isinstance(loader, Loader):
            what = "it can be iterated only once, so a resume cannot begin its epoch again"
            yield f"the training data comes from {full_name(type(loader))}: {what}", hint
        elif isinstance(loader, Stream) and not loader.is_cut and trainer.world_size > 1:
            yield (
                f"the training data comes from {full_name(type(loader.loader))}, in {trainer.world_size} processes:"
                " unless it splits its samples by rank, each process trains on the same samples",
                "trainer.devices=1, or determinism.shards=4",
            )


def stateless_streams(trainer: pl.Trainer) -> Iterator[str]:
    """Find streams that a resume has to begin again."""
    for loader in train_loaders(trainer):
        if isinstance(loader, Stream) and loader.holder is None:
            yield (
                f"the training data comes from {full_name(type(loader.loader))}, which cannot save its position: a"
                " resume iterates the epoch again and skips what has been trained on. This is exact if the samples"
                " depend only on the seed, the epoch and data.num_workers (give it state_dict and load_state_dict)"
            )


def batch_size_finders(trainer: pl.Trainer) -> Iterator[Finding]:
    """Find callbacks that set the batch size to the largest that fits into this machine's memory, in any mode."""
    if any(isinstance(callback, pl.callbacks.BatchSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield (
            "a BatchSizeFinder would replace data.batch_size by a size that depends on this machine's memory",
            "remove it from callbacks; labtrain batch-size prints the largest data.batch_size that fits",
        )


def evaluation_loaders(stage: str, loaders: Iterable[object]) -> Iterator[Finding]:
    """Find loaders of a validation or test that Lightning would pad with duplicates on several devices."""
    for loader in loaders:
        if not isinstance(loader, Loader):
            yield (
                f"the {stage} data comes from {full_name(type(loader))}: its metrics would depend on the number of"
                " devices, and its draws on earlier draws",
                "return labtrain.DataLoader(dataset, batch_size), or determinism.mode=warn",
            )


def compiled(module: torch.nn.Module) -> Iterator[Finding]:
    """Find modules under torch.compile that are not compiled exactly (speed.own_compiles)."""
    for name, part in module.named_modules():
        found = part if isinstance(part, torch._dynamo.OptimizedModule) else getattr(part, "_compiled_call_impl", None)
        if found is not None and found not in COMPILED:
            yield (
                f"{name or type(part).__name__} was compiled by torch.compile before the training started, or in mode"
                " warn: its kernels depend on the shapes that the process has seen, and a resumed training may use"
                " different ones",
                "call torch.compile in the model's __init__ or configure_model, or use speed.compile=true",
            )
            return


def changed_flags(threads: int) -> Iterator[Finding]:
    """Find flags that the experiment's code or the environment has changed."""
    for name, found, wanted in (
        ("torch.backends.cudnn.benchmark", torch.backends.cudnn.benchmark, False),
        ("torch.backends.cudnn.deterministic", torch.backends.cudnn.deterministic, True),
        ("torch.are_deterministic_algorithms_enabled()", torch.are_deterministic_algorithms_enabled(), True),
        ("torch.get_num_threads()", torch.get_num_threads(), threads),
    ):
        if found != wanted:
            yield (
                f"{name} is {found}, but determinism.mode set {wanted}: the experiment's code changed it",
                "remove that line, or determinism.mode=warn",
            )
    for name in TF32_VARIABLES:
        if name in os.environ:
            yield (
                f"the environment has {name}={os.environ[name]}: it changes bits, and is not part of the run's name",
                f"unset {name}; for TF32 set speed.tf32=true",
            )


def left_out_asserts() -> Iterator[Finding]:
    """Find Python's option that skips asserts, and with them what they call."""
    if sys.flags.optimize:
        yield (
            "Python skips asserts (-O, PYTHONOPTIMIZE): the run has the same name, but its asserts do not run",
            "unset PYTHONOPTIMIZE, and start python without -O",
        )


def clocks(trainer: pl.Trainer) -> Iterator[Finding]:
    """Find what depends on the clock, or on when a process started."""
    if checks_validation_by_time(trainer):
        yield (
            "trainer.val_check_interval is a time: validations then run at different steps each time",
            "set a number of batches, or determinism.mode=warn",
        )
    if any(isinstance(callback, pl.callbacks.Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield "trainer.max_time ends the training by the clock", "trainer.max_steps, or determinism.mode=warn"
    if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        yield (
            "trainer.reload_dataloaders_every_n_epochs: the data may depend on the epoch in which a process started",
            "use set_epoch of labtrain.DataLoader, or determinism.mode=warn",
        )


# -------------------------------------------------------------------------- an operation without a deterministic kernel


class NotDeterministicError(ConfigError):
    """An operation has no deterministic kernel; it names the module that uses it."""

    def __init__(self, operation: str, place: str) -> None:
        super().__init__(
            f"{operation} has no deterministic kernel here; it is used {place}",
            hint="another operation (https://docs.pytorch.org/docs/2.9/generated/torch.use_deterministic_algorithms.html"
            " lists them), or determinism.mode=warn",
        )


def explain_operation(error: BaseException, module: torch.nn.Module) -> NotDeterministicError | None:
    """Turn torch's refusal of an operation into one that names the module; None if it is something else."""
    found = NOT_DETERMINISTIC.search(str(error))
    if isinstance(error, NotDeterministicError) or not isinstance(error, RuntimeError) or found is None:
        return None
    return NotDeterministicError(found.group(1), _innermost(error.__traceback__, module) or "in the backward pass")


def explain_backward(error: BaseException, module: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> None:
    """Run a step again whose backward failed, and raise an error that names the module; return on other errors."""
    found = NOT_DETERMINISTIC.search(str(error))
    if not isinstance(error, RuntimeError) or found is None:
        return
    with _Tracer(module) as tracer:
        try:
            forward().backward()
        except RuntimeError:
            raise NotDeterministicError(found.group(1), f"in the backward of {tracer.last}") from error


class _Tracer(TorchFunctionMode):
    """Remembers which call of which module a backward is at."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.names = {part: name for name, part in module.named_modules()}
        self.stack: list[torch.nn.Module] = []
        self.last = "the model"

    def __enter__(self) -> "_Tracer":
        hooks = torch.nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(lambda part, _: self.stack.append(part)),
            hooks.register_module_forward_hook(self._left, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        place = _described(self.stack[-1] if self.stack else None, self.names)
        self._mark(result, f"{getattr(func, '__name__', func)} in {place}")
        return result

    def _left(self, part: torch.nn.Module, _inputs: object, output: object) -> None:
        self.stack.pop()
        self._mark(output, _described(part, self.names))  # a torch.autograd.Function is no torch function

    def _mark(self, result: object, text: str) -> None:
        node = getattr(result, "grad_fn", None) if isinstance(result, torch.Tensor) else None
        if node is not None and "labtrain" not in node.metadata:
            node.metadata["labtrain"] = text
            node.register_prehook(lambda _: setattr(self, "last", text))


def _innermost(trace: types.TracebackType | None, module: torch.nn.Module) -> str | None:
    names = {part: name for name, part in module.named_modules()}
    place = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and owner in names:
            place = f"in {_described(owner, names)}, line {trace.tb_lineno} of {trace.tb_frame.f_code.co_filename}"
        trace = trace.tb_next
    return place


def _described(part: torch.nn.Module | None, names: dict[torch.nn.Module, str]) -> str:
    if part is None or not names.get(part):
        return "the LightningModule" if part is None else type(part).__name__
    return f"{names[part]} ({type(part).__name__})"
