#!/usr/bin/env bash
# Asks for a TPU slice through queued resources and waits for nothing: see its state with
# `gcloud compute tpus queued-resources describe`.
#
#   tpu_scripts/create.sh --name pod --zone us-east5-a --type v5p-256 [--version v2-alpha-tpuv5] [--spot] [--dry-run]

source "$(dirname "$0")/common.sh"
TYPE="" VERSION="v2-alpha-tpuv5" SPOT=()
while [ $# -gt 0 ]; do
  case "$1" in
    --type) TYPE="${2:?--type wants a value}"; shift 2 ;;
    --version) VERSION="${2:?--version wants a value}"; shift 2 ;;
    --spot) SPOT=(--spot); shift ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE TYPE
gcloud_tpu queued-resources create "$NAME" --node-id "$NAME" --accelerator-type "$TYPE" \
  --runtime-version "$VERSION" "${SPOT[@]}"
