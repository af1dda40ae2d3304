"""Interleaved timing: the ways take turns, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping


def interleave(ways: Mapping[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each way in ``pairs`` rounds, after one round that isn't counted; the order changes each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(pairs + 1):
        names = list(ways)
        random.Random(turn).shuffle(names)
        for name in names:
            began = time.perf_counter()
            ways[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios, with a bootstrap interval of 95 %."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, CPU, load {load:.2f} at the start, {time.strftime('%Y-%m-%d')}"
