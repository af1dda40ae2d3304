#!/usr/bin/env bats
# The pulled image at work: models from the embedded bucket, two ranks on the CPU, checkpoints, stop and resume.

load helpers

setup_file() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  need_engines
  plain_environment
  export tree="$BATS_FILE_TMPDIR/tree" repo
  real_tree "$tree"
  # Models that an earlier run of the suite synced are no proof of a sync.
  docker volume rm -f wmtp-models-cache >/dev/null
  export ENV=minitest ALGO=critic-wmtp LAUNCHER=docker POLL_S=1
  export SET="launcher.image=$image:latest launcher.resources.gpus=2 devices.compute_backend=cpu devices.distributed.backend=gloo devices.mixed_precision=fp32"
  "$tree/scripts/build.sh" >"$BATS_FILE_TMPDIR/built" 2>"$BATS_FILE_TMPDIR/log"
  "$tree/scripts/push.sh" <<<"$REGISTRY_TOKEN" >>"$BATS_FILE_TMPDIR/log" 2>&1
  "$tree/scripts/../.venv/bin/python" "$tree/tests/test_models/generate.py" >>"$BATS_FILE_TMPDIR/log" 2>&1
  "$tree/scripts/publish_models.sh" --from "$tree/tests/test_models" --force test-llama-mtp test-rm-llama test-llama >>"$BATS_FILE_TMPDIR/log" 2>&1
}

# Those of this file: other suites have theirs on the same engine.
teardown() { docker ps -aq --filter label=wmtp.run | xargs -r docker rm -fv >/dev/null 2>&1; }

# started NAME OPTION…: the image's own command, as the cluster starts it.
started() {
  docker run --name "$1" --label wmtp.run=wmtp --network host --shm-size 1g -e ENV_MODE=minitest -e WMTP_ALGO=baseline-mtp -e LAUNCHER=docker -e SET -e RUN_NAME="$1" \
    -e S3_ENDPOINT_URL -e S3_BUCKET_NAME -e AWS_DEFAULT_REGION -e AWS_ACCESS_KEY_ID -e AWS_SECRET_ACCESS_KEY "${@:2}" "$(<"$BATS_FILE_TMPDIR/built")"
}

@test "container: deploy: sync, vocabularies, two ranks with FSDP, upload, all its steps" {
  run -0 --separate-stderr "$tree/scripts/deploy.sh" <<<''
  [[ $stderr == *'5/6       follow    ok'*'Step 1'* ]]
  local number=$output
  FOLLOW=1 RUN_ID=$number run -0 --separate-stderr "$tree/scripts/logs.sh"
  [[ $output == *'Download test-llama-mtp'*'vocabularies ok'*'Step 12/12'*'training ok'* ]]
  docker cp "$number:/app/test_checkpoints" "$BATS_TEST_TMPDIR/checkpoints"
  [[ -n $(find "$BATS_TEST_TMPDIR/checkpoints" -name .complete) ]]
  RUN_ID=$number run -0 --separate-stderr "$tree/scripts/status.sh"
  [[ $output == *completed* ]]
}

@test "container: SIGTERM saves and ends with 75; resume goes on with the same container" {
  export SET="$SET train.max_steps=2000"
  RUN_NAME=stopped run -0 --separate-stderr "$tree/scripts/deploy.sh" <<<''
  RUN_ID=stopped run -0 --separate-stderr "$tree/scripts/stop.sh"
  [[ $output == failed && $stderr == *'exit code 75'* ]]
  RUN_ID=stopped run -0 --separate-stderr "$tree/scripts/resume.sh"
  local i
  for ((i = 0; i < 300; i++)); do
    if docker logs stopped 2>&1 | grep -q 'goes on after step'; then break; fi
    sleep 1
  done
  docker logs stopped 2>&1 | grep 'goes on after step'
  # A container keeps the settings of its first start, so others are refused, not shown and forgotten.
  docker kill stopped
  SET="$SET train.max_steps=1999" RUN_NAME=stopped RESUME=1 run -2 --separate-stderr "$tree/scripts/submit.sh"
  [[ $stderr == *'stopped is a container of another image or other settings'* ]]
  told_what_to_do
  docker rm stopped
  RUN_ID=stopped run -2 --separate-stderr "$tree/scripts/status.sh"
  [[ $stderr == *'has no such container'* ]]
  told_what_to_do
}

@test "container: a missing secret is named before the sync" {
  AWS_SECRET_ACCESS_KEY='' run -3 started secret
  [[ $output == *'AWS_SECRET_ACCESS_KEY is not set'*'wmtp-aws-secret-access-key'* && $output != *Download* ]]
}

@test "container: a full disk is named before the sync" {
  run -10 started full --tmpfs /app/logs:uid=10001,size=500k
  [[ $output == *"can't be written"*'next'* && $output != *Download* ]]
  run -10 started small --tmpfs /app/models:uid=10001,size=2m --tmpfs /cache/models:uid=0,mode=755,size=1m
  [[ $output == *'MB needed'* && $output != *Download* ]]
}

@test "container: /cache/models that is root's is named with its cure, and the sync goes on without it" {
  run -0 docker run --rm --network host --tmpfs /cache/models:uid=0,mode=755 -e SET -e S3_ENDPOINT_URL -e S3_BUCKET_NAME -e AWS_DEFAULT_REGION \
    -e AWS_ACCESS_KEY_ID -e AWS_SECRET_ACCESS_KEY "$(<"$BATS_FILE_TMPDIR/built")" scripts/sync_models.sh --model test-llama
  [[ $output == *"/cache/models can't be written"*'chown 10001'*'test-llama ok'* ]]
}

@test "container: MAX_HOURS ends it with 75" {
  MAX_HOURS=0.0001 run -75 started hours -e MAX_HOURS
  [[ $output == *'MAX_HOURS: 0.0001 h are used up'*'next'* ]]
}
