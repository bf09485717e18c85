#!/bin/sh
# The entry point: runs train.py with the arguments, or a command; `jupyter` and `sshd` run only if named.
set -eu

refuse() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

[ -w "$HOME" ] || export HOME=/tmp # read-only root and no volume: caches are lost with the container
[ -w "$HOME" ] || refuse "neither /lab nor /tmp can be written" "docker run --tmpfs /tmp:exec ..."

case "${1-}" in
  jupyter)
    shift
    if [ -n "${JUPYTER_TOKEN_FILE-}" ]; then
      [ -f "$JUPYTER_TOKEN_FILE" ] && [ -r "$JUPYTER_TOKEN_FILE" ] ||
        refuse "$JUPYTER_TOKEN_FILE cannot be read by uid $(id -u)" "openssl rand -hex 32 > jupyter_token"
      JUPYTER_TOKEN=$(cat "$JUPYTER_TOKEN_FILE") # without the newline, which Jupyter would read as part of the token
    fi
    [ -n "${JUPYTER_TOKEN-}" ] ||
      refuse "jupyter wants a token, in the file JUPYTER_TOKEN_FILE or in JUPYTER_TOKEN" "openssl rand -hex 32 > jupyter_token"
    export JUPYTER_TOKEN
    exec jupyter lab --ip="${LISTEN-127.0.0.1}" --port=8888 --ServerApp.port_retries=0 --no-browser \
      --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate "$@"
    ;;
  sshd)
    shift
    keys=/run/secrets/authorized_keys
    [ -f "$keys" ] && [ -r "$keys" ] && [ -s "$keys" ] ||
      refuse "sshd wants public keys in $keys" "docker run -v ~/.ssh/id_ed25519.pub:$keys:ro ..."
    [ "$(id -u)" = "$(id -u lab)" ] ||
      refuse "sshd runs as uid $(id -u), and this image's account has uid $(id -u lab)" \
        "docker build --build-arg USER_ID=$(id -u) ..."
    host=$HOME/.sshd/ed25519
    [ -f "$host" ] || { (umask 077 && mkdir -p "$HOME/.sshd") && ssh-keygen -q -t ed25519 -N '' -C lab -f "$host"; }
    exec "$(command -v sshd)" -D -e -f /opt/labtrain/containers/sshd_config -h "$host" \
      -o "ListenAddress=${LISTEN-127.0.0.1}" -o "SetEnv=PATH=$PATH" "$@"
    ;;
  "" | -* | *=*)
    [ -f train.py ] || refuse "no train.py in $PWD" 'docker run -v "$PWD:/experiment" ...'
    exec python train.py "$@"
    ;;
esac
exec "$@"
