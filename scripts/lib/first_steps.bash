# Deploy's last stages: follow and report, and how a rehearsal ends. Sourced by deploy.sh only.
# shellcheck shell=bash disable=SC2154  # what it reads is set by the script that sources it

# follow: until the tenth step (or the last, where there are fewer), or the first failure.
follow() {
  local before='' line number total quiet=$SECONDS
  local -a tail=()
  NUMBER=$1
  while true; do
    ((ended_by == 0)) || die "$ended_by" "interrupted; run $NUMBER goes on" 'following is only looking' "make logs RUN_ID=$NUMBER FOLLOW=1"
    poll
    if [[ $STATUS != "$before" ]]; then log deploy "run $NUMBER is $STATUS${REASON:+: $REASON}, $((SECONDS - $2)) s"; fi
    if [[ $STATUS != "$before" ]] || ((${#FRESH[@]})); then quiet=$SECONDS; fi
    before=$STATUS
    for line in "${FRESH[@]}"; do
      tail+=("$line")
      [[ $line =~ Step\ ([0-9]+)/([0-9]+) ]] || continue
      number=${BASH_REMATCH[1]} total=${BASH_REMATCH[2]} step=${line#*Step }
      if ((number >= 10 || number == total)); then return 0; fi
    done
    if ((${#FRESH[@]})); then log deploy "${FRESH[-1]:0:100}"; fi
    if ((misses == 0)) && ! is_live "$STATUS"; then
      [[ $STATUS != completed ]] || return 0
      if ((${#tail[@]})); then printf '%s\n' "${tail[@]: -$((${#tail[@]} < 10 ? ${#tail[@]} : 10))}" >&2; fi
      line=$(code_of "${tail[@]}")
      die "${line:-1}" "run $NUMBER is $STATUS before its tenth step${REASON:+: $REASON}" 'a run is followed until it trains' \
        "make logs RUN_ID=$NUMBER; mend it, then: $(again) RESUME=1"
    fi
    ((SECONDS - quiet < ${STALL_S:-1800})) || die 11 "run $NUMBER is $STATUS and has written nothing for $((SECONDS - quiet)) s" \
      'a run says something every few minutes; it still lives and costs' "make logs RUN_ID=$NUMBER, make stop RUN_ID=$NUMBER"
    sleep "${POLL_S:-10}" &
    wait $! || true
  done
}

# The facts of this deploy; what the run itself records is beside its checkpoints.
report() {
  local index
  {
    printf '# %s\n\n| what | value |\n| --- | --- |\n' "$NAME"
    printf '| run | %s (%s) |\n| image | %s |\n' "$NUMBER" "$LAUNCHER" "$(sed -n 's/^image: //p' "$RUN_DIR/run.yaml")"
    printf '| configuration | %s |\n| recipe | %s |\n| settings | %s |\n' "$CONFIG" "$RECIPE" "${SET:-none}"
    # shellcheck disable=SC2016 # the ticks are Markdown's
    printf '| first steps | Step %s |\n| again | `%s` |\n\n| stage | seconds |\n| --- | --- |\n' "${step:-none seen}" "$(again)"
    for index in "${!took[@]}"; do printf '| %s | %s |\n' "${STAGES[index]}" "${took[index]}"; done
  } >"$RUN_DIR/.report.md"
  mv -f -- "$RUN_DIR/.report.md" "$RUN_DIR/report.md"
}

# rehearsed: what a rehearsal found, once each, and what the run would take at most.
rehearsed() {
  local gpus kind hours
  { read -r gpus && read -r kind && read -r hours; } < <(python -m wmtp.config "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" \
    --get launcher.resources.gpus launcher.resources.gpu_type launcher.max_hours)
  hours=${MAX_HOURS:-$hours}
  log "5/${#STAGES[@]}" 'follow    would follow: the log to its tenth step'
  log "6/${#STAGES[@]}" "report    would follow: ${RUN_DIR#"$ROOT/"}/report.md"
  log deploy "nothing was changed; the run would be on $gpus x ${kind:-no GPU}, $(
    if [[ -n $hours ]]; then awk -v g="$gpus" -v h="$hours" 'BEGIN {printf "for %g h at most: %g GPU-hours", h, g * h}'; else printf 'without a limit (MAX_HOURS=…)'; fi
  )"
  if [[ -s $WMTP_REFUSED ]]; then
    log deploy "what would refuse it ($(sort -u "$WMTP_REFUSED" | wc -l)):"
    awk '!seen[$0]++ {print "          - " $0}' "$WMTP_REFUSED" >&2
  fi
  log deploy "To do it: $(again)"
}
