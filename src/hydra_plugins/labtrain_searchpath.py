"""Add labtrain's configuration to Hydra's search path, for train.py, a notebook's `compose` and any application.

It is a plugin, because `hydra.searchpath` in the experiment would hide the groups from `--help`. Hydra finds it by the
name of its folder, which has no `__init__.py`, because other distributions put their plugins there, too.
https://hydra.cc/docs/1.3/advanced/search_path/
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LabtrainSearchPath(SearchPathPlugin):
    """Appends `pkg://labtrain.conf`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("labtrain", "pkg://labtrain.conf")
