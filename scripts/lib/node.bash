# What a node checks of itself, and the clock of its hours. Sourced by docker/vessl_startup.sh only.
# shellcheck shell=bash disable=SC2034,SC2154

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
  # Clock and sleeper die with this script.
  # shellcheck disable=SC2016
  "${tied[@]}" bash -c 'seconds=$1 whom=$2; grace=$3; shift 3; "$@" sleep "$seconds"; kill -USR1 "$whom"; "$@" sleep "$grace"; kill -USR2 "$whom"' \
    clock "$seconds" $$ "${WMTP_GRACE_S:-1200}" "${tied[@]}" \
    >/dev/null 2>&1 </dev/null &
  log startup "at most $1 h (MAX_HOURS): then it saves and ends"
}
