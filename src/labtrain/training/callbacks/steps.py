"""Lightning callbacks that run at each step: seeding, the trail, progress."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import xxhash
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT

from labtrain.base.contracts import State
from labtrain.base.files import Lines, writing
from labtrain.checkpoints.format import is_spread
from labtrain.data.sharded import Loader
from labtrain.exact.checksums import shown_sums, two_sums
from labtrain.exact.determinism import fill_new_memory, seed_place
from labtrain.record.trail import TRAIL, cut_trail
from labtrain.training.lightning import active_results


class Seeding(pl.Callback):
    """Makes the draws of hooks, and the content of new memory, a function of (seed, place): there is no state to save.

    With shards the strategy seeds each shard of a step; without shards this callback seeds the step.

    Args:
        per_rank: each rank draws other numbers; with shards all ranks draw the same.
    """

    def __init__(self, *, per_rank: bool) -> None:
        self.per_rank = per_rank

    def _seed(self, trainer: pl.Trainer, *place: int | str) -> None:
        seed_place(*place, trainer.global_rank if self.per_rank else "all")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer, "epoch", trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._seed(trainer, "step", trainer.current_epoch, batch_idx)
        fill_new_memory(on=trainer.global_step == 0)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "validation", trainer.global_step, dataloader_idx, batch_idx)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "test", dataloader_idx, batch_idx)


class BatchSizes(pl.Callback):
    """Tells Lightning the number of samples of a sharded batch, for what hooks log."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._tell(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tell(trainer)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tell(trainer)

    @staticmethod
    def _tell(trainer: pl.Trainer) -> None:
        samples = getattr(trainer.strategy, "samples", None)
        if samples is not None and (results := active_results(trainer)) is not None:
            results.batch_size = samples


class Trail(pl.Callback):
    """Writes the trail, a line a step (trail.py).

    A resumed training cuts the trail at the step that it resumes from, after its first new step is done. If it fails
    before, trail and receipt do not change.

    The sums of a GPU are fetched during the next step, and before a checkpoint, so no step waits for them.

    Args:
        path: of the trail.
        every_n_steps: how often a line is written.
        resumed_step: the step that this process resumes from.
        say: called for the first loss that is NaN or infinite.
    """

    def __init__(
        self, path: Path, *, every_n_steps: int, resumed_step: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path, self.every_n_steps, self.resumed_step = path, every_n_steps, resumed_step
        self.file: Lines | None = None
        self.last_step = resumed_step
        self.say, self.said = say, False
        self.is_cut = False
        self.spread = False
        self.numbers: dict[int, int] = {}  # by a parameter's id, its index in the first `tensor_names`
        self.loaded: dict[str, int] = {}  # by a parameter's name, if code has changed the model since
        self.gradients: torch.Tensor | None = None  # checksums of the current step's gradients
        # Sum over the step's batches so far; Lightning has divided each loss by their number.
        self.loss: torch.Tensor | None = None
        self.pending: tuple[State, torch.Tensor] | None = None
        self.copied: torch.cuda.Event | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.spread = is_spread(pl_module.state_dict())
        places = self.loaded or parameter_places(pl_module)
        self.numbers = {id(each): places[name] for name, each in pl_module.named_parameters() if name in places}
        if trainer.is_global_zero:
            self.file = Lines(self.path)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.gradients = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Manual optimization: it is not known yet which optimizer step is the batch's last, which the trail records.
        unwritten = pl_module.automatic_optimization and (trainer.global_step + 1) % self.every_n_steps
        if unwritten or (self.file is None and not self.spread):
            return
        gradients = [
            (self.numbers[id(parameter)], part)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) in self.numbers
            for part in dense_parts(parameter.grad)
        ]
        if gradients:
            sums = two_sums(gradients, spread=self.spread)
            # Add up the gradients of several optimizers.
            self.gradients = sums if self.gradients is None else self.gradients + sums

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self.resumed_step:
            self._cut()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # with manual optimization a step may return anything
            exact = loss.detach().double().reshape(1)
            more = self.loss is not None and pl_module.automatic_optimization
            self.loss = self.loss + exact if more else exact  # type: ignore[operator]
        if step == self.last_step:
            return
        self.last_step = step
        loss, self.loss = self.loss, None
        gradients, self.gradients = self.gradients, None
        if step % self.every_n_steps:
            return
        if self.file is None and not self.spread:
            return
        weights = two_sums(enumerate(pl_module.state_dict().values()), spread=self.spread)
        if self.file is None:
            return
        self.flush()
        loader = trainer.train_dataloader
        indices = loader.indices_of(batch_idx) if isinstance(loader, Loader) else None
        line = {
            "step": step,
            "epoch": trainer.current_epoch,
            "loss": loss is not None,
            "batch": None if indices is None else xxhash.xxh3_64_hexdigest(indices.tobytes()),
            "gradients": gradients is not None,
        }
        exact = torch.zeros(1, dtype=torch.float64) if loss is None else loss
        parts = [exact.view(torch.int64), weights, weights if gradients is None else gradients]
        packed = torch.cat([part.to(weights.device) for part in parts])  # (5,)
        self.pending = line, packed
        if packed.device.type == "cuda":
            self.pending = line, torch.empty(5, dtype=torch.int64, pin_memory=True).copy_(packed, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cut()

    def _cut(self) -> None:
        if self.file is not None and not self.is_cut:
            with writing(self.path):
                cut_trail(self.path, last_step=self.resumed_step)
            self.is_cut = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self.flush()  # a training that resumes from this checkpoint needs the step's line
        if not self.numbers:
            return
        numbered = [(name, self.numbers.get(id(parameter))) for name, parameter in pl_module.named_parameters()]
        places = {name: number for name, number in numbered if number is not None}
        if places != parameter_places(pl_module):  # code has changed the model
            checkpoint[TRAIL] = places

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        self.loaded = checkpoint.get(TRAIL, {})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()
            self.file = None

    def flush(self) -> None:
        """Write the line that waits for a GPU's sums."""
        if self.pending is None or self.file is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        line, packed = self.pending
        self.pending = self.copied = None
        value = packed[:1].view(torch.float64).item() if line["loss"] else math.nan
        sums = packed[1:].tolist()
        if line["loss"] and not math.isfinite(value) and not self.said:
            self.said = True
            self.say(f"the loss of step {line['step']} is {value}")
        line["loss"] = value if math.isfinite(value) else repr(value)
        line["gradients"] = shown_sums(sums[2:], bits=32) if line["gradients"] else None
        line["weights"] = shown_sums(sums[:2])
        self.file.add(json.dumps(line))


def dense_parts(gradient: torch.Tensor) -> list[torch.Tensor]:
    """Return a gradient, or the parts of a sparse one."""
    if gradient.layout != torch.sparse_coo:
        return [gradient]
    gradient = gradient.coalesce()
    return [gradient.indices(), gradient.values()]


def tensor_names(module: torch.nn.Module) -> list[str]:
    """Return the names of the tensors in the trail's digests, by number: weights, then other parameters."""
    return list(dict.fromkeys([*module.state_dict(), *(name for name, _ in module.named_parameters())]))


def parameter_places(module: torch.nn.Module) -> dict[str, int]:
    """Return the number of each parameter, by name."""
    places = {name: number for number, name in enumerate(tensor_names(module))}
    return {name: places[name] for name, _ in module.named_parameters()}


class Progress(ProgressBar):
    """A moving line in a terminal; in a log file, a line an epoch and at most one every half minute."""

    QUIET_SECONDS = 30.0

    def __init__(self, *, batch_size: int, status: Callable[[], str] = str) -> None:
        super().__init__()
        self.batch_size, self.status = batch_size, status
        self.terminal = sys.stderr.isatty()
        self.enabled = True
        self.started = self.printed = 0.0
        self.first_step = 0
        self.samples = 0

    def disable(self) -> None:  # Lightning's protocol: called on every rank except rank 0
        self.enabled = False

    def enable(self) -> None:  # called on every rank after a finder's search
        self.enabled = self.trainer.is_global_zero

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.printed = time.monotonic()
        self.first_step, self.samples = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        now = time.monotonic()
        loader = trainer.train_dataloader
        self.samples += loader.samples_of(batch_idx) if isinstance(loader, Loader) else self.batch_size
        if self.enabled and now - self.printed > (0.2 if self.terminal else self.QUIET_SECONDS):
            self.printed = now
            self._print(self._line(trainer, pl_module, batch_idx + 1), moving=self.terminal)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.enabled:
            self.printed = time.monotonic()
            done = trainer.fit_loop.epoch_loop.batch_progress.current.completed  # an iterable dataset has no length
            self._print(self._line(trainer, pl_module, done), moving=False)

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> str:
        epoch, per_epoch = trainer.current_epoch, trainer.num_training_batches
        done = trainer.global_step - self.first_step
        seconds = max(time.monotonic() - self.started, 1e-9)
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        known = math.isfinite(per_epoch)
        total = trainer.estimated_stepping_batches  # for an iterable dataset this is max_steps, which may be -1
        left = (total - trainer.global_step) / done * seconds if done and 0 < total < math.inf else None
        bar = self._bar(batches / per_epoch) if self.terminal and known else ""
        parts = [
            f"{bar}epoch {epoch + 1}{f'/{epochs}' if epochs else ''}",
            f"batch {batches}{f'/{per_epoch:.0f}' if known else ''}",
            f"{self.samples / seconds:,.0f} samples/s",
        ]
        if left is not None:
            parts.append(f"{clock(left)} left")
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        if status := self.status():
            parts.append(status)
        return "  ".join(parts)

    @staticmethod
    def _bar(done: float, width: int = 20) -> str:
        return "━" * round(width * done) + "─" * (width - round(width * done)) + "  "

    def _print(self, line: str, *, moving: bool) -> None:
        erase = "\r\x1b[2K" if self.terminal else ""
        if moving:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be erased
        sys.stderr.write(f"{erase}{line}{'' if moving else chr(10)}")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
