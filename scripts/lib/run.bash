# One run by its name: its folder, its number. To be sourced after common.bash, settings.bash.
# A launcher is a file launcher_NAME.bash with launcher_open, launcher_check, launcher_runs, launcher_create, launcher_read,
# launcher_logs, launcher_stop: what a stage says to a cluster goes through these.
# shellcheck shell=bash disable=SC2034,SC2153  # what it sets and reads is shared with the script that sources it

NUMBER='' NAME='' RUN_DIR='' LOCAL_RUN=''

# is_live STATUS: whatever has not ended lives, also under a status that is new to us; no status is no answer.
is_live() { [[ -n $1 && $1 != completed && $1 != failed && $1 != terminated ]]; }

use_launcher() {
  case $1 in
    vessl)
      # shellcheck source=scripts/lib/launcher_vessl.bash
      source "$ROOT/scripts/lib/launcher_vessl.bash"
      ;;
    docker)
      # shellcheck source=scripts/lib/launcher_docker.bash
      source "$ROOT/scripts/lib/launcher_docker.bash"
      ;;
    *) die 2 "LAUNCHER=$1: its runs end with their command" 'vessl and docker have runs of their own' 'make minitest, or LAUNCHER=vessl' ;;
  esac
}

# keep FILE TEXT: whole or not at all.
keep() { printf '%s\n' "$2" >"$(dirname "$1")/.$(basename "$1").$$" && mv -f -- "$(dirname "$1")/.$(basename "$1").$$" "$1"; }

# name_run: NAME and RUN_DIR of what ENV, ALGO and the settings say.
name_run() {
  local digest
  digest=$(python -m wmtp.config "${SETTINGS[@]}" "${OVERRIDES[@]}" --env "$ENV" --get digest) || exit 2
  NAME=${RUN_NAME:-$ENV-$ALGO-$(revision)-$digest}
  [[ $NAME =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$ ]] ||
    die 2 "RUN_NAME=$NAME" 'letters, digits, ".", "_" and "-"; it names folders in the bucket' 'choose another RUN_NAME'
  [[ $NAME != latest && ! $NAME =~ ^[0-9]+$ ]] || die 2 "RUN_NAME=$NAME" 'not a number, and not "latest": both name runs already' 'choose another RUN_NAME'
  RUN_DIR=$ROOT/build/$ENV/$NAME
}

# The newest of what it holds, in seconds; nothing where there is no such folder, or it is empty.
newest_in() { find "$1" -maxdepth 1 -type f ! -name '.*' -printf '%T@\n' 2>/dev/null | sort -rn | head -n 1 || true; }

# local_records [NAME]: `seconds<TAB>folder` of the runs that this machine made itself, newest first.
local_records() {
  local folder at
  for folder in ${WMTP_APP_ROOT:+"$WMTP_APP_ROOT"/logs/${1:-*}} "$ROOT"/build/${ENV:-*}/app/logs/${1:-*} \
    "$ROOT"/build/${ENV:-*}/${1:-*}/app/logs/${1:-*}; do
    [[ -d $folder && ! -L ${folder%/app/logs/*} ]] || continue
    at=$(newest_in "$folder")
    if [[ -n $at ]]; then printf '%s\t%s\n' "$at" "$folder"; fi
  done | sort -rn
}

# known_runs: names of the newest runs of this checkout, of whichever ENV.
known_runs() {
  { ENV='' local_records | cut -f2 && find "$ROOT"/build -mindepth 3 -maxdepth 3 -name run.id -printf '%h\n' 2>/dev/null; } | sed 's#.*/##' |
    awk '!seen[$0]++' | head -n 5 | paste -sd ' ' | grep . || printf 'none\n'
}

# no_run RULE [MORE]: ends the stage, with what named the run (make compare: RUNS), and the runs that there are.
no_run() {
  local named="RUN_ID=${RUN_ID:-}: no such run"
  [[ $STAGE != compare ]] || named="RUNS=\"$RUNS\": no run ${RUN_ID:-}"
  die 2 "$named" "$1" "here: $(known_runs)${2:-}"
}

# local_state: STATUS and REASON of the run in LOCAL_RUN, in the words of its page.
local_state() {
  need_cmd python
  IFS=$'\t' read -r STATUS REASON < <(python -c 'import pathlib, sys
from wmtp import vitals
folder = pathlib.Path(sys.argv[1])
state = vitals.standing(vitals.read(folder.name, "local", record=folder))
print(state.word, state.why, sep="\t")' "$LOCAL_RUN") || STATUS='not known' REASON=''
}

# not_submitted: ends a stage for which a run of this machine is none.
not_submitted() {
  local algo next="make monitor RUN_ID=$NAME, make logs RUN_ID=$NAME"
  local_state
  algo=$(sed -nE 's/^ *"algo": "([a-z0-9-]+)".*/\1/p; s/.*[{,] *"algo": "([a-z0-9-]+)".*/\1/p' "$LOCAL_RUN/facts.json" 2>/dev/null | head -n 1 || true)
  case $STATUS in
    completed) ;;
    running) next+='; Ctrl-C where it runs ends it, saved' ;;
    *) next+="; to go on: make $([[ $LOCAL_RUN == */minitest/app/* ]] && echo minitest || echo train)${algo:+ ALGO=$algo} RUN_NAME=$NAME" ;;
  esac
  die 2 "$NAME is a run of this machine: $STATUS${REASON:+, $REASON}" \
    'it begins and ends with its command; a run that was submitted is stopped, resumed and watched' "$next"
}

# find_run [here]: the run that RUN_ID says (a name or a number), or the newest that this checkout submitted; sets NUMBER, NAME,
# RUN_DIR, and opens its launcher. Where none was submitted, it is one of this machine: with `here` LOCAL_RUN is the folder of
# its record, without it that is refused.
find_run() {
  local wanted=${RUN_ID:-} file launcher=${LAUNCHER:-}
  local -a files=()
  mapfile -t files < <(cd "$ROOT" && { ls -t build/*/*/run.id 2>/dev/null || true; })
  [[ -z $wanted || $wanted =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$ ]] || no_run 'a run is named by its name or number'
  for file in "${files[@]}"; do
    [[ $file != */latest/run.id && (-z ${ENV:-} || $file == "build/$ENV/"*) ]] || continue
    NUMBER=$(<"$ROOT/$file") RUN_DIR=$ROOT/${file%/run.id}
    NAME=${RUN_DIR##*/}
    [[ -n $wanted && $wanted != "$NAME" && $wanted != "$NUMBER" ]] || break
    NUMBER='' NAME='' RUN_DIR=''
  done
  if [[ -n $RUN_DIR && -z $launcher ]]; then
    launcher=vessl
    [[ ! -f $RUN_DIR/run.env ]] || launcher=docker
  fi
  if [[ -z $NUMBER && ${launcher:-local} == local ]] && IFS=$'\t' read -r _ file < <(local_records "$wanted"); then
    LOCAL_RUN=$file NAME=${file##*/}
    [[ ${1:-} == here ]] || not_submitted
    return 0
  fi
  use_launcher "${launcher:-vessl}"
  if [[ -z $NUMBER ]]; then
    [[ -n $wanted ]] || die 2 'no run was submitted from this checkout' 'RUN_ID names a run by its name or number' 'make status RUN_ID=…'
    launcher_open
    local runs
    runs=$(launcher_runs)
    read -r NUMBER NAME _ <<<"$(awk -v w="$wanted" '$1 == w || $2 == w {print; exit}' <<<"$runs")" || true
    [[ -n $NUMBER ]] || no_run "neither this checkout nor $(launcher_name) knows it"
    file=$(compgen -G "$ROOT/build/${ENV:-*}/$NAME" | head -n 1 || true) # elsewhere submitted, or its number was lost
    RUN_DIR=${file:-}
  else
    launcher_open
  fi
}
