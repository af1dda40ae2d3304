#!/usr/bin/env bash
# Usage: scripts/models.sh [--json]
# What is published in the bucket, models and datasets: name, files, bytes, digest of the manifest, when. What stands there
# without a manifest is `not published`; a manifest that is refused, or names what is not there, is said beside its name.
# Environment: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_*
# Standard output: a table; with --json one object a line, with the whole digest (name, files, bytes, digest, created, trouble).
# Exit codes: 0 done, 2 bad arguments, 3 tool or credential, 11 the bucket does not answer, 13 a manifest is refused.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=models
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/store.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/store.bash"
# shellcheck source=scripts/lib/published.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/published.bash"

TEMP=''

main() {
  local -a options=()
  case ${1:-} in
    '') ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
    --json) options=(--json) ;;
    *) die 2 "$1: not known" 'the option is --json' 'scripts/models.sh --help' ;;
  esac
  store_environment
  TEMP=$(mktemp -d)
  trap 'rm -rf -- "$TEMP"' EXIT
  log models "what is published in s3://$S3_BUCKET_NAME${S3_ENDPOINT_URL:+ at $S3_ENDPOINT_URL}"
  list_published "$TEMP/objects"
  fetch_published "$TEMP/objects" "$TEMP"
  python -m wmtp.published "$TEMP/objects" "$TEMP" "${options[@]}" ||
    die $? 'a manifest above is refused, or names what is not there' 'a reader refuses it as well' 'publish it again: make publish-models FROM=… NAMES=…'
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
