#!/usr/bin/env bash
# Sees a job through preemptions: waits for the slices, sets them up, launches the job, watches it,
# and when the slices are taken away asks for new ones and starts over. The job itself goes on from
# its last checkpoint. Ends when the job does, with its exit code.
#
#   tpu_scripts/resume.sh --name pod --zone us-east5-a --type v5p-2048 --repo URL --commit SHA
#     --bucket BUCKET [--slices N] [--spot] [--every 60] [--dry-run] -- t5x_audio.train --gin_file=...

source "$(dirname "$0")/common.sh"
HERE="$(dirname "$0")" EVERY=60 CREATE=() SETUP=() COMMON=()
while [ $# -gt 0 ]; do
  case "$1" in
    --type | --version | --valid-until-duration) wants_value "$@"; CREATE+=("$1" "$2"); shift 2 ;;
    --spot) CREATE+=(--spot); shift ;;
    --repo | --commit | --bucket) wants_value "$@"; SETUP+=("$1" "$2"); shift 2 ;;
    --every) wants_value "$@"; EVERY="$2"; shift 2 ;;
    --) shift; break ;;
    *) common_flag "$@"; COMMON+=("${@:1:$SHIFT}"); shift "$SHIFT" ;;
  esac
done
require NAME ZONE
[ $# -gt 0 ] || fail "no job: name it after --, e.g. -- t5x_audio.train --gin_file=..."

state() {
  gcloud_tpu queued-resources describe "$NAME" --format 'value(state.state)' 2>/dev/null || echo NONE
}

create() {
  "$HERE/create.sh" "${COMMON[@]}" "${CREATE[@]}"
}

while true; do
  found="$(state)"
  case "$found" in
    ACTIVE) ;;
    gcloud*) echo "$found"; create ;; # printed, not run: one round is shown
    *)
      # What was taken away or given up while it was waited for is asked for again.
      case "$found" in
        NONE) create ;;
        SUSPENDED | FAILED) "$HERE/delete.sh" "${COMMON[@]}"; create ;;
      esac
      sleep "$EVERY"
      continue
      ;;
  esac
  "$HERE/setup.sh" "${COMMON[@]}" "${SETUP[@]}"
  "$HERE/launch.sh" "${COMMON[@]}" -- "$@"
  code=0
  "$HERE/watch.sh" "${COMMON[@]}" --every "$EVERY" || code=$?
  [ "$code" = 3 ] || exit "$code"
done
