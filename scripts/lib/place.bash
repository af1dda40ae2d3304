# One item of a sync into the store and under its name: lock, look, fetch, rename, link. Sourced by sync_models.sh only.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # what it sets and reads is shared with the script that sources it

# A hit costs marker, sizes and times; what was touched since is hashed; what is damaged goes back to staging.
in_store() {
  local label=$1 target=$2 staging=$3
  [[ -d $target ]] || return 1
  # Looked at a moment ago, and still there.
  if [[ ${STATE[$label]} == hit && $(cat "$target/.complete" 2>/dev/null) == "${DIGEST[$label]}" ]]; then return 0; fi
  if manifest verify "${MANIFEST[$label]}" "$target" --quick 2>/dev/null; then return 0; fi
  log sync "$label: $target was touched; hashing it"
  if [[ -f $target/.complete ]] && manifest verify "${MANIFEST[$label]}" "$target"; then
    touch "$target/.complete"
    return 0
  fi
  log sync "$label: damaged; what is right of it is kept"
  rm -rf -- "$staging" && mkdir -p "$staging"
  rm -f -- "$target/.complete"
  mv -T "$target" "$staging/files"
  return 1
}

point() {
  local link=$1 target=$2
  mkdir -p "$(dirname "$link")"
  [[ ! -e $link || -L $link ]] ||
    die 10 "$link is a folder that was not synced" 'a model is a link into the store' "move it away: mv '$link' '$link.old'"
  # A store in the folder itself may move with it.
  if [[ $target == "$(dirname "$link")/"* ]]; then target=${target#"$(dirname "$link")/"}; fi
  [[ $(readlink "$link" || true) != "$target" ]] || return 0
  # A name of its own: another sync may put another version there at the same time.
  ln -sfn "$target" "$(dirname "$link")/.link-$(basename "$link").$$"
  mv -T "$(dirname "$link")/.link-$(basename "$link").$$" "$link"
}

# register DIGEST LINK: for `make cache`, and against eviction by a machine that can't see this one's links.
register() {
  local host record
  host=$(uname -n) # not $HOSTNAME, which may come from another machine's environment
  record=$STORE/.used/$1/$(cksum <<<"$host $2" | tr ' ' '-')
  mkdir -p "$STORE/.used/$1" && printf '%s\t%s\n' "$host" "$2" >"$record"
} 2>/dev/null

# lock NAME-DIGEST: held until `exec 9>&-`, and by nobody's children.
lock() {
  local rc=0 how='another sync holds it; waiting for it'
  { exec 9>"$STORE/.staging/$1.lock"; } 2>/dev/null && flock -n -E 75 9 || rc=$?
  while ((rc == 75)); do
    log sync "$1: $how"
    rc=0 && flock -w 4 -E 75 9 || rc=$?
    how="still waiting, $SECONDS s"
  done
  ((rc == 0)) || die 10 "$STORE/.staging/$1.lock can't be locked" 'one sync at a time writes a version' 'chown the store, or set WMTP_CACHE_DIR to a file system with locks'
}

# republished LABEL: the bucket has another version by now; its manifest takes the place of the old one.
republished() {
  local label=$1 rc=0
  [[ ${MANIFEST[$label]} != */.listing/* ]] || return 1
  (fetch_manifest "${NAME[$label]}" "$TEMP/republished" "${PREFIX[$label]}") 2>/dev/null || rc=$?
  if ((rc == 1)); then log sync "$label: its manifest is gone from the bucket: it is being published again"; fi
  ((rc == 0)) || return 1
  ! cmp -s "$TEMP/republished" "${MANIFEST[$label]}" || return 1
  mv -f "$TEMP/republished" "${MANIFEST[$label]}"
}

sync_one() {
  local label=$1 name=${NAME[$1]} target staging began cache=hit fetched=0 rc
  local link=${LINK[$label]} again=0
  began=$(date +%s.%N)
  while :; do
    target=$STORE/${DIGEST[$label]} staging=$STORE/.staging/$name-${DIGEST[$label]}
    lock "$name-${DIGEST[$label]}"
    if in_store "$label" "$target" "$staging"; then break; fi
    cache=miss rc=0
    : >"$TEMP/fetched"
    log sync "Download $label: $(mb "${BYTES[$label]}") MB"
    mkdir -p "$staging"
    PLAN=(--store "$STORE")
    if [[ -n $FIRST && -d $FIRST/$name && ! -L $FIRST/$name ]]; then
      PLAN+=(--also "$FIRST/$name")
      # What came first left the bucket, too.
      ((again)) || fetched=$(find "$FIRST/$name/" -type f -printf '%s\n' | awk '{s += $1} END {print s + 0}')
    fi
    tries "$label" "${MANIFEST[$label]}" "${PREFIX[$label]}" "$staging" || rc=$?
    fetched=$((fetched + $(<"$TEMP/fetched")))
    case $rc in
      0)
        manifest finish "${MANIFEST[$label]}" "$staging" "$target" ||
          die 10 "$label: could not be put in $target" '' 'see the line above, then again'
        break
        ;;
      4)
        exec 9>&-
        ((++again <= RETRIES)) || die 13 "$label: published again and again while it was fetched" 'a sync needs a version that stays' "$AGAIN"
        rc=${DIGEST[$label]}
        survey
        log sync "$label: published again while it was fetched (${rc:0:12} is ${DIGEST[$label]:0:12} now); what is the same is kept"
        ;;
      *) failed_tries "$rc" "$label" "$AGAIN" ;;
    esac
  done
  # In this order: a link that a kill leaves unknown to others would be evicted under its reader.
  register "${DIGEST[$label]}" "$link" || log sync "warn  $label: its use can't be noted in $STORE/.used: another machine may evict it"
  point "$link" "$target"
  exec 9>&-
  told "$label" "$fetched" "$began" "$cache"
}

# told LABEL FETCHED BEGAN CACHE: the line for the record, and the one for people.
told() {
  python - "$1" "${NAME[$1]}" "${DIGEST[$1]}" "${FILES[$1]}" "${BYTES[$1]}" "$2" "$3" "$(date +%s.%N)" "$4" "${LINK[$1]}" "${MANIFEST[$1]}" <<'PY'
import json, sys
label, name, digest, files, total, fetched, began, ended, cache, path, manifest = sys.argv[1:]
seconds = max(float(ended) - float(began), 0.001)
rate = round(int(fetched) / 1e6 / seconds, 1)
kind = "dataset" if label != name else "model"
print(json.dumps({kind: name, "digest": digest, "bytes": int(total), "downloaded_bytes": int(fetched),
                  "seconds": round(seconds, 3), "mb_per_second": rate, "cache": cache, "path": path}))
proof = "as the bucket lists them" if "/.listing/" in manifest else "blake3 verified while arriving"
how = "in the store already" if cache == "hit" else f"{files} files, {proof}, {rate} MB/s"
print(f"sync      {label} ok: {int(total) / 1e6:.1f} MB, {how}, {seconds:.1f} s", file=sys.stderr)
PY
}

# bring_first: settings and tokenizers of all models before any weights, for a trainer that waits for them.
bring_first() {
  local label part
  : >"$TEMP/first.run"
  for label in "${ITEMS[@]}"; do
    [[ ${LINK[$label]} == "$MODELS/"* && ! -e $FIRST/$label ]] || continue
    if [[ ${STATE[$label]} == hit ]]; then
      ln -sfn "$STORE/${DIGEST[$label]}" "$FIRST/$label"
    else
      manifest first "${MANIFEST[$label]}" "$FIRST/$label" --prefix "${PREFIX[$label]}" >>"$TEMP/first.run"
    fi
  done
  [[ -s $TEMP/first.run ]] || return 0
  bounded 60 "$S5CMD" --log error --retry-count 3 run "$TEMP/first.run" >&2 || true
  for part in "$FIRST"/.*.part; do
    label=${part##*/.} label=${label%.part}
    manifest first "${MANIFEST[$label]}" "$FIRST/$label" --accept || log sync "warn  $label: its settings did not come first; they come with the rest"
  done
}
