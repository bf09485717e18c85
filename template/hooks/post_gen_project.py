"""Copy the locks and the running labtrain into the experiment."""

import sys
from pathlib import Path

try:
    from labtrain.project.new import furnish
except ModuleNotFoundError:
    sys.stderr.write("error: cookiecutter cannot import labtrain\n\nhint: use the cookiecutter in labtrain's environment: .venv/bin/cookiecutter template/\n")
    sys.exit(2)

furnish(Path.cwd())
