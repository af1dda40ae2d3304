#!/usr/bin/env bash
# Usage: scripts/bench.sh
# The loss and the steps of the algorithms against their peers, about 20 minutes on two idle cores.
# Standard output: tables in Markdown. Exit codes: 0 done, 1 it failed, 3 a tool is missing.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  need_cmd python
  cd "$ROOT"
  python benchmarks/loss.py && python benchmarks/algorithms.py
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
