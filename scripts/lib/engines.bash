# Engines, registry and base image for the image test alone. Sourced by test_image.sh only.
# shellcheck shell=bash disable=SC2016,SC2153,SC2154  # what it sets and reads is shared with the script that sources it; another program expands

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
    mmdebstrap -q --variant=minbase --components="$components" --include=python3,ca-certificates,bash,tini,gcc,libc6-dev,libpython3-dev \
      --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin' "$VERSION_CODENAME" - \
      2>"$HERE/base.log" | docker import - "$BASE_IMAGE" >/dev/null ||
      die 3 'the base image could not be made' "packages of $VERSION_CODENAME" "read $HERE/base.log"
  fi
  IMAGE_PYTHON=$(docker run --rm --network=none "$BASE_IMAGE" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
}
