"""What a step computes over the whole batch, although it runs a shard at a time: sums of SyncBatchNorm, joined rows.

The shards of all ranks meet for each of these, forward and backward: together.py. Sums are added along the tree of
tree_sum.py, rows are joined in the order of the shards, so the bits do not depend on the number of devices.

S. Ioffe, C. Szegedy, Batch Normalization, ICML 2015, for the normalisation. torch's SyncBatchNorm computes the same on
GPUs, with sums in the order of the devices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from labtrain.training.sharded.lockstep import meet, runs_here

GATHER, SUM = "labtrain.gather", "SyncBatchNorm"
FORWARD, BACK = 0, 1


class NeedsMeetingError(Exception):
    """A shard's step needs the other shards, but runs by itself."""


_inside = False  # a shard's step, which runs by itself


@contextmanager
def by_itself() -> Iterator[None]:
    """Run shards of a batch by themselves: what needs the others raises NeedsMeetingError."""
    global _inside
    _inside = True
    try:
        yield
    finally:
        _inside = False


def normalise_whole_batches() -> Callable[[], None]:
    """Let SyncBatchNorm normalise over all shards of a batch; return what ends that."""
    usual = nn.SyncBatchNorm.forward

    def end() -> None:
        nn.SyncBatchNorm.forward = usual  # type: ignore[method-assign]

    nn.SyncBatchNorm.forward = normalised  # type: ignore[method-assign,assignment]
    return end


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all shards of the batch, in order, in `training_step`; gradients flow to each shard's rows.

    With it a contrastive loss (CLIP, SimCLR, SupCon, VICReg) compares the whole batch. The loss of each shard is then a
    loss of the whole batch, and their mean is minimised.

    Args:
        rows: shape (B, ...), of this call's samples.

    Returns:
        Shape (N, ...), of all samples of the batch on all devices. Outside of a training: `rows`.
    """
    if not runs_here():
        if _inside:
            raise NeedsMeetingError("labtrain.gather")
        return rows
    if rows.is_floating_point() and rows.requires_grad:
        return cast(Tensor, _Gather.apply(rows))  # type: ignore[no-untyped-call]
    whole, _ = cast(tuple[Tensor, int], meet(GATHER, FORWARD, rows.detach()))
    return whole.clone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        whole, start = cast(tuple[Tensor, int], meet(GATHER, FORWARD, rows.detach()))
        context.part = slice(start, start + len(rows))
        return whole.clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return cast(Tensor, meet(GATHER, BACK, gradient))[context.part]


class _Sum(torch.autograd.Function):
    """Sums a tensor over all shards; so does the backward."""

    @staticmethod
    def forward(context: Any, numbers: Tensor) -> Tensor:
        return cast(Tensor, meet(SUM, FORWARD, numbers.detach())).clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return cast(Tensor, meet(SUM, BACK, gradient)).clone()


def normalised(module: nn.SyncBatchNorm, inputs: Tensor) -> Tensor:
    """Normalise over the whole batch, in place of SyncBatchNorm.forward.

    Args:
        module: in training, its running statistics are updated.
        inputs: shape (B, C, ...), of a shard.
    """
    uses_batch = module.training or module.running_mean is None
    if not module.training or not runs_here():
        if module.training and _inside:
            raise NeedsMeetingError("SyncBatchNorm")
        means, variances = (None, None) if uses_batch else (module.running_mean, module.running_var)
        scale = module.weight, module.bias
        return nn.functional.batch_norm(inputs, means, variances, *scale, uses_batch, 0.0, module.eps)
    others = [0, *range(2, inputs.dim())]
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    count = values.new_full((1,), values.numel() / values.shape[1])
    sums = _Sum.apply(torch.cat([values.sum(others), count]))  # type: ignore[no-untyped-call]
    number = sums[-1].detach()
    shape = [1, -1] + [1] * (inputs.dim() - 2)
    centred = values - (sums[:-1] / number).view(shape)
    variance = _Sum.apply(centred.square().sum(others)) / number  # type: ignore[no-untyped-call]
    outputs = centred * (variance + module.eps).rsqrt().view(shape)
    if module.weight is not None:
        outputs = outputs * module.weight.view(shape) + module.bias.view(shape)
    _update(module, sums[:-1].detach() / number, variance.detach() * number / (number - 1).clamp(min=1))
    made: Tensor = outputs.to(inputs.dtype)
    return made


def _update(module: nn.SyncBatchNorm, mean: Tensor, variance: Tensor) -> None:
    if module.running_mean is None or module.running_var is None or module.num_batches_tracked is None:
        return
    module.num_batches_tracked.add_(1)
    momentum = module.momentum
    if momentum is None:  # a cumulative average
        momentum = 1.0 / float(module.num_batches_tracked)
    for running, now in ((module.running_mean, mean), (module.running_var, variance)):
        running.lerp_(now.to(running.dtype), momentum)
