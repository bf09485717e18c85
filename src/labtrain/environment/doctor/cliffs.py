"""What ends when, as docs/reference/gpus.md lists it: `labtrain doctor` warns of a driver without updates."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from labtrain.environment.doctor.report import Check, warned
from labtrain.environment.doctor.verdicts import version_of

GROUP = "NVIDIA"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cliff:
    """The end of something.

    Attributes:
        what: ends.
        ends: the day; None if it has no date.
        then: what it means, and what to move to.
        drivers: the branches that it concerns; empty if none.
    """

    what: str
    ends: datetime.date | None
    then: str
    drivers: tuple[int, ...] = ()


CLIFFS = (
    Cliff(
        what="updates of driver R535",
        ends=datetime.date(2026, 6, 30),
        then="move to R580, the long-term branch",
        drivers=(515, 525, 530, 535),
    ),
    Cliff(
        what="updates of driver R580",
        ends=datetime.date(2028, 6, 30),
        then="it is the last for Maxwell, Pascal and Volta (compute capability 5.0 to 7.0): such cards need a newer one"
        " by then",
    ),
    Cliff(
        what="wheels of PyTorch for CUDA 12.8",
        ends=datetime.date(2026, 5, 13),
        then="2.12 has none. 2.11 is the last with them, 2.10 the last for a V100",
    ),
    Cliff(
        what="wheels of PyTorch for any CUDA 12",
        ends=datetime.date(2026, 10, 28),
        then="the planned day of 2.15, which has none. 2.14 is the last with them (CUDA 12.6, compute capability 5.0 to"
        " 9.0). Later wheels need driver R580 and compute capability 7.5",
    ),
    Cliff(
        what="conda-forge's PyTorch for CUDA 12.9",
        ends=None,
        then="it still exists, for compute capability 5.0 to 12.0: the route for cards before Turing",
    ),
)


def checks(driver: str, *, today: datetime.date | None = None) -> Iterator[Check]:
    """Yield a warning for a driver that gets no updates any more.

    Args:
        driver: its version.
        today: the date; by default that of this machine.
    """
    branch = version_of(driver)[:1]
    today = datetime.datetime.now(datetime.UTC).date() if today is None else today
    for cliff in CLIFFS:
        if branch[0] in cliff.drivers and cliff.ends is not None and cliff.ends < today:
            found = f"R{branch[0]} gets no updates any more: NVIDIA ended {cliff.what} in {cliff.ends:%B %Y}"
            yield warned(GROUP, "driver support", found, "a driver that gets security updates", cliff.then)
