#!/usr/bin/env bash
# Usage: [RUN_ID=name or number] [TAIL=200] [FOLLOW=1] scripts/logs.sh
# The last lines of a run's log, through a pager on a terminal. FOLLOW=1 stays until the run ends, also while it is still
# initialising; Ctrl-C leaves the run alone. Of a run of this machine: the last lines of its log.txt, and no FOLLOW.
#   POLL_S   seconds between two looks (default 10)
# Standard output: the lines. Exit codes: 0 told (FOLLOW: completed), 1 the followed run failed, 2 no such run, 3, 11.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=logs
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/follow.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/follow.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local tail=${TAIL:-200} text
  [[ $tail =~ ^[1-9][0-9]{0,4}$ && $tail -le 10000 ]] || die 2 "TAIL=$tail" '1 to 10000 lines' 'TAIL=200'
  find_run here
  [[ -z $LOCAL_RUN || ${FOLLOW:-} != 1 ]] || die 2 "$NAME is a run of this machine: its lines are on the terminal that runs it" \
    'FOLLOW=1 follows a run that was submitted' "make monitor RUN_ID=$NAME FOLLOW=1"
  if [[ ${FOLLOW:-} != 1 ]]; then
    if [[ -n $LOCAL_RUN ]]; then
      text=$(tail -n "$tail" "$LOCAL_RUN/log.txt" 2>/dev/null || true)
      local_state
    else
      text=$(launcher_logs "$NUMBER" "$tail")
      state_of || true
    fi
    if [[ -z $text ]]; then
      log logs "run ${NUMBER:-of this machine} ($NAME) is ${STATUS:-not known}${REASON:+: $REASON}; it has written nothing so far${NUMBER:+ (FOLLOW=1 waits for it)}"
    elif [[ -t 1 && -n $(command -v less) ]]; then
      less -FRX +G <<<"$text"
    else
      printf '%s\n' "$text"
    fi
    return 0
  fi
  log logs "run $NUMBER ($NAME); Ctrl-C leaves it running"
  local before=''
  while true; do
    poll
    if ((${#FRESH[@]})); then printf '%s\n' "${FRESH[@]}"; fi
    if [[ $STATUS != "$before" ]]; then log logs "run $NUMBER is $STATUS${REASON:+: $REASON}"; fi
    before=$STATUS
    is_live "$STATUS" || ((misses)) || break
    sleep "${POLL_S:-10}"
  done
  [[ $STATUS == completed ]] || die 1 "run $NUMBER is $STATUS${REASON:+: $REASON}" 'a followed run ends well' "make resume RUN_ID=$NAME"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
