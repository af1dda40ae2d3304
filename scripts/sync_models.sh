#!/usr/bin/env bash
# Usage: scripts/sync_models.sh [--config FILE --recipe FILE] [--model NAME]… [--dry-run]
# Brings the models that configuration and recipe need (or the named ones), and datasets that are s3://, from the bucket to
# $WMTP_APP_ROOT/models/NAME (datasets/.synced/NAME). A model stands under its name only when every file is proved; what has
# arrived is kept. Without --config and --model: the configuration that ENV, ALGO and LAUNCHER choose.
# --dry-run (or DRY_RUN=1) prints the plan: what, how many bytes, from where, why.
# Settings: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_* WMTP_APP_ROOT WMTP_CACHE_DIR WMTP_CACHE_MAX_GB WMTP_STORAGE_RETRIES
#   WMTP_STORAGE_RETRY_WAIT_S WMTP_STORAGE_STALL_S (these win over the storage.* keys)
#   WMTP_SYNC_FIRST a folder to which settings and tokenizers come before any weights
#   WMTP_NO_MANIFEST=1 takes models that someone else uploaded by what the bucket lists
# Standard output: one JSON line a model (model, bytes, downloaded_bytes, seconds, mb_per_second, cache, digest, path); with
#   --dry-run one an item of the plan.
# Exit codes: 0 done, 2 bad input, 3 tool, credential or bucket name, 10 disk, 11 no answer, 12 transfer failed after its
#   tries, 13 not published, refused or other content.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=sync
here=$(dirname "${BASH_SOURCE[0]}")/lib
# shellcheck source=scripts/lib/common.bash
source "$here/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$here/settings.bash"
# shellcheck source=scripts/lib/store.bash
source "$here/store.bash"
# shellcheck source=scripts/lib/transfer.bash
source "$here/transfer.bash"
# shellcheck source=scripts/lib/evict.bash
source "$here/evict.bash"
# shellcheck source=scripts/lib/before.bash
source "$here/before.bash"
# shellcheck source=scripts/lib/scored.bash
source "$here/scored.bash"
# shellcheck source=scripts/lib/place.bash
source "$here/place.bash"

MODELS='' STORE='' CHECKPOINTS='' FIRST=${WMTP_SYNC_FIRST:-} AGAIN='' CACHE=/cache/models CACHE_MAX='' ACCELERATE=''
# Items are models by name and datasets as dataset:NAME; of each:
ITEMS=()
declare -A NAME=() PREFIX=() LINK=() WHY=() MANIFEST=() DIGEST=() FILES=() BYTES=() STATE=() HERE=()

# item LABEL WHY [URI]: the bucket has it under models/, unless a URI of its own says where.
item() {
  local label=$1 name=${1#dataset:} from
  check_name "$name"
  from=$(prefix_of "$name")
  if [[ ${3:-} == s3://* ]]; then from=${3%/}; fi
  [[ ${PREFIX[$label]:-$from} == "$from" ]] ||
    die 2 "$label: both ${PREFIX[$label]} and $from" 'the last part of an address names the folder here' 'another name for one of them in the bucket'
  [[ -z ${NAME[$label]:-} ]] || return 0
  ITEMS+=("$label") NAME[$label]=$name WHY[$label]=$2 PREFIX[$label]=$from LINK[$label]=$MODELS/$name
  if [[ $label != "$name" ]]; then LINK[$label]=$(dirname "$MODELS")/datasets/.synced/$name; fi
}

# Storage keys and what is needed, in the order in which the trainer reads it.
read_configuration() {
  local accelerate role name uri
  storage_settings storage.accelerate storage.cache_dir storage.cache_max_gb paths.checkpoints.base_path datasets models
  {
    read -r accelerate && read -r CACHE && read -r CACHE_MAX && read -r CHECKPOINTS
    [[ $accelerate != true ]] || ACCELERATE=1
    ((${#only[@]} == 0)) || return 0
    while IFS=$'\t' read -r role name uri; do
      case $role in
        dataset) name=${uri%/} && item "dataset:${name##*/}" 'is read' "$uri" ;;
        base) item "$name" 'is trained' "$uri" ;;
        rm | ref) item "$name" 'scores the data' "$uri" ;;
      esac
    done
  } <"$TEMP/settings"
}

main() {
  local dry=${DRY_RUN:-0} name
  local -a only=() all=() SETTINGS=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --dry-run) dry=1 && shift && continue ;;
      --config | --recipe | --set) [[ -n ${2:-} ]] && SETTINGS+=("$1" "$2") ;;
      --model) [[ -n ${2:-} ]] && only+=("${2#models/}") ;;
      *) die 2 "$1: not known" 'the options are --config, --recipe, --set, --model and --dry-run' 'scripts/sync_models.sh --help' ;;
    esac || die 2 "$1 has no value" "$1 VALUE" 'scripts/sync_models.sh --help'
    shift 2
  done
  switch WMTP_NO_MANIFEST
  need_cmd python
  own_temp
  if ((${#SETTINGS[@]} == 0 && ${#only[@]} == 0)); then
    choose_settings "${ENV:-${ENV_MODE:-minitest}}" "${ALGO:-${WMTP_ALGO:-critic-wmtp}}"
    cd "$ROOT"
  fi
  # Absolute: other app roots read in the store what this one uses.
  MODELS=$(realpath -ms -- "${WMTP_APP_ROOT:-/app}")/models AGAIN="scripts/sync_models.sh${SETTINGS[*]:+ ${SETTINGS[*]}}${only[*]/#/ --model }"
  if ((${#SETTINGS[@]})); then read_configuration; fi
  store_environment
  for name in "${only[@]}"; do check_name "$name" && item "$name" 'was named'; done
  ((${#ITEMS[@]})) || die 2 'no model to sync' '--model NAME, or a configuration that names models' 'scripts/sync_models.sh --help'
  transfer_settings
  need_cmd setpriv 'Linux: apt-get install util-linux'
  need_cmd flock 'Linux: apt-get install util-linux'
  CACHE_MAX=${WMTP_CACHE_MAX_GB:-$CACHE_MAX}
  [[ $CACHE_MAX =~ ^([0-9]{1,7}(\.[0-9]+)?)?$ ]] || die 2 "WMTP_CACHE_MAX_GB=$CACHE_MAX" 'a number of GB' 'export WMTP_CACHE_MAX_GB=200'
  choose_store "${WMTP_CACHE_DIR:-$CACHE}"
  log sync "${#ITEMS[@]} needed: ${ITEMS[*]}, bucket $S3_BUCKET_NAME ($AWS_DEFAULT_REGION)"
  read_manifests
  all=("${ITEMS[@]}")
  drop_scored
  tell_plan
  accelerate
  need_room
  if ((dry)); then log sync 'dry run: nothing was written' && return 0; fi
  mkdir -p "$STORE/.staging" "$MODELS" 2>/dev/null && [[ -w $STORE && -w $MODELS ]] ||
    die 10 "$STORE or $MODELS can't be written" 'models need a folder of their own' "chown it, or set WMTP_APP_ROOT to another folder"
  keep_manifests "${all[@]}"
  if [[ -n $FIRST ]]; then bring_first; fi
  for name in "${ITEMS[@]}"; do sync_one "$name"; done
  collect # last: what another version has in staging may be a file of this one, too
  within "$CACHE_MAX" "${DIGEST[@]}"
  log sync "done in $SECONDS s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
