"""Stage 1: the value head's own step, and when it ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wmtp import pretrain
from wmtp.checkpoint import Checkpoints
from wmtp.config import Config, Recipe, Storage, load_pair
from wmtp.data import Batches, pack
from wmtp.model import ModelSpec, MTPModel
from wmtp.optim import adamw
from wmtp.ranks import Place

ROOT = Path(__file__).parents[1]
SPEC = ModelSpec("hf", 4, 32, 1, 4, 4, 64, 97)
CPU = Place(torch.device("cpu"))
STOP: Any = SimpleNamespace(cause=None, beat=lambda where: None, rest=lambda over=False: None)


def settings(*sets: str) -> tuple[Config, Recipe]:
    files = (ROOT / "tests/configs/config.local_test.yaml", ROOT / "tests/configs/recipe.critic_wmtp.yaml")
    return load_pair(*files, sets, env="test")


def model_of() -> MTPModel:
    torch.manual_seed(7)
    model = MTPModel(SPEC, value_head=True)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    assert model.value_head is not None
    torch.nn.init.zeros_(next(model.value_head.parameters()))
    return model


def batches_of() -> tuple[Batches, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 97, (24,), generator=generator).tolist() for _ in range(8)]
    rows = pack(texts, 24, 2, True)
    score = torch.zeros(rows.shape)
    score[:, -1] = torch.linspace(-1, 1, len(rows))
    return Batches(rows, 4, seed=3), score


def trained(folder: Path, held: bool, *sets: str) -> tuple[MTPModel, MTPModel]:
    config, recipe = settings(*sets)
    before, model = model_of(), model_of()
    shelf = Checkpoints(folder, None, keep_last=1, storage=Storage(retry_wait_s=0))
    batches, score = batches_of()
    other = (batches, score) if held else None
    pretrain.pretrain_value_head(model, batches, score, other, config, recipe, shelf, CPU, STOP, {})
    return before, model


def test_one_step_is_adamws_at_the_stages_own_rate(tmp_path: Path) -> None:
    before, after = trained(tmp_path, False, "pretrain.max_steps=1", "pretrain.lr=0.003", "optim.grad_clip=1e-3")
    moved = dict(after.named_parameters())
    grad = moved["value_head.weight"].grad
    assert grad is not None and grad.norm() == pytest.approx(1e-3, rel=1e-2)  # clipped: it was far larger
    for name, p in before.named_parameters():
        step = (moved[name] - p).detach().abs()
        if name.startswith("value_head."):
            # Adam's first step is the rate times the gradient's sign, where the gradient is not tiny.
            assert step.max() == pytest.approx(0.003, rel=1e-3)
        else:
            assert step.max() == 0, name


@pytest.mark.parametrize(
    ("losses", "steps"), [([3.0, 2.0, 1.0, 0.5], 4), ([3.0, 3.5, 2.0, 2.5, 2.2, 1.0], 5), ([1.0, 2.0, 3.0, 0.5], 3)]
)
def test_it_ends_when_the_held_out_loss_rises_as_often_as_patience_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], steps: int
) -> None:
    told = iter(losses)
    seen: list[float] = []

    def next_loss(*_: Any) -> float:
        seen.append(next(told))
        return seen[-1]

    monkeypatch.setattr(pretrain, "held_out_value", next_loss)
    early = ["pretrain.early_stopping.enabled=true", "pretrain.early_stopping.patience=2", "eval.interval=1"]
    trained(tmp_path, True, f"pretrain.max_steps={len(losses)}", "pretrain.num_epochs=9", *early)
    assert len(seen) == steps


def test_the_value_head_has_a_group_of_its_own() -> None:
    _, recipe = settings("optim.lr=0.001", "critic.value_lr=0.007", "optim.weight_decay=0.05")
    model = model_of()
    groups = adamw(model, recipe).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    found = {n: (g["peak"], g["weight_decay"]) for g in groups for n in (names[id(p)] for p in g["params"])}
    assert found["value_head.weight"] == (0.007, 0.0)
    assert found["lm_head.weight"] == (0.001, 0.05) and found["norm.weight"] == (0.001, 0.0)
