"""Keeps the run's folder and its receipt while a run is trained."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from labtrain.base.console import shown
from labtrain.base.contracts import (
    Change,
    DataRecord,
    Determinism,
    Gpus,
    Origin,
    Results,
    SavedCheckpoint,
    Segment,
    TrailRecord,
)
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import file_sha256, write_atomically, writing
from labtrain.base.nvml import driver_version
from labtrain.base.permissions import make_folder, make_sign, open_lock
from labtrain.data.combined import parts_of
from labtrain.data.transforms import described
from labtrain.exact import determinism
from labtrain.record import receipt
from labtrain.record.config import flat_texts, refers
from labtrain.record.differences import changes
from labtrain.record.fingerprints import files_read, fingerprint_and_places
from labtrain.record.identity import Config, Job, name, shards_in_use, what_counts
from labtrain.record.installed import files_state
from labtrain.record.own_runs import remember
from labtrain.record.provenance import PATCH, code_state, environment_state, machine, timestamp
from labtrain.record.ranks import RESTARTED
from labtrain.record.receipt import origin_digest
from labtrain.record.trail import BEST_UNSURE, TRAIL
from labtrain.training.callbacks.steps import tensor_names
from labtrain.training.lightning import val_loaders

LONGEST_PATCH = 1_000_000  # characters; a longer patch is only in code.patch, not in the receipt


class Recorder(pl.Callback):
    """Makes the run's folder, writes its receipt when the training starts and closes it when it ends.

    If the training does not start, the recorder removes the folder that it made. An existing receipt does not change
    before the first new step is done.

    Args:
        job: the run.
        checkpoints: returns the receipt's entries for the checkpoints.
        resumed_step: the step that this process resumes from.
        places: files and folders that model and data were made from.
        origin: the receipt's entry for the checkpoint of a complete run that this run starts from.
    """

    def __init__(
        self,
        job: Job,
        *,
        checkpoints: Callable[[], list[SavedCheckpoint]],
        resumed_step: int,
        places: Collection[Path] = (),
        origin: Origin | None = None,
    ) -> None:
        self.job, self.run_dir, self.checkpoints = job, Path(job.run_dir), checkpoints
        self.resumed_step, self.places, self.origin = resumed_step, places, origin
        self.waits = False  # whether the receipt is written only after the first new step
        self.notes: list[str] = []
        self.missing: list[list[int]] = []  # ranges of steps whose lines the trail lacks
        self.receipt: receipt.Receipt | None = None
        self.lock: int | None = None
        self.sign: int | None = None
        self.made_folder = False

    def open(self) -> None:
        """Make the run's folder and keep other processes from training the same run; on rank 0.

        Raises:
            LabtrainError: another process trains this run.
        """
        self.job.hold(self.run_dir)
        self.made_folder = not self.run_dir.exists()
        with writing(self.run_dir / receipt.LOCK):
            make_folder(self.run_dir)
            self._lock()

    def _lock(self) -> None:
        path = self.run_dir / receipt.LOCK
        try:
            self.lock = open_lock(path)
        except PermissionError as error:
            owner = (path if path.exists() else self.run_dir).stat().st_uid
            raise LabtrainError(
                f"cannot write {shown(path)} of user {owner}: the run belongs to another user",
                hint=f"train with umask 002 and a common group, then chmod -R g+rwX {shown(self.run_dir)};"
                " or resume=never",
            ) from error
        except OSError as error:
            raise LabtrainError(
                f"cannot lock {shown(path)}: {error.strerror or 'it is not a file'}", hint=f"ls -l {shown(path)}"
            ) from error
        try:
            # A record lock: forked loader workers do not inherit it. So it is released when this process is killed.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(self.lock, 100).decode(errors="replace").strip()
            os.close(self.lock)
            self.lock, self.made_folder = None, False
            raise LabtrainError(
                f"{shown(self.run_dir)} is being trained by {holder}",
                hint="wait for it, or start a new run beside it: resume=never",
            ) from error
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self.sign = make_sign(self.run_dir / receipt.SIGN)

    def say(self, text: str) -> None:
        """Print a warning and write it in the receipt: what is not exact in this training, and why."""
        text = without_secrets(text)
        if self.note(text) and getattr(rank_zero_only, "rank", 0) == 0:
            sys.stderr.write(f"warning: {text}\n")

    def note(self, text: str) -> bool:
        """Write a note in the receipt only; return whether it is new."""
        text = without_secrets(text)
        if text in self.notes:
            return False
        self.notes.append(text)
        if self.receipt is not None and not self.waits:
            receipt.write(self.run_dir, self.receipt)
        return True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        job = self.job
        before = receipt.read(self.run_dir)
        if before is not None:
            receipt.close_killed(before, self.run_dir)
            if (why := os.environ.get(RESTARTED)) is not None:
                before["segments"][-1]["why"] = f"restarted: {why}"
            unsure = [note for note in before["determinism"]["notes"] if note.endswith(BEST_UNSURE)]
            self.notes[:0] = [note for note in unsure if note not in self.notes]
        segment = self._new_segment(trainer)
        config, code = job.recorded(), without_secrets(code_state(job))
        # The existing receipt must not change before the first new step.
        self.waits = before is not None or self.origin is not None
        self.receipt = {
            "schema": receipt.SCHEMA,
            "run_id": job.run_id,
            "status": "running",
            "command": without_secrets(list(job.command)),
            "config": config,
            "code": code,
            "environment": environment_state(job),
            "hardware": {**machine(), **gpus(trainer)},
            "determinism": self._determinism(),
            "data": without_secrets(self._data(trainer), names=False),
            "segments": [*(before["segments"] if before else []), segment],
            "results": {},
            "checkpoints": [],
            "trail": self._trail(pl_module),
            "digest": "",
        }
        if before is not None:
            self._note_changes(before, segment)
        elif not self.waits:
            self._begin()

    def _new_segment(self, trainer: pl.Trainer) -> Segment:
        """Return the receipt's entry for this process's part of the training, at its start."""
        segment: Segment = {
            "started": timestamp(),
            "ended": None,
            "status": "running",
            "why": None,
            "host": os.uname().nodename,
            "devices": trainer.world_size,
            "from_step": self.resumed_step,
            "to_step": None,
            "changed": [],
        }
        if self.origin is not None:
            segment["origin"] = self.origin
        return segment

    def _determinism(self) -> Determinism:
        config = self.job.config
        return {
            **config["determinism"],
            "seed": config["seed"],
            "any_number_of_devices": shards_in_use(config) is not None,
            **without_secrets(determinism.flags()),
            "notes": self.notes,
        }

    def _trail(self, module: pl.LightningModule) -> TrailRecord:
        record: TrailRecord = {
            "file": TRAIL,
            "every_n_steps": self.job.config["trail"]["every_n_steps"],
            "tensors": tensor_names(module),
            "sha256": None,
        }
        if self.missing:
            record["missing"] = self.missing
        return record

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self.waits and trainer.global_step > self.resumed_step:
            self._begin()

    def _begin(self) -> None:
        """Write the receipt, config.yaml and code.patch."""
        assert self.receipt is not None
        remember(self.receipt, Path(self.job.root))  # before a long patch is removed from it
        self.waits, code = False, self.receipt["code"]
        with writing(self.run_dir / "config.yaml"):
            write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.receipt["config"], sort_keys=False))
        with writing(self.run_dir / PATCH):
            if not code["patch"]:
                (self.run_dir / PATCH).unlink(missing_ok=True)  # from an earlier start
            else:
                write_atomically(self.run_dir / PATCH, code["patch"])
                if len(code["patch"]) > LONGEST_PATCH:
                    code["patch"] = None
        receipt.write(self.run_dir, self.receipt)

    def _data(self, trainer: pl.Trainer) -> dict[str, DataRecord]:
        data, places = data_of(trainer, self.say)
        folder, read = self.run_dir.resolve(), []
        for place in {*self.places, *places}:
            real = place.resolve()
            # Files in the run's folder change during the run.
            if not real.is_relative_to(folder) and not folder.is_relative_to(real):
                read.append(place)
        return data | files_read(read, Path(self.job.root))

    def _note_changes(self, before: receipt.Receipt, segment: Segment) -> None:
        """Report and record what changed since the training stopped: from here on the bits may differ."""
        assert self.receipt is not None
        segment["changed"] = changes(before, self.receipt) or self._other_values(before)
        for change in segment["changed"]:
            self.say(f"resumes with a different {change['key']}: was {change['before']}, now {change['now']}")

    def _other_values(self, before: receipt.Receipt) -> list[Change]:
        """Return the keys that refer to the environment, if the run's name shows that a value has changed."""
        job, keys = self.job, refers(what_counts(self.job.recorded()))
        origin = origin_digest(before)
        named = name(job.config, code=job.code_digest, lock=job.lock_digest, origin=origin)
        if not job.code_digest or named == before["run_id"][:12] or any(each["changed"] for each in before["segments"]):
            return []
        recorded = dict(flat_texts(job.recorded()))
        return [{"key": f"config.{key}", "before": "another value", "now": recorded[key]} for key in keys]

    def close(self, status: str, *, step: int, why: str | None = None, results: Results | None = None) -> None:
        """Write how the training ended; without a receipt, remove the folder that was made for it.

        If it ended before its first new step, the former receipt stays, unless the run is complete.

        Args:
            status: one of `receipt.STATUSES`.
            step: the last step.
            why: the name of the signal, or the exception, that ended it early.
            results: of a complete run.
        """
        if self.waits and status == "complete":
            self._begin()
        if self.receipt is not None and not self.waits:
            self.receipt["status"] = status
            self.receipt["segments"][-1] |= {"ended": timestamp(), "status": status, "why": why, "to_step": step}
            files = files_state()
            self.receipt["environment"]["files"] = files["files"]
            self.receipt["environment"]["changed_files"] = files["changed_files"]
            if (trail := self.run_dir / TRAIL).exists():
                self.receipt["trail"]["sha256"] = file_sha256(trail)
            self.receipt["results"] = results or {}
            self.receipt["checkpoints"] = self.checkpoints()
            receipt.write(self.run_dir, self.receipt)
        elif self.made_folder and (self.receipt is None or self.origin is not None):
            shutil.rmtree(self.run_dir, ignore_errors=True)  # a signal may arrive before the folder exists

    def release(self) -> None:
        """Release the lock, so that other processes can train the run."""
        if self.sign is not None:
            with suppress(OSError):  # the folder may be gone; a lock ends with its process
                (self.run_dir / receipt.SIGN).unlink(missing_ok=True)
        for held in (self.sign, self.lock):
            if held is not None:
                with suppress(OSError):  # Linux closes it all the same
                    os.close(held)
        self.sign = self.lock = None


def nothing_to_train(config: Config, step: int) -> ConfigError:
    """Return the error for a run that starts from the end of another run and has no new step."""
    trainer = config["trainer"]
    by_steps = isinstance(trainer["max_steps"], int) and 0 < trainer["max_steps"] <= step
    longer = f"trainer.max_steps={step + 1}" if by_steps else f"trainer.max_epochs={(trainer['max_epochs'] or 0) + 1}"
    return ConfigError(
        f"resume={config['resume']}: that run ended at step {step}, and this command trains no further step",
        hint=f"the same command with {longer}, or more",
    )


def data_of(trainer: pl.Trainer, say: Callable[[str], None]) -> tuple[dict[str, DataRecord], list[Path]]:
    """Return the fingerprints of the training and validation data, by `train` and `val`, `val-2`, ...; and their files.

    A fingerprint lists the loader's transforms by name: their code is among the run's sources.

    Data that has no fingerprint does not end a training: a warning reports it.
    """
    found: dict[str, DataRecord] = {}
    places: list[Path] = []
    for stage, loaders in (("train", [trainer.train_dataloader]), ("val", val_loaders(trainer))):
        for number, loader in enumerate(part for each in loaders for part in parts_of(each)):
            name = stage if not number else f"{stage}-{number + 1}"
            try:
                found[name], read = fingerprint_and_places(loader.dataset)
                places += read
                if loader.transforms:
                    found[name]["transforms"] = [described(transform) for transform in loader.transforms]
            except LabtrainError:
                raise
            except Exception as error:  # a user's dataset can raise anything
                say(f"cannot fingerprint the {name} data: {type(error).__name__}: {error}")
    return found, places


def gpus(trainer: pl.Trainer) -> Gpus:
    """Return the GPUs that the training uses and the CUDA libraries of this torch; empty on a CPU."""
    if trainer.strategy.root_device.type != "cuda":
        return {}
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in properties
        ],
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
