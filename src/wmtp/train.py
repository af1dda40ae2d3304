"""Train a Llama with multi-token-prediction heads: arguments, set-up, the loop, the end, in run order.

    python -m wmtp.train --config F --recipe F --run-name N                    one device
    torchrun --nproc-per-node 4 -m wmtp.train --config F --recipe F --run-name N

Standard error is the story, standard output nothing. Exit codes: 0 done, 2 bad input, 10 disk full or not writable,
12 the bucket did not take or give a checkpoint, 20 training failed, 75 stopped with everything saved (start the same
command again and it goes on). torchrun turns its children's codes into 1, so the code, its cause and the step are also
in ``--exit-file``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from wmtp import config as settings
from wmtp.checkpoint import CheckpointError, Checkpoints, TransferError, local_bytes
from wmtp.data import Batches, DataError, load_tokenizer, pack, read_texts, tokenize
from wmtp.model import (
    ModelError,
    MTPModel,
    export_hf,
    finish_meta,
    load_state,
    read_spec,
    shard_units,
)
from wmtp.objective import make_labels
from wmtp.paths import PathResolver
from wmtp.tracking import Tracker

DONE, BAD_INPUT, DISK, TRANSFER, FAILED, RESUME_ME = 0, 2, 10, 12, 20, 75


class BadInput(ValueError):
    """What the person who started the run can mend: exit code 2, no traceback."""


class Stop:
    """Notice to stop: a signal or the end of the hours. The loop reads it after each step, on all ranks together."""

    def __init__(self) -> None:
        self.cause: str | None = None
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.notice)

    def notice(self, number: int, frame: FrameType | None) -> None:
        self.cause, self.signal = signal.Signals(number).name, number


@dataclass
class Progress:
    """What the end of a run, good or bad, has to know of it."""

    step: int = 0
    cause: str | None = None
    tracker: Tracker | None = None


def say(text: str) -> None:
    """One line of the story, from rank 0."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


# ---- arguments ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wmtp.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="where: paths, devices, tracking")
    parser.add_argument("--recipe", required=True, type=Path, help="what: data, algorithm, optimisation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--run-name", help="the same name goes on where it stopped (default: the recipe's)")
    parser.add_argument("--tags", default="", help="for the MLflow run, separated by commas")
    parser.add_argument("--env", default=os.environ.get("ENV_MODE"), help="test, minitest or production")
    parser.add_argument("--exit-file", type=Path, help="where code, cause and step are written at the end")
    parser.add_argument("--summary", type=Path, help="where the figures of the run are written at the end")
    parser.add_argument("--dry-run", action="store_true", help="resolve, build on the meta device, stop")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks and the resolved settings")
    return parser.parse_args(argv)


# ---- set-up ------------------------------------------------------------------------------------------------------


def pick_device(config: settings.Config) -> torch.device:
    """The device of this rank; a backend that is not there is the reader's to know before anything starts."""
    wanted = config.devices.compute_backend
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if not available[wanted]():
        raise BadInput(
            f"devices.compute_backend: {wanted}: this machine has none; rule: the device of the configuration "
            "is used or the run is refused; next: --set devices.compute_backend=auto"
        )
    if wanted == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(wanted)


def start_ranks(config: settings.Config, device: torch.device) -> int:
    """Join the process group if the configuration has one; returns the world size."""
    distributed = config.devices.distributed
    if not distributed.enabled:
        return 1
    if "WORLD_SIZE" not in os.environ:
        raise BadInput(
            "devices.distributed.enabled: true, but started without ranks; rule: torchrun starts the ranks; "
            f"next: torchrun --nproc-per-node {config.launcher.resources.gpus} -m wmtp.train …, "
            "or --set devices.distributed.enabled=false"
        )
    # Saving moves CPU tensors between ranks, which nccl can't.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else distributed.backend or "gloo"
    dist.init_process_group(
        backend,
        init_method=distributed.init_method,
        timeout=datetime.timedelta(seconds=distributed.timeout),
    )
    return dist.get_world_size()


def die_with_parent() -> None:
    """Under torchrun: the kernel kills this rank when torchrun dies, so that kill -9 leaves no process (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def local_path(uri: str, what: str) -> Path:
    """The folder that ``uri`` stands for; it must be there."""
    kind, path = PathResolver().resolve(uri)
    if kind != "file":
        raise BadInput(f"{what}: {uri}: rule: the trainer reads local folders; next: sync it, or name a file://")
    if not Path(path).is_dir():
        raise BadInput(
            f"{what}: {path} is not there; rule: models and data are on the disk before training; "
            "next: scripts/sync_models.sh, or make models for ENV=test"
        )
    return Path(path)


def build_model(
    config: settings.Config, recipe: settings.Recipe, folder: Path, device: torch.device, world: int
) -> MTPModel:
    """meta -> shard -> to_empty -> load: no rank but 0 ever holds the whole model."""
    spec = read_spec(folder)
    if spec.heads != recipe.model.heads:
        raise BadInput(
            f"model.heads: {recipe.model.heads}, but {folder} has {spec.heads}; rule: heads must be what the "
            f"checkpoint has; next: --set model.heads={spec.heads}"
        )
    with torch.device("meta"):
        model = MTPModel(spec)
    model.checkpoint_layers = config.devices.fsdp.activation_ckpt
    fsdp = config.devices.fsdp
    sharded = fsdp.enabled and dist.is_initialized()
    if sharded:
        # A replicated mesh of shards of one is no_shard; full_shard frees the parameters after the forward.
        mesh = (
            init_device_mesh(device.type, (world, 1), mesh_dim_names=("replicate", "shard"))
            if fsdp.sharding == "no_shard"
            else init_device_mesh(device.type, (world,))
        )
        half = torch.bfloat16 if config.devices.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        for unit in [*(shard_units(model) if fsdp.auto_wrap else []), model]:
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=fsdp.sharding == "full_shard",
            )
    elif world > 1:
        raise BadInput(
            f"devices.fsdp.enabled: false with {world} ranks; rule: ranks share one model through FSDP; "
            "next: --set devices.fsdp.enabled=true"
        )
    finish_meta(model, device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    state: dict[str, Any] = {**load_state(folder, spec)} if rank == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=world > 1))
    return model


def read_sources(config: settings.Config, sources: tuple[str, ...] | list[str]) -> list[str]:
    """The texts of the named sources, in their order."""
    folders = [local_path(config.paths.datasets[name], f"paths.datasets.{name}") for name in sources]
    return [text for folder in folders for text in read_texts(folder)]


def load_rows(
    config: settings.Config, recipe: settings.Recipe, tokenizer: Any, rows_per_step: int
) -> tuple[Batches, Batches | None]:
    """Packed rows to train on and, where ``data.eval`` names sources, held-out rows.

    A text that is held out is not trained on, even where a training source has it too.
    """
    held = read_sources(config, recipe.data.eval.sources)
    texts = read_sources(config, recipe.data.train.sources)
    kept = [text for text in texts if text not in set(held)]
    if not kept:
        raise BadInput(
            f"data.train.sources: {', '.join(recipe.data.train.sources)}: no text that is not held out; "
            "rule: at least one document to train on; next: look at the folders, or at data.eval.sources"
        )
    if len(kept) < len(texts):
        say(f"data      {len(texts) - len(kept)} of {len(texts)} training documents are held out and not trained on")

    def packed(part: Any, some: list[str], size: int) -> Batches:
        rows = pack(tokenize(some, tokenizer), part.max_length, tokenizer.eos_id, part.pack_sequences)
        return Batches(rows, size, config.seed)

    train = packed(recipe.data.train, kept, rows_per_step)
    return train, packed(recipe.data.eval, held, recipe.data.eval.batch_size) if held else None


def adamw(model: torch.nn.Module, recipe: settings.Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and other vectors are not decayed."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    first, second = recipe.optim.betas
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.optim.lr,
        betas=(first, second),
    )


def learning_rate(step: int, total: int, recipe: settings.Recipe) -> float:
    """Rate of step ``step`` (counted from 1) of ``total``: linear warm-up, then the schedule down to 0."""
    warmup = round(recipe.optim.warmup_ratio * total)
    if step <= warmup:
        return recipe.optim.lr * step / warmup
    done = (step - warmup) / max(1, total - warmup + 1)
    if recipe.optim.scheduler == "cosine":
        return recipe.optim.lr * 0.5 * (1 + math.cos(math.pi * done))
    return recipe.optim.lr * (1 - done) if recipe.optim.scheduler == "linear" else recipe.optim.lr


# ---- the loop ----------------------------------------------------------------------------------------------------


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def held_out(
    model: MTPModel,
    rows: Batches,
    recipe: settings.Recipe,
    device: torch.device,
    world: int,
    rank: int,
) -> list[float]:
    """Unweighted cross-entropy per head, nats, over the first ``eval.max_batches`` batches of the held-out rows.

    The rows are the same for every number of ranks; a rank that has none left forwards one row without labels,
    because sharded forwards are collective.
    """
    model.eval()
    size, heads = recipe.data.eval.batch_size, recipe.model.heads
    wanted = torch.arange(min(len(rows.rows), size * recipe.eval.max_batches))
    mine = wanted[rank::world]
    rounds = math.ceil(math.ceil(len(wanted) / world) / size)
    sums = torch.zeros(2, heads, dtype=torch.float64)
    for i in range(rounds):
        indices = mine[i * size : (i + 1) * size]
        empty = len(indices) == 0
        x, document, pad = rows.take(wanted[:1] if empty else indices)
        labels, mask = make_labels(x, heads, document, pad)
        if empty:
            mask = torch.zeros_like(mask)
            labels = torch.full_like(labels, -100)
        _, ce = model(*(t.to(device) for t in (x, document, labels, mask)), count=mask.sum().clamp(min=1))
        sums[0] += ce.double().sum(dim=(0, 1)).cpu() if device.type != "mps" else ce.cpu().double().sum((0, 1))
        sums[1] += mask.double().sum(dim=(0, 1))
    model.train()
    sums = all_sum(sums.to(device) if device.type == "cuda" else sums).cpu()
    return [float(v) for v in sums[0] / sums[1].clamp(min=1)]


def train_step(
    model: MTPModel,
    rows: Batches,
    index: int,
    recipe: settings.Recipe,
    device: torch.device,
    world: int,
    rank: int,
    autocast: contextlib.AbstractContextManager[Any],
) -> tuple[torch.Tensor, int]:
    """Forward and backward of global batch ``index``; returns this rank's share of the loss, and its tokens.

    The loss is a sum over the global batch divided by its count of labels, which every rank knows before its first
    forward (``design`` of the objective: 1 x 8 and 2 x 2 x 2 give the same gradients).
    """
    x, document, pad = rows.take(rows.global_batch(index))
    labels, mask = make_labels(x, recipe.model.heads, document, pad)
    count = mask.sum().clamp(min=1)
    tokens = int((~pad).sum())
    share = torch.arange(len(x)).chunk(world)[rank]
    micro = share.split(recipe.data.train.batch_size)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for i, take in enumerate(micro):
        last = i == len(micro) - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
        with autocast:
            loss, _ = model(*(t[take].to(device) for t in (x, document, labels, mask)), count=count.to(device))
        (loss * world).backward()  # FSDP averages over the ranks; the objective is a sum
        total += loss.detach().float()
    return total, tokens


def run(args: argparse.Namespace, stop: Stop, progress: Progress) -> int:
    """From settings to the last checkpoint. Returns the exit code."""
    began = time.monotonic()
    config, recipe = settings.load_pair(args.config, args.recipe, args.overrides, env=args.env)
    if args.verbose:
        say(json.dumps(settings.resolved(config, recipe), indent=2))
    if recipe.train.algo != "baseline-mtp":
        raise BadInput(
            f"train.algo: {recipe.train.algo} can't be trained by this version; rule: baseline-mtp is what it has; "
            "next: ALGO=baseline-mtp"
        )
    base = local_path(config.paths.models.base, "paths.models.base")
    name = args.run_name or recipe.run.name
    if args.dry_run:
        with torch.device("meta"):
            model = MTPModel(read_spec(base))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        say(f"train     dry run of {name}: {millions:.1f} M parameters, {recipe.model.heads} heads; nothing started")
        return DONE

    device = pick_device(config)
    world = start_ranks(config, device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(config.seed)
    say(
        f"train     {name}: {recipe.train.algo}, {world} rank(s) on {device.type}, fsdp "
        f"{config.devices.fsdp.sharding if config.devices.fsdp.enabled and world > 1 else 'off'}"
    )

    tokenizer = load_tokenizer(base)
    rows_per_step = recipe.data.train.batch_size * world * recipe.train.accumulation_steps
    rows, eval_rows = load_rows(config, recipe, tokenizer, rows_per_step)
    model = build_model(config, recipe, base, device, world)
    model.train()
    optimizer = adamw(model, recipe)
    total = math.ceil(len(rows.rows) * recipe.train.num_epochs / rows_per_step)
    total = min(total, recipe.train.max_steps or total)

    kind, where = PathResolver().resolve(config.paths.checkpoints.base_path)
    app = Path(PathResolver().resolve("file:///app")[1])
    disk = Path(where) if kind == "file" else app / "checkpoints"
    checkpoints = Checkpoints(
        disk / name,
        f"{where.rstrip('/')}/{name}" if kind == "s3" else None,
        keep_last=config.paths.checkpoints.keep_last,
        retries=config.storage.retries,
        concurrency=config.storage.workers,
        part_mb=config.storage.part_size_mb,
    )
    # Parameters and Adam's two moments: known now, so not found out at the first save.
    checkpoints.need_room("a checkpoint", 3 * sum(local_bytes(p) for p in model.parameters()))
    state: dict[str, Any] = {
        "held_out_before": [],
        "best": None,
        "waited": 0,
        "ended": False,
        "mlflow_run_id": None,
    }
    step = resume(checkpoints, model, optimizer, state, rank)
    total = step if state["ended"] else total
    progress.step = step
    say(
        f"train     {len(rows.rows)} rows of {recipe.data.train.max_length}, {rows_per_step} a step, {total} steps; "
        f"{f'goes on after step {step}' if step else f'ready after {time.monotonic() - began:.0f} s'}"
    )

    tracker = None
    if rank == 0:
        tracker = progress.tracker = Tracker(
            PathResolver().resolve_tracking(config.mlflow.tracking_uri),
            config.mlflow.experiment,
            name,
            tags={tag: "true" for tag in args.tags.split(",") if tag},
            params=flat(settings.resolved(config, recipe)),
            state_file=checkpoints.folder / "mlflow.json",
        )
    if eval_rows and not state["held_out_before"]:
        state["held_out_before"] = held_out(model, eval_rows, recipe, device, world, rank)
        say(f"held out  before: {mean(state['held_out_before']):.3f}  per head {shown(state['held_out_before'])}")

    half = config.devices.mixed_precision == "bf16" and not dist.is_initialized()
    autocast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    record = reopen(checkpoints.folder / "steps.jsonl", step) if rank == 0 else None
    first, began_steps, tokens_done = step, time.monotonic(), 0
    early = recipe.train.early_stopping
    saved = step if step else -1
    while step < total:
        tick = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        loss, tokens = train_step(model, rows, step, recipe, device, world, rank, autocast)
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), recipe.optim.grad_clip if recipe.optim.grad_clip > 0 else math.inf
        )
        if isinstance(norm, torch.distributed.tensor.DTensor):
            norm = norm.full_tensor()
        step += 1
        hours_over = time.monotonic() - began > (config.launcher.max_hours or math.inf) * 3600
        seen = all_sum(torch.stack([loss.cpu(), torch.tensor(float(bool(stop.cause) or hours_over))]))
        wmtp_loss, grad_norm = float(seen[0]), float(norm)
        if not (math.isfinite(wmtp_loss) and math.isfinite(grad_norm)):
            raise RuntimeError(f"step {step}: loss {wmtp_loss}, gradient norm {grad_norm}: not finite")
        rate = learning_rate(step, total, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        progress.step = step
        tokens_done += tokens
        if record and tracker:
            seconds = time.monotonic() - tick
            figures = {
                "wmtp_loss": wmtp_loss,
                "grad_norm": grad_norm,
                "lr": rate,
                "tokens_per_second": tokens / seconds,
            }
            record.write(json.dumps({"step": step, **figures}) + "\n")
            record.flush()
            if step % config.log_interval == 0 or step in (1, total):
                tracker.log(step, figures)
                left = (total - step) * (time.monotonic() - began_steps) / (step - first)
                say(
                    f"Step {step}/{total}  wmtp_loss {wmtp_loss:.3f}  {figures['tokens_per_second']:.0f} tok/s"
                    f"  gradient norm {grad_norm:.2f}  {left:.0f} s left"
                )
        stopping = float(seen[1]) > 0
        if eval_rows and step % recipe.eval.interval == 0 and step < total:
            now = held_out(model, eval_rows, recipe, device, world, rank)
            if tracker:
                tracker.log(step, {f"held_out_ce_head_{k}": v for k, v in enumerate(now)})
            if early.enabled:
                better = state["best"] is None or mean(now) < state["best"]
                state["best"] = mean(now) if better else state["best"]
                state["waited"] = 0 if better else state["waited"] + 1
                if state["waited"] >= early.patience:
                    say(f"train     no lower held-out loss in {early.patience} evaluations: it ends here")
                    total, state["ended"] = step, True
        if step % config.paths.checkpoints.save_interval == 0 or step == total or stopping:
            state["mlflow_run_id"] = tracker.run_id if tracker else None
            checkpoints.save(step, model, optimizer, state)
            saved = step
            say(f"save      step {step}: {checkpoints.folder / f'step-{step}'}")
        if stopping and step < total:
            checkpoints.close()
            if tracker:
                tracker.finish("KILLED")
            progress.cause = stop.cause or "max_hours"
            say(f"train     stopped after step {step} ({progress.cause}), saved; next: the same command goes on")
            return RESUME_ME
    train_seconds = time.monotonic() - began_steps

    # ---- the end -------------------------------------------------------------------------------------------------

    after = held_out(model, eval_rows, recipe, device, world, rank) if eval_rows else []
    if after:
        say(f"held out  after: {mean(after):.3f}  per head {shown(after)}")
    if config.paths.checkpoints.save_final:
        export(model, read_spec(base), checkpoints, base, rank)
    checkpoints.close()
    if record and tracker:
        record.close()
        if after:
            tracker.log(step, {f"held_out_ce_head_{k}": v for k, v in enumerate(after)})
        tracker.finish("FINISHED")
        summary = {
            "run": name,
            "ranks": world,
            "fsdp": config.devices.fsdp.sharding if config.devices.fsdp.enabled and world > 1 else "off",
            "steps": step,
            "steps_now": step - first,
            "held_out_ce_before": mean(state["held_out_before"]),
            "held_out_ce_after": mean(after),
            "held_out_ce_before_heads": state["held_out_before"],
            "held_out_ce_after_heads": after,
            "tokens_per_second": tokens_done / train_seconds if tokens_done else None,
            "mlflow_run_id": tracker.run_id,
            "checkpoint": f"{checkpoints.remote or checkpoints.folder}/step-{saved}",
            "seconds_train": time.monotonic() - began,
        }
        if args.summary:
            write_whole(args.summary, json.dumps(summary, indent=2) + "\n")
    say(f"train     done: {step} steps, {time.monotonic() - began:.0f} s")
    return DONE


def resume(
    checkpoints: Checkpoints,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    rank: int,
) -> int:
    """Load the newest whole checkpoint of this run, from disk or bucket, into everything; returns its step, or 0."""
    newest = torch.zeros(2, dtype=torch.int64)
    problem: Exception | None = None
    if rank == 0:
        try:
            checkpoints.fetch_newest()
        except CheckpointError as error:
            problem = error
        steps = checkpoints.steps()
        newest = torch.tensor([steps[-1] if steps else 0, int(problem is not None)])
    if int(all_sum(newest)[1]):
        raise problem or CheckpointError("rank 0 could not read the bucket's checkpoints")
    step = int(newest[0])
    if step:
        state.update(checkpoints.load(step, model, optimizer))
        state.pop("step")
        if rank == 0:
            checkpoints.upload(checkpoints.folder / f"step-{step}")  # a kill may have come before its upload ended
    return step


def export(model: MTPModel, spec: Any, checkpoints: Checkpoints, base: Path, rank: int) -> None:
    """The trained model as a Hugging Face folder ``final`` beside the checkpoints, and in the bucket. Collective."""
    whole: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        staging, final = checkpoints.folder / ".step-final", checkpoints.folder / "final"
        export_hf(whole, spec, staging, base)
        checkpoints.finish(staging, final)
        checkpoints.upload(final)


# ---- small things ------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def shown(values: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def reopen(path: Path, step: int) -> TextIO:
    """The record of steps up to ``step``, open to go on; what a kill left beyond it, or torn, is trained again."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))
    return path.open("a")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text)
    staging.replace(path)


def failure(error: Exception, rank: int, log: Path | None) -> tuple[int, str, str]:
    """Exit code, cause and what a person sees of ``error``; the traceback goes to ``log``."""
    if isinstance(error, settings.ConfigError):
        return BAD_INPUT, str(error), str(error)
    if isinstance(error, BadInput | DataError | ModelError):
        return BAD_INPUT, str(error), "train     FAIL  " + "\n              ".join(str(error).split("; "))
    system = error.__cause__ if isinstance(error, CheckpointError) else error
    full = isinstance(system, OSError) and system.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR)
    code = TRANSFER if isinstance(error, TransferError) else DISK if full else FAILED
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    first = f"read {log}, then " if log and code == FAILED else "mend it, then "
    return (
        code,
        f"rank {rank}: {kind}{error}",
        f"train     FAIL  rank {rank}: {kind}{error}\n"
        "              rule  a failed step ends the run; what was saved stays\n"
        f"              next  {first}start the same command: it goes on from the newest checkpoint",
    )


def claim(path: Path | None, text: str) -> bool:
    """Write ``path`` unless another rank did: the first to fail knows why, the others see it leave."""
    if path is None:
        return True
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(text)
        path.hardlink_to(staging)
    except FileExistsError:
        return False
    except OSError as error:
        print(f"train     warn  {path}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        staging.unlink(missing_ok=True)
    return True


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    die_with_parent()
    stop, progress = Stop(), Progress()
    rank = int(os.environ.get("RANK", "0"))
    if args.exit_file and rank == 0:
        args.exit_file.unlink(missing_ok=True)
    try:
        code, text = run(args, stop, progress), ""
    except Exception as error:
        log = args.exit_file.with_name(f"traceback-rank-{rank}.log") if args.exit_file else None
        code, progress.cause, text = failure(error, rank, log)
        if code == FAILED and log:
            with contextlib.suppress(OSError):  # a full disk has a message of its own
                write_whole(log, traceback.format_exc())
        if args.verbose or (code == FAILED and not log):
            traceback.print_exc()
    if rank == 0 or text:
        ending = {"code": code, "step": progress.step, "cause": progress.cause}
        if claim(args.exit_file, json.dumps(ending) + "\n") and text:
            print(text, file=sys.stderr, flush=True)
    if text and progress.tracker:
        progress.tracker.finish("FAILED")
    if dist.is_initialized():
        if text:
            os._exit(code)  # a group whose other ranks are gone can't be closed; torchrun ends them
        dist.destroy_process_group()
    # torchrun ends the others at the first code that is not 0, and rank 0 may still be uploading.
    return DONE if code == RESUME_ME and rank > 0 else code


if __name__ == "__main__":
    sys.exit(main())
