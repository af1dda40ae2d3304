"""Interleaved timing, so that a slow minute of the machine hits all ways; intervals of what was measured."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping

# Two-sided 95 % of Student's t, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


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


def interval(values: list[float]) -> str:
    """Mean of 2 to 10 values with its interval of 95 %."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    middle = statistics.mean(values)
    return f"{middle:+.4f} ({middle - half:+.4f} to {middle + half:+.4f})"


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, CPU, load {load:.2f} at the start, {time.strftime('%Y-%m-%d')}"
