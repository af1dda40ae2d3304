"""Held-out figures: the same for every number of ranks, and of the unweighted objective."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import spread
from test_step import (
    CPU,
    LENGTH,
    SPEC,
    lively_model,
    recipe_of,
    rows_of,
    scores_of,
    weighting_of,
)

from wmtp.evaluation import held_out_ce, held_out_value, weigh_documents
from wmtp.objective import gae_targets, make_labels
from wmtp.ranks import Place


def figures(place: Place) -> dict[str, Any]:
    recipe, batches = recipe_of("critic", "eval.max_batches=3", "data.eval.batch_size=1"), rows_of(False)
    score = scores_of(recipe, batches)
    assert score is not None
    model = lively_model(recipe)
    return {
        "ce": held_out_ce(model, batches, recipe, place),
        "value": held_out_value(model, batches, recipe, place, score),
        "mode": model.training,
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(figures(Place(torch.device("cpu"), 2, rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_three_rows_see_what_one_sees(tmp_path: Path) -> None:
    spread(_rank, str(tmp_path))
    alone = figures(CPU)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["ce"] == pytest.approx(alone["ce"], rel=1e-6)
        assert found["value"] == pytest.approx(alone["value"], rel=1e-6)
    assert alone["mode"], "the model goes on training"


def test_the_figures_are_means_over_the_first_rows() -> None:
    batches = rows_of(False)
    recipe = recipe_of("critic")
    model = lively_model(recipe).eval()
    x, document, pad = batches.take(torch.arange(3))
    labels, mask = make_labels(x, SPEC.heads, document, pad)
    with torch.no_grad():
        logits = model.lm_head.logits(model.hidden(x, document))
        value = model(x, document).value_bs
    found = figures(CPU)
    for k in range(SPEC.heads):
        own = mask[:, :, k]
        expected = torch.nn.functional.cross_entropy(logits[:, :, k][own], labels[:, :, k][own])
        assert found["ce"][k] == pytest.approx(float(expected), rel=1e-5)
    score = scores_of(recipe, batches)
    assert score is not None
    target = gae_targets(score[:3], value, document, pad, gamma=1.0, gae_lambda=0.95)
    assert found["value"] == pytest.approx(float((value - target)[~pad].square().mean()), rel=1e-5)


@pytest.mark.parametrize("algorithm", ["rho1", "token_skip", "critic"])
def test_documents_come_with_their_own_weights(algorithm: str) -> None:
    recipe, batches = recipe_of(algorithm), rows_of(False)
    model, weighting = lively_model(recipe), weighting_of(recipe)
    found = weigh_documents(model, batches, weighting, CPU, scores_of(recipe, batches), most=3)
    x, document, _ = batches.take(torch.arange(2))
    sizes = [int((document[n] == d).sum()) for n in range(2) for d in document[n].unique() if d >= 0]
    assert [len(ids) for ids, _, _ in found] == sizes[:3] and LENGTH in sizes
    assert found[0][0].tolist() == x[0].tolist()
    for ids, w, mask in found:
        assert w.shape == mask.shape == (len(ids), SPEC.heads)
        assert (w[~mask] == 0).all() and float(w[mask].std()) > 0.01 if mask.sum() > 1 else True
