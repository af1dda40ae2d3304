#!/usr/bin/env bash
# Usage: [RUN_ID=name or number] [STEP=N] scripts/verify_checkpoint.sh [--keep DIR]
# The restore drill: the newest whole checkpoint of a run (or that of STEP) comes from the bucket to a temporary folder, every
# file is proved by its manifest, every tensor is read. Nothing of the run is touched. --keep DIR: it stays, as DIR/step-N.
# Without RUN_ID it is the run that make status shows.
# The bucket and the place in it are those of the configuration that ENV and LAUNCHER choose (ENV: default from the name).
# Settings: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_* TMPDIR WMTP_STORAGE_RETRIES WMTP_STORAGE_RETRY_WAIT_S WMTP_STORAGE_STALL_S
# Standard output: one line of JSON (run, step, files, bytes, tensors, not_finite, seconds).
# Exit codes: 0 it can be restored, 2 no whole checkpoint by that name, 3 tool or credential, 10 disk, 11 no answer,
#   12 transfer failed after its tries, 13 damaged.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=verify
here=$(dirname "${BASH_SOURCE[0]}")/lib
# shellcheck source=scripts/lib/common.bash
source "$here/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$here/settings.bash"
# shellcheck source=scripts/lib/run.bash
source "$here/run.bash"
# shellcheck source=scripts/lib/store.bash
source "$here/store.bash"
# shellcheck source=scripts/lib/transfer.bash
source "$here/transfer.bash"

BASE='' PLACE=''

# A name is a folder in the bucket, whoever submitted the run; a number, and nothing, is looked up as by make status.
choose_run() {
  if [[ ${RUN_ID:-} =~ ^[0-9]*$ ]]; then find_run here; else NAME=$RUN_ID; fi
  # The launcher has a trap of its own, for its own.
  trap 'cleanup; rm -rf -- "${CLIENT_HOME:-$TEMP}"' EXIT
  [[ $NAME =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$ ]] || die 2 "RUN_ID=$NAME" 'a run is named by its name or number' 'make status'
  [[ ${STEP:-} =~ ^[0-9]*$ ]] || die 2 "STEP=$STEP" 'a checkpoint is named by its step' 'STEP=500, or none for the newest'
  local environment=${ENV:-${NAME%%-*}} folder
  # A run of this machine tells by its place which it was.
  if [[ -z ${ENV:-}$NUMBER ]] && IFS=$'\t' read -r _ folder < <(local_records "$NAME"); then
    folder=${folder#"$ROOT/build/"} environment=${folder%%/*}
  fi
  [[ $environment =~ ^(test|minitest|production)$ ]] || environment=production
  choose_settings "$environment" ''
  # A run of this machine: the mini-test's bucket is embedded, its data are here. One that was submitted has another.
  if [[ $LAUNCHER == local && $ENV == minitest && -z ${S3_ENDPOINT_URL:-} && -d $ROOT/build/bucket/data && -z $NUMBER &&
    ! -e $ROOT/build/minitest/$NAME/run.id ]]; then
    rm -rf -- "$TEMP"
    RUN_ID=$NAME exec "$ROOT/scripts/bucket.sh" run "$ROOT/build/bucket" -- "${BASH_SOURCE[0]}" "${ARGUMENTS[@]}"
  fi
}

read_configuration() {
  storage_settings paths.checkpoints.base_path
  BASE=$(<"$TEMP/settings")
  [[ $BASE == s3://* ]] || die 2 "$CONFIG keeps its checkpoints in $BASE" 'the drill brings one from a bucket' 'ENV=… or CONFIG=… of a run whose checkpoints go to s3://'
}

# whole_steps: steps that have their marker, oldest first, into the array STEPS.
whole_steps() {
  local rc=0
  bounded 60 "$S5CMD" --retry-count 2 ls "$BASE/$NAME/step-*/.complete" >"$TEMP/markers" 2>"$TEMP/client.log" || rc=$?
  if ((rc)) && ! grep -q 'no object found' "$TEMP/client.log"; then
    fetch_manifest "$NAME" "$TEMP/none" "$BASE/$NAME" || true # it says why, and ends the stage
    die 11 "$BASE/$NAME can't be listed: $(head -c 200 "$TEMP/client.log")" 'markers say which checkpoints are whole' 'again'
  fi
  mapfile -t STEPS < <(sed -nE 's|.*step-([0-9]+)/\.complete$|\1|p' "$TEMP/markers" | sort -n)
}

choose_step() {
  local -a STEPS=()
  whole_steps
  ((${#STEPS[@]})) || die 2 "$NAME has no whole checkpoint in $BASE" 'a checkpoint without its marker is not one' 'ENV=… RUN_ID=… of another; make status shows the newest run'
  STEP=${STEP:-${STEPS[-1]}}
  [[ " ${STEPS[*]} " == *" $STEP "* ]] || die 2 "$NAME has no whole checkpoint of step $STEP" 'a checkpoint without its marker is not one' "STEP= one of: ${STEPS[*]}"
  FROM=$BASE/$NAME/step-$STEP
}

# what_it_holds: $MANIFEST; of a checkpoint of before, which has none, it holds the sizes that its marker lists.
what_it_holds() {
  bounded 60 "$S5CMD" cat "$FROM/.complete" >"$TEMP/marker" 2>"$TEMP/client.log" ||
    die 11 "$FROM/.complete can't be read: $(head -c 200 "$TEMP/client.log")" 'the marker lists the files' 'again'
  MANIFEST=$TEMP/manifest.json
  if ! fetch_manifest "$NAME, step $STEP" "$MANIFEST" "$FROM"; then
    log verify "warn  $FROM has no manifest: only the sizes of its files are proved, not their content"
    MANIFEST=$TEMP/.listing/manifest.json
    mkdir "$TEMP/.listing"
    python -c 'import json, sys
files = [{"path": e["path"], "bytes": int(e["bytes"]), "crc64nvme": ""} for e in json.load(sys.stdin)["files"]]
json.dump({"name": sys.argv[1], "files": files}, sys.stdout)' "step-$STEP" <"$TEMP/marker" >"$MANIFEST" 2>/dev/null ||
      die 13 "$FROM/.complete can't be understood" 'the marker lists the files' 'STEP=… for an older checkpoint'
  fi
  manifest check "$MANIFEST" >"$TEMP/check" || die 13 "$FROM: its manifest is refused (line above)" 'a manifest names files of its own folder' 'STEP=… for an older checkpoint'
  read -r _ FILES BYTES <"$TEMP/check"
}

fetch() {
  local staging=$1 rc=0 free
  free=$(free_bytes "$PLACE")
  ((free > BYTES)) || die 10 "$PLACE: $(mb "$BYTES") MB are needed, $(mb "$free") MB are free" 'the whole checkpoint is brought' 'TMPDIR=… or --keep DIR on a larger disk'
  tries "$NAME, step $STEP" "$MANIFEST" "$FROM" "$staging" || rc=$?
  if ((rc == 12)) && grep -q NoSuchKey "$TEMP/client.log"; then rc=13; fi
  case $rc in
    0) return ;;
    3) die 3 "the bucket refuses its objects (line above)" "key and secret may read $BASE" 'mend them, then again' ;;
    10) die 10 "$PLACE is full or refuses to be written" 'the whole checkpoint is brought' 'TMPDIR=… or --keep DIR on a larger disk' ;;
    13) die 13 "$FROM is damaged: a file is missing, or of another content than its manifest says" \
      'a checkpoint is whole when every file is proved' "RUN_ID=$NAME STEP=… for an older one; a run that goes on takes it by itself" ;;
    *) die 12 "the transfer failed, $RETRIES of $RETRIES tries used" 'every file is proved' 'again' ;;
  esac
}

main() {
  local -a ARGUMENTS=("$@")
  local rc=0 began=${EPOCHREALTIME/,/.} staging KEEP='' FROM='' MANIFEST='' FILES=0 BYTES=0
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
    --keep) KEEP=${2:-} && shift $(($# > 1 ? 2 : 1)) && [[ -n $KEEP ]] || die 2 '--keep has no folder' '--keep DIR' 'scripts/verify_checkpoint.sh --help' ;;
  esac
  no_arguments "${BASH_SOURCE[0]}" "$@"
  need_cmd python
  need_cmd setpriv 'Linux: apt-get install util-linux'
  own_temp
  choose_run
  mkdir -p "${KEEP:=$TEMP}" 2>/dev/null && PLACE=$(cd "$KEEP" && pwd) && [[ -w $PLACE ]] ||
    die 10 "$KEEP can't be written" 'the checkpoint is kept there' 'name another folder'
  cd "$ROOT"
  read_configuration
  transfer_settings
  store_environment
  choose_step
  [[ ! -e $PLACE/step-$STEP ]] || die 2 "$PLACE/step-$STEP is there already" 'what is kept is written once' 'remove it, or name another folder'
  what_it_holds
  log verify "$NAME, step $STEP: $FILES files, $(mb "$BYTES") MB from $FROM"
  staging=$PLACE/.step-$STEP
  fetch "$staging"
  log verify "every file is here and proved, ${SECONDS} s; reading it"
  cp "$TEMP/marker" "$staging/files/.complete"
  [[ $MANIFEST == */.listing/* ]] || cp "$MANIFEST" "$staging/files/manifest.json"
  mv -T "$staging/files" "$PLACE/step-$STEP"
  rm -rf -- "$staging"
  proving wmtp.drill "$PLACE/step-$STEP" --run "$NAME" --step "$STEP" --began "$began" || rc=$?
  ((rc == 0)) || die "$rc" "step $STEP of $NAME can't be restored" 'a checkpoint is one that can be read' "RUN_ID=$NAME STEP=… for an older one"
  log verify "ok: step $STEP of $NAME can be restored, $SECONDS s$([[ $PLACE == "$TEMP" ]] || printf '; it is %s' "$PLACE/step-$STEP")"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
