#!/usr/bin/env bash
# Usage: scripts/publish_models.sh --from DIR [--force] [NAME…]
# Uploads the model folders DIR/NAME (default: every folder in DIR) to s3://$S3_BUCKET_NAME/models/NAME/, manifest.json
# last: a model without one is not published. What is published already, with the same content, is left alone; --force
# uploads it again. DRY_RUN=1 shows what would be uploaded.
# Environment: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_*
# Standard output: NAME<TAB>digest of the manifest, one line a model.
# Exit codes: 0 done, 2 bad arguments, 3 tool or credential, 11 the bucket does not answer, 12 upload failed,
#   13 a folder holds what can't be published.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=publish
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/store.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/store.bash"

TEMP=''

upload() { setpriv --pdeathsig KILL "$S5CMD" --log error --retry-count 3 "$@" >&2; }

publish() {
  local name=$1 from=$2 force=$3 prefix digest files bytes began=$SECONDS
  prefix=$(prefix_of "$name")
  python -m wmtp.manifest create "$from/$name" --name "$name" >"$TEMP/new.json" || exit
  if fetch_manifest "$name" "$TEMP/old.json"; then
    if ((! force)) && python -m wmtp.manifest same "$TEMP/new.json" "$TEMP/old.json" 2>/dev/null; then
      digest=$(python -m wmtp.manifest digest "$TEMP/old.json")
      log publish "$name is already published with this content (${digest:0:12})"
      printf '%s\t%s\n' "$name" "$digest"
      return
    fi
    # While files change under it, the model is not a published one.
    act upload rm "$prefix/manifest.json" || die 12 "$name: the old manifest can't be removed" '' 'may this key write?'
  fi
  read -r _ files bytes < <(python -m wmtp.manifest check "$TEMP/new.json")
  python -m wmtp.manifest list "$TEMP/new.json" "$from/$name" --prefix "$prefix" >"$TEMP/commands"
  log publish "$name: $files files, $((bytes / 1000000)) MB to $prefix"
  act upload run "$TEMP/commands" ||
    die 12 "$name: the upload failed" 'a model is published only when every file is there' 'see the lines above, then again'
  act upload cp "$TEMP/new.json" "$prefix/manifest.json" || die 12 "$name: manifest.json could not be uploaded" '' 'again'
  digest=$(python -m wmtp.manifest digest "$TEMP/new.json")
  log publish "$name ok: ${digest:0:12}, $((SECONDS - began)) s"
  printf '%s\t%s\n' "$name" "$digest"
}

main() {
  local from='' force=0 name
  local -a names=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --from) from=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
      --force) force=1 && shift ;;
      -*) die 2 "$1: not known" 'the options are --from and --force' 'scripts/publish_models.sh --help' ;;
      *) names+=("$1") && shift ;;
    esac
  done
  [[ -n $from ]] || die 2 'no folder to publish from' '--from DIR' 'make publish-models FROM=tests/test_models'
  [[ -d $from ]] || die 2 "$from is not a folder" '--from names the folder that holds the model folders' 'name another'
  from=$(cd "$from" && pwd)
  if ((${#names[@]} == 0)); then
    for name in "$from"/*/; do
      name=${name%/}
      if [[ ${name##*/} != '*' && ${name##*/} != __* ]]; then names+=("${name##*/}"); fi
    done
    ((${#names[@]})) || die 2 "$from holds no model folder" 'a model is a folder in it' 'name another with --from'
  fi
  for name in "${names[@]}"; do
    check_name "$name"
    [[ -d $from/$name ]] || die 2 "$from/$name is not a folder" 'a NAME is a folder in the one that --from names' "ls '$from'"
  done
  store_environment
  TEMP=$(mktemp -d)
  trap 'rm -rf -- "$TEMP"' EXIT
  log publish "${#names[@]} models from $from to $(prefix_of '')"
  for name in "${names[@]}"; do publish "$name" "$from" "$force"; done
  log publish "done in $SECONDS s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
