#!/usr/bin/env bash
# Usage: scripts/bench.sh
# The loss, the steps of the algorithms, a whole step, a checkpoint and a sync against their peers, about an hour on two idle
# cores. What needs a GPU is benchmarks/gpu.py. The sync's server and trees take 17 GB in build/ while they are measured.
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
  export OMP_NUM_THREADS=1
  python benchmarks/train.py
  local two
  for two in train save; do
    python -m torch.distributed.run --standalone --nproc-per-node 2 "benchmarks/$two.py"
  done
  trap 'rm -rf build/bench' EXIT
  scripts/bucket.sh run build/bench -- python benchmarks/sync.py --scratch build/bench
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
