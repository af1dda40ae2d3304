#!/usr/bin/env bash
# Usage: [RUN_ID=name or number] [WATCH_MAX=5] scripts/watch.sh
# Stays with a run to its end, and submits it again when it was taken away: VESSL itself restarts nothing. Not submitted again:
# a run that completed, that a person stopped, that used up its hours, or that failed by its own fault.
#   WATCH_MAX   resubmissions at most        POLL_S   seconds between two looks (default 60)
# Standard output: the number of the run that completed. Exit codes: 0 completed, 1 or the run's own code: it is not submitted
# again, the reason is the last line; 75 WATCH_MAX is used up; 2, 3, 11 as everywhere.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=watch
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/create.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/create.bash"
# shellcheck source=scripts/lib/follow.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/follow.bash"

# again LINE…: 0 when the run may be submitted again, WHY says why or why not.
again() {
  local code own
  code=$(code_of "$@")
  own=$(printf '%s\n' "$@" | sed -nE '/FAIL  ended by a signal/d; s/.*startup +FAIL  //p' | tail -n 1 | cut -c1-300)
  if [[ -f $RUN_DIR/stopped && $(<"$RUN_DIR/stopped") == "$NUMBER" ]] ||
    [[ $STATUS == terminated && $REASON != *[Pp]reempt* ]]; then
    WHY='a person stopped it' CODE=143
    return 1
  fi
  if printf '%s\n' "$@" | grep -E '(FAIL  |stopped: )MAX_HOURS: ' >/dev/null; then # not -q: a pipe that closes early fails
    WHY='its hours are used up' CODE=75
    return 1
  fi
  CODE=${code:-1}
  case ${code:-${own:+none}} in
    75) WHY='it was told to end and saved' ;;
    11 | 12) WHY="its bucket did not answer (code $code)" ;;
    '')
      WHY="it ended without a word${REASON:+ ($REASON)}, as a preempted machine does"
      if ((ran == 0)) && [[ $REASON != *[Pp]reempt* ]]; then
        WHY="it never ran${REASON:+: $REASON}"
        return 1
      fi
      ;;
    *)
      WHY="it failed by its own fault${code:+ (code $code)}: $own"
      return 1
      ;;
  esac
}

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local most=${WATCH_MAX:-5} used=0 ran=0 WHY='' CODE=1
  local -a tail=()
  [[ $most =~ ^[0-9]{1,3}$ ]] || die 2 "WATCH_MAX=$most" 'a number of resubmissions, 0 to 999' 'WATCH_MAX=5'
  most=$((10#$most))
  find_run
  [[ -n $RUN_DIR && -s $RUN_DIR/run.yaml ]] ||
    die 2 "$NAME: its run file is not in this checkout" 'a resubmitted run has the image and the settings of the first' 'watch where it was submitted'
  log watch "run $NUMBER ($NAME), at most $most resubmissions"
  while true; do
    poll
    if ((${#FRESH[@]})); then
      tail=("${tail[@]}" "${FRESH[@]}")
      tail=("${tail[@]: -$((${#tail[@]} < 100 ? ${#tail[@]} : 100))}")
      log watch "$STATUS: ${FRESH[-1]:0:100}"
    fi
    [[ $STATUS != running ]] || ran=1
    if ((${#tail[@]})); then ran=1; fi
    if ((misses == 0)) && ! is_live "$STATUS"; then
      [[ $STATUS != completed ]] || break
      again "${tail[@]}" ||
        die "$CODE" "run $NUMBER is $STATUS: $WHY" 'only what was taken away is submitted again' "make logs RUN_ID=$NUMBER; to go on: make resume RUN_ID=$NAME"
      ((used < most)) || die 75 "run $NUMBER is $STATUS: $WHY; $used resubmissions are used up" 'WATCH_MAX bounds them' "make resume RUN_ID=$NAME"
      used=$((used + 1)) ran=0 tail=() seen_line=''
      log watch "run $NUMBER is $STATUS: $WHY; submitted again ($used of $most)"
      RESUME=1 create_once "$RUN_DIR/run.yaml" "$NAME" "$RUN_DIR"
    fi
    sleep "${POLL_S:-60}"
  done
  log watch "run $NUMBER ($NAME) completed after $used resubmissions"
  printf '%s\n' "$NUMBER"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
