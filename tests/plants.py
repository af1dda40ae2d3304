"""Faults that are planted in a rank of `runs.Run` before it starts, where no input brings them about."""

from __future__ import annotations

import functools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _wrapped(name: str, change: Callable[[int, Any], Any]) -> None:
    """Let ``change(calls so far, result)`` see and change what `wmtp.train`'s ``name`` gives."""
    import wmtp.train

    real, calls = getattr(wmtp.train, name), [0]

    @functools.wraps(real)
    def planted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return change(calls[0], real(*args, **kwargs))

    setattr(wmtp.train, name, planted)


def not_finite_in_steps_2_and_5(rank: int) -> None:
    _wrapped("clip_gradients", lambda call, norm: float("inf") if call in (2, 5) else norm)


def no_compiler(rank: int) -> None:
    os.environ["PATH"] = "/nowhere"
    os.environ.pop("CXX", None)


def rank_1_raises_in_step_3(rank: int) -> None:
    def change(call: int, norm: float) -> float:
        if rank == 1 and call == 3:
            raise ArithmeticError("planted in rank 1")
        return norm

    _wrapped("clip_gradients", change)


def rank_1_hangs_in_step_4(rank: int) -> None:
    os.environ["WMTP_HANG_S"] = "3"

    def change(call: int, norm: float) -> float:
        if rank == 1 and call == 4:
            time.sleep(600)
        return norm

    _wrapped("clip_gradients", change)


def no_more_memory_in_step_3(rank: int) -> None:
    """The step needs 1 GiB more than the address space may have: the system refuses it, torch's allocator tells."""
    import torch

    def change(call: int, norm: float) -> float:
        if call == 3:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28), hard))
            try:
                torch.empty(1 << 28)
            finally:  # for the threads that save and record
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        return norm

    _wrapped("clip_gradients", change)


def never_finite(rank: int) -> None:
    _wrapped("clip_gradients", lambda call, norm: float("nan"))
