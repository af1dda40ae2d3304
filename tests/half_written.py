#!/usr/bin/env python3
"""What stands under a final name is whole: models, checkpoints, scores, JSON files; on disk and in the bucket.

Usage: tests/half_written.py FOLDER…           folders of a run
       tests/half_written.py --bucket PREFIX   objects under s3://$S3_BUCKET_NAME/PREFIX

Standard output: a line for each thing that is not whole. Exit codes: 0 all is, 1 something isn't.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from wmtp.manifest import ManifestError, differences, load_manifest

STAGING = (".step-", ".staging", ".parts", ".link-")


def in_staging(path: Path) -> bool:
    return any(mark in part for part in path.parts for mark in STAGING)


def of_folder(root: Path) -> Iterator[str]:
    for marker in root.rglob(".complete"):
        folder = marker.parent
        if in_staging(marker.relative_to(root)):
            continue
        model = not marker.read_text().startswith("{")  # of the store: its marker holds its manifest's digest
        if (folder / "manifest.json").is_file():
            try:
                manifest = load_manifest(folder / "manifest.json")
            except ManifestError as error:
                yield f"{folder}: {error}"
                continue
            if model and marker.read_text().strip() != manifest.digest:
                yield f"{folder}: its marker is another manifest's"
            yield from (f"{folder}: {line}" for line in differences(manifest, folder))
        elif model:
            yield f"{folder}: a marker without a manifest"
        if model:
            continue
        for entry in json.loads(marker.read_text())["files"]:
            path = folder / entry["path"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                yield f"{path}: not the {entry['bytes']} bytes of its marker"
    for folder in root.rglob("step-*"):
        if folder.is_dir() and not in_staging(folder.relative_to(root)) and not (folder / ".complete").is_file():
            yield f"{folder}: a checkpoint's name without a marker"
    for link in root.rglob("*"):
        if link.is_symlink() and not link.exists():
            yield f"{link}: points nowhere"
    for file in root.rglob("*.json"):
        if not in_staging(file.relative_to(root)) and not file.name.startswith("."):  # a dot is no final name
            try:
                json.loads(file.read_text())
            except ValueError as error:
                yield f"{file}: torn: {error}"


def aws(*arguments: str) -> str:
    command = ["aws", "--endpoint-url", os.environ["S3_ENDPOINT_URL"], *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def of_bucket(prefix: str) -> Iterator[str]:
    bucket = os.environ["S3_BUCKET_NAME"]
    listed = aws("s3api", "list-objects-v2", "--bucket", bucket, "--prefix", prefix, "--query", "Contents[].[Key,Size]")
    sizes: dict[str, int] = dict(json.loads(listed) or [])
    for key in sizes:
        folder, _, name = key.rpartition("/")
        if name == ".complete" or name == "manifest.json":
            files = [(e["path"], e["bytes"]) for e in json.loads(aws("s3", "cp", f"s3://{bucket}/{key}", "-"))["files"]]
        else:
            continue
        for path, size in files:
            if sizes.get(f"{folder}/{path}") != size:
                yield f"s3://{bucket}/{folder}/{path}: {sizes.get(f'{folder}/{path}')} bytes, {name} says {size}"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--bucket"]:
        found = [line for prefix in arguments[1:] for line in of_bucket(prefix)]
    else:
        found = [line for folder in arguments for line in of_folder(Path(folder)) if Path(folder).exists()]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
