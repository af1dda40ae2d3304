#!/usr/bin/env bats
# What the startup script says of a failure before its last words. Stages and trainer are stubs; the explanation is real.

bats_require_minimum_version 1.5.0

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
  tree="$BATS_TEST_TMPDIR/a tree"
  mkdir -p "$tree/scripts/lib" "$tree/docker" "$tree/tests" "$BATS_TEST_TMPDIR/bin"
  cp "$repo"/scripts/lib/*.bash "$tree/scripts/lib/"
  cp "$repo/docker/vessl_startup.sh" "$tree/docker/"
  cp -r "$repo/configs" "$tree/configs"
  cp -r "$repo/tests/configs" "$tree/tests/configs"
  cp "$repo/bats/stubs/stage" "$tree/scripts/sync_models.sh"
  cp "$repo/bats/stubs/stage" "$tree/scripts/check_vocab.sh"
  REAL_PYTHON=$repo/.venv/bin/python
  [[ -x $REAL_PYTHON ]] || REAL_PYTHON=$(command -v python)
  export REAL_PYTHON STUB="$repo/bats/stubs/python"
  export PATH="$BATS_TEST_TMPDIR/bin:$repo/bats/stubs:$PATH" CALLS="$BATS_TEST_TMPDIR/calls" WMTP_APP_ROOT="$BATS_TEST_TMPDIR/an app"
  export ENV_MODE=minitest WMTP_ALGO=baseline-mtp LAUNCHER=local WMTP_REVISION=abcdef0123 RUN_NAME=one
  export AWS_ACCESS_KEY_ID=key-4711 AWS_SECRET_ACCESS_KEY=canary-4711
  unset CONFIG RECIPE SET ENV ALGO MAX_HOURS AWS_PROFILE
  record="$WMTP_APP_ROOT/logs/one"
  mkdir -p "$record"
}

startup() { "$tree/docker/vessl_startup.sh"; }

# instead OF SCRIPT: another python for commands that hold OF.
instead() {
  printf '#!/usr/bin/env bash\ncase "$*" in *"%s"*) %s ;; esac\nexec "$STUB" "$@"\n' "$1" "$2" >"$BATS_TEST_TMPDIR/bin/python"
  chmod +x "$BATS_TEST_TMPDIR/bin/python"
}

known() { "$REAL_PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$record/failure.json" "$1"; }

@test "bundle: a failed training is explained before the last words, in the log and in the record" {
  TRAINER=fails run -20 --separate-stderr startup
  [[ $stderr == *'startup   one failed: bug, in imports after step 7 (code 20):'*'FAIL  training ended with 20'*$'\n          next  less '* ]]
  [[ $(known class) == bug && $(known evidence) == 'exit.json: loss nan: not finite' && $(known step) == 7 ]]
  grep -q '^one failed: bug' "$record/failure.md"
  run -0 tar -tzf "$record/bundle.tar.gz"
  [[ $output == *one/exit.json*one/failure.json*one/failure.md* ]]
}

@test "bundle: of the paragraph no line is lost, also where one begins as the command does" {
  instead '-m wmtp.train ' "printf '{\"code\": 2, \"step\": 0, \"cause\": \"%042d; rule: all is loaded; next: fetch or export it again\"}' 0 >'$record/exit.json'; exit 2"
  ENV_MODE=test run -2 --separate-stderr startup
  [[ $stderr == *$'\nstartup   next: fetch or export it again.\n'*'FAIL  training ended with 2'*$'\n          next  make dryrun '* ]]
}

@test "bundle: the log of a run that goes on on another node goes on where it came from the bucket" {
  instead 'wmtp.record begin' 'echo "of the node before" >"$WMTP_APP_ROOT/came" && mv -f "$WMTP_APP_ROOT/came" "$WMTP_APP_ROOT/logs/one/log.txt"'
  TRAINER=fails run -20 --separate-stderr startup
  [[ $(<"$record/log.txt") == 'of the node before'*'startup   one: minitest'*'FAIL  training ended with 20'* ]]
}

@test "bundle: vocabularies that differ and a model that is missing have their class and their command" {
  FAIL_check_vocab=14 run -14 --separate-stderr startup
  [[ $stderr == *'one failed: vocabulary, in vocabularies (code 14):'*'next  make check-vocab ENV=minitest ALGO=baseline-mtp'* ]]
  [[ $stderr != *Killed* ]] # the trainer that waits is ended without a word of bash's
  [[ $(known class) == vocabulary && $(known phase) == vocabularies ]]
  FAIL_sync_models=13 run -13 --separate-stderr startup
  [[ $(known class) == 'model files' && $(known phase) == sync && $(known next) == 'make dryrun ENV=minitest'* ]]
}

@test "bundle: a trainer that the kernel kills for memory is out of memory, another is killed" {
  mkdir -p "$BATS_TEST_TMPDIR/groups/memory/mine" "$BATS_TEST_TMPDIR/groups/mine"
  echo '4:memory:/mine' >"$BATS_TEST_TMPDIR/of"
  echo 'oom_kill 2' | tee "$BATS_TEST_TMPDIR/groups/memory/mine/memory.oom_control" >"$BATS_TEST_TMPDIR/groups/mine/memory.events"
  sed -i "s|^cgroups=.*|cgroups='$BATS_TEST_TMPDIR/groups' of_process='$BATS_TEST_TMPDIR/of'|" "$tree/scripts/lib/bundle.bash"
  export ENV_MODE=test
  instead '-m wmtp.train ' 'kill -9 $$'
  run -20 --separate-stderr startup
  [[ $(known class) == killed && $(known evidence) == 'the process ended by SIGKILL' ]]
  instead '-m wmtp.train ' "echo 'oom_kill 3' >'$BATS_TEST_TMPDIR/groups/memory/mine/memory.oom_control'; kill -9 \$\$"
  run -20 --separate-stderr startup
  [[ $(known class) == 'out of memory' && $(known evidence) == *'the kernel killed 1 process for memory' ]]
  # The second version of control groups, and a limit of 2 GiB.
  echo '0::/mine' >"$BATS_TEST_TMPDIR/of"
  echo 2147483648 >"$BATS_TEST_TMPDIR/groups/mine/memory.max"
  instead '-m wmtp.train ' "echo 'oom_kill 4' >'$BATS_TEST_TMPDIR/groups/mine/memory.events'; kill -9 \$\$"
  run -20 --separate-stderr startup
  [[ $(known class) == 'out of memory' && $(known evidence) == *'the kernel killed 2 processes'* && $(known memory) == "{'limit_gib': 2.0}" ]]
}

@test "bundle: hours that are used up are no preemption" {
  TRAINER=saves MAX_HOURS=0.001 run -75 --separate-stderr startup
  [[ $stderr == *'one stopped: hours,'*'everything saved'* && $(known class) == hours ]]
  TRAINER=hangs MAX_HOURS=0.004 WMTP_GRACE_S=1 run -20 --separate-stderr startup
  [[ $(known class) == hours && $(known code) == 20 ]]
}

@test "bundle: what goes wrong in it changes neither the code nor the last words" {
  for wrong in 'exit 7' 'kill -9 $$' 'echo noise >&2; exit 127'; do
    instead wmtp.causes "$wrong"
    TRAINER=fails run -20 --separate-stderr startup
    [[ $stderr == *'FAIL  training ended with 20'* && ${stderr_lines[-1]} == *next* && ! -e $record/failure.json ]]
  done
  rm "$BATS_TEST_TMPDIR/bin/python"
  mkdir "$record/failure.json" # as good as a full disk: it can't be written
  sed -i 's|/{failure.json,|/{|' "$tree/docker/vessl_startup.sh"
  FAIL_sync_models=12 run -12 --separate-stderr startup
  [[ $stderr == *'one failed: network'*'FAIL  sync ended with 12'* ]]
}

@test "bundle: an explanation that hangs is left after its seconds" {
  sed -i 's/bounded 10 /bounded 1 /' "$tree/scripts/lib/bundle.bash"
  instead wmtp.causes 'exec sleep 600'
  SECONDS=0
  TRAINER=fails run -20 --separate-stderr startup
  ((SECONDS < 60))
  [[ $stderr == *'FAIL  training ended with 20'* ]]
}

@test "bundle: a run that goes on well takes the last failure away" {
  TRAINER=fails run -20 --separate-stderr startup
  [[ -e $record/failure.json && -e $record/bundle.tar.gz ]]
  run -0 --separate-stderr startup
  [[ ! -e $record/failure.json && ! -e $record/failure.md && ! -e $record/bundle.tar.gz && $stderr != *'one failed'* ]]
}

@test "bundle: no secret is in what it leaves" {
  instead '-m wmtp.train ' 'echo "key canary-4711" >&2; exit 1'
  printf 'key canary-4711\nid key-4711\n' >"$record/log.txt"
  ENV_MODE=test run -20 --separate-stderr startup
  run -1 grep -r canary-4711 "$record/failure.json" "$record/failure.md"
  tar -xzf "$record/bundle.tar.gz" -C "$BATS_TEST_TMPDIR"
  run -1 grep -rE 'canary-4711|key-4711' "$BATS_TEST_TMPDIR/one"
}

@test "bundle: what ends before there is a record ends as it did" {
  rm -r "$record"
  SET='devices.mixed_precison=bf16' run -2 --separate-stderr startup
  [[ $stderr == *mixed_precison* && $stderr != *'one failed'* && ! -e $record ]]
}
