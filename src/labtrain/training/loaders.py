"""Makes exact loaders of those that the user's code returns: torch's, and several combined."""

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves, tree_map

from labtrain.data.combined import MODES, Combined
from labtrain.data.from_torch import exact
from labtrain.data.loader import DataLoader
from labtrain.data.sharded import Loader
from labtrain.data.stream import Stream, can_begin_again
from labtrain.data.substreams import SubStreams, can_be_split
from labtrain.training.lightning import mode_of

EVALUATION = ("val_dataloader", "test_dataloader", "predict_dataloader")


def take_loaders(
    datamodule: pl.LightningDataModule, placed: Callable[[object], object], *, same_batches: bool = False
) -> None:
    """Let a data module's methods return exact loaders.

    Args:
        datamodule: changed in place.
        placed: gets the loader of the training, and returns it at the place where a resume begins.
        same_batches: training and validation take the same batches in each epoch: trainer.overfit_batches.
    """
    make, finish = datamodule.train_dataloader, _with_same_batches if same_batches else _unchanged
    datamodule.train_dataloader = lambda: placed(finish(exact_training(make())))  # type: ignore[method-assign]
    for name in filter(lambda name: is_overridden(name, datamodule), EVALUATION):
        setattr(datamodule, name, _then(exact_evaluation, getattr(datamodule, name)))
    if is_overridden("val_dataloader", datamodule):
        datamodule.val_dataloader = _then(finish, datamodule.val_dataloader)  # type: ignore[method-assign]


def _with_same_batches(made: object) -> object:
    """Let each loader yield the same batches in each epoch."""
    for loader in tree_leaves(made.iterables if isinstance(made, CombinedLoader) else made):
        if isinstance(loader, Loader):
            loader.take_same_batches()
    return made


def _unchanged(made: object) -> object:
    return made


def exact_training(made: object) -> object:
    """Return the exact loader of a training; of several loaders one, in their mode."""
    if not isinstance(made, CombinedLoader | list | tuple | dict):
        return exact_or_stream(made)
    mode = mode_of(made) if isinstance(made, CombinedLoader) else "max_size_cycle"
    loaders = tree_map(exact, made.iterables if isinstance(made, CombinedLoader) else made)
    exacts = [isinstance(each, DataLoader) for each in tree_leaves(loaders)]
    return Combined(loaders, mode) if mode in MODES and exacts and all(exacts) else made


def exact_evaluation(made: object) -> object:
    """Return the exact loaders of an evaluation, which Lightning takes one after the other unless they are combined."""
    if not isinstance(made, CombinedLoader):
        return tree_map(exact_or_stream, made)
    if mode_of(made) == "sequential":
        return CombinedLoader(tree_map(exact_or_stream, made.iterables), "sequential")
    return exact_training(made)


def exact_or_stream(loader: object) -> object:
    """Return an exact loader for one of torch's, a Stream for another that can be iterated again."""
    made = exact(loader)
    if can_be_split(made):
        return SubStreams(made)  # type: ignore[arg-type]
    return Stream(made) if not isinstance(made, DataLoader) and can_begin_again(made) else made


def _then(change: Callable[[object], object], make: Callable[[], object]) -> Callable[[], object]:
    return lambda: change(make())
