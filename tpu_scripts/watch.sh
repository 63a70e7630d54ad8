#!/usr/bin/env bash
# Tells the state of the slices and the last lines of the job on the first host, every --every
# seconds, until the job has ended. Exit code 0: it is done; 1: it failed; 3: the slices are gone.
#
#   tpu_scripts/watch.sh --name pod --zone us-east5-a [--slices N] [--every 60] [--dry-run]

source "$(dirname "$0")/common.sh"
EVERY=60
while [ $# -gt 0 ]; do
  case "$1" in
    --every) wants_value "$@"; EVERY="$2"; shift 2 ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE
look="cd $REMOTE && tr '\\r' '\\n' < job.log | tail -n 3; kill -0 \$(cat job.pid) 2>/dev/null && echo RUNNING"
while true; do
  state="$(gcloud_tpu queued-resources describe "$NAME" --format 'value(state.state)' || echo UNKNOWN)"
  echo "$state"
  lines="$(gcloud_tpu tpu-vm ssh "$(nodes | head -n 1)" --worker 0 --command "$look" || true)"
  echo "$lines"
  [ "$DRY_RUN" = 0 ] || exit 0
  case "$state" in
    SUSPENDED | SUSPENDING | FAILED) exit 3 ;;
    ACTIVE)
      case "$lines" in
        *RUNNING*) ;;
        *done:*) exit 0 ;;
        ?*) exit 1 ;;
      esac
      ;;
  esac
  sleep "$EVERY"
done
