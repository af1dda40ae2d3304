#!/usr/bin/env bash
# Usage: [RUN_ID=name or number] scripts/stop.sh
# Ends a run and waits until it has ended; `make watch` then leaves it alone. A run that has ended stays as it is.
# Standard output: the run's status. Exit codes: 0 ended, 2 no such run, 3 credential, 11 no answer or still not ended.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=stop
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/follow.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/follow.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  find_run
  local began=$SECONDS
  known_state
  # Also of a run that has ended: `make watch` would else take it for preempted.
  if [[ -n $RUN_DIR && ${DRY_RUN:-} != 1 ]]; then keep "$RUN_DIR/stopped" "$NUMBER"; fi
  if is_live "$STATUS"; then
    if [[ ${DRY_RUN:-} == 1 ]]; then
      log stop "would run: stop of run $NUMBER ($NAME)"
      return 0
    fi
    log stop "run $NUMBER ($NAME) is $STATUS; it is told to end"
    launcher_stop "$NUMBER"
    while known_state && is_live "$STATUS"; do
      ((SECONDS - began < 600)) || die 11 "run $NUMBER is still $STATUS after 600 s" 'a stopped run saves and ends' "make status RUN_ID=$NUMBER"
      log stop "$STATUS, $((SECONDS - began)) s"
      sleep "${POLL_S:-5}"
    done
  fi
  log stop "run $NUMBER ($NAME) is $STATUS${REASON:+: $REASON}; make resume RUN_ID=$NAME goes on with it"
  printf '%s\n' "$STATUS"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
