"""Tokens a second of a whole training step: ours, with one head and four, against others' ways to the same model.

    OMP_NUM_THREADS=1 python benchmarks/train.py [--lengths 256 512 1024 2048] [--pairs 5]
    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/train.py
    … benchmarks/train.py --profile 512    where the time of our step goes

A step: batch, forward, backward, clipping, AdamW; a row of one document a rank; no recomputation. One rank shards
nothing, two share the model through FSDP2. "transformers" is `LlamaForCausalLM` in the plainest loop, with one head: as
much work as our line with one head, and less than four heads' by the ratio of operations that is printed. "naive" is
our own model with all logits `[B, S, H, V]` at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pairs import interleave, machine, ratio
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.config import Config, Recipe, load_pair
from wmtp.data import Batches, pack
from wmtp.meter import flops_per_token
from wmtp.model import LMHead, ModelSpec, Weighing
from wmtp.objective import weighted_loss
from wmtp.optim import adamw
from wmtp.ranks import Place
from wmtp.step import Weighting, clip_gradients, share_of, train_step
from wmtp.train import allocate, mesh_of, planned_model

ROOT = Path(__file__).parent.parent
SPEC = ModelSpec("hf", 4, 256, 5, 4, 4, 688, 32000)
ROWS = 1


class NaiveHead(LMHead):
    """All logits of all heads, alive until the backward."""

    def forward(
        self, hidden_bshd: Tensor, labels_bsh: Tensor, mask_bsh: Tensor, count: Tensor | int, weighing: Weighing
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_bshd, self.weight).float()
        labels = labels_bsh.masked_fill(~mask_bsh, -100).flatten()
        ce = F.cross_entropy(logits.flatten(0, -2), labels, reduction="none").view_as(labels_bsh)
        w = weighing.rule(ce.detach(), mask_bsh, **weighing.aligned)
        return weighted_loss(ce, w, mask_bsh, count=count), ce.detach(), w


def settings_of(heads: int, world: int) -> tuple[Config, Recipe]:
    sharded = str(world > 1).lower()
    sets = [
        f"model.heads={heads}",
        f"data.train.batch_size={ROWS}",
        f"launcher.resources.gpus={world}",
        f"devices.distributed.enabled={sharded}",
        f"devices.fsdp.enabled={sharded}",
        "devices.fsdp.activation_ckpt=false",
    ]
    files = (ROOT / "configs/config.local_minitest.yaml", ROOT / "tests/configs/recipe.baseline_mtp.yaml")
    return load_pair(*files, sets, env="minitest")


def ours(heads: int, batches: Batches, place: Place, naive: bool = False) -> Callable[[], float]:
    """The trainer's own step, on a model of its own; gives the loss."""
    config, recipe = settings_of(heads, place.world)
    weighting = Weighting(recipe)
    spec = replace(SPEC, heads=heads)
    model = planned_model(config, recipe, spec, weighting)
    if naive:
        with torch.device("meta"):
            model.lm_head = NaiveHead(spec.hidden, spec.vocab_size)
    allocate(model, config, mesh_of(config, place), place)
    _draw(model)
    model.train()
    optimizer = adamw(model, recipe)
    at = 0

    def step() -> float:
        nonlocal at
        share = share_of(batches, at, heads, ROWS, place)
        optimizer.zero_grad(set_to_none=True)
        seen = train_step(model, share, weighting, place)
        clip_gradients(model, recipe.optim.grad_clip)
        optimizer.step()
        weighting.remember(seen.excess)
        at += 1
        return seen.wmtp_loss

    return step


def peer(batches: Batches, place: Place) -> Callable[[], float]:
    """`LlamaForCausalLM` with as many layers as our trunk and one head."""
    config = LlamaConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden,
        intermediate_size=SPEC.intermediate,
        num_hidden_layers=SPEC.trunk_layers + 1,
        num_attention_heads=SPEC.n_heads,
        num_key_value_heads=SPEC.n_kv_heads,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if place.world > 1:
        for unit in [*model.model.layers, model.lm_head, model]:
            fully_shard(unit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    at = 0

    def step() -> float:
        nonlocal at
        mine = batches.global_batch(at).chunk(place.world)[place.rank]
        x = batches.take(mine)[0]
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at += 1
        return float(loss.detach())

    return step


def _draw(model: nn.Module) -> None:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)


def batches_of(length: int, world: int) -> Batches:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(SPEC.vocab_size, (8 * world, length), generator=g)
    return Batches(pack(x.tolist(), length, 2, True), ROWS * world, 0)


def compare(length: int, pairs: int, place: Place) -> None:
    """One length: all ways take turns; rank 0 prints their lines."""
    batches = batches_of(length, place.world)
    ways: dict[str, tuple[int, Callable[[], float]]] = {
        "ours": (SPEC.heads, ours(SPEC.heads, batches, place)),
        "ours, naive loss": (SPEC.heads, ours(SPEC.heads, batches, place, naive=True)),
        "ours, one head": (1, ours(1, batches, place)),
        "transformers, one head": (1, peer(batches, place)),
    }
    seconds = interleave({name: step for name, (_, step) in ways.items()}, pairs)
    if place.rank:
        return
    for name, (heads, _) in ways.items():
        spent = statistics.median(seconds[name])
        flops = flops_per_token(replace(SPEC, heads=heads), length)
        middle, low, high = ratio(seconds["ours" if heads > 1 else "ours, one head"], seconds[name])
        cells = [
            f"{place.world}",
            f"{length}",
            name,
            f"{flops / 1e6:.0f}",
            f"{spent:.2f}",
            f"{ROWS * place.world * length / spent:.0f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


# ---- where the time goes ---------------------------------------------------------------------------


def part_of(event: object) -> str:
    """What an operation is for, from its name, its shapes and what called it."""
    name, shapes = event.name, str(getattr(event, "input_shapes", ""))
    above, chain = event, name
    while above := getattr(above, "cpu_parent", None):
        chain += " < " + above.name
    if "Optimizer" in chain:
        return "AdamW"
    if any(word in chain for word in ("c10d::", "gloo:", "FSDP::", "fsdp::")):
        return "FSDP: collectives and copies"
    if "clip" in chain or "norm" in name:
        return "clipping"
    if "scaled_dot_product" in chain or "flash_attention" in chain:
        return "attention"
    vocabulary = str(SPEC.vocab_size) in shapes
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        return "products over the vocabulary" if vocabulary else "products of the layers"
    return "elementwise over the vocabulary" if vocabulary else "elementwise of the layers, embedding, and the rest"


def show_profile(length: int, steps: int, place: Place) -> None:
    """Share of our step by part, and the operations that take most. What no operation covers is Python and waiting."""
    step = ours(SPEC.heads, batches_of(length, place.world), place)
    step()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(steps):
            step()
    wall = (time.perf_counter() - began) / steps
    if place.rank:
        return
    parts: Counter[str] = Counter()
    operations: Counter[tuple[str, str]] = Counter()
    main_thread = Counter(e.thread for e in seen.events()).most_common(1)[0][0]
    for event in seen.events():
        if event.thread == main_thread:
            part = part_of(event)
            parts[part] += event.self_cpu_time_total / 1e6 / steps
            operations[part, event.name] += event.self_cpu_time_total / 1e6 / steps
    parts["Python, waiting"] = max(0.0, wall - sum(parts.values()))
    print(f"\n{place.world} rank(s), S {length}: {wall:.2f} s a step under the profiler\n")
    print("| part | seconds | share |\n| --- | --- | --- |")
    for part, spent in parts.most_common():
        print(f"| {part} | {spent:.3f} | {100 * spent / wall:.1f} % |")
    print("\n| operation | part | share |\n| --- | --- | --- |")
    for (part, name), spent in operations.most_common(14):
        print(f"| {name} | {part} | {100 * spent / wall:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", type=int, metavar="LENGTH")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = Place(torch.device("cpu"))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        place = Place(torch.device("cpu"), dist.get_world_size(), dist.get_rank())
    if place.rank == 0:
        print(f"{machine()}, torch {torch.__version__}, {place.world} rank(s) of one thread")
    if args.profile:
        show_profile(args.profile, 3, place)
    else:
        if place.rank == 0:
            print(
                "\n| ranks | S | way | MFLOP a token | seconds | tokens/s | our time / its (95 %) |\n"
                + "| --- " * 7
                + "|"
            )
        for length in args.lengths:
            compare(length, args.pairs, place)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
