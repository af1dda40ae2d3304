"""One optimizer step: the same loss and gradients however the global batch is dealt out."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import spread
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from wmtp.config import Recipe, load_recipe
from wmtp.data import Batches, Rows, pack
from wmtp.model import ModelSpec, MTPModel, shard_units
from wmtp.objective import (
    align_next,
    excess_score,
    gae_targets,
    make_labels,
    token_skip_weights,
    value_gain,
    weights_from_scores,
)
from wmtp.ranks import Place
from wmtp.step import StepResult, Weighting, clip, clip_gradients, micro_of, share_of, train_step

ROOT = Path(__file__).parent.parent
SPEC = ModelSpec("hf", 4, 32, 1, 4, 4, 64, 97)
LENGTH, ROWS = 24, 8
CPU = Place(torch.device("cpu"))
ALGORITHMS: dict[str, tuple[str, list[str]]] = {
    "baseline": ("baseline_mtp", []),
    "rho1": ("rho1_wmtp", []),
    "rho1 raw": ("rho1_wmtp", ["rho1.center=none"]),
    "token_skip": ("rho1_wmtp", ["rho1.selection_mode=token_skip"]),
    "critic": ("critic_wmtp", []),
}
# ranks x rows of a micro-batch x accumulation steps
LAYOUTS = {"1x8": (1, 8), "2x4": (2, 4), "2x2x2": (2, 2), "1x2x4": (1, 2)}


def recipe_of(algorithm: str, *sets: str) -> Recipe:
    name, own = ALGORITHMS[algorithm]
    return load_recipe(ROOT / f"tests/configs/recipe.{name}.yaml", [*own, *sets, "loss.lambda=0.7"])


def rows_of(barren: bool) -> Batches:
    """Uneven packed documents; ``barren``: the rows that a second rank gets have documents of one token, no label."""
    generator = torch.Generator().manual_seed(5)

    def laid(groups: list[list[int]]) -> Batches:
        """Each group of documents in a row of its own."""
        sizes = [n for group in groups for n in group]
        ids = torch.randint(0, SPEC.vocab_size, (sum(sizes),), generator=generator).numpy()
        begin, first = np.cumsum([0, *sizes]), np.cumsum([0, *map(len, groups)])
        return Batches(Rows(ids, np.arange(len(sizes)), begin, first, LENGTH, 2), ROWS, seed=3)

    groups = [[24], [1, 23], [3, 2, 9], [15], [7, 7, 7], [2, 20], [4, 4, 4, 4, 4, 4], [11]]
    if barren:
        for n in laid(groups).global_batch(0)[ROWS // 2 :].tolist():
            groups[n] = [1] * 6
    return laid(groups)


def lively_model(recipe: Recipe) -> MTPModel:
    torch.manual_seed(7)
    model = MTPModel(SPEC, value_head=recipe.train.algo == "critic-wmtp")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.train()


def weighting_of(recipe: Recipe) -> Weighting:
    """In the midst of a run: the first step is unweighted."""
    weighting = Weighting(recipe)
    weighting.mean_h = torch.tensor([0.1, 0.2, -0.1, 0.3], dtype=torch.float64)
    weighting.mass_h = torch.full((4,), 0.5, dtype=torch.float64)
    return weighting


def scores_of(recipe: Recipe, batches: Batches) -> Tensor | None:
    if recipe.train.algo == "baseline-mtp":
        return None
    drawn = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(11))
    if recipe.train.algo == "rho1-wmtp":
        return drawn + 5
    return drawn * batches.rows.last_tokens()


def step_of(model: Any, algorithm: str, barren: bool, place: Place, rows: int) -> StepResult:
    recipe, batches = recipe_of(algorithm), rows_of(barren)
    share = share_of(batches, 0, SPEC.heads, rows, place, scores_of(recipe, batches))
    return train_step(model, share, weighting_of(recipe), place)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    place = Place(torch.device("cpu"), 2, rank)
    mesh = init_device_mesh("cpu", (2,))
    for algorithm in ALGORITHMS:
        for layout, (world, rows) in LAYOUTS.items():
            for barren in (False, True):
                if world == 1:
                    continue
                model = lively_model(recipe_of(algorithm))
                for unit in [*shard_units(model), model]:
                    fully_shard(unit, mesh=mesh)
                seen = step_of(model, algorithm, barren, place, rows)
                found = gradients(model)
                if rank == 0:
                    kept = {"seen": vars(seen), "grads": found}
                    torch.save(kept, f"{folder}/{algorithm}-{layout}-{barren}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    spread(rank_main, str(folder))
    return folder


@pytest.mark.parametrize("barren", [False, True], ids=["all rows", "a rank without a label"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1x8"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_is_the_same_however_it_is_dealt_out(algorithm: str, layout: str, barren: bool, two_ranks: Path) -> None:
    model = lively_model(recipe_of(algorithm))
    whole = step_of(model, algorithm, barren, CPU, ROWS)
    expected = gradients(model)
    world, rows = LAYOUTS[layout]
    if world == 1:
        other = lively_model(recipe_of(algorithm))
        seen, found = vars(step_of(other, algorithm, barren, CPU, rows)), gradients(other)
    else:
        kept = torch.load(two_ranks / f"{algorithm}-{layout}-{barren}.pt", weights_only=True)
        seen, found = kept["seen"], kept["grads"]
    assert seen["wmtp_loss"] == pytest.approx(whole.wmtp_loss, rel=1e-5)
    assert seen["value_loss"] == pytest.approx(whole.value_loss, rel=1e-5)
    torch.testing.assert_close(seen["excess"], whole.excess, rtol=1e-5, atol=1e-6)
    for name, sums in whole.weights.items():
        torch.testing.assert_close(seen["weights"][name], sums, rtol=1e-5, atol=1e-6)
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_the_gradient_is_that_of_the_objective() -> None:
    """baseline: the plain mean over valid labels of the naive cross-entropy."""
    model, batches = lively_model(recipe_of("baseline")), rows_of(False)
    step_of(model, "baseline", False, CPU, ROWS)
    found = gradients(model)
    model.zero_grad()
    x, document, pad = batches.take(batches.global_batch(0))
    labels, mask = make_labels(x, SPEC.heads, document, pad)
    logits = model.lm_head.logits(model.hidden(x, document))
    torch.nn.functional.cross_entropy(logits[mask], labels[mask]).backward()
    for name, grad in gradients(model).items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


# No two alike, none a default: a value that reaches another place than its own changes the gradient.
DISTINCT = [
    "loss.weight_temperature=0.61",
    "loss.epsilon=0.07",
    "loss.max_weight=1.9",
    "rho1.min_ce_diff=0.21",
    "rho1.skip_threshold_percentile=0.37",
    "critic.gamma=0.97",
    "critic.gae_lambda=0.83",
    "critic.discount_lambda=0.73",
    "critic.auxiliary_loss_coef=0.37",
]


@pytest.mark.parametrize("algorithm", ["rho1", "rho1 raw", "token_skip", "critic"])
def test_every_setting_reaches_its_place_in_the_objective(algorithm: str) -> None:
    recipe, batches = recipe_of(algorithm, *DISTINCT), rows_of(False)
    model, score = lively_model(recipe), scores_of(recipe, batches)
    assert score is not None
    share = share_of(batches, 0, SPEC.heads, 2, CPU, score)
    weighting = weighting_of(recipe)
    seen = train_step(model, share, weighting, CPU)
    found = gradients(model)
    model.zero_grad()

    index = batches.global_batch(0)
    x, document, pad = batches.take(index)
    labels, mask = make_labels(x, SPEC.heads, document, pad)
    logits = model.lm_head.logits(model.hidden(x, document))
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.clamp(min=0).flatten(), reduction="none")
    ce = flat.view(mask.shape)
    shape = {"temperature": 0.61, "epsilon": 0.07, "max_weight": 1.9, "mix": 0.7}
    loss = torch.zeros(())
    if algorithm == "critic":
        value = model(x, document).value_bs
        delta = align_next(value_gain(value.detach(), 0.73), SPEC.heads)
        w = weights_from_scores(delta, mask, **shape)
        target = gae_targets(score[index], value, document, pad, gamma=0.97, gae_lambda=0.83)
        error = (value - target.detach())[~pad].square().mean()
        assert seen.value_loss == pytest.approx(float(error), rel=1e-5)
        loss = 0.37 * error
    else:
        mean = None if algorithm == "rho1 raw" else (weighting_of(recipe).mean_h / 0.5).float()
        aligned = align_next(score[index], SPEC.heads)
        excess = excess_score(ce.detach(), aligned, head_mean=mean, min_ce_diff=0.21)
        w = (
            token_skip_weights(excess, mask, skip_percentile=0.37, mix=0.7)
            if algorithm == "token_skip"
            else weights_from_scores(excess, mask, **shape)
        )
    policy = (w * ce)[mask].sum() / mask.sum()
    assert seen.wmtp_loss == pytest.approx(float(policy), rel=1e-5)
    (loss + policy).backward()
    for name, grad in gradients(model).items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_the_running_mean_decays_as_the_recipe_says() -> None:
    weighting = Weighting(recipe_of("rho1", "rho1.center_decay=0.75"))
    sums = torch.tensor([[4.0, 2, 2, 2], [2, 2, 2, 2]], dtype=torch.float64)
    weighting.remember(sums)
    weighting.remember(sums * torch.tensor([[2.0], [1.0]]))
    assert weighting.mean_h[0] == pytest.approx(0.25 * 2 * 0.75 + 0.25 * 4)
    assert weighting.mass_h[0] == pytest.approx(0.25 * 0.75 + 0.25)


def test_a_head_without_a_mean_keeps_the_step_unweighted() -> None:
    weighting = weighting_of(recipe_of("rho1"))
    assert not weighting.unweighted
    weighting.mass_h[3] = 0
    assert weighting.unweighted


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "baseline"])
def test_with_lambda_zero_the_trunk_gets_the_baseline_s_gradient_bit_for_bit(algorithm: str) -> None:
    plain = lively_model(recipe_of("critic"))
    weighted = lively_model(recipe_of("critic"))
    batches = rows_of(False)
    baseline, recipe = recipe_of("baseline"), recipe_of(algorithm)
    recipe = load_recipe(
        ROOT / f"tests/configs/recipe.{ALGORITHMS[algorithm][0]}.yaml", [*ALGORITHMS[algorithm][1], "loss.lambda=0"]
    )
    train_step(plain, share_of(batches, 0, 4, 2, CPU), Weighting(baseline), CPU)
    share = share_of(batches, 0, 4, 2, CPU, scores_of(recipe, batches))
    train_step(weighted, share, weighting_of(recipe), CPU)
    for (name, p), q in zip(plain.named_parameters(), weighted.parameters(), strict=True):
        if name != "value_head.weight":
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name


def test_the_first_step_is_unweighted_and_the_next_one_centred() -> None:
    recipe, batches = recipe_of("rho1"), rows_of(False)
    weighting, model = Weighting(recipe), lively_model(recipe)
    share = share_of(batches, 0, 4, 4, CPU, scores_of(recipe, batches))
    first = train_step(model, share, weighting, CPU)
    assert weighting.unweighted and float(first.weights["square"]) == float(first.weights["head_count"].sum())
    weighting.remember(first.excess)
    second = train_step(model, share, weighting, CPU)
    assert not weighting.unweighted and float(second.weights["square"]) > float(first.weights["square"])
    mean = weighting.head_mean(torch.device("cpu"))
    assert mean is not None
    torch.testing.assert_close(mean.double(), first.excess[0] / first.excess[1], rtol=1e-5, atol=1e-6)


def test_the_running_mean_survives_json() -> None:
    weighting = weighting_of(recipe_of("rho1"))
    weighting.remember(torch.tensor([[1.0, 2.0, 3.0, 0.0], [3.0, 7.0, 11.0, 0.0]], dtype=torch.float64))
    other = Weighting(recipe_of("rho1"))
    other.load_state_dict(json.loads(json.dumps(weighting.state_dict())))
    assert torch.equal(other.mean_h, weighting.mean_h) and torch.equal(other.mass_h, weighting.mass_h)


def test_clip_gives_the_norm_before_and_leaves_it_at_zero_limit() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip([p], 0) == 5 and p.grad.tolist() == [3, 4]
    assert clip([p], 1) == 5 and p.grad.norm() == pytest.approx(1, rel=1e-4)


def test_trunk_and_value_head_are_clipped_apart() -> None:
    model = MTPModel(SPEC, value_head=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    named = {n: p.grad for n, p in model.named_parameters()}
    trunk = [g for n, g in named.items() if n != "value_head.weight" and g is not None]
    before = torch.stack([g.norm() for g in trunk]).norm()
    assert clip_gradients(model, 0.5) == pytest.approx(float(before), rel=1e-5)
    assert torch.stack([g.norm() for g in trunk]).norm() == pytest.approx(0.5, rel=1e-4)
    value = named["value_head.weight"]
    assert value is not None and value.norm() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["baseline", "rho1", "critic"])
def test_a_document_does_not_know_what_is_packed_beside_it(algorithm: str) -> None:
    recipe = recipe_of(algorithm)
    weighting, model = weighting_of(recipe), lively_model(recipe)
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(0, SPEC.vocab_size, (n,), generator=generator).tolist() for n in (9, 11))
    scores = {n: torch.randn(n, generator=generator) for n in (9, 11)}

    def seen(documents: list[list[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        batches = Batches(pack(documents, LENGTH, 2, True), 1, 0)
        laid = torch.cat([scores[len(d)] for d in documents])
        score = torch.nn.functional.pad(laid, (0, LENGTH - len(laid)))[None]
        m = micro_of(batches, torch.tensor([0]), 4, CPU, score)
        out = model(m.x, m.document, m.labels, m.mask, 1, weighing=weighting.weighing(m))
        target = None
        if weighting.needs_value:
            assert m.score is not None
            target = gae_targets(m.score, out.value_bs, m.document, m.pad, gamma=1.0, gae_lambda=0.9)
        return out.ce_bsh, out.w_bsh, target

    for at, alone in ((0, seen([first])), (9, seen([second]))):
        together = seen([first, second])
        size = 9 if at == 0 else 11
        for a, b in zip(alone, together, strict=True):
            if a is not None and b is not None:
                torch.testing.assert_close(a[0, :size], b[0, at : at + size], rtol=1e-4, atol=1e-5)
    weights = seen([first, second])[1]
    assert float(weights[weights > 0].std()) > (0.01 if algorithm != "baseline" else -1)
