#!/usr/bin/env bats
# The real client against a stub of the API.

load helpers

setup_file() { cluster_file_setup; }
setup() { cluster_setup; }
teardown() { cluster_teardown; }

@test "submit: the run arrives as it was rendered, its number is standard output, pressed again it is the same" {
  run -0 --separate-stderr submit
  [[ $output == 7 && $(runs) == 1 ]]
  "$repo/.venv/bin/python" - "$tree"/build/minitest/minitest-*/run.yaml "$stub/runs/7.yaml" <<'PY'
import sys
from ruamel.yaml import YAML
rendered, arrived = (YAML(typ="safe").load(open(name)) for name in sys.argv[1:])
assert rendered == arrived, (rendered, arrived)
assert all(isinstance(value, (str, dict)) for value in arrived["env"].values()), arrived["env"]
PY
  run -0 --separate-stderr submit
  [[ $output == 7 && $(runs) == 1 && $stderr == *'lives already: run 7'* ]]
}

@test "submit: an image of another repository than launcher.image names is refused before the service is asked" {
  pushed "ghcr.io/colleague/wmtp@sha256:$(printf 'b%.0s' {1..64})" abcdef0
  run -2 --separate-stderr submit
  [[ $stderr == *'the pushed image is ghcr.io/colleague/wmtp, launcher.image names ghcr.io/wooshikwon/wmtp'* && ! -e $stub/requests.log ]]
  told_what_to_do
  SET=launcher.image=ghcr.io/colleague/wmtp:latest run -0 --separate-stderr submit
}

@test "submit: the client takes every golden run file as it is" {
  source "$tree/scripts/lib/common.bash"
  source "$tree/scripts/lib/launcher_vessl.bash"
  launcher_open
  local file
  for file in "$repo"/tests/golden/run.*.yaml; do
    launcher_create "$file" x
    "$repo/.venv/bin/python" -c 'import sys
from ruamel.yaml import YAML
a, b = (YAML(typ="safe").load(open(name)) for name in sys.argv[1:])
assert a == b, (a, b)' "$file" "$stub/runs/$NUMBER.yaml"
  done
  [[ $(runs) == 6 ]]
}

# bats test_tags=long
@test "submit: one run when two shells press at once" {
  submit >"$BATS_TEST_TMPDIR/one" 2>/dev/null 3>&- &
  local other=$!
  run -0 --separate-stderr submit
  wait "$other"
  [[ $(runs) == 1 && $output == "$(<"$BATS_TEST_TMPDIR/one")" ]]
}

@test "submit: one run, and success, when the service answers 500 after creating, or cuts the connection" {
  fault 500-after-create
  run -0 --separate-stderr submit
  [[ $output == 7 && $(runs) == 1 ]]
  fault drop-after-create
  RUN_NAME=another run -0 --separate-stderr submit
  [[ $output == 8 && $(runs) == 2 ]]
}

# bats test_tags=long
@test "submit: one run when it was killed after the service had created it" {
  fault hold-after-create
  (cd / && exec setsid "$tree/scripts/submit.sh") >/dev/null 2>&1 3>&- &
  local pid=$! i
  for ((i = 0; i < 1200 && $(runs) == 0; i++)); do sleep 0.1; done
  [[ $(runs) == 1 ]]
  kill -KILL -- "-$pid"
  fault
  run -0 --separate-stderr submit
  [[ $output == 7 && $(runs) == 1 ]]
}

@test "submit: 401, 404 and 500 end with a code and what to do, nothing is created" {
  local code
  for code in 401 404 500; do
    fault "$code"
    run --separate-stderr submit
    [[ $status != 0 && -z $output && $(runs) == 0 ]]
    told_what_to_do
  done
}

@test "submit: 11 when the service is slow" {
  fault slow
  VESSL_TIMEOUT_S=4 run -11 --separate-stderr submit
  [[ $(runs) == 0 && $stderr == *'within 4 s'* ]]
  told_what_to_do
}

@test "submit: an unknown cluster, an unknown preset are told with those that are known" {
  SET=launcher.cluster=nope run -2 --separate-stderr submit
  [[ $stderr == *'nope: not one of'*'vessl-kr-a100-80g-sxm'* && $(runs) == 0 ]]
  told_what_to_do
  SET=launcher.preset=nope run -2 --separate-stderr submit
  [[ $stderr == *'launcher.preset: nope'*'gpu-a100-80g-large'* && $(runs) == 0 ]]
}

@test "submit: the client's own word for an unknown cluster, with exit 0, is no success" {
  source "$tree/scripts/lib/common.bash"
  source "$tree/scripts/lib/launcher_vessl.bash"
  fault no-cluster
  # In a shell of its own: die ends it, and the trap removes its home.
  run -2 bash -c 'STAGE=x; source "$1/scripts/lib/common.bash"; source "$1/scripts/lib/launcher_vessl.bash"; launcher_open
    launcher_create "$2" x' _ "$tree" "$repo/tests/golden/run.minitest.critic-wmtp.yaml"
  [[ $output == *'does not exist'* && $(runs) == 0 ]]
}

# bats test_tags=long
@test "submit: an ended run is started again with RESUME=1 only" {
  run -0 --separate-stderr submit
  "$repo/.venv/bin/python" -c 'import json, sys
run = json.load(open(sys.argv[1])); run["status"] = "failed"; json.dump(run, open(sys.argv[1], "w"))' "$stub/runs/7.json"
  run -2 --separate-stderr submit
  [[ $stderr == *'run 7 is failed'*'make resume'* && $(runs) == 1 ]]
  RESUME=1 run -0 --separate-stderr submit
  [[ $output == 8 && $(runs) == 2 ]]
}

@test "submit: bad input is told before the service is asked" {
  ALGO=foo run -2 --separate-stderr submit
  [[ $stderr == *'ALGO=foo'* ]]
  LAUNCHER=local run -2 --separate-stderr submit
  [[ $stderr == *'LAUNCHER=local'* ]]
  RUN_NAME='a b' run -2 --separate-stderr submit
  MAX_HOURS=soon run -2 --separate-stderr submit
  [[ $stderr == *'MAX_HOURS=soon'* ]]
  CONFIG=/etc/hostname run -2 --separate-stderr submit
  S3_ENDPOINT_URL=http://127.0.0.1:9000 run -2 --separate-stderr submit
  [[ $stderr == *"this machine's own address"* ]]
  told_what_to_do
  VESSL_ACCESS_TOKEN='' run -3 --separate-stderr submit
  [[ $stderr == *'VESSL_ACCESS_TOKEN is not set'* ]]
  pushed "$digest" 1234567
  run -2 --separate-stderr submit
  [[ $stderr == *'of 1234567, this tree is abcdef0'* ]]
  rm "$tree/build/minitest/image.digest"
  run -2 --separate-stderr submit
  [[ $stderr == *'make build push ENV=minitest'* ]]
  [[ ! -e $stub/requests.log ]]
}

@test "submit: DRY_RUN=1 prints the command and what would refuse it, and asks nobody" {
  rm "$tree/build/production/image.digest"
  unset VESSL_ACCESS_TOKEN
  ENV=production DRY_RUN=1 run -0 --separate-stderr submit
  [[ -z $output && $stderr == *'would refuse: no image was pushed'*'would refuse: VESSL_ACCESS_TOKEN'*'vessl run create -f '* ]]
  # In a rehearsed deploy there would be an image by now, whichever is here.
  pushed "$digest" 1234567
  WMTP_REFUSED=$BATS_TEST_TMPDIR/refused ENV=production DRY_RUN=1 run -0 --separate-stderr submit
  [[ $(<"$BATS_TEST_TMPDIR/refused") == *VESSL_ACCESS_TOKEN* && $(<"$BATS_TEST_TMPDIR/refused") != *image* ]]
  [[ ! -e $stub/requests.log ]]
}

@test "submit: no secret is in a trace, in an argument or in a file" {
  export VESSL_ACCESS_TOKEN=stub-token-canary-1 AWS_ACCESS_KEY_ID=canary-2 AWS_SECRET_ACCESS_KEY=canary-3
  echo stub-token-canary-1 >"$stub/token"
  run -0 --separate-stderr bash -x "$tree/scripts/submit.sh"
  [[ $stderr == *launcher_create* && $stderr != *canary* ]]
  run -1 grep -r canary "$tree/build"
}

@test "submit: production wants the receipt of a dry run that passed for exactly this" {
  export ENV=production
  run -2 --separate-stderr submit
  [[ $stderr == *'no dry run of this run is here'*'make dryrun ENV=production'* && ! -e $stub/requests.log ]]
  "$tree/scripts/test_vessl_config.sh" 2>/dev/null
  run -2 --separate-stderr submit
  [[ $stderr == *'the dry run was of'*' alone'* && ! -e $stub/requests.log ]]
  ONLY='' "$tree/scripts/test_vessl_config.sh" --offline 2>/dev/null
  MAX_HOURS=2 run -0 --separate-stderr submit
  [[ $output == 7 && $stderr == *'at most 2 h'* ]]
  SET=seed=7 run -2 --separate-stderr submit
  [[ $(runs) == 1 ]]
}

@test "submit: one run when it alone was killed with its request under way" {
  fault hold-before-create
  "$tree/scripts/submit.sh" >/dev/null 2>&1 3>&- &
  local pid=$! i
  for ((i = 0; i < 1200; i++)); do
    if grep -q create_from_yaml "$stub/requests.log" 2>/dev/null; then break; fi
    sleep 0.1
  done
  kill -KILL "$pid"
  run -0 --separate-stderr submit
  sleep 1
  [[ $output == 7 && $(runs) == 1 ]]
}

# bats test_tags=long
@test "submit: one run when all of it was killed with its request under way" {
  fault hold-before-create
  setsid "$tree/scripts/submit.sh" >/dev/null 2>&1 3>&- &
  local pid=$! i
  for ((i = 0; i < 1200; i++)); do
    if grep -q create_from_yaml "$stub/requests.log" 2>/dev/null; then break; fi
    sleep 0.1
  done
  kill -KILL -- "-$pid"
  run -0 --separate-stderr submit
  sleep 1
  [[ $output == 7 && $(runs) == 1 ]]
}

@test "submit: a client that can't start is told at once, one that was killed is started anew, a relative TMPDIR is one" {
  source "$tree/scripts/lib/common.bash"
  source "$tree/scripts/lib/launcher_vessl.bash"
  cd "$BATS_TEST_TMPDIR"
  mkdir here
  TMPDIR=here launcher_open
  launcher_check vessl-kr-a100-80g-sxm gpu-a100-80g-large
  kill -KILL "$CLIENT_PID"
  [[ -z $(launcher_runs) ]]
  launcher_create "$repo/tests/golden/run.minitest.critic-wmtp.yaml" x
  [[ $NUMBER == 7 ]]
  rm "$tree/.venv-vessl"
  mkdir -p "$tree/.venv-vessl/bin"
  cp "$repo/requirements/vessl.txt" "$tree/.venv-vessl/.installed"
  local began=$SECONDS
  RUN_ID=7 run -11 --separate-stderr "$tree/scripts/status.sh"
  [[ $stderr == *"$tree/.venv-vessl/bin/python: No such file"* ]] && ((SECONDS - began < 30))
  told_what_to_do
  TMPDIR=$BATS_TEST_TMPDIR/none RUN_ID=7 run -10 --separate-stderr "$tree/scripts/status.sh"
  told_what_to_do
}

@test "submit: one name is one work: other settings under it are refused, a rehearsal changes no run file" {
  RUN_NAME=mine run -0 --separate-stderr submit
  RUN_NAME=mine SET=seed=7 run -2 --separate-stderr submit
  [[ $stderr == *'lives already as run 7, of other settings'* ]]
  told_what_to_do
  RUN_NAME=mine SET=seed=7 DRY_RUN=1 run -0 --separate-stderr submit
  cmp <(grep -v '^#' "$tree/build/minitest/mine/run.yaml" | grep -c seed=7 || true) <(echo 0)
  [[ $(runs) == 1 ]]
}

@test "submit: words that are no switch are refused, as are names that name runs already" {
  DRY_RUN=true run -2 --separate-stderr submit
  [[ $stderr == *'DRY_RUN=true'* ]]
  RESUME=yes run -2 --separate-stderr submit
  RUN_NAME=latest run -2 --separate-stderr submit
  RUN_NAME=7 run -2 --separate-stderr submit
  VESSL_TIMEOUT_S=soon run -2 --separate-stderr submit
  [[ ! -e $stub/requests.log ]]
}
