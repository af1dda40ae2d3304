#!/usr/bin/env bats
# What comes after a submission: status, logs, stop, resume, watch.

load helpers

setup_file() { cluster_file_setup; }
setup() {
  cluster_setup
  submit >/dev/null 2>&1
  unset ENV ALGO LAUNCHER
}
teardown() { cluster_teardown; }

stage() { "$tree/scripts/$1.sh"; }

# ended STATUS [LINE…]: run 7 as it ended, with its last lines.
ended() {
  "$repo/.venv/bin/python" -c 'import json, sys
run = json.load(open(sys.argv[1])); run["status"] = sys.argv[2]; json.dump(run, open(sys.argv[1], "w"))' "$stub/runs/7.json" "$1"
  printf '%s\n' "${@:2}" >"$stub/runs/7.log"
}

@test "status: number, name and status of the newest run, of a number, of a name" {
  run -0 --separate-stderr stage status
  [[ $output =~ ^7$'\t'minitest-critic-wmtp-abcdef0-[0-9a-f]{7}$'\t'(initializing|running) ]]
  local name
  name=$(cut -f2 <<<"$output")
  rm "$tree/build/minitest/$name/run.id"
  RUN_ID=$name run -0 --separate-stderr stage status
  [[ $output == 7$'\t'"$name"* ]]
  RUN_ID=7 run -0 --separate-stderr stage status
  RUN_ID=99 run -2 --separate-stderr stage status
  told_what_to_do
}

@test "logs: nothing so far is no failure; then the last lines; FOLLOW=1 stays until the end" {
  run -0 --separate-stderr stage logs
  [[ -z $output && $stderr == *'nothing so far'* ]]
  FOLLOW=1 run -0 --separate-stderr stage logs
  [[ $output == *'Step 1/12'*'Step 12/12'*'training ok'* ]]
  [[ $(grep -c 'Step 5/12' <<<"$output") == 1 ]]
  TAIL=2 run -0 --separate-stderr stage logs
  [[ $(wc -l <<<"$output") == 2 ]]
  TAIL=many run -2 --separate-stderr stage logs
}

@test "logs: a run that fails while initializing ends a follower with its reason" {
  fault fails-initializing
  FOLLOW=1 run -1 --separate-stderr stage logs
  [[ $stderr == *ImagePullBackOff* ]]
  told_what_to_do
}

@test "stop and resume: a new run of the same name with the same run file" {
  run -0 --separate-stderr stage stop
  [[ $output == terminated && $(status_of 7) == terminated ]]
  run -0 --separate-stderr stage resume
  [[ $output == 8 ]]
  cmp "$stub/runs/7.yaml" "$stub/runs/8.yaml"
  run -0 --separate-stderr stage resume
  [[ $output == 8 && $(runs) == 2 ]]
}

@test "watch: a preempted run is submitted again, WATCH_MAX times at most" {
  fault preempted
  WATCH_MAX=1 run -75 --separate-stderr stage watch
  [[ $(runs) == 2 && $stderr == *Preempted*'submitted again (1 of 1)'*'used up'* ]]
  told_what_to_do
}

# bats test_tags=long
@test "watch: a run that was preempted before it ran is submitted again, one that never could run is not" {
  ended failed
  sed -i 's/"status_reason": "[^"]*"/"status_reason": "Preempted by the cluster"/' "$stub/runs/7.json"
  run -0 --separate-stderr stage watch
  [[ $output == 8 && $stderr == *'Preempted by the cluster'*'submitted again (1 of 5)'* ]]
}

@test "watch: ends with the run that completes" {
  run -0 --separate-stderr stage watch
  [[ $output == 7 && $(runs) == 1 ]]
}

@test "watch: what a person stopped, what failed by itself, what used up its hours is left alone" {
  ended failed 'startup   FAIL  vocabularies ended with 14 after 2 s'
  run -14 --separate-stderr stage watch
  [[ $stderr == *'its own fault (code 14)'* ]]
  ended failed 'startup   stopped: MAX_HOURS: 24 h are used up after 86400 s; training ended with 75 after 86000 s: step 9 SIGTERM'
  run -75 --separate-stderr stage watch
  [[ $stderr == *'hours are used up'* ]]
  ended running 'Step 1/2'
  run -0 --separate-stderr stage stop
  run -143 --separate-stderr stage watch
  [[ $stderr == *'a person stopped it'* && $(runs) == 1 ]]
}

# bats test_tags=long
@test "watch: a run that was told to end and saved is submitted again" {
  ended failed 'Step 3/12' 'startup   stopped: training ended with 75 after 20 s: step 3 SIGTERM'
  run -0 --separate-stderr stage watch
  [[ $output == 8 && $stderr == *'told to end and saved'* ]]
}

# bats test_tags=long
@test "stop: no answer is no success" {
  fault 401
  run -3 --separate-stderr stage stop
  [[ -z $output && $stderr == *'VESSL_ACCESS_TOKEN'* ]]
  told_what_to_do
  fault
  run -0 --separate-stderr stage stop
  [[ $output == terminated && $(status_of 7) == terminated ]]
}

# bats test_tags=long
@test "watch: a run that was stopped after its end, or ended elsewhere, is left alone" {
  ended terminated 'startup   stopped: training ended with 75 after 20 s: step 3 SIGTERM'
  run -143 --separate-stderr stage watch
  ended failed 'startup   stopped: training ended with 75 after 20 s: step 3 SIGTERM'
  run -0 --separate-stderr stage stop
  run -143 --separate-stderr stage watch
  [[ $(runs) == 1 ]]
}

@test "stop: a run of that number but another name is not touched" {
  "$repo/.venv/bin/python" -c 'import json, sys
run = json.load(open(sys.argv[1])); run["run_spec"]["title"] = "colleague"; json.dump(run, open(sys.argv[1], "w"))' "$stub/runs/7.json"
  run -2 --separate-stderr stage stop
  [[ $stderr == *'run 7 is colleague, not minitest-critic-wmtp-'* && $(status_of 7) != terminated ]]
}

@test "resume: of what was submitted first, whatever was rendered since; one that is being stopped is no run to go on with" {
  rm "$tree/build/minitest/image.digest"
  ENV=minitest ALGO=critic-wmtp DRY_RUN=1 run -0 --separate-stderr submit
  ended stopping
  run -2 --separate-stderr stage resume
  [[ $stderr == *'is being stopped'* ]]
  ended failed
  run -0 --separate-stderr stage resume
  [[ $output == 8 ]]
  cmp "$stub/runs/7.yaml" "$stub/runs/8.yaml"
}

# with_record NAME: the record of run 7 where the node's mirror would be, found in this checkout as it came last.
with_record() {
  local folder="$tree/build/minitest/$1/record" now
  now=$(date +%s)
  mkdir -p "$folder"
  printf '{"algo": "critic-wmtp", "total_steps": 12, "price_per_hour": 6.2}\n' >"$folder/facts.json"
  printf '{"began": %d, "launcher": "vessl", "number": "7"}\n' $((now - 3600)) >"$folder/parts.jsonl"
  printf '{"step": 12, "at": %d, "wmtp_loss": null, "tokens_per_second": 2140, "step_seconds": 1}\n' "$now" >"$folder/steps.jsonl"
}

@test "monitor: of a submitted run what the launcher says, also where there is no record so far, or no bucket" {
  unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_PROFILE
  local name
  name=$(status_name)
  run -0 --separate-stderr stage monitor_training
  [[ $output == "$name"*'run 7 on vessl'*'its checkpoints are not in a bucket'*'no record so far'*'[MLflow Experiments]'* ]]
  with_record "$name"
  CONFIG=configs/config.vessl.yaml FOLLOW=1 run -0 --separate-stderr "$tree/scripts/monitor_training.sh" "$name"
  [[ $output == *'running  step 12/12  wmtp_loss not finite'*'warn  not finite at step 12'*'not read: AWS_ACCESS_KEY_ID is not set'*completed* ]]
}

@test "monitor: a failed run ends with 1 and says what to type, an unknown one with 2" {
  ended failed 'startup   FAIL  vocabularies ended with 14 after 2 s'
  run -1 --separate-stderr stage monitor_training
  [[ $output == *'  failed'*'next  '*'make logs RUN_ID=7'*'ended with 14'*'[MLflow'* ]]
  RUN_ID=99 run -2 --separate-stderr stage monitor_training
  told_what_to_do
}

status_name() { basename "$(dirname "$(find "$tree/build" -name run.id)")"; }
