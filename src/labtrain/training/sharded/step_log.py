"""Combines what a step logs over the shards of all ranks: `self.log`, torchmetrics' states, a few flags.

Each call of `training_step` or `validation_step` sees one shard. It logs into a scratch collection, and its metrics
start empty. Its result is a row of float64 numbers. Every rank gets all S rows of a step and computes the same values
from them. So an average over an epoch has the same bits on any number of ranks, and after a resume. Lightning's own
collection then gets the step as if one process had logged it.

If a step returns a weight, its logged loss must be averaged by this weight, and everything else by samples. `self.log`
gets a copy of the loss or a plain number, so the loss is known by its value only. A metric may equal the loss in some
shards: both are 0 where all is right. So a name is the loss if it equals the loss in all shards: of a step for the
step's value, of an epoch for the epoch's. Both averages are kept until the epoch ends. A metric that equals the loss in
all these shards is averaged by the weights: the same numbers, averaged in another way.

Lightning 2.6: trainer/connectors/logger_connector/result.py, through lightning.py.
"""

import copy
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import cast

import torch
import torch.distributed as dist
import torchmetrics
from torch import Tensor

from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import run_mode
from labtrain.exact.metric_states import (
    Held,
    add_rows,
    beside_states,
    fresh,
    hold,
    merged,
    metrics_of,
    reduced,
    reduction,
    release,
)
from labtrain.training.lightning import LoggedValue, LoggedValues, ResultCollection, ResultMeta, new_entry, without_sync

# Rows are padded: ranks that disagree about a row's length still exchange rows of one length, and can report it.
ROW_MULTIPLE = 64
HEAD = 3  # of a rank's first row: the template's signature, and two wishes


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name that is logged."""

    key: str
    meta: ResultMeta
    is_tensor: bool


@dataclasses.dataclass(frozen=True)
class Template:
    """The content of a row after the numbers that the caller puts in front.

    Attributes:
        front: how many numbers the caller puts in front.
        entries: two numbers each: the sum (or smallest, largest) and the weight; with `weighted` a third: 1 if it
            differs from the loss.
        metrics: names of the metrics that were updated; the numbers of their states follow.
        weighted: whether the step returned a weight. Loss times weight and weight then precede the entries.
    """

    front: int
    entries: tuple[Entry, ...]
    metrics: tuple[str, ...]
    weighted: bool = False

    @property
    def width(self) -> int:
        """How many numbers an entry has."""
        return 3 if self.weighted else 2

    @property
    def first(self) -> int:
        """Where the numbers of the entries begin."""
        return self.front + (2 if self.weighted else 0)

    @property
    def states(self) -> int:
        """Where the numbers of the metrics' states begin."""
        return self.first + self.width * len(self.entries)

    def signature(self) -> int:
        text = repr((self.front, [entry.key for entry in self.entries], self.metrics, self.weighted))
        return zlib.crc32(text.encode())


def is_global(entry: LoggedValue) -> bool:
    """Return whether a step logged an entry: its value is that of all ranks."""
    return entry.meta.sync.fn is global_already


class Tally:
    """Collects and combines the rows of a model's steps.

    Args:
        module: the model; its torchmetrics are found by name.

    Raises:
        ConfigError: a metric's state has its own reduction.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.metrics: dict[str, torchmetrics.Metric] = {}
        self._new: dict[str, torchmetrics.Metric] = {}  # those that no step has updated yet
        self._beside: dict[str, dict[str, object]] = {}  # what they keep beside their states
        self._tables: list[dict[str, object]] = []  # the submodules of each module
        self._members: list[object] = []
        self._find_metrics()
        self._entries: dict[str, Entry] = {}
        self._training = True
        self._scratch: dict[tuple[bool, int], LoggedValues] = {}
        self._held: dict[str, Held] = {}
        self._rows: list[Tensor] = []
        self._lists: list[dict[str, list[object]]] = []
        self._template: Template | None = None
        self._logs = LoggedValues(training=True)

    def _find_metrics(self) -> None:
        """Find the model's metrics; again if its submodules changed: a hook may make a metric for each epoch."""
        members = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        if self._tables and len(members) == len(self._members) and all(map(is_, members, self._members)):
            return
        parts, known = dict(self._module.named_modules()), list(map(id, self.metrics.values()))
        self._tables = [part._modules for part in parts.values()]
        self._members = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        if run_mode() != "off":
            self._new = {name: part for name, part in parts.items() if isinstance(part, torchmetrics.Metric)}
        self.metrics = metrics_of(self._module)
        inner = (f"{path}." for path, part in parts.items() if isinstance(part, torchmetrics.Metric))
        self._inner = {name for name in self.metrics if name.startswith(tuple(inner))}  # a wrapper computes them itself
        for part in parts.values():
            if isinstance(part, torchmetrics.MetricCollection):
                part._enable_compute_groups = False  # or some of them would not be updated but share others' states
        for name, metric in self.metrics.items():
            if id(metric) in known:
                continue
            metric.sync_on_compute = metric._to_sync = metric.dist_sync_on_step = (
                False  # their states are global already
            )
            for state, default in metric._defaults.items():
                if isinstance(default, Tensor) and not reduction(metric, state):
                    raise ConfigError(
                        f"{name} ({type(metric).__name__}): its state {state!r} has its own reduction;"
                        " expected sum, mean, min, max or concatenation",
                        hint="use another metric, or determinism.shards=null",
                    )

    def begin(self, *, training: bool) -> None:
        """Begin a step: put the metrics' states aside."""
        self._find_metrics()
        self._training = training
        self._held = {name: hold(metric) for name, metric in self.metrics.items() if metric._update_count}
        self._rows, self._lists, self._template = [], [], None

    def open(self, data: object, samples: int, dataloader_idx: int | None = None, *, place: int = 0) -> LoggedValues:
        """Begin a shard, and return the collection that it logs into: shards at two places may be open at once."""
        self._logs = self._scratch.setdefault((self._training, place), LoggedValues(training=self._training))
        for metric in self.metrics.values():
            if metric._update_count:
                metric.reset()
        self._beside = {name: beside_states(metric) for name, metric in self._new.items()}
        for entry in self._logs.values():
            entry.empty()
        self._logs.batch, self._logs.batch_size, self._logs.dataloader_idx = data, samples, dataloader_idx
        return self._logs

    def take(self) -> Callable[[], None]:
        """Return what puts back the open shard's metrics and logged values, after another shard was opened."""
        logs, beside = self._logs, self._beside
        held = {name: hold(metric) for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            release(metric, fresh(metric))  # an update changes these in place

        def give() -> None:
            self._logs, self._beside = logs, beside
            for name, states in held.items():
                release(self.metrics[name], states)

        return give

    def close(self, front: Tensor, samples: int, weighted: tuple[Tensor, float] | None = None) -> None:
        """End a shard: keep its row.

        Args:
            front: the caller's numbers, 1-D, float64.
            samples: of the shard.
            weighted: its loss and the returned weight: if the step logs that loss, it counts by this weight.
        """
        for name, before in self._beside.items():
            if name in self._new:  # unless a shard that was open beside this one has updated it
                self._check_new(name, before)
        logged = [(key, entry) for key, entry in self._logs.items() if not entry.has_reset]
        touched = tuple(name for name, metric in self.metrics.items() if metric._update_count)
        for name in touched if run_mode() != "off" else ():
            if self.metrics[name]._computed is not None and name not in self._inner:
                raise ConfigError(
                    f"a step calls {name}.compute(): the value would be of one shard, not of all data so far",
                    hint=f"self.log({name.rpartition('.')[2]!r}, self.{name}), which computes it at the epoch's end;"
                    f" or {name}.compute() in on_train_epoch_end",
                )
        entries = tuple(self._entry(key, entry) for key, entry in logged)
        template = Template(len(front), entries, touched, weighted is not None)
        if self._template is not None and template != self._template:
            raise _unequal(f"{_names(template)} in one call, {_names(self._template)} in another")
        self._template = template
        numbers = [] if weighted is None else _loss_and_weight(*weighted, front.device)
        numbers += [number for _, entry in logged for number in _numbers(entry, samples, front.device, weighted)]
        parts = [front]
        if numbers:
            parts.append(torch.stack([to_device(number, front.device) for number in numbers]))
        parts += [getattr(self.metrics[name], state).double().reshape(-1) for name, state, *_ in self._tensors(touched)]
        self._rows.append(torch.cat([to_device(part, front.device) for part in parts]) if len(parts) > 1 else front)
        lists = {f"{name}.{state}": getattr(self.metrics[name], state) for name, state in self._list_states(touched)}
        self._lists.append({name: [_detached(item) for item in items] for name, items in lists.items()})

    def _check_new(self, name: str, before: dict[str, object]) -> None:
        """Raise ConfigError if a step has changed a metric's attributes beside its states: they cannot be combined."""
        metric = self._new[name]
        now = beside_states(metric)  # a wrapper may not count its updates
        for attribute, value in before.items():
            if attribute != "_update_count" and now.get(attribute, value) != value:
                raise ConfigError(
                    f"{name} ({type(metric).__name__}): an update changes its {attribute}, which is not a state, so"
                    " the updates of several shards cannot be combined",
                    hint="use add_state in the metric for all that an update changes, use another metric, or"
                    " determinism.shards=null",
                )
        if now["_update_count"] != before["_update_count"]:
            del self._new[name]

    def _entry(self, key: str, logged: LoggedValue) -> Entry:
        if key not in self._entries:
            self._entries[key] = Entry(key, without_sync(logged.meta), logged.is_tensor)
        return self._entries[key]

    def combine(
        self,
        results: ResultCollection,
        *,
        samples: int,
        counts: list[int],
        wishes: tuple[float, float],
        device: torch.device,
    ) -> tuple[Tensor, tuple[float, float]]:
        """End the step: gather all rows, and pass the step's logs and metrics to Lightning.

        Args:
            results: Lightning's collection.
            samples: of the whole batch.
            counts: how many shards each rank has in this step.
            wishes: two numbers of this rank, whether it has shards or not.
            device: of the exchange.

        Returns:
            The caller's numbers of all shards, shape (shards, front), and the largest wishes of all ranks; the same on
            every rank.

        Raises:
            ConfigError: the shards do not log the same names.
        """
        if len(counts) > 1 and 0 in counts:  # a rank without a shard cannot know what the other ranks logged
            known = [self._template]
            dist.broadcast_object_list(known, src=0)
            self._template = self._template or known[0]
        assert self._template is not None
        if len(counts) == 1:
            rows, lists = torch.stack(self._rows), self._lists
        else:
            rows, lists, wishes = self._together(counts, wishes, device)
        self._release(rows, lists)
        self._log(rows, results, samples)
        return rows[:, : self._template.front], wishes

    def _together(
        self, counts: list[int], wishes: tuple[float, float], device: torch.device
    ) -> tuple[Tensor, list[dict[str, list[object]]], tuple[float, float]]:
        template = self._template
        assert template is not None
        states = sum(default.numel() for _, _, default, _ in self._tensors(template.metrics))
        length = HEAD + template.states + states
        padded = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
        mine = torch.zeros(max(counts), padded, dtype=torch.float64, device=device)
        mine[0, :HEAD] = torch.tensor([template.signature(), *wishes], dtype=torch.float64)
        for number, row in enumerate(self._rows):
            mine[number, HEAD : HEAD + len(row)] = row
        all_rows = mine.new_empty(len(counts) * mine.numel())
        dist.all_gather_into_tensor(all_rows, mine.reshape(-1))
        by_rank = all_rows.view(len(counts), max(counts), padded)
        signatures, stops, saves = by_rank[:, 0, :HEAD].T.tolist()
        if len(set(signatures)) > 1:
            raise _unequal(f"{_names(template)} on rank {dist.get_rank()}, other names on another rank")
        rows = torch.cat([by_rank[number, :count, HEAD:length] for number, count in enumerate(counts)])
        lists = self._lists
        if any(True for _ in self._list_states(template.metrics)):
            own = [_mapped(part, Tensor.cpu) for part in lists]
            gathered = [own] * len(counts)
            dist.all_gather_object(gathered, own)
            lists = [_mapped(part, lambda item: item.to(device)) for parts in gathered for part in parts]
        return rows, lists, (max(stops), max(saves))

    def _release(self, rows: Tensor, lists: list[dict[str, list[object]]]) -> None:
        """Restore the metrics' states, with this step added."""
        assert self._template is not None
        at = self._template.states
        steps: dict[str, Held] = {name: {} for name in self._template.metrics}
        for name, state, default, kind in self._tensors(self._template.metrics):
            part = rows[:, at : at + default.numel()]
            at += default.numel()
            steps[name][state] = reduced(part, kind).to(default.dtype).view(default.shape)
        for name, state in self._list_states(self._template.metrics):
            steps[name][state] = [item for shard in lists for item in shard[f"{name}.{state}"]]
        on_step = {entry.meta.metric_attribute for entry in self._template.entries if entry.meta.on_step}
        for name, step in steps.items():
            metric = self.metrics[name]
            held = self._held[name] = self._held.get(name) or fresh(metric)
            if name in on_step:
                for state, value in step.items():
                    setattr(metric, state, value)
                metric._computed, metric._update_count = None, 1
                held["_forward_cache"] = metric.compute()
            for state, value in step.items():
                if isinstance(value, list):
                    held[state] = held[state] + value
                else:
                    kind, before = reduction(metric, state), held[state]
                    held[state] = merged(before, value.to(before.device), kind, held["_update_count"])
            held["_update_count"] += 1
            held["_computed"] = None
        for name, held in self._held.items():
            release(self.metrics[name], held)

    def _log(self, rows: Tensor, results: ResultCollection, samples: int) -> None:
        template = self._template
        assert template is not None
        results.batch_size = samples
        loss = add_rows(rows[:, template.front : template.first]) if template.weighted else None
        for number, entry in enumerate(template.entries):
            at = template.first + template.width * number
            if entry.key not in results:
                made = new_entry(entry.meta, is_tensor=entry.is_tensor, reduce=global_already)
                results[entry.key] = made.to(rows.device)
            into = cast(LoggedValue, results[entry.key])
            if not entry.is_tensor:
                into.put_metric_of_step(self._metric(entry))
            else:
                _log_tensor(into, entry.meta, rows[:, at : at + template.width], loss)
            into.forget_computed()
            into.updates += 1
            into.has_reset = False

    def _metric(self, entry: Entry) -> torchmetrics.Metric:
        """Return the metric that an entry logs: of the model, or one that wraps some of it."""
        if entry.key in self._logs:
            found = self._logs[entry.key].value
        else:
            found = self._module.get_submodule(str(entry.meta.metric_attribute))
        return cast(torchmetrics.Metric, found)

    def _tensors(self, names: Iterable[str]) -> Iterator[tuple[str, str, Tensor, str]]:
        """Yield metric, state, its default and how it is reduced, of each state that is a tensor."""
        for name in names:
            metric = self.metrics[name]
            for state, default in metric._defaults.items():
                if isinstance(default, Tensor):
                    yield name, state, default, reduction(metric, state)

    def _list_states(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            for state, default in self.metrics[name]._defaults.items():
                if not isinstance(default, Tensor):
                    yield name, state


def _log_tensor(into: LoggedValue, meta: ResultMeta, numbers: Tensor, loss: Tensor | None) -> None:
    """Add one step's value to Lightning's entry: in float64, whatever the number of steps.

    Args:
        into: the entry.
        meta: its description.
        numbers: of each shard, shape (shards, 2 or 3).
        loss: if the step returned a weight: the sums of loss times weight, and of the weights, shape (2,).
    """
    kind = _kind(meta)
    sums = torch.cat([reduced(numbers[:, :1], "sum" if kind == "mean" else kind), add_rows(numbers[:, 1:2])])
    as_loss = None if loss is None else torch.cat([loss, numbers[:, 2].amax(0, keepdim=True)])
    if meta.on_step:
        into.of_step = (_mean(sums, as_loss) if kind == "mean" else sums[0]).float()
        if not meta.on_epoch:
            into.value = into.of_step
            return
    if kind == "mean":
        into.add(sums, as_loss)
    elif kind == "sum":
        into.value = into.value + sums[0]
    else:
        into.value = (torch.minimum if kind == "min" else torch.maximum)(into.value.double(), sums[0])


def _mean(sums: Tensor, as_loss: Tensor | None) -> Tensor:
    """Return a step's mean: that of the loss if it is the loss, and 0 if no shard has a weight."""
    if as_loss is None:
        return sums[0] / sums[1]
    weights = torch.stack([sums[1], as_loss[1]])
    weights = weights.masked_fill(~(weights > 0), 1)  # `where` would wait for a GPU, to send it the 1
    return torch.where(as_loss[2] > 0, sums[0] / weights[0], as_loss[0] / weights[1])


def _loss_and_weight(loss: Tensor, weight: float, device: torch.device) -> list[Tensor]:
    """Return a shard's loss times its weight, and its weight; a loss of weight 0 may be NaN."""
    number = torch.full((), weight, dtype=torch.float64, device=device)
    return [to_device(loss, device).double().reshape(()) * weight if weight else number, number]


def _numbers(
    entry: LoggedValue, samples: int, device: torch.device, weighted: tuple[Tensor, float] | None
) -> list[Tensor]:
    """Return an entry of one shard as value and weight; the value is already multiplied where it is a mean.

    Args:
        entry: of the shard.
        samples: of the shard.
        device: of the numbers; the entry may be on another one.
        weighted: the loss and the returned weight. A third number is then 1 if the entry is not the loss.
    """
    weight = to_device(torch.tensor(float(samples), dtype=torch.float64), device)
    if not entry.is_tensor:
        return [torch.zeros_like(weight), weight, torch.ones_like(weight)][: 2 if weighted is None else 3]
    logged, times = to_device(entry.value.detach(), device).squeeze(), None
    value, is_mean = logged.double(), _kind(entry.meta) == "mean"
    if is_mean and entry.meta.on_epoch:
        times = to_device(entry.cumulated_batch_size, device)
        weight = times.double()
    elif is_mean:
        value = value * samples
    if weighted is None:
        return [value, weight]
    loss, share = weighted
    differs = _differs(logged, to_device(loss, device).squeeze(), times)
    if not share:
        left_out = value.isnan()  # a mean over nothing
        value = torch.where(left_out, to_device(entry.nothing().double(), device), value)
        weight = weight.masked_fill(left_out, 0.0)
        differs = differs & (value != 0)  # the loss may be NaN, and logged as 0
    return [value, weight, differs.double()]


def _differs(logged: Tensor, loss: Tensor, times: Tensor | None) -> Tensor:
    """Return whether a logged number is not the loss, as a tensor.

    The two may differ in precision, as in `self.log("loss", loss.item())`. Lightning multiplies by `times`: a float32
    result is a product in float32, a float64 result may be a product in either.
    """
    dtypes = (torch.float32,) if logged.dtype == torch.float32 else (torch.float32, torch.float64)
    products = [loss.to(dtype) if times is None else loss.to(dtype) * times for dtype in dtypes]
    return torch.stack([logged != product for product in products]).all(0)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A copy to a GPU does not wait for the GPU; one from it does.

    The driver has read pageable memory when the call returns: CUDA Runtime API, "API synchronization behavior".
    """
    return tensor.to(device, non_blocking=tensor.is_cpu)


def _kind(meta: ResultMeta) -> str:
    return str(meta.reduce_fx.__name__)  # Lightning allows mean, sum, min and max


def global_already(value: Tensor, *_: object, **__: object) -> Tensor:
    """Replace Lightning's reduction over ranks for a value that already covers all ranks."""
    return value


def _detached(item: object) -> object:
    return item.detach() if isinstance(item, Tensor) else copy.deepcopy(item)


def _mapped(lists: dict[str, list[object]], change: Callable[[Tensor], Tensor]) -> dict[str, list[object]]:
    return {
        name: [change(item) if isinstance(item, Tensor) else item for item in items] for name, items in lists.items()
    }


def _names(template: Template) -> str:
    names = [entry.meta.name for entry in template.entries] + list(template.metrics)
    names += ["a weight that training_step returned"] if template.weighted else []
    return ", ".join(dict.fromkeys(names)) or "nothing"


def _unequal(what: str) -> ConfigError:
    return ConfigError(
        f"the shards of one step log different names: {what}",
        hint="log the same names in each call of a step, and return a weight from each or from none;"
        " or determinism.shards=null",
    )
