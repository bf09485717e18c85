"""Files that labtrain needs beside its code: below `labtrain/assets` in a wheel, at their own places in a clone."""

from pathlib import Path

# The same list as pyproject.toml's force-include; tests/test_assets.py compares them.
SOURCES = {
    "template": "template",
    "requirements.lock": "requirements.lock",
    "golden/digits.json": "tests/golden/digits.json",
}


def asset(name: str) -> Path:
    """Return the path of an asset: a file or a folder of SOURCES."""
    package = Path(__file__).parent
    installed = package / "assets" / name
    return installed if installed.exists() else package.parents[1] / SOURCES[name]
