"""Watches what a step changes beside gradients: parameters, and the plain attributes of the model.

With shards a step calls `training_step` several times, on any number of ranks. A plain attribute, such as a counter,
starts from the same value in each shard, so equal changes count once. After the step every rank holds the value from
the last shard. Lists may grow. Parameters too start from the same values (changed_weights.py): labtrain refuses a
change that differs between shards, and one of a parameter that it has no copy of. buffers.py handles buffers.

Each step checks the versions and addresses of all parameters, and a checksum of their memory, since a write through
`.data` or numpy raises no version. The checksum covers all memory in a process's first step, and a moving window later.
"""

import itertools
import operator
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from labtrain.base.console import full_name
from labtrain.base.contracts import State
from labtrain.exact.attributes import PRIVATE, fingerprint, hidden_weights, holders, own_objects
from labtrain.exact.checksums import device_hash
from labtrain.exact.plain_values import DICTS, LEAVES, SCALARS, Decoder, Encoder, Place, is_experiments
from labtrain.training.state.changed_weights import ChangedWeights, Taken
from labtrain.training.state.counters import Counters, Kinds
from labtrain.training.state.optimizers import held_values

WINDOW_BYTES = 3 << 15  # of the weights, in each step
PIECE_BYTES = 1 << 14
EVERY_STEPS = 100  # how often to take a checksum of weights on a GPU, and to check rarely changed attributes
FINDINGS = 5  # how many numbers tell what a shard has changed, before those of its counters
FEW = 64  # items of a list that are compared one by one
MUTABLE = {Tensor, np.ndarray, list, tuple, set, deque, *DICTS}
COUNTED = (Tensor, list)
SAME, GROWN, CHANGED = range(3)
ABSENT = "attribute that is absent"  # a text, so that ranks can send it

Judge = Callable[[str, str], None]  # what was found, and a hint: raises, says, or does nothing
Key = tuple[str, str]  # the path of a holder, the name of its attribute


def let_pass(*_: str) -> None:
    """Ignore findings, in trials such as a search for the batch size."""


class Watch:
    """Watches the steps of one training.

    Args:
        module: the model.
        optimizers: returns those of the training.
        schedulers: of the training; those that are attributes of the model are found.
        device: of the training.
        rank: this process.
        world: the number of processes.
        judge: called with what cannot be exact.
        say: called with each warning.
        kinds: of numbers that steps add to, by stage.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizers: Callable[[], Sequence[torch.optim.Optimizer]] = list,
        schedulers: Sequence[object] = (),
        device: torch.device,
        rank: int,
        world: int,
        judge: Judge,
        say: Callable[[str], None],
        kinds: dict[str, Kinds] | None = None,
    ) -> None:
        self.device, self.rank, self.world, self.judge, self.say = device, rank, world, judge, say
        self._weights = Weights(module)
        self._rates = Rates(module, optimizers, schedulers)
        self._kept = ChangedWeights(device, rank=rank, world=world)
        self._attributes = Attributes(module)
        self.counters = Counters(module, device, {} if kinds is None else kinds)
        self._left: dict[Key, object] = {}  # what this rank's last shard changed
        self._unknown: set[str] = set()  # names of attributes with values that are not plain
        self._prints: dict[int, dict[str, str | None]] = {}  # by shard: a checksum of each attribute that it changed
        self._said: set[float] = set()  # numbers of sets of names
        self._named: set[str] = set()
        self._told: list[Callable[[nn.Module], None]] = []  # in a step, what is told of attributes that are set
        self._setattr: Any = None
        self.numbers: list[list[float]] = []  # of this rank's shards
        self._changed = 0  # a parameter or an option that was changed earlier in this step

    @property
    def names(self) -> list[str]:
        """Those of the weights."""
        return self._weights.names

    @property
    def schedulers(self) -> list[object]:
        """The training's, and those that are attributes of the model."""
        return self._rates.schedulers

    def listen(self) -> None:
        """Observe where code sets an attribute of a module, until `close`: steps do not check every module."""
        told, self._setattr = self._told, nn.Module.__setattr__

        def __setattr__(self: nn.Module, name: str, value: object, *, usual: Any = self._setattr) -> None:  # noqa: N807
            for each in told:
                each(self)
            usual(self, name, value)

        nn.Module.__setattr__ = __setattr__  # type: ignore[method-assign]
        # Lightning sets the name of each hook: the model itself is looked at in each step, and need not pay for it.
        pl.LightningModule.__setattr__ = self._setattr  # type: ignore[method-assign]

    def close(self) -> None:
        """End what `listen` began."""
        if self._setattr is not None:
            nn.Module.__setattr__, self._setattr = self._setattr, None  # type: ignore[method-assign]
            del pl.LightningModule.__setattr__

    def begin(self) -> None:
        """Begin a step."""
        self._left, self._prints, self.numbers, self._changed = {}, {}, [], 0
        self._weights.begin()
        looks_again = self._attributes.begin()
        self._rates.begin(looks_again=looks_again)
        self._kept.begin(self._weights.parameters, self._rates.weights())
        self.counters.begin("train")
        self._told[:] = [self._attributes.written]

    @property
    def width(self) -> int:
        """How many numbers `leave` returns."""
        return FINDINGS + self.counters.width

    def grown(self) -> set[str]:
        """Return the dotted names of the attributes with lists that a step has appended to."""
        return self._attributes.grown()

    def know_grown(self, names: set[str]) -> None:
        """Add names to those that `grown` returns."""
        self._attributes.know_grown(names)

    def restore(self) -> None:
        """Begin another shard of the step."""
        self._kept.restore()
        if self._left:
            self._attributes.restore(self._left)

    def take_weights(self) -> Taken:
        """Restore the weights from the start of the step, or from where shards last met; return the current ones."""
        return self._kept.take()

    def put_weights(self, taken: Taken) -> None:
        """Put a shard's weights back."""
        self._kept.put(taken)

    def adopt_weights(self, taken: Taken | None, *, ranges: list[range]) -> None:
        """Let all shards continue with the weights of one, which are those of every shard; called on every rank.

        Args:
            taken: of the first shard of this rank.
            ranges: the shards of each rank.
        """
        if taken is not None:
            self._kept.put(taken)
        if not all(ranges):
            self._kept.share(source=0)
        self._kept.rebase()

    def restore_all(self) -> None:
        """Undo what a shard has done, in the middle of its step."""
        self._kept.restore()
        self._attributes.take()

    def take(self) -> Callable[[], None]:
        """Restore the attributes from the start of the step; return what puts the current ones back."""
        return self._attributes.take()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let a block change weights, attributes and options of optimizers, in the middle of a step."""
        self._changed = self._changed or self._weights.changed(self._kept.kept) or -self._rates.changed()
        yield
        self._weights.begin()
        self._rates.begin()
        self._kept.rebase()
        self._attributes.rebase()
        self.counters.rebase()

    def leave(self, shard: int, samples: int, *, last: bool) -> list[float]:
        """Find what a shard changed.

        Args:
            shard: its number.
            samples: of the shard.
            last: of this rank, in this step: only then check the parameters.

        Returns:
            Numbers. First: 0.0, or the number of the first changed parameter that is not kept, from 1, or below 0
            that of an option of the optimizers or a scheduler. Second: 0.0, or a checksum of the changed attributes'
            names. Third: a checksum of their values. Fourth: 0.0, or the number of the first changed parameter that is
            kept. Fifth: a checksum of those. Then those of `Counters.take`.
        """
        counted = self.counters.take(samples)
        self._left = self._attributes.changes()
        if last:
            self._told.clear()
        changed = self._changed if last else 0
        if last and not changed:
            changed = self._weights.changed(self._kept.kept) or -self._rates.changed()
        weights = map(float, self._kept.left().changes)
        self.numbers.append([*self._numbers(shard, float(changed)), *weights, *counted])
        return self.numbers[-1]

    def _numbers(self, shard: int, parameter: float) -> list[float]:
        if not self._left:
            return [parameter, 0.0, 0.0]
        prints = {".".join(filter(None, key)): fingerprint(value) for key, value in self._left.items()}
        for (name, found), value in zip(prints.items(), self._left.values(), strict=True):
            if found is None and name not in self._unknown:
                self._unknown.add(name)
                self.say(
                    f"training_step sets {name} to a {full_name(type(value))}: labtrain can"
                    " neither compare nor keep it; after a step each rank has the value of its own last shard"
                )
        self._prints[shard] = prints
        return [
            parameter,
            *(1.0 + zlib.crc32(repr(part).encode()) for part in (sorted(prints), sorted(prints.items()))),
        ]

    def end(self, numbers_SN: list[list[float]], ranges: list[range]) -> None:
        """End the step: judge what was changed, and give every rank the values from the last shard.

        Args:
            numbers_SN: what `leave` returned for each shard.
            ranges: the shards of each rank.

        Raises:
            ConfigError: in strict mode, a parameter was changed, and not equally in all shards.
        """
        self._judge([row[:FINDINGS] for row in numbers_SN], ranges)
        self.counters.end([row[FINDINGS:] for row in numbers_SN])

    def _judge(self, numbers_S5: list[list[float]], ranges: list[range]) -> None:
        parameters, names, values, kept, contents = zip(*numbers_S5, strict=True)
        if len(set(contents)) > 1:
            parameters = (next(filter(None, kept)),)
        if any(parameters):
            number = int(next(filter(None, parameters)))
            if number > 0:
                what, then = (
                    f"changes {self._weights.names[number - 1]}",
                    "so ranks would end with different weights",
                )
                hint = "change it in on_train_batch_end, which runs once a step, or determinism.shards=1"
            else:
                what, then = self._rates.names()[-number - 1], "so a rank would do it as often as it has shards"
                hint = "do it in on_train_batch_end, which runs once a step, or determinism.shards=1"
            self.judge(
                f"training_step {what}: with determinism.shards={len(numbers_S5)} it runs once a shard, {then}",
                hint,
            )
        if self.world > 1 and any(contents) and (len(set(contents)) > 1 or not all(ranges)):
            self._kept.share(source=max(rank for rank, shards in enumerate(ranges) if shards))
        if not any(names):
            return
        differs = len(set(values)) > 1 or len(set(names)) > 1
        if self.world > 1 and (differs or not all(ranges)):
            self._take(ranges)
        if differs and not set(names) <= self._said:
            self._said |= set(names)
            found = [(self._prints, self.grown())]
            if self.world > 1:
                found = [({}, set())] * self.world
                dist.all_gather_object(found, (self._prints, self.grown()))
            prints = {shard: each for of_rank, _ in found for shard, each in of_rank.items()}
            self._tell(prints, set().union(*(grown for _, grown in found)), len(numbers_S5))

    def _take(self, ranges: list[range]) -> None:
        """Take the values of the last shard from its rank: one object there is one object here."""
        source = max(rank for rank, shards in enumerate(ranges) if shards)
        sent: list[Any] = [None]
        if self.rank == source:
            encode = Encoder({id(value): place for place, value in reversed([*self._attributes.objects()])})
            known = [key for key, value in self._left.items() if fingerprint(value) is not None]
            sent = [(list(self._left), [(key, _on_cpu(encode(self._left[key]))) for key in known])]
        dist.broadcast_object_list(sent, src=source)
        if self.rank != source:
            changed, nodes = sent[0]
            unknown = set(changed) - {key for key, _ in nodes}
            self._attributes.restore(self._left.keys() - unknown)
            self._attributes.put(nodes, self.device)

    def _tell(self, prints: dict[int, dict[str, str | None]], grown: set[str], shards: int) -> None:
        everything = {name for found in prints.values() for name in found}
        unlike = sorted(
            name
            for name in everything - self._named
            if len({prints.get(shard, {}).get(name) for shard in range(shards)}) > 1
        )
        self._named |= set(unlike)
        if mixed := sorted(grown.intersection(unlike)):
            self.judge(
                f"training_step changes items of {mixed[0]}, to which it has also appended: each device has those of"
                " its shards, so the result depends on the number of devices",
                "append to it and change it in on_train_batch_end, which runs once a step; or determinism.shards=1",
            )
        if unlike:
            one = len(unlike) == 1
            self.say(
                f"training_step sets {', '.join(unlike)}, and {'its value differs' if one else 'their values differ'}"
                f" between the {shards} shards of a step: the last one remains (use determinism.shards=1)"
            )


class Weights:
    """Tells whether a shard's step changed a parameter: its memory, its address, or requires_grad."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names: list[str] = []
        self.parameters: list[Tensor] = []
        self._tables: list[State] = []  # each module's own parameters and submodules
        self._members: list[object] = []
        self._state: list[list[int]] = []
        self._memory: Memory | None = None
        self._sums: list[int] = []
        self._step, self._checked = 0, False  # a step may be checked several times

    def begin(self) -> None:
        """Remember how the parameters are now."""
        if self._checked:
            self._step, self._checked = self._step + 1, False
        if self._step % EVERY_STEPS == 0 or self._has_other_members():
            named = dict(self.module.named_parameters()) | hidden_weights(self.module)
            self.names, self.parameters = [*named, "a new parameter"], list(named.values())
            parts = list(self.module.modules())
            self._tables = [table for part in parts for table in (part._parameters, part._modules) if table]
            self._members = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        state = self._now()
        if self._memory is None or state[1] != self._memory.addresses:
            self._memory, self._step = Memory(self.parameters, state[1]), 0
        self._state = state
        self._sums = self._memory.checksums(self._step)

    def changed(self, kept: set[int]) -> int:
        """Return 0, or the number of the first parameter that was changed since `begin`, from 1.

        Args:
            kept: numbers of parameters whose content does not matter here.
        """
        assert self._memory is not None
        if self._has_other_members():
            named = dict(self.module.named_parameters()) | hidden_weights(self.module)
            same = [named.get(name) is then for name, then in zip(self.names, self.parameters, strict=False)]
            return 1 + [*same, False].index(False) if len(named) != len(same) or not all(same) else 0
        *contents, flags = zip(self._state, self._now(), strict=True)
        for free, (then, each) in [*((kept, pair) for pair in contents), (set[int](), flags)]:
            if then != each:
                unlike = [number for number, same in enumerate(map(operator.eq, then, each)) if not same]
                if found := [number for number in unlike if number not in free]:
                    return 1 + found[0]
        sums, self._checked = self._memory.checksums(self._step), True
        return 0 if sums == self._sums else 1 + self._memory.first_unlike(self._step, self._sums, sums, kept)

    def _now(self) -> list[list[int]]:
        """Return versions, addresses and whether a gradient is computed."""
        parameters = self.parameters
        return [
            [parameter._version for parameter in parameters],
            [parameter.data_ptr() for parameter in parameters],
            [parameter.requires_grad for parameter in parameters],
        ]

    def _has_other_members(self) -> bool:
        """Return whether a module has other parameters or submodules than it had."""
        members = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        return len(members) != len(self._members) or not all(map(is_, members, self._members))


class Noted:
    """Values as they were noted: the objects, and how often tensors and lists had been changed in place."""

    def __init__(self, values: list[object]) -> None:
        self.values = values
        self.counts = [_count(value) for value in values if type(value) in COUNTED]

    def first_unlike(self, now: list[object]) -> int:
        """Return 0, or the number of the first value that has changed, from 1; one more than all if some are new."""
        counts = [_count(value) for value in now if type(value) in COUNTED]
        if len(now) == len(self.values) and counts == self.counts and all(map(is_, now, self.values)):
            return 0
        if len(now) != len(self.values):
            return len(self.values) + 1
        before = iter(self.counts)
        for number, (value, then) in enumerate(zip(now, self.values, strict=True), 1):
            count = next(before) if type(then) in COUNTED else 0
            same = value is then or (type(value) in SCALARS and value == then)
            if not same or (type(value) in COUNTED and _count(value) != count):
                return number
        return 0


class Rates:
    """Tells whether a shard's step changed an optimizer's options, such as the rate, or its state, or a scheduler."""

    def __init__(
        self,
        module: nn.Module,
        optimizers: Callable[[], Sequence[torch.optim.Optimizer]],
        schedulers: Sequence[object],
    ) -> None:
        self.module, self.find, self.schedulers = module, optimizers, list(schedulers)
        self.optimizers: Sequence[torch.optim.Optimizer] = []
        self._options = Noted([])
        self._states: list[Noted] = []
        self._step = 0

    def begin(self, *, looks_again: bool = False) -> None:
        """Remember how they are now.

        Args:
            looks_again: whether there may be others than before.
        """
        if looks_again or not self._step:
            self.optimizers = self.find()
        if self._step % EVERY_STEPS == 0:
            for holder in holders(self.module).values():
                for value in vars(holder).values():
                    if isinstance(value, LRScheduler) and not any(value is each for each in self.schedulers):
                        self.schedulers.append(value)
        self._step += 1
        self._options = Noted(self._now())
        if not getattr(self.module, "automatic_optimization", True):
            self._states = [Noted(held_values(optimizer)) for optimizer in self.optimizers]

    def weights(self) -> Iterator[Tensor]:
        """Yield what the optimizers update."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def changed(self) -> int:
        """Return 0, or the number of the first that has changed since `begin`, from 1."""
        now, names = self._now(), len(self._options.values) + 1
        if number := self._options.first_unlike(now):
            return number if len(now) == len(self._options.values) else len(self.names()) - len(self.optimizers)
        for number, (optimizer, noted) in enumerate(zip(self.optimizers, self._states, strict=False), 1):
            if noted.first_unlike(held_values(optimizer)):
                return names + number
        return 0

    def names(self) -> list[str]:
        """Return the text for a change of each."""
        return [
            *(
                f"sets {option} of {type(optimizer).__name__}, param group {number}"
                for optimizer, number, group in self._groups()
                for option in group
            ),
            *(f"steps {type(scheduler).__name__}" for scheduler in self.schedulers),
            "adds a param group to an optimizer",
            *(f"changes what {type(optimizer).__name__} holds" for optimizer in self.optimizers),
        ]

    def _groups(self) -> list[tuple[torch.optim.Optimizer, int, State]]:
        """Return each group of parameters once, with its first optimizer and its number there."""
        found: dict[int, tuple[torch.optim.Optimizer, int, State]] = {}
        for optimizer in self.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                found.setdefault(id(group), (optimizer, number, group))
        return list(found.values())

    def _now(self) -> list[object]:
        options = itertools.chain.from_iterable(group.values() for _, _, group in self._groups())
        return [*options, *[vars(scheduler).get("last_epoch") for scheduler in self.schedulers]]


def _count(value: Any) -> int:
    """Return what changes when a tensor, or a list of parameters, is changed in place."""
    return value._version if isinstance(value, Tensor) else len(value)


class Memory:
    """Checksums of the parameters' memory: all of it in the first step, later a window of WINDOW_BYTES.

    Args:
        parameters: on one device.
        addresses: of their memory.
    """

    def __init__(self, parameters: Sequence[Tensor], addresses: list[int]) -> None:
        self.addresses = addresses
        self._on_cpu = all(parameter.is_cpu for parameter in parameters)
        self._pieces: list[tuple[int, memoryview]] = []  # on the CPU: a parameter's number, and a part of its memory
        self._tensors: list[tuple[int, Tensor]] = []  # on an accelerator: a parameter's number, and the parameter
        for number, parameter in enumerate(parameters):
            tensor = parameter.detach()
            if tensor.layout != torch.strided or torch.empty_like(tensor, device="meta").stride() != tensor.stride():
                continue  # with gaps between its elements
            flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
            if self._on_cpu:
                raw = flat.numpy().data
                self._pieces += [(number, raw[at : at + PIECE_BYTES]) for at in range(0, len(raw), PIECE_BYTES)]
            elif flat.numel():
                self._tensors.append((number, tensor))

    def checksums(self, step: int) -> list[int]:
        """Return a checksum of each part that this step checks."""
        if self._on_cpu:
            return [xxhash.xxh3_64_intdigest(piece) for _, piece in self._window(step)]
        if step % EVERY_STEPS or not self._tensors:
            return []
        return [int(number) for number in torch.stack([device_hash(tensor) for _, tensor in self._tensors]).tolist()]

    def first_unlike(self, step: int, then: list[int], now: list[int], kept: set[int]) -> int:
        """Return the number of the first parameter whose checksum differs and that is not kept, or -1."""
        pieces = self._window(step) if self._on_cpu else self._tensors
        unlike = (number for (number, _), one, two in zip(pieces, then, now, strict=True) if one != two)
        return next((number for number in unlike if number not in kept), -1)

    def _window(self, step: int) -> list[tuple[int, memoryview]]:
        number = WINDOW_BYTES // PIECE_BYTES
        if step == 0 or len(self._pieces) <= number:
            return self._pieces
        first = step * number % len(self._pieces)
        return self._pieces[first : first + number]


class Attributes:
    """The plain attributes of a model and of the experiment's objects in it, at the start of a step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._tables: list[Table] = []
        self._hot: list[Table] = []  # those looked at in each step: the experiment's classes, and what has changed
        self._cold: dict[int, Table] = {}  # the others', by the id of their object: looked at where one is set
        self._set: list[Table] = []  # and of which one was set in this step
        self._looked: list[Table] = []
        self._grown: set[str] = set()
        self._has_others = False  # objects than those in the tables
        self._step = 0

    def grown(self) -> set[str]:
        """Return the dotted names of those with lists that a step has appended to."""
        here = {".".join(filter(None, (table.path, name))) for table in self._tables for name in table.grown}
        return self._grown | here

    def know_grown(self, names: set[str]) -> None:
        """Add names to those that `grown` returns."""
        self._grown |= names

    def begin(self) -> bool:
        """Remember how the attributes are now; return whether to look for objects again."""
        self.rebase(self._hot)
        looks_again = self._has_others or self._step % EVERY_STEPS == 0
        if looks_again:
            self._has_others = False
            hot = {table.path for table in self._hot}
            self._grown = self.grown()
            self._tables = [Table(path, holder) for path, holder in holders(self.module).items()]
            hot.add("")  # the model
            self._hot = [table for table in self._tables if table.path in hot or is_experiments(type(table.holder))]
            self._cold = {id(table.holder): table for table in self._tables}
            for table in self._hot:
                del self._cold[id(table.holder)]
            self._looked = [*self._tables]
        else:
            self._looked = [*self._hot]
        self._set = []
        self._step += 1
        return looks_again

    def rebase(self, tables: Iterable["Table"] | None = None) -> None:
        """Take the attributes as they are now as what each shard starts from."""
        renewed = [table.renew() for table in (self._looked if tables is None else tables)]
        self._has_others |= any(renewed)

    def written(self, module: nn.Module) -> None:
        """Check a module too, such as a torch layer, whose attribute is about to be set."""
        table = self._cold.get(id(module))
        if table is not None and table not in self._set:
            table.renew()
            self._set.append(table)
            self._looked.append(table)

    def changes(self) -> dict[Key, object]:
        """Return the attributes that changed, with their values; ABSENT if one is gone."""
        found: dict[Key, object] = {}
        for table in self._looked:
            changed = table.changes()
            if changed and table not in self._hot:
                self._hot.append(table)
                self._cold.pop(id(table.holder), None)
            found |= {(table.path, name): value for name, value in changed.items()}
        return found

    def restore(self, keys: Iterable[Key]) -> None:
        """Restore these attributes."""
        tables = {table.path: table for table in self._looked}
        for path, name in keys:
            tables[path].put_back(name)

    def take(self) -> Callable[[], None]:
        """Restore all attributes; return what puts the current ones back."""
        changed = self.changes()
        kept = [(key, value, copied(value) if type(value) in MUTABLE else None) for key, value in changed.items()]
        self.restore(changed)
        tables = {table.path: table for table in self._looked}

        def give() -> None:
            for (path, name), value, copy in kept:
                if value is ABSENT:
                    tables[path].now.pop(name, None)
                else:
                    tables[path].now[name] = value
                    put_back(value, copy)

        return give

    def objects(self) -> Iterator[tuple[Place, object]]:
        """Yield what can change in place, as the step began, with places that are the same on every rank."""
        waiting: list[tuple[Place, object, object]] = [((table.path,), table.holder, None) for table in self._tables]
        waiting += [item for table in self._tables for item in table.objects()]
        seen = set()
        for place, value, copy in waiting:
            yield place, value
            if id(value) not in seen:
                seen.add(id(value))
                waiting += [
                    ((*place, number), item, inner)
                    for number, (item, inner) in enumerate(items_of(value, copy))
                    if inner is not None
                ]

    def put(self, nodes: list[tuple[Key, object]], device: torch.device) -> None:
        """Set attributes to what another rank has encoded."""
        tables = {table.path: table for table in self._tables}
        decode = Decoder(device, dict(self.objects()))
        for (path, name), node in nodes:
            values = tables[path].now
            value = decode(node, values.get(name))
            if type(value) is str and value == ABSENT:
                values.pop(name, None)
            else:
                values[name] = value


class Table:
    """The attributes of one object: the values that they had, and copies of what can change in place."""

    def __init__(self, path: str, holder: object) -> None:
        self.path, self.holder = path, holder
        self.now: dict[str, object] = vars(holder)
        self.grown: set[str] = set()  # names of lists that a step has appended to
        self._then: dict[str, object] = {}
        self._copies: dict[str, object] = {}
        self._values: list[object] = []
        self._objects: list[object] = []  # of the experiment's classes
        self._note()

    def _note(self) -> None:
        self._then = {name: value for name, value in self.now.items() if name not in PRIVATE}
        self._copies = {name: copied(value) for name, value in self._then.items() if type(value) in MUTABLE}
        self._values = list(self.now.values())
        large = [value for value in self._then.values() if type(value) not in LEAVES]
        self._objects = [item for value in large for _, item in own_objects(value, "")]
        self._objects += [value for value in large if isinstance(value, torch.optim.Optimizer)]

    def renew(self) -> bool:
        """Take the current attributes as the start; return whether they hold other objects."""
        if self._is_same() and not any(compared(self._then[name], copy) for name, copy in self._copies.items()):
            return False
        before = self._objects
        self._note()
        return len(before) != len(self._objects) or not all(map(is_, before, self._objects))

    def changes(self) -> dict[str, object]:
        """Return the values of those that have changed; growing lists do not count."""
        found: dict[str, object] = {}
        if not self._is_same():
            for name, value in self.now.items():
                if name not in PRIVATE and value is not self._then.get(name, ABSENT):
                    then = self._then.get(name, ABSENT)
                    if type(value) is not type(then) or type(value) not in SCALARS or value != then:
                        found[name] = value
            found |= {name: ABSENT for name in self._then if name not in self.now}
        for name, copy in self._copies.items():
            if name not in found and (how := compared(self._then[name], copy)) != SAME:
                if how == CHANGED:
                    found[name] = self.now[name]
                else:
                    self.grown.add(name)
        return found

    def objects(self) -> Iterator[tuple[Place, object, object]]:
        """Yield the place of each that can change in place, what it was, and its copy."""
        for name, copy in self._copies.items():
            if copy is not None:
                yield (self.path, name), self._then[name], copy

    def put_back(self, name: str) -> None:
        """Give an attribute the value that it had, with its content."""
        if name not in self._then:
            self.now.pop(name, None)
            return
        self.now[name] = self._then[name]
        if name in self._copies:
            put_back(self._then[name], self._copies[name])

    def _is_same(self) -> bool:
        return len(self.now) == len(self._values) and all(map(is_, self.now.values(), self._values))


def copied(value: Any) -> object:
    """Return what `compared` and `put_back` need of a value that can change in place; None for other values."""
    kind = type(value)
    if kind is Tensor:
        base = value if value._base is None else value._base
        can = value.layout == torch.strided and value.grad_fn is None and not base.requires_grad
        return value._version, value.detach().clone() if can else None
    if kind is np.ndarray:
        return value.copy()
    if kind in (list, tuple):
        return len(value), [(item, copied(item)) for item in value[:FEW]]
    if kind in DICTS:
        return {key: (item, copied(item)) for key, item in value.items()}
    if kind is deque:
        return [(item, copied(item)) for item in value]
    return frozenset(value) if kind is set else None


def compared(value: Any, copy: Any) -> int:
    """Return whether a value is the SAME as when it was copied, has only had lists GROWN, or was CHANGED."""
    kind = type(value)
    if copy is None:
        return SAME
    if kind is Tensor:
        return SAME if value._version == copy[0] else CHANGED
    if kind is np.ndarray:
        same = value.shape == copy.shape and value.dtype == copy.dtype and value.tobytes() == copy.tobytes()
        return SAME if same else CHANGED
    if kind in (list, tuple):
        length, items = copy
        grown = GROWN if len(value) > length else SAME if len(value) == length else CHANGED
        return max(grown, _each(value, items))
    if kind in DICTS:
        if value.keys() != copy.keys():
            if copy.keys() - value.keys() or any(type(value[key]) is not list for key in value.keys() - copy.keys()):
                return CHANGED
            return max(GROWN, _each((value[key] for key in copy), copy.values()))
        return _each((value[key] for key in copy), copy.values())
    if kind is deque:
        return CHANGED if len(value) != len(copy) else _each(value, copy)
    return SAME if value == copy else CHANGED


def _each(values: Iterable[object], items: Iterable[tuple[object, object]]) -> int:
    worst = SAME
    for value, (then, copy) in zip(values, items, strict=False):
        if value is then:
            worst = max(worst, compared(value, copy) if copy is not None else SAME)
        elif type(value) is not type(then) or type(value) not in SCALARS or value != then:
            return CHANGED
    return worst


def items_of(value: object, copy: Any) -> list[tuple[object, object]]:
    """Return what a container held when it was copied, with the copies."""
    kind = type(value)
    if kind in (list, tuple):
        return list(copy[1])
    return list(copy.values()) if kind in DICTS else list(copy) if kind is deque else []


def _on_cpu(node: object) -> object:
    if isinstance(node, tuple | list):
        return type(node)(map(_on_cpu, node))
    return node.cpu() if isinstance(node, Tensor) else node


def put_back(value: Any, copy: Any) -> None:
    """Restore a value to its copy."""
    kind = type(value)
    if copy is None:
        return
    if kind is Tensor:
        if copy[1] is not None:
            value.detach().copy_(copy[1])
        return
    if kind is np.ndarray:
        if value.shape == copy.shape:
            value[...] = copy
        return
    if kind is set:
        value.clear()
        value.update(copy)
        return
    items = items_of(value, copy)
    for item, inner in items:
        put_back(item, inner)
    if kind in DICTS:
        value.clear()
        value.update({key: item for key, (item, _) in copy.items()})
    elif kind is list:
        del value[copy[0] :]
        value[: len(items)] = [item for item, _ in items]
    elif kind is deque:
        value.clear()
        value.extend(item for item, _ in items)
