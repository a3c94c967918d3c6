#!/usr/bin/env bash
# Keeps a run on a worker alive after the connection that started it ends; used
# by tpu_pod.sh.
#
#   launch/worker.sh start COMMAND [ARGUMENT ...]   starts it, supervised and
#                              detached
#   launch/worker.sh logs      streams the log until the run ends
#   launch/worker.sh stop      ends the run, which saves first
#   launch/worker.sh result    prints the exit code of the run; nothing before
#                              it ends
#
# Environment: RUN_DIR, the directory of log, pid and result (default:
# $HOME/imsvd_run).
set -euo pipefail

run_dir=${RUN_DIR:-$HOME/imsvd_run}
here=$(cd "$(dirname "$0")" && pwd)

is_alive() {
  [ -f "$run_dir/pid" ] && kill -0 "$(cat "$run_dir/pid")" 2>/dev/null
}

case ${1:-} in
  start)
    shift
    if is_alive; then
      echo "error: a run is in progress on $(hostname); stop it first." >&2
      exit 2
    fi
    mkdir -p "$run_dir"
    rm -f "$run_dir/result"
    # A separate session, so that the run outlives the connection.
    # shellcheck disable=SC2016  # Expanded by the inner shell.
    setsid bash -c '
      run_dir=$1
      shift
      trap "" HUP
      "$@" &
      echo $! > "$run_dir/pid"
      wait $! && code=0 || code=$?
      echo $code > "$run_dir/result"
    ' _ "$run_dir" "$here/supervise.sh" "$@" \
      >> "$run_dir/log" 2>&1 < /dev/null &
    for ((tenth = 0; tenth < 100; tenth++)); do
      if is_alive || [ -f "$run_dir/result" ]; then
        exit 0
      fi
      sleep 0.1
    done
    echo "error: the run did not start on $(hostname)." >&2
    exit 1
    ;;
  logs)
    [ -f "$run_dir/pid" ] || {
      echo "error: no run was started on $(hostname)." >&2
      exit 2
    }
    tail --lines=50 --follow=name --pid="$(cat "$run_dir/pid")" "$run_dir/log"
    ;;
  stop)
    ! is_alive || kill -TERM "$(cat "$run_dir/pid")"
    ;;
  result)
    [ ! -f "$run_dir/result" ] || cat "$run_dir/result"
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
