#!/usr/bin/env bash
# Makes a GKE cluster without TPUs, once: with the driver that mounts buckets, the controller of
# JobSets, and access to the run's bucket for its pods. A cluster that is there is used as it is;
# one that xpk made will do (--enable-workload-identity --enable-gcsfuse-csi-driver).
#
#   tpu_scripts/gke/cluster.sh --project PROJECT --cluster CLUSTER --zone us-east5-a --bucket BUCKET
#     [--location us-east5] [--dry-run]

source "$(dirname "$0")/common.sh"
BUCKET=""
while [ $# -gt 0 ]; do
  case "$1" in
    --bucket) wants_value "$@"; BUCKET="$2"; shift 2 ;;
    *) gke_flag "$@"; shift "$SHIFT" ;;
  esac
done
require_cluster
require BUCKET
# From v0.10 on a JobSet tells failures apart by their messages (CHANGELOG of kubernetes-sigs/jobset).
JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml

# GKE docs: "Set up the Cloud Storage FUSE CSI driver for GKE" (add-on and workload pool). The
# machine of the one plain node is for JobSet's controller.
if missing clusters "$CLUSTER"; then
  gke clusters create "$CLUSTER" --node-locations "$ZONE" --num-nodes 1 \
    --machine-type e2-standard-8 --workload-pool "$PROJECT.svc.id.goog" --addons GcsFuseCsiDriver
fi
gke clusters get-credentials "$CLUSTER"
kube apply --server-side -f "$JOBSET"

# docs/authentication.md of GoogleCloudPlatform/gcs-fuse-csi-driver: the pods' service account,
# `default`, reads and writes the bucket.
number="$(run gcloud projects describe "$PROJECT" --format 'value(projectNumber)')"
if [ "$DRY_RUN" = 1 ]; then
  echo "$number"
  number=PROJECT_NUMBER
fi
pool="projects/$number/locations/global/workloadIdentityPools/$PROJECT.svc.id.goog"
run gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role roles/storage.objectUser \
  --member "principal://iam.googleapis.com/$pool/subject/ns/default/sa/default"
