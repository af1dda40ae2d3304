"""Do what the documents say: every command of their `console` blocks, in order; compare the shape of what it prints.

    scripts/docs.sh [--show] [FILE.md…]

In a block, a line that begins with `$ ` is a command, `> ` goes on with it, the lines below are its output. Numbers,
hashes and spaces may differ; a line of `…` stands for any lines, `…` at the end of a line for its rest. A command fails
only where its output shows `make: ***`. `export NAME=…` gets the value that this machine has. A block after
`<!-- cluster -->` is shown on real parts by `make test-image`, one after `<!-- not run: WHY -->` by nobody: both are
counted. After `<!-- new shell -->` nothing is exported any more, and there is no engine.
A command that was run before, in whichever file, is
not run again. All of it happens in a clone with a bucket of its own; `--show` prints the outputs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "README.ko.md", "docs/guide.md")
LIMIT_S = 600
BLOCK = re.compile(r"(?:<!-- (?P<mark>.+?) -->\n)?```console\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Command:
    text: str
    line: int
    mark: str = ""
    output: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        return any(line.startswith("make: ***") for line in self.output)


def commands_of(text: str) -> list[Command]:
    found: list[Command] = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("body"))
        for content in block["body"].splitlines():
            line += 1
            if content.startswith("$ "):
                found.append(Command(content[2:], line, block["mark"] or ""))
            elif content.startswith("> ") or content == ">":
                found[-1].text += "\n" + content[2:]
            else:
                found[-1].output.append(content)
    return found


def shape(line: str) -> str:
    """A line without what differs from run to run."""
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,64}\b", "h", line)
    line = re.sub(r"\d+(?:[.,]\d+)*", "0", line)
    line = re.sub(r"\b0 (?:h 0 min|min 0 s|min|ms)(?!\w)", "0 s", line)
    return re.sub(r"[ \t]+", " ", line).strip()


def lacking(shown: list[str], printed: list[str]) -> str | None:
    """The first shown line that is not in what was printed, where it should be; None where all are."""
    at, anywhere = 0, False
    have = [shape(line) for line in printed]
    for line in shown:
        wanted = shape(line)
        if wanted == "…":
            anywhere = True
            continue
        fits = [
            i for i in range(at, len(have))
            if have[i] == wanted or (wanted.endswith("…") and have[i].startswith(wanted[:-1].rstrip()))
        ]  # fmt: skip
        if not fits or (not anywhere and fits[0] != at):
            return line
        at, anywhere = fits[0] + 1, False
    return None if anywhere or at == len(have) else f"(the end; printed: {printed[at]!r})"


class Reader:
    """One shell's worth of state: a clone to work in, and what was exported."""

    def __init__(self, clone: Path) -> None:
        self.clone = clone
        hidden = ("AWS_", "S3_", "PIP_", "WMTP_", "VIRTUAL_ENV", "MAKE", "MFLAGS", "ENV", "ALGO", "RUN_", "PYTEST_")
        self.bucket = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "S3_"))}
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.env |= {"CI": "true", "PYTHONPATH": str(clone / "src"), "COLUMNS": "80"}
        self.fresh = self.env | {"DOCKER_HOST": "unix:///nowhere"}
        self.done: dict[str, tuple[int, list[str]]] = {}

    def export(self, text: str) -> None:
        for name, value in re.findall(r"(\w+)=(\S+)", text):
            self.env[name] = self.bucket.get(name, "0") if "…" in value else value

    def run(self, command: Command) -> tuple[int, list[str]]:
        if command.text not in self.done:
            done = subprocess.run(
                ["bash", "-c", command.text], cwd=self.clone, env=self.env, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
            )  # fmt: skip
            self.done[command.text] = done.returncode, done.stdout.replace(str(self.clone), ".").splitlines()
        return self.done[command.text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=[name for name in FILES if (ROOT / name).exists()])
    parser.add_argument("--show", action="store_true", help="print what each command printed")
    args = parser.parse_args()
    passed = failed = elsewhere = 0
    with tempfile.TemporaryDirectory(prefix="wmtp-docs-") as folder:
        clone = Path(folder) / "wmtp"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        (clone / ".venv").symlink_to(ROOT / ".venv")
        (clone / ".git/info/exclude").write_text(".venv\n")
        if "install.sh" in subprocess.run(["make", "-n", "install"], cwd=clone, capture_output=True, text=True).stdout:
            print(
                "docs      FAIL  .venv is not that of what is committed; next: git commit, make install",
                file=sys.stderr,
            )
            return 1
        reader = Reader(clone)
        for name in args.files:
            for command in commands_of((ROOT / name).read_text("utf-8")):
                if command.mark.startswith(("cluster", "not run")):
                    elsewhere += 1
                    continue
                if command.mark == "new shell":
                    reader.env = dict(reader.fresh)
                if command.text.startswith("export "):
                    reader.export(command.text)
                    continue
                began = time.monotonic()
                code, printed = reader.run(command)
                told = f"{name}:{command.line}  $ {command.text.splitlines()[0]}"
                missing = lacking(command.output, printed)
                if (code != 0) == command.fails and missing is None:
                    passed += 1
                    print(f"docs      ok    {told}, {time.monotonic() - began:.0f} s", file=sys.stderr)
                else:
                    failed += 1
                    why = f"ended with {code}" if (code != 0) != command.fails else f"does not print: {missing}"
                    print(f"docs      FAIL  {told}\n          {why}", file=sys.stderr)
                if args.show or missing is not None:
                    print("\n".join(f"    | {line}" for line in printed), file=sys.stderr)
    print(
        f"docs      {elsewhere} commands are shown on real parts elsewhere, or by nobody, as they say", file=sys.stderr
    )
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
