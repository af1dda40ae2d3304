#!/usr/bin/env bash
# Usage: [SEEDS=6] [STEPS=400] scripts/study.sh
# Planted truth: does the weight go where it is known to belong, and does it help? Then: does each head of each algorithm
# learn real code, from random weights? Small models, minutes.
# Standard output: tables in Markdown. Exit codes: 0 done, 1 it failed, 3 a tool is missing.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  need_cmd python
  cd "$ROOT"
  python benchmarks/study.py --seeds "${SEEDS:-6}" --steps "${STEPS:-400}"
  exec python benchmarks/learning.py
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
