"""Where this process stands among the ranks, and the two sums that everything shares."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Device, number of ranks and own number; one rank where no process group was started."""

    device: torch.device
    world: int = 1
    rank: int = 0
    half: bool = False
    """bf16 by autocast: on one device, where no sharding policy casts."""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Around every forward."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else contextlib.nullcontext()

    def bring(self, values: Tensor) -> Tensor:
        """``values`` on this rank's device; nobody waits for the copy to a GPU, it queues before what uses it."""
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of a global batch; None where this process is all of them."""
        return dist.group.WORLD if dist.is_initialized() else None

    def facts(self) -> dict[str, object]:
        """What a record says of the machine: number of ranks, kind of device, name of the GPU."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {"world": self.world, "device": self.device.type, "gpu": gpu}

    def total(self, values: Tensor) -> Tensor:
        """``values`` summed over the ranks, on the CPU. Collective."""
        values = values.cpu()
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def any(self, flag: object) -> bool:
        """Whether ``flag`` is true on any rank. Collective."""
        return bool(self.total(torch.tensor(int(bool(flag)))))

    def wait(self) -> None:
        """Until every rank is here. Collective."""
        if dist.is_initialized():
            dist.barrier()
