"""The objective of a training with shards: the mean of the shards' losses, by samples or by a returned weight.

If the loss is a mean over samples, that is the loss of the batch. Otherwise it is another objective: InfoNCE has fewer
negatives in a shard; a mean over valid tokens or weighted classes is divided by another sum. `Objective` finds such a
loss before the first step, without knowing its kind. It compares the loss and the gradients of one shard's samples with
the mean over their two halves, and those of other shards with other parts.
"""

import copy
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from labtrain.base.console import few
from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError
from labtrain.data.batches import Picks
from labtrain.data.loader import DataLoader
from labtrain.data.prefetch import on_tensors
from labtrain.exact.buffers import Buffers
from labtrain.exact.determinism import keep_draws, seed_place
from labtrain.exact.metric_states import add_rows
from labtrain.exact.tree_sum import alone
from labtrain.training.lightning import (
    AnyLoop,
    LoggedValues,
    begin_hook,
    evaluation_loop,
    halves_to_float,
    logger_connector,
    put_results,
    results_of,
    silence_loggers,
)
from labtrain.training.sharded.flops import FlopCount
from labtrain.training.sharded.whole import NeedsMeetingError
from labtrain.training.state.counters import Added, Trial
from labtrain.training.state.optimizers import optimizers_of, own_methods, wrappers_of
from labtrain.training.state.snapshots import Look, look, unlike
from labtrain.training.state.step_changes import Watch, let_pass
from labtrain.training.state.undo import LARGEST_BYTES, TooLargeError, Undo

if TYPE_CHECKING:
    from labtrain.training.sharded.strategy import Exact

WEIGHT_HINT = (
    'return {"loss": loss, "weight": n} with the sum that the loss is divided by: valid tokens, or the class weights of'
    " the samples"
)
NOT_COMPARED = "the loss of a batch and the mean of its shards' losses were not compared"
# For the first shard also the gradients; for the next ones only if the loss differs: two samples of one class do not
# show that the classes have weights.
SHARDS_COMPARED = 4

Tried = tuple[list[str], list[str], list[str]]


# ---------------------------------------------------------------------------------------------------- a returned weight


def weight_of(output: object) -> float | None:
    """Return the weight that `training_step` returned with the loss of a shard; None if it returned none.

    Raises:
        ConfigError: it is not a number, or below 0.
    """
    if not isinstance(output, dict) or "weight" not in output:
        return None
    given = output["weight"]
    if isinstance(given, numbers.Real) or (isinstance(given, Tensor) and given.numel() == 1):
        weight = float(given)
        if math.isfinite(weight) and weight >= 0:
            return weight
    shown = (
        f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) and given.numel() != 1 else repr(given)
    )
    raise ConfigError(
        f"training_step returned {shown} as weight of its loss; expected a finite number, 0 or more",
        hint=f"{WEIGHT_HINT}; or return it under a name other than weight",
    )


def weighted_row(loss: Tensor, share: float, *, returned: bool) -> Tensor:
    """Return a shard's loss times its share; and its share, where the step returned a weight. 1-D, float64."""
    row = [loss.double().reshape(()) * share if share else loss.new_zeros((), dtype=torch.float64)]
    if returned:
        row.append(torch.full_like(row[0], share))
    return torch.stack(row)


def weighted_mean(rows_SN: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss of a step, and the sum of its shards' shares unless that is always 1.

    Args:
        rows_SN: `weighted_row` of each shard.
    """
    total = add_rows(rows_SN)
    if len(total) == 1:
        return total[0].float(), None
    return (total[0] / total[1].masked_fill(~(total[1] > 0), 1)).float(), total[1]


# ------------------------------------------------------------------------------------------------------- the comparison


class NotComparedError(Exception):
    """The objective of the shards cannot be compared with that of the batch; the text gives the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDifference:
    """The difference between a loss of some samples and the mean over two parts of them.

    Attributes:
        samples: how many.
        whole: their loss.
        parts: the mean of the losses of two parts of them.
        gradients: the norm of the difference of their gradients, over the norm of the gradients.
        rounding: up to here a relative difference can be rounding.
    """

    samples: int
    whole: float
    parts: float
    gradients: float
    rounding: float


class Objective(pl.Callback):
    """Compares once in each process that trains, before its first step: a receipt has the notes of its last process.

    Runs on rank 0, which has at least one shard; all ranks report the result.

    Args:
        shards: S, more than 1.
        strict: the kernels are deterministic.
        judge: called with (what, hint) for a change in a step that labtrain does not undo before the next shard.
        say: called with each warning, which is printed and goes into the receipt.
        note: called with each note that goes only into the receipt.
        count: called on rank 0 with the floating-point operations of a sample; None: unknown.
    """

    def __init__(
        self,
        *,
        shards: int,
        strict: bool,
        judge: Callable[[str, str], None],
        say: Callable[[str], object],
        note: Callable[[str], object],
        count: Callable[[float | None], object],
    ) -> None:
        self.shards, self.strict, self.judge, self.say, self.note = shards, strict, judge, say, note
        self.count = count
        self.done = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        # Not on_train_start: hooks that come after it may prepare what training_step needs.
        loader = trainer.train_dataloader
        if self.done:
            return
        self.done = True
        strategy = cast("Exact", trainer.strategy)
        size, trial = strategy.samples or 1, Trial(strategy.counters, training=True)
        self._say_normalised(pl_module, size)
        together = not pl_module.automatic_optimization or _is_synchronised(pl_module)
        if together or not isinstance(loader, DataLoader):
            if trainer.is_global_zero:
                count_steps(trainer, pl_module, loader, trial)
            kinds, unlike = strategy.broadcast((trial.kinds(), trial.unlike), src=0)
            strategy.kinds.setdefault("train", kinds)
            self._say_unlike(unlike)
            self.note(f"{NOT_COMPARED}: its shards run together, or its data is a stream or several loaders")
            return
        tried: tuple[Tried, tuple[bool, str] | None] = ([], [], []), None
        if trainer.is_global_zero:
            tried = self._tried(trainer, pl_module, loader, trial, size)
        tried, kinds, unlike = strategy.broadcast((tried, trial.kinds(), trial.unlike), src=0)
        (changed, read, asked), found = tried
        strategy.kinds.setdefault("train", kinds)
        self._say_unlike(unlike)
        if changed:
            self.judge(*self._uncounted(changed))
        elif read:
            self.judge(
                f"training_step's loss of a shard depends on {few(read)}, which the shard before it changed: with"
                f" determinism.shards={self.shards} the result then depends on the number of devices",
                "append to it in on_train_batch_end, which runs once a step; or determinism.shards=1",
            )
        if asked:
            self.judge(
                f"training_step's loss depends on the process that computes it, through {few(asked)}: the number of"
                " devices decides which process computes which shard",
                "remove it from the loss: a step sees a shard of the batch, and the gradient is the mean over all"
                " shards, on any number of devices; or determinism.shards=null determinism.mode=warn",
            )
        if found is not None:
            (self.say if found[0] else self.note)(found[1])

    def _tried(
        self, trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader, trial: Trial, size: int
    ) -> tuple[Tried, tuple[bool, str] | None]:
        """Try the first step; return what `left_by_shards` returns, and a text with whether it is a warning."""
        tried: Tried = [], [], []
        try:
            tried = left_by_shards(trainer, module, loader, strict=self.strict, count=self.count)
            difference = compare(trainer, module, loader, trial, strict=self.strict)
        except NotComparedError as error:
            return tried, (False, f"{NOT_COMPARED}: {error}")
        return tried, None if difference is None else (True, self._sentence(difference, size))

    def _say_unlike(self, names: set[str]) -> None:
        if names:
            self.say(
                f"training_step adds to {few(sorted(names))} for each sample: labtrain cannot combine what the"
                f" {self.shards} shards of a step add, and keeps what one of them adds (use an attribute that the step"
                " adds to by +=, or a torchmetrics metric)"
            )

    def _say_normalised(self, module: pl.LightningModule, size: int) -> None:
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
        if any(not isinstance(part, nn.SyncBatchNorm) for part in norms):
            self.say(
                f"BatchNorm normalises over the {_sizes(size, self.shards)} samples of a shard, not over the batch's"
                f" {size} (determinism.shards={self.shards})"
            )

    def _uncounted(self, names: list[str]) -> tuple[str, str]:
        return (
            f"training_step changes {few(names)}: with determinism.shards={self.shards} it runs once a shard, so the"
            " result depends on the number of devices",
            "change it in on_train_batch_end, which runs once a step; or keep a number, a tensor or a list in an"
            " attribute of the model; or draw from torch's own generator, which is seeded for each shard; or"
            " determinism.shards=1",
        )

    def _sentence(self, found: LossDifference, size: int) -> str:
        shards = f"{self.shards} shards of {_sizes(size, self.shards)} samples"
        return (
            f"training_step's loss depends on how a batch is cut: for {found.samples} samples it is {found.whole:.4g},"
            f" the mean over two parts of them is {found.parts:.4g}, and the gradients differ by"
            f" {_percent(found.gradients)} (rounding explains up to {_percent(found.rounding)})."
            " Each step minimises the mean of the losses of"
            f" {shards}, not the loss of the batch of {size}. determinism.shards=1 minimises the loss of the batch."
            " If"
            f" the loss is a mean over something other than samples, use a weight: {WEIGHT_HINT}"
        )


def left_by_shards(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: DataLoader,
    *,
    strict: bool,
    count: Callable[[float | None], object],
) -> Tried:
    """Run two shards of a step, one after the other; return the names of what they change, read and ask.

    Between them labtrain restores what a real step restores; afterwards it restores everything.

    Args:
        trainer: of the training.
        module: the model.
        loader: of the training.
        strict: the kernels are deterministic.
        count: called with the floating-point operations of a sample; None: unknown.

    Returns:
        names of what the second shard changes again; of what its loss reads from the first one; and of what the step
        asks of its process, such as its rank, if the loss depends on it.

    Raises:
        NotComparedError: the step cannot be tried.
    """
    with _bench(trainer, module, loader) as bench:
        parts = loader.shards_in(trainer.current_epoch)[:2]
        if not all(map(len, parts)):
            return [], [], []
        first, second = next(loader.load([parts]))
        count(bench.flops(first, samples=len(parts[0])))
        return *bench.left(first, second, strict=strict), bench.asked(second, strict=strict)


def compare(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader, trial: Trial, *, strict: bool
) -> LossDifference | None:
    """Compare losses and gradients of shards of an epoch's first batch with the mean over two parts of each.

    In eval mode, so without dropout, and in float32. Afterwards it restores everything.

    Args:
        trainer: of the training.
        module: the model.
        loader: of the training.
        trial: told of what the steps add to numbers.
        strict: the kernels are deterministic.

    Returns:
        None if they are equal up to rounding.

    Raises:
        NotComparedError: they cannot be compared.
    """
    with _bench(trainer, module, loader, trial) as bench:
        groups = _groups(loader, trainer.current_epoch)
        for group, data in zip(groups, loader.load(groups), strict=True):
            _refuse_unequal(*data)
            sizes = [len(part) for part in group[1:]]
            found = bench.compare(*data, sizes=sizes, strict=strict)
            if found is not None:
                return found
        if not bench.is_thorough:
            raise NotComparedError("the samples of the first shards have no weight")
    return None


def count_steps(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: object,
    trial: Trial,
    *,
    args: Sequence[object] | None = None,
    batch: int = 0,
) -> None:
    """Let a trial see what steps of the current stage add to numbers.

    Args:
        trainer: in a training or an evaluation.
        module: the model.
        loader: of the batch.
        trial: to tell.
        args: of the model's step, after the batch; None for those of `training_step`.
        batch: its number in the epoch.
    """
    if not isinstance(loader, DataLoader):
        return
    steps = _without_steps(trainer) if trainer.training else nullcontext()
    with steps, suppress(NotComparedError), _bench(trainer, module, loader, trial) as bench:
        groups = _groups(loader, trainer.current_epoch, batch)
        for group, data in zip(groups, loader.load(groups), strict=True):
            added = [bench.count(part, args) for part in data]
            trial.compare(*added, share=len(group[1]) / len(group[0]))


@contextmanager
def _without_steps(trainer: pl.Trainer) -> Iterator[None]:
    """Let methods of optimizers, and steps of schedulers, do nothing but call a closure. Enter it before a bench."""

    def step(*arguments: object, **options: object) -> object:
        closure = options.get("closure", arguments[0] if arguments else None)
        if not callable(closure):
            return None
        with torch.enable_grad():
            return closure()

    schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
    owners = [*optimizers_of(trainer).values(), *wrappers_of(trainer).values(), *schedulers]
    places = [(vars(owner), name) for owner in owners for name in ("step", *own_methods(owner))]
    before = [table.get(name) for table, name in places]
    for table, name in places:
        table[name] = step
    try:
        yield
    finally:
        for (table, name), usual in zip(places, before, strict=True):
            table.pop(name, None)
            if usual is not None:
                table[name] = usual


def _groups(loader: DataLoader, epoch: int, batch: int = 0) -> list[list[Picks]]:
    """Return the samples of the shards of a batch, each with two parts of them."""
    groups = []
    for shard, part in enumerate(loader.shards_in(epoch, batch)[:SHARDS_COMPARED]):
        if len(part) > 1:
            cut = max(1, len(part) // (2 + shard))  # halves may happen to have the same number of tokens
            groups.append([part, part[:cut], part[cut:]])
    if not groups:
        raise NotComparedError("a shard has one sample")
    return groups


def _is_synchronised(module: pl.LightningModule) -> bool:
    return any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


@contextmanager
def _bench(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader, trial: Trial | None = None
) -> Iterator["_Bench"]:
    """Prepare the process to try steps, then restore everything, including the states of generators."""
    try:
        with ExitStack() as stack:
            stack.callback(keep_draws())
            bench = stack.enter_context(_Bench.around(trainer, module, loader))
            bench.trial = trial
            yield bench
    except NotComparedError:
        raise
    except NeedsMeetingError as error:
        raise NotComparedError(f"{error} joins the shards of a step") from None
    except TooLargeError:
        size = f"{LARGEST_BYTES >> 30} GiB"
        raise NotComparedError(f"the model holds more than {size} beside its weights, which would be copied") from None
    except Exception as error:  # whatever a person's code raises: the step itself will say it, if it does so there too
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {lines[0]:.200}"
        raise NotComparedError(
            f"training_step, or the loading of a part of a shard, fails in eval mode: {text}"
        ) from error
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Bench:
    """Runs the step of a model on parts of a batch, each time from the same state."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, undo: Undo) -> None:
        self.trainer, self.module, self.undo = trainer, module, undo
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.is_thorough = False
        self.eps = 0.0  # of the coarsest numbers that were computed with
        self.trial: Trial | None = None  # told of what steps add to numbers
        self.step = "training_step" if trainer.training else "test_step" if trainer.testing else "validation_step"
        self.loop: AnyLoop = trainer.fit_loop.epoch_loop if trainer.training else evaluation_loop(trainer)

    @classmethod
    @contextmanager
    def around(cls, trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader) -> Iterator["_Bench"]:
        """Prepare the process for such runs, and put everything back."""
        strategy = cast("Exact", trainer.strategy)
        tensors = [*module.parameters(), *module.buffers()]
        groups = [group for optimizer in optimizers_of(trainer).values() for group in optimizer.param_groups]
        schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
        shallow = [trainer, logger_connector(trainer), *_datasets(loader.dataset)]
        datamodule = getattr(trainer, "datamodule", None)
        shallow += [datamodule] if datamodule is not None else []
        undo = Undo([module, groups, schedulers, loader.transforms], shallow=shallow, free=tensors)
        bench = cls(trainer, module, undo)
        with ExitStack() as stack:
            stack.callback(undo)
            stack.enter_context(strategy.scratch(bench.loop))  # where self.log writes
            stack.enter_context(alone())
            stack.enter_context(_exact_products())
            stack.enter_context(torch.enable_grad() if trainer.training else nullcontext())
            if any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules()) or any(
                type(part).__name__ == "OptimizedModule" for part in module.modules()
            ):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield bench

    def compare(
        self, whole: object, first: object, second: object, *, sizes: list[int], strict: bool
    ) -> LossDifference | None:
        """Compare some samples with two parts of them; the first time the gradients too, and whether the loss draws."""
        weights: list[float] = [size / sum(sizes) for size in sizes]
        runs = [(*self.run(part), self._added()) for part in (first, second, whole)]
        (*losses, loss), (*given, own), (one, two, both) = zip(*runs, strict=True)
        if self.trial is not None:
            self.trial.compare(both, one, two, share=sizes[0] / sum(sizes))
        if len({each is None for each in (own, *given)}) > 1:
            raise NotComparedError("it returns a weight for some samples only")
        if own is not None:
            if not sum(given):
                return None
            weights = [each / sum(given) for each in given]
        mean = sum(weight * each for weight, each in zip(weights, losses, strict=True) if weight)
        if not (math.isfinite(loss) and math.isfinite(mean)):
            raise NotComparedError("the loss is not finite")
        scale = max(abs(loss), *(abs(each) for each, weight in zip(losses, weights, strict=True) if weight))
        differs = abs(loss - mean) > self.rounding * scale
        if self.is_thorough and not differs:
            return None
        if not self.is_thorough:
            self.is_thorough = True
            again, _ = self.run(whole, seed=1, watch=True)
            if again != loss if strict else abs(again - loss) > self.rounding * scale:
                raise NotComparedError("the loss draws random numbers")
        # Gradients decide: a loss that is the difference of two means may differ by its rounding alone.
        gradients, rounding = self._gradients((first, weights[0]), (second, weights[1]), (whole, -1.0)), self.rounding
        if gradients <= rounding:
            return None
        return LossDifference(samples=sum(sizes), whole=loss, parts=mean, gradients=gradients, rounding=rounding)

    def left(self, first: object, second: object, *, strict: bool) -> tuple[list[str], list[str]]:
        """Return the names of what changes from one shard to the next, though all that is watched is put back.

        What the first shard alone changes, such as a table that is computed when it is first used, does not count. And
        the names of lists that grow, where the second shard's loss is another one without the first.
        """
        self._reset()
        strategy = cast("Exact", self.trainer.strategy)
        place: Options = {"device": strategy.root_device, "rank": 0, "world": 1, "judge": let_pass}
        optimizers, schedulers = self.trainer.optimizers, [each.scheduler for each in self.trainer.lr_scheduler_configs]
        buffers = Buffers(self.module, **place)
        watch = Watch(self.module, **place, optimizers=lambda: optimizers, schedulers=schedulers, say=let_pass)
        buffers.begin()
        watch.begin()
        looks: list[Look | None] = []
        for shard, data in enumerate((first, second)):
            loss, _ = self.run(data, backward=1.0, fresh=False)
            buffers.leave(shard, 0.5)
            changes_weights = watch.leave(shard, 1, last=True)[0] != 0  # which the watcher itself refuses, by name
            buffers.restore()
            watch.restore()
            for parameter in self.parameters:
                parameter.grad = None
            looks.append(look(self.module, known=[*optimizers, *watch.schedulers]))
        self.gradients = [None] * len(self.parameters)
        found = unlike(looks[0], looks[1]) if looks[0] is not None and looks[1] is not None else []
        if changes_weights:
            return found, []
        grown = sorted(watch.grown())
        self._reset()
        alone, _ = self.run(second, fresh=False)
        same = alone == loss if strict else math.isclose(alone, loss, rel_tol=1e-3)
        return found, [] if same or math.isnan(loss) else grown or ["something that labtrain cannot see"]

    def asked(self, data: object, *, strict: bool) -> list[str]:
        """Return what the step asks of the process that runs it, where its loss is another one in another process."""
        strategy, losses = cast("Exact", self.trainer.strategy), list[float]()
        for rank, world in ((0, 1), (1, 2)):
            self._reset()
            try:
                with strategy.pretending(rank, world) as asked:
                    losses.append(self.run(data, fresh=False)[0])
            except Exception:  # a step that goes to the device of its rank, which is not there
                return []
        same = losses[0] == losses[1] if strict else math.isclose(*losses, rel_tol=1e-3)
        if same or any(map(math.isnan, losses)):
            return []
        return sorted(asked) or ["RANK, LOCAL_RANK or WORLD_SIZE of the environment"]

    @property
    def rounding(self) -> float:
        """Return up to where a relative difference is taken for rounding: where half of the digits agree.

        Rounding alone changes the last few digits, by a few eps times the root of what is added up; the gradients of
        another objective differ in the first ones.
        """
        return math.sqrt(self.eps)

    def run(
        self, data: object, *, seed: int = 0, backward: float = 0.0, watch: bool = False, fresh: bool = True
    ) -> tuple[float, float | None]:
        """Return the loss of some samples and the weight that came with it.

        Args:
            data: of a loader.
            seed: of the global generators.
            backward: add the gradients, times this, to those of earlier runs.
            watch: note how coarse the numbers are that are kept for the gradients.
            fresh: from the state that everything had, and in eval mode.
        """
        if fresh:
            self._begin()
        seed_place("objective", seed)
        if seed:
            self.undo.seed(seed)
        data = self._prepared(data, fresh=fresh)
        with torch.autograd.graph.saved_tensors_hooks(self._watch, _as_it_is) if watch else nullcontext():
            loss, weight = self._training_step(data)
        if loss is None:
            raise NotComparedError("training_step returns no loss")
        if backward:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
            (loss * backward).backward()
            self.gradients = [parameter.grad for parameter in self.parameters]
        return float(loss.detach()), weight

    def flops(self, data: object, *, samples: int) -> float | None:
        """Return the floating-point operations of one sample, forward and backward; None if they cannot be counted.

        Args:
            data: of a loader.
            samples: how many these are.
        """
        self._reset()
        try:
            seed_place("objective", 0)
            data = self._prepared(data, fresh=False)
            with FlopCount() as found:
                with self.trainer.precision_plugin.train_step_context():
                    loss, _ = self._training_step(data)
                for parameter in self.parameters:
                    parameter.grad = None
                found.is_backward = True
                loss.backward()
            return found.total / samples or None
        except Exception:  # whatever a person's code or torch's counter raises: the training does not depend on it
            return None
        finally:
            self._reset()

    def count(self, data: object, args: Sequence[object] | None) -> Added:
        """Run a step of the stage; return what it adds to numbers.

        Args:
            data: of a loader.
            args: of the step, after the batch; None for those of `training_step`.
        """
        self._begin()
        for parameter in self.module.parameters():
            parameter.grad = None  # a backward would add to it in place
        seed_place("objective", 0)
        data = self._prepared(data, fresh=True)
        with self._counting():
            getattr(self.module, self.step)(data, *(self._arguments() if args is None else args))
        return self._added()

    def _arguments(self) -> list[object]:
        """Return the arguments of `training_step` after the batch."""
        takes_number = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        return [max(self.trainer.fit_loop.epoch_loop.batch_idx, 0)] if takes_number else []

    def _training_step(self, data: object) -> tuple[Any, float | None]:
        """Return the loss of data on the device, with its graph, and the weight that came with it."""
        with self._counting():
            output = self.module.training_step(data, *self._arguments())
        return output["loss"] if isinstance(output, dict) else output, weight_of(output)

    def _prepared(self, data: object, *, fresh: bool) -> object:
        """Return data on the device, and give what the step logs a place."""
        data = cast("Exact", self.trainer.strategy).moved(copy.deepcopy(data), 0)
        if fresh:
            data = on_tensors(lambda each: each.float() if each.is_floating_point() and _is_half(each) else each, data)
        results = LoggedValues(training=self.trainer.training)
        results.batch, results.batch_size, results.dataloader_idx = data, 1, results_of(self.loop).dataloader_idx
        put_results(self.loop, results)
        return data

    @contextmanager
    def _counting(self) -> Iterator[None]:
        if self.trial is None:
            yield
            return
        self.trial.begin()
        yield
        self.trial.end()

    def _added(self) -> Added:
        return self.trial.added if self.trial is not None else Added({}, {})

    def _reset(self) -> None:
        self.undo()
        silence_loggers(self.trainer)

    def _begin(self) -> None:
        self._reset()
        module = self.module
        module.eval()
        begin_hook(module, self.step)
        halves_to_float(module.modules())
        for part in module.modules():
            if isinstance(part, nn.RNNBase):  # cuDNN has no backward of one in eval mode
                part.training, part.dropout = True, 0.0
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and _is_half(tensor):
                tensor.data = tensor.data.float()
            if tensor.is_floating_point():
                self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)

    def _watch(self, saved: Tensor) -> Tensor:
        if saved.is_floating_point():
            self.eps = max(self.eps, torch.finfo(saved.dtype).eps)
        return saved.detach()

    def _gradients(self, *runs: tuple[object, float]) -> float:
        """Return the norm of what gradients add up to, over the largest on the way."""
        norms = []
        for data, factor in runs:
            if factor:
                self.run(data, backward=factor)
            norms.append(self._norm())
        self.gradients = [None] * len(self.parameters)
        *scales, difference = norms
        if not math.isfinite(difference):
            raise NotComparedError("the gradients are not finite")
        return difference / max(scales) if max(scales) else float(difference > 0)

    def _norm(self) -> float:
        parts = [
            torch.linalg.vector_norm(gradient.to_dense() if gradient.is_sparse else gradient, dtype=torch.float64)
            for gradient in self.gradients
            if gradient is not None
        ]
        return math.hypot(*(float(part) for part in parts))


@contextmanager
def _exact_products() -> Iterator[None]:
    """Compute float32 in float32, and not in TF32."""
    products, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = cudnn


def _refuse_unequal(whole: object, first: object, second: object) -> None:
    """Look whether the parts hold what the whole does: a transform may draw for all samples of a part at once."""
    leaves, *halves = (
        [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor) and leaf.dim()]
        for data in (whole, first, second)
    )
    for leaf, left, right in zip(leaves, *halves, strict=True) if len(leaves) == len(halves[0]) else ():
        rows = len(left)
        if len(leaf) != rows + len(right) or not leaf.shape[1:] == left.shape[1:] == right.shape[1:]:
            continue  # padded to another length, or no rows of samples
        together = torch.cat([left, right])
        if not torch.allclose(together.double(), leaf.double(), rtol=1e-4, atol=1e-6, equal_nan=True):
            raise NotComparedError(
                "the loader changes a sample when it loads other samples with it; a transform, collate_fn or"
                " __getitems__ may draw random numbers for several at once"
            )


def _datasets(dataset: object) -> Iterator[object]:
    """Yield a dataset and those that it wraps."""
    found: list[object] = []
    while hasattr(dataset, "__dict__") and not any(dataset is each for each in found):
        found.append(dataset)
        yield dataset
        dataset = vars(dataset).get("dataset")


def _is_half(tensor: Tensor) -> bool:
    return tensor.element_size() < torch.float32.itemsize


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _sizes(samples: int, shards: int) -> str:
    small, large = samples // shards, -(-samples // shards)
    return str(small) if small == large else f"{small} or {large}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if ratio >= 0.1 else f"{100 * ratio:.2g} %"
