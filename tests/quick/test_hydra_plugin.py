"""Hydra finds labtrain's configuration in any process: by the plugin that each wheel of labtrain holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

from labtrain.project.carried import build_wheel
from labtrain.record.sources import in_environment

ROOT = Path(__file__).parents[2]
# As in a notebook: no train.py, and labtrain itself is not imported. `sys.path` has no clone.
NOTEBOOK = """
import sys
wheel, conf, clone = sys.argv[1:]
sys.path[:] = [wheel, *(entry for entry in sys.path if entry != clone)]
import hydra_plugins
from hydra import compose, initialize_config_dir
with initialize_config_dir(conf, version_base="1.3"):
    cfg = compose("config", overrides=["seed=7"])
assert sys.modules["hydra_plugins.labtrain_searchpath"].__file__.startswith(wheel)
assert "torch" not in sys.modules
print(cfg.seed, cfg.determinism.mode)
"""


def composed(wheel: Path, folder: Path) -> str:
    """Return what a notebook prints that has no labtrain but that of a wheel."""
    (folder / "conf").mkdir(parents=True)
    (folder / "conf" / "config.yaml").write_text("defaults: [labtrain, _self_]\nexperiment: plain\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    arguments = [str(folder / "wheel"), str(folder / "conf"), str(ROOT / "src")]
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_notebook_composes_with_what_hatchling_packs(tmp_path: Path) -> None:
    """`compose` alone finds labtrain's groups, in a process without a train.py."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert composed(wheel, tmp_path / "experiment") == "7 strict\n"


def test_a_notebook_composes_with_the_wheel_of_an_experiment(tmp_path: Path) -> None:
    """The one that `labtrain new` packs, without other distributions' plugins."""
    wheel = build_wheel(tmp_path)
    plugins = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hydra_plugins/")]
    assert sorted(plugins) == ["hydra_plugins/labtrain_parallel.py", "hydra_plugins/labtrain_searchpath.py"]
    assert composed(wheel, tmp_path / "experiment") == "7 strict\n"


def test_the_plugin_is_part_of_labtrain() -> None:
    """A training that composes one more configuration imports it: no code that was not hashed."""
    assert in_environment(str(ROOT / "src" / "hydra_plugins" / "labtrain_searchpath.py"))
