"""Files that labtrain needs besides its code: in `labtrain/assets` in a wheel, at their own paths in a clone."""

from pathlib import Path

# The same list as pyproject.toml's force-include; tests/real/project/test_template.py compares them.
SOURCES = {
    "template": "template",
    "pyproject.toml": "pyproject.toml",
    "LICENSE": "LICENSE",
    "golden/receipt.json": "tests/golden/receipt.json",
    "golden/trail.jsonl": "tests/golden/trail.jsonl",
    "requirements.lock": "requirements.lock",
    "requirements-conda.lock": "requirements-conda.lock",
    "environment.yml": "environment.yml",
    "virtual-packages.yml": "virtual-packages.yml",
    "conda-lock.yml": "conda-lock.yml",
    "environment-cpu.yml": "environment-cpu.yml",
    "conda-lock-cpu.yml": "conda-lock-cpu.yml",
    "pixi.toml": "pixi.toml",
    "pixi.lock": "pixi.lock",
    "flake.nix": "flake.nix",
    "flake.lock": "flake.lock",
    "nix": "nix",
    "containers": "containers",
    ".devcontainer": "editor/.devcontainer",
    ".vscode": "editor/.vscode",
    ".gitattributes": "editor/.gitattributes",
    "sbom.cdx.json": "sbom.cdx.json",
}
# What an experiment gets: the locks, their seal, the files that build images, and those of editors.
OWN = ("template", "golden", "pyproject.toml", "LICENSE")
LOCKS = tuple(name for name in SOURCES if name.partition("/")[0] not in OWN)


def asset(name: str) -> Path:
    """Return the path of an asset, a file or folder in SOURCES."""
    package = Path(__file__).parent
    installed = package / "assets" / name
    return installed if installed.exists() else package.parents[1] / SOURCES[name]
