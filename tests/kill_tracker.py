"""A training that only records, killed with SIGKILL again and again; its mirrored record is looked at after each kill.

    scripts/bucket.sh run build/test/bucket -- python tests/kill_tracker.py [--kills 10] [--seed 1] [--prefix s3://…]

Each time: the bucket's record must be a store that SQLite finds whole, with every step up to the marker's, no fewer
than those of the mirror before, and be of one run. The next start is on another node, every second time. Ends with 1 at
the first that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from wmtp.config import Storage
from wmtp.mirror import RECORD
from wmtp.mlstore import StoreMirror
from wmtp.remote import Remote

STORAGE = Storage(retries=2, retry_wait_s=1, stall_s=5)
STEP_S = 0.02


def train(prefix: str, app: Path) -> None:
    """Log a step each 20 ms, from where the last one ended: `steps.jsonl` is what a checkpoint would know."""
    from wmtp.record import StepRecord
    from wmtp.tracking import Tracker

    steps = app / "steps.jsonl"
    told = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    step = told[-1]["step"] if told else 0
    record = StepRecord(steps, step)
    tracker = Tracker(
        prefix, "wmtp/kill", "run", {}, {"a": 1}, app / "here" / "mlflow.json", None, STORAGE,
        replay=[(line["step"], {"wmtp_loss": line["wmtp_loss"]}) for line in told],
    )  # fmt: skip
    print("begun", flush=True)
    threading.Thread(target=lambda: print(tracker.run_id, flush=True), daemon=True).start()
    while True:
        step += 1
        record.add(step, {"wmtp_loss": 1.0 / step})
        tracker.log(step, {"wmtp_loss": 1.0 / step})
        if step % 50 == 0:
            plot = app / "plot.svg"
            plot.write_text(f"<svg>{step}</svg>")
            tracker.artifact(plot)
        time.sleep(STEP_S)


def look(prefix: str, at: Path) -> dict[str, Any] | None:
    """The marker, where there is one and its store holds what it says. Raises AssertionError."""
    mirror = StoreMirror(at, f"{prefix}/run", STORAGE, lambda: None)
    if not mirror.pull():
        return None
    marker: dict[str, Any] = json.loads(
        Remote(mirror.remote.prefix, STORAGE).s5cmd("cat", f"{mirror.remote.prefix}/{RECORD}")
    )
    database, run_id = mirror.pulled
    with sqlite3.connect(database) as store:
        assert store.execute("pragma integrity_check").fetchone() == ("ok",)
        assert store.execute("select count(*) from runs").fetchone() == (1,)
        query = "select step from metrics where run_uuid = ? and key = 'wmtp_loss' order by step"
        steps = [row[0] for row in store.execute(query, [run_id])]
    assert steps == list(range(1, marker["step"] + 1)), f"{len(steps)} steps, the marker says {marker['step']}"
    for name, size in marker["artifacts"].items():
        assert (at / name).stat().st_size >= size > 0
    return marker


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prefix", default=f"s3://{os.environ['S3_BUCKET_NAME']}/kill-{uuid.uuid4().hex}")
    parser.add_argument("--train", type=Path)
    args = parser.parse_args()
    if args.train:
        train(args.prefix, args.train)
    draw, before, looked = random.Random(args.seed), {"step": 0, "run_id": None}, 0
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder)
        for kill in range(1, args.kills + 1):
            command = [sys.executable, __file__, "--prefix", args.prefix, "--train", str(app)]
            child = subprocess.Popen(
                command, env={**os.environ, "WMTP_MIRROR_S": "0.2"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert child.stdout and child.stdout.readline()
            if kill == 1 or draw.random() < 0.7:  # else it is killed while it begins
                child.stdout.readline()
            time.sleep(draw.uniform(0.5, 4))
            child.kill()
            child.wait()
            marker = look(args.prefix, app / "pulled")
            if marker is not None:
                looked += 1
                assert marker["step"] >= before["step"], (marker["step"], before["step"])
                assert before["run_id"] in (None, marker["run_id"]), "another run"
                before = marker
            if kill % 2 == 0:
                shutil.rmtree(app / "here", ignore_errors=True)
            print(f"kill {kill} of {args.kills}: the record holds {before['step']} steps", flush=True)
    assert looked
    return 0


if __name__ == "__main__":
    sys.exit(main())
