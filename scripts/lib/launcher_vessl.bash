# VESSL through its own client (design: only a printed run address proves a creation). To be sourced by run.bash.
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it

CLIENT_HOME='' CLIENT_PID='' SAID=''

launcher_name() { printf 'VESSL\n'; }
launcher_said() { tail -n 1 <<<"$SAID" | cut -c1-200; }

# Credentials first, then the client: what is missing is told before anything is installed.
launcher_open() {
  [[ -z $CLIENT_HOME ]] || return 0
  local name
  for name in VESSL_ACCESS_TOKEN VESSL_DEFAULT_ORGANIZATION VESSL_DEFAULT_PROJECT; do
    filled "$name" || refuse 3 "$name is not set" 'the client logs in with token, organization and project' "export $name=…, then again"
  done
  [[ ${VESSL_TIMEOUT_S:-1} =~ ^[1-9][0-9]{0,4}$ ]] || die 2 "VESSL_TIMEOUT_S=$VESSL_TIMEOUT_S" 'whole seconds' 'VESSL_TIMEOUT_S=60'
  [[ ${DRY_RUN:-} != 1 ]] || return 0
  cmp -s "$ROOT/.venv-vessl/.installed" "$ROOT/requirements/vessl.txt" || "$ROOT/scripts/install_vessl.sh"
  # The whole path: the client works in it, where a relative TMPDIR is another folder.
  CLIENT_HOME=$(new=$(mktemp -d 2>/dev/null) && realpath -- "$new") ||
    die 10 "${TMPDIR:-/tmp} can't be written" 'the client has a home of its own there' 'make it writable, or TMPDIR=… names another'
  trap 'rm -rf -- "$CLIENT_HOME"' EXIT
  start_client
}

# start_client: from an empty folder and with a home of its own: a .env or a git worktree in the caller's would lead it astray.
start_client() {
  local parent=$BASHPID
  local -a tied
  tie KILL
  rm -f -- "$CLIENT_HOME/ready"
  [[ -p $CLIENT_HOME/calls ]] || mkfifo "$CLIENT_HOME/calls"
  (
    cd "$CLIENT_HOME" &&
      HOME=$CLIENT_HOME VESSL_DATA_COLLECTION_OPT_OUT=true ENABLE_SENTRY=false \
        exec "${tied[@]}" "$ROOT/.venv-vessl/bin/python" "$ROOT/scripts/lib/vessl_client.py" "$CLIENT_HOME" "$parent"
  ) </dev/null >/dev/null 2>"$CLIENT_HOME/client.log" 8>&- 9>&- &
  CLIENT_PID=$!
  disown "$CLIENT_PID" # its end is no news
}

# client_ready: its imports are done; 1: it ended in them, 137: they take too long. A call is waited for without a look at it.
client_ready() {
  local most=$((SECONDS + ${VESSL_TIMEOUT_S:-60} + 60))
  kill -0 "$CLIENT_PID" 2>/dev/null || start_client # one that was killed, by want of memory, is no end of a watch of days
  until [[ -e $CLIENT_HOME/ready ]]; do
    kill -0 "$CLIENT_PID" 2>/dev/null || return 1
    ((SECONDS < most)) || return 137
    sleep 0.1
  done
}

# client ARGUMENTS…: what it printed, without colours, in SAID. 137: it did not answer in time.
client() {
  local rc=0 name=$BASHPID.$RANDOM seconds=${VESSL_TIMEOUT_S:-60}
  client_ready || rc=$?
  if ((rc)); then
    SAID=$(cat "$CLIENT_HOME/client.log")
    SAID=${SAID:-the client ended before it was asked}
    return "$rc"
  fi
  mkfifo "$CLIENT_HOME/$name.code"
  printf '%s\0' "$seconds" "$@" >"$CLIENT_HOME/$name.arguments"
  # The descriptor stays until the answer is here: a FIFO that nobody holds forgets. With the lock of create_once: that is
  # free when the client is gone, too.
  rc=$(exec 7<>"$CLIENT_HOME/calls" 9>&- && printf '%s\n' "$name" >&7 && timeout -k 2 $((seconds + 10)) cat "$CLIENT_HOME/$name.code") || true
  SAID=$(sed -E 's/\x1b\[[0-9;]*m//g' "$CLIENT_HOME/$name.said" 2>/dev/null) || SAID=''
  rm -f -- "$CLIENT_HOME/$name".*
  return "${rc:-137}"
}

# answered WHAT ARGUMENTS…: a call that must succeed; what a failure means is told once, here.
answered() {
  local what=$1 rc=0
  shift
  client "$@" || rc=$?
  ((rc)) || return 0
  case $rc-$SAID in
    124-* | 137-*)
      die 11 "$what: VESSL did not answer within ${VESSL_TIMEOUT_S:-60} s" 'a call that hangs is given up' 'the same command again; VESSL_TIMEOUT_S=120 waits longer'
      ;;
    *'Invalid access token'*)
      die 3 "$what: the client says: Invalid access token" 'it says so too where the service itself fails (404, 500)' \
        'renew VESSL_ACCESS_TOKEN; if it is right, wait and try again'
      ;;
    *'(401)'* | *'(403)'*) die 3 "$what: VESSL refuses the token: $(launcher_said)" 'the token may use the project' 'renew VESSL_ACCESS_TOKEN' ;;
    *'(404)'*)
      die 2 "$what: $(launcher_said)" 'organization, project and run exist' 'see VESSL_DEFAULT_ORGANIZATION, VESSL_DEFAULT_PROJECT, RUN_ID'
      ;;
  esac
  die 11 "$what: $(launcher_said)" 'every call must be answered' 'the same command again: nothing is done twice'
}

# launcher_check CLUSTER PRESET: against what the client lists, before a run is created.
launcher_check() {
  local cluster names
  answered 'clusters' cluster list
  cluster=$(awk -v n="$1" '$1 ~ /^[0-9]+$/ && $2 == n {print $1; exit}' <<<"$SAID")
  names=$(awk '$1 ~ /^[0-9]+$/ {printf "%s%s", sep, $2; sep = ", "}' <<<"$SAID")
  [[ -n $cluster ]] || die 2 "launcher.cluster: $1: not one of this organization's: ${names:-none}" \
    'the cluster is checked before a run is created' 'set launcher.cluster to one of them'
  answered 'presets' resource list "$cluster"
  names=$(awk '$1 ~ /^[0-9]+$/ {printf "%s%s", sep, $2; sep = ", "}' <<<"$SAID")
  [[ -n $(awk -v n="$2" '$1 ~ /^[0-9]+$/ && $2 == n {print; exit}' <<<"$SAID") ]] ||
    die 2 "launcher.preset: $2: $1 has ${names:-none}" 'the preset is checked before a run is created' 'set launcher.preset to one of them'
}

# launcher_runs: number, name, status of each run, newest first.
launcher_runs() {
  answered 'list of runs' run list
  awk '$1 ~ /^[0-9]+$/ && NF >= 4 {print $1, $2, $4}' <<<"$SAID" | sort -rn
}

# launcher_create FILE NAME: NUMBER from the printed address; 1 when there is none.
launcher_create() {
  local file
  file=$(realpath "$1")
  client run create -f "$file" || true
  NUMBER=$(sed -nE 's#.*Check your Run at: .*/runs/[^/]+/([0-9]+).*#\1#p' <<<"$SAID" | tail -n 1)
  [[ -z $NUMBER ]] || return 0
  case $SAID in
    *'cluster does not exist'*)
      die 2 "$2 was not created: $(launcher_said)" "the client ends with 0 all the same" 'set launcher.cluster to one of them'
      ;;
    *'YAML verification failed'* | *'YAML does not exist'* | *'Missing argument'*)
      die 1 "$2 was not created: $(launcher_said)" 'the client refuses the run file' "read $1"
      ;;
    *'Invalid access token'*) answered 'create' run list ;;
  esac
  return 1
}

# launcher_read NUMBER: status, name and reason, with tabs between.
launcher_read() {
  answered "run $1" run read "$1"
  awk '/^ *Status reason/ {sub(/^ *Status reason ?/, ""); reason = $0} /^ *Status [a-z]+ *$/ && $2 != "reason" {status = $2}
    /^ Name / && name == "" {name = $2}
    END {printf "%s\t%s\t%s\n", status, name, reason}' <<<"$SAID"
}

# launcher_logs NUMBER LINES: the last lines; the client ends with 0 whatever happens.
launcher_logs() {
  answered "log of run $1" run logs "$1" --tail "$2"
  grep -E '^\[[0-9:.]+\] ' <<<"$SAID" || true
}

launcher_stop() { answered "stop of run $1" run terminate "$1"; }

launcher_command() { printf 'vessl run create -f %s\n' "$1"; }
