#!/usr/bin/env bash
# Usage: scripts/train_local.sh      (make train)
# The local test: ENV=test, one device, generated test models, no bucket, no ranks; the node's own startup script.
#   ALGO      default baseline-mtp                RUN_NAME, CONFIG, RECIPE, SET="key=value …"   as everywhere
# Standard output: the path of summary.json. Standard error: the story.
# Exit codes: the table of the stages; 0 done, 2 bad input, 3 a tool is missing, 20 training failed, 75 stopped and saved.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=train
# shellcheck source=lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  need_cmd python
  cd "$ROOT"
  if [[ ${ENV:-test} != test ]]; then
    die 2 "ENV=$ENV: make train is the local test" 'it knows ENV=test only' "make minitest, or make deploy ENV=$ENV"
  fi
  choose_settings test "${ALGO:-baseline-mtp}"
  log train "test, $ALGO: one device, no bucket; models in tests/test_models"
  python tests/test_models/generate.py >&2 ||
    die 1 'the test models could not be made' 'make train works with generated models' 'python tests/test_models/generate.py'
  export ENV_MODE=test WMTP_ALGO=$ALGO LAUNCHER CONFIG RECIPE WMTP_APP_ROOT=${WMTP_APP_ROOT:-$ROOT/build/test/app}
  exec docker/vessl_startup.sh
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
