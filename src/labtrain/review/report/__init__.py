"""The report: one or several runs as one HTML file that loads nothing from a network. No torch.

::

    data.py      reads a run's folder: receipt, trail, history, verifications
    charts.py    the charts: curves of all runs, reduced if long, and their numbers in words
    page.py      assembles the page: page.html.j2, page.css, page.js, and all of plotly.js
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import write_atomically
from labtrain.review.report.data import read_runs
from labtrain.review.report.page import ShownVerdict, render


def write_report(
    runs: list[Path],
    output: Path,
    *,
    said: Sequence[str] = (),
    verdicts: Mapping[Path, ShownVerdict] = MappingProxyType({}),
    signers: Path | None = None,
) -> None:
    """Write the page of one or several runs; the same runs give the same bytes.

    Args:
        runs: folders of runs, or their receipts; each is compared with the first.
        output: a file ending in .html, replaced in one step.
        said: sentences above the verdicts, such as a gate's.
        verdicts: of runs that were compared just now, by folder; the rest are read from the runs' folders.
        signers: an allowed signers file: whose signed verdicts count. None: git's.

    Raises:
        ConfigError: there is no such run, a run is named twice, or the page cannot be written there.
        DamagedError: a receipt, a trail or a record of verifications is broken or was changed.
    """
    check_page(output)
    page = render(read_runs(runs, signers), said=said, verdicts=verdicts)
    try:
        write_atomically(output, page)
    except OSError as error:
        raise LabtrainError(f"{output} cannot be written: {error.strerror}", hint="-o another.html") from error


def check_page(output: Path) -> None:
    """Raise ConfigError if no page can be written to `output`."""
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"{output}: the name must end in .html", hint=f"-o {output}.html")
    if output.is_dir():
        raise ConfigError(f"{output} is a folder", hint=f"-o {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ConfigError(f"folder {output.parent} does not exist", hint=f"mkdir -p {output.parent}")
