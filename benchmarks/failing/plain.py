"""The same training without labtrain: `python plain.py lightning|ddp STEPS EVERY PLACE`, saved each EVERY steps.

lightning   its Trainer with two processes, ModelCheckpoint, and ckpt_path="last"
ddp         a loop over DistributedDataParallel and torch.save; torchrun starts its two processes

The last line that it prints is the sha256 of the weights.
"""

import os
import sys
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from task import BATCH, BATCHES, Log, Net, StepLog, digest, network, tensors
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

RANKS = 2


def lightning(steps: int, every: int, place: str) -> None:
    """Train with Lightning."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    pl.seed_everything(1)
    save = ModelCheckpoint(dirpath=f"{place}/checkpoints", every_n_train_steps=every, save_top_k=0, save_last=True)
    trainer = pl.Trainer(accelerator="cpu", devices=RANKS, strategy="ddp", max_steps=steps, callbacks=[save, StepLog()],
                         logger=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    model = Net()
    loader = DataLoader(TensorDataset(*tensors()), BATCH // RANKS, shuffle=True)
    newest: str | None = "last"
    if "://" in place:  # Lightning 2.6 finds no "last" there, and starts again without an error
        newest = f"{place}/checkpoints/last.ckpt"
        files, path = fsspec.core.url_to_fs(newest)
        newest = newest if files.exists(path) else None
    trainer.fit(model, loader, ckpt_path=newest, weights_only=False)
    if trainer.is_global_zero:
        sys.stdout.write(f"{digest(model)}\n")


def ddp(steps: int, every: int, place: str) -> None:
    """Train with a loop, which takes up the step, the weights and the optimizer where the last snapshot has them."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    step, log = load(place, model, optimizer), Log(rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(1 + rank)
    dataset = TensorDataset(*tensors())
    sampler: Any = DistributedSampler(dataset, seed=1)
    loader = DataLoader(dataset, BATCH // RANKS, sampler=sampler)
    while step < steps:
        epoch, done = divmod(step, BATCHES)
        sampler.set_epoch(epoch)
        for batch, (samples, labels) in enumerate(loader):
            if batch < done:
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(samples), labels).backward()
            optimizer.step()
            step += 1
            log.add(step)
            if step % every == 0 and rank == 0:
                save(place, {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
            if step == steps:
                break
    if rank == 0:
        sys.stdout.write(f"{digest(model)}\n")
    dist.destroy_process_group()


def save(place: str, state: dict[str, Any]) -> None:
    """Write a snapshot under another name, then rename it; S3 shows an object once it is whole."""
    path = f"{place}/snapshot.pt"
    remote = "://" in place
    with fsspec.open(path if remote else f"{path}.new", "wb") as file:
        torch.save(state, file)
    if not remote:
        os.replace(f"{path}.new", path)  # noqa: PTH105


def load(place: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the snapshot, and return its step; 0 if there is none."""
    try:
        with fsspec.open(f"{place}/snapshot.pt", "rb") as file:
            state = torch.load(file)
    except FileNotFoundError:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"lightning": lightning, "ddp": ddp}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
