import importlib.metadata
import pkgutil
import subprocess
import sys
import tomllib

import pytest

import labtrain
from tests.conftest import ROOT


def test_every_public_name_can_be_had() -> None:
    """`__all__` is complete and true."""
    assert set(labtrain.__all__) == set(labtrain._HOMES)
    assert all(getattr(labtrain, name) is not None for name in labtrain.__all__)
    assert set(labtrain.__all__) <= set(dir(labtrain))


def test_no_public_name_is_hidden_by_a_module() -> None:
    """Importing `labtrain.train`, were there such a module, would replace the function of that name."""
    assert not set(labtrain.__all__) & {module.name for module in pkgutil.iter_modules(labtrain.__path__)}


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'labtrain' has no attribute 'nothing'"):
        labtrain.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "labtrain",
        "labtrain.cli",
        "labtrain.launch.compose",
        "labtrain.launch.from_python",
        "labtrain.environment.doctor",
        "labtrain.project.new",
        "labtrain.checkpoints.locate",
    ],
)
def test_torch_is_imported_only_where_it_is_needed(module: str) -> None:
    """Seconds of import are not paid by `--help`, by errors in the configuration, or by the doctor."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_comes_from_one_place() -> None:
    """`labtrain.__version__`: the build reads it from the source, and what is installed says the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"] == {"path": "src/labtrain/__init__.py"}
    assert importlib.metadata.version("labtrain") == labtrain.__version__
