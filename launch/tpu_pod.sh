#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs: creates or reuses it, installs this checkout
# on every worker, runs, streams the log, tears down.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 ACTION ... \
#     [-- flags of imsvd_jax.main ...]
#
#   launch/tpu_pod.sh --name=imsvd --zone=us-west4-a --type=v5litepod-16 \
#     up install run down -- \
#     --config=configs/imagenet_r50.py --workdir=gs://BUCKET/run
#
# Actions, in the order given:
#   up       create the slice, or reuse it; one that was preempted is replaced
#   install  copy this checkout's last commit to every worker and install it
#   run      train on all workers until the run ends, and stream worker 0's log;
#            a crash restarts all workers from the checkpoint, a preempted slice
#            is created anew
#   logs     stream the log of a run that is under way
#   stop     end the run (it saves first); the slice stays
#   status   state of the slice and last lines of the log
#   down     delete the slice
#
# Options:
#   --version=NAME   software version of the TPU VM (chosen by --type)
#   --project=NAME   default: gcloud's own
#   --spot           cheaper, and may be preempted at any time
#   --data_dir=DIR   exported as TFDS_DATA_DIR, such as gs://BUCKET/tfds
#   --dry-run        print every command instead of running it
#
# The run lives on the workers: Ctrl-C here, or a lost connection, only ends the
# stream, and `logs` picks it up again. A slice costs money until `down`. The
# workdir must be on gs://, which all workers see and which outlives the slice.
#
# Environment: RECONNECT_SECONDS, the wait after a lost connection (10).
set -euo pipefail

RECONNECT_SECONDS=${RECONNECT_SECONDS:-10}
name='' zone='' kind='' version='' project='' spot=0 data_dir='' dry_run=0
actions=()

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

fail() {
  echo "error: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) kind=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --data_dir=*) data_dir=${1#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --help) usage ;;
    --)
      shift
      break
      ;;
    up | install | run | logs | stop | status | down) actions+=("$1") ;;
    *) fail "unknown option or action '$1'; see --help." ;;
  esac
  shift
done
flags=("$@")

[ "${#actions[@]}" -gt 0 ] || usage
[ -n "$name" ] || fail "--name is missing: what the slice is called."
[ -n "$zone" ] || fail "--zone is missing, such as us-west4-a."
for action in "${actions[@]}"; do
  if [ "$action" = up ] && [ -z "$kind" ]; then
    fail "--type is missing: what to create, such as v5litepod-16."
  fi
  if [ "$action" = run ]; then
    [[ " ${flags[*]} " == *" --config"[=\ ]* ]] ||
      fail "run needs the trainer's flags after --: --config and --workdir."
    [[ " ${flags[*]} " == *" --workdir"[=\ ]gs://* ]] ||
      fail "run needs --workdir=gs://BUCKET/DIR after --; a worker's own disk" \
        "is neither shared nor kept."
  fi
done

if [ -z "$version" ]; then
  case $kind in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version="tpu-ubuntu2204-base" ;;
  esac
fi

root=$(cd "$(dirname "$0")/.." && pwd)
where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
tpu=(gcloud compute tpus tpu-vm)

# Runs a command, or in a dry run prints it.
do_it() {
  if [ "$dry_run" = 1 ]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Runs a shell command on workers: all, or the number given first.
on_worker() {
  do_it "${tpu[@]}" ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# READY, CREATING, PREEMPTED, ... or nothing where there is no such slice.
state() {
  local ask=("${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)')
  if [ "$dry_run" = 1 ]; then
    do_it "${ask[@]}" >&2
  else
    "${ask[@]}" 2>/dev/null || true
  fi
}

up() {
  case $(state) in
    READY)
      echo "$name is there already." >&2
      return
      ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED)
      echo "$name was preempted or stopped; replacing it." >&2
      down || return
      ;;
  esac
  local options=(--accelerator-type="$kind" --version="$version")
  [ "$spot" = 0 ] || options+=(--spot)
  do_it "${tpu[@]}" create "$name" "${where[@]}" "${options[@]}"
}

install() {
  local archive=/tmp/imsvd_jax.tar.gz
  [ -z "$(git -C "$root" status --porcelain)" ] ||
    echo "Installing the last commit: what is not committed stays here." >&2
  do_it git -C "$root" archive --output="$archive" HEAD || return
  do_it "${tpu[@]}" scp "$archive" "$name:" "${where[@]}" --worker=all || return
  # The image's own Python may be too old for libtpu: uv brings one.
  on_worker all "set -e
export PATH=\$HOME/.local/bin:\$PATH
rm -rf imsvd_jax && mkdir imsvd_jax
tar --extract --gzip --file=imsvd_jax.tar.gz --directory=imsvd_jax
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[ -d venv ] || uv venv --quiet --python=3.12 venv
uv pip install --quiet --python=venv/bin/python -e './imsvd_jax[tpu]'"
}

# Starts the run on every worker, supervised and detached.
start() {
  local command=(../venv/bin/python -m imsvd_jax.main "${flags[@]}")
  [ -z "$data_dir" ] ||
    command=(env "TFDS_DATA_DIR=$data_dir" "${command[@]}")
  on_worker all "cd imsvd_jax && launch/worker.sh start$(
    printf ' %q' "${command[@]}"
  )"
}

logs() {
  on_worker 0 'imsvd_jax/launch/worker.sh logs'
}

result() {
  on_worker 0 'imsvd_jax/launch/worker.sh result'
}

run() {
  start || return
  while :; do
    logs || true
    local code
    if [ "$dry_run" = 1 ]; then
      result
      return
    fi
    code=$(result 2>/dev/null) || code=''
    if [ -n "$code" ]; then
      echo "The run ended with code $code." >&2
      return "$code"
    fi
    case $(state) in
      PREEMPTED | TERMINATED | FAILED | '')
        [ -n "$kind" ] || fail "the slice is gone; --type says what to create."
        echo "The slice is gone; creating it anew." >&2
        up && install && start || return
        ;;
      *)
        echo "The connection was lost; again in $RECONNECT_SECONDS s." >&2
        sleep "$RECONNECT_SECONDS"
        ;;
    esac
  done
}

stop() {
  # The supervisor passes the signal on and waits until the state is saved.
  on_worker all 'imsvd_jax/launch/worker.sh stop'
}

status() {
  state
  on_worker 0 'tail --lines=5 imsvd_run/log; imsvd_jax/launch/worker.sh result'
}

down() {
  do_it "${tpu[@]}" delete "$name" "${where[@]}" --quiet
}

code=0
for action in "${actions[@]}"; do
  # After something failed only `down` still makes sense.
  [ "$code" = 0 ] || [ "$action" = down ] || continue
  case $action in
    up) up || code=$? ;;
    install) install || code=$? ;;
    run) run || code=$? ;;
    logs) logs || code=$? ;;
    stop) stop || code=$? ;;
    status) status || code=$? ;;
    down) down || code=$? ;;
  esac
done
exit "$code"
