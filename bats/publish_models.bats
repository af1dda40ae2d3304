#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  need_bucket
}

publish_again() { "$repo/scripts/publish_models.sh" --from "$work/from" "$@"; }

@test "publish: prints name and digest when a folder is new" {
  make_model
  run -0 --separate-stderr publish_again
  [[ $output =~ ^$name$'\t'[0-9a-f]{64}$ ]]
}

@test "publish: says so when the content is published already" {
  make_model
  publish
  run -0 --separate-stderr publish_again "$name"
  [[ $stderr == *"already published"* ]]
  grep -qxF "$output" "$work/published"
}

@test "publish: another digest when the content changed" {
  make_model
  publish
  echo more >>"$work/from/$name/config.json"
  run -0 --separate-stderr publish_again "$name"
  [[ $stderr != *already* ]]
  ! grep -qF "$output" "$work/published"
}

@test "publish: 2 when the folder is not there" {
  run -2 --separate-stderr publish_again nothing
}

@test "publish: 3 when the secret is wrong" {
  make_model
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr publish_again
}

@test "publish: uploads nothing when DRY_RUN is set" {
  make_model
  DRY_RUN=1 run -0 --separate-stderr publish_again
  [[ $stderr == *'would run'* ]]
  run -13 "$repo/scripts/sync_models.sh" --model "$name"
}
