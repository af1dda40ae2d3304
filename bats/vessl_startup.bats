#!/usr/bin/env bats
# The stages and the trainer are stubs here: the subject is their order, the exit codes and the signals.

bats_require_minimum_version 1.5.0

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
  tree="$BATS_TEST_TMPDIR/a tree"
  mkdir -p "$tree/scripts/lib" "$tree/docker"
  cp "$repo"/scripts/lib/*.bash "$tree/scripts/lib/"
  cp "$repo/docker/vessl_startup.sh" "$tree/docker/"
  cp -r "$repo/configs" "$tree/configs"
  mkdir -p "$tree/tests"
  cp -r "$repo/tests/configs" "$tree/tests/configs"
  cp "$repo/bats/stubs/stage" "$tree/scripts/sync_models.sh"
  cp "$repo/bats/stubs/stage" "$tree/scripts/check_vocab.sh"
  REAL_PYTHON=$repo/.venv/bin/python
  [[ -x $REAL_PYTHON ]] || REAL_PYTHON=$(command -v python)
  export REAL_PYTHON
  export PATH="$repo/bats/stubs:$PATH" CALLS="$BATS_TEST_TMPDIR/calls" WMTP_APP_ROOT="$BATS_TEST_TMPDIR/an app"
  export ENV_MODE=minitest WMTP_ALGO=baseline-mtp LAUNCHER=local WMTP_REVISION=abcdef0123
  export AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=canary
  unset CONFIG RECIPE RUN_NAME SET ENV ALGO MAX_HOURS AWS_PROFILE
  : >"$CALLS"
  mkdir -p "$WMTP_APP_ROOT"
}

startup() { "$tree/docker/vessl_startup.sh"; }

# Starts it in the background and waits until the child that the signal is for is there.
begin() {
  # Job control and env: else bash makes background children ignore SIGINT, as this suite's own caller may.
  set -m
  env --default-signal=INT "$tree/docker/vessl_startup.sh" >"$BATS_TEST_TMPDIR/out" 2>"$BATS_TEST_TMPDIR/err" 3>&- &
  pid=$!
  set +m
  local i
  for ((i = 0; i < 600; i++)); do
    [[ ! -s $CALLS.pid ]] || return 0
    sleep 0.1
  done
  cat "$BATS_TEST_TMPDIR/err"
  return 1
}

gone() {
  local i
  for ((i = 0; i < 100; i++)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  return 1
}

@test "vessl_startup: sync, vocabularies and training in this order, one rank per GPU" {
  run -0 --separate-stderr startup
  run -0 cut -d' ' -f1 "$CALLS"
  [[ $output == $'sync_models\ncheck_vocab\npython\nmodels' ]]
  grep -q -- '^sync_models --config configs/config.local_minitest.yaml --recipe tests/configs/recipe.baseline_mtp.yaml$' "$CALLS"
  grep -q -- 'wmtp.launch --standalone --nproc-per-node 2 -m wmtp.train' "$CALLS"
  grep -q -- '--env minitest --run-name minitest-baseline-mtp-abcdef0-[0-9a-f]\{7\} --tags local,minitest,baseline-mtp' "$CALLS"
}

@test "vessl_startup: standard output is the summary's path, each stage says its seconds" {
  RUN_NAME=one run -0 --separate-stderr startup
  [[ $output == "$WMTP_APP_ROOT/logs/one/summary.json" ]]
  [[ $stderr == *'sync ok: '*' s'*'vocabularies ok: '*' s'*'training ok: '*' s'* ]]
}

@test "vessl_startup: beside a sync that takes its time the trainer gets ready, and waits for the models" {
  WAIT_sync_models=5 RUN_NAME=one run -0 --separate-stderr startup
  run -0 cut -d' ' -f1 "$CALLS"
  [[ $output == $'sync_models\npython\ncheck_vocab\nmodels' ]]
  run -0 "$REAL_PYTHON" -c 'import json, sys
for line in open(sys.argv[1]):
    entry = json.loads(line)
    print(entry["phase"], round(entry["ended"] - entry["began"]))' "$WMTP_APP_ROOT/logs/one/phases.jsonl"
  [[ $output == $'sync 5\nvocabularies '[01] ]]
}

@test "vessl_startup: a stage that fails ends the trainer that waits beside it" {
  WAIT_sync_models=5 FAIL_sync_models=12 run -12 --separate-stderr startup
  gone "$(<"$CALLS.waits")"
  run -1 grep -E 'models are here|check_vocab' "$CALLS"
}

@test "vessl_startup: a trainer that fails while the models come stops the sync, and its code is the script's" {
  TRAINER=early WAIT_sync_models=50 run -2 --separate-stderr startup
  [[ $stderr == *'training ended with 2'*'line 3 is no JSON'* ]]
  run -1 grep check_vocab "$CALLS"
}

@test "vessl_startup: ALLOW names what may differ from the checkpoint" {
  ALLOW='optim.lr train.max_steps' run -0 --separate-stderr startup
  grep -q -- '--allow=optim.lr --allow=train.max_steps ' "$CALLS"
}

@test "vessl_startup: production takes the cluster's configuration and the production recipe" {
  ENV_MODE=production LAUNCHER=vessl WMTP_ALGO=critic-wmtp run -0 --separate-stderr startup
  grep -q -- '^sync_models --config configs/config.vessl.yaml --recipe configs/recipe.critic_wmtp.yaml$' "$CALLS"
  grep -q -- '--nproc-per-node 4 ' "$CALLS"
}

@test "vessl_startup: test skips the sync and starts one process without torchrun" {
  ENV_MODE=test run -0 --separate-stderr startup
  run -1 grep -E 'sync_models|wmtp.launch' "$CALLS"
  grep -q -- '-m wmtp.train --config tests/configs/config.local_test.yaml' "$CALLS"
}

@test "vessl_startup: CONFIG, RECIPE and SET win" {
  CONFIG=configs/config.vessl_minitest.yaml RECIPE=configs/recipe.baseline_mtp.yaml SET='seed=7 train.max_steps=5' \
    run -0 --separate-stderr startup
  grep -q -- '--config configs/config.vessl_minitest.yaml --recipe configs/recipe.baseline_mtp.yaml --set seed=7 --set train.max_steps=5' "$CALLS"
}

@test "vessl_startup: refuses a value outside its list by name" {
  ENV_MODE=prod run -2 --separate-stderr startup
  [[ $stderr == *'ENV=prod'*'test minitest production'* ]]
  WMTP_ALGO=foo run -2 --separate-stderr startup
  [[ $stderr == *'ALGO=foo'*'baseline-mtp critic-wmtp rho1-wmtp'* ]]
  LAUNCHER=slurm run -2 --separate-stderr startup
  [[ $stderr == *'LAUNCHER=slurm'*'local docker vessl'* ]]
  ENV_MODE=production run -2 --separate-stderr startup
  [[ $stderr == *'LAUNCHER=local with ENV=production'* ]]
  [[ ! -s $CALLS ]]
}

@test "vessl_startup: names a variable that is missing" {
  unset WMTP_ALGO
  run -3 --separate-stderr startup
  [[ $stderr == *WMTP_ALGO* ]]
  [[ ! -s $CALLS ]]
}

@test "vessl_startup: a configuration that can't be used ends with 2 before any stage" {
  SET='devices.mixed_precison=bf16' run -2 --separate-stderr startup
  [[ $stderr == *mixed_precison* && $stderr != *Traceback* ]]
  [[ ! -s $CALLS ]]
}

@test "vessl_startup: ends with 10 when the work folder can't be written" {
  touch "$BATS_TEST_TMPDIR/a file"
  WMTP_APP_ROOT="$BATS_TEST_TMPDIR/a file/app" run -10 --separate-stderr startup
  [[ $stderr == *"can't be written"*WMTP_APP_ROOT* ]]
}

@test "vessl_startup: a failing stage gives its exit code, and the last line says what to do" {
  for code in 3 10 11 12 13; do
    : >"$CALLS"
    FAIL_sync_models=$code run "-$code" --separate-stderr startup
    [[ $stderr == *"sync ended with $code"* && ${stderr_lines[-1]} == *next* ]]
    run -1 grep check_vocab "$CALLS"
  done
  FAIL_check_vocab=14 run -14 --separate-stderr startup
  [[ ${stderr_lines[-1]} == *next*check-vocab* ]]
  run -1 grep wmtp.train "$CALLS"
}

@test "vessl_startup: a stage that is not there ends it with 3" {
  rm "$tree/scripts/check_vocab.sh"
  run -3 --separate-stderr startup
  [[ $stderr == *"vocabularies can't be started"* ]]
  run -1 grep wmtp.train "$CALLS"
}

@test "vessl_startup: the trainer's code and cause come from exit.json, not from torchrun" {
  TRAINER=fails run -20 --separate-stderr startup
  [[ $stderr == *'step 7 loss nan: not finite'* && ${stderr_lines[-1]} == *next* ]]
}

@test "vessl_startup: ends with 20 when there is no exit.json, also where an older run left one" {
  mkdir -p "$WMTP_APP_ROOT/logs/one"
  echo '{"code": 0, "step": 12, "cause": null}' >"$WMTP_APP_ROOT/logs/one/exit.json"
  TRAINER=mute RUN_NAME=one run -20 --separate-stderr startup
  [[ $stderr == *'left no exit.json'* ]]
}

@test "vessl_startup: no secret is printed" {
  AWS_ACCESS_KEY_ID=akid-4711 AWS_SECRET_ACCESS_KEY=hunter2 FAIL_sync_models=11 run -11 --separate-stderr startup
  [[ $output$stderr != *hunter2* && $output$stderr != *akid-4711* ]]
  [[ $stderr == *'credentials: yes'* ]]
}

@test "vessl_startup: SIGTERM reaches the rank, not torchrun, and the script waits for its 75" {
  export TRAINER=saves
  begin
  kill -TERM "$pid"
  rc=0
  wait "$pid" || rc=$?
  cat "$BATS_TEST_TMPDIR/err"
  ((rc == 75))
  run -1 grep 'torchrun got' "$CALLS"
  grep -q "next.*RUN_NAME=minitest-baseline-mtp-abcdef0" "$BATS_TEST_TMPDIR/err"
}

@test "vessl_startup: a signal during the sync ends it: 143 and 130, and no training" {
  export SLOW_sync_models=1
  for signal in TERM INT; do
    rm -f "$CALLS.pid"
    begin
    kill "-$signal" "$pid"
    rc=0
    wait "$pid" || rc=$?
    ((rc == 143 - 13 * (${#signal} == 3)))
    gone "$(<"$CALLS.pid")"
  done
  run -1 grep wmtp.train "$CALLS"
}

@test "vessl_startup: kill -9 leaves no child" {
  command -v setpriv || skip 'no setpriv here: children outlive a kill -9'
  export SLOW_sync_models=1
  begin
  kill -KILL "$pid"
  gone "$(<"$CALLS.pid")"
}

@test "vessl_startup: a missing secret ends it before anything is made" {
  rmdir "$WMTP_APP_ROOT"
  AWS_SECRET_ACCESS_KEY='' run -3 --separate-stderr startup
  [[ $stderr == *'AWS_SECRET_ACCESS_KEY is not set'*'wmtp-aws-secret-access-key'* && ! -s $CALLS && ! -e $WMTP_APP_ROOT ]]
}

@test "vessl_startup: MAX_HOURS ends the training as SIGTERM does, with 75, and says so" {
  TRAINER=saves MAX_HOURS=0.002 run -75 --separate-stderr startup
  [[ $stderr == *'at most 0.002 h'*'stopped: MAX_HOURS: 0.002 h are used up'*'training ended with 75'*'next  make minitest'* ]]
  MAX_HOURS=soon run -2 --separate-stderr startup
  [[ $stderr == *'MAX_HOURS=soon'* ]]
}

@test "vessl_startup: MAX_HOURS ends a sync too; its clock ends with the script" {
  SLOW_sync_models=1 MAX_HOURS=0.0003 run -75 --separate-stderr startup
  [[ $stderr == *'MAX_HOURS: 0.0003 h'* ]]
  MAX_HOURS=7.77 run -0 --separate-stderr startup
  sleep 0.5
  run -1 pgrep -f 'clock 27972'
}

@test "vessl_startup: a training that does not end with its hours is killed after the grace" {
  TRAINER=hangs MAX_HOURS=0.0015 WMTP_GRACE_S=1 run -20 --separate-stderr startup
  [[ $stderr == *'FAIL  MAX_HOURS: 0.0015 h are used up'* ]]
}

@test "vessl_startup: no secret is in a trace" {
  run -0 --separate-stderr bash -x "$tree/docker/vessl_startup.sh"
  [[ $stderr == *'credentials: yes'* && $stderr != *canary* ]]
}

@test "vessl_startup: a signal while the trainer is about to start ends it, or reaches it" {
  export TRAINER=saves
  for wait in 0.1 0.2 0.3 0.5; do
    rm -f "$CALLS.pid"
    set -m
    env --default-signal=INT "$tree/docker/vessl_startup.sh" >/dev/null 2>"$BATS_TEST_TMPDIR/err" 3>&- &
    pid=$!
    set +m
    until grep -q check_vocab "$CALLS" 2>/dev/null; do sleep 0.02; done
    sleep "$wait"
    kill -TERM "$pid"
    rc=0
    wait "$pid" || rc=$?
    ((rc == 75 || rc == 143)) || { cat "$BATS_TEST_TMPDIR/err" && false; }
    : >"$CALLS"
  done
}
