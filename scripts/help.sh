#!/usr/bin/env bash
# Usage: scripts/help.sh MAKEFILE ALGORITHMS
# Standard output: one screen: a line for each target with a `##` comment, the names of those with `##-`.
# Exit codes: 0 done, 2 no such file.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  [[ -f ${1:-} ]] || {
    echo "help: FAIL  no Makefile named '${1:-}'" >&2
    return 2
  }
  sed -nE 's/^([a-z-]+):.*## (.*)$/\1\t\2/p' "$1" |
    while IFS=$'\t' read -r target text; do printf '  %-15s %s\n' "$target" "$text"; done
  printf '  ENV   test, minitest, production\n  ALGO  %s\n' "${2// /, }"
  sed -nE 's/^([a-z-]+):.*##- .*$/\1/p' "$1" | grep -v '^help$' | paste -sd ' ' | fold -s -w 70 | sed 's/ *$//; 1s/^/  also  /; 2,$s/^/        /'
  printf '  more  scripts/*.sh --help, docs/guide.md\n'
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
