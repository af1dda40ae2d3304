# A run's state and log, asked for again and again. To be sourced after run.bash.
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it

# The log as it grows: fresh_lines puts what is new since the last call into the array FRESH; 1 when the service did not
# answer, which a follower bears a few times.
FRESH=()
seen_line=''
fresh_lines() {
  local text i from=0
  local -a lines
  FRESH=()
  text=$(launcher_logs "$NUMBER" "${1:-1000}" 2>/dev/null) || return 1
  [[ -n $text ]] || return 0
  mapfile -t lines <<<"$text"
  if [[ -n $seen_line ]]; then
    for ((i = ${#lines[@]} - 1; i >= 0; i--)); do
      if [[ ${lines[i]} == "$seen_line" ]]; then
        from=$((i + 1))
        break
      fi
    done
  fi
  FRESH=("${lines[@]:from}")
  seen_line=${lines[-1]}
}

[[ ${POLL_S:-1} =~ ^[0-9]{1,5}(\.[0-9]+)?$ ]] || die 2 "POLL_S=$POLL_S" 'seconds between two looks, a number' 'POLL_S=10'

# state_of: STATUS and REASON of the run; the last known ones when the service does not answer.
STATUS='' REASON=''
state_of() {
  local text
  text=$(launcher_read "$NUMBER" 2>/dev/null) || return 1
  local title
  IFS=$'\t' read -r STATUS title REASON <<<"$text"
  [[ -z $title || -z $NAME || $title == "$NAME" ]] || die 2 "run $NUMBER is $title, not $NAME" \
    "a number is a run of one project; the one that is asked now is another" 'set VESSL_DEFAULT_ORGANIZATION and VESSL_DEFAULT_PROJECT as at its submission'
}

# poll: state and fresh lines, bearing up to five calls in a row that were not answered.
misses=0
poll() {
  if state_of && fresh_lines; then
    misses=0
  else
    misses=$((misses + 1))
    log "$STAGE" "$(launcher_name) did not answer ($misses of 5)"
    if ((misses == 5)); then
      # Once more, heard: what the service refuses for good (a token that has expired, a run that is gone) says so itself.
      launcher_read "$NUMBER" >/dev/null
      launcher_logs "$NUMBER" 1 >/dev/null
      die 11 "$(launcher_name) did not answer 5 times in a row" 'run and log are asked for again and again' \
        "the run itself goes on; the same command again, or make status RUN_ID=$NUMBER"
    fi
  fi
}

# known_state: polls until the service has answered.
known_state() {
  while poll && ((misses)); do sleep "${POLL_S:-2}"; done
}

# code_of LINE…: the code with which the startup script ended, from its last words; empty where it did not say.
code_of() { printf '%s\n' "$@" | sed -nE 's/.*(FAIL  |stopped: ).* ended with ([0-9]+) after.*/\2/p' | tail -n 1; }
