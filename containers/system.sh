#!/bin/sh
# Install what the image needs besides the environment: `system.sh UID`, as root, on Debian or a base with the programs.
set -eu

case "${1-}" in
  "" | 0* | *[!0-9]*)
    printf 'error: USER_ID is %s; expected a number above 0\n\nhint: docker build --build-arg USER_ID=$(id -u) ...\n' "${1-}" >&2
    exit 2
    ;;
esac

packages=""
want() { command -v "$1" >/dev/null || packages="$packages $2"; }
want tini tini
want sshd openssh-server
want git git # for receipts: which commit, which change
want gcc "gcc libc6-dev" # Triton, and so torch.compile, calls it
if [ -n "$packages" ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
  rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* # a host key in a layer would be everybody's
fi

# The account has no password, and cannot get one.
sed -i "/^lab:/d; /^[^:]*:[^:]*:$1:/d" /etc/passwd /etc/group
echo "lab:x:$1:$1:lab:/lab:/bin/sh" >>/etc/passwd
echo "lab:x:$1:" >>/etc/group
mkdir -p /lab /experiment /data
chmod 1777 /lab # a new volume gets these permissions, so any user can run the container
printf '[safe]\n\tdirectory = *\n' >>/etc/gitconfig # /experiment belongs to a user outside the container
