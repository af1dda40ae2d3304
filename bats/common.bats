#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  printf '#!/usr/bin/env bash\nset -Eeuo pipefail\nsource "%s/scripts/lib/common.bash"\n"$@"\n' "$repo" >"$work/stage.sh"
  chmod +x "$work/stage.sh"
}

@test "common: three lines and the code when a stage dies" {
  run -13 --separate-stderr "$work/stage.sh" die 13 'what is wrong' 'the rule' 'do this'
  [[ ${#stderr_lines[@]} == 3 && ${stderr_lines[0]} == 'stage     FAIL  what is wrong' && $output == '' ]]
}

@test "common: prints the command and runs nothing when DRY_RUN is set" {
  DRY_RUN=1 run -0 --separate-stderr "$work/stage.sh" act touch "$work/made"
  [[ $stderr == *touch* && ! -e $work/made ]]
}

@test "common: 3 and no value when a variable is empty" {
  SECRET='' run -3 --separate-stderr "$work/stage.sh" need_env SECRET
  [[ $stderr == *SECRET* ]]
}

@test "common: the last status when every try failed" {
  run -5 --separate-stderr "$work/stage.sh" retry 2 0 bash -c 'exit 5'
  [[ $stderr == *'try 1 of 2'* && $stderr != *'try 2 of 2'* ]]
}

@test "common: what is bounded in time ends in time, and ends when its stage is killed" {
  run -124 --separate-stderr "$work/stage.sh" bounded 0.2 sleep 60
  setsid "$work/stage.sh" bounded 60 sh -c 'echo $$ >"$0"; exec sleep 60' "$work/pid" 3>&- &
  local stage=$! pid
  until [[ -s $work/pid ]]; do sleep 0.05; done
  pid=$(<"$work/pid")
  kill -KILL -- "-$stage"
  for _ in {1..50}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid"
  return 1
}

@test "common: who holds a lock is told to the second, and it is free when the first has ended" {
  mkdir "$work/kept"
  "$work/stage.sh" eval 'hold "$0.lock" "another is at work" "one at a time" "its"$'\''\n'\''"work" && touch "$0.held" && sleep 60' 3>&- &
  local first=$!
  until [[ -e $work/stage.sh.held ]]; do sleep 0.05; done
  run -1 --separate-stderr "$work/stage.sh" hold "$work/stage.sh.lock" 'another is at work' 'one at a time' mine
  [[ ${stderr_lines[0]} == "stage     FAIL  another is at work: process $first of $(id -un) since 20"*", its work" ]]
  pkill -P "$first" sleep
  wait "$first" || true
  run -0 "$work/stage.sh" hold "$work/stage.sh.lock" 'another is at work' 'one at a time' mine
  run -10 --separate-stderr "$work/stage.sh" hold "$work/kept" 'another is at work' 'one at a time' mine
  [[ ${stderr_lines[0]} == "stage     FAIL  $work/kept can't be written" ]]
}

@test "make: a variable that no command reads is refused, before anything is done" {
  run -2 --separate-stderr make --no-print-directory -C "$repo" -n minitest ALG=critic-wmtp
  [[ $stderr == *'ALG=critic-wmtp: not known'*'next: ALGO=critic-wmtp'* && -z $output ]]
  # Also one that this file itself has a use for, and one that is no word of a shell.
  local name
  for name in name first near set; do
    run -2 --separate-stderr make --no-print-directory -C "$repo" -n models "$name=3"
    [[ $stderr == *"$name=3: not known. rule: "* ]]
  done
  run -2 --separate-stderr make --no-print-directory -C "$repo" -n models STRANGE=
  run -2 --separate-stderr make --no-print-directory -C "$repo" -n status "RUN'S=3"
  [[ $stderr == *"RUN'S=3: not known"*'next: RUNS=3'* && $stderr != *EOF* ]]
  run -0 --separate-stderr make -C "$repo" -n status RUN_ID=3 S3_ENDPOINT_URL=http://x VESSL_TIMEOUT_S=5 POLL_S=1
  run -0 --separate-stderr make -C "$repo" -n train CUDA_LAUNCH_BLOCKING=1 NCCL_DEBUG=INFO LANG=C COLUMNS=80
}

@test "make: a target that there is not is told, with the one that was meant" {
  run -2 --separate-stderr make --no-print-directory -C "$repo" minitset
  [[ $stderr == *'minitset: no such target'*'next: make minitest; all: make help.  Stop.' && -z $output && ${#stderr_lines[@]} == 1 ]]
  run -2 --separate-stderr make --no-print-directory -C "$repo" -n "Verify'Model"
  [[ $stderr == *'next: make verify-models; all: make help.  Stop.' && $stderr != *EOF* ]]
  run -2 --separate-stderr make --no-print-directory -C "$repo" qqq
  [[ $stderr == *'qqq: no such target'*'next: make help.  Stop.' ]]
}

@test "scripts: --help tells and does nothing" {
  local tree="$work/a tree" script
  mkdir -p "$tree/build"
  cp -r "$repo"/{scripts,docker,src} "$tree/"
  : >"$tree/build/kept"
  for script in "$tree"/scripts/*.sh "$tree/docker/vessl_startup.sh"; do
    run -0 --separate-stderr "$script" --help
    [[ ${lines[0]} == Usage:* ]] || { echo "$script" && return 1; }
  done
  [[ -e $tree/build/kept && $(ls -A "$tree") == $'build\ndocker\nscripts\nsrc' ]]
}
