# Loaded by the suites of the launchers: a tree of its own, the real client, a stub of VESSL's API.
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it
bats_require_minimum_version 1.5.0

# once a file: the client is installed into the checkout on first use, as for a user.
cluster_file_setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  cmp -s "$repo/.venv-vessl/.installed" "$repo/requirements/vessl.txt" || "$repo/scripts/install_vessl.sh"
}

cluster_setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  tree="$BATS_TEST_TMPDIR/a tree"
  stub="$BATS_TEST_TMPDIR/stub"
  mkdir -p "$tree/tests" "$stub"
  cp -r "$repo"/{scripts,docker,configs,datasets,src,requirements,Dockerfile} "$tree/"
  cp -r "$repo/tests/configs" "$tree/tests/configs"
  ln -s "$repo/.venv" "$tree/.venv"
  ln -s "$repo/.venv-vessl" "$tree/.venv-vessl"
  # A run is named by what it is made of: not by this machine's variables.
  unset CONFIG RECIPE RUN_NAME RESUME SET RUN_ID DRY_RUN MAX_HOURS S3_ENDPOINT_URL S3_BUCKET_NAME AWS_DEFAULT_REGION TAIL FOLLOW CI
  export ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl WMTP_REVISION=abcdef0123 POLL_S=0.1 ONLY=1,2,3,devices,reward LC_ALL=C.UTF-8
  digest=ghcr.io/wooshikwon/wmtp@sha256:$(printf 'a%.0s' {1..64})
  pushed "$digest" abcdef0
  "$repo/.venv/bin/python" "$repo/tests/vessl_stub.py" "$stub" >"$stub.address" 2>"$stub.err" 3>&- &
  stub_pid=$!
  local i
  for ((i = 0; i < 600; i++)); do
    [[ ! -s $stub.address ]] || break
    sleep 0.1
  done
  VESSL_API_HOST=$(<"$stub.address")
  export VESSL_API_HOST VESSL_ACCESS_TOKEN=stub-token VESSL_DEFAULT_ORGANIZATION=o VESSL_DEFAULT_PROJECT=wmtp
}

cluster_teardown() { kill "$stub_pid" 2>/dev/null || true; }

# pushed REFERENCE REVISION: what the stage push leaves.
pushed() {
  mkdir -p "$tree/build/minitest" "$tree/build/production"
  printf '%s\n' "$1" | tee "$tree/build/minitest/image.digest" >"$tree/build/production/image.digest"
  printf '%s\n' "$2" | tee "$tree/build/minitest/image.revision" >"$tree/build/production/image.revision"
}

fault() { printf '%s\n' "$@" >"$stub/faults"; }
runs() { find "$stub/runs" -name '*.json' | wc -l; }
status_of() { "$repo/.venv/bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$stub/runs/$1.json"; }
submit() { "$tree/scripts/submit.sh"; }

# Nothing but a success may look like one: a code, and a last line that says what to do.
told_what_to_do() { [[ $(tail -n 1 <<<"$stderr") == *'next  '* && $stderr != *Traceback* ]]; }

# need_engines: these suites run under scripts/test_image.sh, which says so where they can't.
need_engines() {
  [[ -n ${WMTP_ENGINE_A:-} && -n ${WMTP_REGISTRY:-} ]] || {
    echo 'no engine: make test-image' >&2
    return 1
  }
}

# real_tree DIR: what is here, committed or not, as a clean checkout with one commit: always the same for the same content.
real_tree() {
  mkdir -p "$1"
  (cd "$repo" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - 2>/dev/null) | tar -C "$1" -xf -
  ln -s "$repo/.venv" "$1/.venv"
  ln -s "$repo/.venv-vessl" "$1/.venv-vessl"
  # The wheels were fetched once for this checkout.
  mkdir -p "$1/build" "$repo/build/wheelhouse"
  ln -s "$repo/build/wheelhouse" "$1/build/wheelhouse"
  export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
  export GIT_AUTHOR_DATE='2026-01-02T03:04:05Z' GIT_COMMITTER_DATE='2026-01-02T03:04:05Z'
  git -C "$1" init -q -b main
  printf '/.venv\n/.venv-vessl\n' >>"$1/.git/info/exclude"
  git -C "$1" add -A
  git -C "$1" commit -q -m tree
}

plain_environment() {
  unset CONFIG RECIPE RUN_NAME RESUME SET RUN_ID DRY_RUN MAX_HOURS TAIL FOLLOW CI WMTP_REVISION ENV ALGO LAUNCHER
  export REGISTRY_USER=team image=$WMTP_REGISTRY/team/wmtp
  export DOCKER_BUILDKIT=0 ONLY=1,2,3,devices,reward
}
