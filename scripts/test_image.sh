#!/usr/bin/env bash
# Usage: scripts/test_image.sh [FILE.bats…]      (make test-image)
# The way to the cluster on real parts: two container engines, a registry with a login, the client of VESSL against a stub of
# its API, an embedded bucket. As root on Debian or Ubuntu it installs what is missing and starts it all for itself alone, and
# leaves no process and no mount; elsewhere it is skipped, with the reason.
# Standard output: TAP, then `N passed, N failed`. Kept between runs: build/test-image/ (the first engine's layers).
# Exit codes: 0 passed or skipped, 1 not, 3 something can't be installed, 11 an engine or the registry does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=image
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

HERE=$ROOT/build/test-image
TEMP=''
PIDS=()

skip() {
  log image "skipped: $1"
  echo '0 passed, 0 failed, 1 skipped'
  exit 0
}

install_missing() {
  local pair
  local -a missing=()
  for pair in dockerd:docker.io docker:docker.io docker-registry:docker-registry htpasswd:apache2-utils mmdebstrap:mmdebstrap; do
    # dockerd lives in sbin.
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  ((${#missing[@]})) || return 0
  log image "installing ${missing[*]}"
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  # Started by this script only: the packages' own services stay down.
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$HERE/apt.log" 2>&1 || die 3 "${missing[*]} could not be installed" 'engine and registry are real here' "read $HERE/apt.log"
}

# start_engine NAME DATA: on a socket of its own, without touching the machine's network.
start_engine() {
  local i
  mkdir -p "$2"
  # What a kill -9 of an earlier run left behind is no engine.
  rm -f "$TEMP/$1.pid"
  setsid setpriv --pdeathsig TERM dockerd --host "unix://$TEMP/$1.sock" --data-root "$2" --exec-root "$TEMP/$1.exec" \
    --pidfile "$TEMP/$1.pid" --iptables=false --ip6tables=false --ip-forward=false --bridge=none \
    </dev/null >"$HERE/$1.log" 2>&1 &
  PIDS+=("$!")
  for ((i = 0; i < 150; i++)); do
    if docker -H "unix://$TEMP/$1.sock" version >/dev/null 2>&1; then return 0; fi
    sleep 0.2
  done
  die 11 "engine $1 does not answer" 'a private dockerd starts within 30 s' "read $HERE/$1.log"
}

start_registry() {
  local port i
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  REGISTRY_TOKEN=$(python -c 'import secrets; print("canary-" + secrets.token_hex(12))')
  export WMTP_REGISTRY=127.0.0.1:$port REGISTRY_TOKEN
  htpasswd -iBn team <<<"$REGISTRY_TOKEN" >"$TEMP/htpasswd" 2>/dev/null
  # Kept with the first engine's layers: a layer that this registry has is not sent again.
  cat >"$TEMP/registry.yml" <<YAML
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $TEMP/registry}, delete: {enabled: true}}
http: {addr: "$WMTP_REGISTRY"}
auth: {htpasswd: {realm: wmtp, path: $TEMP/htpasswd}}
YAML
  setsid setpriv --pdeathsig KILL docker-registry serve "$TEMP/registry.yml" </dev/null >"$HERE/registry.log" 2>&1 &
  PIDS+=("$!")
  for ((i = 0; i < 100; i++)); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return 0; fi
    sleep 0.1
  done
  die 11 'the registry does not answer' 'it starts within 10 s' "read $HERE/registry.log"
}

# A base like the CUDA image's, but for CUDA: this system's own release with Python and tini.
make_base() {
  export BASE_IMAGE=localhost/wmtp-test-base:latest IMAGE_PYTHON
  if ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
    log image "the base image, from packages of $ID $VERSION_CODENAME"
    local components=main
    if [[ $ID == ubuntu ]]; then components=main,universe; fi
    mmdebstrap -q --variant=minbase --components="$components" --include=python3,ca-certificates,bash,tini \
      --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin' "$VERSION_CODENAME" - \
      2>"$HERE/base.log" | docker import - "$BASE_IMAGE" >/dev/null ||
      die 3 'the base image could not be made' "packages of $VERSION_CODENAME" "read $HERE/base.log"
  fi
  IMAGE_PYTHON=$(docker run --rm --network=none "$BASE_IMAGE" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
}

cleanup() {
  local pid i mount
  trap - EXIT
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

main() {
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  cd "$ROOT"
  local -a files=("$@")
  ((${#files[@]})) || files=(bats/cluster)
  # shellcheck source=/dev/null
  if [[ -r /etc/os-release ]]; then source /etc/os-release; fi
  ((EUID == 0)) || skip 'not root: the engines are private ones (sudo make test-image)'
  [[ ${ID:-} == debian || ${ID:-} == ubuntu ]] || skip "${ID:-this system} is neither Debian nor Ubuntu: their packages bring engine and registry"
  need_cmd python
  if [[ -z ${S3_ENDPOINT_URL:-} ]]; then
    exec scripts/bucket.sh run build/test-image/bucket -- "$ROOT/scripts/test_image.sh" "$@"
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
  bats --tap "${files[@]}" 2>&1 9>&- | tee "$HERE/bats.log" || rc=1
  passed=$(grep -c '^ok ' "$HERE/bats.log" || true) failed=$(grep -c '^not ok ' "$HERE/bats.log" || true)
  if ((rc && failed == 0)); then failed=1; fi
  log image "$((SECONDS - began)) s"
  echo "$passed passed, $failed failed"
  return "$rc"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
