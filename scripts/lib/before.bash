# What is judged before the first byte of a model moves. Sourced by sync_models.sh only.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # what it sets and reads is shared with the script that sources it

# Every manifest is asked for at once; one that does not come is asked for again by the client that can say why.
read_manifests() {
  local label
  local -A fetching=()
  for label in "${ITEMS[@]}"; do
    MANIFEST["$label"]=$TEMP/$label.json
    { bounded 20 "$S5CMD" --log error --retry-count 1 cat "${PREFIX[$label]}/manifest.json" 2>/dev/null | head -c 67108865 >"$TEMP/$label.json"; } &
    fetching[$label]=$!
  done
  for label in "${ITEMS[@]}"; do
    wait "${fetching[$label]}" || fetch_manifest "${NAME[$label]}" "$TEMP/$label.json" "${PREFIX[$label]}" || unpublished "$label"
  done
  survey
}

# unpublished LABEL: what someone else uploaded is taken by what the bucket says of it, on one's word.
unpublished() {
  local label=$1 name=${NAME[$1]} rc=0
  [[ ${WMTP_NO_MANIFEST:-} == 1 ]] ||
    die 13 "$label is not published: no ${PREFIX[$label]}/manifest.json" 'a model without a manifest is not published' \
      "scripts/publish_models.sh --from DIR $name (or, for what someone else uploaded: WMTP_NO_MANIFEST=1)"
  MANIFEST["$label"]=$TEMP/.listing/$label.json
  mkdir -p "$TEMP/.listing"
  python -m wmtp.bucket "$name" "${PREFIX[$label]}" >"${MANIFEST[$label]}" || rc=$?
  ((rc == 0)) || die "$rc" "$label: nothing could be listed in ${PREFIX[$label]}" 'without a manifest the listing says what a model is' 'see that name and bucket are right'
  log sync "warn  $label has no manifest: proved are the sizes, and the content of $(grep -c '"crc64nvme": "[^"]' "${MANIFEST[$label]}" || true) of $(grep -c '"path"' "${MANIFEST[$label]}" || true) files whose checksum the bucket keeps;"
  log sync '      not that no file is missing, nor who wrote them. Publish what you trust:'
  log sync "      scripts/publish_models.sh --from '$MODELS' $name"
}

# survey: what of each item is here, into DIGEST FILES BYTES STATE HERE.
survey() {
  local label digest files bytes state here
  local -a pairs=()
  for label in "${ITEMS[@]}"; do pairs+=("$label=${MANIFEST[$label]}"); done
  python -m wmtp.cache survey "$STORE" "${pairs[@]}" >"$TEMP/survey" ||
    die 13 'a manifest is refused (line above); nothing was written' 'a manifest names files inside its model only' "scripts/publish_models.sh --from DIR NAME"
  while IFS=$'\t' read -r label digest files bytes state here; do
    DIGEST["$label"]=$digest FILES["$label"]=$files BYTES["$label"]=$bytes STATE["$label"]=$state HERE["$label"]=$here
  done <"$TEMP/survey"
}

# The plan: what, how much, from where, why. On standard output for machines when nothing is to be done.
tell_plan() {
  local label how
  for label in "${ITEMS[@]}"; do
    how="$(mb "${BYTES[$label]}") MB in ${FILES[$label]} files, $(mb "${HERE[$label]}") MB here"
    case ${STATE[$label]} in hit) how='in the store' ;; touched) how='in the store, touched since: to be hashed' ;; esac
    log sync "$label (${WHY[$label]}): ${DIGEST[$label]:0:12}, $how"
    ((! dry)) || python -c 'import json, sys; k = ("item", "why", "digest", "files", "bytes", "here_bytes", "state", "from", "to"); v = sys.argv[1:]
print(json.dumps({a: int(b) if a in ("files", "bytes", "here_bytes") else b for a, b in zip(k, v)}))' \
      "$label" "${WHY[$label]}" "${DIGEST[$label]}" "${FILES[$label]}" "${BYTES[$label]}" "${HERE[$label]}" "${STATE[$label]}" "${PREFIX[$label]}" "${LINK[$label]}"
  done
}

# The sum of what is missing.
missing_bytes() {
  local label needed=0 here
  for label in "${ITEMS[@]}"; do
    [[ ${STATE[$label]} == new ]] || continue
    # Sums beyond 63 bits would wrap: no disk holds them.
    if ((${#BYTES[$label]} > 17)); then needed=${BYTES[$label]} && break; fi
    here=$((${BYTES[$label]} - ${HERE[$label]}))
    needed=$((needed + (here > 0 ? here : 0)))
  done
  printf '%s\n' "$needed"
}

# It is held against the disk; where that helps, what nobody uses makes room.
need_room() {
  local needed free
  needed=$(missing_bytes) free=$(free_bytes "$STORE")
  log sync "$(mb "$needed") MB to fetch from s3://$S3_BUCKET_NAME to $STORE, $(mb "$free") MB free"
  if ((! dry && ${#needed} <= 18 && needed > free)); then
    collect
    free=$(free_bytes "$STORE")
    if ((needed > free && needed <= free + $(spare_bytes "${DIGEST[@]}"))); then
      evict "$((needed - free))" "${DIGEST[@]}"
      survey # a version that went may have had files that were counted as here
      needed=$(missing_bytes) free=$(free_bytes "$STORE")
    fi
  fi
  ((${#needed} <= 18 && needed <= free)) ||
    die 10 "$(mb "$needed") MB needed, $(mb "$free") MB free in $STORE" 'all models of a run fit before the first byte moves' \
      'make room (make cache shows what uses it), or set WMTP_CACHE_DIR to a larger volume'
}

# accelerate: AWS's transfer acceleration, where it is wanted and the bucket has it.
accelerate() {
  [[ -n $ACCELERATE ]] || return 0
  if [[ -n ${S3_ENDPOINT_URL:-} ]]; then
    log sync "warn  storage.accelerate is AWS's own: not used with $S3_ENDPOINT_URL"
  elif [[ $(bounded 40 aws s3api get-bucket-accelerate-configuration --bucket "$S3_BUCKET_NAME" --query Status --output text 2>/dev/null) == Enabled ]]; then
    VIA=(env S3_ENDPOINT_URL=https://s3-accelerate.amazonaws.com)
  else
    log sync "warn  storage.accelerate: $S3_BUCKET_NAME has no acceleration, or this key may not ask: not used"
  fi
}
