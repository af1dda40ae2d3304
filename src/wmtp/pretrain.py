"""Stage 1 of critic-wmtp: the value head learns the return of the reward while the trunk is frozen.

It has its own optimizer, rate and checkpoints (``pretrain/`` beside the run's), and advances nothing that stage 2 reads
but the value head itself.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.checkpoint import Checkpoints
from wmtp.config import Config, Recipe
from wmtp.data import Batches
from wmtp.evaluation import held_out_value
from wmtp.outcome import NotFiniteError, Stop, Stopped, say
from wmtp.paths import open_to_all
from wmtp.ranks import Place
from wmtp.remote import MARKER
from wmtp.step import Ahead, clip, last_of, share_of, value_error


def pretrain_value_head(
    model: nn.Module,
    batches: Batches,
    score_ns: Tensor,
    held: tuple[Batches, Tensor] | None,
    config: Config,
    recipe: Recipe,
    checkpoints: Checkpoints,
    place: Place,
    stop: Stop,
    made: dict[str, Any],
) -> None:
    """Train ``model.value_head``, going on from its newest checkpoint. Collective.

    ``made`` is what its checkpoints are made of, for `wmtp.resume`.

    ``score_ns`` `[N, S]` holds the reward at each document's last token, ``held`` the held-out rows with theirs. Raises
    Stopped, everything saved, when a notice to stop came.
    """
    began, settings = time.monotonic(), recipe.pretrain
    head = model.value_head
    assert isinstance(head, nn.Module)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=0.0)
    state: dict[str, Any] = {"best": None, "waited": 0, "ended": False}
    step = checkpoints.resume(head, optimizer, state)
    state["made_of"] = made
    total = math.ceil(len(batches.rows) * settings.num_epochs / batches.rows_per_step)
    total = min(total, settings.max_steps or total)
    if state["ended"]:
        say(f"pretrain  the value head was trained before: {step} steps")
        export(head, checkpoints, recipe)
        return
    say(f"pretrain  the value head learns the reward: {total} steps, {f'goes on after step {step}' if step else 'new'}")
    early = settings.early_stopping
    ahead = Ahead(lambda n: share_of(batches, n, recipe.model.heads, recipe.data.train.batch_size, place, score_ns))
    while step < total:
        stop.beat(f"in step {step + 1} of stage 1")
        share = ahead.take(step)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float32, device=place.device)
        # Reduced with every micro-batch: it is one vector, and FSDP's accumulation in half precision fails on units
        # that a forward leaves out, as this one does heads and unembedding.
        last_of(model, True)
        for m in share.micro:
            with place.autocast():
                value_bs = model(m.x, m.document).value_bs
            error = value_error(value_bs, m, recipe, share.tokens)
            (error * place.world).backward()
            loss += error.detach()
        norm = clip(head.parameters(), recipe.optim.grad_clip)
        seen = place.total(torch.stack([loss.cpu(), torch.tensor(float(bool(stop.cause)))]))
        step += 1
        if not (math.isfinite(float(seen[0])) and math.isfinite(norm)):
            raise NotFiniteError(f"stage 1, step {step}: value loss {float(seen[0])}, gradient norm {norm}: not finite")
        checkpoints.staged()
        optimizer.step()
        stopping = bool(seen[1])
        if step % config.log_interval == 0 or step in (1, total):
            say(f"pretrain  step {step}/{total}  value_loss {float(seen[0]):.4f}")
        if early.enabled and held and step % recipe.eval.interval == 0 and not stopping:
            stop.rest()
            now = held_out_value(model, held[0], recipe, place, held[1])
            better = state["best"] is None or now < state["best"]
            state["best"] = now if better else state["best"]
            state["waited"] = 0 if better else state["waited"] + 1
            say(f"pretrain  held out: value_loss {now:.4f}")
            if state["waited"] >= early.patience:
                say(f"pretrain  no lower held-out loss in {early.patience} evaluations: it ends here")
                total = step
        state["ended"] = step == total
        if state["ended"] or stopping or step % config.paths.checkpoints.save_interval == 0:
            stop.rest()
            checkpoints.save(step, head, optimizer, state)
        if stopping:
            raise Stopped(f"after step {step} of stage 1")
    ahead.close()
    export(head, checkpoints, recipe)
    say(f"pretrain  done: {step} steps, {time.monotonic() - began:.0f} s")


def export(head: nn.Module, checkpoints: Checkpoints, recipe: Recipe) -> None:
    """The value head as ``value_head/value_head.safetensors``, where the recipe wants it. Collective."""
    final = checkpoints.folder / "value_head"
    if not recipe.pretrain.save_value_head:
        return
    (weight,) = head.parameters()
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    if checkpoints.rank > 0:
        return
    if not (final / MARKER).exists():
        staging = checkpoints.folder / ".step-value_head"
        staging.mkdir(exist_ok=True)
        save_file({"value_head.weight": whole.detach().cpu().contiguous()}, staging / "value_head.safetensors")
        open_to_all(staging / "value_head.safetensors")
        checkpoints.finish(staging, final)
    checkpoints.upload(final)  # also what a kill kept from it
