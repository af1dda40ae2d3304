#!/usr/bin/env bash
# Usage: scripts/install.sh [STAMP]   STAMP: the file under .venv that says what is installed, as make names it
# Makes .venv with everything a laptop needs: uv, torch (apart), the locked set with hashes, this package.
# Environment: PYTHON (an interpreter 3.11 or 3.12), TORCH_BACKEND (auto, cpu, cu130, … as uv knows them),
#   PIP_FIND_LINKS (a folder of wheels that torch may come from).
# Standard output: nothing. Exit codes: 0 done, 3 no fitting Python, 11 the package index does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit

fail() {
  printf 'install   FAIL  %s\n              next  %s\n' "$2" "$3" >&2
  exit "$1"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail 3 "no Python 3.11 or 3.12 with the venv module (tried: ${PYTHON:-python3.11 python3 python3.12})" \
    'install one (Debian: apt-get install python3.11-venv), or name it: make install PYTHON=/path/to/python3.11'
}

main() {
  case ${1:-} in
    -h | --help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail 3 "bash $BASH_VERSION is too old: 4.4 or later" 'brew install bash'
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  local python started=$SECONDS
  python=$(find_python)
  echo "install   .venv with $("$python" --version): torch, the locked packages, wmtp" >&2
  rm -f .venv/.installed*
  if [[ ! -x .venv/bin/uv ]]; then
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt ||
      fail 11 'uv could not be installed' 'is the package index reachable? then again: make install'
  fi
  export VIRTUAL_ENV=$PWD/.venv
  local -a uv=(.venv/bin/uv pip install -q)
  # A plain `torch` from the index brings gigabytes of CUDA on a machine that has no GPU.
  local -a torch=(-r requirements/torch.txt)
  if [[ -n ${PIP_FIND_LINKS:-} ]]; then torch+=(--find-links "$PIP_FIND_LINKS"); else torch+=(--torch-backend "${TORCH_BACKEND:-auto}"); fi
  "${uv[@]}" "${torch[@]}" ||
    fail 11 "torch could not be installed ($(<requirements/torch.txt))" 'set TORCH_BACKEND=cpu, or PIP_FIND_LINKS to a folder with its wheel; then: make install'
  "${uv[@]}" --require-hashes -r requirements/dev.txt ||
    fail 11 'the locked packages could not be installed' 'is the package index reachable? then again: make install'
  "${uv[@]}" --no-deps --no-build-isolation -e .
  touch "${1:-.venv/.installed}"
  echo "install   ok in $((SECONDS - started)) s" >&2
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
