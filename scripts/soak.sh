#!/usr/bin/env bash
# Usage: [SEED=1] [ALGO=critic-wmtp] [STAGES="delivery sync train"] [SIGNALS="INT KILL"] scripts/soak.sh
# `delivery`: 100 kills of a sync under a watcher, several syncs at once, a reader beside one (tests/soak_sync.py). `day`: 200
# syncs, publishes, evictions and uploads in random order under random faults; store and bucket must verify clean.
# `training`: 30 kills of a run of 60 steps of each algorithm, whose losses must not change (tests/soak_train.py), and a
# notice to stop in each of its phases, through torchrun. `long`: the tests that `make test` leaves out for their minutes. Then
# it interrupts `make minitest` in each of its stages, by
# Ctrl-C and by kill -9 of one of its processes, at seeded moments.
# After each: no process of it is left, nothing half-written stands under a final name, on disk or in the bucket, and the
# same command again goes on from what was done and ends well. Works in build/soak/, a clone of what is committed here.
# Standard output: a line a round, then `N passed, N failed`. Exit codes: 0 all passed, 1 not.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=soak
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

HERE=$ROOT/build/soak
RANDOM=${SEED:-1}
export ALGO=${ALGO:-critic-wmtp}

# The line of the run's log with which each stage begins.
declare -A BEGINS=([start]='' [models]='minitest  models' [publish]='publish   3 models' [dryrun]='minitest  dryrun'
  [sync]='sync .*Download' [vocabularies]='vocab     ' [scoring]='score     .* is not kept' [pretrain]='pretrain  step 1/'
  [train]='Step 3/' [save]='Step 5/' [end]='Step 12/')
ORDER=(start models publish dryrun sync vocabularies scoring pretrain train save end)

# Processes that carry this round's mark, wherever they hang.
marked() {
  local file
  for file in /proc/[0-9]*/environ; do
    if tr '\0' '\n' <"$file" 2>/dev/null | grep -qx "WMTP_SOAK=$1"; then basename "$(dirname "$file")"; fi
  done 2>/dev/null || true
}

alive() {
  local pid
  for pid in $(marked "$1"); do
    if [[ $(cut -d ' ' -f 3 "/proc/$pid/stat" 2>/dev/null || true) =~ ^[^Z]$ ]]; then printf '%s\n' "$pid"; fi
  done
}

await_end() {
  local tick
  for ((tick = 0; tick < $2 * 5; tick++)); do
    [[ -n $(alive "$1") ]] || return 0
    sleep 0.2
  done
  log soak "left: $(ps -o pid=,args= -p "$(alive "$1" | paste -sd,)" | cut -c1-120 | paste -sd '|')"
  return 1
}

# The log shows that the stage began (or that the run is over).
await_stage() {
  local pid=$1 line=$2
  [[ -n $line ]] || return 0
  until grep -q "^$line" "$HERE/err"; do
    kill -0 "$pid" 2>/dev/null || return 1
    sleep 0.05
  done
}

whole() {
  python "$ROOT/tests/half_written.py" "$HERE/clone/build/minitest" "$HERE/clone/tests/test_models" >&2 &&
    (cd "$HERE/clone" && scripts/bucket.sh run build/bucket -- python tests/half_written.py --bucket checkpoints models) >&2
}

went_on() {
  case $1 in
    start | models) ;;
    publish | dryrun) grep -q 'publish   done' "$HERE/err2" ;;
    sync) grep -q 'is already published' "$HERE/err2" ;;
    vocabularies | scoring | pretrain) grep -q 'is in the store' "$HERE/err2" ;;
    *) grep -Eq 'goes on after step|was trained before|was kept|is in the store' "$HERE/err2" ;;
  esac
}

round() {
  local stage=$1 signal=$2 mark=$1-$2-$RANDOM pid victim rc=0 began problem=''
  rm -rf "$HERE/clone/build" "$HERE"/clone/tests/test_models/test-*
  : >"$HERE/err"
  (cd "$HERE/clone" && WMTP_SOAK=$mark exec setsid env --default-signal=INT make minitest) >"$HERE/out" 2>"$HERE/err" &
  pid=$!
  await_stage "$pid" "${BEGINS[$stage]}" || problem='the stage never began; '
  sleep "0.$((RANDOM % 9))"
  began=$SECONDS
  if [[ $signal == INT ]]; then
    # The group is there a moment after its first process.
    until kill -INT -- "-$pid" 2>/dev/null || ! kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
  else
    mapfile -t victims < <(alive "$mark")
    victim=${victims[RANDOM % (${#victims[@]} + (${#victims[@]} == 0))]:-0}
    log soak "kill -9 $(ps -o args= -p "$victim" | cut -c1-100)"
    kill -KILL "$victim" 2>/dev/null || true
  fi
  await_end "$mark" 60 || problem+='processes were left; '
  wait "$pid" || rc=$?
  local took=$((SECONDS - began))
  alive "$mark" | xargs -r kill -KILL 2>/dev/null || true
  whole || problem+='something is half-written; '
  grep -q Traceback "$HERE/err" && problem+='a traceback; '
  began=$SECONDS
  (cd "$HERE/clone" && WMTP_SOAK=$mark make minitest) >"$HERE/out2" 2>"$HERE/err2" || problem+="the next run ended with $?; "
  grep -q '^minitest: ok' "$HERE/out2" || problem+='the next run is not ok; '
  went_on "$stage" || problem+='the next run did not go on; '
  printf '%-12s %-4s  make %-3s  ended in %2s s  next run %3s s  %s\n' "$stage" "$signal" "$rc" "$took" $((SECONDS - began)) "${problem:-ok}"
  if [[ -n $problem ]]; then
    mkdir -p "$HERE/failed/$mark" && cp "$HERE"/{err,err2,out2} "$HERE/failed/$mark/"
    return 1
  fi
}

tally() { if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi; }

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local stage signal passed=0 failed=0
  local -a victims=()
  mkdir -p "$HERE"
  rm -rf "$HERE/clone" "$HERE/failed"
  git clone -q "$ROOT" "$HERE/clone"
  ln -s "$ROOT/.venv" "$HERE/clone/.venv"
  log soak "$ALGO, seed ${SEED:-1}: ${STAGES:-delivery day long training ${ORDER[*]}}, each by ${SIGNALS:-INT KILL}"
  for stage in ${STAGES:-delivery day long training ${ORDER[@]}}; do
    if [[ $stage == delivery || $stage == day ]]; then
      local -a what=()
      if [[ $stage == day ]]; then what=(--day 200); fi
      OMP_NUM_THREADS=1 tally scripts/bucket.sh run "build/soak/$stage" -- python tests/soak_sync.py --seed "${SEED:-1}" "${what[@]}"
      continue
    elif [[ $stage == training ]]; then
      OMP_NUM_THREADS=1 PYTHONPATH=tests tally python tests/soak_train.py --seed "${SEED:-1}"
      # What `make test` does with forked ranks, as a node starts them: a notice in every phase.
      WMTP_TEST_TORCHRUN=1 OMP_NUM_THREADS=1 tally scripts/bucket.sh run build/soak/bucket -- pytest -q -m '' tests/test_train.py -k sigterm
      continue
    elif [[ $stage == long ]]; then
      OMP_NUM_THREADS=1 tally scripts/bucket.sh run build/soak/bucket -- pytest -n 2 --dist worksteal -m long
      OMP_NUM_THREADS=1 tally scripts/bucket.sh run build/soak/bucket -- bats --filter-tags long bats
      tally scripts/test_image.sh --long
      continue
    fi
    for signal in ${SIGNALS:-INT KILL}; do
      tally round "$stage" "$signal"
    done
  done
  echo "$passed passed, $failed failed"
  ((failed == 0))
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
