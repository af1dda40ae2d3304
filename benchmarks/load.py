"""What filling a sharded model costs each rank: memory and seconds, streamed against sent from rank 0.

    python benchmarks/load.py [--layers 16] [--pairs 3]

A Llama of 1 GB in float32 is written in each layout; two gloo ranks then fill it, new processes each time. `streamed`
is `wmtp.weights.stream`; `from rank 0` is `set_model_state_dict(full_state_dict=True, broadcast_from_rank0=True)` of
the whole state, the way it was done before. Memory is sampled each 5 ms, above what the rank held with its shards given
out. Anonymous memory is what a rank needs for itself; resident memory has also the pages of the files, which ranks
share and the kernel may take back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pairs import machine
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from wmtp.export import export_hf
from wmtp.model import ModelSpec, MTPModel, RewardModel, finish_meta, shard_units
from wmtp.weights import META_NAMES, META_ROOT, load_reward_state, load_state, read_spec, stream

SPEC = ModelSpec("hf", 4, 1024, 12, 16, 16, 2816, 32000)
PARAMS = {"dim": 1024, "n_heads": 16, "n_future_tokens": 4, "vocab_size": 32000}
WAYS = ("streamed", "from rank 0")


def resident(kind: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[kind].split()[0]) * 1024


class Peak:
    """The most of ``RssAnon`` and ``VmRSS`` above their values at the start."""

    def __enter__(self) -> Peak:
        self.base = {kind: resident(kind) for kind in ("RssAnon", "VmRSS")}
        self.most = dict(self.base)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = {kind: max(size, resident(kind)) for kind, size in self.most.items()}

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def grown(self) -> dict[str, int]:
        return {kind: self.most[kind] - self.base[kind] for kind in self.base}


def write(folder: Path, layout: str, layers: int) -> None:
    """The model in one layout; its values don't matter."""
    torch.manual_seed(0)
    spec = dataclasses.replace(SPEC, trunk_layers=layers - SPEC.heads)
    folder.mkdir()
    if layout == "reward":
        spec = dataclasses.replace(spec, heads=1, trunk_layers=layers - 1)
        export_hf(MTPModel(spec).state_dict(), spec, folder, folder)
        (folder / "model.safetensors").unlink()
        whole = RewardModel(spec).state_dict()
        torch.save({k if k.startswith("v_") else f"model.{k}": v for k, v in whole.items()}, folder / "model.bin")
        return
    state = MTPModel(spec).state_dict()
    if layout == "hf":
        export_hf(state, spec, folder, folder)
        return
    names = {ours: theirs for theirs, ours in (META_NAMES | META_ROOT).items()}
    named = {}
    for key, value in state.items():
        kind, _, rest = key.partition(".")
        number, _, rest = rest.partition(".")
        place = {"layers": f"layers.{number}.", "heads": f"extra_heads.{int(number) - 1 if number.isdigit() else 0}."}
        if kind == "heads" and number == "0":
            place["heads"] = f"layers.{spec.trunk_layers}."
        named[place.get(kind, "") + names[rest if kind in place else key]] = value
    torch.save(named, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_layers": layers}))


def rank_of(rank: int, folder: Path, out: Path, way: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    spec = read_spec(folder)
    reward = (folder / "model.bin").exists()
    with torch.device("meta"):
        model = RewardModel(spec) if reward else MTPModel(spec)
    for unit in [*shard_units(model), model]:
        fully_shard(unit)
    finish_meta(model, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # so that the shards' own pages are there before
    dist.barrier()
    began = time.perf_counter()
    with Peak() as peak:
        load = load_reward_state if reward else load_state
        if way == "streamed":
            stream(model, load(folder, spec))
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            whole = {k: v.whole() for k, v in load(folder, spec).items()} if rank == 0 else {}
            set_model_state_dict(model, whole, options=options)
        seconds = time.perf_counter() - began
    size = sum(p.numel() for p in model.parameters()) * 4
    (out / f"{rank}.json").write_text(json.dumps(peak.grown() | {"seconds": seconds, "model": size}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    print("| layout | way | model, MB | anonymous, rank 0 | rank 1 | resident, rank 0 | rank 1 | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as own:
        for layout in ("meta", "hf", "reward"):
            folder = Path(own) / layout
            write(folder, layout, args.layers)
            found: dict[str, list[list[dict[str, float]]]] = {way: [] for way in WAYS}
            for _ in range(args.pairs):
                for way in WAYS:
                    out = Path(own) / "out"
                    out.mkdir()
                    mp.start_processes(rank_of, args=(folder, out, way), nprocs=2, start_method="fork")
                    found[way].append([json.loads((out / f"{n}.json").read_text()) for n in (0, 1)])
                    shutil.rmtree(out)
            for way, runs in found.items():
                size = runs[0][0]["model"]
                told = [
                    f"{max(run[n][kind] for run in runs) / 1e6:.0f}" for kind in ("RssAnon", "VmRSS") for n in (0, 1)
                ]
                seconds = statistics.median(run[0]["seconds"] for run in runs)
                print(f"| {layout} | {way} | {size / 1e6:.0f} | {' | '.join(told)} | {seconds:.2f} |", flush=True)
            shutil.rmtree(folder)
    print(f"{args.pairs} runs a way, the most of their memory, the median of their seconds; {machine()}")


if __name__ == "__main__":
    main()
