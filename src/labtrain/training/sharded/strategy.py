"""Exact training inside Lightning's Trainer: the same bits on 1, 2, 3, ... up to S devices.

One Lightning batch is one global batch. The loader yields this rank's shards of it. `training_step` below runs the
model's own once a shard, forward and backward, sums the gradients and the buffers along one tree (tree_sum.py), and
returns the loss of the whole batch. Lightning then calls `backward`, which installs the sums. Clipping, scaler,
optimizer, schedulers, callbacks and loggers are Lightning's own. They see one step, whatever the number of processes.
So `global_step`, `batch_idx`, `val_check_interval` and schedules do not depend on that number.

Every shard runs under its own (seed, epoch, batch, shard), from the buffers at the start of the step. Buffers are then
averaged over the samples, once a step. The loss counts as a mean over the samples, unless the step returns its weight:
objective.py.

Lightning 2.6: strategies/strategy.py and strategies/ddp.py.
"""

import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from labtrain.base.console import few
from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError
from labtrain.base.signals import Stopped, Wishes
from labtrain.data.sharded import Loader, Sharded
from labtrain.exact.buffers import SENT, Buffers, broadcast
from labtrain.exact.determinism import run_mode, seed_place
from labtrain.exact.plain_values import is_experiments_code
from labtrain.exact.sparse_gradients import ABSENT, SparseRows, sparse
from labtrain.exact.tree_sum import ShardSum, alone, shard_ranges
from labtrain.training.guard import Guard, explain_backward
from labtrain.training.lightning import (
    AnyLoop,
    ResultCollection,
    batches_begun,
    broadcast_module,
    epochs_done,
    eval_loaders,
    evaluation_loop,
    keep_logging_hook,
    prepare_again,
    prepare_batch,
    put_off_preparing,
    put_results,
    results_of,
)
from labtrain.training.sharded.calls import counting
from labtrain.training.sharded.gathering import Appended
from labtrain.training.sharded.hooks import LOSS, LOSS_IN_DICT, NOTHING, Handed, Readers, content, whole
from labtrain.training.sharded.objective import count_steps, weight_of, weighted_mean, weighted_row
from labtrain.training.sharded.step_log import Tally, to_device
from labtrain.training.sharded.together import Together
from labtrain.training.sharded.whole import NeedsMeetingError, by_itself, normalise_whole_batches
from labtrain.training.state.counters import OTHER, UNKNOWN, Counters, Kinds, Trial
from labtrain.training.state.optimizers import optimizers_of, wrappers_of
from labtrain.training.state.step_changes import Watch, let_pass

# Functions in which people make what decides the result. objective.py tests whether a step's loss depends on it.
MAKERS = frozenset(
    {"__init__", "setup", "prepare_data", "configure_model", "configure_callbacks", "configure_optimizers"}
    | {"train_dataloader", "val_dataloader", "test_dataloader", "on_fit_start", "on_train_start"}
    | {"on_train_epoch_start", "on_train_batch_start", "on_after_backward", "on_before_optimizer_step"}
    | {"optimizer_step", "configure_gradient_clipping", "lr_scheduler_step"}
)
TRAINER = sys.modules[pl.Trainer.__module__].__file__
# Properties of the Trainer, and of the model, that ask the strategy; and those that are recorded in MAKERS. Code that
# asks whether it is the first process prints or writes, and a local rank names a device.
PASSING = (TRAINER, sys.modules[pl.LightningModule.__module__].__file__)
OF_TRAINER = ("world_size", "num_devices", "device_ids", "global_rank", "local_rank", "is_global_zero")
NOTED = ("world_size", "num_devices", "device_ids", "global_rank")
OF_PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # variables of the environment

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


T = TypeVar("T")

if TYPE_CHECKING:
    _Base = DDPStrategy  # one of the two that Exact is mixed into: they have the same methods
else:
    _Base = object


@dataclass(kw_only=True, slots=True)
class _Step:
    """One step of this rank.

    Attributes:
        batch: its shards.
        epoch: of the training.
        index: of the batch in the epoch.
        moved: whether the shards are on the device.
        ranges: which shards each rank has.
        parameters: that need a gradient.
        older: their gradients, of accumulated batches.
        missing: whether a shard of this rank lacks a gradient, or this rank has no shard: other ranks may have it.
        present: of each shard of this rank, ABSENT, DENSE or SPARSE for each parameter.
        outputs: of each shard: samples, and the step's output, if hooks take it.
    """

    batch: Sharded
    epoch: int
    index: int
    moved: bool
    ranges: list[range]
    parameters: list[torch.nn.Parameter]
    older: list[Tensor | None]
    missing: bool
    present: list[list[float]] = field(default_factory=list)
    outputs: list[tuple[int, object]] = field(default_factory=list)


class Exact(_Base):
    """The common part of both strategies; the classes below mix it into Lightning's.

    Args:
        arguments: of Lightning's strategy.
        shards: S; the result depends on it, but not on the number of processes.
        wishes: what this process asks of all ranks: to stop, to save.
        sync_batchnorm: BatchNorm normalises over the whole batch.
        options: of Lightning's strategy.
    """

    _pretended: Options | None = None  # what the experiment's code sees of its process, in a trial

    def __init__(
        self, *arguments: Any, shards: int, wishes: Wishes, sync_batchnorm: bool = False, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.shards, self.wishes, self.sync_batchnorm = shards, wishes, sync_batchnorm
        self._end_normalising: Callable[[], object] = bool
        self.device_reads: dict[
            tuple[str, int], str
        ] = {}  # file and line of code that reads their number: what it reads
        self._asked: set[str] = set()  # in a trial
        self._sum: ShardSum | None = None
        self._watch: Watch | None = None
        self.kinds: dict[str, Kinds] = {}  # of numbers that steps add to
        self.counters: Counters
        self._parameters: list[torch.nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._uses: list[int] = []  # how often a backward has added to each gradient, at most
        self._added: list[int] = []  # and this one
        self._pushed: set[int] = set()  # parameters whose gradient of the last shard has gone
        self._filling: int | None = None  # the shard whose gradients go as they come
        self._rows = SparseRows()  # of this step's gradients
        # Which gradients the step's sums are put into, what they are divided by first, and the rows of sparse ones.
        self._waiting: tuple[list[bool], Tensor | None, dict[int, Tensor]] | None = None
        self._together: bool | None = None  # the shards of a step need each other; None before the first step
        self._tried: tuple[object, object] | None = None  # the first shard's output and data, in the first step
        self._say: Callable[[str], None] = let_pass
        self._counted: set[str] = set()  # names of optimizers whose steps Lightning would not count
        self._by_name: dict[str, torch.optim.Optimizer] = {}  # with manual optimization: all of them
        self._sums: dict[tuple[int, ...], ShardSum] = {}  # of manual optimization, by the numbers of the parameters
        self._results: ResultCollection | None = None  # of the training, while a shard logs into one of its own
        self._inside = False  # a shard's step: what it logs is combined later
        self._handed: Handed | None = None  # the batch as hooks have it
        self.appended = Appended()  # lists of the model
        self.samples: int | None = None  # of the whole batch that is at hand
        self.on_reduce: Callable[[list[Tensor], bool, str], None] | None = None  # told of values of all ranks
        # Told of loader, batch, shard, its samples and what predict_step returned.
        self.on_predicted: Callable[[int, int, int, int, object], None] | None = None

    # ------------------------------------------------------------------------------------------- called by the Trainer

    def configure_ddp(self) -> None:
        module = cast(
            torch.nn.Module, self.model
        )  # torch broadcasts no sparse buffer; every rank makes or loads the same
        dense = {name: buffer for name, buffer in module.named_buffers() if buffer.layout == torch.strided}
        sparse = [name for name, _ in module.named_buffers() if name not in dense]
        other = [name for name, buffer in dense.items() if buffer.dtype not in SENT]
        broadcast_module(module, [*sparse, *other])  # instead of a DistributedDataParallel around it
        for name in other:
            broadcast(dense[name], src=0)

    def setup(self, trainer: pl.Trainer) -> None:
        for name, parameter in self._module.named_parameters():
            if isinstance(parameter, torch.nn.UninitializedParameter):
                raise ConfigError(
                    f"{name} of a lazy layer has no shape before the first batch, but the optimizer and the other"
                    " ranks need its shape now",
                    hint="run a sample of zeros through the model at the end of its __init__; or set the sizes",
                )
        if self.sync_batchnorm and self.shards > 1:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self._module)
        super().setup(trainer)
        module = self._module
        self._end_normalising = normalise_whole_batches()
        self._trainer, self._readers = trainer, Readers(trainer)
        self._seeds_transfer = any(
            is_overridden(hook, each)
            for hook in TRANSFER_HOOKS
            for each in (module, trainer.datamodule)  # type: ignore
        )
        self._tally = Tally(module)
        self.counters = Counters(module, self._device, self.kinds)
        guard = next((each for each in trainer.callbacks if isinstance(each, Guard)), None)  # type: ignore[attr-defined]
        place: Options = {"device": self._device, "rank": self._rank, "world": self._world}
        self._buffers = Buffers(module, **place, judge=guard.judge if guard else let_pass)
        checks = guard is not None and guard.mode != "off"
        if guard is not None and self.shards > 1 and (checks or not module.automatic_optimization):
            schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
            made: Options = {"optimizers": self._find_optimizers, "schedulers": schedulers}
            said: Options = {"judge": guard.judge, "say": guard.say if checks else let_pass}
            self._watch = Watch(module, **made, **place, **said, kinds=self.kinds)
            self._watch.listen()
            self.counters = self._watch.counters
        if guard is not None and guard.mode != "off":
            self._say = guard.say
        if self._watch is not None and guard is not None:
            _judge_backward_hooks(guard, [module, *trainer.callbacks])  # type: ignore[attr-defined]
        # Lightning runs this before the strategy gets the batch: put it off until a shard is at hand.
        put_off_preparing(module, lambda batch: isinstance(batch, Sharded))

    def teardown(self) -> None:
        self._end_normalising()
        for hook in self._hooks:
            hook.remove()
        if self._module is not None:
            prepare_again(self._module)
        if self._watch is not None:
            self._watch.close()
        super().teardown()

    def _find_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return all that a step may change: with manual optimization also those that others hold."""
        if self._module.automatic_optimization:
            return self._trainer.optimizers
        self._by_name = optimizers_of(self._trainer)
        return [*self._by_name.values(), *cast(list[torch.optim.Optimizer], wrappers_of(self._trainer).values())]

    def tell_counted(self, name: str) -> None:
        """Report an optimizer whose steps are counted, though Lightning would not count them; once."""
        if name not in self._counted:
            self._counted.add(name)
            self._say(
                f"global_step counts the steps of {name}: Lightning alone counts only step() of what self.optimizers()"
                " returns"
            )

    def grown(self) -> set[str]:
        """Return the names of the model's attributes with lists that steps have appended to."""
        return self._watch.grown() if self._watch is not None else set()

    def know_grown(self, names: set[str]) -> None:
        """Add attributes with lists that steps of an earlier process have appended to."""
        if self._watch is not None:
            self._watch.know_grown(names)

    def process_dataloader(self, loader: object) -> object:
        if isinstance(loader, Loader):
            loader.shard(self.shards, rank=self._rank, world=self._world)
        return super().process_dataloader(loader)

    def batch_to_device(self, batch: object, device: torch.device | None = None, dataloader_idx: int = 0) -> object:
        self._handed = self.samples = None
        if not isinstance(batch, Sharded):
            return super().batch_to_device(batch, device, dataloader_idx)
        self.samples = batch.samples
        self._readers.leave_metrics(self._when())
        if self.shards > 1 and not self._readers.batch:
            return batch
        index = batches_begun(self._trainer)
        self._handed = self._hand(batch, dataloader_idx, *self._when(), dataloader_idx, index)
        return self._handed.batch

    def reduce(self, tensor: object, group: object = None, reduce_op: dist.ReduceOp | str | None = "mean") -> Any:
        """Return a tensor unchanged if all ranks have the same: a mean of three equal numbers may differ from them."""
        if self._inside or self._world == 1 or not isinstance(tensor, Tensor):
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self._world)]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        equal = all(torch.equal(other, tensor) for other in gathered)
        if self.on_reduce is not None:
            self.on_reduce(gathered, equal, str(reduce_op))
        if reduce_op in ("mean", "avg") and equal:
            return tensor
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: object = None, sync_grads: bool = False) -> Tensor:
        if self._inside:
            raise ConfigError(
                f"self.all_gather in a step: with determinism.shards={self.shards} it would gather a part of the batch"
                " that depends on the number of devices",
                hint="labtrain.gather(tensor), which joins the rows of the whole batch; or determinism.shards=1",
            )
        return super().all_gather(tensor, group, sync_grads)

    def training_step(self, batch: object, *args: object) -> STEP_OUTPUT:
        loop = self._trainer.fit_loop.epoch_loop
        epoch, index = epochs_done(self._trainer), loop.batch_idx
        if self.shards == 1:
            return self._whole(batch, epoch, index, *args)
        batch, moved = self._shards_of(batch)
        assert isinstance(batch, Sharded)  # guard.py
        step = self._begin_step(batch, epoch, index, moved=moved)
        stopping = self._trainer.should_stop or run_mode() == "off"
        manual = not self._module.automatic_optimization
        with self.scratch(loop) as results:
            self._tally.begin(training=True)
            if manual or self._needs_meetings(step, args):
                self._together_step(step, results, args)
            else:
                for number in range(len(batch.parts)):
                    self._shard_step(step, number, args)
            if self._trainer.should_stop and not stopping:
                raise ConfigError(
                    "training_step sets trainer.should_stop: a single shard would decide for all",
                    hint="set it in on_train_batch_end, from self.trainer.callback_metrics, those of the whole batch",
                )
            if not manual:
                cast(ShardSum, self._sum).send()
            rows_SK = self._combined(batch, results, step.ranges)
        return self._end_manual(step, rows_SK) if manual else self._end_step(step, rows_SK)

    def backward(
        self, closure_loss: Tensor, optimizer: torch.optim.Optimizer | None, *args: object, **kwargs: object
    ) -> Tensor:
        if self._waiting is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        # Here, and not in training_step: the old gradients are gone by now, and their memory is free.
        sums = cast(ShardSum, self._sum).total()
        has_gradient, shares, rows = self._waiting
        if shares is not None:
            torch._foreach_div_(sums, shares.masked_fill(~(shares > 0), 1))  # no shard with any weight: 0
        for number, (parameter, gradient) in enumerate(zip(self._parameters, sums, strict=True)):
            if number in rows:
                gradient = sparse(gradient, rows[number])
            if has_gradient[number]:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._waiting = None
        return self.precision_plugin.post_backward(closure_loss, self._module)

    def validation_step(self, batch: object, *args: object) -> Any:
        return self._evaluate(super().validation_step, batch, *args)

    def test_step(self, batch: object, *args: object) -> Any:
        return self._evaluate(super().test_step, batch, *args)

    def predict_step(self, batch: object, *args: object) -> Any:
        """Run predict_step once a shard; return what hooks get as its outputs."""
        batch, moved = self._shards_of(batch)
        if not isinstance(batch, Sharded):
            return super().predict_step(batch, *args)
        which, index = (cast(int, args[1]) if len(args) > 1 else 0), batches_begun(self._trainer) - 1
        place, outputs = (*self._when(), which, index), list[tuple[int, object]]()
        self._inside = True
        try:
            with by_itself() if self.shards > 1 else nullcontext():
                for shard, samples, data in batch.parts:
                    data = data if moved else self.moved(data, which, *place, shard)
                    seed_place(*place, shard)
                    with alone():
                        output = super().predict_step(data, *args)
                    outputs.append((samples, output))
                    if self.on_predicted is not None:
                        self.on_predicted(which, index, shard, samples, output)
        finally:
            self._inside = False
        seed_place("after", *place)
        if not self._readers.outputs:
            return ()  # Lightning warns about None
        return self._joined(outputs, what="what predict_step returns", average=True)

    # --------------------------------------------------------------------------------------------------------- a step

    def _begin_step(self, batch: Sharded, epoch: int, index: int, *, moved: bool) -> "_Step":
        parameters, ranges = list[torch.nn.Parameter](), shard_ranges(batch.shards, self._world)
        if self._module.automatic_optimization:
            parameters = self._prepare()
            cast(ShardSum, self._sum).begin(ranges)
        self._rows = SparseRows()
        self._buffers.begin()
        if self._watch is not None:
            self._watch.begin()
        elif not self._module.automatic_optimization:
            self._find_optimizers()
        return _Step(
            batch=batch,
            epoch=epoch,
            index=index,
            moved=moved,
            ranges=ranges,
            parameters=parameters,
            older=[parameter.grad for parameter in parameters],
            missing=not batch.parts,
        )

    def _shard_step(self, step: "_Step", number: int, args: tuple[object, ...]) -> None:
        """Run forward and backward of one shard, from the state that the step began with."""
        (shard, samples, _), last = step.batch.parts[number], number == len(step.batch.parts) - 1
        tried, self._tried = self._tried, None
        output, data = tried or self._shard_forward(step, number, args)
        self._added = [0] * len(step.parameters)
        share = self._share_of(output, step, shard, samples)
        if share:  # else a mean over nothing: 0 * NaN would be NaN
            self._filling = shard if last else None
            self._shard_backward(_loss(output) * (share / self._trainer.accumulate_grad_batches), data, args)
        self._close_shard(step, shard, samples, output, share, last=last)

    def _shard_forward(self, step: "_Step", number: int, args: tuple[object, ...]) -> tuple[object, object]:
        """Run the model's step of one shard; return its output and the shard's data."""
        if number:
            self._buffers.restore()
            if self._watch is not None:
                self._watch.restore()
        for parameter in step.parameters:
            parameter.grad = None
        data = self._open(step, number)
        try:
            with alone():
                return super().training_step(data, *args), data
        except NeedsMeetingError as error:
            if self._together is None:
                raise
            raise ConfigError(
                f"{error} was not used in the training's first step: labtrain then runs each shard of a step by itself",
                hint=f"use {error} in every training_step",
            ) from None

    def _open(self, step: "_Step", number: int, *, place: int = 0) -> object:
        """Begin a shard: return its data on the device, let it log for itself, and seed its draws."""
        shard, samples, data = step.batch.parts[number]
        data = data if step.moved else self.moved(data, 0, *self._when(), 0, step.index, shard)
        put_results(self._trainer.fit_loop.epoch_loop, self._tally.open(data, samples, place=place))
        seed_place("shard", step.epoch, step.index, shard)
        return data

    def _share_of(self, output: object, step: "_Step", shard: int, samples: int) -> float:
        """Return what a shard's loss counts for in that of the batch."""
        if _loss(output) is None:
            raise ConfigError(
                f"training_step returned no loss for shard {shard} of batch {step.index}",
                hint="return the loss of every shard (0 * loss to skip one); or determinism.shards=null",
            )
        given = weight_of(output)
        return (samples if given is None else given) / step.batch.samples

    def _close_shard(
        self, step: "_Step", shard: int, samples: int, output: object, share: float, *, last: bool
    ) -> None:
        """Add a shard's gradients, and keep what its step has left."""
        loss, given = _loss(output).detach(), weight_of(output)
        present = self._push(shard, step.parameters)
        step.missing |= not all(present)
        step.present.append(present)
        row = weighted_row(loss, share, returned=given is not None)
        self._keep(
            step, shard, samples, output, present, row, last=last, weighted=None if given is None else (loss, given)
        )

    def _keep(
        self,
        step: "_Step",
        shard: int,
        samples: int,
        output: object,
        first: list[float],
        row: Tensor,
        *,
        last: bool,
        weighted: tuple[Tensor, float] | None = None,
    ) -> None:
        """Keep what a shard's step has left: attributes, buffers, its output, and what it logged."""
        watched = self._watch.leave(shard, samples, last=last) if self._watch is not None else []
        left = self._buffers.leave(shard, samples / step.batch.samples)
        if self._readers.outputs:
            step.outputs.append((samples, output))
        numbers = torch.tensor([*first, *left, *watched, content(output)], dtype=torch.float64)
        self._tally.close(torch.cat([to_device(numbers, row.device), row]), samples, weighted)

    def _shard_backward(self, loss: Tensor, data: object, args: tuple[object, ...]) -> None:
        try:
            self._backward_of(loss)
        except RuntimeError as error:
            self._filling = None
            explain_backward(error, self._module, partial(self._loss_again, data, *args))
            raise
        self._filling = None

    def _backward_of(self, loss: Tensor) -> None:
        plugin = self.precision_plugin
        plugin.backward(plugin.pre_backward(loss, self._module), self._module, None)

    def _end_step(self, step: "_Step", rows_SK: Tensor) -> STEP_OUTPUT:
        """Install the results of the shards of all ranks; return what hooks get for the step."""
        parameters = step.parameters
        has_SP, buffers_SB, watched_S5, contents_S1, losses_SN = self._split(rows_SK, len(parameters))
        has_gradient, rows = [True] * len(parameters), dict[int, Tensor]()
        if step.missing or self._rows:
            # One process knows its own numbers: it does not wait for a GPU to send them back.
            found_SP = has_SP.tolist() if self._world > 1 else step.present
            has_gradient = [max(column) > ABSENT for column in zip(*found_SP, strict=True)]
            rows = self._rows.of_all(found_SP, parameters, self._world)
        if not any(has_gradient):  # no shard had any weight: zeros, since a GradScaler needs a gradient
            has_gradient = [True] * len(parameters)
        self._install(step, buffers_SB, watched_S5)
        for parameter, gradient in zip(parameters, step.older, strict=True):
            parameter.grad = gradient
        mean, shares = weighted_mean(losses_SN)
        self._waiting = has_gradient, shares, rows
        combined = {"loss": mean} if shares is None else {"loss": mean, "weight": shares * step.batch.samples}
        outputs = self._outputs_of(step, contents_S1)
        return {**outputs, **combined} if isinstance(outputs, dict) else mean

    def _split(self, rows_SK: Tensor, first: int) -> tuple[Tensor, ...]:
        """Split the shards' rows: the first numbers, those of buffers and `Watch`, the output's content, the loss."""
        sizes = first, len(self._buffers.owned) + 1, self._watch.width if self._watch is not None else 0, 1
        return tuple(rows_SK.split([*sizes, rows_SK.shape[1] - sum(sizes)], 1))

    def _install(self, step: "_Step", buffers_SB: Tensor, watched_S5: Tensor) -> None:
        """Give every rank the buffers and attributes that the shards of all ranks have left."""
        # One process knows its own numbers: it does not wait for a GPU to send them back.
        buffers, watch = self._buffers, self._watch
        buffers.install(buffers_SB.tolist() if self._world > 1 else buffers.numbers, step.ranges)
        if watch is not None:
            watch.end(watched_S5.tolist() if self._world > 1 else watch.numbers, step.ranges)
        seed_place("after", step.epoch, step.index)  # what hooks draw from here on is the same on every rank

    # ---------------------------------------------------------------------------------------------- shards together

    def _needs_meetings(self, step: "_Step", args: tuple[object, ...]) -> bool:
        """Return whether the model's steps need the whole batch; in the first step, rank 0 tries its first shard."""
        if self._together is None:
            together = any(isinstance(part, torch.nn.SyncBatchNorm) for part in self._module.modules())
            self._together = together or bool(self.broadcast(self._rank == 0 and self._try(step, args), src=0))
        return self._together

    def _try(self, step: "_Step", args: tuple[object, ...]) -> bool:
        """Run the first shard's forward by itself; return whether it needs the others, and then undo what it did."""
        try:
            self._tried = self._shard_forward(step, 0, args)
        except NeedsMeetingError:
            self._buffers.restore()
            if self._watch is not None:
                self._watch.restore_all()
            return True
        return False

    def _together_step(self, step: "_Step", results: ResultCollection, args: tuple[object, ...]) -> None:
        """Run the shards of a step together; then keep what each has left."""
        self._results, manual = results, not self._module.automatic_optimization
        self._added = [0] * len(step.parameters)  # of all shards: none sends its gradients early
        place: Options = {"device": self._device, "rank": self._rank, "world": self._world, "watch": self._watch}
        place["optimizers"] = self._by_name if manual else None
        run = partial(self._forward if manual else self._forward_and_backward, step, args)
        for shard, output, last in Together(self, self._trainer, **place, step=step, run=run).run():
            if manual:
                loss = _loss(output)
                row = weighted_row(torch.zeros((), device=self._device) if loss is None else loss.detach(), shard.share,
                                   returned=False)  # fmt: skip
                has_loss = [float(loss is not None)]
                self._keep(step, shard.number, shard.samples, output, has_loss, row.to(self._device), last=last)
            else:
                self._close_shard(step, shard.number, shard.samples, *cast(tuple[object, float], output), last=last)
            if not last:
                self._buffers.restore()
                if self._watch is not None:
                    self._watch.restore()

    def _forward(self, step: "_Step", args: tuple[object, ...], place: int) -> object:
        """Run the model's step of a shard, in the shard's thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        return super().training_step(self._open(step, place, place=place), *args)

    def _forward_and_backward(self, step: "_Step", args: tuple[object, ...], place: int) -> tuple[object, float]:
        """Run forward and backward of a shard, in its thread; return its output and what its loss counts for."""
        shard, samples, _ = step.batch.parts[place]
        output = self._forward(step, args, place)
        share = self._share_of(output, step, shard, samples)
        if share:
            # A backward that meets must run in this thread, also on a GPU.
            with torch.autograd.set_multithreading_enabled(False):
                self._backward_of(_loss(output) * (share / self._trainer.accumulate_grad_batches))
        return output, share

    def _end_manual(self, step: "_Step", rows_SK: Tensor) -> STEP_OUTPUT:
        """Install the results of the shards of all ranks; return what hooks get for the step."""
        has_loss, buffers_SB, watched_S5, contents_S1, losses_SN = self._split(rows_SK, 1)
        self._install(step, buffers_SB, watched_S5)
        outputs = self._outputs_of(step, contents_S1)
        if not has_loss.all():
            return cast(STEP_OUTPUT, outputs)
        mean, _ = weighted_mean(losses_SN)
        return {**outputs, "loss": mean} if isinstance(outputs, dict) else mean

    def swap_out(self) -> list[Callable[[], object]]:
        """Put aside what a shard has to itself, in the middle of its step; return what puts it back."""
        loop = self._trainer.fit_loop.epoch_loop
        give: list[Callable[[], object]] = [partial(put_results, loop, results_of(loop))]
        give += [self._tally.take(), self._buffers.take()]
        return [*give, self._watch.take()] if self._watch is not None else give

    @contextmanager
    def between_shards(self) -> Iterator[None]:
        """Let Lightning and hooks act once for all shards, in the middle of a step: what they log is not a shard's."""
        loop = self._trainer.fit_loop.epoch_loop
        inner = results_of(loop)
        put_results(loop, cast(ResultCollection, self._results))
        self._inside = False
        try:
            with keep_logging_hook(self._trainer), self._watch.unwatched() if self._watch else nullcontext():
                yield
        finally:
            put_results(loop, inner)
            self._inside = True

    def sum_of(self, which: tuple[int, ...], parameters: list[torch.nn.Parameter]) -> ShardSum:
        """Return what sums the gradients of some parameters, made once."""
        if which not in self._sums or [each.shape for each in self._sums[which].like] != [p.shape for p in parameters]:
            like = [_dense(parameter.detach()) for parameter in parameters]
            self._sums[which] = ShardSum(like, rank=self._rank, world=self._world)
        return self._sums[which]

    def _loss_again(self, data: object, *args: object) -> Any:
        return _loss(super().training_step(data, *args))

    def _evaluate(self, step: Callable[..., object], batch: object, *args: object) -> object:
        """Run a validation or test step once a shard; return what hooks get as its outputs."""
        batch, moved = self._shards_of(batch)
        if not isinstance(batch, Sharded):
            return step(batch, *args)
        loop = evaluation_loop(self._trainer)
        index = loop.batch_progress.current.ready - 1
        which, ranges = results_of(loop).dataloader_idx, shard_ranges(batch.shards, self._world)
        place = (*self._when(), which or 0, index)
        outputs: list[tuple[int, object]] = []
        taken = self._readers.outputs
        with self.scratch(loop) as results, self.appended.watch(self._module, loader=which or 0, batch=index):
            self._tally.begin(training=False)
            stage = self._begin_counters(which or 0, args)
            for shard, samples, data in batch.parts:
                data = data if moved else self.moved(data, which or 0, *place, shard)
                put_results(loop, self._tally.open(data, samples, which))
                seed_place(*place, shard)
                try:
                    with alone():
                        output = step(data, *args)
                except NeedsMeetingError as error:
                    raise ConfigError(
                        f"{error} in a validation or test: their shards run one after the other",
                        hint="collect the outputs in a list, and labtrain.gather_outputs(list) at the epoch's end",
                    ) from None
                if taken:
                    outputs.append((samples, output))
                front = [*([content(output)] if taken else []), *self.counters.take(samples)]
                self._tally.close(to_device(torch.tensor(front, dtype=torch.float64), self._device), samples)
            rows_SK = self._combined(batch, results, ranges)
            if self.counters.width:
                self._end_counters(stage, rows_SK[:, int(taken) :].tolist(), which or 0, args)
        if self.wishes.agreed_stop:
            raise Stopped(self.wishes.agreed_stop)  # what was trained is saved before each validation
        seed_place("after", *place)
        if not taken or not rows_SK[:, 0].any():
            return None
        return self._joined(outputs, what="what validation_step or test_step returns", average=True)

    def _begin_counters(self, loader: int, args: tuple[object, ...]) -> str:
        """Begin a step of an evaluation for numbers that it adds to; in the first one, find them. Return the stage."""
        stage = _stage_of(self._trainer)
        if self._watch is not None and stage not in self.kinds:
            self.kinds[stage], unlike = self._try_evaluation(loader, 0, args)
            self._say_others(stage, self.kinds[stage])
            if unlike:
                self._say(
                    f"{stage}_step changes {few(sorted(unlike))}: it runs once for each of a batch's {self.shards}"
                    " shards, and each device has the value of its own (use an attribute that the step adds to by +=,"
                    " a list, or a torchmetrics metric)"
                )
        elif self._watch is not None and args and args[0] == 0:  # other numbers may be there by now
            self.kinds[stage] = Trial(self.counters, training=False).kinds() | self.kinds[stage]
        self.counters.begin(stage)
        return stage

    def _try_evaluation(self, loader: int, batch: int, args: tuple[object, ...]) -> tuple[Kinds, set[str]]:
        """Return how to combine what shards add to numbers, and the names of others that they change."""
        found: tuple[Kinds, set[str]] = {}, set()
        if self._rank == 0 and self.counters.may_change():
            trial = Trial(self.counters, training=False)
            of_stage = [*eval_loaders(self._trainer)][loader]
            count_steps(self._trainer, self._module, of_stage, trial, args=args, batch=batch)
            found = trial.kinds(), trial.unlike
        return self.broadcast(found, src=0)

    def _end_counters(self, stage: str, rows_SN: list[list[float]], loader: int, args: tuple[object, ...]) -> None:
        """End the step; if it has added to a number whose kind no step has shown, find that out."""
        if unknown := self.counters.unknown(rows_SN):
            batch = args[0] if args and isinstance(args[0], int) else 0
            now, _ = self._try_evaluation(loader, batch, args)
            found = {site: OTHER if now[site] == UNKNOWN else now[site] for site in unknown}
            self.kinds[stage] |= found
            self._say_others(stage, found)
        self.counters.end(rows_SN, self.kinds.get(stage))

    def _say_others(self, stage: str, found: Kinds) -> None:
        if others := sorted(".".join(filter(None, site)) for site, kind in found.items() if kind == OTHER):
            self._say(
                f"{stage}_step adds to {few(others)} what is neither a sum over samples nor a mean: labtrain adds what"
                f" the {self.shards} shards of a batch add (use a torchmetrics metric)"
            )

    def _hand(self, batch: Sharded, dataloader_idx: int, *place: int | str) -> Handed:
        """Move a batch's shards to the device, and join those of all ranks for hooks."""
        parts = [
            (shard, samples, self.moved(data, dataloader_idx, *place, shard)) for shard, samples, data in batch.parts
        ]
        moved = Sharded(parts, samples=batch.samples, shards=batch.shards)
        joined = self._joined([(samples, data) for _, samples, data in parts], what="a batch", average=False)
        return Handed(moved, joined)

    def _shards_of(self, batch: object) -> tuple[object, bool]:
        """Return the shards of a batch as hooks had it, and whether they are on the device."""
        if self._handed is None or batch is not self._handed.batch:
            return batch, False
        if self.shards > 1:
            self._handed.check(self._trainer)
        return self._handed.sharded, True

    def _joined(self, parts: list[tuple[int, object]], *, what: str, average: bool) -> object:
        """Return what hooks get for the shards of all ranks; every rank calls it."""
        if self.shards == 1:
            return parts[0][1]
        return whole(parts, self._device, average=average, what=what)

    def _outputs_of(self, step: "_Step", contents_S1: Tensor) -> object:
        """Return what hooks get for the outputs of a training step; every rank knows the loss already."""
        if not self._readers.outputs:
            return None
        own = [[content(output)] for _, output in step.outputs]
        found = {kind for (kind,) in (contents_S1.tolist() if self._world > 1 else own)}
        if found in ({NOTHING}, {LOSS}):
            return None
        if found == {LOSS_IN_DICT}:
            return {}
        return self._joined(step.outputs, what="what training_step returns", average=True)

    def _when(self) -> tuple[str, int]:
        """Return the stage, and the epoch of training or the step of an evaluation."""
        trainer = self._trainer
        if trainer.training:
            return "train", epochs_done(trainer)
        return str(trainer.state.stage), trainer.global_step

    def _combined(self, batch: Sharded, results: ResultCollection, ranges: list[range]) -> Tensor:
        """Combine what all shards logged, and the wishes of all ranks; return the numbers that were put in front."""
        rows_SK, agreed = self._tally.combine(
            results,
            samples=batch.samples,
            counts=[len(shards) for shards in ranges],
            wishes=self.wishes.numbers(),
            device=self._device,
        )
        self.wishes.agree(*agreed)
        return rows_SK

    def _whole(self, batch: object, epoch: int, index: int, *args: object) -> STEP_OUTPUT:
        """Run a step of one shard as Lightning would: there is nothing to combine."""
        seed_place("shard", epoch, index, 0)
        manual = not self._module.automatic_optimization
        counted = counting(self._trainer, optimizers_of(self._trainer), self.tell_counted) if manual else nullcontext()
        with counted:
            output = super().training_step(batch, *args)
        self.wishes.agree(*self.wishes.numbers())
        return output

    @contextmanager
    def scratch(self, loop: AnyLoop) -> Iterator[ResultCollection]:
        """Restore Lightning's collection of logged values at the end, whatever happens."""
        results, self._inside = results_of(loop), True
        try:
            with by_itself() if self.shards > 1 else nullcontext():
                yield results
        finally:
            put_results(loop, results)
            self._inside = False

    def moved(self, data: object, dataloader_idx: int, *place: int | str) -> object:
        """Do to a shard what Lightning does to a batch before its step."""
        if self._seeds_transfer:
            seed_place("transfer", *place)
        data = self.precision_plugin.convert_input(data)
        data = prepare_batch(self._module, data, dataloader_idx)
        return super().batch_to_device(data, dataloader_idx=dataloader_idx)

    def _prepare(self) -> list[torch.nn.Parameter]:
        """Return the parameters that need a gradient; if they changed, lay out their sums again."""
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if self._sum is not None and list(map(id, parameters)) == list(map(id, self._parameters)):
            return parameters
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        like = [_dense(parameter.detach()) for parameter in parameters]
        self._sum = ShardSum(like, rank=self._rank, world=self._world)
        self._parameters, self._uses = parameters, [0] * len(parameters)
        if self._world > 1:
            for number, parameter in enumerate(parameters):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._arrived(number)))
        return parameters

    def _arrived(self, number: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._added[number] += 1
            if self._filling is None or parameter.grad is None:
                return
            if number in self._pushed:
                raise ConfigError(
                    f"the gradient of {_name_of(parameter, self._module)} grew after it was sent: reentrant"
                    " checkpointing used it more often than in any step before",
                    hint="use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or trainer.devices=1",
                )
            if self._added[number] == self._uses[number]:  # reentrant checkpointing adds to it once a use
                assert self._sum is not None
                self._pushed.add(number)
                self._sum.push(self._filling, number, self._rows.dense(number, parameter.grad))
                parameter.grad = None

        return hook

    def _push(self, shard: int, parameters: list[torch.nn.Parameter]) -> list[float]:
        """Add the gradients of one shard that were not sent yet; return ABSENT, DENSE or SPARSE for each."""
        assert self._sum is not None
        present = []
        for number, parameter in enumerate(parameters):
            if number in self._pushed:
                present.append(self._rows.kind(number))
                continue
            if parameter.grad is None:
                present.append(ABSENT)
                gradient = torch.zeros_like(parameter)
            else:
                gradient = self._rows.dense(number, parameter.grad)
                present.append(self._rows.kind(number))
            self._sum.push(shard, number, gradient)
            parameter.grad = None
        self._rows.end_shard()
        self._pushed.clear()
        self._uses = [max(pair) for pair in zip(self._uses, self._added, strict=True)]
        return present

    @contextmanager
    def pretending(self, rank: int, world: int) -> Iterator[set[str]]:
        """Let the experiment's code see another process; yield what it asks for, with file and line.

        Args:
            rank: of that process.
            world: how many there are.
        """
        before = {name: os.environ.get(name) for name in OF_PROCESSES}
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
        values = {"world_size": world, "global_rank": rank, "local_rank": rank, "is_global_zero": rank == 0}
        self._pretended, asked = values, self._asked
        asked.clear()
        try:
            yield asked
        finally:
            self._pretended = None
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def _told(self, name: str, value: T) -> T:
        """Return a property of the process; record code of the experiment that asks for it."""
        frame: types.FrameType | None = sys._getframe(2)
        if frame is None or frame.f_code.co_filename == __file__:
            return value
        while frame is not None and frame.f_code.co_filename in PASSING and frame.f_code.co_name in OF_TRAINER:
            name, frame = frame.f_code.co_name, frame.f_back
        if frame is None or not is_experiments_code(frame) or run_mode() == "off":
            return value
        file, line = frame.f_code.co_filename, frame.f_lineno
        if self._pretended is not None:
            self._asked.add(f"trainer.{name} ({Path(file).name}:{line})")
            return cast(T, self._pretended.get(name, value))
        while frame is not None and name in NOTED and frame.f_code.co_filename != TRAINER:
            if frame.f_code.co_name in MAKERS and is_experiments_code(frame):
                self.device_reads.setdefault((file, line), name)
                break
            frame = frame.f_back
        return value

    @property
    def is_global_zero(self) -> bool:
        return bool(self._told("is_global_zero", super().is_global_zero))

    @property
    def _module(self) -> pl.LightningModule:
        return cast(pl.LightningModule, self.lightning_module)

    @property
    def _rank(self) -> int:
        return int(self.global_rank)

    @property
    def _world(self) -> int:
        return int(self.world_size)

    @property
    def _device(self) -> torch.device:
        return self.root_device


class ExactSingleDevice(Exact, SingleDeviceStrategy):
    """One process."""

    @property
    def world_size(self) -> int:
        return int(self._told("world_size", 1))

    @world_size.setter
    def world_size(self, world: int) -> None:
        """Do nothing: Lightning sets 1."""

    @property
    def global_rank(self) -> int:
        return int(self._told("global_rank", 0))

    @global_rank.setter
    def global_rank(self, rank: int) -> None:
        """Do nothing: Lightning sets 0."""

    @property
    def local_rank(self) -> int:
        return int(self._told("local_rank", 0))

    @local_rank.setter
    def local_rank(self, rank: int) -> None:
        """Do nothing: Lightning sets 0."""

    @property
    def root_device(self) -> torch.device:
        if sys._getframe(1).f_code.co_name == "device_ids":
            self._told("num_devices", 1)
        return super().root_device


class ExactDDP(Exact, DDPStrategy):
    """Several processes, over gloo on CPUs and NCCL on GPUs."""

    @property
    def world_size(self) -> int:
        return int(self._told("world_size", super().world_size))

    @property
    def global_rank(self) -> int:
        return int(self._told("global_rank", super().global_rank))

    @property
    def local_rank(self) -> int:
        return int(self._told("local_rank", super().local_rank))

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        self._told("num_devices", 0)
        return super().parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        ParallelStrategy.parallel_devices.fset(self, devices)  # type: ignore[attr-defined]


def _judge_backward_hooks(guard: Guard, owners: list[object]) -> None:
    for each in owners:
        if is_overridden("on_before_backward", each):
            guard.judge(
                f"{type(each).__name__}.on_before_backward runs once a shard, so the number of calls in a step"
                " depends on the number of devices",
                "use on_after_backward or on_before_optimizer_step, which run once a step; or determinism.shards=1",
            )


def _stage_of(trainer: pl.Trainer) -> str:
    """Return the name of an evaluation; that inside of a training is a validation."""
    return "test" if trainer.testing else "validation"


def _name_of(parameter: Tensor, module: torch.nn.Module) -> str:
    return next(name for name, each in module.named_parameters() if each is parameter)


def _loss(output: object) -> Any:
    return output.get("loss") if isinstance(output, dict) else output


def _dense(tensor: Tensor) -> Tensor:
    """Return the tensor, or one like it if its elements overlap or leave gaps."""
    return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else torch.empty_like(tensor)
