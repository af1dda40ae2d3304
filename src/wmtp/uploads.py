"""What is on its way to the bucket while training goes on: never waited for, tried again, never forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from wmtp.remote import TOLD_EVERY_S, Remote, TransferError, step_of, tell

AGAIN_S = 300.0  # after so long, what failed all its tries has others


class Uploads:
    """Folders on their way to the bucket, one at a time, in a thread that nobody waits for until `close`.

    What fails has `storage.retries` tries, while the run goes on; a step's end when a newer one waits, which takes its
    place. What failed them all is tried again later, and once more by `close`, which raises what even then failed.
    """

    def __init__(self, remote: Remote | None, ended: Callable[[Path, bool], None]) -> None:
        """``ended(folder, whether it is in the bucket)`` is called in the thread after each."""
        self.remote, self.ended = remote, ended
        self.changed = threading.Condition()
        self.waiting: list[Path] = []
        self.now: Path | None = None
        """The one that is read just now: whoever removes folders holds `changed` and leaves it."""
        self.failed: dict[Path, Exception] = {}
        self.newest = -1  # step in the bucket
        self.closing = self.hurry = False
        self.thread: threading.Thread | None = None

    def add(self, folder: Path) -> None:
        with self.changed:
            if folder not in self.waiting:
                self.waiting.append(folder)
            self.failed = {f: e for f, e in self.failed.items() if f != folder and not self._overtaken(f)}
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self.thread.start()
            self.changed.notify_all()

    def close(self, hurry: bool = False, seconds: float | None = None) -> None:
        """Wait, at most ``seconds``, until everything is in the bucket; raises the first failure.

        ``hurry``: of the steps that wait only the newest is brought.
        """
        began = time.monotonic()
        with self.changed:
            self.closing, self.hurry = True, hurry
            self.waiting, self.failed = [*self.waiting, *self.failed], {}
            self.changed.notify_all()
        if self.thread is None or self.remote is None:
            return
        self.remote.aloud = True
        while self.thread.is_alive():
            left = TOLD_EVERY_S if seconds is None else seconds - (time.monotonic() - began)
            if left <= 0:
                raise TransferError(f"{self.remote.prefix}: not all is in the bucket after {seconds} s")
            self.thread.join(min(left, TOLD_EVERY_S))
        for error in self.failed.values():
            raise error

    def _overtaken(self, folder: Path) -> bool:
        """Whether a newer step is in the bucket or waits."""
        step = step_of(folder.name)
        others = [self.newest, *(s for other in self.waiting if (s := step_of(other.name)) is not None)]
        return step is not None and max(others) > step

    def _next(self) -> tuple[Path, bool] | None:
        """The next folder, and whether it is begun after `close`; None at the end."""
        with self.changed:
            while True:
                # What lags behind may be pruned by now, for newer ones.
                self.waiting = [f for f in self.waiting if f.exists() and not (self.hurry and self._overtaken(f))]
                if self.waiting:
                    self.now = self.waiting.pop(0)
                    return self.now, self.closing
                if self.closing:
                    return None
                if not self.changed.wait(AGAIN_S if self.failed else None):
                    self.waiting, self.failed = [*self.failed], {}

    def _work(self) -> None:
        assert self.remote is not None
        while (following := self._next()) is not None:
            folder, late = following
            error: Exception | None = None
            try:
                self._bring(folder)
            except Exception as caught:  # whatever it is, it must not end the thread: `close` tells it
                error = caught
            with self.changed:
                self.now = None
                self._note(folder, late, error)
                self.changed.notify_all()
            try:
                self.ended(folder, error is None)
            except Exception as caught:
                tell(f"bucket    warn  what is older could not be removed: {caught}")

    def _bring(self, folder: Path) -> None:
        remote, began = self.remote, time.monotonic()
        assert remote is not None

        def overtaken() -> bool:
            with self.changed:
                return self.changed.wait_for(lambda: self._overtaken(folder), remote.storage.retry_wait_s)

        remote.tried(f"{remote.prefix}/{folder.name}", lambda: remote.put(folder), overtaken)
        tell(f"bucket    {folder.name} is in {remote.prefix}, {time.monotonic() - began:.1f} s")

    def _note(self, folder: Path, late: bool, error: Exception | None) -> None:
        """What follows from one folder's end; `changed` is held."""
        if error is None:
            self.newest = max(self.newest, step_of(folder.name) or -1)
        elif not self._overtaken(folder):
            if self.closing and not late:
                self.waiting.append(folder)
            else:
                self.failed[folder] = error
