#!/usr/bin/env bash
# Usage: [ONLY=ID,ID] [ENGINE=0|1] scripts/acceptance.sh      (make acceptance)
# Every criterion of the plan against what is built: runs the stages once on an embedded bucket (mini-test, dry runs, a sync
# of 256 MB, a submit by the real client to a stub of the API), then judges them. What only the cluster can show is marked
# so, with the command that shows it there.
#   ONLY    rows or sections alone: P1,S2.3          ENGINE   1: the rows of image and registry, as root, with what
#           is missing installed; 0: without them; default: where an engine is installed and this is root
# Standard output: the table (id, state, criterion, bar, what was measured), then
#   `N ok, N need the cluster, N not checked, N FAIL`. Kept: build/acceptance/, a folder for each stage.
# Exit codes: 0 no FAIL, 1 a FAIL, 2 bad input, 3 a tool is missing, 10 disk, 11 the embedded bucket does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=accept
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/children.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/children.bash"
# shellcheck source=scripts/lib/evidence.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/evidence.bash"

HERE=$ROOT/build/acceptance

# collect NAME: its evidence, in a subshell, which a failing command ends; a signal reaches the stage that it runs.
collect() {
  local name=$1 began=$SECONDS rc=0
  local AT=$HERE/$name
  rm -rf -- "${AT:?}"
  mkdir -p "$AT"
  log accept "$name"
  ("evidence_$name") </dev/null >"$AT/out" 2>"$AT/err" &
  await_child "$!"
  printf '%s\n' "$rc" >"$AT/rc"
  ((ended_by == 0)) || die "$ended_by" "interrupted at $name" 'nothing is judged by half' 'make acceptance'
  log accept "$name: code $rc, $((SECONDS - began)) s$( ((rc == 0)) || printf '; build/acceptance/%s/err' "$name")"
}

main() {
  case ${1:-} in
    '') ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
    *) die 2 "$1: no arguments are known" 'the environment says what to do' 'scripts/acceptance.sh --help' ;;
  esac
  local began=$SECONDS name rc=0
  local -a rows=() needs=()
  need_cmd python
  need_cmd git
  cd "$ROOT"
  [[ ${ENGINE:-0} =~ ^[01]$ ]] || die 2 "ENGINE=$ENGINE" 'ENGINE is 0, 1, or not set' 'ENGINE=1 make acceptance'
  IFS=', ' read -ra rows <<<"${ONLY:-}"
  name=$(python tests/acceptance.py needs "${rows[@]}") || exit
  if [[ -n $name ]]; then mapfile -t needs <<<"$name"; fi
  mkdir -p "$HERE" 2>/dev/null || die 10 "$HERE can't be written" 'the evidence is kept there' 'make it writable'
  # A bucket of its own, whatever the caller works with: here things are broken on purpose.
  if [[ ${WMTP_ACCEPTANCE:-} != 1 ]]; then
    unset S3_ENDPOINT_URL S3_BUCKET_NAME AWS_PROFILE AWS_SESSION_TOKEN AWS_DEFAULT_REGION
    export WMTP_ACCEPTANCE=1
    exec 9>"$HERE/.lock"
    flock -n 9 || die 1 'another acceptance is at work in this checkout' 'one at a time: they share build/acceptance' 'wait for it'
    rm -rf -- "$HERE/bucket"
    if ((${#needs[@]})); then exec scripts/bucket.sh run "$HERE/bucket" -- "$ROOT/scripts/acceptance.sh"; fi
  fi
  # Each stage is run as shipped: what the caller has set for his own runs is not the plan's.
  unset ONLY ENV ALGO LAUNCHER CONFIG RECIPE SET RUN_NAME RUN_ID RUNS NAME NAMES FROM NOTES STEP DRY_RUN RESUME ALLOW FOLLOW TAIL MAX_HOURS \
    WMTP_APP_ROOT WMTP_CACHE_DIR TWIN
  export MLRUNS=s3://${S3_BUCKET_NAME:-wmtp}/mlruns
  watch_signals
  reach=ranks # the children of the subshell
  for name in "${needs[@]}"; do collect "$name"; done
  log accept "judging, $((SECONDS - began)) s"
  python tests/acceptance.py table "$HERE" "${rows[@]}" || rc=$?
  log accept "$((SECONDS - began)) s"
  return "$rc"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
