#!/usr/bin/env bash
# Usage: scripts/publish_models.sh --from DIR [--as models|datasets] [--force] [NAME…]
# Publishes the folders DIR/NAME (default: every folder in DIR) as s3://$S3_BUCKET_NAME/models/NAME/ (or datasets/NAME/):
# the files first, hashed beside the upload; manifest.json last, when each object is proved to be there. What is published
# with the same content is left alone. Another version is refused; --force replaces it: its manifest goes first, only
# what differs is uploaded, what the new manifest doesn't name is removed. What an interrupted publish left is used as far
# as it is proved. One publisher a name: models/NAME/.publishing says who.
# DRY_RUN=1 prints NAME<TAB>upload|replace|keep|remove<TAB>BYTES<TAB>PATH and changes nothing.
# Environment: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_*; WMTP_STORAGE_RETRIES (3 tries), WMTP_STORAGE_RETRY_WAIT_S (10 apart),
#   WMTP_STORAGE_STALL_S (30 without a byte end a try), WMTP_STORAGE_PART_MB (100 in one piece)
# Standard output: NAME<TAB>digest of the manifest, one line a folder.
# Exit codes: 0 done, 1 another publisher has the name, 2 bad arguments, 3 tool or credential, 11 the bucket does not
#   answer, 12 upload failed after its tries, 13 another version is published, what can't be published, or it changed.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=publish
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/store.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/store.bash"
# shellcheck source=scripts/lib/transfer.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/transfer.bash"
# shellcheck source=scripts/lib/claim.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/claim.bash"
# shellcheck source=scripts/lib/publish.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/publish.bash"
# shellcheck source=scripts/lib/upload.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/upload.bash"

WORK='' FROM='' NAME='' PREFIX='' KIND=models FORCE=0

cleanup() {
  trap '' TERM INT
  end_transfer
  release
  if [[ -n $TEMP ]]; then rm -rf -- "$TEMP"; fi
}

use() { NAME=$1 WORK=$TEMP/$1 PREFIX=s3://$S3_BUCKET_NAME/$KIND/$1; }

publish() {
  local began=$SECONDS
  use "$1"
  if judge; then
    if [[ ${DRY_RUN:-} == 1 ]]; then
      prove rehearse
      return
    fi
    claim "$FORCE"
    # Looked at again: now nobody else changes it.
    if judge; then
      # While files change under it, the model is not a published one.
      if [[ $VERDICT == other ]]; then
        act client rm "$PREFIX/manifest.json" >/dev/null || die 12 "$NAME: the old manifest can't be removed: $(client_said)" '' 'may this key write?'
      fi
      log publish "$NAME: $(awk -F ', ' '{s += $(NF - 2)} END {printf "%d files, %.1f MB", NR, s / 1e6}' "$WORK/facts") to $PREFIX"
      upload
      if ((STRAYS)); then abort_strays; fi
    fi
    if [[ $VERDICT != same && $VERDICT != mend ]]; then
      remove_unnamed
      prove seal >"$WORK/digest" || exit
      ours || lost
      act put_if manifest.json "$WORK/new.json" --if-none-match '*' || lost
      WAS=$(<"$WORK/digest")
    fi
    release
    log publish "$NAME ok: ${WAS:0:12}, $((SECONDS - began)) s"
  fi
  printf '%s\t%s\n' "$NAME" "$WAS"
}

# all_folders: what --from holds; a folder that is a model itself is not a folder of models.
all_folders() {
  local folder mark
  for mark in "$FROM"/config.json "$FROM"/params.json "$FROM"/*.jsonl "$FROM"/*.parquet; do
    [[ ! -f $mark ]] || die 2 "$FROM is itself a model or a dataset (${mark##*/})" '--from names the folder that holds the folders' \
      "make publish-models FROM=$(printf '%q' "$(dirname "$FROM")") NAMES=$(printf '%q' "${FROM##*/}")"
  done
  for folder in "$FROM"/*/; do
    folder=${folder%/}
    if [[ ${folder##*/} != '*' && ${folder##*/} != __* ]]; then names+=("${folder##*/}"); fi
  done
  ((${#names[@]})) || die 2 "$FROM holds no model folder" 'a model is a folder in it' 'name another with --from'
}

main() {
  local name bad=0
  local -a names=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --from) FROM=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
      --as) KIND=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
      --force) FORCE=1 && shift ;;
      -*) die 2 "$1: not known" 'the options are --from, --as and --force' 'scripts/publish_models.sh --help' ;;
      *) names+=("$1") && shift ;;
    esac
  done
  [[ -n $FROM ]] || die 2 'no folder to publish from' '--from DIR' 'make publish-models FROM=/path/to/models NAMES=llama-7b-mtp'
  [[ -d $FROM ]] || die 2 "$FROM is not a folder" '--from names the folder that holds the model folders' 'name another'
  [[ $KIND == models || $KIND == datasets ]] || die 2 "--as '$KIND'" 'models or datasets' 'scripts/publish_models.sh --help'
  transfer_settings
  PART_MB=${WMTP_STORAGE_PART_MB:-$PART_MB}
  [[ $PART_MB =~ ^([5-9]|[1-9][0-9]{1,3})$ ]] || die 2 "part '$PART_MB'" '5 MB or more' 'mend WMTP_STORAGE_PART_MB'
  FROM=$(cd "$FROM" && pwd)
  ((${#names[@]})) || all_folders
  for name in "${names[@]}"; do
    check_name "$name"
    [[ -d $FROM/$name ]] || die 2 "$FROM/$name is not a folder" 'a NAME is a folder in the one that --from names' "ls '$FROM'"
  done
  store_environment
  need_cmd setpriv 'Linux: apt-get install util-linux'
  own_temp
  log publish "${#names[@]} $KIND from $FROM to s3://$S3_BUCKET_NAME/$KIND"
  # What can't be published is known, all of it, before anything is uploaded.
  for name in "${names[@]}"; do
    use "$name"
    mkdir "$WORK"
    prove survey || bad=$?
  done
  ((bad == 0)) || exit "$bad"
  for name in "${names[@]}"; do publish "$name"; done
  log publish "done in $SECONDS s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
