#!/usr/bin/env bash
# Usage: scripts/help.sh MAKEFILE
# Standard output: one line a target, from the `##` comments.
# Exit codes: 0 done, 2 no such file.
set -Eeuo pipefail
shopt -s inherit_errexit

main() {
  [[ -f ${1:-} ]] || {
    echo "help: FAIL  no Makefile named '${1:-}'" >&2
    return 2
  }
  sed -nE 's/^([a-z-]+):.*## (.*)$/\1\t\2/p' "$1" |
    while IFS=$'\t' read -r target text; do printf '  %-15s %s\n' "$target" "$text"; done
  printf '\n  ENV   test, minitest, production\n  ALGO  baseline-mtp, rho1-wmtp, critic-wmtp\n'
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
