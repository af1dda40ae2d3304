#!/usr/bin/env bash
# Usage: scripts/monitor_training.sh [--follow] [RUN_ID]      (make monitor RUN_ID=name or number FOLLOW=1)
# One page of a run: state, step, time left, money, warnings; GPU utilization and memory, the last 50 lines of its log, its
# MLflow run. Without RUN_ID the newest of this checkout, runs on this machine included. --follow draws it anew in place until
# the run ends (q or Ctrl-C leaves; the run goes on), or tells changes a line each where standard output is no terminal.
#   POLL_S   seconds between two looks at the launcher (default 10)      WMTP_MIRROR_S   at the bucket (default 30)
#   ENV, LAUNCHER   choose among runs of the same name, and the bucket that holds the record; S3_*, AWS_* as everywhere
# Standard output: the page. The record of a run elsewhere is kept in build/ENV/RUN/record.
# Exit codes: 0 it goes on or has completed, 1 it failed, 2 no such run, 3 credential, 11 no answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=monitor
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
# shellcheck source=scripts/lib/children.bash
source "$here/children.bash"

TEMP='' LOOKER='' DUE=0 LINES=()

# own: a folder of this stage's own, and what it leaves behind goes with it.
own() {
  [[ -n $TEMP ]] || TEMP=$(mktemp -d)
  mkdir -p "$TEMP/look"
  trap cleanup EXIT
}

cleanup() {
  if [[ -n $LOOKER ]]; then kill -KILL "$LOOKER" 2>/dev/null || true; fi
  rm -rf -- "$TEMP" "${CLIENT_HOME:-$TEMP}"
}

# submitted: state and log from the launcher; what the bucket can't be asked is a note on the page, and no end.
submitted() {
  find_run
  own
  KIND=vessl
  if declare -F need_container >/dev/null; then KIND=docker; fi
  known_state
  LAUNCHER=$KIND
  if (record_place "$NAME") >"$TEMP/why" 2>&1; then
    record_place "$NAME"
    BUCKET=1
  else
    note "the record was not read: $(sed -nE '1s/.*FAIL +//p' "$TEMP/why" | grep . || echo 'it stays on the node, its checkpoints are not in a bucket')"
  fi
  RECORD=${RUN_DIR:-$ROOT/build/${ENV:-production}/$NAME}/record
}

note() { keep "$TEMP/look/note" "$*"; }

# look: what the launcher has said, and what is new in the bucket.
look() {
  local rc=0 every=${WMTP_MIRROR_S:-30}
  every=${every%.*}
  [[ $every =~ ^[0-9]{1,6}$ ]] || every=30
  if [[ -n $NUMBER ]]; then
    LINES=("${LINES[@]}" "${FRESH[@]}")
    LINES=("${LINES[@]: -$((${#LINES[@]} < 50 ? ${#LINES[@]} : 50))}")
    if ((${#LINES[@]})); then keep "$TEMP/look/log" "$(printf '%s\n' "${LINES[@]}")"; fi
    keep "$TEMP/look/state" "$STATUS"$'\t'"$REASON"
  fi
  ((BUCKET && SECONDS >= DUE)) || return 0
  fetch_record "$NAME" "$RECORD" || rc=$?
  # What leaves a bucket costs: 100 kB/s at most.
  DUE=$((SECONDS + 10#$every + MOVED / 100000))
  case $rc in
    0) rm -f -- "$TEMP/look/note" ;;
    1) note "no record so far in $BASE/$NAME/record" && return ;;
    3) note "the bucket refuses the record: $(head -c 200 "$TEMP/client.log")" && return ;;
    *) note 'the bucket does not answer: the record is shown as it came last' && return ;;
  esac
  if bounded 30 "$S5CMD" --retry-count 1 ls "$BASE/$NAME/step-*/.complete" >"$TEMP/listing" 2>/dev/null; then
    mv -f -- "$TEMP/listing" "$TEMP/look/checkpoints"
  fi
}

# keep_looking: beside the page, until that is closed, or the service has not answered for good: look/end then says why.
keep_looking() {
  # shellcheck disable=SC2154  # its own
  trap 'rc=$?; { printf "%s\n" "$rc" && tail -n 3 "$TEMP/said"; } >"$TEMP/ended" && mv -f -- "$TEMP/ended" "$TEMP/look/end"' EXIT
  exec 9<> <(:)
  while kill -0 $$; do
    read -rt "${POLL_S:-10}" -u 9 || true # no child, which could stay behind
    if [[ -n $NUMBER ]]; then poll 9>&-; fi
    look 9>&-
  done
}

main() {
  local rc=0
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --follow) FOLLOW=1 ;;
      -*) die 2 "$1: not known" 'one option, and a run' 'scripts/monitor_training.sh --help' ;;
      *) RUN_ID=$1 ;;
    esac
    shift
  done
  need_cmd python
  cd "$ROOT"
  if ! on_this_machine && ! in_the_bucket; then submitted; fi
  own
  if [[ $KIND != local ]]; then
    look
    PAGE=(--look "$TEMP/look" --number "$NUMBER")
  fi
  PAGE+=(--name "$NAME" --launcher "$KIND" --record "$RECORD")
  if [[ ${FOLLOW:-} == 1 ]]; then
    PAGE+=(--follow)
    if [[ $KIND != local ]]; then
      keep_looking </dev/null >/dev/null 2>"$TEMP/said" &
      LOOKER=$!
      disown "$LOOKER" # its end is no news
    fi
  fi
  watch_signals
  # The page closes as on a signal when this script dies: the terminal is left as it was.
  tie TERM
  run_child python -m wmtp.monitor "${PAGE[@]}"
  if ((rc == 137)) && [[ -t 1 && ${FOLLOW:-} == 1 ]]; then printf '\e[?7h\e[?25h\e[?1049l' && stty sane 2>/dev/null || true; fi
  return "$rc"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
