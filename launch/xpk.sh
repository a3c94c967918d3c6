#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk made.
#
#   launch/xpk.sh [--dry-run] CLUSTER TYPE IMAGE [flags of imsvd train ...]
#   launch/xpk.sh mine v5litepod-16 gcr.io/PROJECT/imsvd_jax:tpu \
#     --config=configs/imagenet_r50.py --workdir=gs://BUCKET/run
#
# IMAGE is launch/Dockerfile, built with --build-arg EXTRA=tpu and pushed. GKE
# tells JAX which processes belong together. The job is started again after a
# crash or a preemption and goes on from its checkpoint. `xpk workload list`
# shows it, `xpk workload delete` ends it.
#
# Environment: NAME, of the workload (default: imsvd); SLICES, how many (default:
# 1); RESTARTS, the maximum number of restarts (default: 100); PYTHON, the
# interpreter that checks the recipe first, if it has the package's libraries
# (default: python). xpk takes project and zone from gcloud's settings.
set -euo pipefail

dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
case ${1:-} in
  --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
missing=
names=(CLUSTER TYPE IMAGE)
for i in 0 1 2; do
  word=("${@:i+1:1}")
  if [[ -z "${word[*]}" || "${word[*]}" == --* ]]; then
    missing=${names[i]}
    break
  fi
done
[ -n "$missing" ] || [ $# -gt 3 ] || missing=--config
if [ -n "$missing" ]; then
  echo "error: $missing is missing; usage:" \
    "launch/xpk.sh [--dry-run] CLUSTER TYPE IMAGE [flags of imsvd train ...]," \
    "see --help." >&2
  exit 2
fi
cluster=$1 kind=$2 image=$3
shift 3
[[ $kind =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] || {
  echo "error: found $kind where TYPE is expected, such as v5litepod-16." >&2
  exit 2
}
[[ " $* " == *" --workdir"[=\ ]@(gs:/|)/* ]] || {
  echo "error: --workdir is missing or relative; give gs://BUCKET/DIR or a" \
    "mounted directory: a container's own disk is not kept." >&2
  exit 2
}
"$(dirname "$0")/check_recipe.sh" "$@"
command=(
  xpk workload create --cluster="$cluster" --tpu-type="$kind"
  --num-slices="${SLICES:-1}" --workload="${NAME:-imsvd}"
  --docker-image="$image" --max-restarts="${RESTARTS:-100}"
  --command="python -m imsvd_jax.main$(printf ' %q' "$@")"
)
if [ "$dry_run" = 1 ]; then
  printf '+'
  printf ' %q' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
