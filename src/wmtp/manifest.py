"""The manifest of a model: written when it is published, believed only after it is checked.

No transfer happens here: `plan` says what the client has to bring, `accept` (both in `wmtp.staging`) reads what it
reports and lets a file take its name once its hash is right.
Exit codes: 0 right, 2 bad arguments, 10 the disk refused, 12 files are missing, 13 differs or is refused.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blake3 import blake3

MAX_FILES = 100_000
MAX_BYTES = 64 * 2**20
MANIFEST = "manifest.json"
COMPLETE = ".complete"
CLAIM = ".publishing"
"""The object that says who is publishing a name."""
LISTING = ".listing"
"""The folder of what was listed in a bucket without manifests; `load_manifest` reads it as such, and nothing else.

No model can have this name."""
LARGE = 256 * 2**20  # bytes from which a file is hashed by all cores: nothing else is left to do beside it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KEYS = {"format", "name", "files", "total_bytes", "created", "tool"}


class ManifestError(ValueError):
    """The manifest is refused, or content differs from it; str() says what and where."""


@dataclass(frozen=True)
class Entry:
    path: str
    bytes: int
    blake3: str
    """64 hexadecimal digits; empty in a listing, where nobody hashed."""
    crc64nvme: str = ""
    """The bucket's own full-object checksum in base64, in a listing."""

    def differs(self, path: Path) -> str:
        """How a file's size or content is another than this; empty where it is this. Raises OSError."""
        if (size := path.stat().st_size) != self.bytes:
            return f"{size} bytes, not {self.bytes}"
        for kind, right, compute in (("blake3", self.blake3, hash_file), ("crc64nvme", self.crc64nvme, crc64nvme)):
            if right and (found := compute(path)) != right:
                return f"{kind} {found[:8]}… is not {right[:8]}…"
        return ""


@dataclass(frozen=True)
class Manifest:
    name: str
    files: tuple[Entry, ...]
    total_bytes: int
    digest: str


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def hash_file(path: Path, alone: bool = True) -> str:
    """blake3 of a file's content, 64 hexadecimal digits; other threads run meanwhile. Not ``alone``: on one core."""
    if alone and path.stat().st_size >= LARGE:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    hasher = blake3()
    for block in _blocks(path):
        hasher.update(block)
    return hasher.hexdigest()


def _blocks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(path.stat().st_size, 2**20) + 1))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            yield buffer[:count]


def crc64nvme(path: Path) -> str:
    """CRC-64/NVME of a file's content in base64, as S3 says it (x-amz-checksum-crc64nvme)."""
    from awscrt import checksums  # only for a bucket without manifests

    found = 0
    for block in _blocks(path):
        found = checksums.crc64nvme(block, found)
    return base64.b64encode(found.to_bytes(8, "big")).decode()


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


def _refuse_paths(files: tuple[Entry, ...]) -> None:
    paths = {entry.path for entry in files}
    if len(paths) != len(files):
        raise ManifestError("a path stands twice")
    for entry in files:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in paths:
                raise ManifestError(f"{entry.path!a}: its folder is a file of the same manifest")


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
    _refuse_paths(files)
    total = sum(entry.bytes for entry in files)
    if raw["total_bytes"] != total or not _is_count(raw["total_bytes"]):
        raise ManifestError(f"total_bytes {raw['total_bytes']!r}: the files have {total}")
    return Manifest(raw["name"], files, total, _digest(data))


def load_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest; ManifestError names the first thing that is refused."""
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        return _listing(data) if path.parent.name == LISTING else _checked(data)
    except ManifestError as error:
        raise ManifestError(f"{path.name} is refused: {error}") from None


def _listing(data: bytes) -> Manifest:
    """What `wmtp.bucket` listed, by the same rules for its paths; its version is that of sizes and ETags."""
    raw = json.loads(data)
    files = tuple(Entry(_check_path(f["path"]), f["bytes"], "", f["crc64nvme"]) for f in raw["files"])
    _refuse_paths(files)
    return Manifest(raw["name"], files, sum(entry.bytes for entry in files), _digest(data))


def create(folder: Path, name: str, alone: bool = True) -> dict[str, Any]:
    """The manifest of a folder: links to files are read through, what a manifest may not name is refused."""
    files = [
        {"path": relative, "bytes": path.stat().st_size, "blake3": hash_file(path, alone)}
        for relative, path in walk(folder).items()
    ]
    return document(name, files)


def document(name: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """A manifest of these files that `load_manifest` takes, or the refusal."""
    made = {
        "format": 1,
        "name": name,
        "files": files,
        "total_bytes": sum(item["bytes"] for item in files),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": "wmtp",
    }
    _checked(written(made))
    return made


def written(made: dict[str, Any]) -> bytes:
    """The bytes of a manifest as they are published."""
    return (json.dumps(made, ensure_ascii=False, indent=1) + "\n").encode()


def walk(folder: Path) -> dict[str, Path]:
    """The files that a publisher sends, by their path in the manifest; all that can't be sent is named at once."""
    found, refused = {}, []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if relative in (MANIFEST, COMPLETE) or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            if not path.is_file():
                kind = "a link that is no file's" if path.is_symlink() else "neither a file nor a folder"
                raise ManifestError(f"{relative!a}: {kind}; only files can be published")
            if relative == CLAIM:
                raise ManifestError(f"path {relative!a}: the name is reserved")
            found[_check_path(relative)] = path
        except ManifestError as error:
            refused.append(str(error))
    if refused:
        raise ManifestError("\n".join(refused))
    return found


def plain_file(root: Path, path: str) -> Path | None:
    """The file, unless it or a folder on its way is missing or a link."""
    at = root
    for part in path.split("/"):
        at = at / part
        if at.is_symlink():
            return None
    return at if at.is_file() else None


def differences(manifest: Manifest, folder: Path, quick: bool = False) -> Iterator[str]:
    """What in a finished folder is not as the manifest says; quick: sizes and times instead of hashes."""
    marked = 0
    if quick:
        marker = folder / COMPLETE
        if not marker.is_file() or marker.read_text().strip() != manifest.digest:
            yield f"{COMPLETE} does not hold {manifest.digest[:12]}"
            return
        marked = marker.stat().st_mtime_ns

    def look(entry: Entry) -> str:
        path = plain_file(folder, entry.path)
        if path is None:
            return f"{entry.path} is missing"
        if quick:
            stat = path.stat()
            if stat.st_size != entry.bytes:
                return f"{entry.path} has {stat.st_size} bytes, not {entry.bytes}"
            return f"{entry.path} was written after {COMPLETE}" if stat.st_mtime_ns > marked else ""
        what = entry.differs(path)
        return f"{entry.path}: {what}" if what else ""

    if quick:
        yield from filter(None, map(look, manifest.files))
    else:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            yield from filter(None, pool.map(look, manifest.files))


def extras(manifest: Manifest, folder: Path) -> Iterator[str]:
    """What lies in a folder and is not in its manifest."""
    known = {entry.path for entry in manifest.files} | {MANIFEST, COMPLETE}
    for path in folder.rglob("*"):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()} is not in the manifest"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wmtp.manifest", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("create", help="the manifest of a folder, on standard output")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--name", required=True)
    for name, text in (
        ("check", "refuses a hostile manifest; prints name, files and bytes"),
        ("digest", "the digest that names this version"),
        ("plan", "clears staging; prints how many files and bytes are lacking; with --commands the client's file"),
        ("accept", "the client's JSON lines in, files out; prints how many files and bytes are lacking"),
        ("first", "settings and tokenizer, for those who wait: the client's commands, then with --accept the files"),
        ("finish", "staging becomes the model"),
        ("verify", "a finished folder against its manifest"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("manifest", type=Path)
        if name not in ("check", "digest"):
            verb.add_argument("folder", type=Path)
        if name == "plan":
            verb.add_argument("--commands", type=Path, help="file for the client's commands")
            verb.add_argument("--store", type=Path, help="other versions' files of the same content are used again")
            verb.add_argument("--also", type=Path, help="a folder that has some of the files")
        if name in ("plan", "first"):
            verb.add_argument("--prefix", help="s3://BUCKET/models/NAME")
            verb.add_argument("--options", default="", help="options of each copy")
        if name == "accept":
            verb.add_argument("--discard", action="store_true", help="remove each file once it is proved")
        if name == "first":
            verb.add_argument("--accept", action="store_true")
        if name == "finish":
            verb.add_argument("target", type=Path)
        if name == "verify":
            verb.add_argument("--quick", action="store_true", help="sizes and times instead of hashes")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from wmtp import staging  # it builds on this module

    if arguments.verb == "create":
        if not arguments.folder.is_dir():
            raise ManifestError(f"{arguments.folder} is not a folder")
        sys.stdout.buffer.write(written(create(arguments.folder, arguments.name)))
        return 0
    manifest = load_manifest(arguments.manifest)
    if arguments.verb == "check":
        print(manifest.name, len(manifest.files), manifest.total_bytes, sep="\t")
    elif arguments.verb == "digest":
        print(manifest.digest)
    elif arguments.verb == "plan":
        missing = staging.plan(manifest, arguments.folder, arguments.store, arguments.also)
        if arguments.commands:
            parts = arguments.folder / "part"
            text = "".join(
                staging.copy_line(arguments.options, f"{arguments.prefix}/{entry.path}", str(parts / str(number)))
                for number, entry in missing
            )
            arguments.commands.write_text(text, encoding="utf-8")
        print(len(missing), sum(entry.bytes for _, entry in missing))
    elif arguments.verb == "accept":
        return staging.accept(manifest, arguments.folder, arguments.discard)
    elif arguments.verb == "first":
        if arguments.accept:
            staging.accept_first(manifest, arguments.manifest, arguments.folder)
        else:
            sys.stdout.write(staging.plan_first(manifest, arguments.folder, arguments.prefix, arguments.options))
    elif arguments.verb == "finish":
        staging.finish(manifest, arguments.manifest, arguments.folder, arguments.target)
    elif arguments.verb == "verify":
        found = list(differences(manifest, arguments.folder, arguments.quick))
        for text in found:
            print(f"manifest  {manifest.name}: {text}", file=sys.stderr)
        if not arguments.quick:
            for text in extras(manifest, arguments.folder):
                print(f"manifest  warn  {manifest.name}: {text}: left alone", file=sys.stderr)
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
    from wmtp import manifest as this  # the module that wmtp.staging knows: its errors are caught here

    sys.exit(this.main())
