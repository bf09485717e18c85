"""What all loggers share: no credentials leave the process."""

import argparse

from lightning.pytorch.loggers import Logger

from labtrain.base.contracts import Options
from labtrain.base.credentials import without_secrets


class Clean(Logger):
    """Removes credentials: Lightning gives each logger the configuration from `save_hyperparameters`."""

    def log_hyperparams(self, params: Options | argparse.Namespace, *arguments: object, **options: object) -> None:
        params = vars(params) if isinstance(params, argparse.Namespace) else params
        super().log_hyperparams(without_secrets(params), *arguments, **options)  # type: ignore[safe-super]


def cleaned(logger: Logger) -> Logger:
    """Return a logger that removes credentials too."""
    if not isinstance(logger, Clean):
        kind = type(logger)
        logger.__class__ = type(kind.__name__, (Clean, kind), {"__module__": kind.__module__})
    return logger
