#!/usr/bin/env bash
# Restarts a command until it succeeds, or fails in a way that a restart cannot
# fix.
#
#   launch/supervise.sh COMMAND [ARGUMENT ...]
#
# The trainer's exit codes:
#   0    finished
#   2    user error, 3 numbers not finite, 130 stopped immediately: no restart
#   75   saved after a signal. A signal to this script ends it too; otherwise it
#        was a preemption notice: restart from the checkpoint
#   else a crash, or a peer that died: restart from the checkpoint
#
# Environment: RESTARTS, the maximum number of restarts (default: 100);
# RESTART_SECONDS, the wait before each restart (default: 10).
set -uo pipefail

[ $# -ge 1 ] || {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
restarts=${RESTARTS:-100}
wait_seconds=${RESTART_SECONDS:-10}

child=
told_to_stop=0
# shellcheck disable=SC2317  # Called by the trap.
pass_on() {
  told_to_stop=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

for ((try = 0; ; try++)); do
  "$@" &
  child=$!
  # A signal before the line above was not passed on, for lack of a child.
  [ "$told_to_stop" = 0 ] || kill -TERM "$child" 2>/dev/null
  # A signal ends `wait` although the command still saves its state.
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  if [ "$told_to_stop" = 1 ]; then
    # The signal may have ended the last `wait` too: get the real code.
    last=0
    wait "$child" 2>/dev/null || last=$?
    [ "$last" = 127 ] || code=$last
  fi
  child=
  case $code in
    0 | 2 | 3 | 130) exit "$code" ;;
  esac
  if [ "$told_to_stop" = 1 ] || [ "$try" -ge "$restarts" ]; then
    exit "$code"
  fi
  echo "supervise: exit code $code; starting again in $wait_seconds s" \
    "(restart $((try + 1)) of $restarts)." >&2
  sleep "$wait_seconds" &
  child=$!
  wait "$child" || true
  child=
  [ "$told_to_stop" = 0 ] || exit "$code"
done
