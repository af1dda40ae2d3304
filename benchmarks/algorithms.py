"""What the weights cost: a step of each algorithm over a baseline step, with kept scores; and what scoring costs.

    .venv/bin/python benchmarks/algorithms.py [--pairs 9] [--length 512] [--rows 4]

One process, a whole optimizer step (batch, forward, backward, clipping, AdamW). Random numbers stand for kept scores:
they cost the same. Target: a step at most 1.05 of baseline's (not of
`token_skip`, which forwards twice by design).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pairs import interleave, machine, ratio

from wmtp.config import load_recipe
from wmtp.data import Batches, pack
from wmtp.model import ModelSpec, MTPModel, RewardModel
from wmtp.objective import weight_statistics
from wmtp.optim import adamw
from wmtp.ranks import Place
from wmtp.step import Weighting, clip, share_of, train_step

CONFIGS = Path(__file__).parent.parent / "tests" / "configs"
PLACE = Place(torch.device("cpu"))
SPEC = ModelSpec("hf", 4, 512, 6, 8, 8, 1376, 32000)
RUNS = {
    "baseline-mtp": ("baseline_mtp", []),
    "rho1-wmtp weighted": ("rho1_wmtp", []),
    "rho1-wmtp token_skip": ("rho1_wmtp", ["rho1.selection_mode=token_skip"]),
    "critic-wmtp": ("critic_wmtp", []),
}


def batches_of(length: int, rows: int) -> Batches:
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(length // 8, length // 2, (rows * 24,), generator=g).tolist()
    documents = [torch.randint(SPEC.vocab_size, (n,), generator=g).tolist() for n in sizes]
    return Batches(pack(documents, length, 2, True), rows, 0)


def stepper(name: str, batches: Batches, rows: int) -> Callable[[], object]:
    """One optimizer step a call, on a model of its own."""
    recipe = load_recipe(CONFIGS / f"recipe.{RUNS[name][0]}.yaml", RUNS[name][1])
    torch.manual_seed(0)
    weighting = Weighting(recipe)
    model = MTPModel(SPEC, value_head=weighting.needs_value).train()
    optimizer = adamw(model, recipe)
    trunk = [p for n, p in model.named_parameters() if not n.startswith("value_head.")]
    shape, score = batches.rows.shape, None
    if weighting.needs_reference:
        score = 10 * torch.rand(shape)
    elif weighting.needs_value:
        score = torch.randn(shape) * batches.rows.last_tokens()
    at = 0

    def step() -> object:
        nonlocal at
        share = share_of(batches, at, SPEC.heads, rows, PLACE, score)
        optimizer.zero_grad(set_to_none=True)
        seen = train_step(model, share, weighting, PLACE)
        clip(trunk, 1.0)
        if model.value_head is not None:
            clip(model.value_head.parameters(), 1.0)
        optimizer.step()
        weighting.remember(seen.excess)
        at += 1
        return weight_statistics(seen.weights)

    return step


@torch.no_grad()
def seconds_per_row(model: torch.nn.Module, batches: Batches, rows: int, rounds: int) -> float:
    """Median seconds of a row through a scorer."""
    x, document, pad = batches.take(torch.arange(rows))
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        if isinstance(model, RewardModel):
            model(x, document, torch.full((rows,), x.shape[1] - 1))
        else:
            labels = torch.nn.functional.pad(x[:, 1:], (0, 1))[..., None]
            model(x, document, labels, ~pad[..., None], 1)
        found.append((time.perf_counter() - began) / rows)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    args = parser.parse_args()
    batches = batches_of(args.length, args.rows)
    millions = sum(p.numel() for p in MTPModel(SPEC).parameters()) / 1e6
    print(f"{machine()}, torch {torch.__version__}, {millions:.0f} M parameters, {args.rows} rows of {args.length}\n")
    seconds = interleave({name: stepper(name, batches, args.rows) for name in RUNS}, args.pairs)
    print("| step of | seconds | over baseline's (95 %) |\n| --- | --- | --- |")
    for name in RUNS:
        middle, low, high = ratio(seconds[name], seconds["baseline-mtp"])
        print(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True
        )
    row = statistics.median(seconds["baseline-mtp"]) / args.rows
    one = ModelSpec("hf", 1, 512, 9, 8, 8, 1376, 32000)  # a scorer of as many layers
    print("\n| scorer of as many layers | seconds a row | share of a run of 3 epochs |\n| --- | --- | --- |")
    for name, model in (("reference", MTPModel(one)), ("reward", RewardModel(one))):
        spent = seconds_per_row(model.eval(), batches, args.rows, args.pairs)
        print(f"| {name} | {spent:.3f} | {100 * spent / (spent + 3 * row):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
