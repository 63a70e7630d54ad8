# Shared by the scripts of this folder: flags, and running or (with --dry-run) printing a command.
# Flags: --name NAME --zone ZONE [--project PROJECT] [--dry-run], and each script's own.

set -euo pipefail

NAME="" ZONE="" PROJECT="" DRY_RUN=0

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# common_flag FLAG [VALUE]: takes a flag that every script has; sets SHIFT to the words it used.
common_flag() {
  SHIFT=2
  case "$1" in
    --name) NAME="${2:?--name wants a value}" ;;
    --zone) ZONE="${2:?--zone wants a value}" ;;
    --project) PROJECT="${2:?--project wants a value}" ;;
    --dry-run) DRY_RUN=1 SHIFT=1 ;;
    --help | -h) usage ;;
    *) fail "unknown flag $1: see $0 --help" ;;
  esac
}

require() {
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || fail "--$(echo "$flag" | tr 'A-Z_' 'a-z_') is required: see $0 --help"
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
