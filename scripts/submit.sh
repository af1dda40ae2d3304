#!/usr/bin/env bash
# Usage: ENV=production ALGO=critic-wmtp scripts/submit.sh
# Renders the run file (production: where a dry run of the same revision and settings has passed), asks (production, on a
# terminal), and creates the run unless one of its name lives: pressing twice, here or on two machines, starts one run.
#   RUN_NAME    another name is another run        RESUME=1   goes on with a run of that name that has ended
#   LAUNCHER    vessl (default) or docker          MAX_HOURS  the run saves and ends after so many hours
#   CONFIG, RECIPE, SET="key=value …"   as everywhere          DRY_RUN=1   prints what it would do
#   ALLOW="key …"   keys of the recipe in which the run may differ from the checkpoint that it goes on from
# Standard output: the run's number. Files: build/ENV/RUN/run.yaml, run.id.
# Exit codes: 0 done, 2 bad input or an ended run, 3 tool or credential, 11 the service does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=submit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"
# shellcheck source=scripts/lib/run.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/run.bash"
# shellcheck source=scripts/lib/create.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/create.bash"

# pushed_image: the digest that push kept, of this revision.
pushed_image() {
  local file=$ROOT/build/$ENV/image.digest pushed named
  IMAGE=$(cat "$file" 2>/dev/null || true)
  # A deploy that is rehearsed would have pushed one by now: which one is here says nothing.
  [[ -z ${WMTP_REFUSED:-} ]] || IMAGE=''
  if [[ -z $IMAGE ]]; then
    [[ -n ${WMTP_REFUSED:-} ]] || refuse 2 "no image was pushed for ENV=$ENV" 'a run names its image by digest' "make build push ENV=$ENV"
    IMAGE=$(python -m wmtp.config --config "$CONFIG" --get launcher.image)
    IMAGE=${IMAGE%:*}@sha256:$(printf '0%.0s' {1..64})
    return 0
  fi
  named=$(python -m wmtp.config "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --get launcher.image) || exit 2
  [[ ${named##*/} != *:* ]] || named=${named%:*}
  [[ ${IMAGE%@*} == "$named" ]] ||
    refuse 2 "the pushed image is ${IMAGE%@*}, launcher.image names $named" 'a run has the image that its settings name' "make build push ENV=$ENV"
  pushed=$(cat "$ROOT/build/$ENV/image.revision" 2>/dev/null || true)
  [[ $ENV != production || $pushed != *-dirty ]] ||
    refuse 2 "the pushed image $pushed has changes that no commit has" 'production runs a commit' 'git commit, then: make build push ENV=production'
  [[ ${pushed%-dirty} == "$(revision)" ]] ||
    refuse 2 "the pushed image is of ${pushed:-?}, this tree is $(revision)" 'a run and its image are of one revision' "make build push ENV=$ENV"
}

ask() {
  [[ $ENV == production && ${DRY_RUN:-} != 1 && -t 0 && -t 2 ]] || return 0
  local answer
  read -r -p 'submit    go on? [y/N] ' answer || answer=''
  [[ $answer == [yY]* ]] || die 2 'not submitted' 'you were asked' 'the same command again'
}

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local cluster preset known
  local -a render=()
  need_cmd python
  need_env ENV ALGO
  cd "$ROOT"
  render+=(${CONFIG:+--named CONFIG} ${RECIPE:+--named RECIPE})
  LAUNCHER=${LAUNCHER:-vessl}
  choose_settings "$ENV" "$ALGO"
  overrides
  use_launcher "$LAUNCHER"
  pushed_image
  name_run
  # This process's own: two may be at it at once. It becomes run.yaml when a run is made of it.
  local file=$RUN_DIR/.run.yaml.$$
  [[ $LAUNCHER != docker ]] || render+=(--env-file "$RUN_DIR/.run.env.$$")
  mkdir -p "$RUN_DIR" 2>/dev/null || die 10 "$RUN_DIR can't be written" 'a stage hands its results on there' 'make it writable'
  render+=("${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --run-name "$NAME" --image "$IMAGE" --revision "$(revision)")
  if [[ $ENV == production && ${DRY_RUN:-} != 1 ]]; then
    render+=(--receipt "$RUN_DIR/preflight.json")
  elif [[ $ENV == production && ! -e $RUN_DIR/preflight.json ]]; then
    refuse 2 "no dry run of $NAME is here" 'production is submitted where one has passed' "make dryrun ENV=$ENV ALGO=$ALGO"
  fi
  log submit "$NAME"
  if ! python -m wmtp.runfile "${render[@]}" --output "$file" >"$RUN_DIR/.summary.$$"; then
    rm -f -- "$RUN_DIR/.summary.$$"
    [[ ${DRY_RUN:-} == 1 ]] || exit 2
    refuse 2 'the run file can'"'"'t be made (lines above)'
    return 0
  fi
  sed -E 's/@sha256:0{64}/& (placeholder: a push makes the digest)/; s/^/submit    /' "$RUN_DIR/.summary.$$" >&2
  rm -f -- "$RUN_DIR/.summary.$$"
  launcher_open
  if [[ ${DRY_RUN:-} == 1 ]]; then
    log submit "would run: unless a run named $NAME lives: $(launcher_command "$file")"
    rm -f -- "$file" "${file/run.yaml/run.env}"
    return 0
  fi
  ask
  known=$(python -m wmtp.config "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --get launcher.cluster launcher.preset)
  { read -r cluster && read -r preset; } <<<"$known"
  launcher_check "$cluster" "$preset"
  create_once "$file" "$NAME" "$RUN_DIR"
  rm -f -- "$file" "${file/run.yaml/run.env}"
  ln -sfn "$NAME" "build/$ENV/latest"
  log submit "ok: run $NUMBER. make logs RUN_ID=$NUMBER · make stop RUN_ID=$NUMBER"
  printf '%s\n' "$NUMBER"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
