#!/usr/bin/env bash
# Fetches the job's log of every host into a folder, one file a host.
#
#   tpu_scripts/logs.sh --name pod --zone us-east5-a --hosts 256 --output logs [--slices N] [--dry-run]

source "$(dirname "$0")/common.sh"
HOSTS="" OUTPUT=""
while [ $# -gt 0 ]; do
  case "$1" in
    --hosts) wants_value "$@"; HOSTS="$2"; shift 2 ;;
    --output) wants_value "$@"; OUTPUT="$2"; shift 2 ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE HOSTS OUTPUT
[[ "$HOSTS" =~ ^[1-9][0-9]*$ ]] || fail "--hosts $HOSTS: give the number of hosts of a slice"
run mkdir -p "$OUTPUT"
for node in $(nodes); do
  for ((host = 0; host < HOSTS; host++)); do
    gcloud_tpu tpu-vm scp "$node:$REMOTE/job.log" "$OUTPUT/$node-$host.log" --worker "$host"
  done
done
