#!/usr/bin/env bash
# Usage: [RUN_ID=name or number] [NOTES=file] scripts/report.sh      (make report)
#        RUNS="a b c" scripts/report.sh --compare                    (make compare)
# The completion report of a run, from its record: report.html, report.md in build/ENV/RUN. Without RUN_ID the newest of this
# checkout, runs on this machine included. NOTES are a person's remarks: they stay in notes.md there, and in every later report.
# RUNS: two runs or more side by side, in build/compare/compare.html.
#   ENV, LAUNCHER   choose among runs of the same name, and the bucket that holds the record; S3_*, AWS_* as everywhere
# Standard output: the page's path. Exit codes: 0 done, 2 no such run, 3 credential, 10 can't be written, 11 no answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=report
here=$(dirname "${BASH_SOURCE[0]}")/lib
# shellcheck source=scripts/lib/common.bash
source "$here/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$here/settings.bash"
# shellcheck source=scripts/lib/run.bash
source "$here/run.bash"
# shellcheck source=scripts/lib/follow.bash
source "$here/follow.bash"
# shellcheck source=scripts/lib/store.bash
source "$here/store.bash"
# shellcheck source=scripts/lib/record.bash
source "$here/record.bash"

TEMP=''

own() {
  [[ -n $TEMP ]] || TEMP=$(mktemp -d)
  trap 'rm -rf -- "$TEMP" "${CLIENT_HOME:-$TEMP}"' EXIT
}

# record_of RUN: NAME and RECORD, the folder with the record of what RUN says; from the bucket where it isn't here.
record_of() {
  local rc=0
  RUN_ID=$1 NAME='' RECORD=''
  if on_this_machine || in_the_bucket; then return 0; fi
  find_run
  own
  record_place "$NAME" || die 2 "$NAME: its checkpoints are not in a bucket" 'a record is beside the checkpoints' 'make report on the machine that ran it'
  RECORD=${RUN_DIR:-$ROOT/build/${ENV:-production}/$NAME}/record
  fetch_record "$NAME" "$RECORD" || rc=$?
  case $rc in
    0) ;;
    1) die 2 "$NAME has no record so far in $BASE/$NAME/record" 'a run keeps one from its start' "make status RUN_ID=$NAME" ;;
    *) die "$rc" "$BASE/$NAME/record can't be read: $(head -c 200 "$TEMP/client.log")" 'the record is beside the checkpoints' 'see S3_ENDPOINT_URL and AWS_*, then again' ;;
  esac
}

main() {
  local run out
  local -a records=()
  if [[ ${1:-} == --compare || -n ${RUNS:-} ]]; then STAGE=compare; fi
  if [[ ${1:-} == --compare ]]; then
    [[ -n ${RUNS:-} ]] || die 2 'RUNS is not set' 'two runs or more are compared' "make compare RUNS=\"a b\"; here: $(known_runs)"
    shift
  fi
  no_arguments "${BASH_SOURCE[0]}" "$@"
  need_cmd python
  [[ -z ${NOTES:-} || -r $NOTES ]] || die 2 "NOTES=$NOTES can't be read" 'a text file with remarks' 'NOTES=notes.md'
  if [[ -n ${NOTES:-} ]]; then NOTES=$(realpath -- "$NOTES"); fi
  cd "$ROOT"
  if [[ -n ${RUNS:-} ]]; then
    local -a named=()
    read -ra named <<<"$RUNS"
    ((${#named[@]} > 1)) || die 2 "RUNS=\"$RUNS\"" 'two runs or more are compared' "make compare RUNS=\"a b\"; here: $(known_runs)"
    for run in "${named[@]}"; do
      record_of "$run"
      records+=("$RECORD")
    done
    python -m wmtp.report "${records[@]}" --out build/compare
    return
  fi
  record_of "${RUN_ID:-}"
  case $RECORD in
    */"$NAME"/record) out=$(dirname "$RECORD") ;;
    "$ROOT"/build/*/app/logs/"$NAME") # what this machine ran itself has its page where the other files of the run are
      out=${RECORD%/app/logs/*} out=${out#"$ROOT"/}
      [[ $out == build/*/"$NAME" ]] || out=$out/$NAME
      ;;
    *) out=build/report/$NAME ;;
  esac
  python -m wmtp.report "$RECORD" --out "$out" ${NOTES:+--notes "$NOTES"}
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
