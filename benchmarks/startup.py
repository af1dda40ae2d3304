"""How many seconds of a node's start the trainer's own start hides: docker/vessl_startup.sh with and without overlap.

    scripts/bucket.sh run build/bench -- python benchmarks/startup.py [--pairs 5] [--rate 500000] [--megabytes 4]

A test model comes over a link of `rate` bytes a second (tests/fault_proxy.py), the data have so many megabytes of text;
baseline-mtp, two ranks. Told are the seconds from the script's start to the end of the first step. The two ways take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pairs import interleave, machine, ratio

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"ENV_MODE": "minitest", "WMTP_ALGO": "baseline-mtp", "LAUNCHER": "local", "RUN_NAME": "start"}
SETTINGS = (
    "paths.datasets.wmtp_code=file:///app/datasets/text data.eval.sources=[] train.max_steps=1 "
    "paths.checkpoints.save_interval=1 paths.checkpoints.base_path=file:///app/checkpoints "
    "paths.checkpoints.save_final=false"
)


def write_data(folder: Path, megabytes: float) -> None:
    lines = (ROOT / "datasets/wmtp_code").glob("*.jsonl")
    texts = [line for file in sorted(lines) for line in file.read_text().splitlines()]
    folder.mkdir(parents=True)
    with (folder / "text.jsonl").open("w") as out:
        written = number = 0
        while written < megabytes * 1e6:
            record = json.loads(texts[number % len(texts)])
            record["prompt"] = f"{number}: {record.get('prompt') or record.get('text')}"
            written += out.write(json.dumps(record) + "\n")
            number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rate", type=int, default=500_000)
    parser.add_argument("--megabytes", type=float, default=4)
    arguments = parser.parse_args()
    print(f"# Start with and without overlap: {machine()}\n")
    subprocess.run([sys.executable, ROOT / "tests/test_models/generate.py"], check=True, capture_output=True)
    publish = [ROOT / "scripts/publish_models.sh", "--force", "--from", ROOT / "tests/test_models", "test-llama-mtp"]
    subprocess.run(publish, check=True, capture_output=True)
    with tempfile.TemporaryDirectory(prefix="wmtp-start-") as work:
        proxy_command = [sys.executable, ROOT / "tests/fault_proxy.py", "--to", os.environ["S3_ENDPOINT_URL"]]
        proxy = subprocess.Popen([*proxy_command, f"rate:bytes={arguments.rate}"], stdout=subprocess.PIPE, text=True)
        assert proxy.stdout
        app, url = Path(work, "app"), proxy.stdout.readline().strip()
        write_data(Path(work, "text"), arguments.megabytes)
        phases: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
        first: dict[str, list[float]] = {"with": [], "without": []}

        def start(way: str) -> None:
            shutil.rmtree(app, ignore_errors=True)
            (app / "datasets").mkdir(parents=True)
            (app / "datasets/text").symlink_to(Path(work, "text"))
            environment = {**os.environ, **ENVIRONMENT, "WMTP_APP_ROOT": str(app), "S3_ENDPOINT_URL": url}
            environment |= {"WMTP_CACHE_DIR": f"{work}/none", "SET": SETTINGS, "OMP_NUM_THREADS": "1"}
            environment["WMTP_EARLY_S"] = "3" if way == "with" else "100000"
            began = time.time()
            done = subprocess.run(
                [ROOT / "docker/vessl_startup.sh"], env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
            records = map(json.loads, (app / "logs/start/phases.jsonl").read_text().splitlines())
            spans = {record["phase"]: record for record in records}
            first[way].append(spans["first step"]["ended"] - began)
            phases[way].append({name: span["ended"] - span["began"] for name, span in spans.items()})

        interleave({way: lambda way=way: start(way) for way in first}, arguments.pairs)
        proxy.kill()
    told = ["sync", "vocabularies", "imports", "ranks", "data", "models", "load", "first step"]
    print("| way | start to first step, s | " + " | ".join(told) + " |")
    print("| --- |" + " --- |" * (len(told) + 1))
    for way, seconds in first.items():
        row = [statistics.median(p.get(name, 0.0) for p in phases[way][1:]) for name in told]
        print(f"| {way} overlap | {statistics.median(seconds[1:]):.1f} | " + " | ".join(f"{s:.1f}" for s in row) + " |")
    hidden = statistics.median(b - a for a, b in zip(first["with"][1:], first["without"][1:], strict=True))
    middle, low, high = ratio(first["with"][1:], first["without"][1:])
    print(f"\nHidden: {hidden:.1f} s (median of the pairs); with / without {middle:.3f} ({low:.3f} to {high:.3f}).")


if __name__ == "__main__":
    main()
