#!/usr/bin/env bash
# Asks for TPU slices through queued resources and returns at once: tpu_scripts/watch.sh tells when
# they are there. Spot slices cost a fraction and can be taken away at any time (resume.sh).
#
#   tpu_scripts/create.sh --name pod --zone us-east5-a --type v5p-2048 [--slices 2] [--spot]
#     [--version v2-alpha-tpuv5] [--valid-until-duration 24h] [--dry-run]

source "$(dirname "$0")/common.sh"
TYPE="" VERSION="v2-alpha-tpuv5" MORE=()
while [ $# -gt 0 ]; do
  case "$1" in
    --type) wants_value "$@"; TYPE="$2"; shift 2 ;;
    --version) wants_value "$@"; VERSION="$2"; shift 2 ;;
    --valid-until-duration) wants_value "$@"; MORE+=("$1" "$2"); shift 2 ;;
    --spot) MORE+=(--spot); shift ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE TYPE
if [ "$SLICES" = 1 ]; then
  MORE+=(--node-id "$NAME")
else
  MORE+=(--node-count "$SLICES" --node-prefix "$NAME")
fi
gcloud_tpu queued-resources create "$NAME" --accelerator-type "$TYPE" --runtime-version "$VERSION" \
  "${MORE[@]}"
