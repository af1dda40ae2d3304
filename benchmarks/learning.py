"""Does it learn? Small models from random weights on the Python standard library's code, by the trainer itself.

    python benchmarks/learning.py [--seeds 3] [--steps 120]      (`make study` runs it too)

Each run is `python -m wmtp.train` with a recipe of the tests, weights drawn from its seed, and files that are held out
by the digest of their text. The reference of rho1 is a model with one head that was trained before on files of its own;
critic's rewards are pseudo rewards of the random initial model, from which there is hardly anything to learn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pairs import interval, machine
from torch import nn

from wmtp.export import export_hf
from wmtp.model import ModelSpec, MTPModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "test_models"))

from generate import tokenizer_file

SPEC = ModelSpec("hf", 4, 64, 2, 4, 4, 192, 32000)
ALGORITHMS = {
    "baseline-mtp": [],
    "rho1-wmtp": ["paths.models.ref=file:///app/models/reference"],
    "critic-wmtp": ["critic.use_pseudo_rewards=true", "pretrain.max_steps=20"],
}
SHARES = {"held": ((0,), 40_000), "reference": ((1, 2, 3), 150_000), "train": ((4, 5, 6, 7, 8, 9), 150_000)}
"""Last digit of a text's digest, and characters that are taken at most."""


def library() -> Iterator[tuple[str, str]]:
    """Name and text of the standard library's modules, by the digest of their text: the same on every machine."""
    top = Path(sysconfig.get_path("stdlib"))
    apart = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
    found = {}
    for path in top.rglob("*.py"):
        if apart.isdisjoint(path.relative_to(top).parts) and 2000 < path.stat().st_size < 60_000:
            text = path.read_text(encoding="utf-8", errors="ignore")
            found[hashlib.sha256(text.encode()).hexdigest()] = (f"# {path.relative_to(top)}", text)
    yield from (found[digest] for digest in sorted(found))


def write_data(folder: Path) -> None:
    """The three data sources, each a folder of JSON Lines."""
    room = {name: most for name, (_, most) in SHARES.items()}
    lines: dict[str, list[str]] = {name: [] for name in SHARES}
    for name, text in library():
        digit = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
        share = next(share for share, (digits, _) in SHARES.items() if digit in digits)
        if room[share] > 0:
            room[share] -= len(text)
            lines[share].append(json.dumps({"prompt": name, "solution": text}))
    for share, content in lines.items():
        (folder / share).mkdir(parents=True)
        (folder / share / "files.jsonl").write_text("\n".join(content) + "\n")


def write_model(folder: Path, spec: ModelSpec, seed: int, tokenizer: Path) -> None:
    torch.manual_seed(seed)
    model = MTPModel(spec)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    export_hf(model.state_dict(), spec, folder, tokenizer)


def train(app: Path, name: str, algorithm: str, base: str, seed: int, steps: int, *sets: str) -> dict[str, Any]:
    """One run of the trainer; its summary."""
    every = [
        f"seed={seed}",
        "log_interval=1000",
        f"paths.models.base=file:///app/models/{base}",
        f"paths.checkpoints.save_interval={steps}",
        "paths.checkpoints.save_final=false",
        *(f"paths.datasets.{share}=file:///app/data/{share}" for share in SHARES),
        "data.train.sources=[train]",
        "data.eval.sources=[held]",
        "data.train.max_length=256",
        "data.eval.max_length=256",
        "eval.max_batches=20",
        f"eval.interval={steps}",
        "train.num_epochs=99",
        f"train.max_steps={steps}",
        "optim.lr=3e-3",
        *sets,
    ]
    command = [sys.executable, "-m", "wmtp.train", "--config", str(ROOT / "tests/configs/config.local_test.yaml")]
    command += ["--recipe", str(ROOT / f"tests/configs/recipe.{algorithm.replace('-', '_')}.yaml"), "--env", "test"]
    command += ["--run-name", name, "--summary", str(app / f"{name}.json")]
    command += [word for one in every for word in ("--set", one)]
    env = {**os.environ, "WMTP_APP_ROOT": str(app), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"learning: {name} ended with {done.returncode}\n{done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads((app / f"{name}.json").read_text())
    return summary


def study(app: Path, seeds: int, steps: int) -> None:
    """All runs under ``app``, a core each, and the table."""
    write_data(app / "data")
    tokenizer = app / "tokenizer"
    tokenizer.mkdir()
    shutil.copyfile(tokenizer_file(), tokenizer / "tokenizer.model")
    for seed in range(seeds):
        write_model(app / f"models/base-{seed}", SPEC, seed, tokenizer)
    write_model(app / "models/reference-0", replace(SPEC, heads=1), 99, tokenizer)
    reference = ["model.heads=1", "data.train.sources=[reference]", "paths.checkpoints.save_final=true"]
    known = train(app, "reference", "baseline-mtp", "reference-0", 99, steps, *reference)
    (app / "checkpoints/reference/final").rename(app / "models/reference")
    print(
        f"\n{SPEC.heads} heads, D {SPEC.hidden}, {steps} steps of 2 rows of 256, {seeds} seeds; held-out files, nats;"
    )
    print(f"the reference ends at {known['held_out_ce_after']:.2f} for the next token (mean, 95 %)\n")
    print("| algorithm | head | before | after | fall |\n" + "| --- " * 5 + "|")
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
        runs = {
            algorithm: [
                pool.submit(train, app, f"{algorithm}-{seed}", algorithm, f"base-{seed}", seed, steps, *sets)
                for seed in range(seeds)
            ]
            for algorithm, sets in ALGORITHMS.items()
        }
        for algorithm, waiting in runs.items():
            found = [one.result() for one in waiting]
            for head in range(SPEC.heads):
                before, after = ([f[f"held_out_ce_{when}_heads"][head] for f in found] for when in ("before", "after"))
                fall = [b - a for b, a in zip(before, after, strict=True)]
                cells = [
                    algorithm,
                    f"{head}",
                    f"{statistics.mean(before):.3f}",
                    interval(after).replace("+", ""),
                    interval(fall),
                ]
                print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11))
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    began = time.monotonic()
    print(machine())
    with tempfile.TemporaryDirectory() as app:
        study(Path(app), args.seeds, args.steps)
    print(f"\nlearning  done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
