"""The programs of tests/corpus: how labtrain trains each, and how plain Lightning does.

    .venv/bin/python -m tests.corpus vision/digits ...    train these programs and print their results
    .venv/bin/python -m tests.corpus --write vision/digits    put them into tests/corpus/results.json, too
    .venv/bin/python -m tests.corpus --write                  all programs; then `make reference` for the table

A program is tests/corpus/DOMAIN/NAME.py: a docstring of one sentence; `Model`, a LightningModule; `Data`, a
LightningDataModule with an argument `batch_size` that has a default (and `num_workers` if it likes). `TRAINER` holds
options of the Trainer, `CALLBACKS` callbacks by name, as in labtrain's configuration; a class of the program's own is
f"{__name__}.Class". Nothing is imported from labtrain, except in a line with the comment `# labtrain: THE PLAIN LINE`.
Plain Lightning trains the plain line. An `import labtrain` has the comment `# labtrain:`.

Each program is trained with labtrain's defaults (four shards, mode strict) as an experiment that consists of this file:
on one device, on two, and on four, two and one, each killed, and then four. The outcomes must be equal. Then labtrain
trains it with `determinism.shards=1` and records each step: its batch, the states of the generators of random numbers,
its loss and what it logs. A plain `lightning.Trainer` trains the same model on these batches. Its loaders must yield as
many batches of the same sizes, and its losses and weights must be equal.
"""

import argparse
import copy
import fcntl
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra.utils
import lightning.pytorch as pl
import numpy as np
import sklearn.datasets  # noqa: F401  # in the forkserver: a second for each process otherwise
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves

import labtrain
from labtrain.data.stream import each_seeded
from labtrain.exact import determinism
from tests.support import exact_worker
from tests.support.exact import Runner, forkserver, outcome

CORPUS = Path(__file__).parents[1] / "corpus"
RESULTS = CORPUS / "results.json"
EPOCHS = 3
WORLDS = (4, 2, 1)  # each is killed; then four go on
BOUND = 1e-6  # relative, for losses and weights that are not the same bits
SAME = "same bits"
NUMBERS = re.compile(r" \([^()]*on rank \d[^()]*\)")  # of an error: other CPUs compute other ones
ONE_LINE = re.compile(r"^(\s*).*# labtrain: ?(.*)$", re.MULTILINE)
KILLER = "import os\nfrom typing import Any\n\nimport lightning.pytorch as pl\n\n\n"
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one program came to.

    Attributes:
        form: the program's docstring.
        verdict: unchanged, one line, refused, or different.
        says: labtrain's sentence if refused, what differs if different, the lines if changed.
        steps: optimizer steps.
        losses: "same bits" as plain Lightning in each step, or the largest relative difference.
        weights: the same for the final weights.
    """

    form: str
    verdict: str
    says: str = ""
    steps: int = 0
    losses: str = ""
    weights: str = ""


class RefusedError(Exception):
    """Labtrain refused a program."""


class DifferentError(Exception):
    """A program was not trained in the same way."""


def programs() -> list[str]:
    """Return all programs, DOMAIN/NAME."""
    return [path.relative_to(CORPUS).with_suffix("").as_posix() for path in sorted(CORPUS.glob("*/*.py"))]


def examine(program: str, folder: Path) -> Result:
    """Train a program in all ways, below a folder."""
    text = (CORPUS / f"{program}.py").read_text()
    changed = [line.partition("#")[0].strip() for line in text.splitlines() if ONE_LINE.match(line)]
    changed = [line for line in changed if not line.startswith(("import ", "from "))]
    form = " ".join((_module(program).__doc__ or "").split())
    steps, losses, weights = 0, "", ""
    try:
        steps = _exact(program, folder)
        losses, weights = _like_lightning(program, folder)
    except RefusedError as error:
        return Result(form=form, verdict="refused", says=str(error))
    except DifferentError as error:
        return Result(form=form, verdict="different", says=str(error), steps=steps, losses=losses, weights=weights)
    verdict = {0: "unchanged", 1: "one line"}.get(len(changed), f"{len(changed)} lines")
    return Result(form=form, verdict=verdict, says="; ".join(changed), steps=steps, losses=losses, weights=weights)


# ----------------------------------------------------------------------------------------------- labtrain and itself


def _exact(program: str, folder: Path) -> int:
    """Train on one device, on two, and killed and moved; return the number of steps."""
    config, draw = configuration(program), random.Random(program)
    reference = outcome(_run(_runner(program, folder / "one"), config, says="on one device"))
    two = _runner(program, folder / "two")
    found = outcome(_run(two, config, world=2, says="on two devices"))
    _compare("on two devices", reference, found, two.said())
    steps = sorted({line["step"] for line in reference["trail"]})
    config["checkpoint"]["every_n_steps"] = draw.choice([1, 2, 3])
    moved = _runner(program, folder / "moved")
    for step, world in zip(sorted(draw.sample(steps[1:-1], len(WORLDS))), WORLDS, strict=True):
        at = f"{step} {int(signal.SIGKILL)} {draw.randrange(world)}"
        _run(moved, config, world=world, signal_at=at, says=f"killed after step {step} of {world} devices")
    run_dir = _run(moved, config, world=4, says="resumed on four devices")
    _compare("after kills and on other numbers of devices", reference, outcome(run_dir), moved.logs[0].read_text())
    segments = json.loads((run_dir / "receipt.json").read_text())["segments"]
    assert len(segments) == len(WORLDS) + 1, f"not killed: {segments}"
    return int(reference["steps"])


def configuration(program: str) -> Any:
    """Return the configuration of a program, as its author would write it."""
    config, module = exact_worker.default_config(), _module(program)
    takes = inspect.signature(module.Data).parameters
    config["model"] = {"_target_": f"{module.__name__}.Model"}
    config["data"] = {"_target_": f"{module.__name__}.Data", "batch_size": takes["batch_size"].default}
    if "num_workers" in takes:
        config["data"]["num_workers"] = takes["num_workers"].default
    config["trainer"] |= {"max_epochs": EPOCHS, "enable_progress_bar": False, **getattr(module, "TRAINER", {})}
    config["callbacks"] = {"at": {"_target_": "killer.At"}, **getattr(module, "CALLBACKS", {})}
    return config


def _module(program: str) -> ModuleType:
    """Import a program in this process."""
    path = CORPUS / f"{program}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runner(program: str, folder: Path) -> Runner:
    """Return a Runner of an experiment that consists of a program."""
    (folder / "none").mkdir(parents=True)
    shutil.copy(CORPUS / f"{program}.py", folder / "none")
    # Not by its own name: the run would depend on all tests, and have another name after a change of any.
    (folder / "none/killer.py").write_text(KILLER + inspect.getsource(exact_worker.At))
    return Runner(folder, work=work, preload="tests.support.corpus")


def work(config: dict[str, Any], *arguments: Any) -> None:
    """Train one rank of a program's run, and record its steps if RECORD names a file."""
    sys.path.insert(0, str(Path(config["paths"]["runs"]).parent / "none"))
    recording, environment = Recording(), arguments[-1]
    if "RECORD" in environment:
        recording.listen()
    try:
        exact_worker.work(config, *arguments)
    finally:
        if "RECORD" in environment:
            torch.save(recording.kept(), environment["RECORD"])


def _run(runner: Runner, config: Any, *, says: str, **options: Any) -> Path:
    """Train; raise RefusedError or DifferentError with labtrain's words unless it ends, or is killed as asked."""
    run_dir = runner.run(config, code=None, **options)
    if run_dir is not None:
        assert "signal_at" not in options, f"{says}: not killed"
        return run_dir
    lines = runner.said().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if "signal_at" not in options:
        if errors:
            hints = [f" ({line})" for line in lines if line.startswith("hint: ")]
            raise RefusedError(NUMBERS.sub("", errors[0]) + "".join(hints[:1]))
        raise DifferentError(f"{says}: {_last_line(runner.said())}")
    return Path()


def _last_line(log: str) -> str:
    """Return the last line of a log, an error's; print the log."""
    print(log, file=sys.stderr)
    return (log.strip().splitlines() or ["no output"])[-1]


def _compare(how: str, one: dict[str, Any], two: dict[str, Any], log: str) -> None:
    """Raise DifferentError, with the first warning of a log, unless two outcomes are equal."""
    if one == two:
        return
    differs = [key for key in one if one[key] != two[key]]
    where = ""
    if "trail" in differs:
        pairs = itertools.zip_longest(one["trail"], two["trail"])
        where = next(f"; first: {a} and {b}" for a, b in pairs if a != b)
    if "metrics" in differs:
        where += f"; metrics: {one['metrics']} and {two['metrics']}"
    print(f"{', '.join(differs)} differ{where}", file=sys.stderr)
    warnings = [line for line in log.splitlines() if line.startswith("warning: ")]
    raise DifferentError("; labtrain says: ".join([f"other results {how}", *warnings[:1]]))


# ------------------------------------------------------------------------------------- labtrain and plain Lightning


@dataclass
class Recording:
    """The steps of a training.

    Attributes:
        steps: place, batch, generators' states, loss and logged values of each training_step.
        hooks: the generators' states at the n-th call of each hook of the model, and of validation_step.
        initial: the weights before the first step.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    hooks: dict[str, list[Any]] = field(default_factory=dict)
    initial: dict[str, Any] = field(default_factory=dict)
    replayed: "Recording | None" = None  # whose generators' states are restored

    def kept(self) -> dict[str, Any]:
        """Return what a file keeps."""
        return {"steps": self.steps, "hooks": self.hooks, "initial": self.initial}

    def listen(self) -> None:
        """Record all trainings of this process."""
        self.logged: list[tuple[str, float]] | None = None
        training, validation, hook = Strategy.training_step, Strategy.validation_step, call._call_lightning_module_hook
        log = pl.LightningModule.log

        def training_step(strategy: Strategy, *arguments: Any) -> Any:
            return self._step(strategy, training, arguments)

        def validation_step(strategy: Strategy, *arguments: Any) -> Any:
            self._draw("validation_step")
            return validation(strategy, *arguments)

        def module_hook(trainer: pl.Trainer, name: str, *arguments: Any, **options: Any) -> Any:
            self._draw(name)
            return hook(trainer, name, *arguments, **options)

        def logs(module: pl.LightningModule, name: str, value: Any, *arguments: Any, **options: Any) -> None:
            if self.logged is not None and isinstance(value, torch.Tensor | float | int):
                self.logged.append((name, float(value)))
            log(module, name, value, *arguments, **options)

        Strategy.training_step, Strategy.validation_step = training_step, validation_step  # type: ignore[method-assign]
        call._call_lightning_module_hook = module_hook
        pl.LightningModule.log = logs  # type: ignore[method-assign]

    def _step(self, strategy: Strategy, usual: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        module, number = strategy.lightning_module, len(self.steps)
        assert module is not None
        if not self.steps:
            self.initial = copy.deepcopy(module.state_dict())
        if self.replayed is not None and number < len(self.replayed.steps):
            put_draws(self.replayed.steps[number]["draws"])
        place = module.current_epoch, module.trainer.fit_loop.epoch_loop.batch_idx
        step: dict[str, Any] = {"place": place, "draws": draws(), "size": size(arguments[0])}
        step["batch"] = copy.deepcopy(arguments[0]) if self.replayed is None else None
        self.steps.append(step)
        self.logged = []
        output = usual(strategy, *arguments)
        loss = output.get("loss") if isinstance(output, dict) else output
        step["losses"] = [("loss", float(loss)), *self.logged] if loss is not None else self.logged
        self.logged = None
        return output

    def _draw(self, name: str) -> None:
        calls = self.hooks.setdefault(name, [])
        if self.replayed is not None and len(calls) < len(self.replayed.hooks.get(name, [])):
            put_draws(self.replayed.hooks[name][len(calls)])
        calls.append(draws())


def first_of_batches(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first step of each batch: an optimizer such as LBFGS calls its closure several times."""
    return list({step["place"]: step for step in reversed(steps)}.values())[::-1]


def draws() -> tuple[Any, ...]:
    """Return the states of the global generators of random numbers."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def put_draws(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def size(batch: Any) -> int:
    """Return the number of samples of a batch: rows of the last tensor, which are the labels where there are any."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if leaves:
        return len(leaves[-1])
    parts = [vars(leaf) for leaf in tree_leaves(batch) if hasattr(leaf, "__dict__")]
    return size(parts) if parts else len(batch)


def _like_lightning(program: str, folder: Path) -> tuple[str, str]:
    """Train with one shard, and with plain Lightning; return how equal losses and weights are."""
    runner, file = _runner(program, folder / "whole"), folder / "recording.pt"
    config = configuration(program)
    config["determinism"]["shards"] = 1
    run_dir = _run(runner, config, says="with shards: 1", environment={"RECORD": str(file)})
    plain = folder / "plain"
    plain.mkdir()
    text = (CORPUS / f"{program}.py").read_text()
    (plain / Path(f"{program}.py").name).write_text(ONE_LINE.sub(r"\1\2", text))
    log = plain / "log.txt"
    process = forkserver("tests.support.corpus").Process(target=train_plainly, args=(program, config, plain, file, log))
    process.start()
    process.join()
    if process.exitcode:
        raise DifferentError(f"plain Lightning: {_last_line(log.read_text())}")
    ours, theirs = (torch.load(each, weights_only=False) for each in (file, plain / "recording.pt"))
    _compare_loaders(ours["steps"], theirs["sizes"])
    _compare_initial(ours["initial"], theirs["initial"])
    losses = _closeness(*([value for step in each["steps"] for value in step["losses"]] for each in (ours, theirs)))
    weights = _weights_closeness(labtrain.load_weights(str(run_dir)), theirs["weights"])
    for name, found in (("losses", losses), ("weights", weights)):
        if found != SAME and not float(found) <= BOUND:
            raise DifferentError(f"{name} differ from plain Lightning's by {found}")
    return losses, weights


def _compare_loaders(steps: list[dict[str, Any]], sizes: dict[int, tuple[list[int], bool]]) -> None:
    for epoch, group in itertools.groupby(first_of_batches(steps), key=lambda step: step["place"][0]):
        ours, (theirs, ended) = sorted(step["size"] for step in group), sizes.get(epoch, ([], True))
        if len(ours) != len(theirs) if ended else len(ours) > len(theirs):
            raise DifferentError(f"epoch {epoch}: {len(ours)} batches, {len(theirs)} of plain Lightning")
        if ended and ours != sorted(theirs):
            raise DifferentError(f"epoch {epoch}: batches of {ours} samples, of plain Lightning {sorted(theirs)}")


def _compare_initial(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    if (found := _weights_closeness(one, two)) != SAME:
        raise DifferentError(f"the weights before the first step differ: {found}")


def _closeness(one: list[tuple[str, float]], two: list[tuple[str, float]]) -> str:
    if [name for name, _ in one] != [name for name, _ in two]:
        raise DifferentError(f"{len(one)} losses and logged values, {len(two)} of plain Lightning")
    pairs = [(np.float64(a), np.float64(b)) for (_, a), (_, b) in zip(one, two, strict=True)]
    if all(a.tobytes() == b.tobytes() for a, b in pairs):
        return SAME
    return f"{max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs):.1e}"


def _weights_closeness(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> str:
    if one.keys() != two.keys():
        raise DifferentError(f"weights: {sorted(one.keys() ^ two.keys())}")
    if all(torch.equal(one[name], two[name]) for name in one):
        return SAME
    each = [
        float((one[name].double() - two[name].double()).abs().max() / two[name].double().abs().max().clamp(min=1e-12))
        for name in one
        if one[name].numel()
    ]
    return f"{max(each):.1e}"


class Replay:
    """The program's own loader; in place of its batches those that were recorded.

    Attributes:
        sizes: of its batches in each epoch, and whether the epoch came to its end.
    """

    def __init__(self, loader: Any, trainer: pl.Trainer, steps: list[dict[str, Any]]) -> None:
        self.loader, self.trainer, self.steps = loader, trainer, steps
        self.combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        self.sizes: dict[int, tuple[list[int], bool]] = {}
        if all(map(_has_length, self.combined.flattened)):
            self.length = {"min_size": min}.get(self.combined._mode, max)(map(len, self.combined.flattened))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        if "length" not in vars(self):
            raise TypeError("a stream")
        return int(self.length)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.trainer.current_epoch
        recorded = iter([step["batch"] for step in first_of_batches(self.steps) if step["place"][0] == epoch])
        sizes: list[int] = []
        self.sizes[epoch] = sizes, False
        for batch, *_ in self._iterated(epoch):
            sizes.append(size(batch))
            self.sizes[epoch] = sizes, len(sizes) == vars(self).get("length")  # then it is asked for no more
            if (replayed := next(recorded, None)) is not None:
                yield copy.deepcopy(replayed)
        self.sizes[epoch] = sizes, True

    def _iterated(self, epoch: int) -> Iterator[Any]:
        """Iterate the program's own loader; a stream with the draws that labtrain gives it, which may decide its length."""
        if "length" in vars(self):
            return iter(self.combined)
        return each_seeded(lambda: iter(self.combined), "stream", epoch, first=0)


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except (TypeError, NotImplementedError):
        return False


def train_plainly(program: str, config: Any, folder: Path, file: Path, log: Path) -> None:
    """Train a program with plain Lightning on the recorded batches, in a process of its own."""
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    recorded = Recording(**torch.load(file, weights_only=False))
    recording = Recording(replayed=recorded)
    recording.listen()
    options = {key: value for key, value in config["trainer"].items() if value is not None}
    options |= {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    callbacks = {name: each for name, each in config["callbacks"].items() if name != "at"}
    determinism.set_run(seed=config["seed"], mode="off")
    # From the same draws as labtrain: the weights are the same before the first step.
    determinism.seed_all(config["seed"], "init")
    data = hydra.utils.instantiate(config["data"], _convert_="all")
    determinism.seed_all(config["seed"], "init")
    model = hydra.utils.instantiate(config["model"], _convert_="all")
    made = [hydra.utils.instantiate(each, _convert_="all") for each in callbacks.values()]
    trainer = pl.Trainer(**options, callbacks=made, default_root_dir=folder)
    replays, make, set_up = [], data.train_dataloader, data.setup

    def train_dataloader() -> Replay:
        replays.append(Replay(make(), trainer, recorded.steps))
        return replays[-1]

    def setup(stage: str) -> None:
        determinism.seed_all(config["seed"], "setup")
        set_up(stage)
        determinism.seed_all(config["seed"], "setup")

    data.train_dataloader, data.setup = train_dataloader, setup
    for owner, hook in itertools.product((model, data), TRANSFER_HOOKS):
        if is_overridden(hook, owner):
            setattr(owner, hook, _only_in_evaluation(getattr(owner, hook), trainer))
    trainer.fit(model, datamodule=data)
    sizes = {epoch: found for replay in replays for epoch, found in replay.sizes.items()}
    torch.save({**recording.kept(), "sizes": sizes, "weights": model.state_dict()}, folder / "recording.pt")


def _only_in_evaluation(usual: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
    """Return a hook that changes no batch of the training: the recorded ones have gone through it."""

    def hook(batch: Any, *arguments: Any, **options: Any) -> Any:
        return batch if trainer.training else usual(batch, *arguments, **options)

    return hook


# ----------------------------------------------------------------------------------------------------------- results


def read_results() -> dict[str, Any]:
    """Return the recorded results by program."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def write_result(program: str, found: dict[str, Any]) -> None:
    """Record a program's result, and remove those of programs that are gone; several processes may do so."""
    with RESULTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        results = {name: each for name, each in json.load(file).items() if name in programs()}
        file.seek(0)
        file.write(json.dumps(dict(sorted({**results, program: found}.items())), indent=1) + "\n")
        file.truncate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("programs", nargs="*")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for program in arguments.programs or programs():
        with tempfile.TemporaryDirectory() as folder:
            found = asdict(examine(program, Path(folder)))
        print(f"{program}: {json.dumps(found, indent=1)}", flush=True)
        if arguments.write:
            write_result(program, found)
