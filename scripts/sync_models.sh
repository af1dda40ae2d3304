#!/usr/bin/env bash
# Usage: scripts/sync_models.sh [--config FILE --recipe FILE] [--model NAME]… [--dry-run]
# Brings the models that configuration and recipe need (or the named ones) from s3://$S3_BUCKET_NAME/models/ to
# $WMTP_APP_ROOT/models/NAME. A model stands under its name only when every file is proved; what has arrived is kept.
# Without --config and --model: the configuration that ENV, ALGO and LAUNCHER choose. --dry-run shows what is missing.
# Settings: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_* WMTP_APP_ROOT WMTP_CACHE_DIR WMTP_STORAGE_RETRIES
#   WMTP_STORAGE_RETRY_WAIT_S (these win over the storage.* keys)
# Standard output: one JSON line a model (model, bytes, downloaded_bytes, seconds, mb_per_second, cache, digest, path).
# Exit codes: 0 done, 2 bad input, 3 tool, credential or bucket name, 10 disk, 11 no answer, 12 transfer failed after its
#   tries, 13 not published, refused or other content.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=sync
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"
# shellcheck source=scripts/lib/store.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/store.bash"
# shellcheck source=scripts/lib/before.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/before.bash"

TEMP='' MODELS='' STORE='' CLIENT='' READER='' HASHER='' CHECKPOINTS=''
WORKERS=16 PART_MB=100 RETRIES=3 WAIT=10 STALL=30 CACHE=/cache/models
NAMES=()

# In the background: a trap waits for a foreground child, and hashing 27 GB takes its time.
manifest() {
  setpriv --pdeathsig KILL python -m wmtp.manifest "$@" &
  HASHER=$!
  local rc=0
  wait "$HASHER" || rc=$?
  HASHER=''
  return "$rc"
}

cleanup() {
  local pid
  for pid in $CLIENT $READER $HASHER; do kill -KILL "$pid" 2>/dev/null || true; done
  if [[ -n $TEMP ]]; then rm -rf -- "$TEMP"; fi
}

# Storage keys and the list of models, in the order in which the trainer loads them.
read_configuration() {
  local bucket region endpoint name
  python -m wmtp.config --env "${ENV:-${ENV_MODE:-}}" "${SETTINGS[@]}" --get storage.bucket storage.region storage.endpoint \
    storage.workers storage.part_size_mb storage.retries storage.retry_wait_s storage.stall_s storage.cache_dir \
    paths.checkpoints.base_path models >"$TEMP/settings" || exit
  {
    read -r bucket && read -r region && read -r endpoint && read -r WORKERS && read -r PART_MB
    read -r RETRIES && read -r WAIT && read -r STALL && read -r CACHE
    read -r CHECKPOINTS
    while IFS=$'\t' read -r _ name _; do
      [[ " ${NAMES[*]} " == *" $name "* ]] || NAMES+=("$name")
    done
  } <"$TEMP/settings"
  export S3_BUCKET_NAME=${S3_BUCKET_NAME:-$bucket} AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-$region}
  if [[ -z ${S3_ENDPOINT_URL:-} && -n $endpoint ]]; then export S3_ENDPOINT_URL=$endpoint; fi
}

choose_store() {
  local app=${WMTP_APP_ROOT:-/app}
  MODELS=$app/models STORE=$app/models/.store
  CACHE=${WMTP_CACHE_DIR:-$CACHE}
  if [[ -d $CACHE && -w $CACHE ]]; then
    STORE=$(cd "$CACHE" && pwd)
  elif [[ -d $CACHE ]]; then
    log sync "warn  $CACHE can't be written: not used as cache (next: sudo chown $(id -u) '$CACHE')"
  fi
}

mb() { awk -v b="$1" 'BEGIN {printf "%.1f", b / 1e6}'; }

# shellcheck source=scripts/lib/transfer.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/transfer.bash"

main() {
  local dry=0 name
  local -a only=() all=() SETTINGS=()
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --dry-run) dry=1 && shift && continue ;;
      --config | --recipe) [[ -n ${2:-} ]] && SETTINGS+=("$1" "$2") ;;
      --set) [[ -n ${2:-} ]] && SETTINGS+=("$1" "$2") ;;
      --model) [[ -n ${2:-} ]] && only+=("${2#models/}") ;;
      *) die 2 "$1: not known" 'the options are --config, --recipe, --set, --model and --dry-run' 'scripts/sync_models.sh --help' ;;
    esac || die 2 "$1 has no value" "$1 VALUE" 'scripts/sync_models.sh --help'
    shift 2
  done
  need_cmd python
  TEMP=$(mktemp -d)
  trap cleanup EXIT
  trap 'exit 143' TERM
  trap 'exit 130' INT
  if ((${#SETTINGS[@]} == 0 && ${#only[@]} == 0)); then
    choose_settings "${ENV:-${ENV_MODE:-minitest}}" "${ALGO:-${WMTP_ALGO:-critic-wmtp}}"
    cd "$ROOT"
  fi
  if ((${#SETTINGS[@]})); then read_configuration; fi
  if ((${#only[@]})); then NAMES=("${only[@]}"); fi
  for name in "${NAMES[@]}"; do check_name "$name"; done
  ((${#NAMES[@]})) || die 2 'no model to sync' '--model NAME, or a configuration that names models' 'scripts/sync_models.sh --help'
  RETRIES=${WMTP_STORAGE_RETRIES:-$RETRIES} WAIT=${WMTP_STORAGE_RETRY_WAIT_S:-$WAIT}
  [[ $RETRIES =~ ^[1-9][0-9]?$ && $WAIT =~ ^[0-9]{1,4}$ ]] ||
    die 2 "retries '$RETRIES', wait '$WAIT'" 'tries are 1 to 99, the wait is seconds' 'mend WMTP_STORAGE_RETRIES or WMTP_STORAGE_RETRY_WAIT_S'
  store_environment
  need_cmd setpriv 'Linux: apt-get install util-linux'
  need_cmd flock 'Linux: apt-get install util-linux'
  choose_store
  log sync "${#NAMES[@]} models: ${NAMES[*]}, bucket $S3_BUCKET_NAME ($AWS_DEFAULT_REGION)"
  read_manifests
  all=("${NAMES[@]}")
  drop_scored
  need_room
  if ((dry)); then log sync 'dry run: nothing was written' && return 0; fi
  mkdir -p "$STORE/.staging" "$MODELS" 2>/dev/null && [[ -w $STORE && -w $MODELS ]] ||
    die 10 "$STORE or $MODELS can't be written" 'models need a folder of their own' "chown it, or set WMTP_APP_ROOT to another folder"
  keep_manifests "${all[@]}"
  for name in "${NAMES[@]}"; do sync_one "$name"; done
  log sync "done in $SECONDS s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
