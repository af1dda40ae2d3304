# The image by its names, and long commands with a sign of life. To be sourced after common.bash and settings.bash.
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it

# image_names: REPOSITORY, TAG, LATEST (empty where the tree has what no commit has) and IMAGE_DIR, from the configuration.
# Needs choose_settings and overrides.
image_names() {
  local named tree
  named=$(python -m wmtp.config --config "$CONFIG" "${CONFIG_OVERRIDES[@]}" --get launcher.image) || exit 2
  [[ -n $named ]] || die 2 "$CONFIG: launcher.image is not set" 'it names the repository of the image' 'launcher.image: ghcr.io/OWNER/wmtp:latest'
  [[ $named =~ ^[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)+(:[A-Za-z0-9._-]+)?$ ]] ||
    die 2 "launcher.image: $named" 'HOST[:PORT]/NAME[:TAG], without a digest' 'launcher.image: ghcr.io/OWNER/wmtp:latest'
  REPOSITORY=$named LATEST=latest TAG=$(revision) IMAGE_DIR=$ROOT/build/$ENV
  if [[ ${named##*/} == *:* ]]; then REPOSITORY=${named%:*} LATEST=${named##*:}; fi
  tree=$(git -C "$ROOT" status --porcelain 2>/dev/null) || tree=unknown
  if [[ -n $tree ]]; then TAG=$TAG-dirty LATEST=''; fi
}

# image_overrides: those of SET that the configuration knows; a recipe's keys have no part in the image.
image_overrides() {
  local word
  CONFIG_OVERRIDES=()
  for word in "${OVERRIDES[@]}"; do
    if [[ $word == launcher.image=* ]]; then CONFIG_OVERRIDES+=(--set "$word"); fi
  done
}

# narrated LOG COMMAND…: output to LOG, a line of it every few seconds to the story. It ends with the stage, however that ends.
narrated() {
  local file=$1 rc=0 pid beat=0 began=$SECONDS
  local -a tied
  shift
  tie TERM
  : >"$file"
  "${tied[@]}" "$@" >"$file" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    beat=$((beat + 1))
    if ((beat % 20 == 0)); then log "$STAGE" "$((SECONDS - began)) s  $(tail -c 2000 "$file" | tr '\r' '\n' | grep -v '^ *--->' | grep . | tail -n 1 | cut -c1-60 || true)"; fi
  done
  wait "$pid" || rc=$?
  return "$rc"
}
