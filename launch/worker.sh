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

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints when process $1 started, in clock ticks since the machine did.
start_time() {
  sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20
}

# Whether the run is there: after a crash of this machine, or a long time, its
# process number may be another program's.
is_alive() {
  local pid
  pid=$(cat "$run_dir/pid" 2>/dev/null) || return
  case $pid in '' | *[!0-9]*) return 1 ;; esac
  [ -f "$run_dir/started" ] &&
    [ "$(start_time "$pid")" = "$(cat "$run_dir/started")" ] &&
    tr '\0' ' ' 2>/dev/null < "/proc/$pid/cmdline" | grep -q supervise.sh
}

case ${1:-} in
  start) ;;
  logs | stop | result)
    [ $# = 1 ] || fail "unknown option '$2' of $1; see --help."
    ;;
  --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  *)
    fail "found ${1:-nothing}; usage: launch/worker.sh start COMMAND" \
      "[ARGUMENT ...], or logs, stop or result; see --help."
    ;;
esac

case $1 in
  start)
    shift
    case ${1:-} in
      '') fail "start needs a command, found nothing; see --help." ;;
      -*) fail "start needs a command, found $1; see --help." ;;
    esac
    ! is_alive || fail "a run is in progress on $(hostname); stop it first."
    mkdir -p "$run_dir"
    rm -f "$run_dir/result" "$run_dir/pid" "$run_dir/started"
    # A separate session, so that the run outlives the connection.
    # shellcheck disable=SC2016  # Expanded by the inner shell.
    setsid bash -c '
      run_dir=$1
      shift
      trap "" HUP
      "$@" &
      sed "s/.*) //" "/proc/$!/stat" | cut -d" " -f20 > "$run_dir/started"
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
    [ -f "$run_dir/pid" ] || fail "no run was started on $(hostname)."
    if ! is_alive; then
      tail --lines=50 "$run_dir/log"
      exit
    fi
    tail --lines=50 --follow=name --pid="$(cat "$run_dir/pid")" "$run_dir/log"
    ;;
  stop)
    if is_alive; then
      kill -TERM "$(cat "$run_dir/pid")"
    else
      echo "No run is in progress on $(hostname)." >&2
    fi
    ;;
  result)
    [ ! -f "$run_dir/result" ] || cat "$run_dir/result"
    ;;
esac
