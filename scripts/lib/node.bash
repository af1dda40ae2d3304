# What a node checks of itself, the clock of its hours, the record of its phases, and its last words. Sourced by docker/vessl_startup.sh only.
# shellcheck shell=bash disable=SC2034,SC2154  # what it sets and reads is shared with the script that sources it

# shellcheck source=scripts/lib/bundle.bash
source "$(dirname "${BASH_SOURCE[0]}")/bundle.bash"

# phase NAME BEGAN: a line for the record of where the time goes.
phase() {
  printf '{"phase": "%s", "began": %s, "ended": %s, "by": "startup"}\n' "$1" "$2" "$(date +%s.%N)" 2>/dev/null >>"$app/logs/$RUN_NAME/phases.jsonl" || true
}

# keep_record: from here on what the node says is in log.txt, the part of the run has a beginning, and, however this script
# ends, an end; the record is then in the bucket as far as the bucket answers.
keep_record() {
  local here=$app/logs/$RUN_NAME
  # First: what it brings from the bucket takes the place of what is here, and nobody may hold the log open.
  python -m wmtp.record begin "$here" "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --began "$BEGAN" --launcher "$LAUNCHER" || leave 2
  # On a terminal the bars stay whole instead.
  if [[ ! -t 2 ]]; then
    exec 2> >(trap '' TERM INT HUP && exec tee -a "$here/log.txt" >&2)
    tee_is=$!
  fi
  # shellcheck disable=SC2016  # the inner shell expands it
  "${tied[@]}" bash -c 'exec 9<> <(:); while : >"$1"; do read -rt 0.5 -u 9 || true; done' alive "$here/.alive" \
    >/dev/null 2>&1 </dev/null &
  trap 'end_record $?' EXIT
}

end_record() {
  trap - EXIT CHLD
  trap '' TERM INT USR1 USR2
  if [[ -n ${tee_is:-} ]]; then sleep 0.05; fi # what was said last is in the file that is kept
  local -a words=(end "$app/logs/$RUN_NAME" "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --code "$1")
  # Of a failure the last words stay the last.
  if (($1)); then bounded 60 python -m wmtp.record "${words[@]}" 2>/dev/null || true; else bounded 60 python -m wmtp.record "${words[@]}" || true; fi
  if [[ -n ${tee_is:-} ]]; then
    exec 2>&-
    # Its last line is out before the container goes; a process that was left behind may hold its end open.
    local looks=0
    while kill -0 "$tee_is" 2>/dev/null && ((looks++ < 20)); do sleep 0.05; done
  fi
  exit "$1"
}

# leave CODE [WHAT [RULE]]: the last line says what to do. What was stopped and saved has not failed.
leave() {
  local next
  # Waited for, or bash tells of the kill with the whole command, right above the last words.
  if [[ -n ${early:-} ]]; then { kill -KILL "$early" && wait "$early"; } 2>/dev/null || true; fi
  if [[ -n ${over_time:-} ]]; then set -- "$1" "MAX_HOURS: $limit h are used up after $SECONDS s${2:+; $2}" "${@:3}"; fi
  case $1 in
    2) next='mend what is named above (settings: make dryrun finds them without a node), start again' ;;
    3) next='install or set what is named above (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, S3_BUCKET_NAME), start again' ;;
    10) next="make room or rights in $app, or set WMTP_APP_ROOT to another folder" ;;
    11) next='see that the bucket answers from here (S3_ENDPOINT_URL, AWS_DEFAULT_REGION), start again' ;;
    12) next='start again: what has arrived is kept' ;;
    13) next='publish the model again (make publish-models), start again: what is proved is kept' ;;
    14) next='name models with one vocabulary in paths.models' ;;
    75) next="start again with RUN_NAME=${RUN_NAME:-}: it goes on after its last step" ;;
    130 | 143) next='start again: nothing was there to save' ;;
    *) next="read the lines above, start again with RUN_NAME=${RUN_NAME:-}: it goes on from its newest checkpoint" ;;
  esac
  bundle "$@"
  if (($1 == 75)); then
    log startup "stopped: $2"
    log '' "next  ${CURE:-$next}"
    exit 75
  fi
  die "$1" "${2:-ended by a signal after $SECONDS s}" "${3:-}" "${CURE:-$next}"
}

free_mb() { df -Pk "$1" | awk 'NR == 2 {printf "%.0f", $4 * 1024 / 1e6}'; }

# Where the credentials come from elsewhere (a profile, the node's own role), the two variables are not needed.
need_credentials() {
  local name
  [[ -z ${AWS_PROFILE:-}${AWS_WEB_IDENTITY_TOKEN_FILE:-}${AWS_CONTAINER_CREDENTIALS_RELATIVE_URI:-} ]] || return 0
  for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
    filled "$name" || leave 3 "$name is not set" "docker/vessl.yaml takes it from a secret of the organization: wmtp-$(tr 'A-Z_' 'a-z-' <<<"$name")"
  done
}

# limit_hours HOURS: then the run is told to end as by SIGTERM: it saves, and ends with 75. The service itself has no limit.
limit_hours() {
  local seconds
  seconds=$(awk -v h="$1" 'BEGIN {printf "%.0f", h * 3600}')
  over_time='' hung='' limit=$1
  trap 'over_time=1; on_signal 75' USR1
  # A run that hangs does not save either: after the grace its processes are killed, the last checkpoint stays.
  trap 'hung=1; if ((child)); then kill -KILL "$child" 2>/dev/null || true; fi' USR2
  # It dies with this script, and waits without a child of its own, which could stay behind.
  # shellcheck disable=SC2016  # the inner shell expands it
  "${tied[@]}" bash -c 'exec 9<> <(:); read -rt "$1" -u 9; kill -USR1 "$2"; read -rt "$3" -u 9; kill -USR2 "$2"' \
    clock "$seconds" $$ "${WMTP_GRACE_S:-1200}" \
    >/dev/null 2>&1 </dev/null &
  log startup "at most $1 h (MAX_HOURS): then it saves and ends"
}
