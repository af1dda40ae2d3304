#!/usr/bin/env bash
# Usage: scripts/test_image.sh [--long] [FILE.bats…]      (make test-image)
# The way to the cluster on real parts: two container engines, a registry with a login, the client of VESSL against a stub of
# its API, an embedded bucket. As root on Debian or Ubuntu it installs what is missing and starts it all for itself alone, and
# leaves no process and no mount; elsewhere it is skipped, with the reason. What is marked `long` is left to make soak, which
# says --long; of FILEs all is done.
# Standard output: TAP, then `N passed, N failed`. Kept between runs: build/test-image/ (the first engine's layers).
# Exit codes: 0 passed or skipped, 1 not, 3 something can't be installed, 11 an engine or the registry does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=image
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

# shellcheck source=scripts/lib/engines.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/engines.bash"

HERE=$ROOT/build/test-image
TEMP=''
PIDS=() SUITES=() LONG=0

skip() {
  log image "skipped: $1"
  echo '0 passed, 0 failed, 1 skipped'
  exit 0
}

cleanup() {
  local pid i mount
  trap - EXIT
  trap '' TERM INT # a second one leaves no mount behind
  for pid in "${SUITES[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  if [[ -S $TEMP/a.sock ]]; then
    docker ps -aq 2>/dev/null | xargs -r docker rm -fv >/dev/null 2>&1 || true
  fi
  for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${PIDS[@]}"; do
    for ((i = 0; i < 150; i++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
  while read -r _ mount _; do
    if [[ $mount == "$TEMP"/* || $mount == "$HERE"/* ]]; then umount -l "$mount" 2>/dev/null || true; fi
  done < <(tac /proc/mounts)
  rm -rf -- "${TEMP:?}"
}

# run_suites [FILE…]: all of them in two groups side by side, as long as each other: what waits for engine and ranks, and what
# waits for the client, which takes 1.5 s of one core a call.
run_suites() {
  local -a groups=('bats/cluster/container.bats bats/cluster/image.bats bats/cluster/submit.bats' 'bats/cluster/deploy.bats bats/cluster/day.bats bats/cluster/runs.bats')
  local -a suite=() filter=(--filter-tags '!long')
  local i rc=0
  if (($#)); then groups=("$*") filter=(); fi
  if ((LONG)); then filter=(--filter-tags long); fi
  rm -f "$HERE"/bats.*.log
  # Built once, so that the groups find its layers.
  ENV=minitest SET="launcher.image=$WMTP_REGISTRY/team/wmtp:latest" DOCKER_BUILDKIT=0 scripts/build.sh >/dev/null 9>&- || return
  for i in "${!groups[@]}"; do
    read -ra suite <<<"${groups[i]}"
    : >"$HERE/bats.$i.log" # there before anybody follows it
    setsid setpriv --pdeathsig TERM bats --tap --timing "${filter[@]}" "${suite[@]}" </dev/null >"$HERE/bats.$i.log" 2>&1 9>&- &
    SUITES+=("$!")
  done
  tail -q -n +1 -F --pid="$$" "$HERE"/bats.*.log 2>/dev/null 9>&- &
  PIDS+=("$!")
  for i in "${SUITES[@]}"; do wait "$i" || rc=1; done
  SUITES=()
  sleep 1 # the last lines are still on their way
  return "$rc"
}

main() {
  local -a given=("$@")
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
    --long) LONG=1 && shift ;;
  esac
  cd "$ROOT"
  local -a files=("$@")
  # shellcheck source=/dev/null
  if [[ -r /etc/os-release ]]; then source /etc/os-release; fi
  ((EUID == 0)) || skip 'not root: the engines are private ones (sudo make test-image)'
  [[ ${ID:-} == debian || ${ID:-} == ubuntu ]] || skip "${ID:-this system} is neither Debian nor Ubuntu: their packages bring engine and registry"
  need_cmd python
  if [[ -z ${S3_ENDPOINT_URL:-} ]]; then
    exec scripts/bucket.sh run build/test-image/bucket -- "$ROOT/scripts/test_image.sh" "${given[@]}"
  fi
  local began=$SECONDS rc=0 passed failed
  export PATH=$PATH:/usr/sbin:/sbin
  mkdir -p "$HERE"
  exec 9>"$HERE/.lock"
  flock -n 9 || die 1 'another test-image is at work in this checkout' 'one at a time' 'wait for it'
  install_missing
  TEMP=$(mktemp -d "${TMPDIR:-/tmp}/wmtp-image.XXXXXX")
  trap cleanup EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  unset DOCKER_CONTEXT DOCKER_CONFIG DOCKER_TLS_VERIFY
  export WMTP_ENGINE_A=unix://$TEMP/a.sock WMTP_ENGINE_B=unix://$TEMP/b.sock DOCKER_HOST=unix://$TEMP/a.sock
  start_engine a "$HERE/a" 9>&-
  start_engine b "$TEMP/b.data" 9>&-
  start_registry 9>&-
  make_base
  log image "engines, registry $WMTP_REGISTRY, base with Python $IMAGE_PYTHON: ready after $((SECONDS - began)) s"
  run_suites "${files[@]}" || rc=1
  passed=$(cat "$HERE"/bats.*.log | grep -c '^ok ' || true) failed=$(cat "$HERE"/bats.*.log | grep -c '^not ok ' || true)
  if ((rc && failed == 0)); then failed=1; fi
  log image "$((SECONDS - began)) s"
  echo "$passed passed, $failed failed"
  return "$rc"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
