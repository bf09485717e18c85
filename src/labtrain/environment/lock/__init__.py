"""The locks: one spec, and the environments of wheels, Nix, conda and pixi.

::

    pyproject.toml ──uv──▶ requirements.lock ──▶ nix/wheels.json          the wheels that Nix fetches, one a package
                                   │
    environment.yml ─conda-lock─▶ conda-lock.yml ─────▶ pixi.toml         both conda environments, for pixi
       │  virtual-packages.yml     │    │               pixi.lock
       ▼                           │    ▼                  ▲
    environment-cpu.yml ──────────▶│ conda-lock-cpu.yml ───┘              without CUDA; else the same builds
                                   │
                                   └──────────▶ requirements-conda.lock   what the conda lock lacks, by hash

    sbom.cdx.json seals all of them: every package of every lock with its hashes (CycloneDX).

`pins` reads requirements.lock, `conda` and `pixi` read theirs, `derive` computes the derived locks, `check` compares
them, `write` writes them again, and `pylock` exports the wheels for other installers.
"""

from labtrain.environment.lock.pins import PYTHON_312_LINUX, Pin, find_lock, read_lock

__all__ = ["PYTHON_312_LINUX", "Pin", "find_lock", "read_lock"]
