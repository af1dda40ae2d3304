# Files of a manifest from the bucket into a staging folder: tries, watchdog, what is still lacking; and what every stage that
# moves bytes leaves behind. To be sourced after common.bash and store.bash, whose settings it uses.
# shellcheck shell=bash

TEMP='' CLIENT='' READER='' HASHER='' WATCHER='' PLAN=() VIA=()

# own_temp: TEMP, and a `cleanup` however the stage ends.
own_temp() {
  TEMP=$(mktemp -d)
  trap cleanup EXIT
  trap 'exit 143' TERM
  trap 'exit 130' INT
}

# A stage that leaves more behind has its own.
cleanup() {
  end_transfer
  if [[ -n $TEMP ]]; then rm -rf -- "$TEMP"; fi
}

# proving MODULE ARGUMENT…: in the background, since a trap waits for a foreground child, and hashing 27 GB takes its time.
proving() {
  setpriv --pdeathsig KILL python -m "$@" 9>&- &
  HASHER=$!
  local rc=0
  wait "$HASHER" || rc=$?
  HASHER=''
  return "$rc"
}

manifest() { proving wmtp.manifest "$@"; }

end_transfer() {
  local pid
  for pid in $CLIENT $READER $HASHER $WATCHER; do kill -KILL "$pid" 2>/dev/null || true; done
}

free_bytes() {
  local at=$1
  while [[ ! -e $at ]]; do at=$(dirname "$at"); done
  df --output=avail -B1 "$at" | tail -n 1 | tr -d ' '
}

mb() { awk -v b="$1" 'BEGIN {printf "%.1f", b / 1e6}'; }

# amount "FILES BYTES": for people.
amount() { awk '{printf "%d file%s, %.1f MB", $1, $1 == 1 ? "" : "s", $2 / 1e6}' <<<"$1"; }

# watch_bytes PID: kills a client that moved nothing for $STALL s, for it has no time-out of its own. /proc/PID/io counts
# what goes through its sockets, too. It waits without a child of its own, which could stay behind.
watch_bytes() {
  local moved=0 read=0 written=0 still=0
  exec 7<> <(:)
  while kill -0 "$1" 2>/dev/null; do
    { read -r _ read && read -r _ written; } <"/proc/$1/io" || return 0
    still=$((still + 1))
    # Less than this is no data: timers of the client's own.
    if ((read + written - moved >= 512)); then moved=$((read + written)) still=0; fi
    if ((still > STALL)); then
      : >"$TEMP/stalled"
      kill -KILL "$1" 2>/dev/null || true
      return 0
    fi
    read -rt 1 -u 7 || true
  done 2>/dev/null
}

# One try at what is lacking: 0 all there, 3 refused, 10 disk, 12 not all arrived, 13 arrived with other content.
transfer() {
  local name=$1 manifest=$2 prefix=$3 staging=$4 rc=0 sent=0
  manifest plan "$manifest" "$staging" --prefix "$prefix" --commands "$TEMP/commands" \
    --options "--concurrency $WORKERS --part-size $PART_MB" "${PLAN[@]}" >"$TEMP/lacking" || return
  [[ -s $TEMP/fetched ]] || cut -d ' ' -f 2 "$TEMP/lacking" >"$TEMP/fetched"
  [[ $(<"$TEMP/lacking") != '0 0' ]] || return 0
  rm -f "$TEMP/stalled"
  # The client itself, not its wrapper; both ends die with this shell.
  exec 5< <(exec "${VIA[@]}" setpriv --pdeathsig KILL "$S5CMD" --json --retry-count 10 --numworkers "$WORKERS" run "$TEMP/commands" 2>"$TEMP/client.log" 9>&-)
  CLIENT=$!
  setpriv --pdeathsig KILL python -m wmtp.manifest accept "$manifest" "$staging" "${@:5}" <&5 5<&- 9>&- >"$TEMP/lacking.now" &
  READER=$!
  exec 5<&-
  watch_bytes "$CLIENT" 9>&- 3>&- &
  WATCHER=$!
  wait "$READER" || rc=$?
  READER=''
  # Watched to its end: a reader that was killed leaves it to what may be a silent link.
  wait "$CLIENT" 2>/dev/null || sent=$?
  CLIENT=''
  kill -KILL "$WATCHER" 2>/dev/null || true
  wait "$WATCHER" 2>/dev/null || true
  WATCHER=''
  if [[ -s $TEMP/lacking.now ]]; then mv -f "$TEMP/lacking.now" "$TEMP/lacking"; fi
  if [[ -e $TEMP/stalled ]]; then log "$STAGE" "warn  $name: no byte moved for $STALL s; the client was stopped"; fi
  if ((rc && sent)); then
    sed -nE 's/.*"error":"(.*)"\}?$/\1/p' "$TEMP/client.log" | cut -c1-300 | sort -u | head -n 3 |
      while IFS= read -r line; do log "$STAGE" "     client: $line"; done
    if grep -qiE 'no space left|quota exceeded|read-only file system' "$TEMP/client.log"; then rc=10; fi
    if grep -qE 'AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|NoSuchBucket' "$TEMP/client.log"; then rc=3; fi
  fi
  [[ $rc =~ ^(0|3|10|13)$ ]] || rc=12
  return "$rc"
}

# tries NAME MANIFEST PREFIX STAGING [--discard]: until everything is proved; a full disk or a refusal is not tried again.
# 4: the script's own `republished NAME` says that another version was published meanwhile.
tries() {
  local name=$1 try rc=0
  for ((try = 1; try <= RETRIES; try++)); do
    rc=0
    transfer "$@" || rc=$?
    ((rc)) || return 0
    log "$STAGE" "$name: try $try of $RETRIES ended with $rc; it lacks $(amount "$(<"$TEMP/lacking")")$( ((try < RETRIES && rc > 10)) && printf '; again in %s s' "$WAIT")"
    ((rc > 10)) || return "$rc"
    if declare -F republished >/dev/null && republished "$name"; then return 4; fi
    if ((try < RETRIES)); then
      sleep "$WAIT" 9>&- &
      wait $! # a signal ends this wait, not a sleep in the foreground
    fi
  done
  return "$rc"
}

# failed_tries CODE NAME AGAIN: the last words of a transfer that did not end well.
failed_tries() {
  case $1 in
    3) die 3 "$2: the bucket refuses its objects (line above)" 'key and secret may read models/ and datasets/' "mend the key's rights, then again: what has arrived is kept" ;;
    10) die 10 "$2: the disk of $STORE is full or refuses to be written" 'what has arrived is kept' 'make room (make cache shows what is there), then again' ;;
    13) die 13 "$2 arrived with another content than its manifest says" \
      'a model stands under its name only when every file is proved' \
      "$3   ($RETRIES of $RETRIES tries used; the object may be damaged: make verify-models NAME=${2#*:})" ;;
    *) die 12 "$2: the transfer failed, $RETRIES of $RETRIES tries used" 'what has arrived is kept' "$3" ;;
  esac
}
