#!/usr/bin/env bash
# Usage: scripts/clean.sh
# Removes build/ (bucket, runs, logs) and the generated test models. Nothing outside the checkout.
# Exit codes: 0 done, 2 bad arguments.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=clean
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  rm -rf -- "$ROOT/build" "$ROOT"/tests/test_models/test-*/ "$ROOT"/tests/test_models/.staging*
  log clean 'build/ and the generated test models are gone; .venv stays'
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
