"""What a checkpoint costs the training: seconds that it stands still, written beside it against written in its way.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/save.py [--pairs 9]

A step is a forward and backward of a Llama of 64 M parameters under FSDP2, and AdamW. Steps after no save, after
`torch.distributed.checkpoint.save` and after `wmtp.checkpoint`'s take turns. A stall is the call, and the wait of the
next optimizer step for the copying. On a CPU the writing takes cores from the step beside it; a GPU's step has its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pairs import machine, ratio
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from wmtp.checkpoint import Checkpoints
from wmtp.config import Storage
from wmtp.model import ModelSpec, MTPModel, shard_units

SPEC = ModelSpec("hf", 4, 512, 6, 8, 8, 1376, 32000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = MTPModel(SPEC)
    for unit in [*shard_units(model), model]:
        fully_shard(unit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory() as own:
        place: list[str] = [own]
        dist.broadcast_object_list(place, src=0)
        shelf = Checkpoints(Path(place[0]) / "ours", None, keep_last=1, storage=Storage(retry_wait_s=0))
        x = torch.randint(0, SPEC.vocab_size, (1, 128))
        labels, mask = x[..., None].expand(1, 128, SPEC.heads), torch.ones(1, 128, SPEC.heads, dtype=torch.bool)

        waited = [0.0]

        def step() -> None:
            out = model(x, torch.zeros_like(x), labels, mask, mask.sum())
            out.loss.backward()
            began = time.perf_counter()
            shelf.staged()
            waited[0] = time.perf_counter() - began
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def timed(save: Callable[[], object]) -> tuple[float, float]:
            """Seconds that a save stands in the way, and of the step after it less these."""
            dist.barrier()
            began = time.perf_counter()
            save()
            called = time.perf_counter()
            step()
            return called - began + waited[0], time.perf_counter() - called - waited[0]

        def blocking(n: int) -> None:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=Path(place[0]) / f"theirs-{n}")

        step()
        found: dict[str, list[tuple[float, float]]] = {"none": [], "blocking": [], "beside": []}
        for n in range(pairs + 1):
            rounds = [
                ("none", timed(lambda: None)),
                ("blocking", timed(lambda n=n: blocking(n))),
                ("beside", timed(lambda n=n: shelf.save(n + 1, model, optimizer, {}))),
            ]
            shelf.settle()
            if n:  # the first of each makes buffers
                for way, figures in rounds:
                    found[way].append(figures)
        shelf.close()
    if dist.get_rank() == 0:
        print("| way | stall, s | the step after it, s |\n| --- | --- | --- |")
        for way, figures in found.items():
            stall, after = (statistics.median(some) for some in zip(*figures, strict=True))
            print(f"| {way} | {stall:.3f} | {after:.2f} |")
        middle, low, high = ratio(*([stall for stall, _ in found[way]] for way in ("beside", "blocking")))
        print(f"beside / blocking, {pairs} pairs: {middle:.3f} ({low:.3f} to {high:.3f}); {machine()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
