"""The last part of the restore drill: a checkpoint that is here again can be read, every tensor of it.

    python -m wmtp.drill FOLDER --run NAME --step N [--began SECONDS]

No GPU, no ranks; memory for the largest tensor and `BATCH` bytes, and as much again to look at it. The files themselves
were proved before. Standard output: one line of JSON. Exit codes: 0 readable, 13 not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from wmtp.checkpoint import causes_named
from wmtp.remote import MARKER, CheckpointError, marked, wrong_of

BATCH = 2**30
TOLD_EVERY_S = 5.0


def check_marker(folder: Path) -> tuple[int, int]:
    """Files and bytes that the marker lists; all of them are here. Raises CheckpointError."""
    listed = marked(folder)
    for entry in wrong_of(folder, listed):
        raise CheckpointError(f"{entry.path}: not the {entry.bytes} bytes that {MARKER} says")
    return len(listed), sum(entry.bytes for entry in listed)


def check_shards(folder: Path, metadata: Metadata) -> None:
    """Every piece lies within its shard file, and the pieces of a tensor make it whole. Raises CheckpointError."""
    for index, place in metadata.storage_data.items():
        shard = folder / place.relative_path
        if not shard.is_file() or shard.stat().st_size < place.offset + place.length:
            raise CheckpointError(f"{index.fqn}: {place.relative_path} ends before byte {place.offset + place.length}")
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            pieces = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if pieces != math.prod(stored.size):
                raise CheckpointError(f"{name}: {pieces} of its {math.prod(stored.size)} values are stored")


def batches(metadata: Metadata) -> Iterator[dict[str, Any]]:
    """State dictionaries to be filled, of about `BATCH` bytes; what a float tensor does not get stays NaN."""
    state: dict[str, Any] = {}
    size = 0
    for name, stored in metadata.state_dict_metadata.items():
        value: Any = 0
        if isinstance(stored, TensorStorageMetadata):
            value = torch.empty(stored.size, dtype=stored.properties.dtype)
            if value.is_floating_point():
                value.fill_(math.nan)
            size += value.nbytes
        state[name] = value
        if size >= BATCH:
            yield state
            state, size = {}, 0
    if state:
        yield state


def read_all(folder: Path) -> tuple[int, list[str]]:
    """Load every tensor; how many there are, and the names of those that are not finite. Raises what torch raises."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    check_shards(folder, metadata)
    count, done, not_finite = 0, 0, []
    told = time.monotonic()
    for state in batches(metadata):
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                count, done = count + 1, done + value.nbytes
                if value.is_floating_point() and not value.isfinite().all():
                    not_finite.append(name)
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            print(f"verify    read {done / 1e9:.1f} GB", file=sys.stderr, flush=True)
    return count, not_finite


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.drill", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--began", type=float, default=time.time(), help="of the drill, in seconds since the epoch")
    args = parser.parse_args(argv)
    try:
        files, size = check_marker(args.folder)
        step = json.loads((args.folder / "trainer.json").read_text())["step"]
        if step != args.step:
            raise CheckpointError(f"trainer.json says step {step}, its folder step {args.step}")
        with causes_named("torch says"):
            tensors, not_finite = read_all(args.folder)
    except Exception as error:  # whatever stands in a file that was damaged
        what = f"{error}" if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        print(f"verify    FAIL  {args.run}, step {args.step}: can't be read: {what[:500]}", file=sys.stderr)
        return 13
    if not_finite:
        shown = ", ".join(not_finite[:3])
        print(f"verify    warn  {len(not_finite)} tensors hold values that are not finite: {shown}", file=sys.stderr)
    told = {"run": args.run, "step": step, "files": files, "bytes": size, "tensors": tensors}
    told |= {"not_finite": len(not_finite), "seconds": round(time.time() - args.began, 1)}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
