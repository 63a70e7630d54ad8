# shellcheck shell=bash
# Shared by the scripts of this folder: what tpu_scripts/common.sh has, one GKE cluster, and what a
# slice is there.
# Flags: those of tpu_scripts/common.sh, --cluster CLUSTER [--location LOCATION] (of the cluster: by
# default the region of --zone), and for some --type TYPE [--topology AxBxC].

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

CLUSTER="" LOCATION="" TYPE="" TOPOLOGY=""

# gke_flag FLAG [VALUE]: common_flag, with the flags that only GKE has.
gke_flag() {
  # shellcheck disable=SC2034  # read by the scripts
  SHIFT=2
  case "$1" in
    --cluster) wants_value "$@"; CLUSTER="$2" ;;
    --location) wants_value "$@"; LOCATION="$2" ;;
    --type) wants_value "$@"; TYPE="$2" ;;
    --topology) wants_value "$@"; TOPOLOGY="$2" ;;
    *) common_flag "$@" ;;
  esac
}

# The cluster is named in every command: what kubectl points to by itself may change meanwhile.
require_cluster() {
  require PROJECT CLUSTER ZONE
  LOCATION="${LOCATION:-${ZONE%-*}}"
}

# Names of node pools (40 letters) and of pods (63) start with that of the job.
require_name() {
  require NAME
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,34}[a-z0-9])?$ ]] ||
    fail "--name $NAME: up to 36 small letters, digits and dashes, a letter first"
}

gke() {
  run gcloud container "$@" --project "$PROJECT" --location "$LOCATION"
}

# missing RESOURCE...: whether GKE does not have it yet; a dry run asks nothing and prints all.
missing() {
  [ "$DRY_RUN" = 1 ] || ! gke "$1" describe "${@:2}" >/dev/null 2>&1
}

# The context is what `gcloud container clusters get-credentials` calls it (cluster.sh).
kube() {
  run kubectl --context "gke_${PROJECT}_${LOCATION}_${CLUSTER}" "$@"
}

# host SLICE HOST: selects the pod of one host, by labels that JobSet and Kubernetes set
# (api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset).
host() {
  echo "jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=$1,\
batch.kubernetes.io/job-completion-index=$2"
}

# slice: from TYPE sets ACCELERATOR, MACHINE, TOPOLOGY for want of one, and HOSTS, of 4 chips each.
# Names and usual shapes: src/xpk/core/system_characteristics.py of AI-Hypercomputer/xpk. As for
# create.sh of TPU VMs the number of v4 and v5p counts cores, two a chip.
# shellcheck disable=SC2034  # read by the scripts
slice() {
  require TYPE
  local number cores=1 shape shapes="2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  [[ "$TYPE" =~ ^(v4|v5p|v5e|v5litepod|v6e)-([1-9][0-9]*)$ ]] ||
    fail "--type $TYPE: give v4-N or v5p-N (N cores), v5litepod-N or v6e-N (N chips), e.g. v5p-2048"
  number="${BASH_REMATCH[2]}"
  case "${BASH_REMATCH[1]}" in
    v4) ACCELERATOR=tpu-v4-podslice MACHINE=ct4p-hightpu-4t cores=2 ;;
    v5p) ACCELERATOR=tpu-v5p-slice MACHINE=ct5p-hightpu-4t cores=2 ;;
    v6e) ACCELERATOR=tpu-v6e-slice MACHINE=ct6e-standard-4t ;;
    *) ACCELERATOR=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-4t ;;
  esac
  [ "$cores" = 1 ] || shapes="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
  if [ -z "$TOPOLOGY" ]; then
    for shape in $shapes; do
      [ "$((cores * ${shape//x/*}))" != "$number" ] || TOPOLOGY="$shape"
    done
    [ -n "$TOPOLOGY" ] || fail "--type $TYPE: no usual shape; name one of whole hosts by --topology"
  fi
  [[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology $TOPOLOGY: write AxB or AxBxC, e.g. 8x8x16"
  HOSTS=$((${TOPOLOGY//x/*} / 4))
  [ "$((cores * ${TOPOLOGY//x/*}))" = "$number" ] && [ $((4 * HOSTS)) = "$((${TOPOLOGY//x/*}))" ] ||
    fail "--topology $TOPOLOGY: not as many chips as $TYPE, or not whole hosts of 4 chips"
  [ "$SLICES" = 1 ] || [ "$HOSTS" != 1 ] || fail "--slices $SLICES: GKE joins no slices of one host"
}
