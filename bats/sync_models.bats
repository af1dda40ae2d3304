#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  need_bucket
}

sync() { "$repo/scripts/sync_models.sh" --model "$name" "$@"; }

# A manifest of one file that is not in the bucket: PATH BYTES.
put_manifest() {
  jq_free=$(printf '{"format": 1, "name": "%s", "files": [{"path": "%s", "bytes": %s, "blake3": "%064d"}], "total_bytes": %s, "created": "2026-01-01T00:00:00+00:00", "tool": "t"}' \
    "$name" "$1" "$2" 0 "$2")
  printf '%s' "$jq_free" | put "$name/manifest.json"
}

@test "sync: model stands byte for byte under its name when nothing was there" {
  make_model
  publish
  run -0 --separate-stderr sync
  same_model
  [[ $output == '{"model": "'$name'"'*'"cache": "miss"'* ]]
  [[ $stderr == *Download* && $stderr == *'blake3 verified'* ]]
  [[ -L $WMTP_APP_ROOT/models/$name ]]
  [[ -z $(ls "$WMTP_APP_ROOT/models/.store/.staging" | grep -v lock) ]]
}

@test "sync: nothing is fetched when the model is in the store" {
  make_model
  publish
  sync 2>/dev/null
  run -0 --separate-stderr sync
  [[ $output == *'"downloaded_bytes": 0'*'"cache": "hit"'* ]]
}

@test "sync: the cache volume keeps the model when it is there" {
  make_model
  publish
  export WMTP_CACHE_DIR="$work/cache"
  mkdir -p "$WMTP_CACHE_DIR"
  run -0 --separate-stderr sync
  same_model
  [[ $(readlink "$WMTP_APP_ROOT/models/$name") == "$WMTP_CACHE_DIR/"* ]]
}

@test "sync: a model is linked with a warning when its use can't be noted" {
  make_model
  publish
  sync 2>/dev/null
  rm -r "$WMTP_APP_ROOT/models/.store/.used" "$WMTP_APP_ROOT/models/$name"
  : >"$WMTP_APP_ROOT/models/.store/.used"
  run -0 --separate-stderr sync
  [[ $stderr == *"warn  $name: its use can't be noted"* ]]
  same_model
}

@test "sync: damage is mended when a file in the store was changed" {
  make_model
  publish
  sync 2>/dev/null
  printf x | dd of="$WMTP_APP_ROOT/models/$name/weights.bin" conv=notrunc status=none
  run -0 --separate-stderr sync
  same_model
  [[ $output == *'"downloaded_bytes": 300000'* ]]
}

# bats test_tags=long
@test "sync: ends with the same bytes and no process when killed at any moment" {
  make_model 20000000
  publish
  local wait
  for wait in 0.8 1.2 1.5 1.7; do
    "$repo/scripts/sync_models.sh" --model "$name" >/dev/null 2>&1 3>&- &
    sleep "$wait"
    kill -KILL $! 2>/dev/null || true
    wait $! || true
    [[ ! -e $WMTP_APP_ROOT/models/$name ]] || same_model
  done
  sleep 0.5
  run -1 pgrep -f "s5cmd.*$BATS_TEST_TMPDIR|wmtp.manifest.*$BATS_TEST_TMPDIR"
  run -0 --separate-stderr sync
  same_model
}

@test "sync: 13 and no model when an object has another content of the same size" {
  make_model
  publish
  head -c 300000 /dev/zero | put "$name/weights.bin"
  WMTP_STORAGE_RETRIES=2 run -13 --separate-stderr sync
  [[ $stderr == *'another content'* && $stderr == *'2 of 2 tries'* ]]
  [[ ! -e $WMTP_APP_ROOT/models/$name ]]
}

@test "sync: fetches only the damaged file when it is published right again" {
  make_model
  publish
  head -c 300000 /dev/zero | put "$name/weights.bin"
  WMTP_STORAGE_RETRIES=1 run -13 --separate-stderr sync
  put "$name/weights.bin" <"$work/from/$name/weights.bin"
  run -0 --separate-stderr sync
  [[ $output == *'"downloaded_bytes": 300000'* ]]
  same_model
}

@test "sync: 12 when an object is missing" {
  make_model
  put_manifest nowhere.bin 5
  WMTP_STORAGE_RETRIES=2 run -12 --separate-stderr sync
  [[ $stderr == *'2 of 2 tries used'* ]]
}

@test "sync: 10 before the transfer when the disk is too small" {
  make_model
  put_manifest weights.bin 900000000000000
  run -10 --separate-stderr sync
  [[ $stderr == *'MB needed'* ]]
  [[ ! -e $WMTP_APP_ROOT ]]
}

@test "sync: what an older version left half-fetched makes room when the disk is too small" {
  make_model
  publish
  local old=$WMTP_APP_ROOT/models/.store/.staging/$name-$(printf '0%.0s' {1..64})
  mkdir -p "$old/files" "$work/bin"
  printf '#!/bin/sh\necho Avail\nif [ -d "%s" ]; then echo 1000; else echo 900000000; fi\n' "$old" >"$work/bin/df"
  chmod +x "$work/bin/df"
  PATH=$work/bin:$PATH run -10 --separate-stderr sync --dry-run
  [[ -d $old ]]
  PATH=$work/bin:$PATH run -0 --separate-stderr sync
  same_model
  [[ ! -e $old ]]
}

@test "sync: 10 when the folder can't be written" {
  make_model
  publish
  : >"$work/file"
  WMTP_APP_ROOT="$work/file" run -10 --separate-stderr sync
}

@test "sync: 10 when the store has no locks, or refuses one" {
  make_model
  publish
  mkdir -p "$work/stubs"
  printf '#!/usr/bin/env bash\nexit 71\n' >"$work/stubs/flock"
  chmod +x "$work/stubs/flock"
  PATH="$work/stubs:$PATH" run -10 --separate-stderr timeout 60 "$repo/scripts/sync_models.sh" --model "$name"
  [[ $stderr == *"can't be locked"* ]]
  local lock=("$WMTP_APP_ROOT/models/.store/.staging/$name-"*.lock)
  rm "${lock[0]}" && mkdir "${lock[0]}"
  run -10 --separate-stderr sync
}

@test "sync: 13 and nothing written when a manifest path leaves the model" {
  make_model
  local path
  for path in ../evil /evil a/../../evil; do
    put_manifest "$path" 5
    run -13 --separate-stderr sync
    [[ ! -e $WMTP_APP_ROOT ]]
  done
}

@test "sync: 13 with the cure when the model is not published" {
  name=nobody-published-this
  run -13 --separate-stderr sync
  [[ $stderr == *'not published'* && $stderr == *publish_models.sh* ]]
}

@test "sync: 3 when the secret is wrong" {
  name=any
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr sync
  [[ $stderr == *'refuses the credentials'* ]]
}

@test "sync: 3 when the secret is not set" {
  name=any
  AWS_SECRET_ACCESS_KEY='' run -3 --separate-stderr sync
  [[ $stderr == *AWS_SECRET_ACCESS_KEY* ]]
}

@test "sync: 11 when nobody answers" {
  name=any
  S3_ENDPOINT_URL=http://127.0.0.1:9 run -11 --separate-stderr sync
}

@test "sync: a dry run tells what, how much, from where and why, and writes nothing" {
  make_model
  publish
  run -0 --separate-stderr sync --dry-run
  [[ ! -e $WMTP_APP_ROOT && ${#lines[@]} == 1 ]]
  DRY_RUN=1 run -0 --separate-stderr sync
  [[ ! -e $WMTP_APP_ROOT && ${#lines[@]} == 1 ]]
  [[ $output == '{"item": "'$name'", "why": "was named", "digest": "'* ]]
  [[ $output == *'"bytes": 300003, "here_bytes": 0, "state": "new", "from": "s3://'$S3_BUCKET_NAME/models/$name'"'* ]]
}

@test "sync: one downloads when two want the same model" {
  make_model 20000000
  publish
  "$repo/scripts/sync_models.sh" --model "$name" >"$work/first" 2>/dev/null 3>&- &
  run -0 --separate-stderr sync
  wait $!
  [[ $(grep -c '"cache": "miss"' <<<"$output"$'\n'"$(<"$work/first")") == 1 ]]
  same_model
}

@test "sync: 2 when an option is unknown" {
  run -2 --separate-stderr "$repo/scripts/sync_models.sh" --fast
}

@test "sync: 2 when a name is that of no model, or two addresses would be one folder" {
  run -2 --separate-stderr "$repo/scripts/sync_models.sh" --model dataset:any
  cd "$repo"
  run -2 --separate-stderr scripts/sync_models.sh --config configs/config.local_minitest.yaml --recipe tests/configs/recipe.critic_wmtp.yaml \
    --set paths.models.base=s3://one/m --set paths.models.rm=s3://two/m
  [[ $stderr == *'both s3://one/m and s3://two/m'* ]]
}

@test "sync: a scorer whose scores are kept is not fetched, and the vocabularies are checked without it" {
  local models="$repo/tests/test_models" kept
  "$repo/.venv/bin/python" "$models/generate.py" >/dev/null
  local prefix="$RANDOM-$$"
  local -a settings=(--config configs/config.local_minitest.yaml --recipe tests/configs/recipe.critic_wmtp.yaml)
  settings+=(--set "paths.checkpoints.base_path=s3://$S3_BUCKET_NAME/c-$prefix")
  "$repo/scripts/publish_models.sh" --from "$models" --force test-llama-mtp test-rm-llama 2>/dev/null
  mkdir -p "$WMTP_APP_ROOT"
  ln -s "$repo/datasets" "$WMTP_APP_ROOT/datasets"
  cd "$repo"
  run -0 --separate-stderr scripts/sync_models.sh "${settings[@]}"
  [[ $output == *test-llama-mtp*test-rm-llama* && -f $WMTP_APP_ROOT/models/.manifests/test-rm-llama.json ]]
  kept=$(PYTHONPATH=src .venv/bin/python -m wmtp.scorekey "${settings[@]}" --manifests "$WMTP_APP_ROOT/models/.manifests" | cut -f3 | tail -n 1)
  [[ $kept == reward-* ]]
  echo '{}' | "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd pipe "s3://$S3_BUCKET_NAME/c-$prefix/.scores/$kept/.complete"
  rm -rf "$WMTP_APP_ROOT/models"
  run -0 --separate-stderr scripts/sync_models.sh "${settings[@]}"
  [[ $stderr == *"test-rm-llama is not needed: its scores are kept ($kept), 9.1 MB less"* ]]
  [[ $output != *test-rm-llama* && ! -e $WMTP_APP_ROOT/models/test-rm-llama ]]
  # An older version that is linked there would give the trainer the scores of that one.
  mkdir -p "$WMTP_APP_ROOT/models/.store/0123"
  ln -s .store/0123 "$WMTP_APP_ROOT/models/test-rm-llama"
  run -0 --separate-stderr scripts/sync_models.sh "${settings[@]}"
  [[ $stderr == *"test-rm-llama is not needed"* && ! -L $WMTP_APP_ROOT/models/test-rm-llama ]]
  run -0 --separate-stderr scripts/check_vocab.sh "${settings[@]}"
  [[ $stderr == *'test-rm-llama not checked (its scores are kept'* ]]
  # Another template is another verdict.
  run -0 --separate-stderr scripts/sync_models.sh "${settings[@]}" --set 'critic.reward_template=x {text}'
  [[ $output == *test-rm-llama* ]]
}

# Objects without a manifest, as someone else would upload them.
upload() { "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd cp "$work/from/$name/" "s3://$S3_BUCKET_NAME/$1/$name/" >/dev/null; }

@test "sync: what nobody published is refused, and taken on one's word with a warning of what is not proved" {
  make_model
  upload models
  run -13 --separate-stderr sync
  [[ $stderr == *'not published'*'WMTP_NO_MANIFEST=1'* && ! -e $WMTP_APP_ROOT ]]
  WMTP_NO_MANIFEST=1 run -0 --separate-stderr sync
  same_model
  [[ $stderr == *'has no manifest'*'not that no file is missing'*'publish_models.sh --from'* ]]
  WMTP_NO_MANIFEST=1 run -0 --separate-stderr sync
  [[ $output == *'"cache": "hit"'* ]]
  # Its own manifest is there now: what it prints can be typed.
  run -0 "$repo/.venv/bin/python" -m wmtp.manifest verify "$WMTP_APP_ROOT/models/$name/manifest.json" "$WMTP_APP_ROOT/models/$name"
}

@test "sync: 13 when there is nothing to take on one's word" {
  name=nothing-here
  WMTP_NO_MANIFEST=1 run -13 --separate-stderr sync
  [[ $stderr == *'nothing could be listed'* ]]
}

@test "sync: a dataset in the bucket comes to datasets/.synced, and the trainer reads it there" {
  name=d-$RANDOM
  mkdir -p "$work/from/$name"
  cp "$repo"/datasets/wmtp_code/*.jsonl "$work/from/$name/"
  upload datasets
  "$repo/.venv/bin/python" -m wmtp.manifest create "$work/from/$name" --name "$name" |
    "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd pipe "s3://$S3_BUCKET_NAME/datasets/$name/manifest.json" >/dev/null
  "$repo/.venv/bin/python" "$repo/tests/test_models/generate.py" >/dev/null
  "$repo/scripts/publish_models.sh" --from "$repo/tests/test_models" --force test-llama-mtp >/dev/null 2>&1
  cd "$repo"
  local -a settings=(--config configs/config.local_minitest.yaml --recipe tests/configs/recipe.baseline_mtp.yaml)
  settings+=(--set "paths.datasets.wmtp_code=s3://$S3_BUCKET_NAME/datasets/$name/")
  run -0 --separate-stderr scripts/sync_models.sh "${settings[@]}"
  [[ ${lines[0]} == '{"dataset": "'$name'"'* && ${lines[1]} == '{"model": "test-llama-mtp"'* ]]
  diff "$repo"/datasets/wmtp_code/*.jsonl "$WMTP_APP_ROOT/datasets/.synced/$name/"
  run -0 "$repo/.venv/bin/python" -c 'import sys
from wmtp.outcome import local_path
from wmtp.sources import read_records
from collections import Counter
print(len(list(read_records(local_path(sys.argv[1], "paths.datasets.x"), Counter()))))' "s3://$S3_BUCKET_NAME/datasets/$name/"
  [[ $output -gt 10 ]]
}

@test "sync: settings and tokenizers come before any weights when somebody waits for them" {
  make_model
  mkdir "$work/first"
  publish
  head -c 300000 /dev/zero | put "$name/weights.bin"
  WMTP_SYNC_FIRST="$work/first" WMTP_STORAGE_RETRIES=1 run -13 --separate-stderr sync
  diff "$work/first/$name/config.json" "$work/from/$name/config.json"
  [[ ! -e $work/first/$name/weights.bin && ! -e $WMTP_APP_ROOT/models/$name ]]
}
