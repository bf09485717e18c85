"""The whole environment, built by Nix."""

import json
import shutil
from pathlib import Path

from tests.support.nix import Nix

pytest_plugins = ["tests.support.nix"]


def test_the_whole_environment(nix: Nix, repository: Path, tmp_path: Path) -> None:
    """Every locked file for this Python; torch multiplies, doctor finds nothing wrong, and the golden run is golden."""
    target = tmp_path / "repository"
    shutil.copytree(repository, target)
    (target / "nix/wheels.json").write_text(json.dumps(nix.download()))
    nix.git(target)
    nix("build", ".#env", "--out-link", str(nix.folder / "whole"), cwd=target)
    code = (
        "import torch; a = torch.arange(6.).reshape(2, 3)\n"
        "print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), (a @ a.T).tolist())"
    )
    printed = nix("develop", "-c", "python", "-c", code, cwd=target)
    print(printed)
    assert printed.startswith("2.9.1")
    assert printed.endswith("[[5.0, 14.0], [14.0, 50.0]]\n")
    judged = json.loads(nix("run", ".#labtrain", "--", "doctor", "--json", cwd=target))
    assert not [one for one in judged if one["status"] == "failed"]
    demo = nix("run", ".#labtrain", "--", "demo", cwd=target)
    print(demo)
    assert "4 ways, one digest: the golden one" in demo.splitlines()
