#!/usr/bin/env bash
# Usage: scripts/verify_models.sh [--from DIR] [NAME…]
# Hashes again what is published in the bucket (default: all models and datasets; NAME, models/NAME, datasets/NAME): every
# object is brought through TMPDIR, proved by its manifest and removed at once. Objects that no manifest names are told.
# --from DIR: the folders of synced models in it (such as /app/models), each against its own manifest.json.
# Environment: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_* TMPDIR WMTP_STORAGE_RETRIES WMTP_STORAGE_RETRY_WAIT_S WMTP_STORAGE_STALL_S
# Standard output: NAME<TAB>ok|damaged<TAB>digest<TAB>bytes, one line a model; all of them are looked at, or, where a name is
#   not published, none.
# Exit codes: 0 all right, 2 bad arguments or a name that is not published, 3 tool or credential, 10 disk, 11 no answer,
#   12 transfer failed after its tries, 13 one is damaged or refused.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=verify
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/store.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/store.bash"
# shellcheck source=scripts/lib/transfer.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/transfer.bash"
# shellcheck source=scripts/lib/published.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/published.bash"

DAMAGED=0

# row NAME ok|damaged DIGEST BYTES
row() {
  [[ $2 == ok ]] || DAMAGED=$((DAMAGED + 1))
  printf '%s\t%s\t%s\t%s\n' "$@"
}

# republished NAME: the bucket has another manifest by now, or none; `tries` asks.
republished() {
  rm -f "$TEMP/now"
  fetch_manifest "$1" "$TEMP/now" "s3://$S3_BUCKET_NAME/$1" || return 0
  ! cmp -s "$TEMP/now" "$TEMP/$1.json"
}

# need_published models/NAME…: a name that was mistyped is no damage, and no reason to publish anything again.
need_published() {
  local name
  local -a there=() lacking=()
  mapfile -t there < <(published_names)
  for name in "$@"; do [[ " ${there[*]} " == *" $name "* ]] || lacking+=("$name"); done
  ((${#lacking[@]} == 0)) || die 2 "not published: ${lacking[*]}" "a name of what is published; there are: ${there[*]:-none}" 'make models'
}

published_names() { (cd "$TEMP" && find models datasets -name '*.json' | sed 's/\.json$//' | sort); }

# in_bucket models/NAME
in_bucket() {
  local name=$1 rc=0 free digest bytes files began=$SECONDS
  local -a look=()
  [[ -s $TEMP/$name.json ]] || { log verify "$name: its manifest is empty, or can't be read" && row "$name" damaged - - && return; }
  free=$(free_bytes "$TEMP")
  python -m wmtp.published "$TEMP/objects" "$TEMP" --one "$name" --free "$free" >"$TEMP/look" || { row "$name" damaged - - && return; }
  mapfile -t look <"$TEMP/look"
  # As many at once as the disk can hold.
  read -r digest bytes files WORKERS <<<"${look[0]}"
  ((WORKERS)) || die 10 "$TEMP: $(mb "$free") MB free are less than the largest file of $name" 'an object is on the disk until it is proved' 'TMPDIR=… on a larger disk'
  log verify "$name: $files files, $(mb "$bytes") MB from s3://$S3_BUCKET_NAME/$name"
  ((${#look[@]} == 1)) || log verify "warn  $name: $((${#look[@]} - 1)) objects that its manifest does not name: ${look[*]:1:5}"
  tries "$name" "$TEMP/$name.json" "s3://$S3_BUCKET_NAME/$name" "$TEMP/staging" --discard || rc=$?
  rm -rf -- "$TEMP/staging" "$TEMP/fetched"
  if ((rc == 12)) && grep -q NoSuchKey "$TEMP/client.log"; then rc=13; fi
  case $rc in
    0) log verify "$name ok: $((SECONDS - began)) s" && row "$name" ok "$digest" "$bytes" ;;
    4) again "$name" ;;
    13) row "$name" damaged "$digest" "$bytes" ;;
    *) STORE=$TEMP failed_tries "$rc" "$name" "scripts/verify_models.sh $name" ;;
  esac
}

# again NAME: what was replaced while it was looked at is no damage.
again() {
  if [[ ! -s $TEMP/now ]]; then
    log verify "not checked   $1: it is being replaced, and has no manifest now"
    return
  fi
  log verify "$1 was replaced meanwhile: the new version is looked at"
  mv -f "$TEMP/now" "$TEMP/$1.json"
  list_published "$TEMP/objects"
  in_bucket "$1"
}

# in_folder DIR NAME
in_folder() {
  local folder=$1/$2 name=$2 rc=0 digest='-' bytes='-' began=$SECONDS told=$SECONDS
  [[ -f $folder/manifest.json ]] || { log verify "$folder has no manifest.json" && row "$name" damaged - - && return; }
  manifest check "$folder/manifest.json" >"$TEMP/check" || { row "$name" damaged - - && return; }
  IFS=$'\t' read -r _ _ bytes <"$TEMP/check"
  digest=$(manifest digest "$folder/manifest.json")
  log verify "$name: hashing $(mb "$bytes") MB in $folder"
  setpriv --pdeathsig KILL python -m wmtp.manifest verify "$folder/manifest.json" "$folder" &
  HASHER=$!
  while kill -0 "$HASHER" 2>/dev/null; do
    sleep 0.2 &
    wait $! # a signal ends this wait, not a sleep in the foreground
    if ((SECONDS - told >= 4)); then told=$SECONDS && log verify "$name: still hashing, $((SECONDS - began)) s"; fi
  done
  wait "$HASHER" || rc=$?
  HASHER=''
  ((rc == 0 || rc == 13)) || die "$rc" "$folder can't be read" 'every byte is read' 'see the line above'
  row "$name" "$( ((rc)) && echo damaged || echo ok)" "$digest" "$bytes"
}

main() {
  local from='' name file
  local -a names=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --from) from=${2:-} && shift $(($# > 1 ? 2 : 1)) && [[ -d $from ]] || die 2 "--from '$from' is no folder" '--from DIR of synced models' 'make verify-models FROM=/app/models' ;;
      -*) die 2 "$1: not known" 'the option is --from' 'scripts/verify_models.sh --help' ;;
      *) names+=("$1") && shift ;;
    esac
  done
  for name in "${names[@]}"; do
    name=${name#models/}
    check_name "${name#datasets/}"
  done
  need_cmd python
  need_cmd setpriv 'Linux: apt-get install util-linux'
  own_temp
  if [[ -n $from ]]; then
    if ((${#names[@]} == 0)); then
      for file in "$from"/*/manifest.json; do [[ ! -f $file ]] || names+=("$(basename "$(dirname "$file")")"); done
    fi
    ((${#names[@]})) || die 2 "$from holds no folder with a manifest.json" 'synced models have theirs' 'make verify-models FROM=/app/models'
    for name in "${names[@]}"; do in_folder "$(cd "$from" && pwd)" "$name"; done
  else
    transfer_settings
    store_environment
    log verify "what is published in s3://$S3_BUCKET_NAME${S3_ENDPOINT_URL:+ at $S3_ENDPOINT_URL}"
    list_published "$TEMP/objects"
    fetch_published "$TEMP/objects" "$TEMP"
    for file in "${!names[@]}"; do [[ ${names[file]} == */* ]] || names[file]=models/${names[file]}; done
    need_published "${names[@]}"
    if ((${#names[@]} == 0)); then mapfile -t names < <(published_names); fi
    ((${#names[@]})) || log verify 'nothing is published'
    for name in "${names[@]}"; do in_bucket "$name"; done
  fi
  ((DAMAGED == 0)) || die 13 "$DAMAGED of ${#names[@]} are damaged" 'every byte is as its manifest says' \
    "$([[ -n $from ]] && echo 'make sync brings them again' || echo 'publish them again: make publish-models FROM=… NAMES=… FORCE=1')"
  log verify "ok: ${#names[@]} looked at in $SECONDS s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
