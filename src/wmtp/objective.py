"""The WMTP objective: labels, scores, weights and loss as pure functions of tensors.

Shape letters: B rows of a batch, S positions of a row, H heads (counted from 0), so `ce_bsh` is
`[B, S, H]`. Head `k` at position `t` predicts token `t+k+1`. A `mask` is True where a head has
something to predict. Everything is in nats; nothing here reads a configuration or a global.

Sources: Gloeckle et al. 2024 (multi-token prediction), Lin et al. 2024 (Rho-1, excess loss),
Schulman et al. 2015 (generalised advantage estimation).

What lies outside a mask never reaches a result, whatever it holds. A NaN inside a mask is not
hidden: it comes out as NaN, so that the caller's check for a finite loss sees it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""Label of an entry that is not predicted (the default `ignore_index` of torch)."""


def make_labels(
    x_bs: Tensor,
    heads: int,
    document_bs: Tensor | None = None,
    pad_bs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels `[B, S, H]` int64 (`x[b, t+k+1]`, else -100) and their mask `[B, S, H]` bool.

    An entry is masked where `t+k+1` leaves the row, where `t` or `t+k+1` is padding (`pad_bs`
    True), and where the two belong to different documents (`document_bs` int ids).
    """
    labels_bsh = align_next(x_bs.long(), heads)
    inside = torch.ones_like(x_bs, dtype=torch.bool)
    mask_bsh = align_next(inside if pad_bs is None else ~pad_bs, heads)
    if pad_bs is not None:
        mask_bsh = mask_bsh & ~pad_bs.unsqueeze(-1)
    if document_bs is not None:
        mask_bsh = mask_bsh & (align_next(document_bs, heads) == document_bs.unsqueeze(-1))
    return labels_bsh.masked_fill(~mask_bsh, IGNORED), mask_bsh


def align_next(values_bs: Tensor, heads: int) -> Tensor:
    """Per-token values `[B, S]` laid where they are predicted: `[B, S, H]`, `values[b, t+k+1]`.

    Beyond the row it is 0 (False for bool). The dtype stays.
    """
    rows, length = values_bs.shape
    out_bsh = values_bs.new_zeros(rows, length, heads)
    for k in range(min(heads, length - 1)):
        out_bsh[:, : length - k - 1, k] = values_bs[:, k + 1 :]
    return out_bsh


def excess_score(
    ce: Tensor,
    ref_aligned: Tensor,
    *,
    head_mean: Tensor | None = None,
    min_ce_diff: float = 0.0,
) -> Tensor:
    """Signed excess over the reference (Rho-1), `[..., H]`: high where the model is worse.

    `head_mean` `[H]` is taken off per head. What is then smaller in size than `min_ce_diff`
    becomes 0.
    """
    score = ce - ref_aligned
    if head_mean is not None:
        score = score - head_mean
    return torch.where(score.abs() < min_ce_diff, torch.zeros_like(score), score)


def value_gain(value_bs: Tensor, discount_lambda: float) -> Tensor:
    """The value that each token adds, `[B, S]`: `V[j] - discount_lambda * V[j-1]`.

    Column 0 is `V[:, 0]`. A document's first token mixes in its neighbour's value, which no
    mask of `make_labels` lets through: no head predicts a document's first token.
    """
    before_bs = torch.nn.functional.pad(value_bs[:, :-1], (1, 0))
    return value_bs - discount_lambda * before_bs


@torch.no_grad()
def weights_from_scores(
    score: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    epsilon: float,
    max_weight: float,
    mix: float,
) -> Tensor:
    """Weights `[..., H]` from scores, detached, 0 outside `mask`, mean 1 over each position.

    Softmax over the valid heads at `temperature`, times their number, clipped to
    `[epsilon, max_weight]`, divided by the mean over the valid heads, mixed with uniform by
    `mix` (0 gives ones exactly). Raises ValueError for settings that cannot have a mean of 1.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
    if max_weight <= 0 or not 0 <= epsilon <= max_weight:
        raise ValueError(
            f"epsilon is {epsilon} and max_weight {max_weight}, "
            "must be 0 <= epsilon <= max_weight with max_weight above 0"
        )
    score = _at_least_float32(score)
    valid = mask.sum(-1, keepdim=True).clamp(min=1).to(score.dtype)
    top = score.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
    # The top is taken off before the division, so that a small temperature cannot overflow; a
    # position without a valid head has no top, and its entries are blanked by `_inside`.
    powers = _inside(mask, ((score - top) / temperature).exp())
    total = powers.sum(-1, keepdim=True)
    w = powers / torch.where(total == 0, torch.ones_like(total), total) * valid
    w = _inside(mask, w.clamp(epsilon, max_weight))
    mean = w.sum(-1, keepdim=True) / valid
    w = w / torch.where(mean == 0, torch.ones_like(mean), mean)
    return _inside(mask, 1 + mix * (w - 1))


@torch.no_grad()
def token_skip_weights(
    score_bsh: Tensor,
    mask_bsh: Tensor,
    *,
    skip_percentile: float,
    mix: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weights `[B, S, H]` that keep the highest scores of the global batch, detached.

    `n_keep = max(1, round((1 - skip_percentile) * N))` of the N valid entries are kept, with
    whatever ties with the last of them. Kept entries are `N / kept`, others 0, then mixed with
    uniform by `mix`. `score_bsh` holds all micro-batches of this rank; every rank of `group` must
    call, with any size, empty included. Without `group` this process is the whole batch.
    Half-way counts round to even. Raises ValueError for a percentile outside `[0, 1]`.
    """
    if not 0 <= skip_percentile <= 1:
        raise ValueError(f"skip_percentile is {skip_percentile}, must be between 0 and 1")
    score_bsh = _at_least_float32(score_bsh)
    everything = _gather(score_bsh[mask_bsh], group)
    count = everything.numel()
    if count == 0:
        return torch.zeros_like(score_bsh)
    n_keep = min(count, max(1, round((1 - skip_percentile) * count)))
    threshold = everything.topk(n_keep).values[-1]
    share = (everything >= threshold).sum().to(score_bsh.dtype) / count
    w_bsh = (score_bsh >= threshold).to(score_bsh.dtype) / share
    return _inside(mask_bsh, 1 + mix * (w_bsh - 1))


@torch.no_grad()
def gae_targets(
    reward_bs: Tensor,
    value_bs: Tensor,
    document_bs: Tensor | None = None,
    pad_bs: Tensor | None = None,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Targets of the value head `[B, S]`, detached, 0 on padding: `A_t + V_t` per document.

    `td_t = r_t + gamma V_{t+1} - V_t`, `A_t = sum_l (gamma gae_lambda)^l td_{t+l}`
    (Schulman et al. 2015), with V and A beyond a document 0. Without `document_bs` a row is one
    document. `reward_bs` holds R at each document's last token and 0 elsewhere.
    """
    value_bs = _at_least_float32(value_bs)
    real_bs = torch.ones_like(value_bs, dtype=torch.bool) if pad_bs is None else ~pad_bs
    value_bs = _inside(real_bs, value_bs)
    reward_bs = _inside(real_bs, reward_bs.to(value_bs.dtype))
    goes_on_bs = torch.zeros_like(real_bs)  # the next token is of the same document
    goes_on_bs[:, :-1] = real_bs[:, :-1] & real_bs[:, 1:]
    if document_bs is not None:
        goes_on_bs[:, :-1] &= document_bs[:, :-1] == document_bs[:, 1:]
    next_value_bs = _inside(goes_on_bs, torch.nn.functional.pad(value_bs[:, 1:], (0, 1)))
    td_bs = reward_bs + gamma * next_value_bs - value_bs
    # `A_t = td_t + c_t A_{t+1}` as a scan: each round doubles how far ahead a position sees. A loop over positions
    # would be thousands of small kernels.
    advantage_bs, carried_bs, reach = td_bs, gamma * gae_lambda * goes_on_bs.to(td_bs.dtype), 1
    while reach < td_bs.shape[1]:
        ahead_bs = torch.nn.functional.pad(advantage_bs[:, reach:], (0, reach))
        advantage_bs = advantage_bs + carried_bs * ahead_bs
        carried_bs = carried_bs * torch.nn.functional.pad(carried_bs[:, reach:], (0, reach))
        reach *= 2
    return _inside(real_bs, advantage_bs + value_bs)


def weighted_loss(ce: Tensor, w: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Scalar `sum(w * ce over mask) / count`; no gradient reaches `w`.

    `count` is `mask.sum()` unless given, and at least 1. With the count of the global batch each
    rank returns its share, and the sum over ranks is the loss.
    """
    total = (_inside(mask, ce) * _inside(mask, w.detach())).sum()
    if count is None:
        count = mask.sum()
    if isinstance(count, Tensor):
        return total / count.to(total.device).clamp(min=1)
    return total / max(count, 1)


@torch.no_grad()
def weight_sums(w: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Float64 sums of the weights that add up over micro-batches and ranks, for `weight_statistics`."""
    w, valid = _inside(mask, w).double(), mask.sum(-1)
    total = w.sum(-1, keepdim=True)
    share = w / torch.where(total == 0, torch.ones_like(total), total)
    entropy = -torch.where(share > 0, share * share.clamp(min=1e-300).log(), torch.zeros_like(share)).sum(-1)
    several = (valid > 1) & (total.squeeze(-1) > 0)
    even = valid.clamp(min=2).double().log()
    leading = tuple(range(w.dim() - 1))
    return {
        "head_sum": w.sum(leading),
        "head_count": mask.double().sum(leading),
        "square": w.square().sum(),
        "zeros": (mask & (w == 0)).double().sum(),
        "entropy": _inside(several, entropy / even).sum(),
        "positions": several.double().sum(),
    }


def weight_statistics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """What is watched, from the sums of a global batch.

    `w_mean_head_k`; `w_entropy`, the mean over positions with two valid heads or more of the entropy of a position's
    weights over that of equal ones; `w_ess`, the effective sample size `(sum w)^2 / sum w^2` over N; `w_zeros`, the
    share of entries that weigh nothing. Equal weights give 1, 1, 1 and 0.
    """
    total, count = sums["head_sum"].sum(), sums["head_count"].sum().clamp(min=1)
    means = sums["head_sum"] / sums["head_count"].clamp(min=1)
    found = {f"w_mean_head_{k}": float(m) for k, m in enumerate(means)}
    found["w_entropy"] = float(sums["entropy"] / sums["positions"].clamp(min=1))
    found["w_ess"] = float(total.square() / sums["square"].clamp(min=1e-300) / count)
    found["w_zeros"] = float(sums["zeros"] / count)
    return found


@torch.no_grad()
def head_excess_sums(ce: Tensor, ref_aligned: Tensor, mask: Tensor) -> Tensor:
    """`[2, H]` float64: each head's sum of `ce - ref_aligned` over the mask, and its count; adds up over ranks."""
    excess = _inside(mask, ce.double() - ref_aligned.double())
    leading = tuple(range(ce.dim() - 1))
    return torch.stack([excess.sum(leading), mask.double().sum(leading)])


def running_mean(mean_h: Tensor, mass_h: Tensor, sums_2h: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Take a step's `head_excess_sums` into an exponential mean; the mean so far is `mean_h / mass_h`.

    `mass_h` is the bias correction `1 - decay^n`, kept per head: a head without a valid entry in a step keeps both.
    """
    total_h, count_h = sums_2h
    seen = count_h > 0
    step_h = total_h / count_h.clamp(min=1)
    mean = torch.where(seen, decay * mean_h + (1 - decay) * step_h, mean_h)
    return mean, torch.where(seen, decay * mass_h + (1 - decay), mass_h)


def baseline_mtp(ce: Tensor, mask: Tensor) -> Tensor:
    """baseline-mtp, `[..., H]`: weight 1 wherever there is something to predict."""
    return mask.to(torch.promote_types(ce.dtype, torch.float32))


def rho1_wmtp(
    ce: Tensor,
    mask: Tensor,
    *,
    ref_aligned: Tensor,
    head_mean: Tensor | None,
    min_ce_diff: float,
    temperature: float,
    epsilon: float,
    max_weight: float,
    mix: float,
) -> Tensor:
    """rho1-wmtp in `weighted` mode, `[..., H]`: weight by the centred excess over the reference."""
    score = excess_score(ce.detach(), ref_aligned, head_mean=head_mean, min_ce_diff=min_ce_diff)
    return weights_from_scores(score, mask, temperature=temperature, epsilon=epsilon, max_weight=max_weight, mix=mix)


def critic_wmtp(
    ce: Tensor,
    mask: Tensor,
    *,
    delta_aligned: Tensor,
    temperature: float,
    epsilon: float,
    max_weight: float,
    mix: float,
) -> Tensor:
    """critic-wmtp, `[..., H]`: weight by the value that the predicted token adds.

    `delta_aligned` is `align_next(value_gain(...), heads)`; `ce` is there for the signature that
    the trainers share.
    """
    return weights_from_scores(
        delta_aligned,
        mask,
        temperature=temperature,
        epsilon=epsilon,
        max_weight=max_weight,
        mix=mix,
    )


def _inside(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where `mask`, 0 elsewhere, whatever stood there (0 times NaN would be NaN)."""
    return torch.where(mask, values, torch.zeros_like(values))


def _at_least_float32(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The flat `values` of every rank of `group`, one after another; ranks may differ in size."""
    if group is None:
        return values
    ranks = dist.get_world_size(group)
    size = torch.tensor([values.numel()], device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(ranks)]
    dist.all_gather(sizes, size, group=group)
    counts = [int(s) for s in sizes]
    padded = values.new_zeros(max(*counts, 1))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
