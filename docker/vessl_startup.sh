#!/usr/bin/env bash
# Usage: docker/vessl_startup.sh      (no arguments: a node starts it with its environment)
# What the node does: environment, models, vocabularies, training, in this order; the same script runs on a
# laptop with WMTP_APP_ROOT set to another folder than /app.
#   ENV_MODE   production, minitest or test (test: no sync, one process)     WMTP_ALGO  as configs/recipe.*.yaml: critic-wmtp, …
#   LAUNCHER   local, docker or vessl    CONFIG, RECIPE  other files than those chosen by name    SET  "key=value …"
#   MAX_HOURS  saves and ends with 75 after so many hours (default: launcher.max_hours)
#   RUN_NAME   the same name is the same work: it goes on from its newest checkpoint    WMTP_APP_ROOT, S3_*, AWS_*
#   ALLOW      keys of the recipe in which it may differ from that checkpoint, "key key …"
# The trainer starts beside a sync that takes longer than a moment: settings and tokenizers come first, with these it reads
# and tokenizes the data, and waits for the weights with everything else ready. When it fails, the sync is stopped.
# Standard output: the sync's JSON lines, then the path of summary.json (beside it: the record of the run, python -m wmtp.record).
# Standard error: the story.
# Exit codes: the table of the stages: 0 done, 2 bad input, 3 missing, 10-14 models, 20 training failed,
# 75 stopped with everything saved, 130 and 143 ended by a signal before there was anything to save.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=startup
BEGAN=$(date +%s.%N)
# shellcheck source=../scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/common.bash"
# shellcheck source=../scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/settings.bash"
# shellcheck source=../scripts/lib/children.bash
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/children.bash"

# shellcheck source=../scripts/lib/node.bash
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/node.bash"

# stage NAME COMMAND…: one step with its seconds; its exit code is the script's.
stage() {
  local name=$1 started=$SECONDS rc=0 began
  began=$(date +%s.%N)
  shift
  ((ended_by == 0)) || leave "$ended_by"
  run_child "$@"
  ((ended_by == 0)) || leave "$ended_by"
  if [[ -n ${failed_early:-} ]]; then train; fi
  ((rc != 126 && rc != 127)) || leave 3 "$name can't be started: $1"
  ((rc == 0)) || leave "$rc" "$name ended with $rc after $((SECONDS - started)) s"
  phase "$name" "$began"
  log startup "$name ok: $((SECONDS - started)) s"
}

# prepare: everything that is checked before the first side effect.
prepare() {
  need_env ENV_MODE WMTP_ALGO
  need_cmd python
  choose_settings "$ENV_MODE" "$WMTP_ALGO"
  overrides
  # shellcheck disable=SC2153  # ENV is set by choose_settings
  export ENV ALGO LAUNCHER
  local values hours
  values=$(python -m wmtp.config "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" \
    --get launcher.resources.gpus launcher.max_hours digest) || leave 2 "$CONFIG with $RECIPE can't be used"
  { read -r ranks && read -r hours && read -r digest; } <<<"$values"
  hours=${MAX_HOURS:-$hours}
  [[ -z $hours || $hours =~ ^[0-9]{1,4}(\.[0-9]+)?$ ]] || leave 2 "MAX_HOURS=$hours" 'a number of hours'
  if [[ $ENV != test ]]; then need_credentials; fi
  RUN_NAME=${RUN_NAME:-$ENV-$ALGO-$(revision)-$digest}
  local folder
  for folder in models datasets checkpoints mlruns logs/"$RUN_NAME"; do
    mkdir -p "$app/$folder" 2>/dev/null || leave 10 "$app/$folder: can't be written" 'the run keeps its files there'
  done
  # A full disk still makes folders: only a written byte proves room.
  { head -c 1000000 /dev/zero >"$app/logs/$RUN_NAME/.room"; } 2>/dev/null ||
    leave 10 "$app/logs/$RUN_NAME: can't be written, $(free_mb "$app") MB free" 'the run keeps its files there'
  rm -f -- "$app/logs/$RUN_NAME/.room"
  if [[ -n $hours ]]; then limit_hours "$hours"; fi
  keep_record
}

environment() {
  local key=no free
  if filled AWS_ACCESS_KEY_ID && filled AWS_SECRET_ACCESS_KEY; then key=yes; fi
  free=$(df -Pk "$app" | awk 'NR == 2 {printf "%.1f", $4 * 1024 / 1e9}')
  log startup "$RUN_NAME: $ENV, $ALGO, launcher $LAUNCHER, $CONFIG, $RECIPE"
  log startup "bucket ${S3_BUCKET_NAME:-wmtp} (${AWS_DEFAULT_REGION:-eu-north-1}${S3_ENDPOINT_URL:+, own endpoint}), credentials: $key; $app, $free GB free"
}

# begin_training: one rank per GPU under torchrun, alone for test; `early` is its process. It starts when the models are
# here, or when they are not after $EARLY seconds: what it does before it needs them is then done beside the sync.
EARLY=${WMTP_EARLY_S:-3} # benchmarks/startup.py sets it
begin_training() {
  exit_file=$app/logs/$RUN_NAME/exit.json summary=$app/logs/$RUN_NAME/summary.json here=$app/logs/$RUN_NAME/.models
  first=$app/logs/$RUN_NAME/.first
  local -a command=(python -m wmtp.launch --standalone --nproc-per-node "$ranks" -m wmtp.train) allowed=()
  if [[ $ENV == test ]]; then command=(python -m wmtp.train); fi
  read -ra allowed <<<"${ALLOW:-}"
  command+=("${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --run-name "$RUN_NAME" "${allowed[@]/#/--allow=}"
    --tags "$LAUNCHER,$ENV,$ALGO" --exit-file "$exit_file" --summary "$summary" --after "$here" --first "$first")
  rm -rf "$exit_file" "$summary" "$here" "$first" "$app/logs/$RUN_NAME"/{failure.json,failure.md,bundle.tar.gz}
  mkdir "$first"
  export WMTP_SYNC_FIRST=$first
  # It waits without a child of its own, so that a signal finds it until the trainer has its place.
  # shellcheck disable=SC2016  # the inner shell expands it
  "${tied[@]}" bash -c 'exec 9<> <(:); until [[ -e $2 ]] || ((SECONDS >= $1)); do read -rt 0.1 -u 9 || true; done
    exec 9>&-; shift 2; export WMTP_LAUNCHED=$(date +%s.%N); exec "$@"' early "$EARLY" "$here" "${command[@]}" <&0 &
  early=$!
  # A trainer that ends before the models are here has failed: no byte more is fetched for it.
  trap 'if [[ -n $early && ! -e $here ]] && ((child)) && ! kill -0 "$early" 2>/dev/null; then failed_early=1; kill -TERM "$child" 2>/dev/null || true; fi' CHLD
}

# train: the code is the trainer's own (exit.json).
train() {
  local started=$SECONDS rc=0
  ((ended_by == 0)) || leave "$ended_by"
  if [[ $ENV != test ]]; then reach=ranks; fi
  trap - CHLD
  [[ -n ${failed_early:-} ]] || : >"$here"
  await_child "$early"
  early=''
  local code cause='' took=$((SECONDS - started))
  code=$(python -c 'import json, sys; e = json.load(open(sys.argv[1])); print(int(e["code"])); print("step", e["step"], (e["cause"] or "").partition("\n")[0].partition("; rule: ")[0])' \
    "$exit_file" 2>/dev/null) || code=
  if [[ -z $code ]]; then
    [[ -z ${hung:-} ]] || leave 20 "training ended with $rc after $took s: it did not save within ${WMTP_GRACE_S:-1200} s and was killed"
    ((ended_by == 0)) || leave "$ended_by"
    leave 20 "training ended with $rc after $took s and left no exit.json" 'the trainer itself says how it ended'
  fi
  [[ $code != *$'\n'* ]] || cause=${code#*$'\n'} code=${code%%$'\n'*}
  ((code != 0 || rc == 0)) || leave 20 "the trainer wrote 0, but its launcher ended with $rc after $took s" 'every rank ends with 0'
  ((code == 0)) || leave "$code" "training ended with $code after $took s: $cause"
  log startup "training ok: $took s"
  log startup "done in $SECONDS s: $summary"
  printf '%s\n' "$summary"
}

main() {
  case ${1:-} in
    '') ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
    *) die 2 "$1: no arguments are known" 'the environment says what to do' 'docker/vessl_startup.sh --help' ;;
  esac
  app=${WMTP_APP_ROOT:-/app}
  cd "$ROOT"
  watch_signals
  prepare
  environment
  begin_training
  if [[ $ENV == test ]]; then log startup 'test: no sync'; else
    stage sync "$ROOT/scripts/sync_models.sh" "${SETTINGS[@]}" "${OVERRIDES[@]}" >"$app/logs/$RUN_NAME/.sync"
    tee -a "$app/logs/$RUN_NAME/sync.jsonl" <"$app/logs/$RUN_NAME/.sync"
  fi
  stage vocabularies "$ROOT/scripts/check_vocab.sh" "${SETTINGS[@]}" "${OVERRIDES[@]}" >"$app/logs/$RUN_NAME/.vocab.json"
  mv -f -- "$app/logs/$RUN_NAME/.vocab.json" "$app/logs/$RUN_NAME/vocab.json"
  train
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
