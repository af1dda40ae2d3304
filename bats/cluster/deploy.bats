#!/usr/bin/env bats
# Deploy on real parts: engine, registry with a login, the real client, a stub of the service.

load helpers

setup_file() {
  cluster_file_setup
  need_engines
}
setup() {
  cluster_setup
  plain_environment
  real_tree "$BATS_TEST_TMPDIR/real"
  tree="$BATS_TEST_TMPDIR/real"
  export ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl SET="launcher.image=$image:latest"
  unset S3_ENDPOINT_URL
}
teardown() { cluster_teardown; }

deploy() { "$tree/scripts/deploy.sh" "$@" </dev/null; }

@test "deploy: all stages in order; again it is the same run and nothing is sent" {
  run -0 --separate-stderr deploy
  [[ $output == 7 && $(runs) == 1 ]]
  [[ $stderr == *'1/6       dry run   ok'*'2/6       build     ok'*'3/6       push      ok'*'4/6       submit    ok'*'5/6       follow    ok'*'Step 10/12'*'6/6       report    ok'* ]]
  [[ $(<"$tree/build/minitest/latest/report.md") == *"$image@sha256:"*'Step 10/12'* ]]
  fault
  # The stub's run has gone on to its end; a deploy of an ended run says so and how to go on.
  run --separate-stderr deploy
  [[ $status == 0 || ($status == 2 && $stderr == *'make resume'*) ]]
  [[ $(runs) == 1 && $stderr == *' 0 layers pushed, '* ]]
}

# bats test_tags=long
@test "deploy: killed with -9 in each stage and repeated, it ends in one run and one digest" {
  local where pid i
  export SET="launcher.image=$WMTP_REGISTRY/team/killed:latest"
  fault logs-stop
  for where in '1/6|dry run' 'build  ' 'push  ' 'submit  ' 'run 7 is'; do
    : >"$BATS_TEST_TMPDIR/err"
    STALL_S=60 setsid "$tree/scripts/deploy.sh" </dev/null >/dev/null 2>"$BATS_TEST_TMPDIR/err" 3>&- &
    pid=$!
    for ((i = 0; i < 6000; i++)); do
      if grep -qE "$where" "$BATS_TEST_TMPDIR/err"; then break; fi
      sleep 0.05
    done
    # It had come so far, and it lived.
    grep -qE "$where" "$BATS_TEST_TMPDIR/err"
    kill -KILL "$pid"
    # Its children die with it: none goes on to push or submit.
    for ((i = 0; i < 100; i++)); do
      [[ -n $(pgrep -s "$pid" || true) ]] || break
      sleep 0.1
    done
    run -1 pgrep -s "$pid"
  done
  fault
  run -0 --separate-stderr deploy
  [[ $output == 7 && $(runs) == 1 ]]
  # One pushed digest: the registry holds one manifest of this test's own repository.
  run -0 find "$(dirname "${WMTP_ENGINE_A#unix://}")/registry/docker/registry/v2/repositories/team/killed/_manifests/revisions/sha256" -mindepth 1 -maxdepth 1
  [[ ${#lines[@]} == 1 ]]
}

# bats test_tags=long
@test "deploy: each fault of the service ends with a code and what to do" {
  fault fails-initializing
  run -1 --separate-stderr deploy
  [[ $stderr == *ImagePullBackOff* ]]
  told_what_to_do
  fault logs-stop
  RUN_NAME=quiet STALL_S=6 run -11 --separate-stderr deploy
  [[ $stderr == *'has written nothing for'*'still lives and costs'* ]]
  told_what_to_do
  fault 401
  RUN_NAME=other run -3 --separate-stderr deploy
  told_what_to_do
  fault
  VESSL_ACCESS_TOKEN='' run -3 --separate-stderr deploy
  [[ $stderr != *'2/6'* ]]
  REGISTRY_TOKEN=wrong run -3 --separate-stderr deploy
  told_what_to_do
  [[ $(runs) == 2 ]]
}

@test "deploy: one at a time; who holds the lock is named; a dead holder's lock is free" {
  fault logs-stop
  STALL_S=60 setsid "$tree/scripts/deploy.sh" </dev/null >/dev/null 2>"$BATS_TEST_TMPDIR/err" 3>&- &
  local pid=$! i
  for ((i = 0; i < 1200; i++)); do
    if grep -q '1/6' "$BATS_TEST_TMPDIR/err"; then break; fi
    sleep 0.1
  done
  run -1 --separate-stderr deploy
  [[ $stderr == *"another deploy of minitest is at work: process $pid of "* ]]
  kill -KILL "$pid"
  fault fails-initializing
  run -1 --separate-stderr deploy
  [[ $stderr != *'another deploy'* ]]
}

@test "deploy: DRY_RUN=1 for production, without engine, credential or clean tree, prints every change and makes none" {
  unset VESSL_ACCESS_TOKEN VESSL_DEFAULT_ORGANIZATION VESSL_DEFAULT_PROJECT REGISTRY_TOKEN SET
  echo '# x' >>"$tree/src/wmtp/paths.py"
  DOCKER_HOST=unix:///nowhere ENV=production DRY_RUN=1 run -0 --separate-stderr deploy
  [[ -z $output ]]
  [[ $stderr == *"would run: 'docker' 'build'"*"would run: 'docker' 'push'"*'vessl run create -f '* ]]
  [[ $stderr == *'would refuse: 1 files are not committed'* && $stderr == *'would refuse: the container engine does not answer'* ]]
  [[ $stderr == *'would refuse: VESSL_ACCESS_TOKEN is not set'* && $stderr == *'models llama-7b-mtp, starling-rm-7b: 53.0 GB'* ]]
  [[ $stderr == *'2/6       build     refuses'*'3/6       push      refuses'*'4/6       submit    refuses'*'5/6       follow    would follow'*'6/6       report    would follow'*'nothing was changed'*': 96 GPU-hours'* ]]
  [[ $stderr == *'what would refuse it ('*'- VESSL_ACCESS_TOKEN is not set'*'- the container engine does not answer'*'To do it: make deploy'* ]]
  [[ $(grep -c -- '- the container engine does not answer' <<<"$stderr") == 1 && $stderr != *unbound* ]]
  [[ ! -e $stub/requests.log && $(runs) == 0 ]]
}

@test "deploy: ENV and ALGO are asked for, and named in the command that goes on" {
  ENV='' run -2 --separate-stderr deploy
  [[ $stderr == *'ENV is not set'*'make deploy ENV=production ALGO=critic-wmtp'* ]]
  ALGO='' run -2 --separate-stderr deploy
  LAUNCHER=local run -2 --separate-stderr deploy
  RUN_NAME=mine REGISTRY_TOKEN=wrong run -3 --separate-stderr deploy
  [[ $(tail -n 1 <<<"$stderr") == *'make deploy ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl RUN_NAME=mine '* ]]
}
