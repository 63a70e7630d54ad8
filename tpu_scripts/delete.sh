#!/usr/bin/env bash
# Deletes the slices and their queued resource; what is in the bucket stays.
#
#   tpu_scripts/delete.sh --name pod --zone us-east5-a [--dry-run]

source "$(dirname "$0")/common.sh"
while [ $# -gt 0 ]; do
  common_flag "$@"
  shift "$SHIFT"
done
require NAME ZONE
gcloud_tpu queued-resources delete "$NAME" --force --quiet
