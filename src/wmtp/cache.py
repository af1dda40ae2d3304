"""What the models' store holds, what uses it, and what may go.

    python -m wmtp.cache survey STORE LABEL=MANIFEST…    label, digest, files, bytes, state, bytes here
    python -m wmtp.cache list STORE MODELS [--json]      every version
    python -m wmtp.cache spare STORE MODELS DIGEST…      what nobody uses, longest unused first; DIGESTs are wanted

A version is used when a link of this machine points at it, when a reader holds its marker (a shared lock for as long as
it reads), or when another machine linked it in the last day. Nothing here writes. Exit codes: 0 done, 2 bad arguments,
13 a manifest is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wmtp.manifest import COMPLETE, ManifestError, differences, load_manifest
from wmtp.staging import reusable, versions

ELSEWHERE_S = 24 * 3600
"""For so long another machine's link counts: whether it still stands can't be seen from here."""
USED = ".used"


def survey(store: Path, items: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, ...]]:
    """What of each item is here; state is `hit`, `touched` (to be hashed) or `new`. Raises ManifestError."""
    loaded = [(label, load_manifest(path)) for label, path in items]
    others = list(versions(store)) if any(not (store / m.digest).is_dir() for _, m in loaded) else []
    for label, manifest in loaded:
        if (name := label.rpartition(":")[2]) != manifest.name:
            raise ManifestError(f"{name}: its manifest is that of {manifest.name}; publish {name} again")
        target, here = store / manifest.digest, manifest.total_bytes
        if target.is_dir():
            state = "touched"
            with contextlib.suppress(OSError):  # evicted, or mended by another sync, just now
                state = "touched" if any(differences(manifest, target, quick=True)) else "hit"
        else:
            state, staged = "new", store / ".staging" / f"{name}-{manifest.digest}" / "files"
            same = reusable(manifest, others)
            here = sum(e.bytes for e in manifest.files if e.blake3 in same or (staged / e.path).is_file())
        files = len(manifest.files)
        yield label, manifest.digest, str(files), str(manifest.total_bytes), state, str(here)


@dataclass(frozen=True)
class Version:
    digest: str
    name: str
    files: int
    bytes: int
    used: float
    """Seconds since the epoch: when it was last linked."""
    users: tuple[str, ...]


def held(folder: Path) -> bool:
    """Whether a reader has the version open: it holds a shared lock on the marker."""
    try:
        with (folder / COMPLETE).open("rb") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def hold(folder: Path) -> None:
    """Keep a version from eviction for as long as this process lives; a folder that no sync made needs none."""
    marker = folder / COMPLETE
    if marker.is_file():
        _held.append(marker.open("rb"))  # closed, it would be let go
        fcntl.flock(_held[-1], fcntl.LOCK_SH)


_held: list[IO[bytes]] = []


def _users(store: Path, digest: str, links: Path) -> tuple[float, list[str]]:
    """When a version was last linked, and by what that still stands."""
    target, last, users = store / digest, 0.0, []
    for link in (links, links.parent / "datasets" / ".synced"):
        for path in sorted(link.iterdir()) if link.is_dir() else ():
            if path.is_symlink() and not path.name.startswith(".") and path.resolve() == target.resolve():
                users.append(str(path))
    for record in sorted((store / USED / digest).glob("*")):
        host, _, where = record.read_text(encoding="utf-8").strip().partition("\t")
        last = max(last, record.stat().st_mtime)
        if host == socket.gethostname():
            stands = Path(where).is_symlink() and Path(where).resolve() == target.resolve()
            where = where if where not in users else ""
        else:
            stands, where = time.time() - record.stat().st_mtime < ELSEWHERE_S, f"{host}:{where}"
        if stands and where:
            users.append(where)
    if held(target):
        users.append("a reader")
    return last, users


def look(store: Path, links: Path) -> list[Version]:
    """Every version of a store, the longest unused first; ``links`` is this machine's folder of models."""
    found = []
    for folder, manifest in versions(store):
        with contextlib.suppress(FileNotFoundError):  # evicted just now
            last, users = _users(store, folder.name, links)
            last = last or (folder / COMPLETE).stat().st_mtime
            size = manifest.total_bytes
            found.append(Version(folder.name, manifest.name, len(manifest.files), size, last, tuple(users)))
    return sorted(found, key=lambda version: version.used)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def table(found: Sequence[Version]) -> str:
    rows = [("DIGEST", "NAME", "FILES", "GB", "LAST USED", "USED BY")]
    now = time.time()
    for one in reversed(found):
        users = ", ".join(one.users) or "nobody"
        rows.append(
            (one.digest[:12], one.name, str(one.files), f"{one.bytes / 1e9:.3f}", f"{_age(now - one.used)} ago", users)
        )
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.cache", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=("survey", "list", "spare"))
    parser.add_argument("store", type=Path)
    parser.add_argument("items", nargs="*", metavar="LABEL=MANIFEST | MODELS [DIGEST…]")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        if arguments.verb == "survey":
            pairs = [item.partition("=") for item in arguments.items]
            for line in survey(arguments.store, [(label, Path(path)) for label, _, path in pairs]):
                print(*line, sep="\t")
            return 0
    except ManifestError as error:
        print(f"manifest  FAIL  {error}", file=sys.stderr)
        return 13
    links, *wanted = arguments.items
    found = look(arguments.store, Path(links))
    if arguments.verb == "spare":
        for one in found:
            if not one.users and one.digest not in wanted:
                print(one.digest, one.name, one.bytes, sep="\t")
    elif arguments.json:
        for one in found:
            print(json.dumps({**vars(one), "used": round(one.used)}))
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
