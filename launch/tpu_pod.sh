#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs: creates or reuses the slice, installs this
# checkout on every worker, trains, streams the log, deletes the slice.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 ACTION ... \
#     [-- flags of imsvd train ...]
#
#   launch/tpu_pod.sh --name=imsvd --zone=us-west4-a --type=v5litepod-16 \
#     up install run down -- \
#     --config=configs/imagenet_r50.py --workdir=gs://BUCKET/run
#
# Actions, in the order given:
#   up       create the slice, or reuse it; a preempted slice is replaced
#   install  copy this checkout's last commit to every worker and install it
#   run      train on all workers until the run ends, and stream worker 0's log;
#            a crash restarts all workers from the checkpoint, and a preempted
#            slice is created again
#   logs     stream the log of the current run
#   stop     save and end the run; the slice stays
#   status   print the state of the slice and the last lines of the log
#   down     delete the slice
#
# Options:
#   --version=NAME   software version of the TPU VM (default: depends on --type)
#   --project=NAME   default: gcloud's project
#   --spot           cheaper, but may be preempted at any time
#   --data_dir=DIR   value of TFDS_DATA_DIR, such as gs://BUCKET/tfds
#   --dry-run        print every command instead of running it
#
# The run continues on the workers: Ctrl-C here, or a lost connection, only ends
# the stream, and `logs` resumes it. A slice costs money until `down`. The
# workdir must be on gs://: all workers share it, and it outlives the slice.
#
# The recipe is checked first, where this machine has the package's libraries.
#
# Environment: RECONNECT_SECONDS, the wait after a lost connection (default:
# 10); PYTHON, the interpreter that checks the recipe (default: python).
set -euo pipefail

RECONNECT_SECONDS=${RECONNECT_SECONDS:-10}
name='' zone='' kind='' version='' project='' spot=0 data_dir='' dry_run=0
actions=()

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
    --help | -h)
      sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
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

[ "${#actions[@]}" -gt 0 ] ||
  fail "an action is missing, such as up; usage: launch/tpu_pod.sh" \
    "--name=NAME --zone=ZONE --type=TYPE ACTION ... [-- flags], see --help."
[ -n "$name" ] || fail "--name is missing: the name of the slice."
[ -n "$zone" ] || fail "--zone is missing, such as us-west4-a."
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
for action in "${actions[@]}"; do
  if [ "$action" = up ] && [ -z "$kind" ]; then
    fail "--type is missing: the slice to create, such as v5litepod-16."
  fi
  if [ "$action" = up ] && [[ ! $kind =~ ^v[0-9]+[a-z]*-[0-9]+$ ]]; then
    fail "--type=$kind is no type of a slice; expected one such as" \
      "v5litepod-16."
  fi
  if [ "$action" = run ]; then
    [[ " ${flags[*]} " == *" --config"[=\ ][!\ ]* ]] ||
      fail "run needs flags of imsvd train after --: --config and --workdir."
    [[ " ${flags[*]} " == *" --workdir"[=\ ]gs://* ]] ||
      fail "run needs --workdir=gs://BUCKET/DIR after --; a worker's own disk" \
        "is neither shared nor kept."
    # A mistake in the recipe is one line now, and not after a slice is paid for.
    "$here/check_recipe.sh" "${flags[@]}"
  fi
done

if [[ " ${actions[*]} " == *" install "* ]] &&
  ! git -C "$root" rev-parse HEAD &>/dev/null; then
  fail "$root is no checkout of the repository, whose last commit install" \
    "copies; clone it."
fi

if [ -z "$version" ]; then
  case $kind in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version="tpu-ubuntu2204-base" ;;
  esac
fi

# Its name cannot be foreseen: others may write to /tmp too.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
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

# Runs a shell command on workers: $1 is a number, or all.
on_worker() {
  do_it "${tpu[@]}" ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# Prints READY, CREATING, PREEMPTED, ..., or nothing if there is no such slice.
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
      echo "$name already exists." >&2
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
  local archive=$scratch/imsvd_jax.tar.gz
  [ -z "$(git -C "$root" status --porcelain)" ] ||
    echo "Installing the last commit; uncommitted changes are left out." >&2
  do_it git -C "$root" archive --output="$archive" HEAD || return
  do_it "${tpu[@]}" scp "$archive" "$name:" "${where[@]}" --worker=all || return
  # The image's Python may be too old for libtpu; uv installs another one.
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
        echo "The slice is gone; creating it again." >&2
        up && install && start || return
        ;;
      *)
        echo "The connection was lost; retrying in $RECONNECT_SECONDS s." >&2
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
  # After a failure only `down` still makes sense.
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
