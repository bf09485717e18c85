"""Numbers that a step adds to by hand: `self.correct += ...`, `self.seen += len(y)`, `self.total_loss += loss.item()`.

With shards, labtrain calls a step once a shard. So that such a number is what one call with the whole batch would make
of it, labtrain combines what the shards add:

===== ==============================================================================================
sum   of amounts that samples add up to, such as `self.seen += len(y)`
mean  of amounts that are a mean over samples, such as a loss, or that count batches: `self.steps += 1`
count a sum, if all amounts are integers: without a trial
===== ==============================================================================================

The source of a class tells which attributes its methods add to. A trial tells sum and mean apart: it compares what some
samples add with what two parts of them add (objective.py). Checkpoints hold the result, since another trial, on other
samples, may find less. The trial also finds other numbers that depend on how often a step is called, such as items of
dicts and buffers: labtrain names them.
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from labtrain.exact.attributes import attributes_of, holders
from labtrain.exact.buffers import is_statistic
from labtrain.exact.plain_values import is_experiments
from labtrain.training.state.changed_weights import Content

SUM, MEAN, COUNT, OTHER, UNKNOWN = "sum", "mean", "count", "other", "unknown"
MOST_NUMBERS = 4096  # in a tensor or an array
NO_STEPS = ("__init__", "setup", "configure", "prepare", "on_", "reset")  # how the names of other methods begin
FEW_ITEMS = 64  # of a list or dict
ROUNDING = math.sqrt(torch.finfo(torch.float32).eps)  # of a trial: up to here half of the digits agree
EXACT = 1 << 53  # ranks exchange amounts as float64
CALLS, SOME_CALLS, AMOUNTS = range(3)  # what code adds: a constant in each call or in some calls, or anything else
SAME, UNLIKE, INTEGER, FLOAT, FIRST_TENSOR, FIRST_ARRAY = 0, -1, 1, 2, 3, 100  # types of the result
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.float32, torch.float64, torch.float16, torch.bfloat16)  # fmt: skip
ARRAY_DTYPES = tuple(map(np.dtype, ("i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "f8", "f4", "f2")))

Site = tuple[str, str]  # the path of a holder, the name of its attribute
Kinds = dict[Site, str]
Numbers = NDArray[np.float64]  # 1-D
Value = Any  # a number, a tensor or an array


# ----------------------------------------------------------------------------------------------------------- the source


def added_to(kind: type[object]) -> dict[str, int]:
    """Return the names of the attributes that a class's methods add to, and what: CALLS, SOME_CALLS or AMOUNTS.

    Not those that one method both adds to and sets: they may begin again within an epoch.
    """
    found: dict[str, int] = {}
    refused: set[str] = set()
    for each in filter(is_experiments, kind.__mro__):
        for function in filter(inspect.isfunction, vars(each).values()):
            adds, sets = _stores_of(inspect.unwrap(function))
            refused |= adds.keys() & sets
            for name, what in adds.items():
                found[name] = max(what, found.get(name, CALLS))
    return {name: what for name, what in found.items() if name not in refused}


@cache
def _stores_of(function: Callable[..., object]) -> tuple[dict[str, int], set[str]]:
    """Return the attributes that a function adds to, with what it adds, and those that it sets."""
    adds: dict[str, int] = {}
    sets: set[str] = set()
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return adds, sets
    always = {id(statement) for statement in getattr(body, "body", [])}
    for node in ast.walk(body):
        for name, amount in _stores(node):
            if amount is None:
                sets.add(name)
                continue
            what = AMOUNTS
            if isinstance(amount, ast.Constant):
                what = CALLS if id(node) in always else SOME_CALLS
            adds[name] = max(what, adds.get(name, CALLS))
    return adds, sets


def _stores(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield the attributes that a statement stores, with what it adds to each; None if it sets the attribute."""
    if isinstance(node, ast.AugAssign):
        if isinstance(node.target, ast.Attribute):
            yield node.target.attr, node.value if isinstance(node.op, ast.Add | ast.Sub) else None
        elif isinstance(node.target, ast.Subscript):
            yield ast.unparse(node.target), None
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        stored = [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Attribute)]
        for each in stored:
            if isinstance(each.ctx, ast.Store):
                yield each.attr, _amount(targets, node.value)


def _amount(targets: Sequence[ast.expr], value: ast.expr | None) -> ast.expr | None:
    """Return `amount` if a statement is `x = x + amount`, `x = amount + x` or `x = x - amount`."""
    if len(targets) == 1 and isinstance(value, ast.BinOp):
        target = ast.unparse(targets[0])
        if isinstance(value.op, ast.Add | ast.Sub) and ast.unparse(value.left) == target:
            return value.right
        if isinstance(value.op, ast.Add) and ast.unparse(value.right) == target:
            return value.left
    return None


# ------------------------------------------------------------------------------------------------------------- one step


class Counters:
    """Combines what the shards of a step add to numbers.

    Args:
        module: the model.
        device: of the training.
        kinds: of each stage, as far as they are known; a checkpoint holds them.
    """

    def __init__(self, module: nn.Module, device: torch.device, kinds: dict[str, Kinds]) -> None:
        self.module, self.device, self.kinds = module, device, kinds
        self.begun: dict[Site, _Number] = {}  # as the step began

    def found(self) -> dict[Site, tuple[int, bool]]:
        """Return the numbers in attributes that methods add to, with what they add, and whether to an integer."""
        return {
            (path, name): (what, _is_integral(_code_of(vars(holder)[name])))
            for path, holder in holders(self.module).items()
            for name, what in added_to(type(holder)).items()
            if _size_of(vars(holder).get(name))
        }

    def state(self) -> dict[str, dict[str, dict[str, str]]]:
        """Return the kinds by stage, holder and name; nothing if no method of the model adds to an attribute."""
        if not any(added_to(type(holder)) for holder in holders(self.module).values()):
            return {}
        found: dict[str, dict[str, dict[str, str]]] = {stage: {} for stage in self.kinds}
        for stage, kinds in self.kinds.items():
            for (path, name), kind in kinds.items():
                found[stage].setdefault(path, {})[name] = kind
        return found

    def begin(self, stage: str) -> None:
        """Begin a step of a stage."""
        kinds = self.kinds.get(stage, {})
        inner = holders(self.module) if any(path for path, _ in kinds) else {"": self.module}
        tables = {path: vars(holder) for path, holder in inner.items()}
        self.begun = {
            (path, name): _Number.of(tables[path], name, kind)
            for (path, name), kind in kinds.items()
            if path in tables and _size_of(tables[path].get(name)) and (kind != OTHER or stage != "train")
        }

    def rebase(self) -> None:
        """Leave out, in the middle of a step, numbers that a hook has changed for all shards."""
        self.begun = {site: number for site, number in self.begun.items() if number.is_unchanged}

    @property
    def width(self) -> int:
        """How many numbers `take` returns."""
        return sum(2 + number.size for number in self.begun.values())

    def take(self, samples: int) -> list[float]:
        """Return what a shard has added, and take it back. The other ranks need it, as numbers.

        Args:
            samples: of the shard.
        """
        return [each for number in self.begun.values() for each in (float(samples), *number.take())]

    def may_change(self) -> bool:
        """Return whether a method of the model sets an attribute or an item, other than in hooks and at the start."""
        functions = [
            function
            for holder in holders(self.module).values()
            for each in filter(is_experiments, type(holder).__mro__)
            for name, function in vars(each).items()
            if inspect.isfunction(function) and not name.startswith(NO_STEPS)
        ]
        return any(any(_stores_of(inspect.unwrap(function))) for function in functions)

    def unknown(self, rows_SN: list[list[float]]) -> list[Site]:
        """Return the numbers that shards have added to and of which no trial has told the kind.

        Args:
            rows_SN: what `take` returned for each shard.
        """
        at, found = 0, list[Site]()
        for site, number in self.begun.items():
            if number.kind == UNKNOWN and any(any(row[at + 2 : at + 2 + number.size]) for row in rows_SN):
                found.append(site)
            at += 2 + number.size
        return found

    def end(self, rows_SN: list[list[float]], kinds: Kinds | None = None) -> None:
        """End the step: add what all shards have added; called on every rank.

        Args:
            rows_SN: what `take` returned for each shard.
            kinds: that are known by now.
        """
        at = 0
        for site, number in self.begun.items():
            samples, codes = ([row[at + place] for row in rows_SN] for place in (0, 1))
            added_SN = np.array([row[at + 2 : at + 2 + number.size] for row in rows_SN])
            at += 2 + number.size
            if min(codes) > UNLIKE and max(codes) > SAME:
                number.put(
                    int(max(codes)), _combined(added_SN, samples, (kinds or {}).get(site, number.kind)), self.device
                )


def kinds_of(state: dict[str, dict[str, dict[str, str]]]) -> dict[str, Kinds]:
    """Return the kinds of each stage, from `Counters.state`."""
    return {
        stage: {(path, name): kind for path, names in paths.items() for name, kind in names.items()}
        for stage, paths in state.items()
    }


@dataclass(frozen=True, slots=True)
class _Number:
    """A number, a tensor or an array as it was when the step began.

    Attributes:
        table: the attributes of its holder.
        name: of the attribute.
        kind: of its amounts.
        value: of the attribute.
        content: of a tensor; a copy of an array or of a tensor of inference mode; None for a number.
    """

    table: dict[str, object]
    name: str
    kind: str
    value: Value
    content: Content | Value

    @classmethod
    def of(cls, table: dict[str, object], name: str, kind: str) -> "_Number":
        value: Value = table[name]
        if isinstance(value, Tensor) and not value.is_inference():
            return cls(table, name, kind, value, Content.of(value))
        content = (
            value.clone() if isinstance(value, Tensor) else value.copy() if isinstance(value, np.ndarray) else None
        )
        return cls(table, name, kind, value, content)

    @property
    def size(self) -> int:
        return _size_of(self.value)

    @property
    def _before(self) -> Value:
        if isinstance(self.content, Content):
            return self.content.values
        return self.value if self.content is None else self.content

    def take(self) -> list[float]:
        """Return the type of what a shard has made of this number, and what it has added; take that back."""
        now = self.table.get(self.name)
        if self.is_unchanged:
            self._put_back()  # 0 may have been added in place
            return [float(SAME), *[0.0] * self.size]
        code, added = _code_of(now), self._added(now)
        if code == UNLIKE or added is None or (self.kind == COUNT and not _is_integral(code)):
            return [float(UNLIKE), *[0.0] * self.size]
        self._put_back()
        return [float(code), *added]

    def _put_back(self) -> None:
        self.table[self.name] = self.value
        if isinstance(self.content, Content):
            self.content.put_into(self.value)
        elif self.content is not None:
            self.value[...] = self.content

    def put(self, code: int, added: Numbers, device: torch.device) -> None:
        """Add an amount, and make a value of the type that shards have left."""
        if code in (INTEGER, FLOAT):
            (amount,) = added.tolist()
            whole = code == INTEGER and amount.is_integer()
            self.table[self.name] = _number(self.value) + (int(amount) if whole else amount)
            return
        total = np.reshape(_as_float64(self._before) + added, np.shape(self._before))
        if code >= FIRST_ARRAY:
            made: Value = total.astype(ARRAY_DTYPES[code - FIRST_ARRAY])
        else:
            dtype, on_cpu = divmod(code - FIRST_TENSOR, 2)
            made = torch.tensor(total, dtype=DTYPES[dtype], device=torch.device("cpu") if on_cpu else device)
        if isinstance(self.value, Tensor | np.ndarray) and self.value.dtype == made.dtype:
            self.value[...] = made
        else:
            self.table[self.name] = made

    @property
    def is_unchanged(self) -> bool:
        """Whether the attribute is what it was."""
        now: Value = self.table.get(self.name)
        if now is not self.value:
            return False
        if isinstance(self.content, Content):
            return self.content.is_in(now, thorough=False) or torch.equal(now, self.content.values)
        if isinstance(self.content, Tensor):
            return bool(torch.equal(now, self.content))
        return self.content is None or now.tobytes() == self.content.tobytes()

    def _added(self, now: Value) -> list[float] | None:
        """Return what was added; None if that cannot be told."""
        before = self._before
        if isinstance(now, int | np.integer) and isinstance(before, int | np.integer):
            difference = int(now) - int(before)
            return [float(difference)] if abs(difference) < EXACT else None
        if np.shape(now) not in ((), np.shape(before)) or _size_of(now) != self.size:
            return None
        return list((_as_float64(now) - _as_float64(before)).tolist())


def _size_of(value: Value) -> int:
    """Return how many numbers a value holds; 0 if it is not a number, a tensor or an array of numbers, or too large."""
    if _code_of(value) == UNLIKE:
        return 0
    size = int(value.numel() if isinstance(value, Tensor) else np.size(value))
    return size if size <= MOST_NUMBERS else 0


def _code_of(value: object) -> int:
    """Return the type of a value, as a number."""
    if isinstance(value, bool | np.bool_):
        return UNLIKE
    if isinstance(value, int | np.integer):
        return INTEGER
    if isinstance(value, float | np.floating):
        return FLOAT
    if type(value) is Tensor and value.layout == torch.strided and value.dtype in DTYPES:
        return FIRST_TENSOR + 2 * DTYPES.index(value.dtype) + value.is_cpu
    if type(value) is np.ndarray and value.dtype in ARRAY_DTYPES:
        return FIRST_ARRAY + ARRAY_DTYPES.index(value.dtype)
    return UNLIKE


def _is_integral(code: int) -> bool:
    """Return whether a type is one of integers."""
    if code >= FIRST_ARRAY:
        return ARRAY_DTYPES[code - FIRST_ARRAY].kind in "iu"
    return not DTYPES[(code - FIRST_TENSOR) // 2].is_floating_point if code >= FIRST_TENSOR else code == INTEGER


def _number(value: Value) -> int | float:
    return int(value) if isinstance(value, int | np.integer) else float(value)


def _as_float64(value: Value) -> Numbers:
    flat = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value
    return np.array(np.ravel(flat), np.float64)


def _combined(added_SN: Numbers, samples: list[float], kind: str) -> Numbers:
    """Return what a step adds, from what its shards have added, in their order."""
    if kind == MEAN and (added_SN == added_SN[0]).all():
        return np.array(added_SN[0])
    shares = [each / sum(samples) for each in samples] if kind == MEAN else [1.0] * len(samples)
    total: Numbers = np.zeros(added_SN.shape[1])
    for row, share in zip(added_SN, shares, strict=True):
        total = total + row * share
    return total


# -------------------------------------------------------------------------------------------------------------- a trial


@dataclass(frozen=True, slots=True)
class Added:
    """What a step has added.

    Attributes:
        sites: to each number that `Counters` combines; None: it did something else.
        others: to other numbers, by name.
    """

    sites: dict[Site, Numbers | None]
    others: dict[str, Numbers]


class Trial:
    """Finds out whether the amounts that a step adds are sums or means.

    Args:
        counters: of the training.
        training: the steps are those of the training; otherwise of an evaluation.
    """

    def __init__(self, counters: Counters, *, training: bool) -> None:
        self.found, self.training = counters.found(), training
        self._kinds: dict[Site, str] = {}
        self._numbers = Counters(counters.module, counters.device, {"trial": dict.fromkeys(self.found, SUM)})
        self._before: dict[str, Value] = {}
        self.added = Added({}, {})  # by the last step
        self.unlike: set[str] = set()  # names of numbers that depend on how often a step is called

    def begin(self) -> None:
        """Begin a step on some samples."""
        self._numbers.begin("trial")
        self._before = _other_numbers(self._numbers.module, self.found)

    def end(self) -> None:
        """End it: keep what it has added."""
        others = dict[str, Numbers]()
        for name, now in _other_numbers(self._numbers.module, self.found).items():
            before = self._before.get(name)
            if before is not None and before.shape == now.shape:
                others[name] = now - before
        self.added = Added({}, others)
        for site, number in self._numbers.begun.items():
            code, *added = number.take()
            self.added.sites[site] = None if code == UNLIKE else np.array(added)

    def compare(self, whole: Added, first: Added, second: Added, *, share: float) -> None:
        """Compare what some samples add with what two parts of them add.

        Args:
            whole: what all of them add.
            first: what the first part adds.
            second: what the other part adds.
            share: of the first part in the samples.
        """
        for site in self.found:
            all_of_them, one, two = (each.sites.get(site) for each in (whole, first, second))
            if all_of_them is None or one is None or two is None:
                self._kinds[site] = OTHER
            elif kind := _kind_of(all_of_them, one, two, share):
                known = self._kinds.setdefault(site, kind)
                self._kinds[site] = kind if known == kind else OTHER
        for name in whole.others.keys() & first.others.keys() & second.others.keys():
            parts = whole.others[name], first.others[name], second.others[name]
            # In a training a value that differs between shards is reported in the step itself.
            if not (np.array_equal(parts[0], parts[1]) and np.array_equal(parts[0], parts[2])) and (
                not self.training or _kind_of(*parts, share) == SUM
            ):
                self.unlike.add(name)

    def kinds(self) -> Kinds:
        """Return the kind of each number.

        In a training, equal amounts that are constants count once without this: step_changes.py.
        """
        kinds = Kinds()
        for site, (what, is_integer) in self.found.items():
            if self.training:
                kind = self._kinds.get(site, COUNT if is_integer and what == AMOUNTS else OTHER)
                kinds[site] = OTHER if kind == MEAN and what != AMOUNTS else kind
            else:
                kinds[site] = self._kinds.get(site, MEAN if what == CALLS else UNKNOWN)
        return kinds


def _kind_of(whole: Numbers, first: Numbers, second: Numbers, share: float) -> str:
    """Return SUM, MEAN or OTHER; an empty text if all amounts are 0."""
    scale = ROUNDING * max(float(np.abs(each).max()) for each in (whole, first, second))
    is_sum = bool((np.abs(whole - first - second) <= scale).all())
    is_mean = bool((np.abs(whole - share * first - (1 - share) * second) <= scale).all())
    if is_sum and is_mean:
        return ""
    return SUM if is_sum else MEAN if is_mean else OTHER


def _other_numbers(module: nn.Module, sites: Container[Site]) -> dict[str, Numbers]:
    """Return copies of a model's numbers that `Counters` does not combine, by name: items of dicts, buffers, ..."""
    found: dict[str, Numbers] = {}
    waiting: list[tuple[str, Value, int]] = [
        (f"{path}.{name}" if path else name, value, 0)
        for path, holder in holders(module).items()
        for name, value in attributes_of(holder)
        if (path, name) not in sites
    ]
    waiting += [
        (name, value, 0) for name, value in module.named_buffers() if not is_statistic(name.rpartition(".")[2], value)
    ]
    for name, value, depth in waiting:
        if isinstance(value, list | dict) and depth < 2 and len(value) <= FEW_ITEMS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}[{key!r}]", item, depth + 1) for key, item in items]
        elif _size_of(value):
            found[name] = _as_float64(value)
    return found
