#!/usr/bin/env bash
# Usage: RUN_ID=name or number scripts/resume.sh
# A new run that goes on from an ended one's checkpoints and MLflow run: same name, image, settings, as its run file has them.
# A run that lives is left as it is.
# Standard output: the new run's number. Exit codes: 0 done, 2 no such run or no run file here, 3 credential, 11 no answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=resume
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/create.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/create.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  find_run
  [[ -n $RUN_DIR && -s $RUN_DIR/run.yaml ]] ||
    die 2 "$NAME: its run file is not in this checkout" 'a resumed run has the image and the settings of the first' \
      "from the same revision: make submit ENV=… ALGO=… RUN_NAME=$NAME RESUME=1"
  if [[ ${DRY_RUN:-} == 1 ]]; then
    log resume "would run: unless a run named $NAME lives: $(launcher_command "$RUN_DIR/run.yaml")"
    return 0
  fi
  RESUME=1 create_once "$RUN_DIR/run.yaml" "$NAME" "$RUN_DIR"
  if [[ -n $CREATED ]]; then
    rm -f -- "$RUN_DIR/stopped"
    log resume "ok: run $NUMBER goes on with $NAME from its newest whole checkpoint"
  else
    log resume "run $NUMBER of $NAME lives: it is left as it is"
  fi
  printf '%s\n' "$NUMBER"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
