#!/usr/bin/env bash
# Usage: ENV=production ALGO=critic-wmtp scripts/deploy.sh      (make deploy)
# Dry run, build, push, submit, follow to the tenth step, report. It may be interrupted and repeated at any point: what is
# done is seen as done, and one run comes of it. One deploy of an ENV at a time.
#   LAUNCHER   vessl (default) or docker       REGISTRY_TOKEN   logs the push in      DRY_RUN=1  tells what it would do, does nothing
#   POLL_S     seconds between two looks at the run (default 10)     STALL_S  seconds without a new log line (default 1800)
#   and what its stages read: RUN_NAME RESUME CONFIG RECIPE SET ALLOW MAX_HOURS BASE_IMAGE IMAGE_PYTHON TORCH_BACKEND
#   PIP_FIND_LINKS REGISTRY_USER VESSL_*
# Standard output: the run's number. Files: build/ENV/RUN/report.md, run.yaml, run.id.
# Exit codes: those of its stages; 1 or the run's own code when the run fails before its tenth step.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=deploy
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/follow.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/follow.bash"
# shellcheck source=scripts/lib/first_steps.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/first_steps.bash"
# shellcheck source=scripts/lib/children.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/children.bash"

STAGES=('dry run' build push submit follow report)
# What the caller may have set, for the command that goes on.
ASKED=(LAUNCHER RUN_NAME RESUME CONFIG RECIPE SET ALLOW MAX_HOURS BASE_IMAGE IMAGE_PYTHON TORCH_BACKEND PIP_FIND_LINKS REGISTRY_USER)
rc=0
took=()
detail=()
step='' refused=0

# again: the command that goes on.
again() {
  local name said="make deploy ENV=$ENV ALGO=$ALGO"
  for name in "${ASKED[@]}"; do
    if [[ -n ${asked[$name]:-} ]]; then said+=" $name=$(printf '%q' "${asked[$name]}")"; fi
  done
  printf '%s\n' "$said"
}

leave() {
  ((ended_by == 0)) || die "$ended_by" "interrupted at ${STAGES[$1]}" 'what is done is kept' "$(again)"
  die "$2" "${STAGES[$1]} ended with $2" 'a stage starts only when the one before it is done' "mend it, then: $(again)"
}

told() {
  local verdict=ok
  if [[ -n ${WMTP_REFUSED:-} ]] && (($(wc -l <"$WMTP_REFUSED") > refused)); then
    verdict=refuses refused=$(wc -l <"$WMTP_REFUSED")
  fi
  log "$(($1 + 1))/${#STAGES[@]}" "$(printf '%-9s %s %5s s   %s' "${STAGES[$1]}" "$verdict" "${took[$1]}" "${detail[$1]}")"
}

# stage INDEX COMMAND…: one stage as a child; its standard output is the artifact, in OUT.
stage() {
  local index=$1 began=$SECONDS
  shift
  rc=0
  run_child "$@" >"$HERE/.out" 9>&-
  ((rc == 0 && ended_by == 0)) || leave "$index" "$rc"
  OUT=$(tail -n 1 "$HERE/.out")
  took[index]=$((SECONDS - began))
}

# Its findings are told when there are any; the whole of it is in dryrun.log.
dry_run() {
  local said
  rc=0
  run_child env DRY_RUN= "$ROOT/scripts/test_vessl_config.sh" >"$HERE/dryrun.log" 2>&1 9>&-
  if ((rc || ended_by)); then
    grep -E -A2 'FAIL' "$HERE/dryrun.log" >&2 || cat "$HERE/dryrun.log" >&2
    if [[ ${DRY_RUN:-} != 1 ]] || ((ended_by)); then leave 0 "$rc"; fi
    refuse "$rc" "the dry run ended with $rc: $(grep -c 'FAIL  ' "$HERE/dryrun.log" || true) FAIL"
  fi
  grep -E '^ *(warn|not checked)' "$HERE/dryrun.log" >&2 || true
  said=$(grep -oE '[0-9]+ ok, .* FAIL' "$HERE/dryrun.log" | tail -n 1 || true)
  took[0]=$((SECONDS - $1)) detail[0]="$said; $HERE/dryrun.log"
}

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local began=$SECONDS name
  local -A asked=()
  for name in "${ASKED[@]}"; do asked[$name]=${!name:-}; done
  [[ -n ${ENV:-} && -n ${ALGO:-} ]] || die 2 "$([[ -n ${ENV:-} ]] && echo ALGO || echo ENV) is not set" 'a deploy names both' \
    'make deploy ENV=production ALGO=critic-wmtp'
  [[ ${STALL_S:-1} =~ ^[0-9]{1,6}$ ]] || die 2 "STALL_S=$STALL_S" 'whole seconds without a new log line' 'STALL_S=1800'
  need_cmd python
  cd "$ROOT"
  export LAUNCHER=${LAUNCHER:-vessl} ENV ALGO
  choose_settings "$ENV" "$ALGO"
  [[ $LAUNCHER != local ]] || die 2 "LAUNCHER=local: nothing is deployed to this machine itself" 'vessl or docker' "make $ENV"
  overrides
  name_run
  export -n REGISTRY_TOKEN 2>/dev/null || true
  HERE=build/$ENV
  mkdir -p "$HERE" 2>/dev/null || die 10 "$HERE can't be written" 'a stage hands its results on there' 'make it writable'
  hold "$HERE/.deploy.lock" "another deploy of $ENV is at work" 'one at a time deploys an ENV' "$ALGO"
  watch_signals
  if [[ ${DRY_RUN:-} == 1 ]]; then
    export WMTP_REFUSED=$ROOT/$HERE/.refused
    : >"$WMTP_REFUSED"
  fi
  log deploy "$ENV, $ALGO -> run $NAME on $LAUNCHER"
  # What the last stages need is known now, not after a build.
  use_launcher "$LAUNCHER"
  launcher_open
  if [[ -n ${WMTP_REFUSED:-} ]]; then refused=$(wc -l <"$WMTP_REFUSED"); fi
  dry_run "$SECONDS"
  told 0
  stage 1 "$ROOT/scripts/build.sh"
  detail[1]=$OUT
  told 1
  if filled REGISTRY_TOKEN; then stage 2 "$ROOT/scripts/push.sh" <<<"$REGISTRY_TOKEN"; else stage 2 "$ROOT/scripts/push.sh" </dev/null; fi
  detail[2]=${OUT#*@}
  told 2
  stage 3 "$ROOT/scripts/submit.sh"
  detail[3]=${OUT:+run $OUT}
  if [[ ${DRY_RUN:-} == 1 ]]; then
    told 3
    rehearsed
    return 0
  fi
  told 3
  local mark=$SECONDS
  follow "$OUT" "$SECONDS"
  took[4]=$((SECONDS - mark)) detail[4]="Step ${step:-none seen}"
  told 4
  mark=$SECONDS
  report
  took[5]=$((SECONDS - mark)) detail[5]=${RUN_DIR#"$ROOT/"}/report.md
  told 5
  log deploy "it runs, $((SECONDS - began)) s. make logs RUN_ID=$NUMBER · make status RUN_ID=$NUMBER · make stop RUN_ID=$NUMBER"
  printf '%s\n' "$NUMBER"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
