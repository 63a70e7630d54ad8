#!/usr/bin/env bash
# Builds the image of one commit of the project and pushes it. Name it after the commit: a job that
# is started again must find the code that it was started with.
#
#   tpu_scripts/gke/build.sh --repo URL --commit SHA
#     --image us-east5-docker.pkg.dev/PROJECT/REPOSITORY/t5x_audio:SHA [--dry-run]

source "$(dirname "$0")/../common.sh"
REPO="" COMMIT="" IMAGE=""
while [ $# -gt 0 ]; do
  case "$1" in
    --repo) wants_value "$@"; REPO="$2"; shift 2 ;;
    --commit) wants_value "$@"; COMMIT="$2"; shift 2 ;;
    --image) wants_value "$@"; IMAGE="$2"; shift 2 ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require REPO COMMIT IMAGE
run docker build --platform linux/amd64 --build-arg "REPO=$REPO" --build-arg "COMMIT=$COMMIT" \
  --tag "$IMAGE" "$(dirname "$0")"
run docker push "$IMAGE"
