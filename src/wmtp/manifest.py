"""The manifest of a model: written when it is published, believed only after it is checked.

No transfer happens here: `accept` reads what the client reports and lets a file take its name once its hash is right.
Exit codes: 0 right, 2 bad arguments, 10 the disk refused, 12 bytes stopped or are missing, 13 differs or is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blake3 import blake3

MAX_FILES = 100_000
MAX_BYTES = 64 * 2**20
MANIFEST = "manifest.json"
COMPLETE = ".complete"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KEYS = {"format", "name", "files", "total_bytes", "created", "tool"}


class ManifestError(ValueError):
    """The manifest is refused, or content differs from it; str() says what and where."""


@dataclass(frozen=True)
class Entry:
    path: str
    bytes: int
    blake3: str


@dataclass(frozen=True)
class Manifest:
    name: str
    files: tuple[Entry, ...]
    total_bytes: int
    digest: str


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def hash_file(path: Path) -> str:
    """blake3 of a file's content, 64 hexadecimal digits."""
    hasher = blake3()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(4 * 2**20):
            hasher.update(block)
    return hasher.hexdigest()


def _check_path(path: Any) -> str:
    """A relative path that stays where it is put, whoever wrote it."""
    if not isinstance(path, str) or not path:
        raise ManifestError(f"path {path!r}: a path is text that is not empty")
    shown = ascii(path[:200])
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c == "\\" or 0xD800 <= ord(c) < 0xE000 for c in path):
        raise ManifestError(f"path {shown}: control characters and backslashes are refused")
    if path.startswith("/"):
        raise ManifestError(f"path {shown}: absolute paths are refused")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ManifestError(f"path {shown}: empty parts, '.' and '..' are refused")
    if len(path.encode()) > 900 or any(len(part.encode()) > 255 for part in parts):
        raise ManifestError(f"path {shown}: longer than a key or a file name may be")
    if parts[0] in (MANIFEST, COMPLETE):
        raise ManifestError(f"path {shown}: the name is reserved")
    return path


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict) or set(item) != {"path", "bytes", "blake3"}:
        raise ManifestError(f"entry {ascii(item)[:200]}: its keys are path, bytes, blake3")
    path = _check_path(item["path"])
    if not _is_count(item["bytes"]):
        raise ManifestError(f"{path!a}: bytes {item['bytes']!r} is not a whole number of 0 or more")
    if not isinstance(item["blake3"], str) or not re.fullmatch(r"[0-9a-f]{64}", item["blake3"]):
        raise ManifestError(f"{path!a}: blake3 is not 64 hexadecimal digits")
    return Entry(path, item["bytes"], item["blake3"])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ManifestError("a key stands twice in one object")
    return found


def _checked(data: bytes) -> Manifest:
    if len(data) > MAX_BYTES:
        raise ManifestError(f"{len(data)} bytes or more: a manifest has at most {MAX_BYTES}")
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ManifestError(f"not JSON in UTF-8: {error}") from None
    except ManifestError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ManifestError(f"not JSON: {error}") from None
    if not isinstance(raw, dict) or set(raw) != KEYS:
        raise ManifestError(f"its keys are {', '.join(sorted(KEYS))}")
    if raw["format"] != 1 or isinstance(raw["format"], bool):
        raise ManifestError(f"format {raw['format']!r}: only format 1 is known")
    if not isinstance(raw["name"], str) or not NAME.fullmatch(raw["name"]):
        raise ManifestError(f"name {ascii(raw['name'])[:200]}: letters, digits, '.', '_' and '-' only")
    try:
        offset = datetime.fromisoformat(raw["created"]).utcoffset()
    except (TypeError, ValueError):
        offset = None
    if offset is None or offset.total_seconds():
        raise ManifestError(f"created {ascii(raw['created'])[:100]}: not a time in UTC (ISO 8601)")
    if not isinstance(raw["tool"], str):
        raise ManifestError("tool is not text")
    if not isinstance(raw["files"], list) or not 0 < len(raw["files"]) <= MAX_FILES:
        raise ManifestError(f"files: a list of 1 to {MAX_FILES} entries")
    files = tuple(_entry(item) for item in raw["files"])
    paths = {entry.path for entry in files}
    if len(paths) != len(files):
        raise ManifestError("a path stands twice")
    for entry in files:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in paths:
                raise ManifestError(f"{entry.path!a}: its folder is a file of the same manifest")
    total = sum(entry.bytes for entry in files)
    if raw["total_bytes"] != total or not _is_count(raw["total_bytes"]):
        raise ManifestError(f"total_bytes {raw['total_bytes']!r}: the files have {total}")
    return Manifest(raw["name"], files, total, _digest(data))


def load_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest; ManifestError names the first thing that is refused."""
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        return _checked(data)
    except ManifestError as error:
        raise ManifestError(f"{path.name} is refused: {error}") from None


def create(folder: Path, name: str) -> dict[str, Any]:
    """The manifest of a folder: links to files are read through, what a manifest may not name is refused."""
    if not NAME.fullmatch(name):
        raise ManifestError(f"name {name!a}: letters, digits, '.', '_' and '-' only")
    files = []
    for path in _walk(folder):
        relative = _check_path(path.relative_to(folder).as_posix())
        files.append({"path": relative, "bytes": path.stat().st_size, "blake3": hash_file(path)})
    return {
        "format": 1,
        "name": name,
        "files": files,
        "total_bytes": sum(item["bytes"] for item in files),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": "wmtp",
    }


def _walk(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.parent == folder and path.name in (MANIFEST, COMPLETE):
            continue
        if path.is_symlink() and not path.is_file():
            raise ManifestError(f"{path}: a link that is no file's; only files can be published")
        if path.is_file():
            found.append(path)
        elif not path.is_dir():
            raise ManifestError(f"{path}: neither a file nor a folder")
    return found


def _plain_file(root: Path, path: str) -> Path | None:
    """The file, unless it or a folder on its way is missing or a link."""
    at = root
    for part in path.split("/"):
        at = at / part
        if at.is_symlink():
            return None
    return at if at.is_file() else None


def differences(manifest: Manifest, folder: Path, quick: bool = False) -> Iterator[str]:
    """What in a finished folder is not as the manifest says; quick: sizes and times instead of hashes."""
    marker = folder / COMPLETE
    if quick:
        if not marker.is_file() or marker.read_text().strip() != manifest.digest:
            yield f"{COMPLETE} does not hold {manifest.digest[:12]}"
            return
        marked = marker.stat().st_mtime_ns
    for entry in manifest.files:
        path = _plain_file(folder, entry.path)
        if path is None:
            yield f"{entry.path} is missing"
        elif (size := path.stat().st_size) != entry.bytes:
            yield f"{entry.path} has {size} bytes, not {entry.bytes}"
        elif quick:
            if path.stat().st_mtime_ns > marked:
                yield f"{entry.path} was written after {COMPLETE}"
        elif (found := hash_file(path)) != entry.blake3:
            yield f"{entry.path}: blake3 {found[:8]}… is not {entry.blake3[:8]}…"
    known = {entry.path for entry in manifest.files} | {MANIFEST, COMPLETE}
    for path in folder.rglob("*"):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()} is not in the manifest"


def plan(manifest: Manifest, staging: Path) -> list[tuple[int, Entry]]:
    """What is still to be fetched: (number of the entry, entry). Clears away what is not right in staging."""
    files, parts = staging / "files", staging / "part"
    if parts.exists():
        shutil.rmtree(parts)
    parts.mkdir(parents=True)
    files.mkdir(exist_ok=True)
    known = {entry.path for entry in manifest.files}
    for path in sorted(files.rglob("*"), reverse=True):
        if path.is_symlink() or (not path.is_dir() and path.relative_to(files).as_posix() not in known):
            path.unlink()
    missing = []
    for number, entry in enumerate(manifest.files):
        found = _plain_file(files, entry.path)
        if found is None or found.stat().st_size != entry.bytes or hash_file(found) != entry.blake3:
            if found is not None:
                found.unlink()
            missing.append((number, entry))
    return missing


class Arrivals:
    """Gives files their names as they arrive, and watches that bytes go on arriving."""

    def __init__(self, manifest: Manifest, staging: Path, stall_s: float):
        self.manifest, self.staging, self.stall_s = manifest, staging, stall_s
        missing = plan_sizes(manifest, staging)
        self.waiting = dict(missing)
        self.need = sum(entry.bytes for entry in self.waiting.values())
        self.done = 0
        self.wrong: list[str] = []
        self.busy = False
        self.drawn = False
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def arrived(self, number: int) -> None:
        entry = self.waiting.get(number)
        part = self.staging / "part" / str(number)
        if entry is None or not part.is_file():
            return
        self.busy = True
        size = part.stat().st_size
        found = hash_file(part) if size == entry.bytes else ""
        if found == entry.blake3:
            target = self.staging / "files" / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
            self.done += size
            del self.waiting[number]
        else:
            part.unlink()
            why = f"blake3 {found[:8]}… is not {entry.blake3[:8]}…" if found else f"{size} bytes, not {entry.bytes}"
            self.wrong.append(f"{entry.path} arrived with another content than its manifest says ({why})")
        self.busy = False

    def watch(self) -> None:
        """Progress lines; ends the process with 12 when nothing arrives for stall_s seconds."""
        began = moved = last = time.monotonic()
        seen, every = -1, 0.2 if sys.stderr.isatty() else 3
        while not self.over.wait(0.2):
            now, here = time.monotonic(), self.done
            for path in (self.staging / "part").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    here += path.stat().st_blocks * 512
            if here != seen or self.busy:
                seen, moved = here, now
            if now - moved > self.stall_s:
                print(f"sync      warn  no byte arrived for {self.stall_s:.0f} s: given up", file=sys.stderr)
                os._exit(12)
            if now - last >= every:
                last = now
                self.progress(min(here, self.need), now - began)

    def progress(self, here: int, seconds: float) -> None:
        rate = here / seconds / 1e6 if seconds else 0.0
        share = here / self.need if self.need else 1.0
        bar = "#" * int(share * 20)
        left = f"{(self.need - here) / 1e6 / rate:.0f} s left" if rate else "waiting"
        line = (
            f"Download  {self.manifest.name}  [{bar:-<20}] {share:4.0%}  "
            f"{here / 1e6:.1f} of {self.need / 1e6:.1f} MB  {rate:.0f} MB/s  {left}"
        )
        tty = sys.stderr.isatty() and os.environ.get("CI") != "true" and os.environ.get("TERM") != "dumb"
        print(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)
        self.drawn = tty

    def end(self) -> None:
        """No more watching; a line that was redrawn in place is wiped away."""
        self.over.set()
        self.watcher.join()
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def plan_sizes(manifest: Manifest, staging: Path) -> list[tuple[int, Entry]]:
    """The entries without a file in staging: `plan` has just removed or proved those that had one."""
    files = staging / "files"
    found = []
    for number, entry in enumerate(manifest.files):
        path = _plain_file(files, entry.path)
        if path is None or path.stat().st_size != entry.bytes:
            found.append((number, entry))
    return found


def accept(manifest: Manifest, staging: Path, stall_s: float) -> int:
    """Reads the client's JSON lines on standard input; 0 when everything stands, 12 missing, 13 differs."""
    arrivals = Arrivals(manifest, staging, stall_s)
    arrivals.watcher.start()
    for line in sys.stdin:
        try:
            record = json.loads(line)
        except ValueError:
            print(line, end="", file=sys.stderr)
            continue
        name = Path(str(record.get("destination", ""))).name
        if record.get("success") and name.isdigit():
            arrivals.arrived(int(name))
    arrivals.end()
    for number in list(arrivals.waiting):
        if (staging / "part" / str(number)).exists():
            arrivals.arrived(number)
    for text in arrivals.wrong:
        print(f"sync      warn  {manifest.name}: {text}", file=sys.stderr)
    if arrivals.wrong:
        return 13
    return 12 if arrivals.waiting else 0


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finish(manifest: Manifest, source: Path, staging: Path, target: Path) -> None:
    """Staging becomes the model in one rename, everything on the disk before it."""
    files = staging / "files"
    if plan_sizes(manifest, staging):
        raise ManifestError(f"{manifest.name}: files are missing in {files}")
    (files / MANIFEST).write_bytes(source.read_bytes())
    for path in files.rglob("*"):
        _fsync(path)
    marker = files / COMPLETE
    marker.write_text(manifest.digest + "\n")
    _fsync(marker)
    _fsync(files)
    files.rename(target)
    _fsync(target.parent)
    shutil.rmtree(staging, ignore_errors=True)


def copy_line(options: str, source: str, target: str) -> str:
    """A command for the client's `run`; --raw, since a key may hold * or ?."""
    return f"cp --raw {options} {shlex.quote(source)} {shlex.quote(target)}\n"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wmtp.manifest", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("create", help="the manifest of a folder, on standard output")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--name", required=True)
    for name, text in (
        ("check", "refuses a hostile manifest; prints name, files and bytes"),
        ("digest", "the digest that names this version"),
        ("list", "commands for the client that publishes the folder"),
        ("plan", "what is missing in staging: BYTES<TAB>PATH; with --commands the client's file"),
        ("accept", "the client's JSON lines in, files out"),
        ("finish", "staging becomes the model"),
        ("verify", "a finished folder against its manifest"),
        ("same", "whether two manifests describe the same content"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("manifest", type=Path)
        if name in ("plan", "accept", "finish", "verify", "same", "list"):
            verb.add_argument("folder", type=Path)
        if name == "plan":
            verb.add_argument("--commands", type=Path, help="file for the client's commands")
        if name in ("plan", "list"):
            verb.add_argument("--prefix", help="s3://BUCKET/models/NAME")
            verb.add_argument("--options", default="", help="options of each copy")
        if name == "accept":
            verb.add_argument("--stall", type=float, default=30)
        if name == "finish":
            verb.add_argument("target", type=Path)
        if name == "verify":
            verb.add_argument("--quick", action="store_true", help="sizes and times instead of hashes")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "create":
        if not arguments.folder.is_dir():
            raise ManifestError(f"{arguments.folder} is not a folder")
        made = json.dumps(create(arguments.folder, arguments.name), ensure_ascii=False, indent=1) + "\n"
        _checked(made.encode())
        sys.stdout.buffer.write(made.encode())
        return 0
    manifest = load_manifest(arguments.manifest)
    if arguments.verb == "check":
        print(manifest.name, len(manifest.files), manifest.total_bytes, sep="\t")
    elif arguments.verb == "digest":
        print(manifest.digest)
    elif arguments.verb == "same":
        other = load_manifest(arguments.folder)
        mine, theirs = ((m.name, sorted(m.files, key=lambda e: e.path)) for m in (manifest, other))
        return 0 if mine == theirs else 1
    elif arguments.verb == "list":
        for entry in manifest.files:
            source, target = f"{arguments.folder}/{entry.path}", f"{arguments.prefix}/{entry.path}"
            sys.stdout.write(copy_line(arguments.options, source, target))
    elif arguments.verb == "plan":
        missing = plan(manifest, arguments.folder)
        if arguments.commands:
            parts = arguments.folder / "part"
            text = "".join(
                copy_line(arguments.options, f"{arguments.prefix}/{entry.path}", str(parts / str(number)))
                for number, entry in missing
            )
            arguments.commands.write_text(text, encoding="utf-8")
        for _, entry in missing:
            print(entry.bytes, entry.path, sep="\t")
    elif arguments.verb == "accept":
        return accept(manifest, arguments.folder, arguments.stall)
    elif arguments.verb == "finish":
        finish(manifest, arguments.manifest, arguments.folder, arguments.target)
    elif arguments.verb == "verify":
        found = list(differences(manifest, arguments.folder, arguments.quick))
        for text in found:
            print(f"{manifest.name}: {text}", file=sys.stderr)
        return 13 if found else 0
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments().parse_args(argv)
    try:
        return _run(arguments)
    except ManifestError as error:
        print(f"manifest  FAIL  {error}", file=sys.stderr)
        return 13
    except OSError as error:
        print(f"manifest  FAIL  {error}", file=sys.stderr)
        return 10


if __name__ == "__main__":
    sys.exit(main())
