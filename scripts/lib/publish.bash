# What the bucket has under one name, and what there is to do. Sourced by publish_models.sh only, whose are the
# variables that name the folder and its place.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # what it sets and reads is shared with the script that sources it

prove() { proving wmtp.publish "$1" "$WORK" "$FROM/$NAME" "$PREFIX" --part-mb "$PART_MB" "${@:2}"; }

# Both die with this shell: what still removes or lists is another publisher's trouble.
client() {
  bounded 300 "$S5CMD" --json --retry-count 3 "$@" 2>"$WORK/said"
}

client_said() { sed -nE 's/.*"error":"(.*)"\}?$/\1/p' "$WORK/${1:-said}" | tr -s '\n' ' ' | cut -c1-300; }

# list: what the bucket holds under the name, into WORK/objects. Where it does not, one small request names the reason.
list() {
  client ls "$PREFIX/*" >"$WORK/objects" && return 0
  ! grep -q 'no object found' "$WORK/said" || return 0
  fetch_manifest "$NAME/.alive" "$WORK/alive" || true
  die 11 "$PREFIX can't be listed: $(client_said)" 'a listing proves what stands there' 'may this key list it? then again'
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

remove_unnamed() {
  [[ -s $WORK/remove ]] || return 0
  act client run "$WORK/remove" >/dev/null ||
    die 12 "$NAME: old objects can't be removed: $(client_said)" 'nothing stands beside a manifest that it does not name' 'again'
  log publish "$NAME: $(wc -l <"$WORK/remove") objects that the new manifest does not name removed"
}
