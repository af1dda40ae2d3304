#!/usr/bin/env bash
# Usage: scripts/test.sh
# pytest and bats side by side, both on one embedded bucket; what is marked `long` is left to make soak. Logs: build/test/.
# Standard output: the runners' own, then a plain `N passed, N failed` line. Exit codes: 0 all passed, 1 not.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

suite=''

count() { { grep -oE "[0-9]+ $1" "$2" || true; } | tail -n 1 | cut -d ' ' -f 1; }

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  cd "$ROOT"
  if [[ -z ${S3_ENDPOINT_URL:-} ]]; then exec scripts/bucket.sh run build/test/bucket -- "$ROOT/scripts/test.sh"; fi
  export OMP_NUM_THREADS=1
  local -a tied
  local rc=0 passed failed ok bad started=$SECONDS
  # All wait half of their time, for processes that start, end and are killed. bats, two files at once, the longest first, is told
  # when pytest is done.
  tie TERM
  # shellcheck disable=SC2011,SC2012 # names of our own
  ls -S bats/*.bats | xargs -n 1 -P 2 "${tied[@]}" bats --tap --timing --filter-tags '!long' >build/test/bats.log 2>&1 &
  suite=$!
  trap 'kill -TERM "$suite" 2>/dev/null || true' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  pytest -n 2 --dist worksteal 2>&1 | tee build/test/pytest.log || rc=1
  wait "$suite" || rc=1
  cat build/test/bats.log
  passed=$(count passed build/test/pytest.log)
  failed=$(count failed build/test/pytest.log)
  ok=$(grep -c '^ok ' build/test/bats.log || true)
  bad=$(grep -c '^not ok ' build/test/bats.log || true)
  echo "test      $((SECONDS - started)) s" >&2
  # A runner that died before its closing line counts as one failure.
  if ((rc == 1 && ${failed:-0} + bad == 0)); then failed=1; fi
  echo "$((${passed:-0} + ok)) passed, $((${failed:-0} + bad)) failed"
  return "$rc"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
