"""What only a GPU can tell, in 25 minutes at most: one script, one table, written as it comes.

    python benchmarks/gpu.py [--out build/gpu.md]        on one GPU
    python benchmarks/gpu.py --device cpu --tiny         the same code in seconds, to see that it runs; its figures say
                                                         nothing about a GPU

Random weights, four heads, precision and sharding policy as in production, over one rank. Each section is a process of
its own with a limit of time, so that one that fails takes nothing from the others. Share of the peak (MFU): tokens/s x
`wmtp.meter.flops_per_token` (6 x parameters that multiply + 12 x layers x S x D; all heads counted, recomputation not)
over the card's dense bf16 peak by its data sheet.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss import forget_peak, peak_mib
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from wmtp import memory
from wmtp.config import Config, Recipe, load_pair
from wmtp.data import Batches, pack
from wmtp.meter import flops_per_token, peak_flops
from wmtp.model import LMHead, ModelSpec, MTPModel, Weighing, _Compiled
from wmtp.optim import adamw, rows_per_step
from wmtp.ranks import Place
from wmtp.step import Weighting, clip_gradients, share_of, train_step
from wmtp.train import allocate, mesh_of, planned_model
from wmtp.weights import read_spec

ROOT = Path(__file__).parent.parent
SEVEN = read_spec(ROOT / "configs/shapes/llama-7b-mtp")
BILLION = ModelSpec("hf", 4, 2048, 12, 32, 32, 5632, 32000)
TINY = ModelSpec("hf", 4, 64, 1, 4, 4, 96, 500)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where a section measures, and where it writes."""

    device: str
    tiny: bool
    out: Path

    @property
    def length(self) -> int:
        return 32 if self.tiny else 2048

    @property
    def rounds(self) -> int:
        return 1 if self.tiny else 5

    def write(self, *lines: str) -> None:
        with self.out.open("a") as file:
            for line in lines:
                print(line, file=file)
                print(line, flush=True)

    def table(self, *columns: str) -> None:
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def row(self, *cells: object) -> None:
        self.write(f"| {' | '.join(str(c) for c in cells)} |")

    def forget(self) -> None:
        """The peak is looked for from here on."""
        torch.cuda.reset_peak_memory_stats() if self.device == "cuda" else forget_peak()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else peak_mib() / 1024

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds, after rounds that aren't counted."""
        unseen = 1 if self.tiny else 2
        found = []
        for _ in range(self.rounds + unseen):
            began = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return statistics.median(found[unseen:])

    def settings(self, *changes: str) -> tuple[Config, Recipe]:
        """Production's, on one rank: a run of one is not sharded, but each of many is."""
        sets = [f"data.{part}.max_length={self.length}" for part in ("train", "eval")]
        if self.device == "cpu":
            sets += ["devices.compute_backend=cpu", "devices.distributed.backend=gloo", "devices.compile=false"]
        sets += changes
        files = (ROOT / "configs/config.vessl.yaml", ROOT / "configs/recipe.baseline_mtp.yaml")
        config, recipe = load_pair(*files, sets, env="production")
        one = config.launcher.resources.model_copy(update={"gpus": 1})
        launcher = config.launcher.model_copy(update={"resources": one})
        return config.model_copy(update={"launcher": launcher}), recipe

    def place(self) -> Place:
        """One rank, with the process group that sharding wants."""
        backend = "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Place(torch.device(self.device, 0) if self.device == "cuda" else torch.device("cpu"))

    def spec(self, shape: ModelSpec) -> ModelSpec:
        return TINY if self.tiny else shape


class Training:
    """The trainer's step on a model of random weights."""

    def __init__(self, bench: Bench, spec: ModelSpec, *changes: str) -> None:
        config, self.recipe = bench.settings(*changes)
        self.place, self.spec = bench.place(), spec
        self.weighting = Weighting(self.recipe)
        self.model: MTPModel = planned_model(config, self.recipe, spec, self.weighting)
        allocate(self.model, config, mesh_of(config, self.place), self.place)
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
        self.model.train()
        self.optimizer = adamw(self.model, self.recipe)
        rows = rows_per_step(self.recipe, 1)
        g = torch.Generator().manual_seed(0)
        x = torch.randint(spec.vocab_size, (rows, bench.length), generator=g)
        self.batches = Batches(pack(x.tolist(), bench.length, 2, True), rows, 0)
        self.tokens = rows * bench.length

    def gradients(self) -> None:
        share = share_of(self.batches, 0, self.spec.heads, self.recipe.data.train.batch_size, self.place)
        self.model.zero_grad(set_to_none=True)
        train_step(self.model, share, self.weighting, self.place)
        clip_gradients(self.model, self.recipe.optim.grad_clip)

    def share_of_peak(self, bench: Bench, seconds: float) -> str:
        name = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
        most, done = peak_flops(name, "bf16"), flops_per_token(self.spec, bench.length) * self.tokens / seconds
        return f"{100 * done / most:.1f} %" if most else f"not known ({done / 1e12:.4f} TFLOP/s)"

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()


# ---- sections ----------------------------------------------------------------------------------------


def card(bench: Bench) -> None:
    """The machine."""
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU (tiny: nothing here speaks of a GPU)"
    bench.write(f"# {name}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}")


def _step(bench: Bench, spec: ModelSpec) -> None:
    config, recipe = bench.settings()
    told = memory.apart(memory.step_peak, config, recipe, spec).result().bytes / 2**30
    bench.table("layers + heads", "parameters", "tokens/s", "share of the peak", "peak GiB", "predicted GiB")
    training = Training(bench, spec)
    training.step()
    bench.forget()
    spent = bench.seconds(training.step)
    millions = sum(p.numel() for p in training.model.parameters()) / 1e6
    bench.row(
        f"{spec.trunk_layers} + {spec.heads}",
        f"{millions:.1f} M",
        f"{training.tokens / spent:.0f}",
        training.share_of_peak(bench, spent),
        f"{bench.peak_gib():.2f}",
        f"{told:.2f}",
    )
    if bench.device == "cuda":
        kernels(bench, training.step)


PARTS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "attention": ("fmha", "flash", "attention"),
    "AdamW, clipping": ("multi_tensor", "adam", "lpnorm"),
    "ranks": ("nccl",),
    "softmax": ("softmax",),
    "copies, casts, sums of gradients": ("copy", "memcpy", "memset", "cat", "add"),
}
"""Part of a step by words in a kernel's name; the first that fits."""


def kernels(bench: Bench, step: Callable[[], None]) -> None:
    """Where the time of a step goes, by kernel."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
        torch.cuda.synchronize()
    wall = time.perf_counter() - began
    parts: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            lower = event.name.lower()
            part = next((p for p, words in PARTS.items() if any(w in lower for w in words)), "the rest, elementwise")
            parts[part] += event.device_time / 1e6
            names[f"{event.name[:110]}`, {part}"] += event.device_time / 1e6
    parts["no kernel"] = max(0.0, wall - parts.total())
    bench.write("", f"One step under the profiler, {wall:.3f} s:", "")
    bench.table("part", "share")
    for part, spent in parts.most_common():
        bench.row(part, f"{100 * spent / wall:.1f} %")
    bench.write("")
    bench.table("kernel", "share")
    for name, spent in names.most_common(16):
        bench.row(f"`{name}", f"{100 * spent / wall:.1f} %")


def step_1b(bench: Bench) -> None:
    """A model of 1 B parameters: a step as in production"""
    _step(bench, bench.spec(BILLION))


def _card_bytes() -> int:
    """Asked of the driver: a process that has touched the GPU can't fork the memory's walk."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(command, text=True).split()[0]) << 20


def step_7b(bench: Bench) -> None:
    """The 7B shape with as many layers as the card holds: a step as in production"""
    spec = bench.spec(SEVEN)
    if not bench.tiny:
        room = _card_bytes() - 20 * 2**30
        while spec.trunk_layers > 1 and 4 * memory.whole_bytes(spec) > room:  # weights, gradients, two moments
            spec = dataclasses.replace(spec, trunk_layers=spec.trunk_layers - 1)
    _step(bench, spec)


def losses(bench: Bench) -> None:
    """Forward and backward of the unweighted loss alone, bf16, by others' kernels and ours"""
    spec = bench.spec(SEVEN)
    g = torch.Generator().manual_seed(0)
    n, device = 2 * bench.length, torch.device(bench.device)
    hidden = torch.randn(1, n, spec.heads, spec.hidden, generator=g).to(device, torch.bfloat16).requires_grad_()
    labels = torch.randint(spec.vocab_size, (1, n, spec.heads), generator=g).to(device)
    mask = torch.ones_like(labels, dtype=torch.bool)
    head = LMHead(spec.hidden, spec.vocab_size).to(device, torch.bfloat16)
    flat, y = lambda: hidden.flatten(0, -2), labels.flatten()

    def naive() -> Tensor:
        return F.cross_entropy(F.linear(flat(), head.weight).float(), y)

    def liger() -> Tensor:
        return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy(
            flat(), head.weight, y
        )

    def cut(kind: str) -> Tensor:
        return importlib.import_module("cut_cross_entropy").linear_cross_entropy(flat(), head.weight, y, impl=kind)

    quick = _Compiled.make()

    def ours(positions: int | None, fused: type[_Compiled] | None = None) -> Tensor:
        head.positions, head.fused = positions, fused
        return head(hidden, labels, mask, mask.sum(), Weighing())[0]

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(None),
        "ours, 256 positions at once": lambda: ours(256),
        "ours, 1024": lambda: ours(1024),
        "ours, all": lambda: ours(n),
        **({} if bench.tiny else {"ours, compiled": lambda: ours(None, quick)}),
        "naive: all logits": naive,
        "F.linear_cross_entropy": lambda: F.linear_cross_entropy(flat(), head.weight, y),
        "liger-kernel, fused linear": liger,
        "cut-cross-entropy": lambda: cut("cce"),
        "cut-cross-entropy, exact": lambda: cut("cce_exact"),
    }
    pip = {"liger-kernel, fused linear": "liger-kernel"} | dict.fromkeys(list(ways)[-2:], "cut-cross-entropy")
    bench.table("way", "ms", "peak GiB above inputs", "loss")
    for name, way in ways.items():

        def work(way: Callable[[], Tensor] = way) -> float:
            loss = way()
            loss.backward()
            hidden.grad = head.weight.grad = None
            return float(loss.detach())

        try:
            bench.forget()
            before = bench.peak_gib()
            value = work()
            peak = bench.peak_gib() - before
            bench.row(name, f"{1e3 * bench.seconds(work):.1f}", f"{peak:.2f}", f"{value:.5f}")
        except ImportError as error:
            bench.row(name, f"not installed ({error}): pip install {pip.get(name, name)}", "", "")
        except Exception as error:  # out of memory, or a kernel that does not know the card: the others go on
            bench.row(name, f"failed: {type(error).__name__}", "", "")


def layers(bench: Bench) -> None:
    """Recomputation and torch.compile, on 8 + 4 layers of the 7B shape"""
    bench.table(
        "activation_ckpt", "compile", "tokens/s", "share of the peak", "first step, s", "peak GiB", "predicted GiB"
    )


def layers_as(bench: Bench, recompute: str, compiled: bool) -> None:
    if bench.tiny and (compiled or recompute != "selective"):
        bench.row(recompute, str(compiled).lower(), "left out when tiny", "", "", "", "")
        return
    spec = bench.spec(dataclasses.replace(SEVEN, trunk_layers=8))
    changes = [f"devices.fsdp.activation_ckpt={recompute}", f"devices.compile={str(compiled).lower()}"]
    told = memory.apart(memory.step_peak, *bench.settings(*changes), spec).result().bytes / 2**30
    training = Training(bench, spec, *changes)
    began = time.perf_counter()
    training.step()
    first = time.perf_counter() - began
    bench.forget()
    spent = bench.seconds(training.step)
    bench.row(
        recompute,
        str(compiled).lower(),
        f"{training.tokens / spent:.0f}",
        training.share_of_peak(bench, spent),
        f"{first:.1f}",
        f"{bench.peak_gib():.2f}",
        f"{told:.2f}",
    )


def chunks(bench: Bench) -> None:
    """loss.chunk_positions, on the model of 1 B"""
    training = Training(bench, bench.spec(BILLION))
    bench.table("chunk_positions", "tokens/s", "peak GiB")
    for size in [None] if bench.tiny else [None, 256, 512, 1024, 2048, 4096, 8192]:
        training.model.lm_head.positions = size  # None: as it finds best by itself
        training.step()
        bench.forget()
        spent = bench.seconds(training.step)
        bench.row(size or "auto", f"{training.tokens / spent:.0f}", f"{bench.peak_gib():.2f}")


def optimizers(bench: Bench) -> None:
    """AdamW's two forms, on the model of 1 B: the optimizer's step alone"""
    training = Training(bench, bench.spec(BILLION))
    training.step()
    bench.table("AdamW", "ms", "peak GiB")
    del training.optimizer
    for name in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(training.model.parameters(), **{name: True})
        training.model.zero_grad(set_to_none=True)
        training.gradients()
        bench.forget()
        spent = bench.seconds(optimizer.step)
        del optimizer
        bench.row(name, f"{1e3 * spent:.1f}", f"{bench.peak_gib():.2f}")


SECTIONS: list[tuple[Callable[[Bench], None], int]] = [
    (card, 60),
    (losses, 210),
    (step_7b, 240),
    (layers, 10),
    *(
        (partial(layers_as, recompute=how, compiled=on), 90)
        for how in ("true", "selective", "false")
        for on in (False, True)
    ),
    (step_1b, 210),
    (optimizers, 60),
    (chunks, 170),
]
"""Seconds that each may take: 25 minutes in all."""


def _name(section: Callable[[Bench], None]) -> str:
    return f"{section.func.__name__} {section.keywords}" if isinstance(section, partial) else section.__name__


def _child(section: Callable[[Bench], None], bench: Bench) -> None:
    torch.manual_seed(0)
    if bench.device == "cpu":
        torch.set_num_threads(1)
    if section is not card and not isinstance(section, partial):
        bench.write("", f"## {section.__doc__}", "")
    code = 0
    try:
        section(bench)
    except BaseException as error:
        code = 1
        traceback.print_exc()
        bench.write("", f"{_name(section)}: failed, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    sys.stderr.flush()
    os._exit(code)  # without waiting for what the memory plan forked


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.3 M parameters")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu.md")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("")
    bench = Bench(args.device, args.tiny, args.out)
    # Forked, to import torch once; nothing here may touch the GPU before.
    context = multiprocessing.get_context("fork")
    for section, limit in SECTIONS:
        child = context.Process(target=_child, args=(section, bench))
        child.start()
        child.join(limit)
        if child.is_alive():
            child.kill()
            bench.write("", f"{_name(section)}: stopped after its {limit} s")
        child.join()


if __name__ == "__main__":
    main()
