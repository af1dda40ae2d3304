# Where the store is, and how versions that nobody uses leave it. Sourced by sync_models.sh and cache.sh; uses MODELS.
# shellcheck shell=bash disable=SC2153,SC2154  # what it reads is set by the script that sources it

# choose_store CACHE: STORE, and why it is not the cache.
choose_store() {
  STORE=$MODELS/.store
  if [[ -d $1 && -w $1 ]]; then
    STORE=$(cd "$1" && pwd)
  elif [[ -d $1 ]]; then
    log "$STAGE" "warn  $1 can't be written: not used as cache (next: sudo chown $(id -u) '$1')"
  fi
}

# evict_one DIGEST NAME BYTES: in one rename out of everybody's sight; not while another sync has its lock.
evict_one() {
  local gone=$STORE/.staging/evicted-$1
  mkdir -p "$STORE/.staging"
  (
    flock -n 8 || exit 1
    # Looked at again, now that nobody can begin to link it.
    python -m wmtp.cache spare "$STORE" "$MODELS" | cut -f1 | grep -qx "$1" || exit 1
    mv -T "$STORE/$1" "$gone"
  ) 8>"$STORE/.staging/$2-$1.lock" || return 1
  rm -rf -- "$gone" "$STORE/.used/$1"
  log "$STAGE" "$2 ${1:0:12} evicted: $(awk -v b="$3" 'BEGIN {printf "%.1f", b / 1e6}') MB that nobody used"
}

# evict BYTES DIGEST…: at least so many, the longest unused first; the DIGESTs are wanted.
evict() {
  local left=$1 digest name bytes
  while ((left > 0)) && IFS=$'\t' read -r digest name bytes; do
    if evict_one "$digest" "$name" "$bytes"; then left=$((left - bytes)); fi
  done < <(python -m wmtp.cache spare "$STORE" "$MODELS" "${@:2}")
}

# spare_bytes DIGEST…: what an eviction could free at most; the DIGESTs are wanted.
spare_bytes() { python -m wmtp.cache spare "$STORE" "$MODELS" "$@" | awk '{s += $3} END {printf "%.0f", s}'; }

# within GB DIGEST…: brings the store under a size where one is set.
within() {
  [[ -n $1 ]] || return 0
  local have
  have=$(python -m wmtp.cache list "$STORE" "$MODELS" --json | awk -F'"bytes": ' '{s += $2} END {printf "%.0f", s}')
  have=$(awk -v h="$have" -v m="$1" 'BEGIN {printf "%.0f", h - m * 1e9}')
  if ((have > 0)); then evict "$have" "${@:2}"; fi
}

# collect: staging that nobody works on: of other versions of what is wanted here, of what is in the store by now, and what
# an eviction left.
collect() {
  local label name folder
  rm -rf -- "$STORE"/.staging/evicted-*
  for label in "${ITEMS[@]}"; do
    name=${NAME[$label]}
    for folder in "$STORE/.staging/$name"-*/; do
      folder=${folder%/}
      [[ -d $folder && ${folder##*/"$name"-} =~ ^[0-9a-f]{64}$ ]] || continue
      [[ ${folder##*-} != "${DIGEST[$label]}" || -d $STORE/${DIGEST[$label]} ]] || continue
      (flock -n 9 && rm -rf -- "$folder") 9>"$folder.lock" || true
    done
  done
}
