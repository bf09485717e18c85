"""Exact training inside Lightning's Trainer: the same bits on 1, 2, 3, ... up to S devices.

One Lightning batch is one global batch. The loader yields this rank's shards of it; `training_step` below runs the
person's own once a shard, forward and backward, sums the gradients and the buffers along one tree (reduction.py), and
returns the loss of the whole batch. Lightning then calls `backward`, which installs the sums. Clipping, scaler,
optimizer, schedulers, callbacks and loggers are Lightning's own and see one step, whatever the number of processes: so
`global_step`, `batch_idx`, `val_check_interval` and schedules do not depend on it either.

Every shard is run under its own (seed, epoch, batch, shard), from the buffers that the step began with; buffers are
then averaged over the samples, once a step. The loss is taken for what it nearly always is, a mean over the samples.

Lightning 2.6: strategies/strategy.py and strategies/ddp.py.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from labtrain.buffers import Buffers
from labtrain.determinism import seed_place
from labtrain.errors import ConfigError
from labtrain.guard import explain_backward
from labtrain.loader import DataLoader, Sharded
from labtrain.metrics import add_rows
from labtrain.reduction import ShardSum, filled_ranges
from labtrain.signals import Stopped, Wishes
from labtrain.tally import Tally


class Exact:
    """What both strategies share; the classes below mix it into Lightning's.

    Args:
        arguments: of Lightning's strategy.
        shards: S; a part of the result, as the number of processes is not.
        wishes: what this process wants of all: to stop, to save.
        options: of Lightning's strategy.
    """

    def __init__(self, *arguments: Any, shards: int, wishes: Wishes, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shards, self.wishes = shards, wishes
        self._sum: ShardSum | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._hooks: list[Any] = []
        self._pushed: set[int] = set()  # parameters whose gradient of the last shard has gone
        self._filling: int | None = None  # the shard whose gradients go as they come
        self._installed: list[tuple[torch.nn.Parameter, Tensor, bool]] | None = None
        self._inside = False  # a shard's step: what it logs is combined later

    # ------------------------------------------------------------------------------------------- called by the Trainer

    def configure_ddp(self) -> None:
        module = cast(Any, self).model  # torch broadcasts no sparse buffer; every rank makes or loads the same
        sparse = [name for name, buffer in module.named_buffers() if buffer.layout != torch.strided]
        module._ddp_params_and_buffers_to_ignore = [*getattr(module, "_ddp_params_and_buffers_to_ignore", []), *sparse]
        _sync_module_states(cast(Any, self).model)  # instead of a DistributedDataParallel around it

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)  # type: ignore[misc]
        module = self._module
        if not module.automatic_optimization:
            raise ConfigError(
                f"{type(module).__name__} optimizes manually: its steps cannot be cut into determinism.shards",
                hint="determinism.shards=null: Lightning's plain strategy, bits depend on the number of devices",
            )
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.SyncBatchNorm):
                raise ConfigError(
                    f"{name or 'the model'} is a SyncBatchNorm: its statistics are summed in the order of the devices",
                    hint="BatchNorm, whose statistics are then those of a shard; or determinism.shards=null",
                )
        self._trainer = trainer
        self._tally = Tally(module)
        self._buffers = Buffers(module, shards=self.shards, rank=self._rank, world=self._world)
        # Lightning runs this before the strategy gets the batch: put it off until a shard is at hand.
        transfer = type(module)._on_before_batch_transfer
        module._on_before_batch_transfer = (  # type: ignore[method-assign]
            lambda batch, dataloader_idx=0: (
                batch if isinstance(batch, Sharded) else transfer(module, batch, dataloader_idx)
            )
        )

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._module is not None:
            vars(self._module).pop("_on_before_batch_transfer", None)
        super().teardown()  # type: ignore[misc]

    def process_dataloader(self, loader: Any) -> Any:
        if isinstance(loader, DataLoader):
            loader.shard(self.shards, rank=self._rank, world=self._world)
        return super().process_dataloader(loader)  # type: ignore[misc]

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, Sharded):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)  # type: ignore[misc]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return a tensor that is the same on all ranks as it is: a mean of three equal numbers may not be equal."""
        if self._inside or self._world == 1 or not isinstance(tensor, Tensor):
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self._world)]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        if reduce_op in ("mean", "avg") and all(torch.equal(other, tensor) for other in gathered):
            return tensor
        return super().reduce(tensor, group, reduce_op)  # type: ignore[misc]

    def training_step(self, batch: Any, *args: Any) -> Any:
        loop = self._trainer.fit_loop.epoch_loop
        epoch, index = cast(Any, self._trainer.fit_loop.epoch_progress.current).processed, loop.batch_idx
        if self.shards == 1:
            return self._whole(batch, epoch, index, *args)
        assert isinstance(batch, Sharded)  # guard.py
        module, plugin, tally, buffers = self._module, cast(Any, self).precision_plugin, self._tally, self._buffers
        ranges = filled_ranges(self.shards, self._world, batch.shards)
        parameters = self._prepare()
        total = cast(ShardSum, self._sum)
        total.begin(ranges)
        buffers.begin()
        older = [parameter.grad for parameter in parameters]  # of batches that are accumulated
        output: Any = None
        missing = not batch.parts  # a gradient, on this rank: then only the others know whether there is one
        with self._scratch(loop) as results:
            tally.begin(training=True)
            for number, (shard, samples, data) in enumerate(batch.parts):
                if number:
                    buffers.restore()
                for parameter in parameters:
                    parameter.grad = None
                data = self._moved(data, 0)
                loop._results = tally.open(data, samples)
                seed_place("shard", epoch, index, shard)
                output = super().training_step(data, *args)  # type: ignore[misc]
                loss = _loss(output)
                if loss is None:
                    raise ConfigError(
                        f"training_step returned no loss for shard {shard} of batch {index}",
                        hint="return the loss of every shard, 0 * loss to leave one out; or determinism.shards=null",
                    )
                weight = samples / batch.samples
                self._filling = shard if number == len(batch.parts) - 1 else None
                scaled = plugin.pre_backward(loss * (weight / self._trainer.accumulate_grad_batches), module)
                try:
                    plugin.backward(scaled, module, None)
                except RuntimeError as error:
                    self._filling = None
                    explain_backward(error, module, partial(self._loss_again, data, *args))
                    raise
                self._filling = None
                present = self._push(shard, parameters)
                missing = missing or not all(present)
                numbers = torch.tensor([*present, *buffers.leave(shard, weight)], dtype=torch.float64)
                tally.close(torch.cat([numbers.to(loss.device), (loss.detach().double() * weight).reshape(1)]), samples)
            rows_SK = self._combined(batch, results, ranges)
            sums = total.total()
        has_SP, buffers_SB, losses_S1 = rows_SK.split([len(parameters), len(buffers.owned), 1], 1)
        wanted = (has_SP.amax(0) > 0).tolist() if missing else [True] * len(parameters)
        # One process knows its own: no waiting for a GPU to read them back.
        buffers.install(buffers_SB.tolist() if self._world > 1 else buffers.numbers, ranges)
        for parameter, gradient in zip(parameters, older, strict=True):
            parameter.grad = gradient
        self._installed = list(zip(parameters, sums, wanted, strict=True))
        seed_place("after", epoch, index)  # what hooks draw from here on is the same on every rank
        mean = add_rows(losses_S1)[0].float()
        return {**output, "loss": mean} if isinstance(output, dict) else mean

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._installed is None:
            return cast(Tensor, super().backward(closure_loss, optimizer, *args, **kwargs))  # type: ignore[misc]
        accumulates = self._trainer.accumulate_grad_batches > 1
        for parameter, gradient, wanted in self._installed:
            if wanted and parameter.grad is not None:
                parameter.grad = parameter.grad + gradient
            elif wanted:
                parameter.grad = gradient.clone() if accumulates else gradient  # the next batch has the same memory
        self._installed = None
        return cast(Tensor, cast(Any, self).precision_plugin.post_backward(closure_loss, self._module))

    def validation_step(self, batch: Any, *args: Any) -> Any:
        return self._evaluate(super().validation_step, batch, *args)  # type: ignore[misc]

    def test_step(self, batch: Any, *args: Any) -> Any:
        return self._evaluate(super().test_step, batch, *args)  # type: ignore[misc]

    # --------------------------------------------------------------------------------------------------------- a step

    def _loss_again(self, data: Any, *args: Any) -> Any:
        return _loss(super().training_step(data, *args))  # type: ignore[misc]

    def _evaluate(self, step: Callable[..., Any], batch: Any, *args: Any) -> Any:
        """Run a validation or test step once a shard; return its output, or a list where this rank has more shards."""
        if not isinstance(batch, Sharded):
            return step(batch, *args)
        loop = self._trainer._evaluation_loop
        index = loop.batch_progress.current.ready - 1
        which, stage = loop._results.dataloader_idx, str(self._trainer.state.stage)
        place = (stage, self._trainer.global_step, which or 0, index)
        outputs = []
        with self._scratch(loop) as results:
            self._tally.begin(training=False)
            for shard, samples, data in batch.parts:
                data = self._moved(data, which or 0)
                loop._results = self._tally.open(data, samples, which)
                seed_place(*place, shard)
                outputs.append(step(data, *args))
                self._tally.close(torch.empty(0, dtype=torch.float64, device=self._device), samples)
            self._combined(batch, results, filled_ranges(self.shards, self._world, batch.shards))
        if self.wishes.agreed_stop:
            raise Stopped(self.wishes.agreed_stop)  # what was trained is saved before each validation
        seed_place("after", *place)
        return outputs[0] if len(outputs) == 1 else outputs or None

    def _combined(self, batch: Sharded, results: Any, ranges: list[range]) -> Tensor:
        """Bring together what all shards logged, and what all ranks wish; return the numbers that were put in front."""
        rows_SK, agreed = self._tally.combine(
            results,
            samples=batch.samples,
            counts=[len(shards) for shards in ranges],
            wishes=self.wishes.numbers(),
            device=self._device,
        )
        self.wishes.agree(*agreed)
        return rows_SK

    def _whole(self, batch: Any, epoch: int, index: int, *args: Any) -> Any:
        """Run a step of one shard as Lightning itself would: nothing is to be combined."""
        data = batch
        if isinstance(batch, Sharded):
            data = self._moved(batch.parts[0][2], 0)
            self._trainer.fit_loop.epoch_loop._results.batch = data
        seed_place("shard", epoch, index, 0)
        output = super().training_step(data, *args)  # type: ignore[misc]
        self.wishes.agree(*self.wishes.numbers())
        return output

    @contextmanager
    def _scratch(self, loop: Any) -> Any:
        """Put Lightning's collection of what is logged back, whatever happens."""
        results, self._inside = loop._results, True
        try:
            yield results
        finally:
            loop._results, self._inside = results, False

    def _moved(self, data: Any, dataloader_idx: int) -> Any:
        """Do to a shard what Lightning does to a batch before its step."""
        data = cast(Any, self).precision_plugin.convert_input(data)
        data = type(self._module)._on_before_batch_transfer(self._module, data, dataloader_idx)
        return super().batch_to_device(data, dataloader_idx=dataloader_idx)  # type: ignore[misc]

    def _prepare(self) -> list[torch.nn.Parameter]:
        """Return the parameters that want a gradient; where they are others than before, lay out their sums anew."""
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if self._sum is not None and list(map(id, parameters)) == list(map(id, self._parameters)):
            return parameters
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        like = [_dense(parameter.detach()) for parameter in parameters]
        self._sum = ShardSum(like, rank=self._rank, world=self._world)
        self._parameters = parameters
        if self._world > 1:
            for number, parameter in enumerate(parameters):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._arrived(number)))
        return parameters

    def _arrived(self, number: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._filling is not None and parameter.grad is not None:
                assert self._sum is not None
                self._pushed.add(number)
                self._sum.push(self._filling, number, _not_sparse(parameter.grad))
                parameter.grad = None

        return hook

    def _push(self, shard: int, parameters: list[torch.nn.Parameter]) -> list[float]:
        """Put in the gradients of one shard that have not gone already; return 1.0 for each that there is."""
        assert self._sum is not None
        present = []
        for number, parameter in enumerate(parameters):
            if number in self._pushed:
                present.append(1.0)
                continue
            present.append(float(parameter.grad is not None))
            gradient = torch.zeros_like(parameter) if parameter.grad is None else _not_sparse(parameter.grad)
            self._sum.push(shard, number, gradient)
            parameter.grad = None
        self._pushed.clear()
        return present

    @property
    def _module(self) -> pl.LightningModule:
        return cast(pl.LightningModule, cast(Any, self).lightning_module)

    @property
    def _rank(self) -> int:
        return int(cast(Any, self).global_rank)

    @property
    def _world(self) -> int:
        return int(cast(Any, self).world_size)

    @property
    def _device(self) -> torch.device:
        return cast(torch.device, cast(Any, self).root_device)


class ExactSingleDevice(Exact, SingleDeviceStrategy):
    """One process."""


class ExactDDP(Exact, DDPStrategy):
    """Several processes, over gloo on CPUs and NCCL on GPUs."""


def _loss(output: Any) -> Any:
    return output["loss"] if isinstance(output, dict) else output


def _dense(tensor: Tensor) -> Tensor:
    """Return the tensor, or one like it where its elements overlap or leave gaps."""
    return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else torch.empty_like(tensor)


def _not_sparse(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise ConfigError(
            "a gradient is sparse: it cannot be summed along the tree of determinism.shards",
            hint="nn.Embedding(..., sparse=False), or determinism.shards=null",
        )
    return gradient
