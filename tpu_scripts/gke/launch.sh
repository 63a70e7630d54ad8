#!/usr/bin/env bash
# Starts one job on all hosts as a JobSet and returns; a job of that name that runs is stopped first
# and saves. Preempted, it starts again by itself and goes on from its model directory; after a crash
# too, --max-restarts times. A mistake of the user (exit code 2) ends it at once.
#
#   tpu_scripts/gke/launch.sh --name pod --project PROJECT --cluster CLUSTER --zone us-east5-a
#     --type v5p-2048 --image IMAGE --bucket BUCKET [--slices 2] [--max-restarts 20] [--dry-run] \
#     -- t5x_audio.train --gin_file=gin/models/step1_130b.gin \
#     --gin_file=gin/runs/pretrain_stage1.gin --gin_file=gin/hardware/v5p.gin \
#     --gin.RUN_DIR=/mnt/run/step1

source "$(dirname "$0")/common.sh"
IMAGE="" BUCKET="" MAX_RESTARTS=20
while [ $# -gt 0 ]; do
  case "$1" in
    --image) wants_value "$@"; IMAGE="$2"; shift 2 ;;
    --bucket) wants_value "$@"; BUCKET="$2"; shift 2 ;;
    --max-restarts) wants_value "$@"; MAX_RESTARTS="$2"; shift 2 ;;
    --) shift; break ;;
    *) gke_flag "$@"; shift "$SHIFT" ;;
  esac
done
require_cluster
require_name
require IMAGE BUCKET
slice
[[ "$MAX_RESTARTS" =~ ^[0-9]+$ ]] || fail "--max-restarts $MAX_RESTARTS: give a number from 0 on"
[ $# -gt 0 ] || fail "no job: name it after --, e.g. -- t5x_audio.train --gin_file=..."
[[ "$*" != *$'\n'* ]] || fail "the job has a line break in its flags"

# quoted TEXT: as YAML.
quoted() {
  echo "'${1//\'/\'\'}'"
}

# No shell between Kubernetes and Python: SIGTERM must reach the job. In a command Kubernetes fills in
# $(NAME), and reads $$ as one $.
command="" dollar='$'
for word in python -m "$@" --distributed; do
  command+="${command:+, }$(quoted "${word//"$dollar"/"$dollar$dollar"}")"
done

# What GKE's webhook adds tells a job who the others are: TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, of
# several slices, MEGASCALE_*; JAX reads them (jax/_src/clusters/cloud_tpu_cluster.py). Sources:
# WORKLOAD_CREATE_YAML of src/xpk/commands/workload.py (AI-Hypercomputer/xpk); "TPU Multislice" and
# "Failure policy" of jobset.sigs.k8s.io; examples/multi-nic/cloudtpu.yaml and docs/troubleshooting.md
# of GoogleCloudPlatform/gcs-fuse-csi-driver.
manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # One slice, one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    # The first that matches; anything else, a crash, restarts it too, and counts. So may a slice that
    # goes without a warning: its neighbours crash.
    rules:
      - name: badInput
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ['.*exit code 2 matching.*']
      - name: interrupted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # Bad input, and interrupted with everything saved (t5x_audio/launch.py).
              - action: FailJob
                onExitCodes: {containerName: job, operator: In, values: [2, 130]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: 'True'}]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: 'true'
                # Of the driver's container: no limits.
                gke-gcsfuse/cpu-limit: '0'
                gke-gcsfuse/memory-limit: '0'
                gke-gcsfuse/ephemeral-storage-limit: '0'
            spec:
              restartPolicy: Never
              # For saving after SIGTERM. A spot machine gives seconds, whatever stands here.
              terminationGracePeriodSeconds: 600
              # The network between slices at full speed.
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: job
                  image: $(quoted "$IMAGE")
                  command: [$command]
                  env:
                    - {name: PYTHONUNBUFFERED, value: '1'}
                    # The pod's own disk goes with it: compiled programs stay in the bucket.
                    - {name: JAX_COMPILATION_CACHE_DIR, value: /mnt/run/xla_cache}
                  securityContext: {privileged: true}
                  resources:
                    limits: {google.com/tpu: 4}
                  volumeMounts:
                    - {name: run, mountPath: /mnt/run}
              volumes:
                - name: run
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $(quoted "$BUCKET")
                      # As in tpu_scripts/setup.sh.
                      mountOptions: implicit-dirs,rename-dir-limit=100000
                      # The pod's identity in spite of hostNetwork.
                      hostNetworkPodKSA: 'true'"

# A JobSet cannot be changed. In the foreground: until its last pod has saved and gone.
kube delete jobset "$NAME" --ignore-not-found --cascade=foreground
if [ "$DRY_RUN" = 1 ]; then
  echo "$(kube apply -f -)<<'MANIFEST'"
  echo "$manifest"
  echo MANIFEST
else
  kube apply -f - <<<"$manifest"
fi
