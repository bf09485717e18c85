"""`speed.*`: torch.compile, recomputed activations and channels_last, put into a model in place.

Names of parameters and buffers do not change, so checkpoints and digests do not either. docs/guides/speed.md says what
each does to the bits. TF32 is a flag of torch: determinism.py.

Compiled code must depend only on the computation, not on what the process has seen before. Three things break that:
sizes that torch treats as dynamic after it has seen a second one (a resumed training may see the smaller last batch
first), the eager code that it falls back to after too many sizes, and kernels chosen by timing. labtrain turns off the
first, makes the second an error, and disables the third: torch/_inductor/config.py,
https://docs.pytorch.org/docs/2.9/torch.compiler_dynamic_shapes.html.
"""

import os
import random
import shutil
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
import torchmetrics
from torch import nn
from torch.utils.checkpoint import checkpoint

from labtrain.base.console import few
from labtrain.base.contracts import Options, SpeedConfig
from labtrain.base.errors import ConfigError, DeviceError
from labtrain.exact.determinism import STRICT_MODES, run_mode
from labtrain.exact.plain_values import is_experiments_code

# Compiled versions per function. Torch's default is 8, too few if many parts share one forward function.
COMPILED_SIZES = 64
# Options with which Inductor chooses by timing; labtrain turns off those that this torch has.
TIMED = (
    "benchmark_combo_kernel",
    "benchmark_epilogue_fusion",
    "benchmark_fusion",
    "coordinate_descent_tuning",
    "max_autotune",
    "max_autotune_gemm",
    "max_autotune_pointwise",
    "shape_padding",
)
TORCHS_COMPILE = torch.compile
BACKENDS = ("inductor", "aot_eager", "eager")  # the last two compile nothing
COMPILED: "weakref.WeakSet[object]" = weakref.WeakSet()  # what the experiment's code has compiled exactly
WHY_NOT = {
    "dynamic": "which code runs would depend on the sizes that the process has seen",
    "mode": "it chooses kernels by timing, or reuses memory between shards",
    "options": "it chooses kernels by timing, or reuses memory between shards",
    "backend": "it may choose kernels by timing, or by the CPU",
}
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called


class Speed(pl.Callback):
    """Applies the keys of `speed` to the model when a training starts, after Guard has checked the experiment's code.

    Args:
        speed: those keys.
        mode: determinism.mode.
        say: called with each warning, which is printed and goes into the receipt.
    """

    def __init__(self, speed: SpeedConfig, *, mode: str, say: Callable[[str], None]) -> None:
        self.speed, self.mode, self.say = speed, mode, say
        self.looks = False  # whether to check, after the first step, that something was compiled

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.speed["tf32"] and trainer.strategy.root_device.type == "cpu":
            self.say("speed.tf32 has no effect on a CPU")
        if self.speed["compile"] and self.mode == "warn":
            self.say("speed.compile outside strict mode: its kernels depend on the sizes that a process has seen")
        if trainer.strategy.root_device.type == "cuda" and (
            costly := costly_convolutions(pl_module, trainer.precision)
        ):
            self.say(costly)
        hasten(pl_module, self.speed, mode=self.mode, say=self.say)
        self.looks = bool(self.speed["compile"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self.looks and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            self.say("speed.compile: nothing was compiled: training_step calls neither the model nor its modules")
        self.looks = False


def costly_convolutions(model: nn.Module, precision: str) -> str:
    """Return a warning if torch computes Conv3d in bf16 or fp16 without cuDNN; empty if it does not.

    Args:
        model: to search for Conv3d and ConvTranspose3d.
        precision: of the trainer, such as bf16-mixed.
    """
    from labtrain.environment.doctor.verdicts import of_conv3d

    kinds = (nn.Conv3d, nn.ConvTranspose3d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and module.weight.numel() > 1]
    number = torch.backends.cudnn.version() or 0
    verdict = of_conv3d(torch.__version__, (number // 10_000, number // 100 % 100, number % 100))
    if not names or "16" not in str(precision) or verdict.result == "runs":
        return ""
    return f"{few(names)}: {verdict.why}. docs/guides/speed.md has two cures"


def hasten(module: pl.LightningModule, speed: SpeedConfig, *, mode: str, say: Callable[[str], None]) -> None:
    """Apply the keys of `speed` to a model.

    Raises:
        ConfigError: one has nothing to act on in this model.
    """
    if speed["channels_last"]:
        put_channels_last(module)
    if speed["checkpoint_activations"]:
        recompute_blocks(module, say)
    if speed["compile"]:
        compile_parts(module, mode=speed["compile"], exact=mode in STRICT_MODES)


# -------------------------------------------------------------------------------------------------------------- compile


def check_compiler(speed: SpeedConfig, accelerator: str) -> None:
    """Look for what torch.compile needs: a C++ compiler for a CPU, a C compiler for a GPU, Python's headers.

    Raises:
        DeviceError: one is missing.
    """
    if not speed["compile"]:
        return
    package = "g++" if accelerator == "cpu" else "gcc"
    names = [os.environ.get("CXX", "g++")] if accelerator == "cpu" else [os.environ.get("CC", ""), "gcc", "clang"]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not any(shutil.which(name) for name in names if name):
        found, wanted = f"{' or '.join(filter(None, names))} was not found", f"apt-get install {package}"
    elif not headers.exists():
        found, wanted = f"{headers} was not found", "apt-get install python3-dev"
    else:
        return
    raise DeviceError(f"speed.compile needs a compiler: {found}", hint=f"{wanted}, or speed.compile=false")


def compile_parts(module: pl.LightningModule, *, mode: str | bool, exact: bool) -> None:
    """Compile what a step calls: the model's own `forward`, or the parts that the step calls directly.

    Works in place. A part inside another part is compiled with it. The step itself is not compiled, since it logs.

    Args:
        module: the model.
        mode: of torch.compile; True is its default.
        exact: the code must depend only on the model and the sizes of its inputs.
    """
    name = "default" if mode is True else str(mode)
    options: Options = exact_options(name, {}) if exact else {"mode": name}
    for part in called(module):
        # part.compile() sets this attribute too, but does not change torch's own modules, such as nn.Sequential.
        part._compiled_call_impl = TORCHS_COMPILE(_calls(part), **options)


def exact_options(mode: str, options: Options) -> Options:
    """Return arguments of torch.compile with which each size is compiled by itself, and no kernel chosen by timing.

    Args:
        mode: of torch.compile.
        options: of Inductor, beside those of the mode.
    """
    known = torch._inductor.list_options()
    untimed = {key: False for key in TIMED if key in known}
    torch._dynamo.config.recompile_limit = COMPILED_SIZES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return {"options": {**torch._inductor.list_mode_options(mode), **options, **untimed}, "dynamic": False}


@contextmanager
def own_compiles(mode: str) -> Iterator[None]:
    """Let `torch.compile` in the experiment's code compile each size by itself, in strict and portable mode.

    It replaces torch's function until the block ends: decorators call it while modules are imported.
    """
    if mode not in STRICT_MODES:
        yield
        return
    before = torch.compile
    torch.compile = _compiled_exactly  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


def _compiled_exactly(
    model: Callable[..., object] | None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: str | Callable[..., object] = "inductor",
    mode: str | None = None,
    options: Options | None = None,
    disable: bool = False,
) -> object:
    """Do what torch.compile does, exactly.

    Raises:
        ConfigError: this cannot be exact.
    """
    given: Options = {"fullgraph": fullgraph, "dynamic": dynamic, "backend": backend, "mode": mode, "options": options}
    if model is None:
        return lambda model: _compiled_exactly(model, **given, disable=disable)
    if disable:
        return TORCHS_COMPILE(model, disable=True)
    if (wrong := _not_exact(dynamic, backend, mode, options or {})) is not None:
        raise ConfigError(
            f"torch.compile({wrong}) in {_caller()}: {WHY_NOT[wrong.partition('=')[0]]}",
            hint=f"leave out {wrong}, or determinism.mode=warn",
        )
    chosen: Options = {"dynamic": False}
    if backend == "inductor":
        chosen = exact_options(mode or "default", options or {})
    compiled = TORCHS_COMPILE(model, fullgraph=fullgraph, backend=backend, **chosen)
    COMPILED.add(compiled)
    return compiled


def _not_exact(
    dynamic: bool | None, backend: str | Callable[..., object], mode: str | None, options: Options
) -> str | None:
    """Return the argument of torch.compile that prevents exact kernels."""
    if run_mode() == "portable" and backend == "inductor":
        return "backend='inductor'"
    if dynamic:
        return "dynamic=True"
    if backend not in BACKENDS:
        return f"backend={backend!r}"
    if mode not in (None, "default"):
        return f"mode={mode!r}"
    on = [key for key in (*TIMED, "triton.cudagraphs") if options.get(key)]
    return f"options={{{on[0]!r}: True}}" if on else None


def _caller() -> str:
    """Return file and line of the experiment's code that runs."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and not is_experiments_code(frame):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "a library"


def _calls(part: nn.Module) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        return part._call_impl(*args, **kwargs)

    return call


def called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a model and the parts that its step may call: its children, and those of lists."""
    if not isinstance(module, CONTAINERS):
        yield module
    for child in module.children():
        if isinstance(child, CONTAINERS) and not isinstance(child, torchmetrics.MetricCollection):
            yield from called(child)
        elif not isinstance(child, torchmetrics.Metric | torchmetrics.MetricCollection):
            yield child


def explain_compile(error: BaseException) -> ConfigError | None:
    """Turn torch.compile's limit on recompilations into an error for people; None for another error."""
    if type(error).__name__ != "FailOnRecompileLimitHit":
        return None
    return ConfigError(
        f"torch.compile: a function was compiled for {COMPILED_SIZES} different sizes or numbers; torch would now stop"
        " compiling it, and a resumed training would compute differently",
        hint="pad the inputs to a few sizes; TORCH_LOGS=recompiles shows what differs; or speed.compile=false",
    )


# ----------------------------------------------------------------------------------------------- recomputed activations


def recompute_blocks(module: nn.Module, say: Callable[[str], None]) -> None:
    """Make each block of the model's lists keep only its inputs, and compute it again in the backward.

    Skips blocks with BatchNorm: their running statistics would be updated twice.

    Raises:
        ConfigError: no block remains.
    """
    found = dict(blocks(module))
    kept = {name: block for name, block in found.items() if not any(map(has_statistics, block.modules()))}
    if not kept:
        why = "each has BatchNorm, whose statistics would be updated twice" if found else "the model has none"
        raise ConfigError(
            f"speed.checkpoint_activations recomputes the blocks of an nn.ModuleList or nn.Sequential: {why}",
            hint="speed.checkpoint_activations=false",
        )
    if left := [name for name in found if name not in kept]:
        say(f"speed.checkpoint_activations: {', '.join(left)} not recomputed: BatchNorm would be updated twice")
    for name, block in kept.items():
        block._labtrain_name = name  # type: ignore[assignment]
        # A bound method, so that a copy of the model calls its own block.
        block.forward = types.MethodType(_recomputed, block)


def blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost elements of a model's lists that contain modules, by name."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        in_list = isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, CONTAINERS)
        if in_list and any(child.children()):
            yield path, child
        else:
            yield from blocks(child, f"{path}.")


def has_statistics(part: nn.Module) -> bool:
    """Return whether a module keeps statistics of its inputs."""
    return isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats


def _recomputed(self: nn.Module, *args: object, **kwargs: object) -> object:
    forward = partial(type(self).forward, self, **kwargs)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*args)
    if torch.compiler.is_compiling():  # the compiler recomputes on its own and repeats the draws
        return checkpoint(forward, *args, use_reentrant=False)
    before = [buffer._version for buffer in self.buffers()]
    output = checkpoint(forward, *args, use_reentrant=False, context_fn=_same_draws)
    if before != [buffer._version for buffer in self.buffers()]:
        raise ConfigError(
            f"speed.checkpoint_activations: {self._labtrain_name} changes a buffer in each call, and is called twice",
            hint="speed.checkpoint_activations=false",
        )
    return output


def _same_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Repeat the draws of `random` and numpy in a recomputation; torch's checkpoint handles its own generators."""
    return nullcontext(), _drawing_from(random.getstate(), np.random.get_state(legacy=True))


@contextmanager
def _drawing_from(
    python: tuple[object, ...], numpy: Options | tuple[str, npt.NDArray[np.uint32], int, int, float]
) -> Iterator[None]:
    now = random.getstate(), np.random.get_state(legacy=True)
    random.setstate(python)
    np.random.set_state(numpy)
    try:
        yield
    finally:
        random.setstate(now[0])
        np.random.set_state(now[1])


# -------------------------------------------------------------------------------------------------------- channels_last


def put_channels_last(module: nn.Module) -> None:
    """Store the 4-D weights with channels last; convolutions then use images of that layout.

    Raises:
        ConfigError: the model has none.
    """
    images = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    if not images:
        raise ConfigError(
            "speed.channels_last: the model has no 4-D weight, such as a convolution's",
            hint="speed.channels_last=false",
        )
    for parameter in images:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
