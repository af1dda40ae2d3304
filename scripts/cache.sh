#!/usr/bin/env bash
# Usage: scripts/cache.sh [--json] [--evict NAME|DIGEST|unused]
# What the store of models on this machine holds: which versions, how large, how long unused, used by what; and what is
# half-fetched. --evict takes versions away: all of a name, the one whose digest begins so, or all that nobody uses. One
# that is used stays: a link points at it, a reader holds it, or another machine linked it in the last day.
# Settings: WMTP_CACHE_DIR (default /cache/models, where it is there) WMTP_APP_ROOT (its models/ has the links; default /app,
#   and where that has none, the mini-test's)
# Standard output: a table, or with --json a line a version. Exit codes: 0 done, 1 what was to go is used, 2 bad input.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=cache
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/evict.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/evict.bash"

evict_wanted() {
  local what=$1 digest name bytes found=0 left=0
  while IFS=$'\t' read -r digest name bytes; do
    [[ $what == unused || $what == "$name" || (${#what} -ge 6 && $digest == "$what"*) ]] || continue
    found=1
    act evict_one "$digest" "$name" "$bytes" || left=1
  done < <(python -m wmtp.cache spare "$STORE" "$MODELS")
  ((found || left)) || [[ $what == unused ]] ||
    die 1 "$what: no version of this name or digest that nobody uses" 'what is used stays' 'make cache shows what there is, and what uses it'
  return "$left"
}

main() {
  local json=() evict='' folder app
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --json) json=(--json) && shift ;;
      --evict) evict=${2:-} && [[ -n $evict ]] && shift 2 ;;
      *) die 2 "$1: not known" 'the options are --json and --evict' 'scripts/cache.sh --help' ;;
    esac || die 2 '--evict has no value' '--evict NAME, a digest, or unused' 'scripts/cache.sh --help'
  done
  need_cmd python
  need_cmd flock 'Linux: apt-get install util-linux'
  app=${WMTP_APP_ROOT:-/app}
  # Where no node's folder is, that of the mini-test.
  if [[ ! -d $app/models && -z ${WMTP_APP_ROOT:-} ]]; then app=$ROOT/build/minitest/app; fi
  MODELS=$(realpath -ms -- "$app")/models
  choose_store "${WMTP_CACHE_DIR:-/cache/models}"
  [[ -d $STORE ]] || die 2 "$STORE is not there" 'a sync makes it' 'make sync, or set WMTP_CACHE_DIR or WMTP_APP_ROOT'
  log cache "$STORE, $(df --output=avail -B1000000 "$STORE" | tail -n 1 | tr -d ' ') MB free"
  if [[ -n $evict ]]; then evict_wanted "$evict"; fi
  python -m wmtp.cache list "$STORE" "$MODELS" "${json[@]}"
  for folder in "$STORE"/.staging/*/; do
    if [[ -d $folder ]]; then log cache "half-fetched: $(basename "$folder"), $(du -sm "$folder" | cut -f1) MB"; fi
  done
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
