"""Ask NVIDIA's driver through NVML (https://docs.nvidia.com/deploy/nvml-api/). No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def nvml() -> Iterator[ModuleType]:
    """Yield pynvml while the driver is open.

    Raises:
        NoDriverError: there is no driver; says why.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDriverError(str(error)) from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


class NoDriverError(Exception):
    """NVIDIA's driver is not installed, or does not answer."""


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None without one."""
    try:
        with nvml() as library:
            return str(library.nvmlSystemGetDriverVersion())
    except NoDriverError:
        return None
