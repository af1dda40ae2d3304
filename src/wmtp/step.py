"""One optimizer step: its micro-batches, the weights of the algorithm, forward and backward.

An algorithm is a function of `wmtp.objective` named in the registry: `rule(ce, mask, *, …) -> w`. Its keyword names say
what it needs: `ref_aligned` the scores of a reference model, `delta_aligned` a value head and rewards, `head_mean` the
running means; every other keyword is a setting of the recipe, by `wmtp.registry.KEYS`. Shape letters as in
`wmtp.objective`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from wmtp.config import Recipe, flat
from wmtp.data import Batches
from wmtp.model import Weighing
from wmtp.objective import (
    align_next,
    baseline_mtp,
    excess_score,
    gae_targets,
    head_excess_sums,
    make_labels,
    running_mean,
    token_skip_weights,
    weight_statistics,
    weight_sums,
)
from wmtp.ranks import Place
from wmtp.registry import KEYS, asked_by, trainer_registry


@dataclass(frozen=True)
class Micro:
    """Rows that go through the model together, on its device."""

    x: Tensor
    """`[B, S]` int64; so are `document` and, bool, `pad`."""
    document: Tensor
    pad: Tensor
    labels: Tensor
    """`[B, S, H]` int64; so is, bool, `mask`."""
    mask: Tensor
    score: Tensor | None
    """`[B, S]` float32: `ref_ce` of each token, or the reward at each document's last token; None without a scorer."""


@dataclass(frozen=True)
class Share:
    """What one rank does of a global batch, and the counts of the whole."""

    micro: list[Micro]
    count: Tensor
    """int64, on the device: valid labels of the global batch, at least 1."""
    tokens: int
    """Unpadded tokens of the global batch."""


def micro_of(batches: Batches, indices: Tensor, heads: int, place: Place, score_ns: Tensor | None = None) -> Micro:
    """The rows ``indices`` on this rank's device; ``score_ns`` is `[N, S]`, of all rows."""
    x, document, pad = batches.take(indices)
    labels, mask = make_labels(x, heads, document, pad)
    x, document, pad, labels, mask = (place.bring(t) for t in (x, document, pad, labels, mask))
    return Micro(x, document, pad, labels, mask, None if score_ns is None else place.bring(score_ns[indices]))


def share_of(
    batches: Batches, index: int, heads: int, rows: int, place: Place, score_ns: Tensor | None = None
) -> Share:
    """This rank's part of global batch ``index``, in micro-batches of ``rows``."""
    indices = batches.global_batch(index)
    x, document, pad = batches.take(indices)
    mask = make_labels(x, heads, document, pad)[1]
    takes = indices.chunk(place.world)[place.rank].split(rows)
    micro = [micro_of(batches, take, heads, place, score_ns) for take in takes]
    return Share(micro, place.bring(mask.sum().clamp(min=1)), int((~pad).sum()))


class Ahead:
    """Shares by number; while one is worked on, a thread makes the next."""

    def __init__(self, make: Callable[[int], Share]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._next: dict[int, Future[Share]] = {}

    def take(self, index: int) -> Share:
        """Share ``index``, waited for where it is not ready; share ``index + 1`` is begun."""
        found = self._next.pop(index, None) or self._pool.submit(self._make, index)
        self._next = {index + 1: self._pool.submit(self._make, index + 1)}
        return found.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Weighting:
    """An algorithm bound to its recipe, with what it remembers from step to step."""

    def __init__(self, recipe: Recipe) -> None:
        rule = trainer_registry.load(recipe.train.algo)
        keywords = asked_by(recipe.train.algo)
        values = flat(recipe.model_dump(by_alias=True))
        self.even = not keywords  # all tokens weigh alike
        self.needs_reference = "ref_aligned" in keywords
        self.needs_value = "delta_aligned" in keywords
        self.centred = "head_mean" in keywords and recipe.rho1.center == "head"
        self.skips = self.needs_reference and recipe.rho1.selection_mode == "token_skip"
        self.recipe, self.heads = recipe, recipe.model.heads
        self._rule = partial(rule, **{name: values[KEYS[name]] for name in keywords & KEYS.keys()})
        self._takes_mean = "head_mean" in keywords
        self.mean_h = torch.zeros(self.heads, dtype=torch.float64)
        self.mass_h = torch.zeros(self.heads, dtype=torch.float64)

    @property
    def unweighted(self) -> bool:
        """A head has nothing to be centred with yet: the first step, or longer where documents are very short.

        Uncentred, that head's excess would weigh more than all the others'.
        """
        return self.centred and not bool(self.mass_h.all())

    def head_mean(self, device: torch.device) -> Tensor | None:
        """`[H]` float32: the running mean of each head's excess; 0 for a head that has none."""
        if not self.centred:
            return None
        return (self.mean_h / self.mass_h.clamp(min=1e-300)).float().to(device)

    def weighing(self, micro: Micro, fixed: Tensor | None = None) -> Weighing:
        """What the model's loss needs to weigh ``micro``; ``fixed`` are weights that were chosen before."""
        if fixed is not None:
            return Weighing(_as_given, {"given": fixed})
        if self.unweighted:
            return Weighing(baseline_mtp)
        rule = self._rule
        if self._takes_mean:
            rule = partial(rule, head_mean=self.head_mean(micro.x.device))
        if self.needs_reference:
            assert micro.score is not None
            return Weighing(rule, {"ref_aligned": align_next(micro.score, self.heads)})
        return Weighing(rule, discount_lambda=self.recipe.critic.discount_lambda if self.needs_value else None)

    def skip_weights(self, micro: list[Micro], ce: list[Tensor], place: Place) -> list[Tensor]:
        """`token_skip`: weights of this rank's micro-batches from the scores of the global batch. Collective."""
        mean = self.head_mean(place.device)
        aligned = [align_next(m.score, self.heads) for m in micro if m.score is not None]
        least = self.recipe.rho1.min_ce_diff
        scores = [excess_score(c, a, head_mean=mean, min_ce_diff=least) for c, a in zip(ce, aligned, strict=True)]
        w = token_skip_weights(
            torch.cat(scores),
            torch.cat([m.mask for m in micro]),
            skip_percentile=self.recipe.rho1.skip_threshold_percentile,
            mix=self.recipe.loss.lambda_,
            group=place.group,
        )
        return list(w.split([len(m.x) for m in micro]))

    def excess_sums(self, micro: Micro, ce: Tensor) -> Tensor:
        """`[2, H]` float64: sums and counts of the excess, for `remember`; zeros where nothing is centred."""
        if not self.centred or micro.score is None:
            return torch.zeros(2, self.heads, dtype=torch.float64)
        return head_excess_sums(_wide(ce), align_next(_wide(micro.score), self.heads), micro.mask.to(_wide(ce).device))

    def remember(self, sums: Tensor) -> None:
        """Take in the excess of a step, `[2, H]` over the global batch."""
        if self.centred:
            decay = self.recipe.rho1.center_decay
            self.mean_h, self.mass_h = running_mean(self.mean_h, self.mass_h, sums, decay)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON keeps it exactly."""
        return {"mean": self.mean_h.tolist(), "mass": self.mass_h.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean_h = torch.tensor(state["mean"], dtype=torch.float64)
        self.mass_h = torch.tensor(state["mass"], dtype=torch.float64)


def _as_given(ce: Tensor, mask: Tensor, *, given: Tensor) -> Tensor:
    return given


def _wide(values: Tensor) -> Tensor:
    """Somewhere that has float64: MPS has none."""
    return values.cpu() if values.device.type == "mps" else values


@dataclass(frozen=True)
class StepResult:
    """What a step's forwards gave, over the global batch once `reduced`."""

    wmtp_loss: float
    value_loss: float
    weights: dict[str, Tensor]
    """Sums for `objective.weight_statistics` and `figures_of`."""
    excess: Tensor
    """`[2, H]`, for `Weighting.remember`."""
    stop: bool


def figures_of(seen: StepResult) -> dict[str, float]:
    """What is watched of a step: cross-entropy per head (unweighted, in nats), statistics of the weights."""
    sums = seen.weights
    counts = sums["head_count"].clamp(min=1)
    return {
        **{f"ce_head_{k}": float(ce) for k, ce in enumerate(sums["ce"] / counts)},
        "w_mean": float(sums["head_sum"].sum() / counts.sum()),
        "w_min": float(sums["ends"][0]),
        "w_max": float(sums["ends"][1]),
        **weight_statistics(sums),
    }


def value_error(value_bs: Tensor, micro: Micro, recipe: Recipe, tokens: int) -> Tensor:
    """Mean squared error of the value head over the unpadded tokens of the global batch (this rank's share of it)."""
    assert micro.score is not None
    target_bs = gae_targets(
        micro.score,
        value_bs,
        micro.document,
        micro.pad,
        gamma=recipe.critic.gamma,
        gae_lambda=recipe.critic.gae_lambda,
    )
    return (value_bs - target_bs).square().masked_fill(micro.pad, 0).sum() / max(tokens, 1)


def last_of(model: nn.Module, last: bool) -> None:
    """Whether gradients go over the ranks with the backward that follows."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def clip_gradients(model: nn.Module, most: float) -> float:
    """Bound the norm of the trunk's gradient and, apart from it, the value head's. Collective.

    Returns the trunk's norm before, or the value head's where that is not finite.

    Apart, since the value loss has a scale of its own: one norm would let either starve the other.
    """
    named = list(model.named_parameters())
    head = [p for n, p in named if n.startswith("value_head.")]
    own = clip(head, most) if head else 0.0
    norm = clip([p for n, p in named if not n.startswith("value_head.")], most)
    return norm if math.isfinite(own) else own


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients to a norm of at most ``most`` (0: leave them); returns the norm before. Collective."""
    norm = nn.utils.clip_grad_norm_(parameters, most if most > 0 else math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def first_pass(model: nn.Module, share: Share, place: Place) -> list[Tensor]:
    """`[B, S, H]` cross-entropies of each micro-batch, for weights that need the global batch."""
    with torch.no_grad(), place.autocast():
        return [model(m.x, m.document, m.labels, m.mask, share.count).ce_bsh for m in share.micro]


def accumulate(
    model: nn.Module, share: Share, weighting: Weighting, place: Place, fixed: list[Tensor | None]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Forward and backward of this rank's micro-batches.

    Gives the two losses, the sums of `objective.weight_sums` and `Weighting.excess_sums`, of this rank's share.
    """
    recipe = weighting.recipe
    losses = torch.zeros(2, dtype=torch.float32, device=place.device)
    sums: dict[str, Tensor] = {}
    excess = torch.zeros(2, weighting.heads, dtype=torch.float64)
    ends: list[Tensor] = []
    for i, m in enumerate(share.micro):
        last_of(model, i == len(share.micro) - 1)
        with place.autocast():
            out = model(m.x, m.document, m.labels, m.mask, share.count, weighing=weighting.weighing(m, fixed[i]))
        loss = out.loss
        losses[0] += loss.detach()
        if weighting.needs_value:
            error = value_error(out.value_bs, m, recipe, share.tokens)
            losses[1] += error.detach()
            loss = loss + recipe.critic.auxiliary_loss_coef * error
        (loss * place.world).backward()  # FSDP averages over the ranks; the objective is a sum
        w, ce = _wide(out.w_bsh), _wide(out.ce_bsh)
        mask = m.mask.to(w.device)
        found = weight_sums(w, mask) | {"ce": ce.double().masked_fill(~mask, 0).sum((0, 1))}
        for name, part in found.items():
            sums[name] = sums[name] + part if name in sums else part
        ends.append(torch.stack([w.masked_fill(~mask, math.inf).amin(), w.masked_fill(~mask, -math.inf).amax()]))
        excess = excess + weighting.excess_sums(m, out.ce_bsh).to(excess.device)
    # Least and greatest weight: each rank has a column of its own in the sum over the ranks.
    ends_2 = torch.stack(ends)
    sums["ends"] = torch.zeros(2, place.world, dtype=torch.float64, device=ends_2.device)
    sums["ends"][:, place.rank] = torch.stack([ends_2[:, 0].amin(), ends_2[:, 1].amax()]).double()
    return losses, sums, excess


def train_step(
    model: nn.Module, share: Share, weighting: Weighting, place: Place, stop: Callable[[], object] = lambda: None
) -> StepResult:
    """Forward and backward of one global batch; the gradients are those of `L` (and of the value head's loss).

    Every rank calls, with its share; what ``stop`` says at the end travels with the sums, so that all ranks stop after
    the same step.
    """
    fixed: list[Tensor | None] = [None] * len(share.micro)
    if weighting.skips and not weighting.unweighted:
        fixed = [*weighting.skip_weights(share.micro, first_pass(model, share, place), place)]
    losses, sums, excess = accumulate(model, share, weighting, place, fixed)
    # One sum over the ranks for everything.
    flat = torch.cat(
        [losses.cpu().double(), torch.tensor([float(bool(stop()))]), excess.flatten().cpu()]
        + [s.double().flatten().cpu() for s in sums.values()]
    )
    flat = place.total(flat)
    at = 3 + excess.numel()
    for name, part in sums.items():
        sums[name] = flat[at : at + part.numel()].view(part.shape)
        at += part.numel()
    sums["ends"] = torch.stack([sums["ends"][0].amin(), sums["ends"][1].amax()])
    return StepResult(
        wmtp_loss=float(flat[0]),
        value_loss=float(flat[1]),
        weights=sums,
        excess=flat[3 : 3 + excess.numel()].view(2, -1),
        stop=bool(flat[2]),
    )
