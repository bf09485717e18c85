"""Dates on which support ends, as docs/guides/upgrade.md lists them: `labtrain doctor` warns of the next one."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from labtrain.environment.doctor.report import Check, warned
from labtrain.environment.doctor.verdicts import Version, version_of

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
        then="it is the last for Maxwell, Pascal and Volta (compute capability 5.0 to 7.0)",
    ),
)


def checks(driver: str, *, today: datetime.date | None = None) -> Iterator[Check]:
    """Yield a warning for a driver that gets no updates any more.

    Args:
        driver: its version.
        today: the date; by default that of this machine.
    """
    branch: Version = version_of(driver)[:1]
    today = datetime.datetime.now(datetime.UTC).date() if today is None else today
    for cliff in CLIFFS:
        if branch[0] in cliff.drivers and cliff.ends is not None and cliff.ends < today:
            found = f"R{branch[0]}: NVIDIA ended {cliff.what} in {cliff.ends:%B %Y}"
            yield warned(GROUP, "driver support", found, "a driver that gets security updates", cliff.then)
