"""Copy labtrain and its locks into the experiment. Any cookiecutter runs this: it needs only Python, and labtrain's files."""

import os
import re
import sys
from pathlib import Path

PYTHON = (3, 11)


def refuse(what, hint):
    sys.stderr.write("error: {}\n\nhint: {}\n".format(what, hint))
    sys.exit(2)


name = {{ cookiecutter.name | tojson }}
if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
    refuse("{!r} is not a valid name: use ASCII letters, digits, _ and -, and begin with a letter or _".format(name), "repeat the command with name=digits at its end")
if sys.version_info < PYTHON:
    refuse("cookiecutter runs on Python {}.{}, Python 3.11 or later expected".format(*sys.version_info), "pipx install --force --python python3.12 cookiecutter")

template = Path({{ cookiecutter._repo_dir | tojson }})
if not template.is_absolute():  # as typed; cookiecutter, this process's parent, has changed to this folder
    template = Path("/proc/{}/cwd".format(os.getppid())).resolve()
# In labtrain's repository its code is in src/, next to template/. In a wheel the template is in labtrain/assets/.
places = [place for place in (template.parent / "src", template.parent.parent.parent) if (place / "labtrain" / "project" / "carried.py").is_file()]
if not places:
    refuse("labtrain is not next to the template in {}".format(template), "cookiecutter REPOSITORY --directory template, with all of labtrain's repository")
sys.path.insert(0, str(places[0]))
sys.dont_write_bytecode = True

from labtrain.base.errors import LabtrainError
from labtrain.project.carried import furnish

try:
    furnish(Path.cwd())
except LabtrainError as error:
    refuse(error.args[0], error.hint)
except OSError as error:
    refuse("{}: {}".format(error.filename or Path.cwd(), error.strerror), "df '{}'".format(Path.cwd().parent))
