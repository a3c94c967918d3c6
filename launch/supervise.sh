#!/usr/bin/env bash
# Runs a command again until it ends well, or in a way that trying again cannot
# mend.
#
#   launch/supervise.sh COMMAND [ARGUMENT ...]
#
# What the trainer's exit codes mean here:
#   0    finished
#   2    a mistake of the user's, 3 the numbers went wrong, 130 told to stop at
#        once: the result, no new try
#   75   saved after a signal. One that came to this script ends it too;
#        otherwise a preemption notice: again, from the checkpoint
#   else a crash, or a peer that died: again, from the checkpoint
#
# Environment: RESTARTS, how often at most (100); RESTART_SECONDS, the wait
# before each (10).
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
  # A signal before the line above found no child to pass it on to.
  [ "$told_to_stop" = 0 ] || kill -TERM "$child" 2>/dev/null
  # A signal ends `wait` while the command still saves its state.
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  if [ "$told_to_stop" = 1 ]; then
    # The signal may have ended the last `wait` too: ask for the real code.
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
  echo "supervise: exit code $code; again in $wait_seconds s" \
    "(restart $((try + 1)) of $restarts)." >&2
  sleep "$wait_seconds" &
  child=$!
  wait "$child" || true
  child=
  [ "$told_to_stop" = 0 ] || exit "$code"
done
