"""How fast a run is, and how a person sees it: figures of each step, a line now and then, a bar on a terminal."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections import deque

import torch
from tqdm import tqdm

from wmtp.meter import flops_per_token, peak_flops
from wmtp.model import ModelSpec
from wmtp.outcome import say
from wmtp.ranks import Place
from wmtp.vitals import RECENT, risen


class Pace:
    """The clock of a run's steps, on every rank; rank 0 tells."""

    def __init__(self, spec: ModelSpec, length: int, precision: str, place: Place, first: int, total: int) -> None:
        """``length``: tokens of a row; steps ``first + 1`` to ``total`` are to come."""
        self.place, self.first, self.total = place, first, total
        self.began = time.monotonic()
        self._rates: list[float] = []
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._lowest, self._warned = math.inf, False
        card = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else ""
        peak = peak_flops(card, precision)
        self._share_per_token = flops_per_token(spec, length) / (peak * place.world) if peak else None
        # A bar for people, lines for files: told apart as every tool does it.
        shown = place.rank == 0 and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, leave=False) if shown else None
        self._tick = self._mark = self.began
        self._parts: dict[str, float] = {}
        self._stalled = 0.0
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place.device)  # what loading and scoring took is none of a step's

    def stalled(self, seconds: float) -> None:
        """A save stood in the way of the next step for so long."""
        self._stalled += seconds

    def begin(self) -> None:
        """A step begins."""
        self._tick = self._mark = time.monotonic()
        self._parts, self._stalled = {"save": self._stalled}, 0.0

    def mark(self, part: str) -> None:
        """What was done since the last mark of this step was ``part``."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._mark
        self._mark = now

    def end(self, tokens: int) -> dict[str, float]:
        """The step is done: its seconds, tokens a second, waits and memory; ``tokens`` are the global batch's."""
        seconds = time.monotonic() - self._tick
        self._rates.append(tokens / seconds)
        if self.place.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.place.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        figures = {
            "step_seconds": seconds,  # without what a save before it took
            "tokens_per_second": self._rates[-1],
            "data_wait_s": self._parts.get("data", 0.0),
            "checkpoint_stall_s": self._parts.get("save", 0.0),
            "memory_gib": memory / 2**30,
        }
        if self._share_per_token:
            figures["mfu"] = figures["tokens_per_second"] * self._share_per_token
        return figures

    def show(self, step: int, figures: dict[str, float], line: bool) -> None:
        """Rank 0 tells of step ``step``; ``line``: it is one of those that a log keeps."""
        self._look_at(figures["wmtp_loss"])
        mfu = f"  MFU {100 * figures['mfu']:.0f} %" if "mfu" in figures else ""
        text = f"wmtp_loss {figures['wmtp_loss']:.3f}  {figures['tokens_per_second']:.0f} tok/s{mfu}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{text}  gradient norm {figures['grad_norm']:.2f}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif line:
            left = (self.total - step) * (time.monotonic() - self.began) / (step - self.first)
            say(f"Step {step}/{self.total}  {text}  gradient norm {figures['grad_norm']:.2f}  {left:.0f} s left")

    def _look_at(self, loss: float) -> None:
        """Tell once that the loss is far above where it was, as the page and the report do."""
        if not math.isfinite(loss):
            return  # told elsewhere, and no figure to compare with
        self._losses.append(loss)
        if math.isinf(self._lowest):
            self._lowest = loss
        middle = statistics.median(self._losses)
        if len(self._losses) == RECENT:
            self._lowest = min(self._lowest, middle)
            if not self._warned and (told := risen(middle, self._lowest)):
                self._warned = True
                say(f"train     warn  {told}")

    def typical(self) -> float | None:
        """Tokens a second of a step, the median; the first left out, which compiles and allocates."""
        return statistics.median(self._rates[1:] or self._rates) if self._rates else None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
