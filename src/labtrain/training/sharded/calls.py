"""Calls that run once for all shards of a step: steps of optimizers and schedulers, and methods of people's optimizers.

A shard that calls one waits until all shards do. Then it runs once, on each rank, between the shards: what it changes
of weights, gradients and its own state is changed once. A function among its arguments, such as a closure, runs in each
shard, up to its end, as often as it is called. What shards give as numbers is averaged over the samples.
"""

import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from labtrain.base.errors import ConfigError
from labtrain.exact.plain_values import SCALARS
from labtrain.training.lightning import counted_step, lightning_optimizers
from labtrain.training.sharded.lockstep import here, meet, runs_here
from labtrain.training.state.optimizers import own_methods

STEP, SCHEDULER, RETURN = "optimizer.step", "scheduler.step", "the end of a closure"
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)

Place = tuple[str, int]  # a kind of meeting, and which of that kind
Calls = dict[Place, Callable[..., object]]


@dataclass(frozen=True, slots=True)
class Function:
    """Stands for a function among the arguments of a call.

    Attributes:
        number: of the call's functions.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Again:
    """Asks a shard to run a function that it gave to a call, before the call goes on.

    Attributes:
        number: of the function.
        grad: whether autograd records it.
    """

    number: int
    grad: bool


@dataclass(frozen=True, slots=True)
class Done:
    """What a call has returned."""

    value: object


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of a call, as a shard announces them: numbers, texts, tensors of one element and `Function`."""

    arguments: list[object]
    options: dict[str, object]


def joined(given: Sequence[tuple[float, Given]], kind: str, device: torch.device) -> Given:
    """Return the arguments of all shards as one, each with the shard's share of the batch's samples."""
    shares, (first, *_) = [share for share, _ in given], [each for _, each in given]
    names = {(len(each.arguments), *each.options) for _, each in given}
    if len(names) > 1:
        raise _unlike(kind)
    columns = zip(*([*each.arguments, *each.options.values()] for _, each in given), strict=True)
    values = [mean(shares, column, kind, device) for column in columns]
    count = len(first.arguments)
    return Given(values[:count], dict(zip(first.options, values[count:], strict=True)))


def mean(shares: Sequence[float], values: Sequence[object], kind: str, device: torch.device) -> object:
    """Return a value that all shards have, or else the mean of their numbers.

    Raises:
        ConfigError: they differ, and are not numbers.
    """
    first = values[0]
    if isinstance(first, Tensor) and all(isinstance(each, Tensor) and each.numel() == 1 for each in values):
        total = math.fsum(share * float(value) for share, value in zip(shares, cast(list[Tensor], values), strict=True))
        same = all(torch.equal(each, first) for each in cast(list[Tensor], values))
        return (first if same else torch.full_like(first, total)).to(device)
    if all(type(each) is type(first) and each == first for each in values):
        return first
    if all(type(each) is float for each in values):
        return math.fsum(share * value for share, value in zip(shares, cast(list[float], values), strict=True))
    raise _unlike(kind)


def _unlike(kind: str) -> ConfigError:
    return ConfigError(
        f"the shards of a step give {kind} different values, which are not numbers: it runs once for all of them",
        hint="give it what is the same for all samples, or determinism.shards=1",
    )


@contextmanager
def meeting_in(
    trainer: pl.Trainer, optimizers: dict[str, torch.optim.Optimizer], tell: Callable[[str], None]
) -> Iterator[Calls]:
    """Let steps of optimizers and schedulers, and methods of people's optimizers, meet in a shard's thread.

    Args:
        trainer: of the training.
        optimizers: all of them, by name.
        tell: called with the name of one whose step only labtrain counts.

    Returns:
        what each call does by itself.
    """
    calls: Calls = {}
    with counting(trainer, optimizers, tell), ExitStack() as stack:
        for name, method, key, owner in _places(trainer, optimizers):
            usual = getattr(owner, method)
            calls[name, key] = usual
            _put(stack, owner, method, partial(_once, name, key, usual))
        for key, config in enumerate(trainer.lr_scheduler_configs):
            usual = config.scheduler.step
            calls[SCHEDULER, key] = usual
            _put(stack, config.scheduler, "step", partial(_schedule, key, usual))
        yield calls


def _places(trainer: pl.Trainer, optimizers: dict[str, Any]) -> Iterator[tuple[str, str, int, Any]]:
    """Yield the name and number of each meeting, with the method and the optimizer."""
    wrappers = lightning_optimizers(trainer.strategy)
    for key, wrapper in enumerate(wrappers):
        yield STEP, "step", key, wrapper
        name = type(wrapper.optimizer).__name__
        yield from ((f"{name}.{method}", method, key, wrapper) for method in own_methods(wrapper.optimizer))
    for name, optimizer in optimizers.items():
        for method in ("step", *own_methods(optimizer)):
            yield f"{name}.{method}, called directly", method, 0, optimizer


def _put(stack: ExitStack, owner: object, method: str, replaced: Callable[..., object]) -> None:
    """Replace a method of an object; schedulers mark that of their optimizer."""
    stack.callback(_put_back, owner, method, vars(owner).get(method))
    vars(owner)[method] = update_wrapper(cast(Any, replaced), getattr(owner, method))


def _put_back(owner: object, method: str, before: object) -> None:
    del vars(owner)[method]
    if before is not None:
        vars(owner)[method] = before


def _once(kind: str, key: int, usual: Callable[..., object], *arguments: object, **options: object) -> object:
    """Call a method of an optimizer: once for all shards, unless an argument is of this shard only."""
    if not runs_here():
        return usual(*arguments, **options)
    if here().outside is not None:
        raise ConfigError(
            f"training_step calls {kind} in a backward, when each shard has the gradient of its own samples only",
            hint="call it after the backward, or determinism.shards=1",
        )
    functions: list[Callable[[], object]] = []
    given = Given([_announced(each, functions) for each in arguments],
                  {name: _announced(each, functions) for name, each in options.items()})  # fmt: skip
    if any(each is NotImplemented for each in (*given.arguments, *given.options.values())):
        return usual(*arguments, **options)
    answer = meet(kind, key, given)
    while isinstance(answer, Again):
        with torch.set_grad_enabled(answer.grad):
            left = _announced(value := functions[answer.number](), [])
        if left is NotImplemented:
            raise ConfigError(
                f"the closure of {kind} returns a value of type {type(value).__name__}",
                hint="return the loss, or nothing",
            )
        answer = meet(RETURN, key, left)
    return cast(Done, answer).value


def _announced(value: object, functions: list[Callable[[], object]]) -> object:
    """Return an argument as ranks can send it; NotImplemented for one that belongs to a shard's own samples."""
    if isinstance(value, CODE):
        functions.append(value)
        return Function(len(functions) - 1)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().cpu()
    return value if type(value) in SCALARS else NotImplemented


def _schedule(key: int, usual: Callable[..., object], *arguments: Any, **options: object) -> object:
    """Step a scheduler: once for all shards."""
    if not runs_here():
        return usual(*arguments, **options)
    given = Given([float(each) for each in (*arguments, *options.values())], {})
    return cast(Done, meet(SCHEDULER, key, given)).value


@contextmanager
def counting(
    trainer: pl.Trainer, optimizers: dict[str, torch.optim.Optimizer], tell: Callable[[str], None]
) -> Iterator[None]:
    """Count a step of an optimizer that no step of what `self.optimizers()` returns contains.

    Lightning does not: the step of SAM's base_optimizer, in a method of SAM, would leave `global_step` as it was.
    """
    inside: list[str] = []  # the optimizers whose step runs
    owners: list[tuple[str, Any]] = [("", each) for each in lightning_optimizers(trainer.strategy)]
    with ExitStack() as stack:
        for name, owner in [*owners, *optimizers.items()]:
            usual = vars(owner).get("step") or owner.step
            _put(stack, owner, "step", partial(_counted, trainer, inside, tell, name, usual))
        yield


def _counted(
    trainer: pl.Trainer,
    inside: list[str],
    tell: Callable[[str], None],
    name: str,
    usual: Callable[..., object],
    *arguments: object,
    **options: object,
) -> object:
    if runs_here():
        return usual(*arguments, **options)
    uncounted = bool(name) and not inside
    if uncounted:
        tell(name)
    with counted_step(trainer) if uncounted else nullcontext():
        inside.append(name)
        try:
            return usual(*arguments, **options)
        finally:
            inside.pop()
