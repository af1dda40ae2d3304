# Tries at what the bucket lacks, with progress and a watchdog. Sourced by publish_models.sh only, whose are the variables
# that name the folder and its place.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # what it sets and reads is shared with the script that sources it

MOVED=0 SENT=0

# told SENT NEED SECONDS
told() {
  local line
  line=$(awk -v n="$NAME" -v s="$1" -v t="$2" -v d="$3" 'BEGIN {
    if (s > t) s = t
    share = t ? s / t : 1; bar = substr("####################", 1, int(share * 20)); rate = d ? s / d : 0
    left = rate >= 1000 ? sprintf("%.0f s left", (t - s) / rate) : "waiting"
    printf "%s  [%s%s] %3.0f %%  %.1f of %.1f MB  %.0f MB/s  %s", n, bar, substr("--------------------", 1, 20 - length(bar)), share * 100, s / 1e6, t / 1e6, rate / 1e6, left}')
  if coloured; then printf '\rUpload    %s\e[K' "$line" >&2; else log Upload "$line"; fi
}

# count_bytes: what client and hashing MOVED, what the client SENT. Its reads count as well: an endpoint that puts parts
# together answers with bytes meanwhile.
count_bytes() {
  local pid read=0 written=0
  MOVED=0
  for pid in $CLIENT $HASHER; do
    { read -r _ read && read -r _ written; } 2>/dev/null <"/proc/$pid/io" || continue
    MOVED=$((MOVED + read + written))
    if [[ $pid == "$CLIENT" ]]; then SENT=$written; fi
  done
}

# watch: until both have ended. Tells how far they are; ends them when neither moves a byte for STALL seconds (12), when the
# hashing has ended badly (its code) or the claim is another's.
watch() {
  local moved=$SECONDS asked=$SECONDS shown=$SECONDS began=$SECONDS seen=0 every=4 rc=0
  SENT=0
  if coloured; then every=1; fi
  while kill -0 "$CLIENT" 2>/dev/null || [[ -n $HASHER ]]; do
    sleep 0.1 &
    wait $! # a signal ends this wait, not a sleep in the foreground
    if [[ -n $HASHER ]] && ! kill -0 "$HASHER" 2>/dev/null; then
      wait "$HASHER" || rc=$?
      HASHER=''
      ((rc == 0)) || break
    fi
    count_bytes
    # Less than this is no data: timers of the client's own.
    if ((MOVED - seen >= 512 || MOVED < seen)); then seen=$MOVED moved=$SECONDS; fi
    if ((SECONDS - moved >= STALL)) && [[ -r /proc/$$/io ]]; then
      log publish "warn  $NAME: no byte was sent for $STALL s: given up"
      rc=12
      break
    fi
    if ((SECONDS - asked >= 5)); then
      asked=$SECONDS
      ours 5 || (($? == 2)) || lost
    fi
    if ((SECONDS - shown >= every)); then shown=$SECONDS && told "$SENT" "$(cat "$WORK/need")" $((SECONDS - began)); fi
  done
  if coloured && ((shown > began)); then printf '\r\e[K' >&2; fi
  return "$rc"
}

# send: one try at what is not proved to be there, hashing beside it. 0 or what went wrong.
send() {
  local rc=0 sent=0
  rm -f -- "$WORK/commands" && mkfifo "$WORK/commands"
  setpriv --pdeathsig KILL python -m wmtp.publish send "$WORK" "$FROM/$NAME" "$PREFIX" --part-mb "$PART_MB" >"$WORK/commands" &
  HASHER=$!
  setpriv --pdeathsig KILL "$S5CMD" --json --retry-count 3 --numworkers 16 run <"$WORK/commands" >>"$WORK/sent" 2>"$WORK/sent.log" &
  CLIENT=$!
  watch || rc=$?
  if ((rc)); then kill -KILL "$CLIENT" ${HASHER:+"$HASHER"} 2>/dev/null || true; fi
  wait "$CLIENT" 2>/dev/null || sent=$?
  if [[ -n $HASHER ]]; then wait "$HASHER" 2>/dev/null || true; fi
  CLIENT='' HASHER=''
  ((rc != 13 && rc != 10)) || exit "$rc" # it has said why
  if ((rc == 0 && sent)); then log publish "client: $(client_said sent.log)"; fi
  return $((rc ? rc : sent))
}

# Tries until a listing proves every object.
upload() {
  local try rc lacking
  for ((try = 1; try <= RETRIES; try++)); do
    rc=0
    act send || rc=$?
    list
    prove lacking || exit
    [[ -s $WORK/lacking ]] || return 0
    STRAYS=1
    lacking=$(awk -F '\t' '{s += $1; if (NR < 4) n = n (n ? ", " : "") $2} END {printf "%d files, %.1f MB (%s%s)", NR, s / 1e6, n, (NR > 3 ? ", …" : "")}' "$WORK/lacking")
    log publish "$NAME: try $try of $RETRIES ended with $rc; the bucket still lacks $lacking"
    if ((try < RETRIES)); then
      sleep "$WAIT" &
      wait $! # a signal ends this wait, not a sleep in the foreground
    fi
  done
  die 12 "$NAME: the upload failed, $RETRIES of $RETRIES tries used" 'a model is published only when every file is there' \
    'the same command: what is proved to be there stays'
}
