#!/usr/bin/env bats

bats_require_minimum_version 1.5.0

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
  unset ENV ALGO LAUNCHER CONFIG RECIPE RUN_NAME SET S3_BUCKET_NAME S3_ENDPOINT_URL MAX_HOURS WMTP_APP_ROOT
  export ONLY=1,2,3,devices,reward # what imports no torch
}

dryrun() { "$repo/scripts/test_vessl_config.sh" "$@"; }

@test "test_vessl_config: alone checks production for all three algorithms" {
  run -0 --separate-stderr dryrun
  for heading in '1/5 configuration' '2/5 paths' '3/5 registry' '4/5 distributed' '5/5 pipeline'; do
    [[ $stderr == *"$heading"* ]]
  done
  [[ $stderr == *'production, baseline-mtp, critic-wmtp, rho1-wmtp'* ]]
  [[ $stderr == *' 0 not checked, 0 FAIL in '* ]]
  [[ -z $output ]]
}

@test "test_vessl_config: every environment that has a configuration passes" {
  ENV=test ALGO=baseline-mtp run -0 --separate-stderr dryrun
  ENV=minitest ALGO=baseline-mtp run -0 --separate-stderr dryrun
  ENV=minitest LAUNCHER=vessl ALGO=critic-wmtp run -0 --separate-stderr dryrun
}

@test "test_vessl_config: shows each value with where it came from" {
  S3_BUCKET_NAME=my-bucket ALGO=baseline-mtp SET=seed=7 run -0 --separate-stderr dryrun
  [[ $stderr == *'seed: 7  (--set'* ]]
  [[ $stderr == *'storage.bucket: my-bucket  ('*'S3_BUCKET_NAME)'* ]]
  [[ $stderr == *'train.algo: baseline-mtp  (configs/recipe.baseline_mtp.yaml:'* ]]
  [[ $stderr == *'(default)'* ]]
}

@test "test_vessl_config: --json is standard output" {
  ALGO=rho1-wmtp run -0 --separate-stderr dryrun --json
  [[ $output == '{'*'"counts"'*'"findings"'* ]]
}

@test "test_vessl_config: all findings are shown, and the end is 2" {
  sed -e 's/mixed_precision/mixed_precison/' -e 's/^seed:.*/seed: many/' \
    "$repo/configs/config.vessl.yaml" >"$BATS_TEST_TMPDIR/a config.yaml"
  CONFIG="$BATS_TEST_TMPDIR/a config.yaml" ALGO=baseline-mtp run -2 --separate-stderr dryrun
  [[ $stderr == *mixed_precison* && $stderr == *seed* && $stderr != *Traceback* ]]
}

@test "test_vessl_config: the next command is the one that was called, its launcher and file too" {
  sed "s/compute_backend: cuda/compute_backend: cpu/" "$repo/configs/config.vessl_minitest.yaml" >"$BATS_TEST_TMPDIR/a config.yaml"
  export ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl CONFIG="$BATS_TEST_TMPDIR/a config.yaml"
  run -2 --separate-stderr dryrun
  [[ $stderr == *"next  edit the file, then: make dryrun ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl CONFIG='$CONFIG'"* ]]
  # What was chosen by name is not told: make exports it empty.
  local tree="$BATS_TEST_TMPDIR/tree"
  mkdir -p "$tree/configs" "$tree/tests"
  cp -r "$repo/scripts" "$repo/src" "$tree/"
  cp -r "$repo/tests/configs" "$tree/tests/configs"
  cp "$repo"/configs/recipe.*.yaml "$tree/configs/"
  cp "$CONFIG" "$tree/configs/config.vessl_minitest.yaml"
  CONFIG='' RECIPE='' run -2 --separate-stderr "$tree/scripts/test_vessl_config.sh"
  [[ $stderr == *$'LAUNCHER=vessl\n'* && $stderr != *CONFIG=* ]]
}

@test "test_vessl_config: a path outside /app is a FAIL for the cluster" {
  ALGO=baseline-mtp SET=paths.models.base=file:///data/llama run -2 --separate-stderr dryrun
  [[ $stderr == *FAIL*/data/llama* && $stderr != *Traceback* ]]
}

@test "test_vessl_config: refuses an ENV, ALGO and option outside the lists" {
  ENV=prod run -2 --separate-stderr dryrun
  [[ $stderr == *'ENV=prod'*'test minitest production'* ]]
  ALGO=foo run -2 --separate-stderr dryrun
  [[ $stderr == *'ALGO=foo'* ]]
  run -2 --separate-stderr dryrun --fast
  [[ $stderr == *'--fast'* ]]
}

# bats test_tags=long
@test "test_vessl_config: all of it, for cards of 40 GiB: what does not fit and what would, data, the twin" {
  unset ONLY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_PROFILE
  ALGO=critic-wmtp SET=launcher.resources.gpu_memory_gb=40 run -2 --separate-stderr dryrun
  [[ $stderr == *'FAIL         memory critic-wmtp           peak '*' of 40 GiB at step: does not fit'*'scoring'*'loading'*'gradients'*'saving'* ]]
  [[ $stderr == *'next  devices.fsdp.activation_ckpt=true gives '*' GiB; train.accumulation_steps=1 gives '*' GiB'* ]]
  [[ $stderr == *'not checked  compile '*'the twin runs without them'* ]]
  [[ $stderr == *'ok           twin critic_wmtp'*'2 ranks, 3 steps, saved, resumed, third step equal'* ]]
  # What lived in the twin is what was predicted, within 5 %.
  [[ $stderr =~ predicted\ [0-9.]+\ \([+-][0-4]\.[0-9]%\) ]]
  [[ $stderr == *'what this dry run could not promise'*'model llama-7b-mtp: no credentials of the bucket here'* ]]
  [[ $stderr == *' 1 FAIL in '* ]]
}

@test "test_vessl_config: killed with -9, early or in the twin, nothing goes on" {
  local pid i processes
  for processes in 2 4; do # preflight and its child; two ranks beside them
    ONLY=twin ALGO=baseline-mtp setsid "$repo/scripts/test_vessl_config.sh" >/dev/null 2>"$BATS_TEST_TMPDIR/err" 3>&- &
    pid=$!
    for ((i = 0; i < 900; i++)); do
      if (($(pgrep -s "$pid" | wc -l) >= processes)); then break; fi
      sleep 0.1
    done
    sleep 1
    kill -KILL "$pid"
    for ((i = 0; i < 50; i++)); do
      [[ -n $(pgrep -s "$pid" || true) ]] || break
      sleep 0.1
    done
    run -1 pgrep -s "$pid"
  done
}

@test "test_vessl_config: interrupted, it says so in one line and leaves nothing" {
  local pid
  mkdir "$BATS_TEST_TMPDIR/tmp"
  TMPDIR="$BATS_TEST_TMPDIR/tmp" ONLY=models ALGO=baseline-mtp "$repo/scripts/test_vessl_config.sh" >/dev/null 2>"$BATS_TEST_TMPDIR/err" 3>&- &
  pid=$!
  sleep 3
  kill -TERM "$pid"
  local rc=0
  wait "$pid" || rc=$?
  [[ $rc == 143 && $(<"$BATS_TEST_TMPDIR/err") == *'FAIL  interrupted (SIGTERM)'* && $(<"$BATS_TEST_TMPDIR/err") != *Traceback* ]]
  [[ -z $(find "$BATS_TEST_TMPDIR/tmp" -name 'wmtp-*') ]]
}

@test "deploy: a rehearsal counts what the dry run found, its summary is none of that" {
  # shellcheck disable=SC2030,SC2034 # for what is sourced
  rehearsed_dry_run() { (source "$repo/scripts/deploy.sh" && HERE=$BATS_TEST_TMPDIR DRY_RUN=1 && dry_run 0); }
  ENV=production ALGO=critic-wmtp SET='launcher.resources.gpus=2' run -0 --separate-stderr rehearsed_dry_run
  [[ $stderr == *'would refuse: the dry run ended with 2: 1 FAIL'* ]]
  ONLY=modles ENV=production ALGO=critic-wmtp run -0 --separate-stderr rehearsed_dry_run
  [[ $stderr == *'would refuse: the dry run ended with 2: 1 FAIL'* && $stderr == *'next  ONLY=models'* ]]
}

@test "deploy: a rehearsal tells all six stages, and that its digest is a placeholder" {
  local tree="$BATS_TEST_TMPDIR/a tree"
  mkdir -p "$tree/tests"
  cp -r "$repo"/{scripts,docker,configs,datasets,src,requirements,Dockerfile} "$tree/"
  cp -r "$repo/tests/configs" "$tree/tests/"
  ln -s "$repo/.venv" "$tree/.venv"
  git -C "$tree" init -q
  git -C "$tree" -c user.name=t -c user.email=t@t commit -q --allow-empty -m tree
  unset VESSL_ACCESS_TOKEN REGISTRY_TOKEN
  DOCKER_HOST=unix:///nowhere ENV=production ALGO=critic-wmtp WMTP_REVISION=abcdef0 ONLY=1 DRY_RUN=1 run -0 --separate-stderr "$tree/scripts/deploy.sh"
  [[ -z $output && $(grep -cE '^[1-6]/6 ' <<<"$stderr") == 6 ]]
  [[ $stderr == *'4/6       submit '*'5/6       follow    would follow'*'6/6       report    would follow'*'nothing was changed'*': 96 GPU-hours'* ]]
  [[ $stderr == *'@sha256:0000'*'0 (placeholder: '* ]]
}

@test "SET: spaces around = are one finding, with the pairs as they should be" {
  local given
  for given in 'optim.lr = 0.1' 'optim.lr= 0.1' 'optim.lr =0.1'; do
    SET="seed=7 $given train.max_steps=5" run -2 --separate-stderr dryrun
    [[ ${#stderr_lines[@]} == 3 && ${stderr_lines[0]} == *"FAIL  SET=\"seed=7 $given train.max_steps=5\"" ]]
    [[ ${stderr_lines[1]} == *'no spaces around ='* && ${stderr_lines[2]} == *'next  SET="seed=7 optim.lr=0.1 train.max_steps=5"' ]]
  done
  # A word that is no pair, and an empty value, are the settings' own findings.
  SET='optim.lr' run -2 --separate-stderr dryrun
  [[ $stderr == *'is no override'* ]]
  SET='project= seed=7' ALGO=critic-wmtp run -2 --separate-stderr dryrun
  [[ $stderr != *'no spaces'* ]]
}
