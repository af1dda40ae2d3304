#!/usr/bin/env bash
# Usage: scripts/bucket.sh run DIR -- COMMAND…
# Runs COMMAND with a bucket: an embedded S3 server on free loopback ports with its data under DIR. Where S3_ENDPOINT_URL is
# set already, that bucket is used and no server is started. Server and secret end with COMMAND.
# For COMMAND: AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_DEFAULT_REGION S3_ENDPOINT_URL S3_BUCKET_NAME (default wmtp).
# Standard output: COMMAND's. Log of the server: DIR/weed.log.
# Exit codes: COMMAND's; 2 bad arguments, 3 a tool is missing, 10 DIR can't be written, 11 the server does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

SERVER='' LAST='' CHILD='' DATA=''

# Ports whose gRPC twins, 10000 above, are free as well: one a line.
free_ports() {
  python - "$1" <<'PY'
import random, socket, sys
found = []
for port in random.sample(range(20000, 32000), 400):
    pair = [socket.socket(), socket.socket()]
    try:
        for s, p in zip(pair, (port, port + 10000)):
            s.bind(("127.0.0.1", p))
        found.append(port)
    except OSError:
        pass
    finally:
        for s in pair:
            s.close()
    if len(found) == int(sys.argv[1]):
        break
print(*found, sep="\n")
PY
}

start_server() {
  local -a port
  mapfile -t port < <(free_ports 5)
  export S3_ENDPOINT_URL=http://127.0.0.1:${port[0]}
  # The server follows this shell into the grave, whichever way it dies; a session of its own, since Ctrl-C at a terminal
  # goes to the whole group, and what is saved on the way out still needs the bucket.
  GOMEMLIMIT=1GiB setsid setpriv --pdeathsig KILL weed -logtostderr=true mini -dir="$DATA" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
    -s3.port="${port[0]}" -master.port="${port[1]}" -filer.port="${port[2]}" -volume.port="${port[3]}" \
    -admin.port="${port[4]}" -admin.ui=false -webdav=false -master.telemetry=false -s3.port.iceberg=0 \
    -s3.port.lance=0 -bucket="$S3_BUCKET_NAME" </dev/null >"$LAST/weed.log" 2>&1 &
  SERVER=$!
}

# The bucket answers when an object can be put, not when a port is open.
put_works() {
  AWS_EC2_METADATA_DISABLED=true timeout 10 "$S5CMD" --retry-count 0 pipe "s3://$S3_BUCKET_NAME/.alive" \
    <<<alive >/dev/null 2>>"$LAST/put.log"
}

await_server() {
  local began=$SECONDS
  until put_works; do
    kill -0 "$SERVER" 2>/dev/null || return 1
    ((SECONDS - began < 30)) || return 1
    sleep 0.1
  done
}

stop_server() {
  [[ -n $SERVER ]] || return 0
  kill -TERM "$SERVER" 2>/dev/null || true
  local tick
  for ((tick = 0; tick < 60; tick++)); do
    kill -0 "$SERVER" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$SERVER" 2>/dev/null || true
  wait "$SERVER" 2>/dev/null || true
  SERVER=''
}

with_server() {
  local try rc=0
  export AWS_ACCESS_KEY_ID=embedded AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-eu-north-1}
  AWS_SECRET_ACCESS_KEY=$(python -c 'import secrets; print(secrets.token_hex(20))')
  export AWS_SECRET_ACCESS_KEY
  unset AWS_SESSION_TOKEN AWS_PROFILE
  trap stop_server EXIT
  trap 'stopped 143 TERM' TERM
  trap 'stopped 130 INT' INT
  # A port that another took between the look and the start is the one thing that a second try mends.
  for ((try = 1; try <= 3; try++)); do
    start_server
    if await_server; then break; fi
    stop_server
    ((try < 3)) || die 11 "the embedded server did not answer in $DATA" 'it must take an object within 30 s' "see $LAST/weed.log"
    log bucket "try $try of 3 failed; again"
  done
  log bucket "$S3_ENDPOINT_URL answers; data in $DATA"
  # Its own group of fate: COMMAND dies with this shell as the server does.
  setpriv --pdeathsig TERM env --default-signal=INT "$@" <&3 3<&- 9>&- &
  CHILD=$!
  wait "$CHILD" || rc=$?
  return "$rc"
}

stopped() {
  if [[ -n $CHILD ]]; then
    kill -"$2" "$CHILD" 2>/dev/null || true
    wait "$CHILD" 2>/dev/null || true
  fi
  exit "$1"
}

main() {
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  [[ ${1:-} == run && -n ${2:-} && ${3:-} == -- && $# -ge 4 ]] ||
    die 2 "arguments not understood: $*" 'run DIR -- COMMAND…' 'scripts/bucket.sh --help'
  local dir=$2
  shift 3
  export S3_BUCKET_NAME=${S3_BUCKET_NAME:-wmtp}
  if [[ -n ${S3_ENDPOINT_URL:-} ]]; then exec "$@"; fi
  need_cmd weed
  need_cmd setpriv 'Linux: apt-get install util-linux; elsewhere set S3_ENDPOINT_URL to a bucket that runs already'
  need_cmd python
  S5CMD=$(s5cmd_bin)
  mkdir -p -- "$dir" 2>/dev/null && [[ -w $dir ]] ||
    die 10 "$dir can't be written" 'the server keeps its data there' 'name another folder'
  dir=$(cd "$dir" && pwd)
  LAST=$dir DATA=$dir/data
  exec 3<&0
  hold "$dir/.lock" "another server uses $dir" 'one server a folder: one mini-test at a time' "${*##"$ROOT"/}${RUN_NAME:+ $RUN_NAME}"
  mkdir -p "$DATA"
  with_server "$@"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
