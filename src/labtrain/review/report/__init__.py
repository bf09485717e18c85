"""A report: one or several runs as one HTML file that asks no network for anything. No torch.

::

    data.py      reads a run's folder: receipt, trail, history, verifications
    charts.py    what is drawn: curves over each other, reduced where they are long, and their numbers in words
    page.py      puts the page together: page.html.j2, page.css, page.js, and plotly.js whole
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import write_atomically
from labtrain.review.report.data import read_runs
from labtrain.review.report.page import Verdict, render


def write_report(
    runs: list[Path],
    output: Path,
    *,
    said: Sequence[str] = (),
    verdicts: Mapping[Path, Verdict] = MappingProxyType({}),
    signers: Path | None = None,
) -> None:
    """Write the page of one or several runs; the same runs give the same bytes.

    Args:
        runs: folders of runs, or their receipts; the others are held against the first.
        output: a file ending in .html, replaced in one step.
        said: sentences that stand before the verdicts, such as a gate's.
        verdicts: of runs that were compared just now, by their folders; the others' are in what they left.

        signers: an allowed signers file: whose signed verdicts count. None: git's.

    Raises:
        ConfigError: there is no such run, one is named twice, or the page cannot lie there.
        DamagedError: a receipt, a trail or a record of verifications is broken, or was changed.
    """
    check_page(output)
    page = render(read_runs(runs, signers), said=said, verdicts=verdicts)
    try:
        write_atomically(output, page)
    except OSError as error:
        raise LabtrainError(f"{output} cannot be written: {error.strerror}", hint="-o another.html") from error


def check_page(output: Path) -> None:
    """Refuse a place where no page can be written.

    Raises:
        ConfigError: says why.
    """
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"{output} is no name of a page: wanted one that ends in .html", hint=f"-o {output}.html")
    if output.is_dir():
        raise ConfigError(f"{output} is a folder", hint=f"-o {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent} is no folder: the page cannot lie there", hint=f"mkdir -p {output.parent}")
