# shellcheck shell=bash
# Shared by the scripts of this folder: flags, and running or (with --dry-run) printing a command.
# Flags: --name NAME --zone ZONE [--project PROJECT] [--slices N] [--dry-run], and each script's own.

set -euo pipefail

NAME="" ZONE="" PROJECT="" SLICES=1 DRY_RUN=0

# The folder of the project on every host, in the home directory of whoever logs in.
# shellcheck disable=SC2034  # used by the scripts that read this file
REMOTE=t5x_audio_run

fail() {
  echo "error: $*" >&2
  exit 2
}

# wants_value FLAG [VALUE]
wants_value() {
  [ -n "${2:-}" ] || fail "$1 wants a value: see $0 --help"
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# common_flag FLAG [VALUE]: takes a flag that every script has; sets SHIFT to the words it used.
# shellcheck disable=SC2034  # SHIFT is read by the scripts
common_flag() {
  SHIFT=2
  case "$1" in
    --name) wants_value "$@"; NAME="$2" ;;
    --zone) wants_value "$@"; ZONE="$2" ;;
    --project) wants_value "$@"; PROJECT="$2" ;;
    --slices) wants_value "$@"; SLICES="$2" ;;
    --dry-run) DRY_RUN=1 SHIFT=1 ;;
    --help | -h) usage ;;
    *) fail "unknown flag $1: see $0 --help" ;;
  esac
  [[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || fail "--slices $SLICES: give a number from 1 on"
}

require() {
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || fail "--$(echo "$flag" | tr '[:upper:]_' '[:lower:]-') is required: see $0 --help"
  done
}

run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

gcloud_tpu() {
  local project=()
  [ -z "$PROJECT" ] || project=(--project "$PROJECT")
  run gcloud compute tpus "$@" --zone "$ZONE" "${project[@]}"
}

# nodes: the names of all slices, one a line.
nodes() {
  local slice
  if [ "$SLICES" = 1 ]; then
    echo "$NAME"
  else
    for ((slice = 0; slice < SLICES; slice++)); do echo "$NAME-$slice"; done
  fi
}

# on_all_hosts COMMAND: runs a shell command on every host of every slice.
on_all_hosts() {
  local node
  for node in $(nodes); do
    gcloud_tpu tpu-vm ssh "$node" --worker all --command "$1"
  done
}
