#!/usr/bin/env bash
# Usage: scripts/bench.sh
# The loss and the steps of the algorithms against their peers, about 20 minutes on two idle cores.
# Standard output: tables in Markdown. Exit codes: 0 done, 1 it failed, 3 a tool is missing.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  case ${1:-} in
    '') ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
    *) die 2 "$1: no arguments are known" 'the environment says what to do' 'scripts/bench.sh --help' ;;
  esac
  need_cmd python
  cd "$ROOT"
  python benchmarks/loss.py && python benchmarks/algorithms.py
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
