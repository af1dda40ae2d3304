#!/usr/bin/env bash
# Usage: scripts/bench.sh
# The loss, the steps of the algorithms and a checkpoint against their peers, about 25 minutes on two idle cores.
# Standard output: tables in Markdown. Exit codes: 0 done, 1 it failed, 3 a tool is missing.
set -Eeuo pipefail
shopt -s inherit_errexit
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  need_cmd python
  cd "$ROOT"
  python benchmarks/loss.py && python benchmarks/algorithms.py
  OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/save.py
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
