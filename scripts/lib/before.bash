# What is judged before the first byte of a model moves. Sourced by sync_models.sh only.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154

free_bytes() {
  local at=$1
  while [[ ! -e $at ]]; do at=$(dirname "$at"); done
  df --output=avail -B1 "$at" | tail -n 1 | tr -d ' '
}

staged_bytes() {
  if [[ -d $1/files ]]; then find "$1/files" -type f -printf '%s\n'; fi | awk '{s += $1} END {printf "%.0f\n", s}'
}

# Every manifest is asked for and judged before the first byte.
read_manifests() {
  local name
  for name in "${NAMES[@]}"; do
    fetch_manifest "$name" "$TEMP/$name.json" ||
      die 13 "$name is not published: no $(prefix_of "$name")/manifest.json" 'a model without a manifest is not published' \
        "scripts/publish_models.sh --from DIR $name"
    manifest check "$TEMP/$name.json" >"$TEMP/$name.check" ||
      die 13 "$name: its manifest is refused (line above); nothing was written" 'a manifest names files inside its model only' \
        "scripts/publish_models.sh --from DIR $name"
    [[ $(cut -f1 "$TEMP/$name.check") == "$name" ]] ||
      die 13 "$name: its manifest is that of $(cut -f1 "$TEMP/$name.check")" 'name and folder agree' "publish $name again"
  done
}

# The sum of what is missing against the disk.
need_room() {
  local name bytes digest needed=0 free have
  for name in "${NAMES[@]}"; do
    bytes=$(cut -f3 "$TEMP/$name.check") digest=$(manifest digest "$TEMP/$name.json")
    if [[ -d $STORE/$digest ]]; then log sync "$name: ${digest:0:12} is in the store"; else
      have=$(staged_bytes "$STORE/.staging/$name-$digest")
      # Sums beyond 63 bits would wrap: no disk holds them.
      if ((${#bytes} > 17)); then needed=$bytes && break; fi
      needed=$((needed + (bytes > have ? bytes - have : 0)))
      log sync "$name: ${digest:0:12}, $(mb "$bytes") MB, $(mb "$have") MB of it arrived before"
    fi
  done
  free=$(free_bytes "$STORE")
  log sync "$(mb "$needed") MB to fetch from $(prefix_of '') to $STORE, $(mb "$free") MB free"
  ((${#needed} <= 18 && needed <= free)) ||
    die 10 "$(mb "$needed") MB needed, $(mb "$free") MB free in $STORE" 'all models of a run fit before the first byte moves' \
      'make room, or set WMTP_CACHE_DIR to a larger volume'
}

# Scorers whose verdicts are kept are not needed: a second critic run fetches half.

# scores_kept NAME: whether scores of this name are on this disk or in the bucket, whole.
scores_kept() {
  local disk where=$CHECKPOINTS
  [[ $where == file://* ]] || where=file:///app/checkpoints
  disk=$(python -c 'import sys; from wmtp.paths import PathResolver; print(PathResolver().resolve(sys.argv[1])[1])' "$where")
  [[ ! -e $disk/.scores/$1/.complete ]] || return 0
  [[ $CHECKPOINTS == s3://* ]] || return 1
  local rest=${CHECKPOINTS#s3://}
  local -a endpoint=()
  local prefix=${rest#"${rest%%/*}"}
  if [[ -n ${S3_ENDPOINT_URL:-} ]]; then endpoint=(--endpoint-url "$S3_ENDPOINT_URL"); fi
  prefix=${prefix#/}
  timeout -k 1 40 aws "${endpoint[@]}" --cli-connect-timeout 5 --cli-read-timeout 10 s3api head-object \
    --bucket "${rest%%/*}" --key "${prefix:+${prefix%/}/}.scores/$1/.complete" >/dev/null 2>&1
}

# drop_scored: takes the models out of NAMES whose scores are kept; needs every manifest in TEMP.
drop_scored() {
  local name kept
  local -a wanted=()
  : >"$TEMP/not-needed"
  ((${#SETTINGS[@]} && ${#only[@]} == 0)) || return 0
  while IFS=$'\t' read -r _ name kept; do
    if [[ $kept != - ]] && scores_kept "$kept"; then
      log sync "$name is not needed: its scores are kept ($kept)"
      printf '%s\n' "$name" >>"$TEMP/not-needed"
    else
      wanted+=("$name")
    fi
  done < <(python -m wmtp.scorekey --env "${ENV:-${ENV_MODE:-}}" "${SETTINGS[@]}" --manifests "$TEMP")
  # What could not be asked is needed.
  if ((${#wanted[@]})); then NAMES=("${wanted[@]}"); fi
}

# keep_manifests NAME…: the trainer names the scores after them, also where the model itself is not here.
keep_manifests() {
  local name
  mkdir -p "$MODELS/.manifests"
  for name in "$@"; do copy_whole "$TEMP/$name.json" "$MODELS/.manifests/$name.json"; done
  copy_whole "$TEMP/not-needed" "$MODELS/.manifests/not-needed"
}
