"""Time and memory of the loss over a large vocabulary: ours against the ways that others do it.

    .venv/bin/python benchmarks/loss.py [--lengths 256 512 1024 2048] [--pairs 9] [--dtype float32]

Forward and backward of a rho1-weighted loss, hidden states in, gradients of hidden states and unembedding out. Time:
the ways take turns in one process. Memory: each way runs once in a process of its own; the peak of resident memory
above what was there before. Targets: memory at most 0.35 of naive at S 512, time at most naive's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from pairs import interleave, machine, ratio
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmtp.model import LMHead, Weighing
from wmtp.objective import IGNORED, rho1_wmtp, weighted_loss

D, V, H, B = 512, 32000, 4, 4
MOST_LOGITS = 6 << 30  # bytes of float32 logits beyond which naive is left out


def rule(ce: Tensor, mask: Tensor, *, ref_aligned: Tensor) -> Tensor:
    return rho1_wmtp(
        ce, mask, ref_aligned=ref_aligned, head_mean=None, min_ce_diff=0.01, temperature=0.7, epsilon=0.05,
        max_weight=3.0, mix=0.3,
    )  # fmt: skip


class Case:
    """One batch and the ways to its loss; every way ends in a backward."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(B, length, H, D, generator=g).to(dtype).requires_grad_()
        self.head = LMHead(D, V).to(dtype)
        self.mask = torch.rand(B, length, H, generator=g) < 0.95
        self.labels = torch.randint(V, self.mask.shape, generator=g).masked_fill(~self.mask, IGNORED)
        self.ref = 10 * torch.rand(self.mask.shape, generator=g)
        self.count = self.mask.sum()

    def done(self, loss: Tensor) -> float:
        loss.backward()
        self.hidden.grad = self.head.weight.grad = None
        return float(loss.detach())

    def ours(self) -> float:
        weighing = Weighing(rule, {"ref_aligned": self.ref})
        return self.done(self.head(self.hidden, self.labels, self.mask, self.count, weighing)[0])

    def _weighted(self, ce: Tensor) -> float:
        w = rule(ce.detach(), self.mask, ref_aligned=self.ref)
        return self.done(weighted_loss(ce, w, self.mask, count=self.count))

    def naive(self) -> float:
        logits = F.linear(self.hidden, self.head.weight).float()
        ce = F.cross_entropy(logits.flatten(0, -2), self.labels.flatten(), reduction="none").view_as(self.labels)
        return self._weighted(ce)

    def builtin(self) -> float:
        ce = F.linear_cross_entropy(
            self.hidden.flatten(0, -2), self.head.weight, self.labels.flatten(), reduction="none"
        )
        return self._weighted(ce.float().view_as(self.labels))

    def head_by_head(self) -> float:
        """As the paper: one head's logits at a time, made again in backward."""

        def one(h: Tensor, y: Tensor) -> Tensor:
            logits = F.linear(h, self.head.weight).float()
            return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view_as(y)

        parts = [checkpoint(one, self.hidden[:, :, k], self.labels[:, :, k], use_reentrant=False) for k in range(H)]
        return self._weighted(torch.stack(parts, -1))

    @torch.no_grad()
    def limit(self) -> float:
        """Nothing but the three products over V, in chunks of the same size: what no way can be faster than."""
        weight, total = self.head.weight, torch.zeros(V, D)
        for h in self.hidden.flatten(0, -2).split(1024):
            logits = h @ weight.t()
            logits @ weight
            total += logits.t() @ h
        return float("nan")


NAMES = {
    "ours": "one pass over chunks (ours)",
    "naive": "naive: all logits",
    "builtin": "F.linear_cross_entropy",
    "head_by_head": "head after head",
    "limit": "three products alone",
}


def peak_mib() -> float:
    """Peak resident memory since `forget_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(way: str, length: int, dtype: str) -> float:
    """MiB of resident memory at the peak, above what stood before; in a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--lengths", str(length), "--dtype", dtype]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--one", choices=list(NAMES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    if args.one:
        case = Case(args.lengths[0], dtype)
        forget_peak()
        before = peak_mib()
        getattr(case, args.one)()
        print(json.dumps(peak_mib() - before))
        return
    print(f"{machine()}, torch {torch.__version__}, B {B}, H {H}, D {D}, V {V}, {args.dtype}\n")
    print("| S | way | seconds | ours / it (95 %) | peak MiB | ours / it | loss |")
    print("| --- " * 7 + "|")
    for length in args.lengths:
        case = Case(length, dtype)
        names = [n for n in NAMES if n != "naive" or B * length * H * V * 4 <= MOST_LOGITS]
        ways: dict[str, Callable[[], object]] = {n: getattr(case, n) for n in names}
        seconds = interleave(ways, args.pairs)
        peaks = {n: memory(n, length, args.dtype) for n in names}
        for n in names:
            middle, low, high = ratio(seconds["ours"], seconds[n])
            cells = [
                f"{length}",
                NAMES[n],
                f"{statistics.median(seconds[n]):.2f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{peaks[n]:.0f}",
                f"{peaks['ours'] / peaks[n]:.2f}",
                f"{ways[n]():.5f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
        if "naive" not in names:
            print(f"| {length} | naive: left out, its logits are {B * length * H * V * 4 / 2**30:.1f} GiB | | | | | |")


if __name__ == "__main__":
    main()
