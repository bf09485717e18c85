"""The locks: one spec, three environments.

::

    pyproject.toml ──uv──▶ requirements.lock ──▶ nix/wheels.json          the wheels that Nix fetches, one a package
                                   │
    environment.yml ─conda-lock─▶ conda-lock.yml
    virtual-packages.yml           │
                                   └──────────▶ requirements-conda.lock   what the conda lock lacks, by hash

    sbom.cdx.json seals all of them: every package of every route with its hashes (CycloneDX).

`pins` reads requirements.lock, `derive` computes the derived locks, `check` compares them, `write` writes them again.
"""

from labtrain.environment.lock.pins import PYTHON_312_LINUX, Pin, find_lock, read_lock

__all__ = ["PYTHON_312_LINUX", "Pin", "find_lock", "read_lock"]
