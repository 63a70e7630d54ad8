#!/usr/bin/env bash
# Makes one node pool a slice and waits for them; pools that are there stay. A pool of spot machines
# whose slice was taken away is filled again by GKE, and a job that waits for it goes on.
#
#   tpu_scripts/gke/create.sh --name pod --project PROJECT --cluster CLUSTER --zone us-east5-a
#     --type v5p-2048 [--topology 8x8x16] [--slices 2] [--spot | --reservation NAME] [--dry-run]

source "$(dirname "$0")/common.sh"
MORE=()
while [ $# -gt 0 ]; do
  case "$1" in
    --spot) MORE+=(--spot); shift ;;
    --reservation)
      wants_value "$@"
      MORE+=(--reservation-affinity specific --reservation "$2")
      shift 2
      ;;
    *) gke_flag "$@"; shift "$SHIFT" ;;
  esac
done
require_cluster
require_name
slice
# Flags: src/xpk/core/nodepool.py of AI-Hypercomputer/xpk and GKE docs, "TPU Multislice". A slice of
# one host has no --tpu-topology.
[ "$HOSTS" = 1 ] || MORE+=(--tpu-topology "$TOPOLOGY")
for node in $(nodes); do
  if missing node-pools "$node" --cluster "$CLUSTER"; then
    gke node-pools create "$node" --cluster "$CLUSTER" --node-locations "$ZONE" \
      --machine-type "$MACHINE" --num-nodes "$HOSTS" --workload-metadata GKE_METADATA \
      --enable-gvnic --scopes cloud-platform "${MORE[@]}"
  fi
done
