#!/usr/bin/env bash
# Installs one commit of the project on every host, and mounts the bucket of the run as a folder:
# checkpoints, caches and logs are then ordinary files under /mnt/run on all hosts.
#
#   tpu_scripts/setup.sh --name pod --zone us-east5-a --repo URL --commit SHA --bucket BUCKET
#     [--slices N] [--dry-run]

source "$(dirname "$0")/common.sh"
REPO="" COMMIT="" BUCKET=""
while [ $# -gt 0 ]; do
  case "$1" in
    --repo) wants_value "$@"; REPO="$2"; shift 2 ;;
    --commit) wants_value "$@"; COMMIT="$2"; shift 2 ;;
    --bucket) wants_value "$@"; BUCKET="$2"; shift 2 ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE REPO COMMIT BUCKET
# A checkpoint is committed by renaming its folder, which is one step in a bucket with hierarchical
# namespace only; --rename-dir-limit lets gcsfuse rename in others, file by file.
mount="command -v gcsfuse >/dev/null || { curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg \
| sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc >/dev/null && echo deb https://packages.cloud.google.com/apt \
gcsfuse-\$(lsb_release -cs) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null \
&& sudo apt-get update -q && sudo apt-get install -qy gcsfuse; } && sudo mkdir -p /mnt/run \
&& sudo chown \$(id -u) /mnt/run && { mountpoint -q /mnt/run || gcsfuse --implicit-dirs \
--rename-dir-limit 100000 $(printf '%q' "$BUCKET") /mnt/run; }"
install="rm -rf $REMOTE && git clone -q $(printf '%q' "$REPO") $REMOTE && cd $REMOTE && git checkout -q \
$(printf '%q' "$COMMIT") && python3 -m venv .venv && .venv/bin/python -m pip install -q -c \
constraints/py\$(python3 -c 'import sys; print(\"%d%d\" % sys.version_info[:2])').txt -r requirements.txt \
'jax[tpu]' && .venv/bin/python -m pip install -q --no-deps -r requirements/beam.txt"
on_all_hosts "$mount"
on_all_hosts "$install"
