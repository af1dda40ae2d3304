"""What an outage of the bucket, and of an MLflow server, costs a training that goes on: times of its steps.

    scripts/bucket.sh run build/bench -- python benchmarks/outage.py [--steps 120] [--rounds 3]

Two gloo ranks train a test model; every tenth step a checkpoint goes to the bucket, record and MLflow store are
mirrored every 2 s (30 is usual). For the middle third of the steps the bucket is away: half of the time it hangs
(SIGSTOP of a proxy in front of it), then it refuses. In the second run an MLflow server is killed and started again, in
the third nothing is away. The ratio is the middle third's median step over that of the other two. At the end everything
must be there: in the bucket the last checkpoint with its marker, and each step in the record and in MLflow's store; on
the server each step in order.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from runs import Run, free_port

from wmtp import mlstore
from wmtp.config import Storage
from wmtp.remote import Remote

SETS = (
    "log_interval=1", "paths.checkpoints.save_interval=10", "paths.checkpoints.save_final=false",
    "paths.checkpoints.keep_last=2", "data.train.max_length=64", "storage.retry_wait_s=2",
)  # fmt: skip


def listening(command: list[str]) -> subprocess.Popen[str]:
    """A server that says its address when it listens."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline().startswith("http")
    return server


def named(app: Path, name: str, *sets: str) -> Run:
    """A run whose record is kept, as a node keeps it."""
    return Run(app, "baseline-mtp", name, *sets, arguments=("--exit-file", str(app / "logs" / name / "exit.json")))


def trained(run: Run, steps: int, server: list[str], hang: bool) -> float:
    """Train with ``server`` away for the middle third; the ratio of its step times."""
    process = listening(server)
    run.start()
    run.until(f"Step {steps // 3}/", seconds=300)
    if hang:
        process.send_signal(signal.SIGSTOP)
        run.until(f"Step {steps // 2}/", seconds=300)
    process.kill()
    process.wait()
    run.until(f"Step {2 * steps // 3}/", seconds=300)
    process = listening(server)
    code = run.wait(300)
    process.kill()
    assert code == 0, run.log()[-3000:]
    lines = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    times = [line["step_seconds"] for line in lines]
    middle, others = times[steps // 3 : 2 * steps // 3], [*times[3 : steps // 3], *times[2 * steps // 3 :]]
    return statistics.median(middle) / statistics.median(others)


def stored(database: Path, steps: int) -> None:
    with sqlite3.connect(database) as store:
        query = "select step from metrics where key = 'wmtp_loss' order by step"
        assert [row[0] for row in store.execute(query)] == list(range(1, steps + 1)), database


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    behind, bucket = os.environ["S3_ENDPOINT_URL"], os.environ["S3_BUCKET_NAME"]
    port, mlflow_port = free_port(), free_port()
    os.environ |= {"WMTP_MIRROR_S": "2", "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    proxy = [sys.executable, str(ROOT / "tests/fault_proxy.py"), "--to", behind, "--port", str(port)]
    ratios: dict[str, list[float]] = {"bucket": [], "server": [], "nothing": []}
    with tempfile.TemporaryDirectory(prefix="wmtp-outage-") as folder:
        app = Path(folder)
        generate = [sys.executable, str(ROOT / "tests/test_models/generate.py"), "--out", str(app / "models")]
        subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
        (app / "datasets").symlink_to(ROOT / "datasets")
        sets = [*SETS, f"train.max_steps={args.steps}"]
        for turn in range(args.rounds):
            prefix = f"s3://{bucket}/outage-{os.getpid()}-{turn}"
            run = named(app, f"bucket-{turn}", *sets, f"paths.checkpoints.base_path={prefix}/checkpoints",
                f"mlflow.tracking_uri={prefix}/mlruns")  # fmt: skip
            run.folder = app / "checkpoints" / run.run
            ratios["bucket"].append(trained(run, args.steps, proxy, hang=True))
            os.environ["S3_ENDPOINT_URL"] = behind
            remote = Remote(f"{prefix}/checkpoints/{run.run}", Storage())
            remote.s5cmd("cat", f"{remote.prefix}/step-{args.steps}/.complete")
            told = remote.s5cmd("cat", f"{remote.prefix}/record/steps.jsonl").splitlines()
            assert [json.loads(line)["step"] for line in told] == list(range(1, args.steps + 1))
            merged = app / f"merged-{turn}"
            mlstore.gather(f"{prefix}/mlruns", merged, Storage())
            stored(merged / "mlflow.db", args.steps)
            os.environ["S3_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            at = app / f"server-{turn}"
            server = [sys.executable, str(ROOT / "tests/mlflow_server.py"), str(at), str(mlflow_port)]
            run = named(app, at.name, *sets, f"mlflow.tracking_uri=http://127.0.0.1:{mlflow_port}")
            ratios["server"].append(trained(run, args.steps, server, hang=False))
            stored(at / "mlflow.db", args.steps)
            run = named(app, f"nothing-{turn}", *sets)
            ratios["nothing"].append(trained(run, args.steps, ["sh", "-c", "echo http; exec sleep 9999"], hang=False))
    for what, values in ratios.items():
        each = " ".join(f"{value:.3f}" for value in sorted(values))
        print(f"{what} away: middle third / the others {statistics.median(values):.3f} ({each})")


if __name__ == "__main__":
    main()
