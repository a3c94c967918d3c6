#!/usr/bin/env bash
# A run that outlives the connection that started it: tpu_pod.sh's hands on a
# worker.
#
#   launch/worker.sh start COMMAND [ARGUMENT ...]   supervised and detached
#   launch/worker.sh logs      the log, for as long as the run lives
#   launch/worker.sh stop      ends the run, which saves first
#   launch/worker.sh result    how the run ended; nothing while it lives
#
# Environment: RUN_DIR, where log, pid and result are kept ($HOME/imsvd_run).
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
      echo "error: a run is under way on $(hostname); stop it first." >&2
      exit 2
    fi
    mkdir -p "$run_dir"
    rm -f "$run_dir/result"
    # A session of its own, so that the end of the connection is not its end.
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
      echo "error: no run was started here, on $(hostname)." >&2
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
