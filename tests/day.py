"""The page of the operator's day, from the transcript that bats/cluster/day.bats writes.

    python tests/day.py TRANSCRIPT [--check PAGE]

Standard output: the page. With --check: nothing, and exit code 1 with the differences where PAGE has another shape. The
shape is what stays from day to day: no figures, hashes, paths, and no more than one of lines that are then alike.

The transcript's lines by their first characters: `== ` a heading, `-- ` words, `$ ` a command, `~ ` a pattern of the
lines of its output that the page shows (all of them without), `| ` a line of output, `= ` the exit code.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from itertools import groupby
from pathlib import Path

HEAD = """# The operator's day

One day with the tool, as `bats/cluster/day.bats` lived it: each command was typed, each line was its output. Engine,
registry, bucket and VESSL's client were real. VESSL was a stub of its API, which runs each run as a container of the
pushed image, with two CPU ranks. A `…` stands for lines that are left out. Figures, hashes and addresses will be others
with you. In the environment were

    export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… S3_BUCKET_NAME=team   # and S3_ENDPOINT_URL, if not AWS
    export VESSL_ACCESS_TOKEN=… VESSL_DEFAULT_ORGANIZATION=… VESSL_DEFAULT_PROJECT=… REGISTRY_TOKEN=…
    export ONLY=1,2,3,devices,reward      # the dry runs of this day leave out what takes half a minute
"""


def page(transcript: str) -> str:
    """Markdown of a transcript."""
    out, shown, pattern, code = [HEAD], list[str](), ".", ""

    def close() -> None:
        nonlocal shown, pattern
        if not shown:
            return
        kept = [line if line.startswith("$ ") or re.search(pattern, line) else "…" for line in shown]
        lines = [line for line, before in zip(kept, ["", *kept], strict=False) if not line == before == "…"]
        lines += [f"(exit code {code})"] if code not in ("", "0") else []
        out.append("\n".join(f"    {line}".rstrip() for line in lines) + "\n")
        shown, pattern = [], "."

    for line in transcript.splitlines():
        kind, _, text = line.partition(" ")
        if kind in ("==", "--", "$"):
            close()
        if kind == "==":
            out.append(f"## {text}\n")
        elif kind == "--":
            out.append(f"{text}\n")
        elif kind == "$":
            shown, code = [f"$ {text}"], ""
        elif kind == "~":
            pattern = text
        elif kind == "|":
            shown.append(re.sub(r"/\S*/work/(?=wmtp/)", "…/", text))
        elif kind == "=":
            code = text
        else:
            raise SystemExit(f"not a line of a transcript: {line}")
    close()
    return "\n".join(out)


def shape(text: str) -> list[str]:
    """What stays of a page from day to day."""
    for pattern, instead in (
        (r"(?<![\w])(?:~|\.\.)?/[^\s'\";,·)]+", "p"),  # before the rest: a folder's name may hold anything
        (r"\b[0-9a-f]{7,64}\b", "h"),
        (r"\d+ min ", ""),
        (r"\(Invalid .*", "…"),  # a message that some lines cut
        (r"\d[\d.,]*", "#"),
        (r" +", " "),
    ):
        text = re.sub(pattern, instead, text)
    return [line for line, _ in groupby(text.splitlines())]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/day.py")
    parser.add_argument("transcript", type=Path)
    parser.add_argument("--check", type=Path, metavar="PAGE")
    args = parser.parse_args()
    fresh = page(args.transcript.read_text("utf-8"))
    if args.check is None:
        print(fresh, end="")
        return 0
    told = args.check.read_text("utf-8") if args.check.exists() else ""
    differs = list(difflib.unified_diff(shape(told), shape(fresh), str(args.check), "this day", lineterm="", n=1))
    print(*differs, sep="\n", end="\n" if differs else "", file=sys.stderr)
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
