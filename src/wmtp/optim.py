"""The optimizer of a recipe, its schedule, and how many steps a run has."""

from __future__ import annotations

import math

import torch
from torch import nn

from wmtp import config as settings


def adamw(model: nn.Module, recipe: settings.Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and other vectors are not decayed; a value head has its own rate and no decay."""
    values = [p for n, p in model.named_parameters() if n.startswith("value_head.")]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("value_head.")]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.optim.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {"params": values, "weight_decay": 0.0, "peak": recipe.critic.value_lr},
    ]
    first, second = recipe.optim.betas
    return torch.optim.AdamW(
        [{"peak": recipe.optim.lr, **group} for group in groups if group["params"]],
        lr=recipe.optim.lr,
        betas=(first, second),
        # The default on a GPU makes copies of all moments; one kernel does not.
        fused=all(p.device.type == "cuda" for p in rest) or None,
    )


def rows_per_step(recipe: settings.Recipe, world: int) -> int:
    """Rows of a global batch."""
    return recipe.data.train.batch_size * world * recipe.train.accumulation_steps


def total_steps(rows: int, per_step: int, recipe: settings.Recipe) -> int:
    """Steps of the whole run, over ``rows`` rows an epoch."""
    total = math.ceil(rows * recipe.train.num_epochs / per_step)
    return min(total, recipe.train.max_steps or total)


def steps_told(total: int, recipe: settings.Recipe) -> str:
    """``total`` of `total_steps`, and what ends the run where that is not train.max_steps."""
    most = recipe.train.max_steps or total
    if total == most:
        return f"{total} steps"
    return (
        f"{total} steps: train.num_epochs ({recipe.train.num_epochs:g}) of the data end before train.max_steps ({most})"
    )


def plan_told(rows: int, per_step: int, total: int, recipe: settings.Recipe, ended: bool) -> str:
    """What will be trained; a run that has ``ended`` early trains no more, whatever it was asked for."""
    steps = f"{total} steps" if ended else steps_told(total, recipe)
    return f"{rows} rows of {recipe.data.train.max_length}, {per_step} a step, {steps}"


def learning_rate(step: int, total: int, recipe: settings.Recipe) -> float:
    """Share of the peak rate in step ``step`` (counted from 1) of ``total``: linear warm-up, then down to 0."""
    warmup = round(recipe.optim.warmup_ratio * total)
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup + 1)
    if recipe.optim.scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if recipe.optim.scheduler == "linear" else 1.0
