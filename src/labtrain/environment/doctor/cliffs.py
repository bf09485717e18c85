"""What ends when, as docs/reference/gpus.md lists it: `labtrain doctor` warns of a driver without updates."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from labtrain.environment.doctor.report import Check, warned
from labtrain.environment.doctor.verdicts import NEWER_DRIVER, version_of

GROUP = "NVIDIA"
# Driver branches with updates, and their ends: NVIDIA, Data Center Drivers R620 (2026-09), Supported Drivers and CUDA
# Toolkit Versions. R580 and R620 are long-term branches.
BRANCHES = {580: datetime.date(2028, 6, 30), 595: datetime.date(2027, 3, 31), 620: datetime.date(2029, 9, 30)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cliff:
    """The end of something.

    Attributes:
        what: ends.
        ends: the day; None if it has no date.
        then: what it means, and what to move to.
    """

    what: str
    ends: datetime.date | None
    then: str


CLIFFS = (
    Cliff(
        what="updates of driver R535",
        ends=datetime.date(2026, 6, 30),
        then="move to R580, a long-term branch that runs every card of these tables",
    ),
    Cliff(
        what="updates of driver R595",
        ends=datetime.date(2027, 3, 31),
        then="move to R620, a long-term branch until September 2029; R580 for cards before Turing",
    ),
    Cliff(
        what="updates of driver R580",
        ends=datetime.date(2028, 6, 30),
        then="it is the last driver for Maxwell, Pascal and Volta (compute capability 5.0 to 7.0). After that day these"
        " cards have no driver with updates",
    ),
    Cliff(
        what="wheels of PyTorch for CUDA 12.8",
        ends=datetime.date(2026, 5, 13),
        then="2.12 has none for CUDA 12.8. 2.11 is the last with them, 2.10 the last of these for a V100",
    ),
    Cliff(
        what="wheels of PyTorch for any CUDA 12",
        ends=datetime.date(2026, 10, 28),
        then="2.15 has none. 2.14 is the last with them: CUDA 12.6, for compute capability 5.0 to 9.0, a V100 included."
        " Later wheels need driver R580 and compute capability 7.5",
    ),
    Cliff(
        what="conda-forge's PyTorch for CUDA 12.9",
        ends=None,
        then="no end is announced. It has code for compute capability 5.0 to 12.0, so cards before Turing can move to"
        " it",
    ),
)


def shown_ends(*, today: datetime.date | None = None) -> Iterator[str]:
    """Yield what ends when, a line each, in the order of the days.

    Args:
        today: the date; by default that of this machine.
    """
    today = datetime.datetime.now(datetime.UTC).date() if today is None else today
    for cliff in sorted(CLIFFS, key=lambda each: each.ends or datetime.date.max):
        day = f"{cliff.ends:%Y-%m-%d}" if cliff.ends else "no date"
        yield f"{day}{', over' if cliff.ends and cliff.ends < today else ''}: {cliff.what}; {cliff.then}"


def checks(driver: str, *, today: datetime.date | None = None) -> Iterator[Check]:
    """Yield a warning for a driver that gets no updates any more.

    Args:
        driver: its version.
        today: the date; by default that of this machine.
    """
    branch = version_of(driver)[0]
    today = datetime.datetime.now(datetime.UTC).date() if today is None else today
    if branch > max(BRANCHES) or BRANCHES.get(branch, datetime.date.min) >= today:
        return
    listed = ", ".join(f"R{number} (until {ends:%B %Y})" for number, ends in BRANCHES.items() if ends >= today)
    found = f"NVIDIA does not list R{branch} among the branches that get updates: {listed or 'all have ended'}"
    yield warned(GROUP, "driver support", found, "a driver that gets security updates", NEWER_DRIVER)
