"""A folder that grows, kept in the bucket too: what changed is brought again and again, the marker last.

An object is in the bucket whole or not at all, so whoever looks sees every file as it was at some mirror;
`record.json`, written last, says as of when. A bucket that is away costs the caller nothing: it is told once, and made
up for later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wmtp.config import Storage
from wmtp.remote import DamagedError, Remote, quoted, tell

RECORD = "record.json"
INTERVAL_S = 30.0
CLOSE_WAIT_S = 30.0  # torchrun gives its workers about as much after SIGTERM
SHARE = 0.1  # of the time that mirrors may take: a long run's store grows
BLOCK = 1 << 20


def interval() -> float:
    """Seconds between two mirrors, from WMTP_MIRROR_S; another word than a number is told and not obeyed."""
    given = os.environ.get("WMTP_MIRROR_S", "")
    with contextlib.suppress(ValueError):
        if (seconds := float(given or INTERVAL_S)) > 0:
            return seconds
    tell(
        f"mirror    warn  WMTP_MIRROR_S={given}: no number of seconds above 0; {INTERVAL_S:.0f} are taken\n"
        f"          next  export WMTP_MIRROR_S={INTERVAL_S:.0f}, or unset it"
    )
    return INTERVAL_S


def lasted(seconds: float) -> str:
    """A duration as a person says it."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


class Mirror:
    """``folder`` (but dot files) under ``prefix`` (``s3://bucket/…``). `push` may be called from any thread."""

    def __init__(self, folder: Path, prefix: str, storage: Storage) -> None:
        self.folder, self.remote = folder, Remote(prefix.rstrip("/"), storage)
        self.pushes = 0
        """Mirrors that brought something."""
        self.seconds_away = 0.0
        """How long the bucket did not take the record, over all gaps that have ended."""
        self._away_since: float | None = None
        self._pushing = threading.Lock()
        self._marker: dict[str, Any] = {}
        self._there: set[str] | None = None  # objects under the prefix; None: not yet looked
        self._had: set[str] = set()  # files that were here while this process looked
        self._seen: dict[str, tuple[int, ...]] = {}  # of each file here as it was brought: what stat said
        self._ending = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._last = False

    # -- to the bucket ---------------------------------------------------------------------------------------------

    def push(self) -> bool:
        """Bring what changed; whether the bucket has all of it now. Never raises."""
        with self._pushing:
            try:
                self._push()
            except Exception as error:  # a record that can't be mirrored is no reason to end a training
                self._gone(error)
                return False
            self._back()
            return True

    def start(self, seconds: float | None = None) -> None:
        """Mirror at intervals, in a thread; default: `interval()`."""
        every = interval() if seconds is None else seconds

        def work() -> None:
            wait = every
            while True:
                self._wake.wait(wait)
                self._wake.clear()  # before the look at the end: what is asked for from here on is not lost
                if self._ending:
                    break
                began = time.monotonic()
                self.push()
                wait = max(every, (time.monotonic() - began) / SHARE) if self._away_since is None else every
            self._last = self.push()

        self._thread = threading.Thread(target=work, name="mirror", daemon=True)
        self._thread.start()

    def soon(self) -> None:
        """Mirror without waiting for the interval's end; blocks nobody."""
        self._wake.set()

    def close(self, wait_s: float = CLOSE_WAIT_S) -> bool:
        """The last mirror, waited for as long as ``wait_s``; whether the bucket has all."""
        if self._thread is None:
            self.start(0.0)
        self._ending = True
        self._wake.set()
        assert self._thread is not None
        self._thread.join(max(wait_s, 0.0))
        if self._thread.is_alive():
            tell(
                f"mirror    warn  {self.remote.prefix}: not all is in the bucket after {lasted(wait_s)}\n"
                f"          rule  an end waits so long and no longer\n          next  it is all in {self.folder}"
            )
            return False
        if not self._last:
            tell(f"mirror    warn  {self.remote.prefix}: the last of it is only in {self.folder}")
        return self._last

    def files(self) -> dict[str, Path]:
        """What is mirrored, by its name in the bucket."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            hidden = any(part.startswith(".") for part in name.split("/"))
            if not hidden and name != RECORD and "\n" not in name and path.is_file():
                found[name] = path
        return found

    def facts(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """What the marker says beside files and time, as of the last `files()`; ``sizes`` of all that it lists."""
        return {}

    def unwanted(self, names: set[str], files: dict[str, Path]) -> set[str]:
        """Those of the bucket's ``names`` that are to go, the marker once written: what was removed here meanwhile.

        What this process never had may be another node's part of the record, and stays.
        """
        return {name for name in names if name in self._had}

    def _push(self) -> None:
        if self._there is None:
            self._there, self._marker = self._look()
        now, files = time.time(), self.files()
        gone = self.unwanted(self._there - files.keys(), files)
        stats = {name: _stat(path) for name, path in files.items()}
        changed = [name for name, stat in stats.items() if stat != self._seen.get(name)]
        if not changed and not gone:
            return
        with self._staging() as staging:
            sizes, digests = dict(self._marker.get("files", {})), dict(self._marker.get("digests", {}))
            copies = []
            for number, name in enumerate(changed):
                copy = staging / str(number)  # a file may grow while it is sent: what is sent is a copy
                try:
                    size, digest = _copy(files[name], copy)
                except FileNotFoundError:
                    stats.pop(name)  # it was there a moment ago
                    continue
                if name not in self._seen or digests.get(name) != digest:
                    copies.append(f"cp --raw {quoted(str(copy))} {quoted(f'{self.remote.prefix}/{name}')}")
                else:
                    copy.unlink()
                sizes[name], digests[name] = size, digest
            kept = sorted(sizes.keys() - gone)
            marker = {
                "at": round(now, 3),
                "files": {name: sizes[name] for name in kept},
                "digests": {name: digests[name] for name in kept if name in digests},
                **self.facts({name: sizes[name] for name in kept}),
            }
            self._there |= sizes.keys()
            if copies:
                self.remote.s5cmd("run", lines=copies)
            (staging / RECORD).write_text(json.dumps(marker) + "\n")
            self.remote.s5cmd("cp", str(staging / RECORD), f"{self.remote.prefix}/{RECORD}")
        self._marker = marker
        self._seen.update(stats)
        self._had.update(stats)
        self.pushes += 1
        if gone:
            self.remote.s5cmd("run", lines=[f"rm --raw {quoted(f'{self.remote.prefix}/{name}')}" for name in gone])
            self._there -= gone
            for name in gone:
                self._seen.pop(name, None)

    def _look(self) -> tuple[set[str], dict[str, Any]]:
        """The objects under the prefix, and the marker; a marker that says nothing is none.

        The marker first: what it names may have gone for what a newer one names, but never is still to come.
        """
        marker: dict[str, Any] = {}
        if self.remote.listed(RECORD):
            with contextlib.suppress(ValueError):
                read = json.loads(self.remote.s5cmd("cat", f"{self.remote.prefix}/{RECORD}"))
                marker = read if isinstance(read, dict) and isinstance(read.get("files"), dict) else {}
        return self.remote.listed("*").keys() - {RECORD}, marker

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder for copies, beside what is copied; what a killed process left of its own is cleared."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".mirror.*"):
            if not _alive(left.name.split(".")[2]):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".mirror.{os.getpid()}.", dir=self.folder) as staging:
            yield Path(staging)

    def _gone(self, error: Exception) -> None:
        if self._away_since is not None:
            return
        self._away_since = time.monotonic()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        tell(
            f"mirror    warn  {self.remote.prefix}: {first[:300]}\n"
            "          rule  training goes on; what is not mirrored stays on the disk, and is tried again\n"
            f"          next  see that the bucket answers; until then the record is in {self.folder}"
        )

    def _back(self) -> None:
        if self._away_since is None:
            return
        away, self._away_since = time.monotonic() - self._away_since, None
        self.seconds_away += away
        tell(f"mirror    {self.remote.prefix} takes the record again after {lasted(away)}; nothing of it is missing")

    # -- from the bucket -------------------------------------------------------------------------------------------

    def pull(self, keep: bool = False) -> bool:
        """Bring what the marker lists to ``folder``; whether there is one. Raises TransferError.

        ``keep``: a file that is here and not shorter stays: a run that goes on where it was killed is ahead of its
        mirror. Otherwise files become the bucket's; others that are here stay. What is here already is not fetched.
        """
        return self.remote.tried(f"{self.remote.prefix}", lambda: self._pull(keep))

    def _pull(self, keep: bool) -> bool:
        self._there, self._marker = self._look()
        if not self._marker:
            return False
        listed, digests = self._marker["files"], self._marker.get("digests", {})
        wanted = []
        for name, size in listed.items():
            if not self.wants(name):
                continue
            path = self.folder / name
            # A file may be a link (`Recorder.steps`), which what is fetched replaces; a folder on the way may not.
            if path.name == ".." or not path.parent.resolve().is_relative_to(self.folder.resolve()):
                raise DamagedError(f"{self.remote.prefix}: {name!a} climbs out of its folder")
            here = path.stat().st_size if path.is_file() else -1
            same = here == size and digests.get(name) == _digest(path)
            if same or (keep and here >= size):
                continue
            if name in self._there:
                wanted.append(name)
            else:
                self.check(name, None)
        with self._staging() as staging:
            if wanted:
                copies = [
                    f"cp --raw {quoted(f'{self.remote.prefix}/{name}')} {quoted(str(staging / str(number)))}"
                    for number, name in enumerate(wanted)
                ]
                self.remote.s5cmd("run", lines=copies)
            for number, name in enumerate(wanted):
                self.check(name, staging / str(number))
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / str(number)).replace(self.folder / name)
        self._had.update(listed)
        return True

    def wants(self, name: str) -> bool:
        """Whether a `pull` brings this of what the marker lists."""
        return True

    def check(self, name: str, path: Path | None) -> None:
        """Refuse, by DamagedError, what arrived under ``name``; None: nothing did.

        Files may be newer than the marker, or be gone since: a kill between them and it leaves that.
        """


def _stat(path: Path) -> tuple[int, ...]:
    try:
        seen = path.stat()
    except FileNotFoundError:
        return ()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns


def _copy(source: Path, target: Path) -> tuple[int, str]:
    """Copy what is there now; its bytes and their digest."""
    size, digest = 0, hashlib.sha256()
    with source.open("rb") as file, target.open("wb") as copy:
        while block := file.read(BLOCK):
            copy.write(block)
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        pass
    return True
