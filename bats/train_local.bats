#!/usr/bin/env bats

bats_require_minimum_version 1.5.0

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
  unset ENV ALGO LAUNCHER CONFIG RECIPE RUN_NAME SET ENV_MODE WMTP_ALGO
  export WMTP_APP_ROOT="$BATS_TEST_TMPDIR/an app" OMP_NUM_THREADS=1
}

local_test() { "$repo/scripts/train_local.sh" "$@"; }

@test "train_local: trains on one device with the test models, the summary is standard output" {
  SET='train.max_steps=5' RUN_NAME=local run -0 --separate-stderr local_test
  [[ $output == "$WMTP_APP_ROOT/logs/local/summary.json" && -s $output ]]
  [[ $stderr == *'no sync'*'Step 5/5'* ]]
}

@test "train_local: refuses an algorithm outside the list" {
  ALGO=foo run -2 --separate-stderr local_test
  [[ $stderr == *'ALGO=foo'*'baseline-mtp'* ]]
}

@test "train_local: is the local test only" {
  ENV=production run -2 --separate-stderr local_test
  [[ $stderr == *'ENV=production'* ]]
}

@test "train_local: a mistake in --set ends with 2 and names the key" {
  SET='trian.max_steps=2' run -2 --separate-stderr local_test
  [[ $stderr == *'trian'* && $stderr != *Traceback* ]]
}

@test "minitest: is the mini-test only, and no rehearsal" {
  ENV=production run -2 --separate-stderr "$repo/scripts/minitest.sh"
  [[ $stderr == *'ENV=production'*'make deploy ENV=production'* && -z $output ]]
  DRY_RUN=1 run -2 --separate-stderr "$repo/scripts/minitest.sh"
  [[ $stderr == *'DRY_RUN=1'*'make dryrun ENV=minitest'* && -z $output ]]
}

@test "minitest: what was stopped and saved, its hours used up, has not failed" {
  stage_of() { (source "$repo/scripts/minitest.sh" && RUN_DIR=$BATS_TEST_TMPDIR && stage startup bash -c "exit $1"); }
  run -75 --separate-stderr stage_of 75
  [[ $stderr == *'stopped in startup after 0 s; the same command goes on' && $stderr != *FAIL* ]]
  run -20 --separate-stderr stage_of 20
  [[ $stderr == *'FAIL  startup ended with 20'*'next  mend what is named above'* ]]
}
