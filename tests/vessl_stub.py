"""A stub of the part of VESSL's API that the client's `run`, `cluster` and `resource` commands use, on loopback.

    python tests/vessl_stub.py DIR       prints its address, runs until it is killed

It answers what the real service was seen to answer (the real client crashes without these fields). DIR holds what a
test looks at and sets: `runs/<id>.json`, the YAML that arrived (`runs/<id>.yaml`), `requests.log` (method and path a
line), `token` (the one that is accepted, default `stub-token`), and `faults`, read anew at each request:

    401 404 500          every answer is that               500-after-create   the run is there, its first GET says 500
    slow                 every answer takes 40 s            drop-after-create  the run is there, the connection is cut
    no-cluster           no cluster is listed               fails-initializing the run fails before it runs
    logs-stop            after two lines nothing comes      preempted          the run is killed in the middle
    hold-before-create   the run is there 8 s after it was asked for
    forget               a created run is never listed      hold-after-create  the run is there, its answer takes 40 s

A run moves on by being asked after: pending, initializing, running, completed; its log grows meanwhile.

Where DIR holds a file `nodes` with the address of a bucket, a run is a container of its image on this machine's
engine, a node each, and moves on by itself. The secrets of its run file have the values of the stub's own environment.
`preempted` takes one node away, after its tenth step and its first checkpoint in the bucket.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

CLUSTER, PRESET = "vessl-kr-a100-80g-sxm", "gpu-a100-80g-large"
LIVE = ("pending", "initializing", "running", "stopping", "idle")
TAKEN_AFTER = (r"Step \d\d+/", r"bucket +step-\d+ is in (?!\S*/pretrain)")
LOG = (
    "startup   credentials: yes; /app, 412.0 GB free",
    "sync      Download test-llama-mtp: 9.1 MB",
    "sync      done in 2 s",
    *(f"Step {step}/12  wmtp_loss {10.4 - step / 40:.3f}  2140 tok/s" for step in range(1, 13)),
    "startup   training ok: 31 s",
)


def docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(("docker", *words), capture_output=True, text=True, check=False)


class Stub:
    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def has(self, fault: str) -> bool:
        file = self.folder / "faults"
        return file.is_file() and fault in file.read_text().split()

    def unplant(self, fault: str) -> None:
        file = self.folder / "faults"
        file.write_text("\n".join(one for one in file.read_text().split() if one != fault))

    def token(self) -> str:
        file = self.folder / "token"
        return file.read_text().strip() if file.is_file() else "stub-token"

    def runs(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "runs").glob("*.json"), key=lambda f: -int(f.stem))
        return [json.loads(file.read_text()) for file in files]

    def save(self, run: dict[str, Any]) -> None:
        file = self.folder / "runs" / f"{run['id']}.json"
        half = file.with_suffix(".tmp")
        half.write_text(json.dumps(run))
        half.replace(file)

    @property
    def nodes(self) -> bool:
        return (self.folder / "nodes").is_file()

    def node(self, number: int) -> str:
        """The container of a run, named after this stub, so that two stubs may share an engine."""
        return f"vessl-stub-{os.getpid()}-{number}"

    def start_node(self, number: int, spec: dict[str, Any]) -> str:
        """Starts the run as the service does; empty, or why it can't be."""
        words = ["run", "-d", "--name", self.node(number), "--network", "host", "--shm-size", "1g"]
        for name, value in spec["env"].items():
            words += ["-e", f"{name}={value}" if isinstance(value, str) else name]  # a secret: of this environment
        # A bucket of this machine is no address for a run file; the nodes have it all the same.
        words += ["-e", f"S3_ENDPOINT_URL={(self.folder / 'nodes').read_text().strip()}"]
        words += ["-w", spec["run"][0]["workdir"]]
        ended = docker(*words, spec["image"], "sh", "-c", spec["run"][0]["command"])
        return ended.stderr.strip() if ended.returncode else ""

    def lines(self, number: int) -> tuple[str, ...]:
        words, pipe = ("docker", "logs", self.node(number)), subprocess.PIPE
        ended = subprocess.run(words, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False)
        return tuple(ended.stdout.splitlines())

    def node_moved(self, run: dict[str, Any]) -> dict[str, Any]:
        if run["status"] in ("pending", "initializing", "running"):
            node = self.node(run["id"])
            said = "\n".join(self.lines(run["id"]))
            if self.has("preempted") and all(re.search(line, said) for line in TAKEN_AFTER):
                docker("kill", node)
                self.unplant("preempted")  # one node, not each that comes after it
                run |= {"status": "failed", "status_reason": "Preempted"}
            else:
                state = docker("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", node).stdout.split()
                run["status"] = {"running 0": "running", "exited 0": "completed"}.get(" ".join(state), "failed")
            self.save(run)
        return run

    def create(self, text: str) -> int:
        spec = YAML(typ="safe").load(text)
        number = 1 + max((run["id"] for run in self.runs()), default=6)
        failed = self.start_node(number, spec) if self.nodes else ""
        (self.folder / "runs" / f"{number}.yaml").write_text(text)
        preset = {
            "name": spec["resources"]["preset"],
            "cpu_type": "Any",
            "cpu_limit": 48,
            "memory_limit": "400Gi",
            "gpu_type": "A100",
            "gpu_limit": 4,
        }
        self.save(
            {
                "id": number,
                "status": "failed" if failed else "pending",
                "status_reason": failed,
                "message": spec.get("description", ""),
                "create_dt": datetime.now(UTC).isoformat(),
                "asked": 0,
                "run_spec": {
                    "title": spec["name"],
                    "type": "batch",
                    "description": spec.get("description", ""),
                    "cluster": {"name": spec["resources"]["cluster"]},
                    "kernel_resource_spec_from_preset": preset,
                    "kernel_image": {"name": spec["image"], "image_url": spec["image"]},
                    "spec": {
                        "command": [{"command": c["command"], "workdir": c.get("workdir", "")} for c in spec["run"]],
                        "ports": [],
                        "env_vars": [],
                        "service_account_name": "",
                        "termination_protection": False,
                    },
                },
            }
        )
        return number

    def moved(self, run: dict[str, Any]) -> dict[str, Any]:
        """The run, one question later."""
        run["asked"] += 1
        if self.nodes:
            return self.node_moved(run)
        if run["status"] == "pending":
            run["status"] = "initializing"
        elif run["status"] == "initializing" and self.has("fails-initializing"):
            run |= {"status": "failed", "status_reason": "ImagePullBackOff: the image can't be pulled"}
        elif run["status"] == "initializing":
            run["status"] = "running"
        elif run["status"] == "running" and self.has("preempted"):
            run |= {"status": "failed", "status_reason": "Preempted"}
        elif run["status"] == "running" and not self.has("logs-stop") and run["asked"] > 6:
            run["status"] = "completed"
        self.save(run)
        return run

    def log(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        kept = self.folder / "runs" / f"{run['id']}.log"
        if self.nodes:
            lines = self.lines(run["id"])
        elif kept.is_file():
            lines = tuple(kept.read_text().splitlines())
        elif run["status"] in ("pending", "initializing"):
            lines = ()
        elif self.has("logs-stop"):
            lines = LOG[:2]
        else:
            lines = LOG if run["status"] == "completed" else LOG[: 8 * max(run["asked"] - 2, 0)]
        began = datetime.fromisoformat(run["create_dt"]).timestamp()
        return [{"timestamp": began + i, "message": line} for i, line in enumerate(lines)]


def handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, code: int, body: Any) -> None:
            raw = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.serve("GET", {})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.serve("POST", json.loads(raw) if raw else {})

        def serve(self, method: str, body: dict[str, Any]) -> None:
            path, _, query = self.path.partition("?")
            with stub.lock, (stub.folder / "requests.log").open("a") as log:
                log.write(f"{method} {path}\n")
            if stub.has("slow"):
                time.sleep(40)
            for code in (401, 404, 500):
                if stub.has(str(code)):
                    return self.answer(code, {"message": f"fault {code}"})
            if self.headers.get("Authorization") != f"Token {stub.token()}":
                return self.answer(401, {"message": "Invalid token"})
            with stub.lock:
                self.route(method, path.removeprefix("/api/v1"), query, body)

        def route(self, method: str, path: str, query: str, body: dict[str, Any]) -> None:
            if path == "/accounts/me":
                return self.answer(200, {})
            if found := re.fullmatch(r"/organizations/([^/]+)", path):
                return self.answer(200, {"name": found[1]})
            if re.fullmatch(r"/organizations/[^/]+/projects", path):
                return self.answer(200, {"results": [{"name": "wmtp"}]})
            if re.fullmatch(r"/organizations/[^/]+/clusters", path):
                one = {
                    "id": 1,
                    "name": CLUSTER,
                    "status": "connected",
                    "is_savvihub_managed": True,
                    "kubernetes_namespace": "",
                }
                return self.answer(200, {"clusters": [] if stub.has("no-cluster") else [one]})
            if re.fullmatch(r"/organizations/[^/]+/clusters/\d+/resource_specs", path):
                one = {"id": 1, "name": PRESET, "cpu_type": "Any", "cpu_limit": 48, "memory_limit": "400Gi"}
                one |= {"gpu_type": "A100", "gpu_limit": 4, "spot": False}
                other = one | {"id": 2, "name": "cpu-large", "gpu_type": "", "gpu_limit": 0}
                return self.answer(200, {"results": [one, other]})
            if path.endswith("/run/spec/create_from_yaml") and method == "POST":
                if stub.has("hold-before-create"):
                    stub.lock.release()
                    time.sleep(8)
                    stub.lock.acquire()
                number = stub.create(body["yaml_spec"])
                if stub.has("hold-after-create"):
                    stub.lock.release()
                    time.sleep(40)
                    stub.lock.acquire()
                if stub.has("drop-after-create"):
                    self.close_connection = True
                    return None
                return self.answer(200, {"run_execution": {"id": number}})
            if path.endswith("/run_executions"):
                return self.answer(200, {"results": [] if stub.has("forget") else stub.runs()})
            if found := re.search(r"/run_executions/(\d+)(/logs|/terminate)?$", path):
                run = next((r for r in stub.runs() if r["id"] == int(found[1])), None)
                if run is None:
                    return self.answer(404, {"message": "no such run"})
                if found[2] == "/logs":
                    lines, limit = stub.log(run), re.search(r"log_limit=(\d+)", query)
                    return self.answer(200, {"logs": lines[-int(limit[1]) :] if limit else lines})
                if found[2] == "/terminate":
                    if stub.nodes:
                        docker("stop", "-t", "60", stub.node(run["id"]))
                    run["status"] = "terminated" if run["status"] in LIVE else run["status"]
                    stub.save(run)
                    return self.answer(200, run)
                if stub.has("500-after-create") and run["asked"] == 0:
                    run["asked"] = 1
                    stub.save(run)
                    return self.answer(500, {"message": "fault 500"})
                return self.answer(200, stub.moved(run))
            return self.answer(404, {"message": f"no such path: {path}"})

    return Handler


def main() -> None:
    folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(Stub(folder)))
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
