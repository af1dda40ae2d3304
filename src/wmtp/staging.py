"""Files on their way into the store: what is missing, what may be kept, their names once proved, the last rename.

A staging folder holds `part/` (what the client writes, named by the number of the entry) and `files/` (what is proved).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from wmtp.manifest import (
    COMPLETE,
    LISTING,
    MANIFEST,
    Entry,
    Manifest,
    ManifestError,
    create,
    load_manifest,
    plain_file,
    written,
)

HASHERS = min(4, os.cpu_count() or 1)
PROVED = "proved"
"""Beside `files/`, where files are discarded: the paths of those that were proved."""
SMALL = 2**20  # a smaller file is brought to disk with all others, not alone
FIRST = (".json", ".model", ".txt")  # what a trainer reads before any weights
FIRST_MOST = 32 * 2**20


def copy_line(options: str, source: str, target: str) -> str:
    """A command for the client's `run`; --raw, since a key may hold * or ?."""
    return f"cp --raw {options} {shlex.quote(source)} {shlex.quote(target)}\n"


def first_files(manifest: Manifest) -> Iterator[Entry]:
    """Settings and tokenizer."""
    for entry in manifest.files:
        if "/" not in entry.path and entry.path.endswith(FIRST) and entry.bytes <= FIRST_MOST:
            yield entry


def versions(store: Path) -> Iterator[tuple[Path, Manifest]]:
    """The whole models of a store with their manifests, by digest."""
    for marker in sorted(store.glob(f"*/{COMPLETE}")):
        try:
            yield marker.parent, load_manifest(marker.parent / MANIFEST)
        except (OSError, ManifestError):
            continue


def reusable(manifest: Manifest, places: Iterable[tuple[Path, Manifest]]) -> dict[str, list[Path]]:
    """blake3 to the files that another version has of the same content, by its manifest's word."""
    wanted, found = {entry.blake3 for entry in manifest.files if entry.blake3}, defaultdict(list)
    for folder, other in places:
        for entry in other.files:
            if entry.blake3 in wanted:
                found[entry.blake3].append(folder / entry.path)
    return found


def plan(
    manifest: Manifest, staging: Path, store: Path | None = None, also: Path | None = None
) -> list[tuple[int, Entry]]:
    """What is still to be fetched: (number of the entry, entry). Clears away what is not right in staging.

    Kept is what is proved: in `files/`, a part that arrived whole before a kill, and, by a hard link, a file of
    another version in ``store`` or in the staging beside this one, or of the folder ``also``.
    """
    files, parts = staging / "files", staging / "part"
    for folder in (staging, files, parts):
        if folder.is_symlink():  # what is written here would lie elsewhere
            folder.unlink()
    parts.mkdir(parents=True, exist_ok=True)
    files.mkdir(exist_ok=True)
    known = {entry.path for entry in manifest.files}
    for path in sorted(files.rglob("*"), reverse=True):
        if path.is_symlink() or (not path.is_dir() and path.relative_to(files).as_posix() not in known):
            path.unlink()
    places = [*([(also, manifest)] if also else []), *(versions(store) if store else [])]
    others = reusable(manifest, places)
    # A version that was being fetched when this one was published: its manifest isn't here, its paths say what to try.
    for folder in staging.parent.glob(f"{manifest.name}-*/files"):
        for entry in manifest.files if folder != files else ():
            if entry.blake3 and (staged := plain_file(folder, entry.path)):
                others.setdefault(entry.blake3, []).append(staged)
    discarded = _discarded(staging)

    def missing(numbered: tuple[int, Entry]) -> tuple[int, Entry] | None:
        number, entry = numbered
        if entry.path in discarded or _kept(entry, files, parts / str(number), others.get(entry.blake3, [])):
            return None
        return numbered

    with ThreadPoolExecutor(HASHERS) as pool:
        found = [numbered for numbered in pool.map(missing, enumerate(manifest.files)) if numbered]
    shutil.rmtree(parts)
    parts.mkdir()
    return found


def _discarded(staging: Path) -> set[str]:
    """Paths that were proved and removed."""
    marks = staging / PROVED
    return set(marks.read_text(encoding="utf-8").splitlines()) if marks.is_file() else set()


def _kept(entry: Entry, files: Path, part: Path, others: list[Path]) -> bool:
    found, target = plain_file(files, entry.path), files / entry.path
    if found is not None:
        if not entry.differs(found):
            return True
        found.unlink()
    with contextlib.suppress(OSError):
        if part.is_file() and not entry.differs(part):
            place(part, target)
            return True
    for other in others:
        with contextlib.suppress(OSError):  # gone meanwhile, another file system, too many links: it is fetched
            if plain_file(other.parent, other.name) and not entry.differs(other):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(other, target)
                return True
    return False


def plan_first(manifest: Manifest, folder: Path, prefix: str, options: str) -> str:
    """The client's commands for settings and tokenizer; they come into ``folder`` under another name."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return "".join(
        copy_line(options, f"{prefix}/{entry.path}", str(part / entry.path)) for entry in first_files(manifest)
    )


def accept_first(manifest: Manifest, source: Path, folder: Path) -> None:
    """Gives what `plan_first` asked for its name, all of it proved, with the manifest beside it.

    Raises ManifestError, OSError.
    """
    part = folder.with_name(f".{folder.name}.part")
    for entry in first_files(manifest):
        if what := entry.differs(part / entry.path):
            raise ManifestError(f"{entry.path}: {what}")
    shutil.copyfile(source, part / MANIFEST)
    part.rename(folder)


def place(part: Path, target: Path) -> None:
    """A proved file under its name, its bytes on disk where they are many."""
    if part.stat().st_size >= SMALL:
        fsync(part)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def lacking(manifest: Manifest, staging: Path) -> list[tuple[int, Entry]]:
    """The entries without a file in staging: `plan` has just removed or proved those that had one."""
    files, discarded, found = staging / "files", _discarded(staging), []
    for number, entry in enumerate(manifest.files):
        path = plain_file(files, entry.path)
        if entry.path not in discarded and (path is None or path.stat().st_size != entry.bytes):
            found.append((number, entry))
    return found


class Bar:
    """The line of a transfer: redrawn on a terminal, told every few seconds elsewhere."""

    FORM = "Download  {desc}  [{bar}] {percentage:3.0f} %  {told}"
    EVERY_S = 3.0
    PAST_S = 10.0  # the rate is that of the last seconds

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, max(total, 1)
        self.scale, self.unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        self.told = time.monotonic()
        self.past: deque[tuple[float, int]] = deque([(self.told, 0)])
        self.line: tqdm | None = None
        if sys.stderr.isatty() and os.environ.get("CI") != "true" and os.environ.get("TERM") != "dumb":
            # The whole line is the description: it has figures that tqdm knows no names for.
            self.line = tqdm(bar_format="{desc}", leave=False, file=sys.stderr, dynamic_ncols=True)

    def text(self, seen: int) -> str:
        """The line with ``seen`` bytes here."""
        now, (then, before) = self.past[-1][0], self.past[0]
        rate = (seen - before) / (now - then) if now > then else 0.0
        left = f"{(self.total - seen) / rate:.0f} s left" if rate > 0 else "waiting"
        told = f"{seen / self.scale:.1f} of {self.total / self.scale:.1f} {self.unit}  {rate / 1e6:.0f} MB/s  {left}"
        form = self.FORM.replace("{told}", told)
        wide = min(shutil.get_terminal_size((80, 24)).columns - 1, 99) if self.line is not None else 79
        return str(tqdm.format_meter(seen, self.total, 1, wide, self.name, "-#", bar_format=form))

    def at(self, seen: int) -> None:
        """``seen`` bytes are here."""
        now, seen = time.monotonic(), min(seen, self.total)
        self.past.append((now, seen))
        while now - self.past[0][0] > self.PAST_S:
            self.past.popleft()
        if self.line is not None:
            self.line.set_description_str(self.text(seen))
        elif now - self.told >= self.EVERY_S:
            self.told = now
            print(self.text(seen), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()


class Arrivals:
    """Gives files their names as they arrive: hashed in threads, beside the transfer of the others."""

    def __init__(self, manifest: Manifest, staging: Path, discard: bool = False):
        self.manifest, self.staging, self.discard = manifest, staging, discard
        self.waiting = dict(lacking(manifest, staging))
        self.need = sum(entry.bytes for entry in self.waiting.values())
        self.done = 0
        self.wrong: list[str] = []
        self.broken: OSError | None = None
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(HASHERS)
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def arrived(self, number: int) -> None:
        """In a thread: proves a part; right ones get their names, wrong ones go."""
        entry = self.waiting.get(number)
        part = self.staging / "part" / str(number)
        if entry is None or not part.is_file():
            return
        try:
            if what := entry.differs(part):
                part.unlink()
                self.wrong.append(f"{entry.path} arrived with another content than its manifest says ({what})")
                return
            if self.discard:
                with self.lock, (self.staging / PROVED).open("a", encoding="utf-8") as marks:
                    marks.write(entry.path + "\n")
                part.unlink()
            else:
                place(part, self.staging / "files" / entry.path)
        except OSError as error:
            self.broken = error
            return
        with self.lock:
            self.done += entry.bytes
            del self.waiting[number]

    def watch(self) -> None:
        """The bar; and what has come is written to disk meanwhile, not all at the end."""
        parts, bar = self.staging / "part", Bar(self.manifest.name, self.need)
        while not self.over.wait(0.25):
            here = self.done
            for path in list(parts.iterdir()):
                with contextlib.suppress(OSError):
                    here += path.stat().st_blocks * 512
                    begin_writing(path)
            bar.at(here)
        bar.close()

    def end(self) -> None:
        """Waits for the hashes; the parts that the client did not speak of are looked at, too."""
        self.pool.shutdown()
        for number in list(self.waiting):
            self.arrived(number)
        self.over.set()
        self.watcher.join()


def accept(manifest: Manifest, staging: Path, discard: bool = False) -> int:
    """Reads the client's JSON lines on standard input; 0 when everything stands, 12 missing, 13 differs.

    Standard output: how many files, and how many bytes, are still lacking.
    """
    arrivals = Arrivals(manifest, staging, discard)
    arrivals.watcher.start()
    for line in sys.stdin:
        try:
            record = json.loads(line)
        except ValueError:
            print(line, end="", file=sys.stderr)
            continue
        name = Path(str(record.get("destination", ""))).name
        if record.get("success") and name.isdigit():
            arrivals.pool.submit(arrivals.arrived, int(name))
    arrivals.end()
    for text in arrivals.wrong:
        print(f"sync      warn  {manifest.name}: {text}", file=sys.stderr)
    print(len(arrivals.waiting), sum(entry.bytes for entry in arrivals.waiting.values()))
    if arrivals.broken:
        raise arrivals.broken
    if arrivals.wrong:
        return 13
    return 12 if arrivals.waiting else 0


def fsync(path: Path) -> None:
    """Bring a file, or a folder's own entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begin_writing(path: Path) -> None:
    """Has the kernel begin to write what is in its cache of a file (Linux): the fsync at the end finds little left."""
    call = getattr(_libc, "sync_file_range", None)
    if call:
        with path.open("rb") as stream:
            call(stream.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), 2)  # SYNC_FILE_RANGE_WRITE


def sync_small(root: Path, files: list[Path]) -> None:
    """Many small files to disk: by one call for their file system where there is one."""
    call = getattr(_libc, "syncfs", None)
    if call and len(files) > 64:
        handle = os.open(root, os.O_RDONLY)
        try:
            if call(handle) == 0:
                return
        finally:
            os.close(handle)
    for path in files:
        fsync(path)


_libc = ctypes.CDLL(None)


def finish(manifest: Manifest, source: Path, staging: Path, target: Path) -> None:
    """Staging becomes the model in one rename, everything on the disk before it."""
    files = staging / "files"
    if lacking(manifest, staging):
        raise ManifestError(f"{manifest.name}: files are missing in {files}")
    if source.parent.name == LISTING:  # nobody hashed them: what is here now is what later checks are held against
        (files / MANIFEST).write_bytes(written(create(files, manifest.name)))
    else:
        (files / MANIFEST).write_bytes(source.read_bytes())
    paths = list(files.rglob("*"))
    sync_small(files, [path for path in paths if path.is_file() and path.stat().st_size < SMALL])
    for path in paths:
        if path.is_dir():
            fsync(path)
    marker = files / COMPLETE
    marker.write_text(manifest.digest + "\n")
    fsync(marker)
    fsync(files)
    files.rename(target)
    fsync(target.parent)
    shutil.rmtree(staging, ignore_errors=True)
