#!/usr/bin/env bash
# Tells the state of the job, how often it was started again, and the last lines of its first host,
# every --every seconds, until the job has ended. Exit code 0: it is done; 1: it failed; 3: there is
# no such job.
#
#   tpu_scripts/gke/watch.sh --name pod --project PROJECT --cluster CLUSTER --zone us-east5-a
#     [--every 60] [--dry-run]

source "$(dirname "$0")/common.sh"
EVERY=60
while [ $# -gt 0 ]; do
  case "$1" in
    --every) wants_value "$@"; EVERY="$2"; shift 2 ;;
    *) gke_flag "$@"; shift "$SHIFT" ;;
  esac
done
require_cluster
require_name
while true; do
  state="$(kube get jobset "$NAME" --ignore-not-found \
    -o 'jsonpath=state={.status.terminalState} restarts={.status.restarts}' || echo UNKNOWN)"
  echo "$state"
  kube logs -l "$(host 0 0)" -c job --tail=3 || true
  [ "$DRY_RUN" = 0 ] || exit 0
  case "$state" in
    state=Completed*) exit 0 ;;
    state=Failed*) exit 1 ;;
    "") exit 3 ;;
  esac
  sleep "$EVERY"
done
