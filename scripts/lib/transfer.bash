# One model from the bucket into the store and under its name. Sourced by sync_models.sh only.
# shellcheck shell=bash

# One try at what is missing: 0 all there, 10 disk full, 12 not all arrived, 13 arrived with other content.
transfer() {
  local name=$1 staging=$2 rc=0 sent=0
  manifest plan "$TEMP/$name.json" "$staging" --prefix "$(prefix_of "$name")" --commands "$TEMP/commands" \
    --options "--concurrency $WORKERS --part-size $PART_MB" >"$TEMP/missing" || return
  [[ -s $TEMP/fetched ]] || awk '{s += $1} END {printf "%.0f\n", s}' "$TEMP/missing" >"$TEMP/fetched"
  [[ -s $TEMP/missing ]] || return 0
  # The client itself, not its wrapper; both ends die with this shell.
  exec 5< <(exec setpriv --pdeathsig KILL "$S5CMD" --json --retry-count 3 --numworkers "$WORKERS" run "$TEMP/commands" 2>"$TEMP/client.log" 9>&-)
  CLIENT=$!
  setpriv --pdeathsig KILL python -m wmtp.manifest accept "$TEMP/$name.json" "$staging" --stall "$STALL" <&5 5<&- 9>&- &
  READER=$!
  exec 5<&-
  wait "$READER" || rc=$?
  READER=''
  if ((rc == 12)); then kill -KILL "$CLIENT" 2>/dev/null || true; fi
  wait "$CLIENT" 2>/dev/null || sent=$?
  CLIENT=''
  if ((rc && sent)); then
    sed -nE 's/.*"error":"(.*)"\}?$/sync      client: \1/p' "$TEMP/client.log" | cut -c1-300 | head -n 3 >&2 || true
    if grep -qi 'no space left' "$TEMP/client.log"; then rc=10; fi
  fi
  return "$rc"
}

# Tries until everything is proved; a full disk is not tried again.
transfer_all() {
  local name=$1 staging=$2 try rc=0
  for ((try = 1; try <= RETRIES; try++)); do
    rc=0
    transfer "$name" "$staging" || rc=$?
    ((rc)) || return 0
    ((rc != 10)) || break
    log sync "$name: try $try of $RETRIES ended with $rc"
    if ((try < RETRIES)); then
      sleep "$WAIT" &
      wait $! # a signal ends this wait, not a sleep in the foreground
    fi
  done
  case $rc in
    10) die 10 "$name: the disk of $STORE is full or refuses to be written" 'what has arrived is kept' 'make room, then again' ;;
    13) die 13 "$name arrived with another content than its manifest says" \
      'a model stands under its name only when every file is proved' \
      "scripts/sync_models.sh --model $name ($RETRIES of $RETRIES tries used; else publish it again: the object may be damaged)" ;;
    *) die 12 "$name: the transfer failed, $RETRIES of $RETRIES tries used" 'what has arrived is kept' "scripts/sync_models.sh --model $name" ;;
  esac
}

# A hit costs marker, sizes and times; what was touched since is hashed; what is damaged goes back to staging.
in_store() {
  local name=$1 target=$2 staging=$3
  [[ -d $target ]] || return 1
  if manifest verify "$TEMP/$name.json" "$target" --quick 2>/dev/null; then return 0; fi
  log sync "$name: $target was touched; hashing it"
  if [[ -f $target/.complete ]] && manifest verify "$TEMP/$name.json" "$target"; then
    touch "$target/.complete"
    return 0
  fi
  log sync "$name: damaged; what is right of it is kept"
  rm -rf -- "$staging" && mkdir -p "$staging"
  rm -f -- "$target/.complete"
  mv -T "$target" "$staging/files"
  return 1
}

# Staging of this model's other versions; the lock is held.
collect() {
  local folder
  for folder in "$STORE/.staging/$1"-*/; do
    folder=${folder%/}
    if [[ -d $folder && $folder != "$2" && ${folder##*/"$1"-} =~ ^[0-9a-f]{64}$ ]]; then rm -rf -- "$folder"; fi
  done
}

point() {
  local link=$MODELS/$1 target=$2
  [[ ! -e $link || -L $link ]] ||
    die 10 "$link is a folder that was not synced" 'a model is a link into the store' "move it away: mv '$link' '$link.old'"
  if [[ $target == "$MODELS/"* ]]; then target=${target#"$MODELS/"}; fi
  [[ $(readlink "$link" || true) != "$target" ]] || return 0
  ln -sfn "$target" "$MODELS/.link-$1"
  mv -T "$MODELS/.link-$1" "$link"
}

sync_one() {
  local name=$1 digest target staging began=$EPOCHREALTIME cache=hit fetched=0 bytes
  digest=$(manifest digest "$TEMP/$name.json") bytes=$(cut -f3 "$TEMP/$name.check")
  target=$STORE/$digest staging=$STORE/.staging/$name-$digest
  exec 9>"$STORE/.staging/$name.lock"
  if ! flock -n 9; then
    log sync "$name: another sync holds it; waiting for it"
    until flock -w 4 9; do log sync "$name: still waiting, $SECONDS s"; done
  fi
  if ! in_store "$name" "$target" "$staging"; then
    cache=miss
    : >"$TEMP/fetched"
    log sync "Download $name: $(mb "$bytes") MB"
    mkdir -p "$staging"
    transfer_all "$name" "$staging"
    fetched=$(<"$TEMP/fetched")
    manifest finish "$TEMP/$name.json" "$staging" "$target" ||
      die 10 "$name: could not be put in $target" '' 'see the line above, then again'
  fi
  collect "$name" "$staging"
  point "$name" "$target"
  exec 9>&-
  python - "$name" "$digest" "$bytes" "$fetched" "$began" "$EPOCHREALTIME" "$cache" "$MODELS/$name" <<'PY'
import json, sys
name, digest, total, fetched, began, ended, cache, path = sys.argv[1:]
seconds = max(float(ended) - float(began), 0.001)
fetched = max(int(fetched), 0)
rate = round(fetched / 1e6 / seconds, 1)
print(json.dumps({"model": name, "digest": digest, "bytes": int(total), "downloaded_bytes": fetched,
                  "seconds": round(seconds, 3), "mb_per_second": rate, "cache": cache, "path": path}))
how = "in the store already" if cache == "hit" else f"blake3 verified while arriving, {rate} MB/s"
print(f"sync      {name} ok: {int(total) / 1e6:.1f} MB, {how}, {seconds:.1f} s", file=sys.stderr)
PY
}
