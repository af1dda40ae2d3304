#!/usr/bin/env bash
# Usage: scripts/test_vessl_config.sh [--json] [--offline]
# The dry run: finds what can be known to fail before a run, on any machine; needs no GPU, engine or account.
#   ENV       test, minitest or production (default)      ALGO      without it: all three algorithms
#   LAUNCHER  local, docker, vessl (default: by ENV)      CONFIG, RECIPE, SET="key=value …"   as everywhere
#   TWIN=0    leaves the training twin out
# Standard output: nothing, or the findings with --json. Standard error: the five headings.
# Exit codes: 0 no FAIL, 2 a FAIL or bad input, 3 a tool is missing.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE='dry run'
# shellcheck source=lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"

# all_recipes: those of every algorithm, as arguments, into SETTINGS.
all_recipes() {
  local algo
  for algo in baseline-mtp rho1-wmtp critic-wmtp; do SETTINGS+=(--recipe "$(recipe_of "$ENV" "$algo")"); done
}

main() {
  local -a options=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --json | --offline) options+=("$1") ;;
      *) die 2 "$1: not known" 'the options are --json and --offline' 'scripts/test_vessl_config.sh --help' ;;
    esac
    shift
  done
  need_cmd python
  cd "$ROOT"
  choose_settings "${ENV:-production}" "${ALGO:-}"
  overrides
  [[ -n ${RECIPE:-} ]] || all_recipes
  exec python -m wmtp.preflight --env "$ENV" "${SETTINGS[@]}" "${OVERRIDES[@]}" \
    --revision "$(revision)" --receipt-dir "build/$ENV" "${options[@]}"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
