"""What a publisher can prove of a folder, and of what the bucket lists under its name; no transfer happens here.

WORK is a folder that keeps what one publish knows, from verb to verb: `facts` (the folder as it was first seen),
`hashes` (one line a file, as they come), `objects` (the client's listing), `old.json` (the manifest that is published),
`sent` (the client's report), `claim`, `need` (bytes that must go up), `lacking` and `remove`
(what the listing says of them).
Exit codes: 0 right, 2 bad arguments, 10 the disk refused, 12 the client has gone, 13 refused, or the folder changed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from hashlib import md5
from itertools import chain
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor

from wmtp.manifest import CLAIM, MANIFEST, Manifest, ManifestError, document, load_manifest, walk, written
from wmtp.staging import copy_line

BLOCK = 4 * 2**20
SHOWN = 5


@dataclass(frozen=True)
class Fact:
    """A file as it was first seen; what is not so any more was changed."""

    bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Hashes:
    blake3: str
    etag: str


@dataclass(frozen=True)
class Listed:
    """An object as the bucket lists it."""

    bytes: int
    etag: str


def fact(stat: os.stat_result) -> Fact:
    return Fact(stat.st_size, stat.st_mtime_ns, stat.st_ino)


def read_listing(path: Path, prefix: str) -> dict[str, Listed]:
    """The client's `ls --json`: objects by their path behind prefix; folders' markers are none."""
    found = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line and (record := json.loads(line)).get("type") == "file" and not record["key"].endswith("/"):
            # An empty object has no size in it.
            found[record["key"].removeprefix(prefix)] = Listed(record.get("size", 0), record.get("etag", ""))
    return found


def hash_both(path: Path, first: Fact, part_bytes: int) -> Hashes:
    """blake3, and the ETag that S3 gives this content where it encrypts without a key of its own, in one reading.

    The ETag is the MD5 of what is one part, else the MD5 of the parts' MD5s and their number. ManifestError when
    the file is not the one that was first seen, before, after or under its name.
    """
    whole, parts, left = blake3(), [md5(usedforsecurity=False)], part_bytes
    with path.open("rb", buffering=0) as stream:
        before = fact(os.fstat(stream.fileno()))
        while block := stream.read(min(BLOCK, left or part_bytes)):
            if not left:
                parts.append(md5(usedforsecurity=False))
                left = part_bytes
            whole.update(block)
            parts[-1].update(block)
            left -= len(block)
        if not first == before == fact(os.fstat(stream.fileno())) == fact(path.stat()):
            raise ManifestError(f"{path} changed while it was published")
    joined = md5(b"".join(part.digest() for part in parts), usedforsecurity=False).hexdigest()
    return Hashes(whole.hexdigest(), parts[0].hexdigest() if len(parts) == 1 else f"{joined}-{len(parts)}")


class Publish:
    """One folder on its way to one name."""

    def __init__(self, work: Path, folder: Path, prefix: str, part_mb: int):
        self.work, self.folder, self.prefix, self.part_bytes = work, folder, prefix.rstrip("/") + "/", part_mb * 2**20
        self.name = self.prefix.split("/")[-2]
        self.facts = {path: Fact(*rest) for path, *rest in self._lines("facts")}
        self.hashes = {path: Hashes(*rest) for path, *rest in self._lines("hashes")}
        self.objects = read_listing(work / "objects", self.prefix) if (work / "objects").exists() else {}
        self.published = self.objects.pop(MANIFEST, None)
        claim = self.objects.pop(CLAIM, None)
        for path in self.objects:
            if re.search(r"[\x00-\x1f\x7f-\x9f]", path):  # it would end a line of the client's commands
                raise ManifestError(f"{self.prefix}{plain(path)}: an object whose name no manifest may have; remove it")
        # Where the ETag of an object that we know is its MD5, the others' are.
        known = ((self.published, "old.json"), (claim, "claim"))
        self.etags_are_md5 = any(
            o and (work / f).exists() and o.etag == md5((work / f).read_bytes(), usedforsecurity=False).hexdigest()
            for o, f in known
        )

    def _lines(self, name: str) -> Iterator[Any]:
        path = self.work / name
        # A line that a kill cut off is no line.
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def survey(self) -> dict[str, Fact]:
        found = {path: fact(file.stat()) for path, file in walk(self.folder).items()}
        if not found:
            raise ManifestError(f"{self.folder} holds no file")
        # The limits of a manifest are known before anything is uploaded.
        document(self.name, [{"path": path, "bytes": f.bytes, "blake3": "0" * 64} for path, f in found.items()])
        return found

    def need_whole(self, found: Iterable[str]) -> None:
        """Raise ManifestError with the first file of a model that can't be what it was."""
        for path in found if "/models/" in self.prefix else ():
            if lacks := cut_off(self.folder / path):
                raise ManifestError(
                    f"{self.folder / path} is not whole: {lacks}; rule: what is published can be "
                    "loaded; next: fetch or export it again"
                )

    def hash(self, paths: Iterable[str]) -> Iterator[str]:
        """Begins at once; paths as their hashes are known, each kept as it comes."""
        known: list[str] = []
        todo: dict[Future[Hashes], str] = {}
        # Not to be waited for when something else ends this process. One core is left to the client.
        pool = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) - 1)))
        for path in paths:
            if path in self.hashes:
                known.append(path)
            else:
                todo[pool.submit(hash_both, self.folder / path, self.facts[path], self.part_bytes)] = path
        return chain(known, self._hashed(todo))

    def _hashed(self, todo: dict[Future[Hashes], str]) -> Iterator[str]:
        with (self.work / "hashes").open("a", encoding="utf-8") as kept:
            while todo:
                done, _ = wait(todo, timeout=4, return_when=FIRST_COMPLETED)
                for future in done:
                    path = todo.pop(future)
                    self.hashes[path] = future.result()
                    print(json.dumps([path, *astuple(self.hashes[path])]), file=kept, flush=True)
                    yield path
                if not done:
                    known = sum(self.facts[path].bytes for path in self.hashes)
                    total = sum(first.bytes for first in self.facts.values())
                    say(f"{self.name}: hashing, {known / 1e6:.0f} of {total / 1e6:.0f} MB")

    def stands(self, path: str) -> bool | None:
        """Whether the bucket has this content; None: the size agrees, and its ETag says nothing."""
        there = self.objects.get(path)
        if there is None or there.bytes != self.facts[path].bytes:
            return False
        if not self.etags_are_md5 or path not in self.hashes:
            return None
        mine = self.hashes[path].etag
        # Of another number of parts: somebody else's part size.
        return mine == there.etag if mine.partition("-")[2] == there.etag.partition("-")[2] else None

    def old(self) -> Manifest | None:
        """The published manifest, checked; it stays known while a replacement has taken it away."""
        return load_manifest(self.work / "old.json") if (self.work / "old.json").exists() else None

    def sent(self) -> set[str]:
        """What the client reported as put, in this publish."""
        found = set()
        for record in self._lines("sent"):
            if record.get("operation") == "cp" and record.get("success"):
                found.add(record["destination"].removeprefix(self.prefix))
        return found

    def differences(self, old: Manifest) -> list[str]:
        """What the folder has otherwise than the published manifest; hashes only where all sizes agree."""
        theirs = {entry.path: entry for entry in old.files}
        found = [] if old.name == self.name else [f"its name is {old.name}"]
        found += [f"{path} is new" for path in self.facts.keys() - theirs.keys()]
        found += [f"{path} is gone" for path in theirs.keys() - self.facts.keys()]
        for path in self.facts.keys() & theirs.keys():
            here, there = self.facts[path].bytes, theirs[path].bytes
            if here != there:
                found.append(f"{path} has {here} bytes, not {there}")
        if not found:
            for _ in self.hash(self.facts):
                pass
            for path, entry in theirs.items():
                if (mine := self.hashes[path].blake3) != entry.blake3:
                    found.append(f"{path}: blake3 {mine[:8]}… is not {entry.blake3[:8]}…")
        return sorted(found)

    def look(self, force: bool) -> tuple[str, str, list[str]]:
        """(verdict, digest of what is published, what there is to say).

        new: nothing is published, nothing of somebody else's is there. same: published with this content. mend: so, but
        objects lack. other: another version. foreign: no manifest, and objects that are not this folder's.
        """
        if self.published is None:
            (self.work / "old.json").unlink(missing_ok=True)
            strange = self.unnamed()
            strange += [
                f"{p} has {o.bytes} bytes" for p, o in self.objects.items() if p in self.facts and not self.fits(p)
            ]
            return "foreign" if strange else "new", "", sorted(strange)
        try:
            old = self.old()
            assert old is not None
        except ManifestError as error:
            return "other", "", [str(error)]
        if differ := self.differences(old):
            return "other", old.digest, differ
        # Told to force, what is not proved is uploaded.
        lacking = [path for path in self.facts if not (self.stands(path) or (self.stands(path) is None and not force))]
        if lacking:
            return "mend", old.digest, lacking
        sizes = sum(self.stands(path) is None for path in self.facts)
        return "same", old.digest, [f"{sizes} of {len(self.facts)} objects proved by size alone"] if sizes else []

    def fits(self, path: str) -> bool:
        return path in self.objects and self.objects[path].bytes == self.facts[path].bytes

    def unnamed(self) -> list[str]:
        return [path for path in self.objects if path not in self.facts]

    def decide(self, hash_rest: bool = True) -> Iterator[tuple[str, bool]]:
        """(path, whether it must go up), at once where no object can be the right one; the rest as it is hashed."""
        trusted = {}
        with contextlib.suppress(ManifestError):
            # What stands under a manifest of this very content is here because it is to be mended.
            if (old := self.old()) and self.differences(old):
                trusted = {entry.path: entry.blake3 for entry in old.files}
        sent = self.sent()
        first = [path for path in self.facts if self.fits(path)]
        rest = [path for path in self.facts if not self.fits(path)]
        hashed = self.hash([*first, *rest] if hash_rest else first)
        for path in rest:
            yield path, True
        for path in hashed:
            if self.fits(path):
                stands = self.stands(path)
                known = path in sent or trusted.get(path) == self.hashes[path].blake3
                yield path, not (stands or (stands is None and known))

    def send(self) -> None:
        """Commands for the client on standard output, while everything is hashed."""
        need = sum(first.bytes for first in self.facts.values())
        (self.work / "need").write_text(f"{need}\n")
        options = f"--concurrency 16 --part-size {self.part_bytes // 2**20}"
        for path, up in self.decide():
            if up:
                sys.stdout.write(copy_line(options, str(self.folder / path), self.prefix + path))
                sys.stdout.flush()
            else:
                need -= self.facts[path].bytes
                (self.work / "need").write_text(f"{need}\n")

    def rehearse(self) -> Iterator[tuple[str, int, str]]:
        """(upload, replace, keep or remove; bytes; path) of each file and object."""
        for path, up in self.decide(hash_rest=False):
            yield ("replace" if path in self.objects else "upload") if up else "keep", self.facts[path].bytes, path
        for path in self.unnamed():
            yield "remove", self.objects[path].bytes, path

    def seal(self) -> bytes:
        """The manifest, when the folder is still what was first seen."""
        now = self.survey()
        if now != self.facts:
            changed = sorted(path for path in now.keys() | self.facts.keys() if now.get(path) != self.facts.get(path))
            raise ManifestError(f"{self.folder} changed while it was published: {', '.join(changed[:SHOWN])}")
        files = [{"path": p, "bytes": f.bytes, "blake3": self.hashes[p].blake3} for p, f in self.facts.items()]
        return written(document(self.name, files))


POINTER = b"version https://git-lfs"


def cut_off(path: Path) -> str:
    """What a file of a model lacks by its header, directory or grammar; empty where it is whole, or of another kind.

    No weights are read: a shortened download, or the pointer of a large file's storage in its place, shows at once.
    """
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".json") and path.name != "tokenizer.model":
        return ""
    with path.open("rb") as stream:
        begins = stream.read(len(POINTER))
    if begins == POINTER:
        return "it is the pointer of a file that is stored elsewhere (git lfs pull)"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):
                return ""
        except SafetensorError as error:
            return str(error)
    if begins.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "its directory, which is its end, is not there"
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.name == "tokenizer.model":
            SentencePieceProcessor(model_file=str(path))
    except (ValueError, RuntimeError) as error:
        return " ".join(str(error).split())
    return ""


def plain(text: str) -> str:
    """What a bucket or a manifest says, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    print(f"publish   {text}", file=sys.stderr, flush=True)


def _run(verb: str, publish: Publish, force: bool) -> None:
    if verb == "survey":
        found = publish.survey()
        publish.need_whole(found)
        lines = (json.dumps([path, *astuple(first)]) + "\n" for path, first in found.items())
        (publish.work / "facts").write_text("".join(lines), encoding="utf-8")
    elif verb == "look":
        verdict, digest, said = publish.look(force)
        more = f", and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        print(verdict, digest or "-", plain(", ".join(said[:SHOWN]) + more), sep="\t")
    elif verb == "send":
        publish.send()
    elif verb == "rehearse":
        sums = dict.fromkeys(("upload", "replace", "keep", "remove"), (0, 0))
        for what, size, path in publish.rehearse():
            print(publish.name, what, size, path, sep="\t")
            sums[what] = sums[what][0] + 1, sums[what][1] + size
        say(f"{publish.name}: would " + ", ".join(f"{w} {n} ({b / 1e6:.1f} MB)" for w, (n, b) in sums.items()))
    elif verb == "lacking":
        lacking = [f"{first.bytes}\t{path}\n" for path, first in publish.facts.items() if publish.stands(path) is False]
        remove = [f"rm --raw {shlex.quote(publish.prefix + path)}\n" for path in publish.unnamed()]
        (publish.work / "lacking").write_text("".join(lacking), encoding="utf-8")
        (publish.work / "remove").write_text("".join(remove), encoding="utf-8")
        if sizes := sum(publish.stands(path) is None for path in publish.facts):
            say(
                f"{publish.name}: {sizes} of {len(publish.facts)} objects proved by size alone: their ETags are no MD5s"
            )
    elif verb == "seal":
        made = publish.seal()
        (publish.work / "new.json").write_bytes(made)
        print(blake3(made).hexdigest())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.publish", description=__doc__)
    parser.add_argument("verb", choices=("survey", "look", "send", "rehearse", "lacking", "seal"))
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prefix", help="s3://BUCKET/models/NAME")
    parser.add_argument("--part-mb", type=int, default=100, help="what the client sends in one piece")
    parser.add_argument("--force", action="store_true")
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        _run(
            arguments.verb,
            Publish(arguments.work, arguments.folder, arguments.prefix, arguments.part_mb),
            arguments.force,
        )
        sys.stdout.flush()
    except ManifestError as error:
        for number, line in enumerate(str(error).split("\n")):
            say(f"{'    ' if number else 'FAIL'}  {plain(line)}")
        return 13
    except BrokenPipeError:
        return 12
    except OSError as error:
        say(f"FAIL  {error}")
        return 13 if isinstance(error, FileNotFoundError) else 10
    return 0


if __name__ == "__main__":
    code = main()
    # Threads that still hash are not waited for.
    sys.stderr.flush()
    os._exit(code)
