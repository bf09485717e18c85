"""Which drivers and GPUs run the torch of the locks: a table that was written by hand from NVIDIA's documents."""

import datetime

import pytest

from labtrain.environment.doctor import cliffs, nvidia
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
    (10, 3): "fffffffww",
    (12, 0): "ffffffrrr",
    (12, 1): "fffffffww",
}
# Triton's assembler in the wheels is of CUDA 12.8, and knows neither 10.3 nor 12.1; conda-forge's is of 12.9.
CONDA = {(5, 2): "fwwwwwwwf", (6, 1): "fwwwwwwwf", (10, 3): "fffffffrr", (12, 1): "fffffffrr"}
TABLES = {"wheels, Nix": WHEELS, "conda": WHEELS | CONDA}


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


def test_code_for_one_card_alone() -> None:
    """sm_100a runs on 10.0, and not on 10.3."""
    build = Build(cuda=(12, 8), architectures=("sm_90", "sm_100a"))
    assert [build.has_code(each) for each in ((9, 0), (10, 0), (10, 3))] == [True, True, False]


@pytest.mark.parametrize(("driver", "warns"), [("535.183.01", True), ("570.86.15", True), ("580.65.06", False),
                                               ("590.44.01", True), ("595.10.01", False), ("625.1", False)])  # fmt: skip
def test_a_driver_branch_without_updates_is_told(driver: str, warns: bool) -> None:
    """By NVIDIA's list of September 2026: R580, R595 and R620; nothing is known of later ones."""
    assert bool(list(cliffs.checks(driver, today=datetime.date(2026, 12, 1)))) == warns
    assert bool(list(cliffs.checks("595.10.01", today=datetime.date(2027, 4, 1))))


def test_what_ends_is_in_the_order_of_the_days_and_what_is_over_is_marked() -> None:
    lines = list(cliffs.shown_ends(today=datetime.date(2026, 12, 1)))
    assert len(lines) == len(cliffs.CLIFFS)
    assert [line[:10] for line in lines[:-1]] == sorted(line[:10] for line in lines[:-1])
    assert [", over: " in line for line in lines] == [True, True, True, False, False, False]
    assert lines[-1].startswith("no date: conda-forge")


def test_the_plan_of_an_upgrade_tells_the_end_for_each_card_without_asking_torch() -> None:
    """Of two cards under R550: the driver, its updates and the last PyTorch for each; not memory, use or P2P."""
    card = {"error": "", "name": "card", "memory_bytes": 0, "modes": {}, "processes": []}
    gpus = [
        {**card, "index": 0, "uuid": "a", "capability": [7, 0]},
        {**card, "index": 1, "uuid": "b", "capability": [8, 9]},
    ]
    facts = {"driver": "550.54.14", "cuda": 12040, "gpus": gpus, "without_p2p": [], "errors": []}
    found = {each.name: each.found for each in nvidia.check_ends(facts)}
    assert list(found) == ["driver", "driver support", "GPU 0 later", "GPU 1 later"]
    assert found["GPU 1 later"].startswith(
        "PyTorch 2.14 is the last with wheels (CUDA 12.6) for compute capability 8.9"
    )
    assert [each.status for each in nvidia.check_ends({"no_driver": "none"})] == ["skipped"]
