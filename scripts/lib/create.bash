# A run is created once for its name. To be sourced after run.bash.
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it

CREATED=''

# same_name NAME: numbers and statuses of the runs of that name, newest first.
same_name() { awk -v n="$1" '$2 == n {print $1, $3}' <<<"$2"; }

# live_of: of such lines the oldest that lives.
live_of() {
  local number status found=''
  while read -r number status; do
    if [[ -n $number ]] && is_live "$status"; then found=$number; fi
  done <<<"$1"
  printf '%s\n' "$found"
}

# take_over FILE FOLDER: what was rendered becomes the run file of the run: only when a run is made of it.
take_over() {
  [[ $1 != "$2/run.yaml" ]] || return 0
  rm -f -- "$2/run.env"
  if [[ -f ${1/run.yaml/run.env} ]]; then mv -f -- "${1/run.yaml/run.env}" "$2/run.env"; fi
  mv -f -- "$1" "$2/run.yaml"
}

# same_work FILE FOLDER: whether the living run was made of the same; its image may have been built again.
same_work() {
  [[ ! -f $2/run.yaml ]] || cmp -s <(grep -vE '^image:|^  WMTP_IMAGE:' "$1") <(grep -vE '^image:|^  WMTP_IMAGE:' "$2/run.yaml")
}

# create_once FILE NAME FOLDER: the number of the one run of that name, in NUMBER; FOLDER/run.id keeps it, CREATED says
# whether it is new. A run that lives is not created again; an ended one only with RESUME=1.
create_once() {
  local file=$1 name=$2 folder=$3 runs known status kept try
  exec 8>"$folder/.submit.lock"
  if ! flock -n 8; then
    log "$STAGE" "another submit of $name is at work; waiting for it"
    flock -w 300 8 || die 1 "another submit of $name holds the lock for 300 s" 'one submits at a time' "see: fuser $folder/.submit.lock"
  fi
  CREATED=''
  runs=$(launcher_runs)
  known=$(same_name "$name" "$runs")
  NUMBER=$(live_of "$known")
  kept=$(cat "$folder/run.id" 2>/dev/null || true)
  # What is not in the list, but was created from here, is asked for by its number.
  if [[ -z $NUMBER && -n $kept && -z $(awk -v k="$kept" '$1 == k' <<<"$runs") ]]; then
    status=$(launcher_read "$kept" 2>/dev/null | cut -f1) || status=''
    if [[ -n $status ]]; then known="$kept $status"$'\n'"$known" NUMBER=$(live_of "$kept $status"); fi
  fi
  if [[ -n $NUMBER ]]; then
    [[ $known != *"$NUMBER stopping"* ]] || die 2 "$name: run $NUMBER is being stopped" 'an ended run can be gone on with, one that ends cannot' \
      "when make status RUN_ID=$NUMBER says terminated: make resume RUN_ID=$name"
    same_work "$file" "$folder" || die 2 "$name lives already as run $NUMBER, of other settings" 'one name is one work' \
      "another RUN_NAME; what differs: diff $file $folder/run.yaml"
    log "$STAGE" "$name lives already: run $NUMBER; nothing is created"
  else
    status=$(head -n 1 <<<"$known")
    [[ -z $status || ${RESUME:-} == 1 ]] ||
      die 2 "$name has ended: run ${status% *} is ${status#* }" 'an ended run is not started again unasked' \
        "make resume RUN_ID=$name (goes on from its checkpoints), or another RUN_NAME"
    take_over "$file" "$folder"
    CREATED=1
    launcher_create "$folder/run.yaml" "$name" || NUMBER=''
    # The service may have created it and said nothing, or said an error.
    for ((try = 1; try <= 3 && ${#NUMBER} == 0; try++)); do
      log "$STAGE" "no run address came back; looking whether $name is there ($try of 3)"
      sleep "$((try * 2))"
      runs=$(launcher_runs)
      NUMBER=$(live_of "$(same_name "$name" "$runs")")
    done
    [[ -n $NUMBER ]] || die 11 "$name was not created: $(launcher_said)" \
      'only a printed run address or the list of runs is proof' "the same command again: it looks for $name first"
    # Pressed on two machines at once: the older one stays.
    runs=$(launcher_runs)
    known=$(live_of "$(same_name "$name" "$runs")")
    if [[ -n $known && $known != "$NUMBER" ]]; then
      log "$STAGE" "run $known of this name was created meanwhile, elsewhere: $NUMBER is stopped"
      launcher_stop "$NUMBER"
      NUMBER=$known
    fi
  fi
  keep "$folder/run.id" "$NUMBER"
  exec 8>&-
}
