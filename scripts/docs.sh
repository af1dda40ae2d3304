#!/usr/bin/env bash
# Usage: scripts/docs.sh [--show] [FILE.md…]      (make test-docs)
# Does what README and guide say, in a clone of what is committed, and compares what it prints with what they show:
# tests/read_docs.py. An embedded bucket is the bucket.
# Standard output: `N passed, N failed`. Exit codes: 0 all passed, 1 not.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=docs
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  need_cmd python
  rm -rf -- "$ROOT/build/docs" # what an earlier reading published would be there already
  exec "$ROOT/scripts/bucket.sh" run "$ROOT/build/docs/bucket" -- python "$ROOT/tests/read_docs.py" "$@"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
