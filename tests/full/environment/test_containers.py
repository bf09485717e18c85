"""The image, built by a real Docker: more of tests/real/environment/test_containers.py."""

from tests.conftest import Experiment
from tests.support.containers import Docker, build_with_a_password

pytest_plugins = ["tests.support.containers"]


def test_a_mirrors_password_is_in_no_layer_and_no_history(docker: Docker, own_experiment: Experiment) -> None:
    """As in tests/real, by the classic builder."""
    build_with_a_password(docker, own_experiment, buildkit=False)
