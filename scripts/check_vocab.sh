#!/usr/bin/env bash
# Usage: scripts/check_vocab.sh [--config FILE --recipe FILE] [--expected SIZE]
# Proves that all models of the run share one vocabulary: vocab_size, and the tokenizers' pieces in order.
# Without --config: the configuration that ENV, ALGO and LAUNCHER choose. Without --expected: the recipe's model.vocab_size.
# Standard output: one JSON line (vocab_size, pieces, models).
# Exit codes: 0 one vocabulary, 2 bad input, 3 a tool is missing, 13 a model is missing or unreadable, 14 vocabularies differ.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=vocab
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"

main() {
  local expected='' name uri path listed
  local -a SETTINGS=() models=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --config | --recipe | --set) [[ -n ${2:-} ]] && SETTINGS+=("$1" "$2") ;;
      --expected) [[ ${2:-} =~ ^[1-9][0-9]{0,8}$ ]] && expected=$2 ;;
      *) die 2 "$1: not known" 'the options are --config, --recipe, --set and --expected' 'scripts/check_vocab.sh --help' ;;
    esac || die 2 "$1 has no value that fits: '${2:-}'" 'a file, or a size' 'scripts/check_vocab.sh --help'
    shift 2
  done
  need_cmd python
  if ((${#SETTINGS[@]} == 0)); then
    choose_settings "${ENV:-${ENV_MODE:-minitest}}" "${ALGO:-${WMTP_ALGO:-critic-wmtp}}"
    cd "$ROOT"
  fi
  listed=$(python -m wmtp.config --env "${ENV:-${ENV_MODE:-}}" "${SETTINGS[@]}" --get model.vocab_size models)
  expected=${expected:-${listed%%$'\n'*}}
  while IFS=$'\t' read -r _ name uri; do
    path=$(python -c 'import sys; from wmtp.paths import PathResolver; print(PathResolver().resolve(sys.argv[1])[1])' "$uri")
    if [[ $path == s3://* ]]; then path=${WMTP_APP_ROOT:-/app}/models/$name; fi
    # A scorer that the sync left out was proved when it scored.
    if [[ ! -e $path ]] && grep -qxF -- "$name" "${WMTP_APP_ROOT:-/app}/models/.manifests/not-needed" 2>/dev/null; then
      log vocab "$name not checked (its scores are kept, it was not synced)"
      continue
    fi
    models+=("$name=$path")
  done <<<"${listed#*$'\n'}"
  log vocab "${#models[@]} models, $expected pieces expected"
  exec python -m wmtp.vocab --expected "$expected" "${models[@]}"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
