#!/usr/bin/env bash
# Starts one job on all hosts and returns; a job that ran there before is stopped first and saves.
# It goes on from its model directory, so starting it again is resuming it.
#
#   tpu_scripts/launch.sh --name pod --zone us-east5-a [--slices N] [--dry-run] -- t5x_audio.train \
#     --gin_file=gin/models/step1_130b.gin --gin_file=gin/runs/pretrain_stage1.gin \
#     --gin_file=gin/hardware/v5p.gin --gin.RUN_DIR=/mnt/run/step1

source "$(dirname "$0")/common.sh"
while [ $# -gt 0 ]; do
  case "$1" in
    --) shift; break ;;
    *) common_flag "$@"; shift "$SHIFT" ;;
  esac
done
require NAME ZONE
[ $# -gt 0 ] || fail "no job: name it after --, e.g. -- t5x_audio.train --gin_file=..."
job="$(printf '%q ' "$@")"
stop="if [ -f job.pid ] && kill -TERM \$(cat job.pid) 2>/dev/null; then while kill -0 \$(cat job.pid) \
2>/dev/null; do sleep 1; done; fi"
start="nohup .venv/bin/python -m ${job}--distributed >> job.log 2>&1 & echo \$! > job.pid"
on_all_hosts "cd $REMOTE && { $stop; } ; $start"
