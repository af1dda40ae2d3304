"""Breaks features one at a time and demands that `make acceptance` sees it: their rows turn red, and were not before.

    python tests/break_acceptance.py [--seed 1] [--count 5]

Works in a throw-away clone of what is committed here, with this checkout's environments. The breakages are drawn from
BREAKAGES; rows that need a container engine are left to scripts/test_image.sh.
Standard output: a line a breakage, then `N passed, N failed`. Exit codes: 0 all seen, 1 not.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Breakage(NamedTuple):
    """``pattern`` in ``file`` becomes ``by`` at its last place; without a pattern the file may not be executed."""

    what: str
    file: str
    pattern: str
    by: str
    rows: tuple[str, ...]


BREAKAGES = (
    Breakage("no WORKDIR", "Dockerfile", r"^WORKDIR /app\n", "", ("P1.1", "S1.1", "R.1")),
    Breakage("the old work folder", "Dockerfile", r"^WORKDIR /app$", "WORKDIR /workspace", ("P1.1", "P1.5", "R.1")),
    Breakage("a folder less", "Dockerfile", r" /app/mlruns ", " ", ("P1.2", "S1.1")),
    Breakage("folders that all may write", "Dockerfile", r"install -d -m 755", "install -d -m 777", ("P1.2", "S1.1")),
    Breakage("startup can't be executed", "docker/vessl_startup.sh", "", "", ("P2.2", "S1.2")),
    Breakage("dry run can't be executed", "scripts/test_vessl_config.sh", "", "", ("S1.2", "P3.1")),
    Breakage(
        "paths are changed",
        "src/wmtp/paths.py",
        r"return kind, self\._moved\(path\)",
        'return kind, path + "/"',
        ("P1.4",),
    ),
    Breakage("a trainer less", "src/wmtp/registry.py", r'^ +"rho1-wmtp": .*\n', "", ("P3.3",)),
    Breakage(
        "a loader that is nowhere", "src/wmtp/registry.py", r"weights:load_model", "weights:load_models", ("P3.3",)
    ),
    Breakage(
        "a path outside /app",
        "configs/config.vessl.yaml",
        r"file:///app/models/llama",
        "file:///data/llama",
        ("P3.2", "R.1"),
    ),
    Breakage(
        "an unknown algorithm", "configs/recipe.critic_wmtp.yaml", r"algo: critic-wmtp", "algo: critic", ("P3.1",)
    ),
    Breakage("gloo in production", "configs/config.vessl.yaml", r"backend: nccl", "backend: gloo", ("P3.4",)),
    Breakage(
        "a mini-test without FSDP",
        "configs/config.vessl_minitest.yaml",
        r"(?<=fsdp:\n)(.*\n)( +)enabled: true",
        r"\1\2enabled: false",
        ("P3.6",),
    ),
    Breakage("a sample less", "datasets/mbpp_tiny/problems.jsonl", r"^\{.*\}\n", "", ("P3.7",)),
    Breakage("too much kept in memory", "configs/config.vessl.yaml", r"ckpt: selective", "ckpt: false", ("PR.3",)),
    Breakage(
        "a size that is not compared", "src/wmtp/vocab.py", r"if one\.size != expected:", "if False:", ("P2.4", "PR.2")
    ),
    Breakage(
        "another size in the models", "tests/test_models/generate.py", r"= 32000, 64", "= 32064, 64", ("P2.4", "PR.2")
    ),
    Breakage(
        "content is not proved", "src/wmtp/manifest.py", r"if right and \(found", "if not right and (found", ("P2.8",)
    ),
    Breakage("one try only", "scripts/lib/transfer.bash", r"try <= RETRIES; try\+\+", "try <= 1; try++", ("P2.6",)),
    Breakage(
        "a cache that never hits",
        "scripts/lib/place.bash",
        r"^in_store\(\) \{\n",
        "in_store() {\n  return 1\n",
        ("P4.1",),
    ),
    Breakage(
        "a script that does not start",
        "docker/vessl.yaml",
        r"exec bash /app/docker/vessl_startup\.sh",
        "echo ready",
        ("P2.5",),
    ),
    Breakage(
        "latest instead of a digest",
        "docker/vessl.yaml",
        r"^image: .*$",
        "image: ghcr.io/wooshikwon/wmtp:latest",
        ("P2.5",),
    ),
    Breakage(
        "a volume that is not mounted",
        "docker/vessl.yaml",
        r"^  /cache/models: .*$",
        "  /cache/model: ${VOLUME}",
        ("P4.3",),
    ),
    Breakage(
        "a run a press",
        "scripts/lib/create.bash",
        r"  NUMBER=\$\(live_of \"\$known\"\)\n",
        "  known='' NUMBER=''\n",
        ("S3.0",),
    ),
    Breakage("a push that is not told", "scripts/push.sh", r"  act docker push", "  true docker push", ("S4.0",)),
    Breakage("a test that syncs", "docker/vessl_startup.sh", r"test: no sync", "sync: nothing", ("P2.7",)),
    Breakage(
        "no checkpoint in the bucket",
        "configs/config.local_minitest.yaml",
        r"base_path: .*$",
        "base_path: file:///app/test_checkpoints",
        ("MT.6", "PR.4"),
    ),
    Breakage(
        "a tracker that is silent",
        "src/wmtp/tracking.py",
        r"self\._inbox\.put\(\(step, .*$",
        "pass",
        ("MT.5", "PR.5", "R.5"),
    ),
    Breakage(
        "whole models on each rank",
        "configs/config.local_minitest.yaml",
        r"sharding: full_shard",
        "sharding: no_shard",
        ("MT.3",),
    ),
    Breakage("steps that are not told", "src/wmtp/pace.py", r'say\(f"Step ', 'say(f"step ', ("S4.6",)),
    Breakage("a page without GPUs", "src/wmtp/monitor.py", r'"\[GPU Utilization\]"', '"[GPUs]"', ("P4.4",)),
    Breakage(
        "a report without the plan's", "src/wmtp/report.py", r"^ +Section\(\"The plan's completion .*\n", "", ("R.7",)
    ),
)


def broken(text: str, breakage: Breakage) -> str:
    """The text with the last match replaced. Raises ValueError where there is none: the breakage is out of date."""
    found = list(re.finditer(breakage.pattern, text, re.M))
    if not found:
        raise ValueError(f"{breakage.what}: {breakage.file} has no {breakage.pattern!r}")
    last = found[-1]
    return text[: last.start()] + last.expand(breakage.by) + text[last.end() :]


def states(tree: Path, rows: tuple[str, ...]) -> dict[str, str]:
    """Each row's state, by a `make acceptance` of these rows alone."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", "WMTP_ACCEPTANCE")
    }
    command = ["make", "acceptance", f"ONLY={','.join(rows)}", "ENGINE=0"]
    done = subprocess.run(command, cwd=tree, env=clean, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = dict(re.findall(r"^\| (\w+\.\d+) +\| (ok|FAIL|cluster|not checked) ", done.stdout, re.M))
    if set(found) != set(rows):
        print(done.stderr[-2000:], file=sys.stderr)
    return {row: found.get(row, "no row") for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5)
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed).sample(BREAKAGES, min(arguments.count, len(BREAKAGES)))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="wmtp-break.") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "clone", "-q", ROOT, tree], check=True)
        for environment in (".venv", ".venv-vessl"):
            if (ROOT / environment).is_dir():
                (tree / environment).symlink_to(ROOT / environment)
        rows = tuple(sorted({row for breakage in drawn for row in breakage.rows}))
        print(
            f"break     seed {arguments.seed}: {len(drawn)} of {len(BREAKAGES)}; first unbroken: {' '.join(rows)}",
            file=sys.stderr,
        )
        bad = {row: state for row, state in states(tree, rows).items() if state not in ("ok", "cluster")}
        print(f"{'ok  ' if not bad else 'FAIL'} unbroken: {bad or 'no row is red'}", flush=True)
        failed += bool(bad)
        for breakage in drawn:
            began, file = time.monotonic(), tree / breakage.file
            if breakage.pattern:
                file.write_text(broken(file.read_text("utf-8"), breakage), "utf-8")
            else:
                file.chmod(0o644)
            found = states(tree, breakage.rows)
            seen = all(state == "FAIL" for state in found.values())
            told = ", ".join(f"{row} {state}" for row, state in found.items())
            print(f"{'ok  ' if seen else 'FAIL'} {breakage.what}: {told}; {time.monotonic() - began:.0f} s", flush=True)
            failed += not seen
            subprocess.run(["git", "checkout", "-q", "-f", "."], cwd=tree, check=True)
    print(f"{len(drawn) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
