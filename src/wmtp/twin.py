"""The shrunken twin: the recipe's own training on two CPU ranks, with models of the same architecture but tiny sizes.

    python -m wmtp.twin --config F --recipe F [--recipe F …] [--set A.B=C] --env production

Three steps through `wmtp.train`, with a checkpoint after the second; then the third is taken away and trained again
from that checkpoint, and must give the same loss. What it can't show is what its sizes hide: memory, speed, the GPU.
Standard output: one JSON line a recipe (recipe, ok, detail, seconds). Exit codes: 0 all ok, 20 one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from wmtp import config as settings
from wmtp import train
from wmtp.export import export_hf
from wmtp.memory import LiveBytes, Peak, apart, step_peak
from wmtp.model import ModelError, ModelSpec, MTPModel, RewardModel
from wmtp.paths import PathResolver
from wmtp.sources import DataError, Record, read_records
from wmtp.weights import read_spec

ROOT = Path(__file__).parents[2]
STEPS, SAVED, LENGTH, RECORDS = 3, 2, 48, 24
STD = 0.05  # large enough that three steps move the loss


class TwinError(RuntimeError):
    """What the twin did otherwise than it must; the log's last lines are in it."""


def shrunken(spec: ModelSpec, vocab: int) -> ModelSpec:
    """The same layout, family, heads and sharing of keys and unembedding; every size small."""
    grouped = spec.n_kv_heads < spec.n_heads
    return dataclasses.replace(
        spec,
        hidden=64,
        trunk_layers=min(spec.trunk_layers, 2),
        n_heads=4,
        n_kv_heads=2 if grouped else 4,
        intermediate=128,
        vocab_size=vocab,
        max_positions=max(LENGTH, 64),
        head_dim=None if spec.head_dim is None else 32,  # not a share of the hidden size here either
    )


@contextlib.contextmanager
def app_root(folder: str | None) -> Iterator[None]:
    """What /app stands for meanwhile; None: nothing else than itself."""
    before = os.environ.get("WMTP_APP_ROOT")
    try:
        os.environ.pop("WMTP_APP_ROOT", None)
        if folder is not None:
            os.environ["WMTP_APP_ROOT"] = folder
        yield
    finally:
        os.environ.pop("WMTP_APP_ROOT", None)
        if before is not None:
            os.environ["WMTP_APP_ROOT"] = before


def records(name: str, uri: str) -> list[Record]:
    """The first records of a source as this machine has it, and a few made ones."""
    kind, path = PathResolver().resolve(uri)
    found: list[Record] = []
    for folder in (Path(path), ROOT / "datasets" / Path(path).name) if kind == "file" else ():
        if not found and folder.is_dir():
            with contextlib.suppress(DataError):  # the dry run's own check of the data tells it
                found = read_records(folder)[: RECORDS - 4]
    made = [Record(f"Add {n} in {name}.", f"def add(x):\n    return x + {n}\n") for n in range(RECORDS)]
    return (found + made)[:RECORDS]


def write_tokenizer(folder: Path, texts: list[str]) -> int:
    """A SentencePiece model with bytes for what it does not know; its number of pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size())


def write_model(folder: Path, role: str, spec: ModelSpec, tokenizer: Path, seed: int) -> None:
    """A folder of Hugging Face's layout with drawn weights; a reward model's are in `model.bin`, as Starling's."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            k: torch.full_like(v, k.endswith("weight"))
            if v.ndim < 2
            else torch.randn(v.shape, generator=generator) * STD
            for k, v in model.state_dict().items()
        }

    if role != "base":
        spec = dataclasses.replace(spec, heads=1)
    export_hf(drawn(MTPModel(spec)), spec, folder, tokenizer)
    if role == "rm":
        state = drawn(RewardModel(spec))
        (folder / "model.safetensors").unlink()
        named = {k if k.startswith("v_head.") else f"model.{k}": v for k, v in state.items()}
        torch.save(named, folder / "model.bin")


def make_world(app: Path, config: settings.Config, recipe: settings.Recipe, origin: str | None = None) -> int:
    """Under ``app``, which stands for /app: data, tokenizer and the models that the recipe needs; its pieces.

    ``origin`` is what /app stands for otherwise: the user's own models and data are there.
    """
    texts: list[str] = []
    for name, uri in config.paths.datasets.items():
        with app_root(origin):
            some = records(name, uri)
        folder = app / "datasets" / name
        folder.mkdir(parents=True)
        (folder / "some.jsonl").write_text("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in some))
        texts += [r.text for r in some]
    # SentencePiece leaves out lines of more than 4192 bytes.
    vocab = write_tokenizer(app / "tokenizer", [line[:1000] for text in texts for line in text.splitlines() if line])
    for seed, (role, uri) in enumerate(settings.needed_models(config, recipe).items()):
        try:
            with app_root(origin):
                spec = read_spec(Path(PathResolver().resolve(uri)[1]))
        except ModelError:  # not on this machine: the plan's, or Llama's architecture as all of these
            assumed = ROOT / "configs" / "shapes" / Path(uri).name
            spec = read_spec(assumed if assumed.is_dir() else ROOT / "configs" / "shapes" / "llama-7b-mtp")
        lacks = recipe.model.new_heads and spec.heads < recipe.model.heads
        spec = spec if lacks else dataclasses.replace(spec, heads=recipe.model.heads)
        write_model(app / "models" / role, role, shrunken(spec, vocab), app / "tokenizer", seed)
    return vocab


def arguments(app: Path, config: settings.Config, recipe: settings.Recipe, ranks: int) -> list[str]:
    """What differs from the cluster's settings: places, sizes, the device."""
    sets = {
        **{f"paths.models.{role}": f"file://{app}/models/{role}" for role in settings.needed_models(config, recipe)},
        **{f"paths.datasets.{name}": f"file://{app}/datasets/{name}" for name in config.paths.datasets},
        "paths.checkpoints.base_path": f"file://{app}/checkpoints",
        "paths.checkpoints.save_interval": SAVED,
        "paths.checkpoints.keep_last": STEPS,
        "mlflow.tracking_uri": f"file://{app}/mlruns",
        "mlflow.registry_uri": f"file://{app}/mlruns",
        "launcher.target": "local",
        "launcher.resources.gpus": ranks,
        "devices.compute_backend": "cpu",
        "devices.compile": "false",
        "devices.distributed.enabled": str(ranks > 1).lower(),
        "devices.distributed.backend": "gloo",
        "devices.fsdp.enabled": str(ranks > 1).lower(),
        "devices.num_proc": 1,
        "data.train.max_length": min(recipe.data.train.max_length, LENGTH),
        "data.eval.max_length": min(recipe.data.eval.max_length, LENGTH),
        # Of so few documents a small share holds out none.
        "data.eval.share": 0.5 if recipe.data.eval.share else 0,
        "data.train.batch_size": min(recipe.data.train.batch_size, 2),
        "train.accumulation_steps": min(recipe.train.accumulation_steps, 2),
        "train.max_steps": STEPS,
        "train.num_epochs": 100,
        "pretrain.max_steps": 1,
        "eval.max_batches": 1,
        "log_interval": 1,
    }
    return [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


def counted(argv: list[str], kept: Path) -> int:
    """`train.main`, with the peak of its second step in live bytes written to ``kept``, by category."""
    live = LiveBytes()
    made, planned, step, seen = train.adamw, train.planned_model, train.train_step, [0]

    def planned_model(*args: Any, **kwargs: Any) -> Any:
        live.__enter__()  # what was made before is data and scores, on a GPU's host
        return planned(*args, **kwargs)

    def adamw(*args: Any) -> torch.optim.Optimizer:
        optimizer = made(*args)
        optimizer.register_step_post_hook(lambda *_: ended())
        return optimizer

    def train_step(*args: Any) -> Any:
        seen[0] += 1
        if seen[0] == 2:  # Adam's moments are there
            live.begin()
        return step(*args)

    def ended() -> None:
        if seen[0] == 2:
            live.__exit__(None, None, None)
            kept.write_text(json.dumps(live.peak))

    for name, function in (("planned_model", planned_model), ("adamw", adamw), ("train_step", train_step)):
        setattr(train, name, function)
    return train.main(argv)


def import_early() -> None:
    """What each rank would import for itself, after the fork, for seconds."""
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "mlflow.store.tracking.sqlalchemy_store"):
        importlib.import_module(name)


def start(argv: list[str], ranks: int, log: Path, kept: Path | None = None) -> list[int]:
    """`wmtp.train` on forked ranks, which share this process's import of torch; their exit codes.

    ``kept``: where rank 0 writes the peak of its live bytes.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if ranks > 1:
                    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                torch.set_num_threads(1)
                train.die_with_parent()
                code = counted(argv, kept) if kept and rank == 0 else train.main(argv)
                sys.stderr.flush()
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def losses(folder: Path) -> dict[int, float]:
    """Loss of each step. Raises TwinError for one that was left out: a long run bears that, a first step must not."""
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for row in rows:
        if row["not_finite"]:
            raise TwinError(
                f"step {row['step']}: loss {row['wmtp_loss']}, gradient norm {row['grad_norm']}: not finite"
            )
    return {row["step"]: row["wmtp_loss"] for row in rows}


def live(
    config_file: str, recipe_file: str, overrides: list[str], env: str, app: Path, origin: str | None = None
) -> str:
    """The twin's whole life under ``app``; what it showed. Raises TwinError."""
    config, recipe = settings.load_pair(config_file, recipe_file, overrides, env=env)
    import_early()
    ranks = 2 if config.devices.distributed.enabled and config.launcher.resources.gpus > 1 else 1
    vocab = make_world(app, config, recipe, origin)
    argv = ["--config", config_file, "--recipe", recipe_file, "--run-name", "twin", "--env", "test"]
    argv += [word for o in overrides for word in ("--set", o)] + arguments(app, config, recipe, ranks)
    argv += ["--set", f"model.vocab_size={vocab}"]
    folder, log = app / "checkpoints" / "twin", app / "log"

    def trained(what: str, kept: Path | None = None) -> dict[int, float]:
        codes = start(argv, ranks, log, kept)
        if any(codes):
            text = log.read_text().splitlines() if log.exists() else []
            told = next((line for line in reversed(text) if "FAIL" in line), text[-1] if text else "no word")
            raise TwinError(f"{what}: ranks ended with {codes}: {' '.join(told.split())[:300]}")
        return losses(folder)

    soon = predict(argv, app)
    first = trained(f"{STEPS} steps", app / "live.json")
    if sorted(first) != [1, 2, 3] or not (folder / f"step-{SAVED}" / ".complete").is_file():
        raise TwinError(f"steps {sorted(first)} are recorded; {STEPS} were to be, with a checkpoint after {SAVED}")
    shutil.rmtree(folder / f"step-{STEPS}")
    again = trained("resumed")
    if again[STEPS] != first[STEPS]:
        raise TwinError(f"the third step after the resume gave {again[STEPS]}, before it {first[STEPS]}")
    shown = " -> ".join(f"{first[n]:.3f}" for n in (1, 2, 3))
    predicted = soon.result().bytes
    measured = sum(json.loads((app / "live.json").read_text()).values())
    return (
        f"{ranks} rank{'s' if ranks > 1 else ''}, {STEPS} steps, saved, resumed, third step equal: loss {shown}; "
        f"live bytes {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f} ({predicted / measured - 1:+.1%})"
    )


def predict(argv: list[str], app: Path) -> Future[Peak]:
    """The peak of a step by `wmtp.memory`, for what the ranks load by ``argv``."""
    sets = [argv[i + 1] for i, word in enumerate(argv) if word == "--set"]
    config, recipe = settings.load_pair(argv[1], argv[3], sets, env="test")
    spec = dataclasses.replace(read_spec(app / "models" / "base"), heads=recipe.model.heads)
    return apart(step_peak, config, recipe, spec)


def lived(config_file: str, recipe_file: str, overrides: list[str], env: str) -> tuple[bool, str, float]:
    """Whether the twin of a recipe lives, what it showed, in how many seconds."""
    began, origin = time.monotonic(), os.environ.get("WMTP_APP_ROOT")
    with tempfile.TemporaryDirectory(prefix="wmtp-twin-") as app, app_root(app):
        try:
            ok, detail = True, live(config_file, recipe_file, overrides, env, Path(app), origin)
        except (TwinError, settings.ConfigError) as error:
            ok, detail = False, str(error)
    return ok, detail, round(time.monotonic() - began, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.twin", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--recipe", required=True, action="append")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--env", required=True)
    args = parser.parse_args(argv)
    bad = 0
    for recipe_file in args.recipe:
        ok, detail, seconds = lived(args.config, recipe_file, args.overrides, args.env)
        bad = bad if ok else 20
        print(json.dumps({"recipe": recipe_file, "ok": ok, "detail": detail, "seconds": seconds}), flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
