#!/usr/bin/env bats

bats_require_minimum_version 1.5.0

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
  unset ENV ALGO LAUNCHER CONFIG RECIPE RUN_NAME SET S3_BUCKET_NAME S3_ENDPOINT_URL MAX_HOURS WMTP_APP_ROOT
  export TWIN=0
}

dryrun() { "$repo/scripts/test_vessl_config.sh" "$@"; }

@test "test_vessl_config: alone checks production for all three algorithms" {
  run -0 --separate-stderr dryrun
  for heading in '1/5 configuration' '2/5 paths' '3/5 registry' '4/5 distributed' '5/5 pipeline'; do
    [[ $stderr == *"$heading"* ]]
  done
  [[ $stderr == *'production, baseline-mtp, rho1-wmtp, critic-wmtp'* ]]
  [[ $stderr == *'not checked'*'not built yet'* && $stderr == *' 0 FAIL in '* ]]
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

@test "test_vessl_config: the twin trains the production recipe, saves, resumes" {
  TWIN=1 ALGO=critic-wmtp run -0 --separate-stderr dryrun
  [[ $stderr == *'ok           twin critic_wmtp'*'2 ranks, 3 steps, saved, resumed, third step equal'* ]]
}
