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
# It gives up after three ends in a row without a new checkpoint; after each of
# them it waits twice as long. A checkpoint is new if its step is higher than
# all in the folder `checkpoints` of the command's --workdir; for gs:// this
# needs gcloud or gsutil. Where it cannot look, a try of ten minutes counts as
# progress. Code 75 always does.
#
# Environment: RESTARTS, the maximum number of restarts (default: 100);
# RESTART_SECONDS, the wait before a restart (default: 10).
set -uo pipefail

case ${1:-} in
  --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  '' | -*)
    echo "error: found ${1:-nothing} where a command is expected; usage:" \
      "launch/supervise.sh COMMAND [ARGUMENT ...], see --help." >&2
    exit 2
    ;;
esac
command -v "$1" >/dev/null || {
  echo "error: $1 is no command that can be found." >&2
  exit 2
}
restarts=${RESTARTS:-100}
wait_seconds=${RESTART_SECONDS:-10}
max_fruitless=3
for number in "$restarts" "$wait_seconds"; do
  case $number in
    '' | *[!0-9]*)
      echo "error: RESTARTS or RESTART_SECONDS is '$number'; expected a whole" \
        "number." >&2
      exit 2
      ;;
  esac
done

# Prints the directory of the run: --workdir, or runs/NAME for the recipe.
find_workdir() {
  local workdir='' config='' before='' word
  for word; do
    case $before in
      --workdir | -workdir) workdir=$word ;;
      --config | -config) config=$word ;;
    esac
    case $word in
      --workdir=* | -workdir=*) workdir=${word#*=} ;;
      --config=* | -config=*) config=${word#*=} ;;
    esac
    before=$word
  done
  if [ -z "$workdir" ] && [ -n "$config" ]; then
    local path=${config%%:*} mode=''
    [ "$path" = "$config" ] || mode=-${config#*:}
    path=${path##*/}
    workdir=runs/${path%.*}$mode
  fi
  printf '%s' "${workdir/#\~\//$HOME/}"
}

# Prints the newest checkpoint, -1 for none, or nothing if it cannot look.
newest() {
  local names
  case $workdir in
    '') return ;;
    *://*)
      if command -v gcloud >/dev/null; then
        names=$(gcloud storage ls "$workdir/checkpoints/" 2>/dev/null)
      elif command -v gsutil >/dev/null; then
        names=$(gsutil ls "$workdir/checkpoints/" 2>/dev/null)
      else
        return
      fi
      ;;
    *)
      names=$(CDPATH='' cd -- "$workdir/checkpoints" 2>/dev/null &&
        printf '%s\n' ./*)
      ;;
  esac
  printf '%s\n' -1 "$names" | sed 's:/*$::; s:.*/::' |
    grep -E '^(-1|[0-9]{1,18})$' | sort -n | tail -n 1
}

workdir=$(find_workdir "$@")
seen=$(newest)
fruitless=0

# Counts an end: $1 is the exit code, $2 how many seconds the command ran.
judge() {
  local now progress=0
  now=$(newest)
  if [ "$1" = 75 ]; then
    progress=1
  elif [ -n "$now" ]; then
    [ "$now" -le "$seen" ] || progress=1
  elif [ "$2" -ge 600 ]; then
    progress=1
  fi
  fruitless=$((progress ? 0 : fruitless + 1))
  # A bucket that does not answer seems to be empty.
  [ "$now" = -1 ] || seen=$now
}

child=
told_to_stop=0
# shellcheck disable=SC2317  # Called by the trap.
pass_on() {
  told_to_stop=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

for ((try = 0; ; try++)); do
  started=$SECONDS
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
  judge "$code" $((SECONDS - started))
  if [ "$fruitless" -ge "$max_fruitless" ]; then
    echo "supervise: exit code $code; $fruitless ends in a row without a new" \
      "checkpoint${workdir:+ in $workdir}: giving up." >&2
    exit "$code"
  fi
  [ "$told_to_stop" = 0 ] || exit "$code"
  pause=$((fruitless > 1 ? wait_seconds << (fruitless - 1) : wait_seconds))
  echo "supervise: exit code $code; starting again in $pause s" \
    "(restart $((try + 1)) of $restarts)." >&2
  sleep "$pause" &
  child=$!
  wait "$child" || true
  child=
  [ "$told_to_stop" = 0 ] || exit "$code"
done
