"""Steps of several shards that advance together, as ranks of DDP would: manual optimization, SyncBatchNorm, `gather`.

Each shard runs to its next meeting point, where all shards of all ranks wait for each other:

- a layer or a call that needs the whole batch: `SyncBatchNorm` sums, `labtrain.gather` joins rows, and so do their
  backwards;
- with manual optimization, a backward: the shards' gradients are summed along the tree, and each shard sees the
  gradient of the whole batch; and a step of an optimizer or of a scheduler, or a method of the experiment's own
  optimizer: it runs once (calls.py).

Between two meeting points a shard has to itself what it changes: random numbers, buffers, attributes, metrics, logged
values, `requires_grad` and `.grad`. labtrain swaps these when another shard continues. With manual optimization, what
shards do to `.grad` after a backward, such as clipping, must be the same in each. All shards' activations are in memory
at once.

A rank without a shard of a small last batch takes part in the meetings.

Lightning 2.6: loops/optimization/manual.py and core/optimizer.py, through lightning.py.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import keep_draws, seed_place
from labtrain.exact.sparse_gradients import ABSENT, DENSE, SPARSE, SparseRows, sparse
from labtrain.exact.tree_sum import ShardSum, alone
from labtrain.training.lightning import put_toggled, toggled
from labtrain.training.sharded.calls import (
    RETURN,
    SCHEDULER,
    STEP,
    Again,
    Calls,
    Done,
    Function,
    Given,
    joined,
    mean,
    meeting_in,
)
from labtrain.training.sharded.lockstep import END, Meeting, Runner, here, meet, runs_here
from labtrain.training.sharded.whole import BACK, FORWARD, GATHER, SUM
from labtrain.training.state.changed_weights import Taken
from labtrain.training.state.step_changes import Watch

if TYPE_CHECKING:
    from labtrain.training.sharded.strategy import Exact, _Step

BACKWARD = "a backward"
Gradients = list[Tensor | None]


@dataclass(kw_only=True, slots=True)
class Shard:
    """One shard of this rank, with what it has to itself.

    Attributes:
        number: of all shards of the batch.
        samples: its samples.
        share: of the batch's samples.
        runner: of its step.
        enter: restores what it has to itself.
        meeting: where it waits.
        answer: to that.
        private: its gradients, in the middle of its backward.
        flags: whether each parameter requires a gradient, and what Lightning's toggle_optimizer keeps.
        weights: those that its step has changed since the shards last met.
    """

    number: int
    samples: int
    share: float
    runner: Runner
    enter: list[Callable[[], object]] = field(default_factory=list)
    meeting: Meeting = field(default_factory=lambda: Meeting(kind=END))
    answer: object = None
    private: Gradients | None = None
    flags: tuple[list[bool], dict[str, bool]] = ([], {})
    weights: Taken = field(default_factory=Taken)


class Together:
    """Runs one step of a model, all shards together.

    Args:
        strategy: of the training.
        trainer: of the training.
        device: of this rank.
        rank: this process.
        world: the number of processes.
        step: of this rank.
        run: the model's step, of the shard at a place.
        optimizers: all of them, by name, with manual optimization; otherwise None, and `run` has a backward too, whose
            gradients stay the shard's.
        watch: of the weights that the step changes.
    """

    def __init__(
        self,
        strategy: "Exact",
        trainer: pl.Trainer,
        *,
        device: torch.device,
        rank: int,
        world: int,
        step: "_Step",
        run: Callable[[int], object],
        optimizers: dict[str, torch.optim.Optimizer] | None,
        watch: Watch | None,
    ) -> None:
        self.strategy, self.trainer, self.step, self.watch = strategy, trainer, step, watch
        self.device, self.rank, self.world = device, rank, world
        self.optimizers, self.manual = optimizers, optimizers is not None
        self.calls: Calls = {}
        self.between = ExitStack()  # open while code runs once for all shards
        self.module = trainer.lightning_module
        self.parameters = list(self.module.parameters())
        self.gradients: Gradients = [parameter.grad for parameter in self.parameters]
        nothing: Gradients = [None] * len(self.parameters)
        self.flags = self._flags()
        self.meetings = 0
        self.changes: list[tuple[int, int]] = []  # of each shard: of weights, since the last meeting
        self.differs = ""  # the name of a parameter whose .grad differs between shards
        whole = step.batch.samples
        self.shards = [
            Shard(
                number=number,
                samples=samples,
                share=samples / whole,
                runner=Runner(partial(run, place)),
                private=None if self.manual else nothing,
                flags=self.flags,
            )
            for place, (number, samples, _) in enumerate(step.batch.parts)
        ]

    def run(self) -> Iterator[tuple[Shard, object, bool]]:
        """Run all shards to their end; yield each with the output of its step, in the state that it has left.

        And whether it is the last of this rank.
        """
        try:
            with ExitStack() as stack:
                if self.optimizers is not None:
                    stack.enter_context(_backward_meets(self.module))
                    tell = self.strategy.tell_counted
                    self.calls = stack.enter_context(meeting_in(self.trainer, self.optimizers, tell))
                self._end(self._run_until(END))
        finally:
            for shard in self.shards:
                shard.runner.close()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        for shard in self.shards:
            for parameter, gradient in zip(self.parameters, shard.private or (), strict=self.manual is False):
                parameter.grad = gradient
            self._put_own(shard)
            yield shard, shard.runner.result, shard is self.shards[-1]

    def _run_until(self, kind: str) -> Meeting:
        """Run all shards, with what they do at meetings, until they meet at a place of this kind."""
        while (meeting := self._advance()).kind != kind:
            self._exchange(meeting) if meeting.kind in (GATHER, SUM) else self._hold(meeting)
        return meeting

    # ------------------------------------------------------------------------------------------------- between meetings

    def _advance(self) -> Meeting:
        """Run each shard to its next meeting point, and return where all of them meet."""
        several = self.manual and len(self.shards) > 1
        kept = _cloned(self.gradients) if several else self.gradients
        after: Gradients | None = None
        for shard in self.shards:
            if shard.private is not None:
                self._enter(shard, shard.private)
            else:  # the shards before may have changed theirs in place
                self._enter(shard, self.gradients if after is None else _cloned(kept))
            with alone():
                shard.meeting = shard.runner.resume(shard.answer)
            now = self._leave(shard)
            if not self.manual:
                after = self.gradients
            elif after is None:
                after = now
            else:
                self._compare(after, now)
        meeting = self._agreed()
        if self.manual and meeting.kind not in (GATHER, SUM):
            self.gradients = self._of_rank_0(after, kept)
        return meeting

    def _enter(self, shard: Shard, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._put_flags(*shard.flags)
        self._put_own(shard)

    def _put_own(self, shard: Shard) -> None:
        for restore in shard.enter:
            restore()
        if self.watch is not None:
            self.watch.put_weights(shard.weights)

    def _leave(self, shard: Shard) -> Gradients:
        """Put aside what the shard has to itself; return its gradients, those outside of a backward that it is in."""
        draws = keep_draws()
        shard.enter = [draws, *(self.strategy.swap_out() if self.manual or len(self.shards) > 1 else ())]
        if self.watch is not None and (self.manual or len(self.shards) > 1):
            shard.weights = self.watch.take_weights()
        shard.flags = self._flags()
        self._put_flags(*self.flags)
        found: Gradients = [parameter.grad for parameter in self.parameters]
        outside = cast(Gradients | None, shard.runner.outside)
        shard.private = found if outside is not None or not self.manual else None
        return found if outside is None else outside

    def _compare(self, first: Gradients, other: Gradients) -> None:
        """Note a parameter whose gradient a shard changed in a way of its own."""
        for parameter, one, two in zip(self.parameters, first, other, strict=True):
            if not _is_same(one, two):
                name = next(name for name, each in self.module.named_parameters() if each is parameter)
                self.differs = self.differs or name

    def _of_rank_0(self, gradients: Gradients | None, kept: Gradients) -> Gradients:
        """Return the gradients on every rank: one without a shard has not run the code that changed them."""
        if all(self.step.ranges):
            return cast(Gradients, gradients)
        mine = gradients if gradients is not None else kept
        whole = [None if each is None else each.cpu() for each in mine]
        sent: list[Any] = [whole if self.rank == 0 else None]
        dist.broadcast_object_list(sent, src=0)
        if self.shards:
            return mine
        device = self.device
        return [None if each is None else each.to(device) for each in sent[0]]

    # --------------------------------------------------------------------------------------------------------- meetings

    def _agreed(self) -> Meeting:
        """Return the meeting of all shards of all ranks."""
        mine = [
            (shard.number, shard.meeting.kind, shard.meeting.key, self._announced(shard), shard.weights.changes)
            for shard in self.shards
        ]
        ranks = [mine]
        if self.world > 1:
            ranks = [[]] * self.world
            dist.all_gather_object(ranks, mine)
        everything = [each for of_rank in ranks for each in of_rank]
        places = {(kind, key): shard for shard, kind, key, *_ in everything}
        if len(places) > 1:
            one, two, *_ = (f"shard {shard} at {_described(*place)}" for place, shard in places.items())
            raise ConfigError(
                f"the shards of a step meet at different places: {one}, {two}",
                hint="call backward, optimizer.step and scheduler.step equally often for all samples, or"
                " determinism.shards=1",
            )
        ((kind, key),) = places
        self.changes = [changes for *_, changes in everything]
        return Meeting(kind=kind, key=key, payload=[payload for *_, payload, _ in everything])

    def _announced(self, shard: Shard) -> object:
        """Return what other ranks need to know of a shard's meeting."""
        if shard.meeting.kind == BACKWARD:
            return [_kind(each) for each in cast(Gradients, shard.meeting.payload)]
        if shard.meeting.kind == END:
            return shard.flags[0], self.differs
        if shard.meeting.kind in (GATHER, SUM):
            brought = cast(Tensor, shard.meeting.payload)
            return tuple(brought.shape), brought.dtype
        return shard.share, shard.meeting.payload

    def _flags(self) -> tuple[list[bool], dict[str, bool]]:
        return [parameter.requires_grad for parameter in self.parameters], toggled(self.module)

    def _put_flags(self, flags: list[bool], toggled: dict[str, bool]) -> None:
        for parameter, flag in zip(self.parameters, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
        put_toggled(self.module, toggled)

    def _end(self, meeting: Meeting) -> None:
        """Give every rank what the last shard has left of `requires_grad`."""
        left = cast(list[tuple[list[bool], str]], meeting.payload)
        if left[-1][0] != self.flags[0]:
            with self.strategy.between_shards():
                self._put_flags(left[-1][0], {})
        if differs := next((name for _, name in left if name), ""):
            raise ConfigError(
                f"training_step changes the gradient of {differs} after its backward, and not equally in all shards",
                hint="change gradients by what is the same for all samples; shards draw different random numbers,"
                " unless from a generator of the step's own, such as random.Random(batch_idx); or determinism.shards=1",
            )

    def _hold(self, meeting: Meeting) -> None:
        self._begin_whole()
        answer: object = None
        if meeting.kind == BACKWARD:
            self._add(cast(list[list[float]], meeting.payload))
        else:
            outer, self.between = self.between, ExitStack()
            with self.between:
                self.between.enter_context(self.strategy.between_shards())
                answer = Done(self._once(meeting))
            self.between = outer
        self._end_whole(answer)

    def _begin_whole(self) -> None:
        """Put gradients and weights as all shards have left them; hooks draw the same on every rank."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.meetings += 1
        seed_place("meeting", self.step.epoch, self.step.index, self.meetings)
        self._adopt_weights()

    def _end_whole(self, answer: object) -> None:
        """Let all shards continue from the gradients as they are now."""
        for shard in self.shards:
            shard.answer = answer
        self.gradients = [parameter.grad for parameter in self.parameters]

    def _adopt_weights(self) -> None:
        """Let all shards continue with the weights that each has changed, such as clamped ones."""
        if self.watch is None or not any(checksum for _, checksum in self.changes):
            return
        if len(set(self.changes)) > 1:
            name = self.watch.names[max(self.changes)[0] - 1]
            raise ConfigError(
                f"training_step changes {name}, and not equally in all shards",
                hint="change it by what is the same for all samples, or in on_train_batch_end; or determinism.shards=1",
            )
        self.watch.adopt_weights(self.shards[0].weights if self.shards else None, ranges=self.step.ranges)
        for shard in self.shards:
            shard.weights = Taken()

    def _exchange(self, meeting: Meeting) -> None:
        """Answer each shard with the rows of all shards, or with the sum over them."""
        brought = {shard.number: cast(Tensor, shard.meeting.payload) for shard in self.shards}
        like = cast(list[tuple[tuple[int, ...], torch.dtype]], meeting.payload)
        if meeting.kind == GATHER and meeting.key == FORWARD:
            parts = []
            for rank, numbers in enumerate(self.step.ranges):
                for number in numbers:
                    shape, dtype = like[number]
                    own = brought[number] if rank == self.rank else torch.empty(shape, dtype=dtype, device=self.device)
                    parts.append(own.contiguous())
                    if self.world > 1:
                        dist.broadcast(parts[-1], src=rank)
            whole, starts = torch.cat(parts), [0, *itertools.accumulate(map(len, parts))]
            for shard in self.shards:
                shard.answer = whole, starts[shard.number]
            return
        shape, dtype = like[0]
        total = ShardSum([torch.empty(shape, dtype=dtype, device=self.device)], rank=self.rank, world=self.world)
        total.begin(self.step.ranges)
        # A gradient of manual optimization is multiplied by its shard's share after the backward.
        weighs = self.manual and meeting.key == BACK
        for shard in self.shards:
            total.push(shard.number, 0, brought[shard.number].clone().mul_(shard.share if weighs else 1))
        total.send()
        (whole,) = total.total()
        for shard in self.shards:
            shard.answer = whole / shard.share if weighs else whole

    def _add(self, kinds_SP: list[list[float]]) -> None:
        """Add the gradient of the whole batch to each parameter that has one in some shard."""
        wanted = [index for index, column in enumerate(zip(*kinds_SP, strict=True)) if any(column)]
        rows = SparseRows()
        total = self.strategy.sum_of(tuple(wanted), [self.parameters[index] for index in wanted])
        total.begin(self.step.ranges)
        for shard in self.shards:
            mine = cast(Gradients, shard.meeting.payload)
            for place, index in enumerate(wanted):
                gradient = mine[index]
                if gradient is None:
                    gradient = torch.zeros_like(self.parameters[index])
                total.push(shard.number, place, rows.dense(index, gradient).mul_(shard.share))
            shard.meeting = Meeting(kind=END)  # its gradients' memory holds the sum
        total.send()
        some = rows.of_all(kinds_SP, self.parameters, self.world)
        for index, gradient in zip(wanted, total.total(), strict=True):
            if index in some:
                gradient = sparse(gradient, some[index])
            before = self.parameters[index].grad
            self.parameters[index].grad = gradient if before is None else before + gradient

    def _once(self, meeting: Meeting) -> object:
        """Do on this rank what all shards ask for, and return what they get."""
        shares_given = cast(list[tuple[float, Given]], meeting.payload)
        given = joined(shares_given, meeting.kind, self.device)
        functions = {
            each.number: partial(self._in_shards, each.number)
            for each in (*given.arguments, *given.options.values())
            if isinstance(each, Function)
        }

        def real(value: object) -> object:
            return functions[value.number] if isinstance(value, Function) else value

        call = self.calls[meeting.kind, meeting.key]
        return call(*map(real, given.arguments), **{name: real(value) for name, value in given.options.items()})

    def _in_shards(self, number: int, *_: object) -> object:
        """Run a function that each shard gave to a call, such as a closure; return the mean of what they return."""
        self.between.close()
        self._end_whole(Again(number, torch.is_grad_enabled()))
        with torch.enable_grad():
            meeting = self._run_until(RETURN)
        self._begin_whole()
        self.between.enter_context(self.strategy.between_shards())
        shares, values = zip(*cast(list[tuple[float, object]], meeting.payload), strict=True)
        return mean(shares, values, RETURN, self.device)


@contextmanager
def _backward_meets(module: torch.nn.Module) -> Iterator[None]:
    """Let backward meet in a shard's thread."""
    backward = torch.autograd.backward
    torch.autograd.backward = partial(_backward, backward, list(module.parameters()))
    try:
        yield
    finally:
        torch.autograd.backward = backward


def _backward(
    usual: Callable[..., None],
    parameters: list[torch.nn.Parameter],
    tensors: Any,
    *arguments: Any,
    **options: Any,
) -> None:
    """Compute the gradients of one shard, then wait for the others; a backward inside of one is its part."""
    if not runs_here() or here().outside is not None:
        return usual(tensors, *arguments, **options)
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    here().outside = before
    try:
        usual(tensors, *arguments, **options)
    finally:
        here().outside = None
    found = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    meet(BACKWARD, payload=found)
    return None


def _cloned(gradients: Gradients) -> Gradients:
    return [None if each is None else each.clone() for each in gradients]


def _kind(gradient: Tensor | None) -> float:
    if gradient is None:
        return ABSENT
    return DENSE if gradient.layout == torch.strided else SPARSE


def _is_same(one: Tensor | None, two: Tensor | None) -> bool:
    """Return whether two gradients are equal; NaN, of an overflow in fp16, equals NaN."""
    if one is None or two is None:
        return one is two
    if one.is_sparse and two.is_sparse:
        one, two = one.coalesce(), two.coalesce()
        return torch.equal(one.indices(), two.indices()) and _is_same(one.values(), two.values())
    return torch.equal(one, two) or bool(((one == two) | (one.isnan() & two.isnan())).all())


def _described(kind: str, key: int) -> str:
    if kind == END:
        return "its end"
    return f"{kind} of number {key}" if kind in (STEP, SCHEDULER) else kind
