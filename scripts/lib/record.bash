# Where the record of a run is: this machine's own folder, or the mirror beside its checkpoints in the bucket. To be sourced
# after common.bash, settings.bash, store.bash, in ROOT. `own` is the stage's: it makes the folder TEMP and minds its end.
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it

RECORD='' KIND='' BUCKET=0 PAGE=()

# record_place NAME: BASE, the folder of all runs' checkpoints in the bucket, and the client; 1 where there is no bucket.
BASE=''
record_place() {
  local environment=${ENV:-${1%%-*}}
  [[ $environment =~ ^(test|minitest|production)$ ]] || environment=production
  [[ $environment != test ]] || return 1
  choose_settings "$environment" ''
  storage_settings paths.checkpoints.base_path
  BASE=$(<"$TEMP/settings")
  [[ $BASE == s3://* ]] || return 1
  store_environment
}

# fetch_record NAME DIR: DIR becomes the mirror of the run's record; files that are here already are not moved again.
# 0 it is, 1 there is none so far, 3 refused, 11 no answer. MOVED: bytes.
MOVED=0
fetch_record() {
  local from=$BASE/$1/record file rc=0
  MOVED=0
  bounded 30 "$S5CMD" --retry-count 1 cat "$from/record.json" >"$TEMP/record.json" 2>"$TEMP/client.log" || rc=$?
  if ((rc)); then
    if grep -qE 'NoSuchKey|status code: 404|no object found|object .* not found' "$TEMP/client.log"; then return 1; fi
    if grep -qE 'AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|NoSuchBucket|403' "$TEMP/client.log"; then return 3; fi
    return 11
  fi
  # The same mirror as before: nothing to move, but it was looked at now.
  if cmp -s "$TEMP/record.json" "$2/record.json"; then touch -- "$2/record.json" && return; fi
  rm -rf -- "$2/.new" && mkdir -p "$2/.new"
  python -m wmtp.monitor --lacking "$2" --from "$from" <"$TEMP/record.json" >"$TEMP/commands" || return 11
  if [[ -s $TEMP/commands ]]; then
    bounded 120 "$S5CMD" --retry-count 1 --numworkers 4 run "$TEMP/commands" >"$TEMP/client.out" 2>"$TEMP/client.log" || return 11
  fi
  for file in "$2"/.new/*; do
    [[ -f $file ]] || continue
    MOVED=$((MOVED + $(stat -c %s "$file")))
    mv -f -- "$file" "$2/"
  done
  # Last: what was interrupted is done again.
  cp -- "$TEMP/record.json" "$2/.new/record.json" && mv -f -- "$2/.new/record.json" "$2/" && rmdir -- "$2/.new"
}

# on_this_machine: NAME and RECORD of what RUN_ID says, or of the newest run, where this machine itself made it.
on_this_machine() {
  local at submitted
  [[ ${LAUNCHER:-local} == local ]] || return 1
  [[ -z ${RUN_ID:-} || $RUN_ID =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$ ]] || no_run 'a run is named by its name or number'
  IFS=$'\t' read -r at RECORD < <(local_records "${RUN_ID:-}") || return 1
  submitted=$(find build -mindepth 3 -maxdepth 3 -path "build/${ENV:-*}/${RUN_ID:-*}/run.id" -printf '%T@\n' 2>/dev/null |
    sort -rn | head -n 1 || true)
  # Of one name: what was submitted. Of no name: the newest.
  [[ -z $submitted || (-z ${RUN_ID:-} && ${submitted%.*} -le ${at%.*}) ]] || return 1
  NAME=${RECORD##*/} KIND=local
  PAGE=(--checkpoints "${RECORD%/logs/*}/checkpoints/$NAME")
  [[ -d ${PAGE[1]} ]] || PAGE[1]=${RECORD%/logs/*}/test_checkpoints/$NAME
}

# in_the_bucket: of a run that nobody submitted from here, where VESSL can't be asked, its record alone tells.
in_the_bucket() {
  local rc=0 none="neither this machine nor this checkout knows it"
  [[ -n ${RUN_ID:-} && ! $RUN_ID =~ ^[0-9]+$ && ${LAUNCHER:-local} == local ]] || return 1
  if [[ -z ${LAUNCHER:-} ]] && filled VESSL_ACCESS_TOKEN; then return 1; fi
  ! compgen -G "$ROOT/build/${ENV:-*}/$RUN_ID/run.id" >/dev/null || return 1
  if [[ -z ${AWS_PROFILE:-}${AWS_WEB_IDENTITY_TOKEN_FILE:-}${AWS_CONTAINER_CREDENTIALS_RELATIVE_URI:-} ]] && ! filled AWS_ACCESS_KEY_ID; then
    no_run "$none; there are no credentials to ask VESSL or the bucket" '; else export VESSL_ACCESS_TOKEN=… or AWS_ACCESS_KEY_ID=…'
  fi
  own
  record_place "$RUN_ID" || no_run "$none"
  NAME=$RUN_ID RECORD=$ROOT/build/$ENV/$RUN_ID/record BUCKET=1
  fetch_record "$NAME" "$RECORD" || rc=$?
  case $rc in
    0) ;;
    1) no_run "$none, and $BASE has no record of it; VESSL was not asked" ;;
    *) die "$rc" "run $RUN_ID: $BASE can't be read: $(head -c 200 "$TEMP/client.log")" 'the record is beside the checkpoints' 'see S3_ENDPOINT_URL and AWS_*, then again' ;;
  esac
}
