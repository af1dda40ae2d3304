"""What the record costs the training: steps whose figures are all logged, against steps that log nothing, in one run.

    .venv/bin/python benchmarks/tracking.py [--pairs 7] [--seconds 20] [--mirror]

A step is a forward and backward of a Llama of 64 M parameters, and AdamW, on one thread. Blocks of steps take turns,
with a real MLflow store and 40 figures a step; the last batch of a block (2 s of it) is sent between blocks, so a block
is ten of them. `--mirror`: the store goes to the bucket every 2 s meanwhile, where 30 is usual (in front of it:
scripts/bucket.sh run build/bucket --). Target: at most 1 % of a step.

Also told, and not blurred by what else the machine does: the call's own time, and the processor time that the recording
thread takes for a step, which is the most that it can hold the trainer up by.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
import uuid
from pathlib import Path

import torch
from pairs import machine, ratio

from wmtp.model import ModelSpec, MTPModel
from wmtp.tracking import Tracker

FIGURES = 40
SPEC = ModelSpec("hf", 4, 512, 6, 8, 8, 1376, 32000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a block")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--mirror", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["WMTP_MIRROR_S"] = "2"
    model = MTPModel(SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randint(0, SPEC.vocab_size, (1, args.length))
    shape = (1, args.length, SPEC.heads)
    labels, mask = x[..., None].expand(shape), torch.ones(shape, dtype=torch.bool)

    def step() -> None:
        model(x, torch.zeros_like(x), labels, mask, mask.sum()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        uri = f"file://{folder}/mlruns"
        if args.mirror:
            uri = f"s3://{os.environ['S3_BUCKET_NAME']}/tracking-{uuid.uuid4().hex}"
        tracker = Tracker(uri, "bench", "run", {}, {}, Path(folder) / "mlflow.json")
        assert tracker.run_id
        at, calls = 0, []
        clock = time.pthread_getcpuclockid(next(t.ident for t in threading.enumerate() if t.name == "tracking") or 0)

        def block(logged: bool, steps: int) -> float:
            """Seconds of a step, over so many."""
            nonlocal at
            time.sleep(3)  # what the block before left to send is sent
            began = time.perf_counter()
            for _ in range(steps):
                step()
                at += 1
                if logged:
                    called = time.perf_counter()
                    tracker.log(at, {f"figure_{n}": at / (n + 1) for n in range(FIGURES)})
                    calls.append(time.perf_counter() - called)
            return (time.perf_counter() - began) / steps

        steps = max(int(args.seconds / block(False, 10)), 5)
        on: list[float] = []
        off: list[float] = []
        before = time.clock_gettime(clock)
        for pair in range(args.pairs):
            for logged in (True, False) if pair % 2 else (False, True):
                (on if logged else off).append(block(logged, steps))
        time.sleep(3)
        thread = (time.clock_gettime(clock) - before) / len(calls)
        tracker.finish()
        middle, low, high = ratio(on, off)
        print(machine())
        print(f"{steps} steps a block, {1000 * statistics.median(off):.1f} ms a step, {FIGURES} figures, {uri[:4]}")
        print(f"logged / not logged: {middle:.4f} ({low:.4f} to {high:.4f}) over {args.pairs} pairs")
        share = (thread + statistics.median(calls)) / statistics.median(off)
        print(
            f"the call {1e6 * statistics.median(calls):.0f} us, the thread {1e3 * thread:.1f} ms: {share:.2%} of a step"
        )
        print(f"failures {tracker.failures}, lost {tracker.lost}")


if __name__ == "__main__":
    main()
