#!/usr/bin/env bash
# Usage: [ALGO=critic-wmtp] scripts/minitest.sh
# The whole way, small and on this machine: dry run -> test models -> bucket -> startup script (sync, vocabularies, training
# on 2 gloo ranks with FSDP, upload) -> the checklist, filled with what was measured. An embedded S3 server is the bucket, a
# folder under build/ is /app. A run that was interrupted goes on; a finished one is started afresh.
# LAUNCHER=vessl or docker: the models to the bucket of the environment, then scripts/deploy.sh.
# Standard output: `name: value` rows, then `minitest: ok SECONDS s`; the same in build/minitest/RUN/summary.json.
# Exit codes: 0 done, else that of the stage that failed.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/children.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/children.bash"

GIVEN_ENV=${ENV:-}
export ENV=minitest ENV_MODE=minitest LAUNCHER=${LAUNCHER:-local} ALGO=${ALGO:-critic-wmtp}
export WMTP_ALGO=$ALGO
BUILD=$ROOT/build/minitest
declare -A seconds=()

stage() {
  local name=$1 began=$SECONDS rc=0
  shift
  log minitest "$name"
  run_child "$@" >"$RUN_DIR/$name.out"
  ((rc)) || rc=$ended_by
  if ((ended_by || rc == 75)); then # a signal, or MAX_HOURS
    log minitest "stopped in $name after $((SECONDS - began)) s; the same command goes on"
    exit "$rc"
  fi
  ((rc == 0)) || die "$rc" "$name ended with $rc after $((SECONDS - began)) s" '' 'mend what is named above, then the same command: it goes on'
  seconds[$name]=$((SECONDS - began))
  log minitest "$name ok, ${seconds[$name]} s"
}

keep() { copy_whole "$1" "$RUN_DIR/$2"; }

# What the startup script left: its standard output is the sync's JSON lines, then the path of the trainer's summary.
collect() {
  grep '^{' "$RUN_DIR/startup.out" >"$RUN_DIR/sync.jsonl"
  keep "$(tail -n 1 "$RUN_DIR/startup.out")" train.json
  keep "$WMTP_APP_ROOT/logs/$RUN_NAME/vocab.json" vocab.json
  keep "$WMTP_APP_ROOT/logs/$RUN_NAME/exit.json" exit.json
}

# A finished run of this name is done work; a new minitest means to see all of it again. summary.json goes last, so that a
# kill in here is repeated.
start_afresh() {
  [[ -e $RUN_DIR/summary.json ]] || return 0
  rm -rf -- "${WMTP_APP_ROOT:?}/models" "$WMTP_APP_ROOT/checkpoints/${RUN_NAME:?}" "$WMTP_APP_ROOT/logs/$RUN_NAME"
  aws --endpoint-url "$S3_ENDPOINT_URL" s3 rm --quiet --recursive "s3://$S3_BUCKET_NAME/checkpoints/$RUN_NAME/"
  rm -- "$RUN_DIR/summary.json"
}

# Known now, so not found out by the bucket in the middle of an upload.
need_room() {
  local free
  free=$(df --output=avail -B1000000 "$BUILD" | tail -n 1)
  ((free >= 500)) || die 10 "$BUILD: $((free)) MB free" 'bucket, models and checkpoints of a mini-test take up to 500 MB' \
    'make room, or: make clean'
}

make_app() {
  mkdir -p "$RUN_DIR" "$WMTP_APP_ROOT"/{models,checkpoints,mlruns_test,logs}
  ln -sfn "$ROOT/datasets" "$WMTP_APP_ROOT/datasets"
  ln -sfn "$RUN_NAME" "$BUILD/latest"
}

list_checkpoint() {
  aws --endpoint-url "$S3_ENDPOINT_URL" s3api head-object --bucket "$S3_BUCKET_NAME" \
    --key "${1#"s3://$S3_BUCKET_NAME/"}/.complete" >/dev/null ||
    die 11 "the checkpoint $1 is not listed in the bucket" 'a checkpoint that was uploaded has its marker' 'see the log above, then: make minitest'
}

rows() {
  local name page
  page=$(python -m wmtp.report "$WMTP_APP_ROOT/logs/$RUN_NAME" --out "$RUN_DIR") || exit "$?"
  for name in "${!seconds[@]}"; do printf '%s\t%s\n' "seconds_${name// /_}" "${seconds[$name]}"; done |
    cat - <(printf 'report\t%s\n' "${page#"$ROOT/"}") | python -m wmtp.minitest "$RUN_DIR" --seconds "$1"
}

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local began=$SECONDS config recipe digest
  [[ ${GIVEN_ENV:-minitest} == minitest ]] || die 2 "ENV=$GIVEN_ENV: this is the mini-test" 'it knows ENV=minitest only' "make deploy ENV=$GIVEN_ENV ALGO=$ALGO"
  [[ $LAUNCHER != local || ${DRY_RUN:-} != 1 ]] || die 2 'DRY_RUN=1: the mini-test does all of it, in a minute' 'a rehearsal is of what changes the cluster' \
    'make minitest, or only to look: make dryrun ENV=minitest'
  if [[ $LAUNCHER != local ]]; then
    log minitest "test models to the bucket, then the same on $LAUNCHER"
    python "$ROOT/tests/test_models/generate.py" >&2
    "$ROOT/scripts/publish_models.sh" --from "$ROOT/tests/test_models" --force test-llama-mtp test-rm-llama test-llama >&2
    exec "$ROOT/scripts/deploy.sh"
  fi
  if [[ -z ${S3_ENDPOINT_URL:-} ]]; then
    need_cmd python
    export S3_BUCKET_NAME=wmtp
    # The server is this script's parent, so that the script's own way is one: with a bucket in its environment.
    # Make dies of kill -9 alone; what it started then saves and ends.
    if [[ $(cat "/proc/$PPID/comm" 2>/dev/null || true) == make ]]; then tie TERM; fi
    exec "${tied[@]}" "$ROOT/scripts/bucket.sh" run "$ROOT/build/bucket" -- "${BASH_SOURCE[0]}" "$@"
  fi
  config=${CONFIG:-$ROOT/configs/config.local_minitest.yaml}
  recipe=${RECIPE:-$ROOT/tests/configs/recipe.${ALGO//-/_}.yaml}
  export WMTP_APP_ROOT=$BUILD/app
  digest=$(python -m wmtp.config --config "$config" --recipe "$recipe" --env minitest --get digest)
  export RUN_NAME=${RUN_NAME:-minitest-$ALGO-$(git -C "$ROOT" rev-parse --short=7 HEAD 2>/dev/null || echo 0000000)-$digest}
  export RUN_DIR=$BUILD/$RUN_NAME
  log minitest "$RUN_NAME: models, bucket, dry run, sync, vocabularies, training on this machine"
  mkdir -p "$BUILD" 2>/dev/null || die 10 "$BUILD can't be written" 'the run keeps its files there' 'make it writable'
  need_room
  hold "$BUILD/.lock" "another minitest runs in $BUILD" 'one at a time: they share the folder' "$RUN_NAME"
  start_afresh
  make_app
  watch_signals
  # First: a setting that is wrong is known in a second. What needs torch is about to be done for real.
  ONLY=${ONLY:-1,2,3,devices,reward} stage dryrun "$ROOT/scripts/test_vessl_config.sh"
  log minitest 'models, tokenizers, data, memory and twin were left out of it, the run itself tries them; all of it: make dryrun ENV=minitest'
  stage models python "$ROOT/tests/test_models/generate.py"
  stage publish "$ROOT/scripts/publish_models.sh" --from "$ROOT/tests/test_models" --force test-llama-mtp test-rm-llama test-llama
  stage startup "$ROOT/docker/vessl_startup.sh"
  collect
  list_checkpoint "$(jq_get "$RUN_DIR/train.json" checkpoint)"
  rows $((SECONDS - began))
}

jq_get() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"; }

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
