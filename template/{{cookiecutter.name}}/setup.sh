#!/bin/sh
# Create .venv; `make setup` and the images run this. It runs labtrain's wheel in vendor/, but only if the wheel's
# sha256 is the one in labtrain.lock.
set -eu
python=${PYTHON:-python3}

refuse() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

[ -f labtrain.lock ] || refuse "no labtrain.lock in $PWD" "git checkout labtrain.lock"
line=$(sed -n 's|^\./\(vendor/labtrain-[A-Za-z0-9_.+]*-py3-none-any\.whl\) --hash=sha256:\([0-9a-f]\{64\}\)$|\2  \1|p' labtrain.lock)
[ "$(printf '%s\n' "$line" | grep -c .)" = 1 ] && [ "$(grep -c . labtrain.lock)" = 1 ] ||
  refuse "labtrain.lock does not name one wheel in vendor/ with its sha256" "git checkout labtrain.lock"
wheel=${line#*  }
[ -f "$wheel" ] || refuse "$wheel is missing, which labtrain.lock names" "git checkout vendor"
sum=sha256sum
command -v sha256sum >/dev/null || sum="shasum -a 256"
printf '%s\n' "$line" | $sum -c >/dev/null 2>&1 ||
  refuse "the sha256 of $wheel is not the one in labtrain.lock: nothing of it was run" "git checkout vendor labtrain.lock"
command -v "$python" >/dev/null || refuse "$python not found, Python 3.11 to 3.13 expected" "make setup PYTHON=python3.12"
# Without -P, Python would import a file next to this one before the wheel, if it has a module's name. -P needs 3.11.
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  refuse "$python is older than Python 3.11" "make setup PYTHON=python3.12"
PYTHONPATH=$wheel exec "$python" -P -B -m labtrain.bootstrap
