"""A rank that hangs: noticed in minutes, with a record of where every thread stood.

A collective whose partner is gone waits for the process group's time-out, half an hour by default, on paid GPUs, and
says nothing of the rank that is missing. Here each rank watches itself: without a sign of life for `limit` seconds it
writes the stacks of all its threads beside the exit file and ends, whether it is the one that hangs or one that waits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

HANG_S = 300.0
TIMES = 10  # a sign of life may take this many times the longest gap so far, the first one apart
GRACE = 0.25  # of the limit, between the record and the end: the other ranks, whose limits differ, write theirs


class Watch:
    """`beat` is a sign of life and arms the watch, `rest` disarms it; `on_hang(what)` is called in a thread.

    The stacks are written by a thread of the interpreter's own that needs no lock: a rank that hangs inside a library
    while it holds the interpreter still leaves its record, and is ended by its launcher once the others have left.
    """

    def __init__(self, record: Path | None, on_hang: Callable[[str], None], patience: float = HANG_S) -> None:
        """``patience``: seconds until a gap is known; the first, which may allocate and compile, isn't counted."""
        self.least = float(os.environ.get("WMTP_HANG_S") or HANG_S)
        self.patience = max(self.least, patience)
        self.record, self.on_hang = record, on_hang
        self._where, self._longest, self._due, self._gaps = "", 0.0, 0.0, 0
        self._last: float | None = None
        self._file: IO[str] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def limit(self) -> float:
        """Seconds without a sign of life that are too many."""
        return max(self.least, TIMES * self._longest) if self._longest else self.patience

    def beat(self, where: str) -> None:
        """A sign of life; ``where`` is what begins now ("in step 7")."""
        now = time.monotonic()
        if self._last is not None:
            self._gaps += 1
            if self._gaps > 1:
                self._longest = max(self._longest, now - self._last)
        self._where, self._due, self._last = where, now + self.limit, now
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
            self._thread.start()
            if self.record is not None:
                with contextlib.suppress(OSError):
                    self.record.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self.record.open("w")
        if self._file is not None:
            faulthandler.dump_traceback_later(self.limit, file=self._file)

    def rest(self, over: bool = False) -> None:
        """What follows may take as long as it takes; ``over``: and the steps after it are of another kind."""
        self._last = None
        if over:
            self._longest, self._gaps = 0.0, 0
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """No watch any more; a record that stayed empty goes."""
        self.rest()
        self._ended.set()
        if self._file is not None and self.record is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                if self.record.stat().st_size == 0:
                    self.record.unlink()

    def _look(self) -> None:
        pause, began = min(1.0, self.least / 10), time.monotonic()
        while not self._ended.wait(pause):
            last, slept, began = self._last, time.monotonic() - began - pause, time.monotonic()
            if slept > self.least / 4:  # the whole process stood still: a suspended container is no hang
                self._due += slept
                continue
            if last is not None and time.monotonic() > self._due + GRACE * self.limit:
                self.on_hang(f"no sign of life for {time.monotonic() - last:.0f} s {self._where}")
                return
