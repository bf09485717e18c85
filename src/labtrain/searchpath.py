"""Puts the library's configuration on every experiment's search path.

A plugin rather than `hydra.searchpath` in the experiment: that would hide the groups from `--help`.
https://hydra.cc/docs/1.3/advanced/search_path/
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LabtrainSearchPath(SearchPathPlugin):
    """Appends `pkg://labtrain.conf`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("labtrain", "pkg://labtrain.conf")
