#!/usr/bin/env bash
# Fetches the job's log of every host into a folder, one file a host: of the start that runs or ended
# last. What came before is in Cloud Logging:
#   gcloud logging read 'resource.type="k8s_container" resource.labels.pod_name:"pod-slice-0-0-"'
#
#   tpu_scripts/gke/logs.sh --name pod --project PROJECT --cluster CLUSTER --zone us-east5-a
#     --type v5p-2048 --output logs [--slices N] [--dry-run]

source "$(dirname "$0")/common.sh"
OUTPUT=""
while [ $# -gt 0 ]; do
  case "$1" in
    --output) wants_value "$@"; OUTPUT="$2"; shift 2 ;;
    *) gke_flag "$@"; shift "$SHIFT" ;;
  esac
done
require_cluster
require_name
require OUTPUT
slice
run mkdir -p "$OUTPUT"
for ((index = 0; index < SLICES; index++)); do
  for ((host = 0; host < HOSTS; host++)); do
    file="$OUTPUT/$NAME-$index-$host.log"
    # kubectl shows the last ten lines only, unless told otherwise.
    fetch=(kube logs -l "$(host "$index" "$host")" -c job --tail=-1)
    if [ "$DRY_RUN" = 1 ]; then
      printf '%s> %q\n' "$("${fetch[@]}")" "$file"
    else
      "${fetch[@]}" >"$file"
    fi
  done
done
