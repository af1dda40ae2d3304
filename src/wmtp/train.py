"""Train a model with multi-token-prediction heads: arguments, set-up, the loop, the end, in run order.

    python -m wmtp.train --config F --recipe F --run-name N                    one device
    torchrun --nproc-per-node 4 -m wmtp.train --config F --recipe F --run-name N

Standard error is the story, standard output nothing. Exit codes: 0 done, 2 bad input, 10 disk full or not writable,
12 the bucket did not take or give a checkpoint, 20 training failed, 75 stopped with everything saved (start the same
command again and it goes on). torchrun makes 1 of its children's codes: code, cause and step are in ``--exit-file``.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wmtp import causes
from wmtp import config as settings
from wmtp.checkpoint import Checkpoints, local_bytes
from wmtp.data import Batches, Corpus, Tokenizer, load_tokenizer, read_sets
from wmtp.early import first_look, need_base, then_whole
from wmtp.evaluation import held_out_ce, mean, show_weights, shown
from wmtp.export import export_hf
from wmtp.model import LMHead, ModelSpec, MTPModel, RewardModel, ValueHead, finish_meta, no_compiler, shard_units
from wmtp.optim import adamw, learning_rate, plan_told, rows_per_step, total_steps
from wmtp.outcome import (
    BAD_INPUT,
    DONE,
    FAILED,
    RESUME_ME,
    BadInput,
    Phases,
    Progress,
    Stop,
    Stopped,
    claim,
    failure,
    keep_traceback,
    leave_out,
    local_path,
    say,
    write_whole,
)
from wmtp.pace import Pace
from wmtp.paths import PathResolver
from wmtp.pretrain import pretrain_value_head
from wmtp.ranks import Place
from wmtp.record import Recorder, facts_of, tags_of
from wmtp.remote import MARKER
from wmtp.resume import made_of, parts_of, refuse_changes
from wmtp.scoring import load_scores
from wmtp.step import Ahead, Share, Weighting, clip_gradients, figures_of, share_of, train_step
from wmtp.tracking import Tracker
from wmtp.watch import Watch
from wmtp.weights import Stored, add_heads, load_state, read_spec, stream, value_head_state

# ---- arguments ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wmtp.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="where: paths, devices, tracking")
    parser.add_argument("--recipe", required=True, type=Path, help="what: data, algorithm, optimisation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--run-name", help="the same name goes on where it stopped (default: the recipe's)")
    parser.add_argument("--tags", default="", help="for the MLflow run, separated by commas")
    parser.add_argument("--allow", action="append", default=[], metavar="KEY", help="may differ from the checkpoint's")
    parser.add_argument("--after", type=Path, metavar="FILE", help="get ready, then wait for it: models are here")
    parser.add_argument("--first", type=Path, metavar="DIR", help="where settings and tokenizers come before weights")
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


def start_ranks(config: settings.Config, device: torch.device) -> Place:
    """Join the process group if the configuration has one, where its layers can be compiled as it says."""
    if config.devices.compile and (lack := no_compiler(device.type)):
        raise BadInput(
            f"devices.compile: true: {lack}; rule: torch.compile builds kernels with a compiler and Python's headers; "
            "next: --set devices.compile=false, or install them (Debian: gcc g++ python3-dev)"
        )
    distributed = config.devices.distributed
    if not distributed.enabled:
        return Place(device, half=config.devices.mixed_precision == "bf16")
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
    if dist.get_world_size() > 1 and not config.devices.fsdp.enabled:
        raise BadInput(
            f"devices.fsdp.enabled: false with {dist.get_world_size()} ranks; rule: ranks share one model through "
            "FSDP; next: --set devices.fsdp.enabled=true"
        )
    # FSDP's policy casts; without it, autocast does.
    half = config.devices.mixed_precision == "bf16" and not config.devices.fsdp.enabled
    return Place(device, dist.get_world_size(), dist.get_rank(), half)


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies, so that kill -9 of that leaves none (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.environ.get("WMTP_LAUNCHER") not in (None, str(os.getppid())):
        os._exit(RESUME_ME)  # it died while this process imported


def need_shared(folder: Path, place: Place) -> None:
    """Refuse nodes that don't see one folder: a checkpoint would have the shards of one of them. Collective."""
    if place.world == int(os.environ.get("LOCAL_WORLD_SIZE", place.world)):
        return
    probe = folder / f".shared-{os.environ.get('TORCHELASTIC_RUN_ID', 'ranks')}"
    if place.rank == 0:
        probe.touch()
    place.wait()
    alone = place.any(not probe.exists())
    if place.rank == 0:
        probe.unlink()
    if alone:
        raise BadInput(
            f"{folder}: not the same folder on all nodes; rule: all ranks write their shards of a checkpoint into one "
            "folder; next: WMTP_APP_ROOT, or paths.checkpoints.base_path, on a file system that the nodes share"
        )


def mesh_of(config: settings.Config, place: Place) -> DeviceMesh | None:
    """The ranks as FSDP sees them; None where nothing is sharded. Collective."""
    if not (config.devices.fsdp.enabled and dist.is_initialized()):
        return None
    if config.devices.fsdp.sharding == "no_shard":  # replicas of shards of one
        return init_device_mesh(place.device.type, (place.world, 1), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(place.device.type, (place.world,))


def allocate(model: MTPModel | RewardModel, config: settings.Config, mesh: DeviceMesh | None, place: Place) -> None:
    """Shard a model that was built on ``meta`` and give it memory; its weights are then undefined."""
    fsdp = config.devices.fsdp
    if mesh is not None:
        half = torch.bfloat16 if config.devices.mixed_precision == "bf16" else None
        for unit in [*(shard_units(model) if fsdp.auto_wrap else []), model]:
            # A value is compared with its neighbour's: half precision would drown the difference.
            dtype = None if isinstance(unit, ValueHead) else half
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            # full_shard frees the gathered parameters after the forward, but for those that the backward begins with.
            first = isinstance(model, MTPModel) and fsdp.auto_wrap and (unit is model or isinstance(unit, LMHead))
            reshard = fsdp.sharding == "full_shard" and not first
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    finish_meta(model, place.device)


def fill(model: MTPModel | RewardModel, state: Mapping[str, Stored], config: settings.Config, place: Place) -> None:
    """Shard a model that was built on ``meta``, give it memory and weights: no rank ever holds the whole."""
    allocate(model, config, mesh_of(config, place), place)
    stream(model, state)


def planned_model(config: settings.Config, recipe: settings.Recipe, spec: ModelSpec, weighting: Weighting) -> MTPModel:
    """The model that is trained, on ``meta``."""
    with torch.device("meta"):
        model = MTPModel(spec, value_head=weighting.needs_value)
    model.ready_layers(config.devices.fsdp.activation_ckpt, config.devices.compile)
    chunk = recipe.loss.chunk_positions
    model.lm_head.positions = None if isinstance(chunk, str) else chunk
    return model


def build_model(
    config: settings.Config, recipe: settings.Recipe, spec: ModelSpec, folder: Path, weighting: Weighting, place: Place
) -> MTPModel:
    """The model that is trained, with its value head where the algorithm needs one."""
    model = planned_model(config, recipe, spec, weighting)
    fresh = value_head_state(spec) if weighting.needs_value else {}
    fill(model, add_heads(load_state(folder, read_spec(folder)), spec.heads) | fresh, config, place)
    model.train()
    return model


def load_sets(
    config: settings.Config, recipe: settings.Recipe, tokenizer: Tokenizer, shelf: Path, place: Place
) -> dict[str, Corpus]:
    """`train` and, where something is held out, `eval`; their tokens are kept in ``shelf``. Collective."""
    names = [*recipe.data.eval.sources, *recipe.data.train.sources]
    folders = {name: local_path(config.paths.datasets[name], f"paths.datasets.{name}") for name in names}
    if place.rank > 0:
        place.wait()  # rank 0 tokenizes, the others read what it kept
    sets = read_sets(recipe.data, folders, tokenizer, shelf, config.devices.num_proc, say)
    if place.rank == 0:
        place.wait()
    return sets


# ---- the run -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, stop: Stop, progress: Progress) -> int:
    """From settings to the last checkpoint. Returns the exit code."""
    config, recipe = settings.load_pair(args.config, args.recipe, args.overrides, env=args.env)
    stop.max_hours = config.launcher.max_hours
    if stop.watch:
        stop.watch.patience = max(stop.watch.patience, config.devices.distributed.timeout)
    if args.verbose:
        say(json.dumps(settings.resolved(config, recipe), indent=2))
    place = Place(torch.device("cpu")) if args.dry_run else start_ranks(config, pick_device(config))
    place.wait()  # the first collective builds what all others use
    progress.phases.done("ranks")
    name, base_uri = args.run_name or recipe.run.name, config.paths.models.base.rstrip("/")
    # Datasets that the sync brings are not there before its end.
    first = None if settings.bucket_datasets(config, recipe) else args.first
    base, own = first_look(base_uri, args.after, first, stop)
    tokenizer = load_tokenizer(base)
    need_base(str(base), own, recipe, len(tokenizer.pieces()))
    spec = dataclasses.replace(own, heads=recipe.model.heads)
    if args.dry_run:
        with torch.device("meta"):
            millions = sum(p.numel() for p in MTPModel(spec).parameters()) / 1e6
        say(f"train     dry run of {name}: {millions:.1f} M parameters, {recipe.model.heads} heads; nothing started")
        return DONE

    torch.manual_seed(config.seed)
    sharding = config.devices.fsdp.sharding if config.devices.fsdp.enabled and place.world > 1 else "off"
    say(f"train     {name}: {recipe.train.algo}, {place.world} rank(s) on {place.device.type}, fsdp {sharding}")

    if own.heads < spec.heads:
        new = f"{own.heads} to {spec.heads - 1}"
        say(f"train     new heads: {new} begin as copies of the last layer of {Path(base_uri).name}")

    kind, where = PathResolver().resolve(config.paths.checkpoints.base_path)
    disk = Path(where) if kind == "file" else Path(PathResolver().resolve("file:///app/checkpoints")[1])
    remote = where.rstrip("/") if kind == "s3" else None

    def checkpoints_at(place_of: str) -> Checkpoints:
        shelf = Checkpoints(
            disk / place_of,
            f"{remote}/{place_of}" if remote else None,
            keep_last=config.paths.checkpoints.keep_last,
            storage=config.storage,
        )
        progress.shelves.append(shelf)
        return shelf

    checkpoints = checkpoints_at(name)
    need_shared(checkpoints.folder, place)
    beside = args.exit_file.absolute().parent if args.exit_file and place.rank == 0 else None
    ours = beside if beside and beside.name == name else None  # all of it is mirrored: it must be the run's alone
    recorder = Recorder(ours, f"{remote}/{name}" if remote else None, config.storage)
    # Looked at now, before data are read and scored for a run that is refused.
    per_step = rows_per_step(recipe, place.world)
    made = made_of(config, recipe, rows_per_step=per_step)
    at, found = checkpoints.newest()
    if at:
        refuse_changes(parts_of(found, at)[0], made, args.allow, at)
    weighting = Weighting(recipe)
    sets = load_sets(config, recipe, tokenizer, disk / ".tokens", place)
    progress.phases.done("data")
    if args.after:
        base = then_whole(base_uri, base, args.after, stop)
        progress.phases.done("models")
    scores, kept_as = load_scores(
        config,
        recipe,
        tokenizer,
        sets,
        checkpoints_at(".scores"),
        lambda model, state: fill(model, state, config, place),
        place,
        stop,
        name,
    )
    progress.phases.done("scores")
    digests = {"data": sets["train"].digest, "scores": kept_as}
    if at:
        refuse_changes(parts_of(found, at)[1], digests, args.allow, at)
    made |= digests
    rows = Batches(sets["train"].rows, per_step, config.seed)
    held = Batches(sets["eval"].rows, recipe.data.eval.batch_size, config.seed) if "eval" in sets else None
    model = build_model(config, recipe, spec, base, weighting, place)
    # Parameters and Adam's two moments: known now, so not found out at the first save.
    checkpoints.need_room("a checkpoint", 3 * sum(local_bytes(p) for p in model.parameters()))
    optimizer = adamw(model, recipe)
    state: dict[str, Any] = {"held_out_before": [], "best": None, "waited": 0, "ended": False, "mlflow_run_id": None}
    state |= {"made_of": made, "not_finite": 0, "not_finite_in_a_row": 0}
    ours = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    step = progress.step = checkpoints.resume(model, optimizer, state)
    for group, settled in zip(optimizer.param_groups, ours, strict=True):
        group.update(settled)  # rates and decay are the recipe's, also where it was allowed to change
    state["made_of"] = made
    progress.phases.done("load")
    if step:
        weighting.load_state_dict(state["weighting"])
        if weighting.needs_value and recipe.pretrain.enabled and place.rank == 0:
            shelf = checkpoints_at(f"{name}/pretrain")
            if (shelf.folder / "value_head" / MARKER).exists():
                shelf.upload(shelf.folder / "value_head")  # a kill may have come before its upload ended
    elif weighting.needs_value and recipe.pretrain.enabled:
        scored = (held, scores["eval"]) if held else None
        stage1 = checkpoints_at(f"{name}/pretrain")
        at, found = stage1.newest()
        if at:
            recipe_then, digests_then = parts_of(found, at)
            refuse_changes(recipe_then | digests_then, made, args.allow, at)
        pretrain_value_head(model, rows, scores["train"], scored, config, recipe, stage1, place, stop, made)
        stop.rest(over=True)
        progress.phases.done("pretrain")
    total = step if state["ended"] else total_steps(len(rows.rows), per_step, recipe)
    say(
        f"train     {plan_told(len(rows.rows), per_step, total, recipe, state['ended'])}; "
        f"{f'goes on after step {step}' if step else f'ready after {time.monotonic() - stop.began:.0f} s'}"
    )
    facts = facts_of(
        name,
        config,
        recipe,
        env=args.env,
        digests=made,
        total_steps=total,
        checkpoints=f"{remote or disk}/{name}",
        **place.facts(),
    )
    record = recorder.steps(checkpoints.folder, step) if place.rank == 0 else None
    tracker = progress.tracker = Tracker(
        PathResolver().resolve_tracking(config.mlflow.tracking_uri),
        config.mlflow.experiment,
        name,
        tags={tag: "true" for tag in args.tags.split(",") if tag} | tags_of(facts),
        params=settings.flat({half: facts[half] for half in ("config", "recipe")}),
        state_file=checkpoints.folder / "mlflow.json",
        resumed=state["mlflow_run_id"],
        storage=config.storage,
        replay=record.replay(config.log_interval, total) if record else (),
    )
    recorder.facts(facts)
    if held and not state["held_out_before"]:
        looked, state["held_out_before"] = time.time(), held_out_ce(model, held, recipe, place)
        recorder.evaluation(step, looked, state["held_out_before"])
        say(f"held out  before: {mean(state['held_out_before']):.3f}  per head {shown(state['held_out_before'])}")

    # ---- the loop ------------------------------------------------------------------------------------------------

    first, early, saved, starved = step, recipe.train.early_stopping, step or -1, 0
    figures: dict[str, float] = {}

    def share_at(index: int) -> Share:
        return share_of(rows, index, recipe.model.heads, recipe.data.train.batch_size, place, scores.get("train"))

    ahead = Ahead(share_at)
    pace = Pace(spec, recipe.data.train.max_length, config.devices.mixed_precision, place, step, total)
    progress.phases.done("held out")
    while step < total:
        stop.beat(f"in step {step + 1}")
        pace.begin()
        share = ahead.take(step)
        pace.mark("data")
        torch.manual_seed(config.seed + step)  # whatever is drawn in a step is a function of the step
        optimizer.zero_grad(set_to_none=True)
        seen = train_step(model, share, weighting, place, lambda: stop.cause)
        norm = clip_gradients(model, recipe.optim.grad_clip)
        step += 1
        rate = learning_rate(step, total, recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        pace.mark("model")
        checkpoints.staged()
        pace.mark("save")
        if all(map(math.isfinite, (seen.wmtp_loss, norm, seen.value_loss))):
            optimizer.step()
            weighting.remember(seen.excess)
            state["not_finite_in_a_row"], checkpoints.proved = 0, saved if saved > 0 else None
        else:
            leave_out(
                step,
                state,
                checkpoints.proved,
                f"loss {seen.wmtp_loss}, value loss {seen.value_loss}, gradient norm {norm}",
            )
        progress.step = step
        figures = {
            "wmtp_loss": seen.wmtp_loss,
            "grad_norm": norm,
            "lr": recipe.optim.lr * rate,
            "not_finite": state["not_finite"],
            **({"value_loss": seen.value_loss} if weighting.needs_value else {}),
            **figures_of(seen),
            **pace.end(share.tokens),
        }
        if step == first + 1:
            progress.phases.done("first step")
        if record:
            record.add(step, figures)
            starved = starved + 1 if figures["w_mean_head_0"] < 0.3 else 0
            if starved == 10:
                say("weights   warn  head 0 has weighed less than 0.3 for 10 steps: the next token is hardly trained")
            kept = step % config.log_interval == 0 or step in (1, total)
            pace.show(step, figures, kept)
            if kept:
                tracker.log(step, figures)
        stopping = seen.stop and step < total
        if held and step % recipe.eval.interval == 0 and step < total and not stopping:
            stop.rest()
            looked = time.time()
            now = held_out_ce(model, held, recipe, place)
            recorder.evaluation(step, looked, now)
            tracker.log(step, {f"held_out_ce_head_{k}": v for k, v in enumerate(now)})
            if early.enabled:
                better = state["best"] is None or mean(now) < state["best"]
                state["best"] = mean(now) if better else state["best"]
                state["waited"] = 0 if better else state["waited"] + 1
                if state["waited"] >= early.patience:
                    say(f"train     no lower held-out loss in {early.patience} evaluations: it ends here")
                    total, state["ended"] = step, True
        # Parameters that give nothing finite may be spoilt: they don't take a good checkpoint's place.
        due = step % config.paths.checkpoints.save_interval == 0 and not state["not_finite_in_a_row"]
        if due or step == total or stopping:
            stop.rest()
            began, tick = time.time(), time.monotonic()
            state["mlflow_run_id"], state["weighting"] = tracker.run_id, weighting.state_dict()
            recorder.facts(facts | {"mlflow_run_id": tracker.run_id})
            checkpoints.save(step, model, optimizer, state)
            pace.stalled(time.monotonic() - tick)
            progress.phases.span("save", began)
            saved = step
        if stopping:
            raise Stopped(f"after step {step}")
    stop.rest()
    ahead.close()
    pace.close()
    progress.phases.done("train")

    # ---- the end -------------------------------------------------------------------------------------------------

    looked, after = time.time(), held_out_ce(model, held, recipe, place) if held else []
    if after:
        recorder.evaluation(step, looked, after)
        say(f"held out  after: {mean(after):.3f}  per head {shown(after)}")
        tracker.log(step, {f"held_out_ce_head_{k}": v for k, v in enumerate(after)})
    if held and not weighting.even:
        show_weights(
            model, held, weighting, tokenizer, scores.get("eval"), checkpoints, tracker, f"{name}, step {step}", place
        )
        recorder.keep(checkpoints.folder / "weights")
    if config.paths.checkpoints.save_final:
        export(model, spec, checkpoints, base, place, f"Trained for {step} steps with {recipe.train.algo}.")
    progress.close()
    for file in recorder.artifacts():
        tracker.artifact(file)
    tracker.finish("FINISHED")
    progress.phases.done("end")
    recorder.close()
    if record and args.summary:
        summary = {
            "run": name,
            "algo": recipe.train.algo,
            "ranks": place.world,
            "fsdp": sharding,
            "steps": step,
            "steps_now": step - first,
            "held_out_ce_before": mean(state["held_out_before"]),
            "held_out_ce_after": mean(after),
            "held_out_ce_before_heads": state["held_out_before"],
            "held_out_ce_after_heads": after,
            "tokens_per_second": pace.typical(),
            "not_finite": state["not_finite"],
            "seconds": progress.phases.seconds,
            "weights": {name: value for name, value in figures.items() if name.startswith("w_")},
            "ce_heads": [value for name, value in figures.items() if name.startswith("ce_head_")],
            "mlflow_run_id": tracker.run_id,
            "checkpoint": f"{remote or disk}/{name}/step-{saved}",
            "seconds_train": time.monotonic() - stop.began,
        }
        write_whole(args.summary, json.dumps(summary, indent=2) + "\n")
    say(f"train     done: {step} steps, {time.monotonic() - stop.began:.0f} s")
    return DONE


def export(model: MTPModel, spec: ModelSpec, checkpoints: Checkpoints, base: Path, place: Place, told: str) -> None:
    """The trained model as a Hugging Face folder ``final`` beside the checkpoints, and in the bucket. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    if place.rank == 0:
        staging, final = checkpoints.folder / ".step-final", checkpoints.folder / "final"
        export_hf(whole, spec, staging, base, [told])
        checkpoints.finish(staging, final)
        checkpoints.upload(final)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    beside = args.exit_file.with_name if args.exit_file else None
    progress = Progress(phases=Phases(beside("phases.jsonl") if beside and rank == 0 else None))

    def hang(what: str) -> None:
        threading.Timer(10, os._exit, (FAILED,)).start()  # a log that takes no more words may be what hangs
        progress.cause, progress.kind = f"rank {rank}: {what}", causes.HANG
        claim(args.exit_file, FAILED, progress)
        print(
            f"train     FAIL  {progress.cause}\n              rule  a step that doesn't end is ended, with a record\n"
            f"              next  read {beside('flight-rank-*.log') if beside else 'the record'}: the rank that stands "
            "elsewhere than the others is the one; start the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILED)

    watch = Watch(beside(f"flight-rank-{rank}.log") if beside else None, hang)
    stop = Stop(watch)
    if args.exit_file and rank == 0:
        args.exit_file.unlink(missing_ok=True)
    text = ""
    try:
        try:
            code = run(args, stop, progress)
        except Stopped as reached:
            code, progress.cause = RESUME_ME, stop.cause or "another rank's signal"
            progress.close(hurry=True)
            if progress.tracker:
                progress.tracker.finish("KILLED")
            say(f"train     stopped {reached} ({progress.cause}), saved; next: the same command goes on")
    except Exception as error:
        log = args.exit_file.with_name(f"traceback-rank-{rank}.log") if args.exit_file else None
        code, progress.kind, progress.cause, text = failure(error, rank, log)
        if code != BAD_INPUT:
            keep_traceback(log)
        if args.verbose or (code == FAILED and not log):
            traceback.print_exc()
    if rank == 0 or text:
        first = claim(args.exit_file, code, progress)
        if text and first:
            print(text, file=sys.stderr, flush=True)
        elif text and code != BAD_INPUT:  # most often of the rank that left first, but its own cause is nowhere else
            print(f"train     rank {rank} ended too: {progress.cause}", file=sys.stderr, flush=True)
    watch.close()
    if text:
        progress.settle()
        if progress.tracker:
            progress.tracker.finish("FAILED")
    if dist.is_initialized():
        if text:
            os._exit(code)  # a group whose other ranks are gone can't be closed; torchrun ends them
        dist.destroy_process_group()
    # torchrun ends the others at the first code that is not 0, and rank 0 may still be uploading.
    return DONE if code == RESUME_ME and rank > 0 else code


if __name__ == "__main__":
    sys.exit(main())
