#!/usr/bin/env bash
# Usage: [RUN_ID=name or number] scripts/status.sh
# How a run stands; without RUN_ID the newest that this checkout submitted, or, where it submitted none, of this machine.
# Standard output: number (`local`: a run of this machine), name, status, reason, with tabs between.
# Exit codes: 0 told, whatever the status, 2 no such run, 3 credential, 11 no answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=status
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/follow.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/follow.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  find_run here
  if [[ -n $LOCAL_RUN ]]; then local_state; else known_state; fi
  printf '%s\t%s\t%s\t%s\n' "${NUMBER:-local}" "$NAME" "$STATUS" "$REASON"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
