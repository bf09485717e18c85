"""Which drivers and GPUs run the torch of the locks: a table that was written by hand from NVIDIA's documents."""

import pytest

from labtrain.environment.doctor.verdicts import BUILDS, SOURCES, Build, of_gpu

DRIVERS = [
    ("515.105.01", (11, 7)),
    ("525.60.13", (12, 0)),
    ("525.147.05", (12, 0)),
    ("530.30.02", (12, 1)),
    ("535.183.01", (12, 2)),
    ("550.54.14", (12, 4)),
    ("570.86.15", (12, 8)),
    ("580.65.06", (13, 0)),
    ("590.44.01", (13, 1)),
]
# One letter for each driver: runs, warns, fails. R590 has no Volta. Blackwell came with R570, its later chips with
# CUDA 12.9.
WHEELS = {
    (5, 2): "fffffffff",
    (6, 1): "fffffffff",
    (7, 0): "fwwrrrrrf",
    (7, 5): "fwwrrrrrr",
    (8, 0): "fwwrrrrrr",
    (8, 6): "fwwrrrrrr",
    (8, 9): "fwwrrrrrr",
    (9, 0): "fwwrrrrrr",
    (10, 0): "ffffffrrr",
    (10, 3): "fffffffrr",
    (12, 0): "ffffffrrr",
    (12, 1): "fffffffrr",
}
TABLES = {"wheels, Nix": WHEELS, "conda": WHEELS | {(5, 2): "fwwwwwwwf", (6, 1): "fwwwwwwwf"}}


@pytest.mark.parametrize("route", TABLES)
def test_each_combination_has_its_verdict(route: str) -> None:
    for capability, wanted in TABLES[route].items():
        found = [of_gpu(driver, cuda, capability, BUILDS[route]) for driver, cuda in DRIVERS]
        assert "".join(each.result[0] for each in found) == wanted, capability
        for each in found:
            assert each.source in SOURCES
            assert bool(each.hint) == (each.result != "runs")


def test_code_that_only_the_driver_can_compile() -> None:
    """PTX: on a driver as new as the compiler it runs; on an older one it is error 222."""
    build = Build(cuda=(12, 9), architectures=("sm_90", "compute_90"))
    assert of_gpu("580.65.06", (13, 0), (12, 0), build).result == "warns"
    old = of_gpu("570.86.15", (12, 8), (12, 0), build)
    assert (old.result, "error 222" in old.why) == ("fails", True)


def test_a_cudnn_that_has_left_volta() -> None:
    build = Build(cuda=(12, 8), architectures=("sm_70",), cudnn=(9, 11, 0))
    assert (
        of_gpu("580.65.06", (13, 0), (7, 0), build).why == "cuDNN 9.11.0 has no code for 7.0; 9.10 is the last that has"
    )
