"""What a bucket has published, from its listing and the manifests in it.

Exit codes: 0 right, 13 a manifest is refused, or an object that it names is not there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wmtp.manifest import CLAIM, MANIFEST, ManifestError, load_manifest
from wmtp.publish import Listed, plain, read_listing

WORKERS = 16
COLUMNS = ("name", "files", "bytes", "digest", "created")


def shelves(listing: Path) -> dict[str, dict[str, Listed]]:
    """Objects by path, of each models/NAME and datasets/NAME."""
    found: dict[str, dict[str, Listed]] = {}
    for key, listed in read_listing(listing, "").items():
        parts = re.fullmatch(r"s3://[^/]+/((?:models|datasets)/[^/]+)/(.+)", key, re.DOTALL)
        if parts:
            found.setdefault(parts[1], {})[parts[2]] = listed
    return found


def row(name: str, objects: dict[str, Listed], manifest: Path) -> dict[str, Any]:
    """One line of the table; `trouble` where the manifest is refused or names what is not there."""
    total = sum(listed.bytes for path, listed in objects.items() if path != CLAIM)
    made: dict[str, Any] = {
        "name": name,
        "files": None,
        "bytes": total,
        "digest": None,
        "created": None,
        "trouble": None,
    }
    if MANIFEST not in objects:
        return made
    try:
        checked = load_manifest(manifest)
        if checked.name != name.partition("/")[2]:
            raise ManifestError(f"its manifest is of another name, {checked.name}")
    except (ManifestError, OSError) as error:
        return made | {"trouble": str(error)}
    created = json.loads(manifest.read_bytes())["created"]
    made |= {"files": len(checked.files), "bytes": checked.total_bytes, "digest": checked.digest, "created": created}
    there = {path: listed.bytes for path, listed in objects.items()}
    lacking = [entry.path for entry in checked.files if there.get(entry.path) != entry.bytes]
    return made | {"trouble": f"{lacking[0]} is not there as it says ({len(lacking)} of such)"} if lacking else made


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    cells = [[column.upper() for column in COLUMNS]]
    for made in rows:
        digest = made["digest"] and made["digest"][:12]
        why = made["trouble"] and f"FAIL {made['trouble']}"
        if digest is None:
            cells.append([made["name"], "-", str(made["bytes"]), why or "not published", ""])
        else:
            cells.append(
                [made["name"], str(made["files"]), str(made["bytes"]), digest, f"{made['created']}  {why or ''}"]
            )
    wide = [max(len(line[column]) for line in cells) for column in range(3)]
    for name, files, size, digest, rest in cells:
        yield plain(f"{name:<{wide[0]}}  {files:>{wide[1]}}  {size:>{wide[2]}}  {digest:<12}  {rest}".rstrip())


def one(name: str, objects: dict[str, Listed], manifest: Path, free: int) -> Iterator[str]:
    """Digest, bytes, files, how many of these fit a disk with ``free`` bytes at once; then what no manifest names."""
    checked = load_manifest(manifest)
    if checked.name != name.partition("/")[2]:
        raise ManifestError(f"its manifest is of another name, {checked.name}")
    largest = sorted((entry.bytes for entry in checked.files), reverse=True)[:WORKERS]
    while sum(largest) > free:
        largest.pop()
    yield f"{checked.digest} {checked.total_bytes} {len(checked.files)} {len(largest)}"
    yield from (plain(path) for path in objects.keys() - {entry.path for entry in checked.files} - {MANIFEST, CLAIM})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.published", description=__doc__)
    parser.add_argument("listing", type=Path, help="the client's `ls --json`")
    parser.add_argument("manifests", type=Path, help="folder of models/NAME.json and datasets/NAME.json")
    parser.add_argument(
        "--one", metavar="models/NAME", help="what there is to know before it is brought through a disk"
    )
    parser.add_argument("--free", type=int, default=0, help="bytes of that disk")
    parser.add_argument("--json", action="store_true", help="one object a line, with the whole digest")
    arguments = parser.parse_args(argv)
    found = shelves(arguments.listing)
    if name := arguments.one:
        try:
            print(*one(name, found.get(name, {}), arguments.manifests / f"{name}.json", arguments.free), sep="\n")
        except ManifestError as error:
            print(f"published FAIL  {name}: {plain(str(error))}", file=sys.stderr)
            return 13
        return 0
    rows = [row(name, found[name], arguments.manifests / f"{name}.json") for name in sorted(found)]
    rows.sort(key=lambda made: made["name"].startswith("datasets/"))
    for line in (json.dumps(made, ensure_ascii=False) for made in rows) if arguments.json else table(rows):
        print(line)
    return 13 if any(made["trouble"] for made in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
