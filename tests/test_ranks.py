"""One process is all ranks; two of them add up."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from runs import spread

from wmtp.ranks import Place


def test_alone_a_sum_is_what_it_was() -> None:
    place = Place(torch.device("cpu"))
    assert place.total(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert place.any("yes") and not place.any(None) and place.group is None
    place.wait()


def test_half_is_autocast() -> None:
    a = torch.ones(2, 2)
    with Place(torch.device("cpu"), half=True).autocast():
        assert (a @ a).dtype == torch.bfloat16
    with Place(torch.device("cpu")).autocast():
        assert (a @ a).dtype == torch.float32


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    place = Place(torch.device("cpu"), 2, rank)
    found = (place.total(torch.tensor([rank + 1.0])).item(), place.any(rank == 1), place.any(False))
    assert place.group is not None
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_add_up_and_agree(tmp_path: Path) -> None:
    spread(_rank, str(tmp_path))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(3.0, True, False)] * 2
