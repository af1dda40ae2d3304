"""The objective against an independent float64 loop, and the properties that must hold."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from runs import spread
from torch import Tensor

from wmtp import objective as o

H, V = 4, 5
SETTINGS: dict[str, float] = {"temperature": 0.7, "epsilon": 0.05, "max_weight": 3.0, "mix": 0.6}
bounded = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def batches(draw: Any) -> dict[str, Tensor]:
    """Rows of documents and padding, with logits, references, values and rewards."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    document = torch.full((rows, length), -1)
    for b in range(rows):
        at = 0
        for number, size in enumerate(draw(st.lists(st.integers(1, 6), max_size=4))):
            document[b, at : at + size] = number
            at += size
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pad = document < 0
    end = ~pad & torch.cat([document[:, 1:] != document[:, :-1], torch.ones(rows, 1, dtype=torch.bool)], 1)
    return {
        "x": torch.randint(V, (rows, length), generator=g),
        "document": document,
        "pad": pad,
        "logits": 3 * torch.randn(rows, length, H, V, generator=g),
        "ref": torch.rand(rows, length, generator=g),
        "value": torch.randn(rows, length, generator=g),
        "reward": torch.randn(rows, length, generator=g) * end,
    }


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(labels)


def close(found: Tensor, expected: Any) -> None:
    want = torch.as_tensor(expected, dtype=torch.float64).reshape(found.shape)
    assert torch.isfinite(found).all()
    assert (found.double() - want).norm() <= 1e-5 * max(1.0, float(want.norm()))


@pytest.mark.parametrize("algorithm", ["baseline", "rho1", "skip", "critic"])
@given(batches())
@bounded
def test_loss_weights_and_gradients_equal_the_loop(algorithm: str, batch: dict[str, Tensor]) -> None:
    b = batch
    labels, mask = o.make_labels(b["x"], H, b["document"], b["pad"])
    want_labels = oracle.labels(b["x"], H, b["document"], b["pad"])
    assert labels.tolist() == [[[-100 if i is None else i for i in e] for e in row] for row in want_labels]
    assert torch.equal(mask, labels != -100)
    logits = b["logits"].clone().requires_grad_()
    value, ref = b["value"].clone().requires_grad_(), b["ref"].clone().requires_grad_()
    ce = cross_entropy(logits, labels)
    head_mean = torch.tensor([0.1, 0.5, 0.9, -0.3])
    length = b["x"].shape[1]
    # The loop's scores, from the same float32 inputs.
    score = torch.zeros(*mask.shape, dtype=torch.float64)
    for i, t, k in mask.nonzero().tolist():
        j = t + k + 1
        assert j < length
        if algorithm == "critic":
            score[i, t, k] = float(b["value"][i, j]) - 0.9 * float(b["value"][i, j - 1])
        else:
            excess = oracle.cross_entropy(b["logits"][i, t, k], int(b["x"][i, j])) - float(b["ref"][i, j])
            excess -= float(head_mean[k])
            assume(abs(abs(excess) - 0.2) > 1e-4)  # float32 and float64 may differ about what is smaller
            score[i, t, k] = 0.0 if abs(excess) < 0.2 else excess
    ours: dict[str, Any] = dict(SETTINGS)
    low, high = SETTINGS["epsilon"], SETTINGS["max_weight"]
    want = oracle.weights(score, mask, SETTINGS["temperature"], low, high, SETTINGS["mix"])
    if algorithm == "baseline":
        w, want = o.baseline_mtp(ce, mask), mask.double().tolist()
    elif algorithm == "critic":
        delta = o.align_next(o.value_gain(value, 0.9), H)
        w = o.critic_wmtp(ce, mask, delta_aligned=delta, **ours)
    else:
        aligned = o.align_next(ref, H)
        if algorithm == "rho1":
            w = o.rho1_wmtp(ce, mask, ref_aligned=aligned, head_mean=head_mean, min_ce_diff=0.2, **ours)
        else:
            ranked = sorted(score[mask].tolist(), reverse=True)
            last = ranked[max(1, round(0.4 * len(ranked))) - 1] if ranked else 0.0
            assume(all(s == last or abs(s - last) > 1e-4 for s in ranked))
            mine = o.excess_score(ce, aligned, head_mean=head_mean, min_ce_diff=0.2)
            w = o.token_skip_weights(mine, mask, skip_percentile=0.6, mix=0.6)
            want = oracle.token_skip(score, mask, 0.6, 0.6)
    assert not w.requires_grad and (w[~mask] == 0).all()
    close(w, want)
    close(w.double().sum(), float(mask.sum()))
    loss = o.weighted_loss(ce, w, mask)
    want_loss, want_gradient = oracle.loss_and_gradient(b["logits"], want_labels, want)
    close(loss, want_loss)
    loss.backward()
    assert logits.grad is not None and value.grad is None and ref.grad is None
    close(logits.grad, want_gradient)


@given(batches(), st.sampled_from([(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)]))
@bounded
def test_targets_equal_the_sum(batch: dict[str, Tensor], discount: tuple[float, float]) -> None:
    b, (gamma, lam) = batch, discount
    found = o.gae_targets(
        b["reward"], b["value"].clone().requires_grad_(), b["document"], b["pad"], gamma=gamma, gae_lambda=lam
    )
    assert not found.requires_grad
    close(found, oracle.gae(b["reward"], b["value"], b["document"], b["pad"], gamma, lam))


def test_with_lambda_one_the_target_is_the_discounted_return() -> None:
    reward = torch.tensor([[0.0, 0.0, 2.0]])
    found = o.gae_targets(reward, torch.randn(1, 3), gamma=0.5, gae_lambda=1.0)
    assert torch.allclose(found, torch.tensor([[0.5, 1.0, 2.0]]), atol=1e-6)


def test_mix_zero_is_the_baseline_bit_for_bit() -> None:
    score, mask = 50 * torch.randn(2, 6, H), torch.rand(2, 6, H) > 0.3
    ours: dict[str, Any] = {**SETTINGS, "mix": 0.0}
    assert torch.equal(o.weights_from_scores(score, mask, **ours), o.baseline_mtp(score, mask))
    assert torch.equal(o.token_skip_weights(score, mask, skip_percentile=0.5, mix=0.0), mask.float())


def test_one_valid_head_weighs_one_and_what_is_masked_never_matters() -> None:
    score = torch.full((1, 3, H), float("nan"))
    mask = torch.zeros(1, 3, H, dtype=torch.bool)
    mask[0, 0, 2], score[0, 0, 2] = True, 1e6
    mask[0, 1, :2], score[0, 1, :2] = True, torch.tensor([1e30, -1e30])
    w = o.weights_from_scores(score, mask, temperature=1e-3, epsilon=0.0, max_weight=9.0, mix=1.0)
    assert w.tolist() == [[[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0]]]
    ce = torch.where(mask, torch.ones_like(score), score).requires_grad_()
    loss = o.weighted_loss(ce, w, mask)
    loss.backward()
    assert loss == 1 and ce.grad is not None and torch.isfinite(ce.grad).all()


def test_weights_carry_no_gradient_even_if_they_could() -> None:
    ce, w = torch.rand(1, 2, H, requires_grad=True), torch.rand(1, 2, H, requires_grad=True)
    o.weighted_loss(ce, w, torch.ones(1, 2, H, dtype=torch.bool)).backward()
    assert ce.grad is not None and w.grad is None


def test_ties_with_the_last_kept_are_kept() -> None:
    score = torch.tensor([[[3.0, 1.0, 1.0, 0.0]]])
    w = o.token_skip_weights(score, torch.ones(1, 1, 4, dtype=torch.bool), skip_percentile=0.5, mix=1.0)
    assert torch.allclose(w, torch.tensor([[[4 / 3, 4 / 3, 4 / 3, 0.0]]]))


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"epsilon": 4.0}, {"max_weight": 0.0}, {"epsilon": -1.0}])
def test_settings_without_a_mean_are_refused(change: dict[str, float]) -> None:
    ours: dict[str, Any] = {**SETTINGS, **change}
    with pytest.raises(ValueError, match="must be"):
        o.weights_from_scores(torch.zeros(1, 1, H), torch.ones(1, 1, H, dtype=torch.bool), **ours)


def _skip_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    both = torch.load(f"{folder}/in.pt")
    for name, (score, mask, at) in both.items():
        part = slice(0, at) if rank == 0 else slice(at, None)
        w = o.token_skip_weights(score[part], mask[part], skip_percentile=0.6, mix=0.8, group=dist.group.WORLD)
        torch.save(w, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_of_unlike_size_skip_as_one_process_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    score, mask = torch.randn(5, 7, H), torch.rand(5, 7, H) > 0.4
    nothing = torch.zeros_like(mask)
    first_empty = mask.clone()
    first_empty[:2] = False
    cases = {"unlike": (score, mask, 1), "half": (score, first_empty, 2), "none": (score, nothing, 2)}
    torch.save(cases, tmp_path / "in.pt")
    spread(_skip_rank, str(tmp_path))
    for name, (s, m, _) in cases.items():
        found = torch.cat([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)])
        assert torch.equal(found, o.token_skip_weights(s, m, skip_percentile=0.6, mix=0.8))


def test_padding_on_the_left_predicts_nothing() -> None:
    x, pad = torch.tensor([[9, 1, 2]]), torch.tensor([[True, False, False]])
    labels, mask = o.make_labels(x, 2, pad_bs=pad)
    assert labels.tolist() == [[[-100, -100], [2, -100], [-100, -100]]] and int(mask.sum()) == 1


# ---- what is watched ------------------------------------------------------------------------------------------------


def test_statistics_add_up_over_parts_and_equal_weights_give_one() -> None:
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(4, 9, H, generator=g) > 0.3
    w = torch.rand(4, 9, H, generator=g) * (torch.rand(4, 9, H, generator=g) > 0.2) * mask
    whole = o.weight_sums(w, mask)
    parts = [o.weight_sums(w[i : i + 1], mask[i : i + 1]) for i in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(p[name] for p in parts), value)
    found = o.weight_statistics(whole)
    for k in range(H):
        assert found[f"w_mean_head_{k}"] == pytest.approx(float(w[..., k][mask[..., k]].mean()), rel=1e-6)
    assert found["w_zeros"] == pytest.approx(float((w[mask] == 0).float().mean()))
    assert found["w_ess"] == pytest.approx(float(w.sum() ** 2 / w.square().sum() / mask.sum()), rel=1e-5)
    entropies = []
    for position, valid in zip(w.flatten(0, 1), mask.flatten(0, 1), strict=True):
        if valid.sum() > 1 and position.sum() > 0:
            share = position[valid] / position.sum()
            entropies.append(-sum(p * math.log(p) for p in share.tolist() if p > 0) / math.log(int(valid.sum())))
    assert found["w_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    even = o.weight_statistics(o.weight_sums(mask.float(), mask))
    assert even == pytest.approx(
        {**{f"w_mean_head_{k}": 1 for k in range(H)}, "w_entropy": 1, "w_ess": 1, "w_zeros": 0}
    )


def test_statistics_of_nothing_are_no_nan() -> None:
    nothing = torch.zeros(1, 3, H)
    assert all(math.isfinite(v) for v in o.weight_statistics(o.weight_sums(nothing, nothing.bool())).values())


def test_the_running_mean_is_corrected_for_its_start_and_waits_for_a_head() -> None:
    mean = mass = torch.zeros(2, dtype=torch.float64)
    steps = [(3.0, 1.0), (5.0, None), (1.0, 4.0)]
    for first, second in steps:
        count = torch.tensor([2.0, 0.0 if second is None else 4.0], dtype=torch.float64)
        total = torch.tensor([first * 2, (second or 0) * 4], dtype=torch.float64)
        mean, mass = o.running_mean(mean, mass, torch.stack([total, count]), 0.9)
    weights = [0.1 * 0.9**i for i in (2, 1, 0)]
    assert float(mean[0] / mass[0]) == pytest.approx(
        sum(w * s[0] for w, s in zip(weights, steps, strict=True)) / sum(weights)
    )
    assert float(mean[1] / mass[1]) == pytest.approx((0.09 * 1 + 0.1 * 4) / 0.19)


def test_the_excess_adds_up_over_the_mask() -> None:
    ce, ref = torch.full((1, 2, H), 3.0), torch.ones(1, 2, H)
    mask = torch.tensor([[[True, True, False, False], [True, False, False, False]]])
    ref[~mask] = float("nan")
    assert o.head_excess_sums(ce, ref, mask).tolist() == [[4, 2, 0, 0], [2, 1, 0, 0]]


# ---- a model that is as good as can be ------------------------------------------------------------------------------


def markov_weights(seed: int, center: bool) -> list[float]:
    """Mean weight per head of a model that equals the Markov chain that made its data, late in a run."""
    g = torch.Generator().manual_seed(seed)
    states, rows, length = 12, 16, 64
    chain = torch.distributions.Dirichlet(torch.full((states,), 0.3))
    torch.manual_seed(seed)
    step = chain.sample((states,)).double().clamp(min=1e-6)
    step /= step.sum(-1, keepdim=True)
    ahead = [torch.linalg.matrix_power(step, k + 1).log() for k in range(H)]
    mean = mass = torch.zeros(H, dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    for n in range(40):
        x = torch.zeros(rows, length, dtype=torch.int64)
        x[:, 0] = torch.randint(states, (rows,), generator=g)
        for t in range(1, length):
            x[:, t] = torch.multinomial(step[x[:, t - 1]], 1, generator=g).squeeze(1)
        labels, mask = o.make_labels(x, H)
        ce = torch.stack([-ahead[k][x, labels[..., k].clamp(min=0)] for k in range(H)], -1) * mask
        ref = torch.nn.functional.pad(-ahead[0][x[:, :-1], x[:, 1:]], (1, 0))
        aligned = o.align_next(ref, H)
        head_mean = mean / mass if center else None
        if n >= 10:
            w = o.rho1_wmtp(
                ce, mask, ref_aligned=aligned, head_mean=head_mean, min_ce_diff=0.0, **{**SETTINGS, "mix": 1.0}
            )
            for name, part in o.weight_sums(w, mask).items():
                sums[name] = sums.get(name, torch.zeros(())) + part
        mean, mass = o.running_mean(mean, mass, o.head_excess_sums(ce, aligned, mask), 0.99)
    found = o.weight_statistics(sums)
    return [found[f"w_mean_head_{k}"] for k in range(H)]


@pytest.mark.parametrize("seed", range(5))
def test_a_perfect_model_is_weighed_evenly_when_centred_and_not_when_raw(seed: int) -> None:
    centred, raw = markov_weights(seed, center=True), markov_weights(seed, center=False)
    assert all(0.7 <= w <= 1.3 for w in centred), centred
    assert not all(0.7 <= w <= 1.3 for w in raw), raw
