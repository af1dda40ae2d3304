# One child at a time that signals reach and that dies with its parent. To be sourced after common.bash.
# run_child sets `rc`; `ended_by` is 143 or 130 after a SIGTERM or SIGINT, else 0.
# shellcheck shell=bash disable=SC2034  # its variables are read by the script that sources it

child=0
signals=0
ended_by=0
reach=child # or `ranks`: the children of the child
tied=()

watch_signals() {
  tie KILL
  trap 'on_signal 143' TERM
  trap 'on_signal 130' INT
}

# Ranks get the signal themselves, not through torchrun: torchrun would kill them 30 s later, saving or not.
# It is SIGTERM in both cases: bash starts background children with SIGINT ignored.
on_signal() {
  signals=$((signals + 1)) ended_by=$1
  ((child)) || return 0
  local -a targets=()
  if [[ $reach == ranks ]]; then mapfile -t targets < <(children_of "$child"); fi
  ((${#targets[@]})) || targets=("$child")
  kill -TERM "${targets[@]}" 2>/dev/null || true
}

children_of() {
  local file
  for file in /proc/"$1"/task/*/children; do
    if [[ -r $file ]]; then tr -s ' ' '\n' <"$file"; fi
  done | grep . || true
}

# run_child COMMAND…: starts it and waits for its end.
run_child() {
  # Said by name, standard input stays: bash gives background children /dev/null.
  "${tied[@]}" "$@" <&0 &
  await_child "$!"
}

# await_child PID: waits for its end, however often a signal interrupts the wait.
await_child() {
  local again seen waited=0
  child=$1
  # A signal that came before there was a child, or before its ranks were meant.
  ((ended_by == 0)) || on_signal "$ended_by"
  while
    seen=$signals again=0
    wait "$child" || again=$?
    # A second wait for what has been waited for gives 127.
    ((again == 127 && waited)) || rc=$again
    waited=1
    ((signals != seen))
  do :; done
  child=0
}
