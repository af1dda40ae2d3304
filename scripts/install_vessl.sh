#!/usr/bin/env bash
# Usage: scripts/install_vessl.sh
# Puts the client of VESSL into .venv-vessl, apart from the training environment: it pins old packages. The stages that speak
# to VESSL call this on first use.
# Standard output: nothing. Exit codes: 0 done, 3 no tool, 11 the package index does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=install
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local began=$SECONDS
  cd "$ROOT"
  need_cmd uv
  need_cmd python
  log install '.venv-vessl: the client of VESSL, on first use (200 MB)'
  mkdir -p build
  exec 7>build/.vessl.lock
  flock -w 300 7 || die 1 'another install of .venv-vessl takes longer than 300 s' 'one at a time' 'wait for it'
  # Another stage may have done it meanwhile; and one that works with it is not disturbed.
  if cmp -s .venv-vessl/.installed requirements/vessl.txt; then return 0; fi
  rm -f .venv-vessl/.installed
  # The interpreter of .venv, and not a link into it: the client outlives an `rm -rf .venv`.
  local base
  base=$(python -c 'import sys; print(sys._base_executable)')
  { uv venv -q --clear --python "$base" .venv-vessl &&
    uv pip install -q --python .venv-vessl/bin/python --require-hashes -r requirements/vessl.txt; } ||
    die 11 'the client could not be installed' 'its lock is requirements/vessl.txt' 'is the package index reachable? then again'
  cp requirements/vessl.txt .venv-vessl/.installed
  log install "ok in $((SECONDS - began)) s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
