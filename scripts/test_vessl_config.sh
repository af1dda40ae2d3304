#!/usr/bin/env bash
# Usage: scripts/test_vessl_config.sh [--only LIST] [--json] [--offline] [--verbose] [--brief]
# The dry run: finds what can be known to fail before a run, on any machine; needs no GPU, engine or account.
#   ENV       test, minitest or production (default)      ALGO      without it: all three algorithms
#   LAUNCHER  local, docker, vessl (default: by ENV)      CONFIG, RECIPE, SET="key=value …"   as everywhere
#   TWIN=0    leaves the training twin out
#   --only    headings by number or name (1 to 5), or single checks: devices, memory, reward, models, tokenizers, data, twin;
#             such a dry run is no receipt for production. ONLY=… says the same
#   --offline no bucket is meant to be asked          --verbose  a decoded sample of the data
#   --brief   without each value and its source: they are in the receipt
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
  while read -r algo; do SETTINGS+=(--recipe "$(recipe_of "$ENV" "$algo")"); done < <(algorithms)
}

main() {
  local -a options=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --json | --offline | --verbose | --brief) options+=("$1") ;;
      --only)
        [[ -n ${2:-} ]] || die 2 '--only has no value' '--only LIST' '--only 1,2,memory'
        ONLY=$2
        shift
        ;;
      *) die 2 "$1: not known" 'the options are --only, --json, --offline, --verbose and --brief' 'scripts/test_vessl_config.sh --help' ;;
    esac
    shift
  done
  [[ -z ${ONLY:-} ]] || options+=(--only "$ONLY")
  need_cmd python
  cd "$ROOT"
  choose_settings "${ENV:-production}" "${ALGO:-}"
  overrides
  [[ -n ${RECIPE:-} ]] || all_recipes
  exec python -m wmtp.preflight --env "$ENV" "${SETTINGS[@]}" "${OVERRIDES[@]}" \
    --revision "$(revision)" --receipt-dir "build/$ENV" "${options[@]}"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
