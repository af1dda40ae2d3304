#!/usr/bin/env bash
# Usage: scripts/lint.sh [--fix]
# Runs every linter over the tracked files, all of them even when one fails; --fix rewrites instead of naming.
# Exit codes: 0 clean, 1 findings.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

failed=()

check() {
  local name=$1
  shift
  if "$@" >&2; then printf 'lint      ok    %s\n' "$name" >&2; else
    printf 'lint      FAIL  %s\n' "$name" >&2
    failed+=("$name")
  fi
}

main() {
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  cd "$ROOT"
  local -a shell docker=()
  mapfile -t shell < <(git ls-files --cached --others --exclude-standard -- '*.sh' '*.bash' .ci/run 'bats/stubs/*')
  mapfile -t docker < <(git ls-files --cached --others --exclude-standard -- Dockerfile)
  if [[ ${1:-} == --fix ]]; then
    check ruff ruff check -q --fix .
    check 'ruff format' ruff format -q .
    check shfmt shfmt -i 2 -ci -w "${shell[@]}"
    check rumdl rumdl fmt -q --no-cache .
  else
    check ruff ruff check -q .
    check 'ruff format' ruff format -q --check .
    check shfmt shfmt -i 2 -ci -d "${shell[@]}"
    # Markdown, its links and anchors within the repository included.
    check rumdl rumdl check -q --no-cache .
  fi
  check mypy mypy --no-error-summary
  check shellcheck shellcheck -x -P SCRIPTDIR "${shell[@]}"
  check yamllint yamllint -s .
  # Offline: it needs no account and asks no service.
  check zizmor zizmor --offline -q .github/workflows
  check mbake mbake validate Makefile
  if ((${#docker[@]})); then check hadolint hadolint "${docker[@]}"; fi
  ((${#failed[@]} == 0)) || {
    printf 'lint      FAIL  %s\n              next  make format, then mend what is left\n' "${failed[*]}" >&2
    return 1
  }
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
