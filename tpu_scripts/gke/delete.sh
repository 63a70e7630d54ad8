#!/usr/bin/env bash
# Stops the job, which saves, and deletes the node pools of its slices. What is in the bucket stays,
# and so does the cluster with its one plain node: gcloud container clusters delete.
#
#   tpu_scripts/gke/delete.sh --name pod --project PROJECT --cluster CLUSTER --zone us-east5-a
#     [--slices N] [--dry-run]

source "$(dirname "$0")/common.sh"
while [ $# -gt 0 ]; do
  gke_flag "$@"
  shift "$SHIFT"
done
require_cluster
require_name
kube delete jobset "$NAME" --ignore-not-found --cascade=foreground
for node in $(nodes); do
  gke node-pools delete "$node" --cluster "$CLUSTER" --quiet
done
