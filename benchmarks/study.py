"""Planted truth: does the weight go where it is known to belong, and does it help?   `make study` repeats it.

    .venv/bin/python benchmarks/study.py [--seeds 6] [--steps 400]

Small models, the trainer's own step. (a) rho1: half of the tokens are noise that the reference knows to be hopeless;
noise should weigh less than signal, and the cross-entropy of held-out signal tokens after equal steps is compared with
the baseline's, paired by seed. (b) critic: one token earns the reward; the weight's peak should sit there. (c) a model
that equals the generator of its data should weigh all heads alike. What comes out is printed, also where an interval
touches zero.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from pairs import interval, machine
from test_objective import markov_weights

from wmtp.checkpoint import Checkpoints
from wmtp.config import Storage, load_pair
from wmtp.data import Batches, Rows, pack
from wmtp.heatmap import token_weights
from wmtp.model import ModelSpec, MTPModel
from wmtp.objective import align_next
from wmtp.optim import adamw, learning_rate
from wmtp.outcome import Stop
from wmtp.pretrain import pretrain_value_head
from wmtp.ranks import Place
from wmtp.scoring import zscored
from wmtp.step import Weighting, clip, micro_of, share_of, train_step

PLACE = Place(torch.device("cpu"))
SIGNAL, NOISE, FIRST = 32, 32, 3
LENGTH, ROWS, HEADS = 64, 16, 4
SPEC = ModelSpec("hf", HEADS, 64, 2, 4, 4, 128, FIRST + SIGNAL + NOISE)
RHO1 = {
    "baseline-mtp": ("baseline_mtp", []),
    "rho1 weighted, lambda 0.3 (as shipped)": ("rho1_wmtp", ["loss.lambda=0.3"]),
    "rho1 weighted, lambda 1": ("rho1_wmtp", ["loss.lambda=1.0"]),
    "rho1 token_skip 0.3, lambda 1": ("rho1_wmtp", ["loss.lambda=1.0", "rho1.selection_mode=token_skip"]),
}


# ---- (a) noise -----------------------------------------------------------------------------------


def noisy_rows(count: int, g: torch.Generator, chain: Tensor) -> tuple[Rows, Tensor, Tensor]:
    """Rows of one document each, the generator's own cross-entropy of each token, and which tokens are signal."""
    x = torch.zeros(count, LENGTH, dtype=torch.int64)
    ref, signal = torch.zeros(count, LENGTH), torch.rand(count, LENGTH, generator=g) < 0.5
    state = torch.randint(SIGNAL, (count,), generator=g)
    for t in range(LENGTH):
        following = torch.multinomial(chain[state], 1, generator=g).squeeze(1)
        noise = torch.randint(NOISE, (count,), generator=g)
        sure = -(0.5 * chain[state, following]).log()
        hopeless = torch.full((count,), 0.5 / NOISE).log().neg()
        x[:, t] = FIRST + torch.where(signal[:, t], following, SIGNAL + noise)
        ref[:, t] = torch.where(signal[:, t], sure.float(), hopeless) if t else 0
        state = torch.where(signal[:, t], following, state)
    return pack(x.tolist(), LENGTH, 2, False), ref, signal


@torch.no_grad()
def signal_ce(model: MTPModel, held: Batches, signal: Tensor) -> tuple[list[float], list[float]]:
    """Cross-entropy per head of held-out tokens that are signal, nats: as the model says it, and among signal tokens.

    A model that is told to care less for noise expects less of it, which alone lowers the first figure; the second is
    free of that: the logits of signal tokens are softmaxed among themselves.
    """
    model.eval()
    m = micro_of(held, torch.arange(len(held.rows)), HEADS, PLACE)
    own = align_next(signal, HEADS) & m.mask
    logits = model.lm_head.logits(model.hidden(m.x, m.document))
    among = torch.full((SPEC.vocab_size,), float("-inf"))
    among[FIRST : FIRST + SIGNAL] = 0
    model.train()
    found = []
    for shown in (logits, logits + among):
        losses = [cross_entropy(shown[..., k, :][own[..., k]], m.labels[..., k][own[..., k]]) for k in range(HEADS)]
        found.append([float(loss) for loss in losses])
    return found[0], found[1]


def noise_run(name: str, seed: int, steps: int) -> list[float]:
    """`signal_ce` of head 0 and of all heads, the same among signal, mean weight of noise and of signal labels."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    chain = torch.distributions.Dirichlet(torch.full((SIGNAL,), 0.05)).sample((SIGNAL,)).double().clamp(min=1e-6)
    chain /= chain.sum(-1, keepdim=True)
    rows, ref, signal = noisy_rows(ROWS * steps // 2, g, chain)
    held_rows, _, held_signal = noisy_rows(64, g, chain)
    algorithm, sets = RHO1[name]
    _, recipe = load_pair(
        ROOT / "configs/config.local_minitest.yaml",
        ROOT / f"tests/configs/recipe.{algorithm}.yaml",
        [*sets, "optim.lr=3e-3", f"train.max_steps={steps}"],
        env="minitest",
    )
    batches, weighting = Batches(rows, ROWS, seed), Weighting(recipe)
    model = MTPModel(SPEC).train()
    optimizer = adamw(model, recipe)
    told: dict[bool, list[float]] = {True: [], False: []}
    for n in range(steps):
        share = share_of(batches, n, HEADS, ROWS, PLACE, ref if weighting.needs_reference else None)
        optimizer.zero_grad(set_to_none=True)
        if n >= steps - 50:
            indices = batches.global_batch(n)
            m = share.micro[0]
            with torch.no_grad():
                out = model(m.x, m.document, m.labels, m.mask, 1, weighing=weighting.weighing(m))
                w = out.w_bsh
                if weighting.skips:
                    (w,) = weighting.skip_weights([m], [out.ce_bsh], PLACE)
            for k in range(HEADS):
                of = signal[indices][:, k + 1 :]
                for kind in (True, False):
                    told[kind].append(float(w[:, : LENGTH - k - 1, k][of == kind].mean()))
        seen = train_step(model, share, weighting, PLACE)
        clip(model.parameters(), recipe.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(n + 1, steps, recipe)
        optimizer.step()
        weighting.remember(seen.excess)
    said, among = signal_ce(model, Batches(held_rows, 1, 0), held_signal)
    weights = [statistics.mean(told[kind]) for kind in (False, True)]
    return [said[0], statistics.mean(said), among[0], statistics.mean(among), *weights]


def study_noise(seeds: int, steps: int) -> None:
    print(f"\n(a) noise: {steps} steps, {seeds} seeds; held-out signal tokens, nats; differences are paired (95 %)\n")
    print("| algorithm | head 0 | all heads | among signal: head 0 | all heads | weight of noise | of signal |")
    print("| --- " * 7 + "|")
    plain: list[list[float]] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for name in RHO1:
            found = list(pool.map(noise_run, [name] * seeds, range(seeds), [steps] * seeds))
            plain = plain or found
            cells = []
            for i in range(4):
                if name == "baseline-mtp":
                    cells.append(f"{statistics.mean(f[i] for f in found):.4f}")
                else:
                    cells.append(interval([f[i] - p[i] for f, p in zip(found, plain, strict=True)]))
            cells += [f"{statistics.mean(f[i] for f in found):.3f}" for i in (4, 5)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


# ---- (b) a reward that one token earns ---------------------------------------------------------------


def rewarded_rows(count: int, g: torch.Generator, prize: int) -> tuple[Rows, Tensor]:
    """One document a row; half of them hold the token ``prize`` once, and earn 1, the others 0."""
    documents, reward = [], []
    for _ in range(count):
        size = int(torch.randint(24, LENGTH, (1,), generator=g))
        document = torch.randint(FIRST, FIRST + SIGNAL, (size,), generator=g)
        earns = bool(torch.rand(1, generator=g) < 0.5)
        if earns:
            document[int(torch.randint(2, size - 2, (1,), generator=g))] = prize
        documents.append(document.tolist())
        reward.append(float(earns))
    rows = pack(documents, LENGTH, 2, False)
    return rows, rows.last_tokens() * torch.tensor(reward)[:, None]


def reward_run(seed: int, steps: int) -> list[tuple[float, float, float]]:
    """After stage 1 and after stage 2: `peaks` on held-out documents."""
    g, prize = torch.Generator().manual_seed(seed), FIRST + SIGNAL
    torch.manual_seed(seed)
    config, recipe = load_pair(
        ROOT / "configs/config.local_minitest.yaml",
        ROOT / "tests/configs/recipe.critic_wmtp.yaml",
        ["loss.lambda=1.0", "pretrain.lr=1e-2", f"pretrain.max_steps={steps}", "pretrain.num_epochs=99",
         "optim.lr=3e-4", "critic.value_lr=7.5e-4",  # as shipped, the head learns 2.5 times as fast as the trunk
         f"train.max_steps={steps}", f"data.train.batch_size={ROWS}", "log_interval=1000000",
         f"paths.checkpoints.save_interval={steps}"],
        env="minitest",
    )  # fmt: skip
    rows, raw = rewarded_rows(512, g, prize)
    held_rows, _ = rewarded_rows(128, g, prize)
    reward = zscored({"train": raw}, {"train": rows})["train"]
    batches, weighting = Batches(rows, ROWS, seed), Weighting(recipe)
    model = MTPModel(SPEC, value_head=True).train()
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder), None, keep_last=1, storage=Storage(retry_wait_s=0))
        pretrain_value_head(model, batches, reward, None, config, recipe, kept, PLACE, Stop(), {})
    found = [peaks(model, held_rows, weighting, prize)]
    optimizer = adamw(model, recipe)
    for n in range(steps // 4):
        share = share_of(batches, n, HEADS, ROWS, PLACE, reward)
        optimizer.zero_grad(set_to_none=True)
        train_step(model, share, weighting, PLACE)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        optimizer.step()
    return [*found, peaks(model, held_rows, weighting, prize)]


def peaks(model: MTPModel, held_rows: Rows, weighting: Weighting, prize: int) -> tuple[float, float, float]:
    """Share of prized documents whose weightiest token is the prize; mean weight of the prize, and of the others."""
    held, hits, at, elsewhere = Batches(held_rows, 1, 0), [], [], []
    for n in range(len(held_rows)):
        m = micro_of(held, torch.tensor([n]), HEADS, PLACE)
        where = (m.x[0] == prize).nonzero()
        if len(where):
            with torch.no_grad():
                out = model(m.x, m.document, m.labels, m.mask, 1, weighing=weighting.weighing(m))
            weights = torch.tensor(token_weights(out.w_bsh[0], m.mask[0])).nan_to_num(-1)
            place = int(where[0])
            hits.append(float(int(weights.argmax()) == place))
            at.append(float(weights[place]))
            others = weights[weights >= 0]
            elsewhere.append(float((others.sum() - weights[place]) / (len(others) - 1)))
    return statistics.mean(hits), statistics.mean(at), statistics.mean(elsewhere)


def study_reward(seeds: int, steps: int) -> None:
    found = [reward_run(seed, steps) for seed in range(seeds)]
    print(f"\n(b) one token earns the reward: {steps} steps of stage 1, {steps // 4} of stage 2, {seeds} seeds\n")
    print(
        "| seed | stage 1: weightiest is the prize | its weight | of the others | stage 2: the same | weight | others |"
    )
    print("| --- " * 7 + "|")
    averages = [tuple(statistics.mean(f[stage][i] for f in found) for i in range(3)) for stage in range(2)]
    for seed, stages in [*enumerate(found), ("mean", averages)]:
        cells = [f"{100 * hits:.0f} % | {at:.2f} | {others:.2f}" for hits, at, others in stages]
        print(f"| {seed} | {' | '.join(cells)} |")


# ---- (c) a perfect model -------------------------------------------------------------------------


def study_perfect(seeds: int) -> None:
    print(f"\n(c) a model that equals its generator, T 0.7, lambda 1, {seeds} chains: mean weight of each head\n")
    print("| chain | centred per head | raw excess |\n| --- | --- | --- |")
    for seed in range(seeds):
        shown = [" ".join(f"{w:.2f}" for w in markov_weights(seed, center=c)) for c in (True, False)]
        print(f"| {seed} | {shown[0]} | {shown[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, choices=range(5, 11))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", choices=["noise", "reward", "perfect"])
    args = parser.parse_args()
    began = time.monotonic()
    print(machine())
    parts: dict[str, Callable[[], None]] = {
        "noise": lambda: study_noise(args.seeds, args.steps),
        "reward": lambda: study_reward(args.seeds, args.steps),
        "perfect": lambda: study_perfect(args.seeds),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            part()
    print(f"\nstudy     done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
