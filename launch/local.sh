#!/usr/bin/env bash
# Trains with N processes on this machine over loopback, like a pod.
#
#   launch/local.sh [--dry-run] N CONFIG [flags of imsvd train ...]
#   launch/local.sh 2 configs/digits.py --workdir=runs/two
#
# With N GPUs or more, each process gets its own GPU; set JAX_PLATFORMS=cpu to
# use the CPU. If one process fails, the script ends the others and returns its
# exit code. Ctrl-C and SIGTERM reach every process, which may then save a
# checkpoint; the same command resumes.
#
# Environment: PYTHON, the interpreter (default: python).
set -euo pipefail

dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
count=${1:-} config=${2:-}
# The trainer's flag --config=FILE is accepted too.
config=${config#--config=}
case $count in
  --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  -*)
    echo "error: unknown option $count; see --help." >&2
    exit 2
    ;;
esac
if [ -z "$count" ] || [ -z "$config" ]; then
  echo "error: N or CONFIG is missing, the number of processes and a recipe;" \
    "usage: launch/local.sh [--dry-run] N CONFIG [flags of imsvd train ...]," \
    "see --help." >&2
  exit 2
fi
shift 2
case $count in
  '' | *[!0-9]* | 0)
    echo "error: $count is not a number of processes; expected 1 or more." >&2
    exit 2
    ;;
esac
case $config in
  -*)
    echo "error: found $config where CONFIG is expected, a recipe file; put" \
      "flags of imsvd train after it." >&2
    exit 2
    ;;
esac
python=${PYTHON:-python}
command -v "$python" >/dev/null || {
  echo "error: $python not found; activate the environment of the package, or" \
    "set PYTHON." >&2
  exit 2
}

port=$("$python" -c '
import socket
with socket.socket() as probe:
  probe.bind(("127.0.0.1", 0))
  print(probe.getsockname()[1])')

gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi

pids=()

# Sends a signal to every running process.
signal_all() {
  for pid in "${pids[@]}"; do
    kill "-$1" "$pid" 2>/dev/null || true
  done
}

# Ends every process: SIGTERM first, SIGKILL after $1 seconds.
end_all() {
  signal_all TERM
  for ((tenth = 0; tenth < $1 * 10; tenth++)); do
    [ -n "$(jobs -rp)" ] || return 0
    sleep 0.1
  done
  signal_all KILL
}

stopping=0
# shellcheck disable=SC2317  # Called by the trap.
stop() {
  if [ "$stopping" = 1 ]; then
    signal_all KILL
  else
    stopping=1
    signal_all TERM
  fi
}
trap stop INT TERM

for ((process = 0; process < count; process++)); do
  environment=()
  if [ "$gpus" -ge "$count" ]; then
    environment=("CUDA_VISIBLE_DEVICES=$process")
  fi
  # A separate session: Ctrl-C then arrives once, from this script.
  command=(
    env "${environment[@]}" PYTHONUNBUFFERED=1 setsid "$python"
    -m imsvd_jax.main --config="$config"
    --coordinator_address="127.0.0.1:$port"
    --num_processes="$count" --process_id="$process" "$@"
  )
  if [ "$dry_run" = 1 ]; then
    printf '+'
    printf ' %q' "${command[@]}"
    printf '\n'
    continue
  fi
  "${command[@]}" \
    > >(sed -u "s/^/[$process] /") 2> >(sed -u "s/^/[$process] /" >&2) &
  pids+=($!)
done

[ "$dry_run" = 0 ] || exit 0
result=0
left=$count
while [ "$left" -gt 0 ]; do
  code=0
  wait -n || code=$?
  # A trapped signal also ends `wait`, although no process has ended.
  running=$(jobs -rp | wc -l)
  if [ "$running" = "$left" ]; then
    continue
  fi
  left=$running
  if [ "$code" != 0 ] && [ "$result" = 0 ]; then
    result=$code
    if [ "$stopping" = 0 ]; then
      echo "launch/local.sh: a process ended with code $code; ending all." >&2
      end_all 5
    fi
  fi
done
exit "$result"
