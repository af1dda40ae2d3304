#!/usr/bin/env bash
# Usage: scripts/clean.sh
# Removes build/ (bucket, runs, logs) and the generated test models. Nothing outside the checkout.
# Exit codes: 0 done.
set -Eeuo pipefail
shopt -s inherit_errexit

main() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  rm -rf -- "$root/build" "$root"/tests/test_models/test-*/ "$root"/tests/test_models/.staging*
  echo "clean     build/ and the generated test models are gone; .venv stays" >&2
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
