#!/usr/bin/env bash
# Installs the project on every host of a slice and starts one job on all of them. The job resumes
# from its model directory when it is started again.
#
#   tpu_scripts/launch.sh --name pod --zone us-east5-a --repo URL --commit SHA [--dry-run] -- \
#     t5x_audio.train --gin_file=gin/models/step1_130b.gin --gin_file=gin/runs/pretrain_stage1.gin \
#     --gin_file=gin/hardware/v5p.gin --gin.RUN_DIR=gs://bucket/run --model_dir=gs://bucket/run/pretrain1

source "$(dirname "$0")/common.sh"
REPO="" COMMIT=""
while [ $# -gt 0 ]; do
  case "$1" in
    --repo) REPO="${2:?--repo wants a value}"; shift 2 ;;
    --commit) COMMIT="${2:?--commit wants a value}"; shift 2 ;;
    --) shift; break ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE REPO COMMIT
[ $# -gt 0 ] || fail "no job: name it after --, e.g. -- t5x_audio.train --gin_file=..."
job="$(printf '%q ' "$@")"
setup="rm -rf t5x_audio_run && git clone -q $(printf '%q' "$REPO") t5x_audio_run && cd t5x_audio_run \
&& git checkout -q $(printf '%q' "$COMMIT") && python3 -m venv .venv && .venv/bin/pip install -q \
-r requirements.txt 'jax[tpu]'"
start="cd t5x_audio_run && nohup .venv/bin/python -m ${job}--distributed > job.log 2>&1 &"
gcloud_tpu tpu-vm ssh "$NAME" --worker all --command "$setup"
gcloud_tpu tpu-vm ssh "$NAME" --worker all --command "$start"
