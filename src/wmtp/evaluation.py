"""What is measured on held-out rows: cross-entropy per head, the value head's error, and where the weight goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from wmtp.checkpoint import Checkpoints
from wmtp.config import Recipe
from wmtp.data import Batches, Tokenizer
from wmtp.heatmap import Example, shown_texts, token_weights, write_heatmap
from wmtp.model import MTPModel
from wmtp.outcome import say
from wmtp.ranks import Place
from wmtp.step import Micro, Weighting, micro_of, value_error
from wmtp.tracking import Tracker


def _held_rows(batches: Batches, recipe: Recipe, place: Place, score_ns: Tensor | None) -> Iterator[Micro]:
    """The first `eval.max_batches` batches, dealt to the ranks: the same rows for every number of ranks.

    A rank that has none left gets one row that is all padding, because sharded forwards are collective.
    """
    size, heads = recipe.data.eval.batch_size, recipe.model.heads
    wanted = torch.arange(min(len(batches.rows), size * recipe.eval.max_batches))
    mine = wanted[place.rank :: place.world]
    for i in range(math.ceil(math.ceil(len(wanted) / place.world) / size)):
        indices = mine[i * size : (i + 1) * size]
        empty = len(indices) == 0
        m = micro_of(batches, wanted[:1] if empty else indices, heads, place, score_ns)
        if empty:
            m = replace(m, pad=torch.ones_like(m.pad), labels=torch.full_like(m.labels, -100), mask=m.mask & False)
        yield m


@torch.no_grad()
def held_out_ce(model: nn.Module, batches: Batches, recipe: Recipe, place: Place) -> list[float]:
    """Unweighted cross-entropy of each head, nats. Collective."""
    model.eval()
    sums = torch.zeros(2, recipe.model.heads, dtype=torch.float64)
    for m in _held_rows(batches, recipe, place, None):
        with place.autocast():
            out = model(m.x, m.document, m.labels, m.mask, m.mask.sum().clamp(min=1))
        sums[0] += out.ce_bsh.cpu().double().sum(dim=(0, 1))
        sums[1] += m.mask.cpu().double().sum(dim=(0, 1))
    model.train()
    sums = place.total(sums)
    return [float(v) for v in sums[0] / sums[1].clamp(min=1)]


@torch.no_grad()
def held_out_value(model: nn.Module, batches: Batches, recipe: Recipe, place: Place, score_ns: Tensor) -> float:
    """Mean squared error of the value head against its targets, over unpadded tokens. Collective."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for m in _held_rows(batches, recipe, place, score_ns):
        with place.autocast():
            value_bs = model(m.x, m.document).value_bs
        sums[0] += float(value_error(value_bs, m, recipe, 1))
        sums[1] += int((~m.pad).sum())
    model.train()
    sums = place.total(sums)
    return float(sums[0] / sums[1].clamp(min=1))


@torch.no_grad()
def weigh_documents(
    model: nn.Module, batches: Batches, weighting: Weighting, place: Place, score_ns: Tensor | None, most: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens `[s]`, weights `[s, H]` and mask `[s, H]` of the first ``most`` held-out documents. Collective.

    Every rank forwards the same rows, one after another; under `token_skip` they are the batch.
    """
    model.eval()
    micro, outs = [], []
    for n in range(min(len(batches.rows), most)):
        m = micro_of(batches, torch.tensor([n]), weighting.heads, place, score_ns)
        micro.append(m)
        count = m.mask.sum().clamp(min=1)
        with place.autocast():
            outs.append(model(m.x, m.document, m.labels, m.mask, count, weighing=weighting.weighing(m)))
    model.train()
    w = [out.w_bsh for out in outs]
    if weighting.skips and not weighting.unweighted:
        w = weighting.skip_weights(micro, [out.ce_bsh for out in outs], place)
    found = []
    for m, w_bsh in zip(micro, w, strict=True):
        for number in m.document[m.document >= 0].unique().tolist():
            own = m.document[0] == number
            found.append((m.x[0, own].cpu(), w_bsh[0, own].cpu(), m.mask[0, own].cpu()))
    return found[:most]


def show_weights(
    model: MTPModel,
    held: Batches,
    weighting: Weighting,
    tokenizer: Tokenizer,
    score_ns: Tensor | None,
    checkpoints: Checkpoints,
    tracker: Tracker,
    title: str,
    place: Place,
) -> None:
    """Three held-out documents with the weights of their tokens, as ``weights/`` beside the checkpoints. Collective."""
    found = weigh_documents(model, held, weighting, place, score_ns, most=3)
    if place.rank == 0:
        examples = [
            Example(
                f"held-out document {n}: {len(ids)} tokens",
                shown_texts(ids.tolist(), tokenizer),
                token_weights(w, mask),
            )
            for n, (ids, w, mask) in enumerate(found, 1)
        ]
        staging, final = checkpoints.folder / ".step-weights", checkpoints.folder / "weights"
        staging.mkdir(exist_ok=True)
        write_heatmap(staging / "weights", examples, f"Token weights: {title}")
        checkpoints.finish(staging, final)
        checkpoints.upload(final)
        for file in ("weights.html", "weights.png"):
            tracker.artifact(final / file)
        say(f"weights   {final / 'weights.html'}, and as a picture: weights.png")


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def shown(values: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)
