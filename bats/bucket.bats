#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  unset S3_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
}

bucket() { "$repo/scripts/bucket.sh" "$@"; }

@test "bucket: ends with the command's code when the command fails" {
  run -7 --separate-stderr bucket run "$work/b" -- bash -c 'echo "$S3_ENDPOINT_URL"; exit 7'
  [[ $output == http://127.0.0.1:* ]]
  run -1 pgrep -f "weed -logtostderr=true mini -dir=$work/b"
}

@test "bucket: starts no server when S3_ENDPOINT_URL is set" {
  S3_ENDPOINT_URL=http://there run -0 --separate-stderr bucket run "$work/b" -- bash -c 'echo "$S3_ENDPOINT_URL"'
  [[ $output == http://there && ! -e $work/b ]]
}

@test "bucket: leaves no process when killed" {
  "$repo/scripts/bucket.sh" run "$work/b" -- sleep 321 >/dev/null 2>&1 3>&- &
  local shell=$! tick # the script itself, not a subshell of this test
  for ((tick = 0; tick < 100; tick++)); do
    if grep -q . <(pgrep -P "$shell" -x sleep); then break; fi
    sleep 0.2
  done
  pgrep -f "weed -logtostderr=true mini -dir=$work/b"
  kill -KILL "$shell"
  sleep 1
  run -1 pgrep -f "weed -logtostderr=true mini -dir=$work/b"
}

@test "bucket: 2 when there is no command" {
  run -2 --separate-stderr bucket run "$work/b"
}

@test "bucket: another port when one was taken between the look and the start" {
  mkdir -p "$work/repo" "$work/bin"
  cp -r "$repo/scripts" "$work/repo/"
  cat >"$work/bin/weed" <<STUB
#!/usr/bin/env bash
# The first time, somebody else has the port already.
if [[ ! -e '$work/taken' ]]; then
  port=\$(printf '%s\n' "\$@" | sed -n 's/^-s3.port=//p')
  setpriv --pdeathsig KILL python -c "import socket, sys
s = socket.create_server(('127.0.0.1', \$port))
open('$work/taken', 'w')
while True: s.accept()[0].close()" &
  until [[ -e '$work/taken' ]]; do sleep 0.05; done
fi
exec '$repo/.venv/bin/weed' "\$@"
STUB
  chmod +x "$work/bin/weed"
  PATH="$work/bin:$repo/.venv/bin:$PATH" run -0 --separate-stderr "$work/repo/scripts/bucket.sh" run "$work/b" -- bash -c 'echo "$S3_ENDPOINT_URL"'
  [[ $output == http://127.0.0.1:* && $stderr == *'try 1 of 3 failed; again'* ]]
  run -1 pgrep -f "weed -logtostderr=true mini -dir=$work/b"
}
