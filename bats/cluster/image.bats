#!/usr/bin/env bats
# The image: built, pushed with a login, pulled by digest by another engine, and run, all on real parts.

load helpers

setup_file() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  need_engines
  plain_environment
  export tree="$BATS_FILE_TMPDIR/tree" repo
  real_tree "$tree"
  export ENV=minitest SET="launcher.image=$image:latest"
  # Canaries where a hurried person has secrets; a watcher reads every command line meanwhile.
  (
    export AWS_SECRET_ACCESS_KEY=canary-aws VESSL_ACCESS_TOKEN=canary-vessl
    : >"$BATS_FILE_TMPDIR/watched"
    while sleep 0.05; do cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -ao 'canar[y]-[a-z0-9]*' >>"$BATS_FILE_TMPDIR/watched" || true; done 3>&- &
    watcher=$!
    # The token itself is nowhere but in this shell and on the pipe.
    export -n REGISTRY_TOKEN
    bash -x "$tree/scripts/build.sh" >"$BATS_FILE_TMPDIR/built" 2>"$BATS_FILE_TMPDIR/trace"
    printf '%s' "$REGISTRY_TOKEN" | HOME=$BATS_FILE_TMPDIR/home bash -x "$tree/scripts/push.sh" >"$BATS_FILE_TMPDIR/pushed" 2>>"$BATS_FILE_TMPDIR/trace"
    kill "$watcher"
  ) || { tail -n 30 "$BATS_FILE_TMPDIR/trace" >&2 && return 1; }
}

setup() {
  built=$(<"$BATS_FILE_TMPDIR/built")
  pushed=$(<"$BATS_FILE_TMPDIR/pushed")
}

in_image() { docker run --rm --network=none "$@"; }

@test "image: /app with its folders is 755 and the user's, who is not root" {
  run -0 in_image "$built" pwd
  [[ $output == /app ]]
  run -0 in_image "$built" bash -c 'id -u; stat -c "%a %U %n" /app /app/models /app/datasets /app/checkpoints /app/mlruns /app/logs'
  [[ $output == $'10001\n755 wmtp /app\n755 wmtp /app/models\n755 wmtp /app/datasets\n755 wmtp /app/checkpoints\n755 wmtp /app/mlruns\n755 wmtp /app/logs' ]]
  run -0 in_image "$built" bash -c 'touch /app/x && mkdir /app/test_checkpoints /app/mlruns_test && touch /cache/models/x'
}

@test "image: the plan's check of paths, torch, the aws client, s5cmd, what torch.compile calls" {
  run -0 in_image "$built" python3 -c "
from wmtp.paths import PathResolver
path_type, resolved = PathResolver().resolve('file:///app/models/test')
assert (path_type, resolved) == ('file', '/app/models/test')
import torch, transformers, mlflow, awscli; print(torch.__version__)"
  run -0 in_image "$built" bash -c '"$WMTP_S5CMD" version && aws --version && command -v awk flock setpriv df'
  run -1 in_image "$built" bash -c 'command -v g++ make git curl'
  # shellcheck disable=SC2016  # the inner shell expands it
  run -0 in_image "$built" bash -c 'cd /tmp && echo "#include <Python.h>" >a.c &&
    gcc -shared -fPIC -I"$(python -c "import sysconfig; print(sysconfig.get_path(\"include\"))")" a.c -o a.so &&
    python -c "from wmtp.model import no_compiler; assert no_compiler(\"cuda\") is None"'
}

@test "image: entry, health check and labels" {
  run -0 docker image inspect --format '{{json .Config.Entrypoint}} {{json .Config.Cmd}} {{.Config.User}} {{.Config.WorkingDir}}' "$built"
  [[ $output == '["/usr/local/bin/tini","--"] ["bash","/app/docker/vessl_startup.sh"] 10001:10001 /app' ]]
  run -0 docker image inspect --format '{{json .Config.Healthcheck.Test}}' "$built"
  [[ $output == *'/app/logs'* ]]
  run -0 docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}} {{index .Config.Labels "org.opencontainers.image.created"}} {{index .Config.Labels "wmtp.lock"}}' "$built"
  [[ $output == "$(git -C "$tree" rev-parse HEAD) 2026-01-02T03:04:05Z sha256:"* ]]
  [[ $built == "$image:$(git -C "$tree" rev-parse HEAD | cut -c1-7)" ]]
  run -0 bash -c 'docker inspect "$(docker run -d --network=none "$1" sleep 60)" --format "{{.State.Health.Status}}"' _ "$built"
  [[ $output == starting || $output == healthy ]]
}

@test "image: no cache, no index, no wheel, no file of git, tests or a person" {
  run -0 in_image -u 0 "$built" find / -xdev \( -name '*.whl' -o -name .git -o -path /wheels -o -path '*/.cache' -o -name '.env*' \
    -o -path '/app/build' -o -path '/app/.venv' -o -path '/app/bats' -o -path '/app/tests/test_*' \) -print
  [[ -z $output ]]
  run in_image -u 0 "$built" find /var/lib/apt/lists /var/cache/apt /tmp -xdev -type f -size +0
  [[ -z $output ]]
}

@test "image: the layers keep to their size" {
  run -0 docker history --no-trunc --human=false --format '{{.Size}} {{.CreatedBy}}' "$built"
  # CPU torch; the CUDA build is 10 times that. Packages: awscli and transformers are most of it.
  awk '/COPY.*\/opt\/(torch|packages)/ {if ($1 > 800e6) bad = 1; n++}
    /COPY --chown.* (src|scripts|docker|configs|datasets|tests\/configs)( |$)/ {if ($1 > 1e6) bad = 1; n++}
    END {if (bad || n != 8) {print n; exit 1}}' <<<"$output"
}

@test "image: no canary in a layer, the history, a trace, an argument, the client's configuration" {
  run -1 grep -a canary "$BATS_FILE_TMPDIR/watched"
  grep -q 'docker login' "$BATS_FILE_TMPDIR/trace"
  run -1 grep -a canary "$BATS_FILE_TMPDIR/trace"
  [[ ! -e $BATS_FILE_TMPDIR/home/.docker ]]
  run -1 bash -c 'docker history --no-trunc "$1" | grep canary' _ "$built"
  run -1 bash -c 'docker image inspect "$1" | grep canary' _ "$built"
  run -1 bash -c 'set -o pipefail; docker save "$1" | grep -aqF -e canary-aws -e canary-vessl -e "$2"' _ "$built" "$REGISTRY_TOKEN"
  run -1 grep -ra canary "$tree/build/minitest"
}

@test "push: without a token and with a wrong one it ends with 3 and says how" {
  HOME=$BATS_TEST_TMPDIR run -3 --separate-stderr "$tree/scripts/push.sh" </dev/null
  told_what_to_do
  HOME=$BATS_TEST_TMPDIR run -3 --separate-stderr "$tree/scripts/push.sh" <<<wrong
  told_what_to_do
}

@test "push: killed with -9 it leaves no login behind" {
  "$tree/scripts/push.sh" <<<"$REGISTRY_TOKEN" >/dev/null 2>&1 3>&- &
  local pid=$! i
  for ((i = 0; i < 2400; i++)); do
    [[ ! -s $tree/build/minitest/.login/config.json ]] || break
    sleep 0.05
  done
  [[ -s $tree/build/minitest/.login/config.json ]]
  kill -KILL "$pid"
  for ((i = 0; i < 300; i++)); do
    [[ -e $tree/build/minitest/.login ]] || break
    sleep 0.1
  done
  [[ ! -e $tree/build/minitest/.login ]]
}

@test "push: another engine pulls by the digest that was printed and kept" {
  [[ $pushed =~ ^"$image"@sha256:[0-9a-f]{64}$ && $(<"$tree/build/minitest/image.digest") == "$pushed" ]]
  export DOCKER_HOST=$WMTP_ENGINE_B DOCKER_CONFIG=$BATS_TEST_TMPDIR
  docker login -u team --password-stdin "$WMTP_REGISTRY" <<<"$REGISTRY_TOKEN"
  docker pull -q "$pushed"
  run -0 docker run --rm --network=none "$pushed" pwd
  [[ $output == /app ]]
}

@test "build and push: the same commit again sends nothing, a line in src/ one small layer" {
  push() { "$tree/scripts/build.sh" && "$tree/scripts/push.sh" <<<"$REGISTRY_TOKEN"; }
  run -0 --separate-stderr push
  [[ $output == *"$pushed" && $stderr == *' 0 layers pushed, '* ]]
  local before after began
  before=$(du -sb "$(dirname "${WMTP_ENGINE_A#unix://}")/registry" | cut -f1)
  echo '# a line' >>"$tree/src/wmtp/paths.py"
  git -C "$tree" commit -qam line
  began=$EPOCHREALTIME
  run -0 --separate-stderr push
  after=$(du -sb "$(dirname "${WMTP_ENGINE_A#unix://}")/registry" | cut -f1)
  echo "# a line in src/: $(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN {printf "%.1f", b - a}') s, $((after - before)) bytes" >&3
  [[ $output != *"$pushed" && $stderr == *' 1 layers pushed, '* ]]
  ((after - before < 1000000))
}

@test "build: production refuses what is not committed or not pushed, without an engine it ends with 3" {
  echo '# x' >>"$tree/src/wmtp/paths.py"
  ENV=production run -2 --separate-stderr "$tree/scripts/build.sh"
  [[ $stderr == *'not committed'*'src/wmtp/paths.py'* ]]
  git -C "$tree" checkout -q src
  ENV=production run -2 --separate-stderr "$tree/scripts/build.sh"
  [[ $stderr == *'is on no remote'*'git push'* ]]
  DOCKER_HOST=unix:///nowhere run -3 --separate-stderr "$tree/scripts/build.sh"
  told_what_to_do
}
