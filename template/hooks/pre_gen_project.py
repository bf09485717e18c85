"""Refuse a name that is not valid as a folder and a group of runs."""

import re
import sys

name = "{{ cookiecutter.name }}"
if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
    sys.stderr.write(f"error: {name!r} is not a valid name: use ASCII letters, digits, _ and -, and begin with a letter or _\n\nhint: cookiecutter template/ name=digits\n")
    sys.exit(2)
