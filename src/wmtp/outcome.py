"""How a run ends: notice to stop, exit codes, what a person reads, and the exit file.

torchrun turns its children's codes into 1, so code, cause and step are also in the exit file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from wmtp import causes
from wmtp.cache import hold
from wmtp.checkpoint import Checkpoints
from wmtp.config import ConfigError
from wmtp.data import DataError
from wmtp.manifest import MANIFEST
from wmtp.model import ModelError
from wmtp.paths import PathResolver
from wmtp.record import add_line
from wmtp.remote import MARKER, CheckpointError, TransferError
from wmtp.tracking import Tracker
from wmtp.watch import Watch

SETTLE_S = 20.0  # torchrun gives its workers 30 s
NOT_FINITE_MOST = 10  # steps in a row that are left out before the run ends
DONE, BAD_INPUT, DISK, TRANSFER, FAILED, RESUME_ME = 0, 2, 10, 12, 20, 75


class BadInput(ValueError):
    """What the person who started the run can mend: exit code 2, no traceback. ``kind``: its class of causes."""

    def __init__(self, told: str, kind: str = causes.CONFIGURATION) -> None:
        super().__init__(told)
        self.kind = kind


class NotFiniteError(RuntimeError):
    """The figures are no numbers any more: nothing that follows would mean anything."""


class Stopped(Exception):  # no error: everything is saved
    """Raised where a notice to stop was taken before the loop: exit code 75."""


class Stop:
    """Notice to stop: a signal or the end of the hours. It is read between steps, on all ranks together."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.began = time.monotonic()
        self.watch = watch
        self.max_hours: float | None = None
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._notice)

    @property
    def cause(self) -> str | None:
        """The name of the signal, ``max_hours``, or None: go on."""
        if self.signal is None and self.max_hours and time.monotonic() - self.began > self.max_hours * 3600:
            return "max_hours"
        return self.signal

    def beat(self, where: str) -> None:
        """A step begins: a sign of life for the watch; ``where`` reads "in step 7"."""
        if self.watch:
            self.watch.beat(where)

    def rest(self, over: bool = False) -> None:
        """Something else is done that may take its time; ``over``: and these steps are over."""
        if self.watch:
            self.watch.rest(over)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name


class Phases:
    """Where the seconds go: a line in `phases.jsonl` for each phase, begun and ended in seconds since the epoch."""

    def __init__(self, path: Path | None) -> None:
        """None: another rank keeps them. The launcher says in WMTP_LAUNCHED when it started this process."""
        self.path, self.seconds = path, dict[str, float]()
        self._began = float(os.environ.get("WMTP_LAUNCHED") or time.time())
        self.done("imports")

    def done(self, name: str) -> None:
        """What was done since the last call, or since the start, was ``name``."""
        began, self._began = self._began, time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._began - began
        self.span(name, began, self._began)

    def span(self, name: str, began: float, ended: float | None = None) -> None:
        """``name`` was done from ``began`` until ``ended`` (None: now), within another phase."""
        if self.path:
            add_line(self.path, {"phase": name, "began": began, "ended": ended or time.time(), "by": "train"})


@dataclass
class Progress:
    """What the end of a run, good or bad, has to know of it."""

    step: int = 0
    cause: str | None = None
    kind: str | None = None
    """The class of the cause, where an exception or a watch knew it."""
    tracker: Tracker | None = None
    phases: Phases = field(default_factory=lambda: Phases(None))
    shelves: list[Checkpoints] = field(default_factory=list)
    """Everything that uploads, to be waited for."""

    def settle(self) -> None:
        """Give a save that was begun the time to become whole, and to arrive, before a failed run ends."""
        until = time.monotonic() + SETTLE_S
        for shelf in self.shelves:
            with contextlib.suppress(Exception):
                shelf.settle(max(until - time.monotonic(), 0))
        for shelf in self.shelves:
            with contextlib.suppress(Exception):
                shelf.uploads.close(hurry=True, seconds=max(until - time.monotonic(), 0))

    def close(self, hurry: bool = False) -> None:
        """Wait for every upload, all shelves at once. Raises the first failure, when all have ended."""
        with ThreadPoolExecutor(max(len(self.shelves), 1)) as pool:
            ended = [pool.submit(shelf.close, hurry) for shelf in self.shelves]
        for one in ended:
            one.result()


def say(text: str) -> None:
    """One line of the story, from rank 0, above the bar where there is one."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stderr)


def leave_out(step: int, state: dict[str, Any], proved: int | None, why: str) -> None:
    """Count a step that is not finite, and take nothing from it. Raises NotFiniteError after too many in a row.

    All ranks see the same figures, so all leave it out. ``proved``: the newest checkpoint that a finite step followed.
    """
    state["not_finite"] += 1
    state["not_finite_in_a_row"] += 1
    say(f"train     warn  step {step} is left out: {why}: not finite")
    if state["not_finite_in_a_row"] >= NOT_FINITE_MOST:
        good = f"step {proved}: remove those after it" if proved else "none"
        raise NotFiniteError(
            f"{NOT_FINITE_MOST} steps in a row up to {step} were not finite: {why}; the last checkpoint that a finite "
            f"step followed: {good}, and lower optim.lr (ALLOW=optim.lr)"
        )


def local_path(uri: str, what: str) -> Path:
    """The folder that ``uri`` stands for; it must be there. A synced one is held: no eviction takes it from us."""
    folder = Path(PathResolver().local(uri, what))
    if not folder.is_dir():
        model = what.startswith("paths.models")
        raise BadInput(
            f"{what}: {folder} is not there; rule: models and data are on the disk before training; next: "
            + (
                "scripts/sync_models.sh, or make train for ENV=test"
                if model
                else f"name a folder that is there in {what}"
            ),
            causes.MODEL_FILES if model else causes.DATA,
        )
    if (folder / MARKER).is_file():
        folder = folder.resolve()  # a sync may put another version under the link while this one is read
        hold(folder)
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text, errors="backslashreplace")
    staging.replace(path)


def named(text: str) -> str:
    """``text`` with models by their names: what is synced is read under its digest, which nobody knows it by."""

    def name(found: re.Match[str]) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((Path(found[0]) / MANIFEST).read_text())["name"])
        return found[0]

    return re.sub(r"/(?:[^\n;:,]*/)?[0-9a-f]{64}\b", name, text)


def failure(error: Exception, rank: int, log: Path | None) -> tuple[int, str, str, str]:
    """Exit code, class, cause and what a person sees of ``error``; the traceback goes to ``log``."""
    # Gloo names its own source, and advises to look at the other rank, which has said what it was.
    told = named(re.sub(r"\[\S*gloo/\S+\] |\. This is typically caused by .*", "", str(error), flags=re.DOTALL))
    of = causes.of_error(error)
    if isinstance(error, ConfigError):
        return BAD_INPUT, of, told, told
    if isinstance(error, BadInput | DataError | ModelError):
        return BAD_INPUT, of, told, "train     FAIL  " + "\n              ".join(told.split("; "))
    system = error.__cause__ if isinstance(error, CheckpointError) else error
    full = isinstance(system, OSError) and system.errno in causes.UNWRITABLE
    code = TRANSFER if isinstance(error, TransferError) else DISK if full else FAILED
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    first = f"read {log}, then " if log and code == FAILED else "mend it, then "
    return (
        code,
        causes.BY_CODE.get(code, of),
        f"rank {rank}: {kind}{told}",
        f"train     FAIL  rank {rank}: {kind}{told}\n"
        "              rule  a failed step ends the run; what was saved stays\n"
        f"              next  {first}start the same command: it goes on from the newest checkpoint",
    )


def keep_traceback(log: Path | None) -> None:
    """Write the traceback of the error at hand, where it can be written: a full disk has a message of its own."""
    if log:
        with contextlib.suppress(OSError):
            write_whole(log, traceback.format_exc())


def claim(path: Path | None, code: int, progress: Progress) -> bool:
    """Write the exit file unless another rank did: the first to fail knows why, the others see it leave."""
    if path is None:
        return True
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        of = progress.kind or causes.of_end(code, progress.cause)
        # A file's name need not be text; whoever reads the cause expects that it is.
        cause = progress.cause and progress.cause.encode(errors="backslashreplace").decode()
        told = {"code": code, "step": progress.step, "cause": cause, "class": of}
        staging.write_text(json.dumps(told) + "\n")
        path.hardlink_to(staging)
    except FileExistsError:
        return False
    except OSError as error:
        print(f"train     warn  {path}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        staging.unlink(missing_ok=True)
    return True
