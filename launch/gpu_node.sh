#!/usr/bin/env bash
# Trains on all GPUs of this machine, and restarts after a crash.
#
#   launch/gpu_node.sh [--dry-run] CONFIG [flags of imsvd train ...]
#   launch/gpu_node.sh configs/cifar10_r18.py --workdir=runs/cifar10
#
# One process drives all GPUs, which is fastest on one machine;
# CUDA_VISIBLE_DEVICES selects some of them. Ctrl-C or SIGTERM saves and stops;
# the same command resumes. The recipe is checked first.
#
# Environment: PYTHON, the interpreter (default: python), and the variables of
# supervise.sh.
set -euo pipefail

dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
# The trainer's flag --config=FILE is accepted too.
config=${1:-}
config=${config#--config=}
case $config in
  --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  '')
    echo "error: CONFIG is missing, a recipe file; usage: launch/gpu_node.sh" \
      "[--dry-run] CONFIG [flags of imsvd train ...], see --help." >&2
    exit 2
    ;;
  -*)
    echo "error: found $config where CONFIG is expected, a recipe file; put" \
      "flags of imsvd train after it." >&2
    exit 2
    ;;
esac
shift
python=${PYTHON:-python}
here=$(dirname "$0")
# No other process uses these GPUs: allocate most of the memory at once.
memory=XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
command=(
  env "$memory" "$here/supervise.sh"
  "$python" -m imsvd_jax.main --config="$config" "$@"
)

if [ "$dry_run" = 1 ]; then
  printf '+'
  printf ' %q' "${command[@]}"
  printf '\n'
  exit 0
fi
command -v "$python" >/dev/null || {
  echo "error: $python not found; activate the environment of the package, or" \
    "set PYTHON." >&2
  exit 2
}
# A mistake in the recipe is one line now, and not one of each restart.
JAX_PLATFORMS=cpu "$python" -m imsvd_jax.commands.check_recipe \
  --config="$config" "$@"
if ! command -v nvidia-smi >/dev/null; then
  echo "error: nvidia-smi not found; use launch/local.sh on a CPU." >&2
  exit 2
fi
# A CPU build of JAX would train slowly without any message.
"$python" -c '
import sys
import jax
if jax.default_backend() != "gpu":
  sys.exit(
    "error: JAX sees no GPU; install its CUDA build:"
    " pip install \"imsvd_jax[cuda12]\"."
  )
print(f"{jax.local_device_count()} x {jax.devices()[0].device_kind}")'
exec "${command[@]}"
