"""The requests that a tracker makes of an MLflow server, answered from MLflow's own store.

    python tests/mlflow_server.py FOLDER [PORT]

The server itself is in the whole MLflow only, which training does without; store, messages and their JSON are its own.
Prints its address once it listens, and dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from mlflow.entities import ExperimentTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos import service_pb2 as messages
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.proto_json_utils import message_to_json, parse_dict


def answers(store: SqlAlchemyStore) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """The message and its answer, by the last words of the path."""

    def by_name(asked: Any) -> Any:
        found = store.get_experiment_by_name(asked.experiment_name)
        if found is None:
            raise MlflowException("no such experiment", error_code=RESOURCE_DOES_NOT_EXIST)
        return messages.GetExperimentByName.Response(experiment=found.to_proto())

    def create_experiment(asked: Any) -> Any:
        tags = [ExperimentTag(t.key, t.value) for t in asked.tags]
        made = store.create_experiment(asked.name, asked.artifact_location or None, tags)
        return messages.CreateExperiment.Response(experiment_id=made)

    def create_run(asked: Any) -> Any:
        tags = [RunTag(t.key, t.value) for t in asked.tags]
        run = store.create_run(asked.experiment_id, asked.user_id, asked.start_time, tags, asked.run_name)
        return messages.CreateRun.Response(run=run.to_proto())

    def update_run(asked: Any) -> Any:
        given = [getattr(asked, name) if asked.HasField(name) else None for name in ("status", "end_time", "run_name")]
        return messages.UpdateRun.Response(run_info=store.update_run_info(asked.run_id, *given).to_proto())

    def log_batch(asked: Any) -> Any:
        store.log_batch(
            asked.run_id,
            [Metric.from_proto(m) for m in asked.metrics],
            [Param.from_proto(p) for p in asked.params],
            [RunTag.from_proto(t) for t in asked.tags],
        )
        return messages.LogBatch.Response()

    def history(asked: Any) -> Any:
        found = store.get_metric_history(asked.run_id, asked.metric_key)
        return messages.GetMetricHistory.Response(metrics=[m.to_proto() for m in found])

    return {
        "experiments/get-by-name": (messages.GetExperimentByName, by_name),
        "experiments/create": (messages.CreateExperiment, create_experiment),
        "runs/create": (messages.CreateRun, create_run),
        "runs/update": (messages.UpdateRun, update_run),
        "runs/get": (messages.GetRun, lambda a: messages.GetRun.Response(run=store.get_run(a.run_id).to_proto())),
        "runs/log-batch": (messages.LogBatch, log_batch),
        "metrics/get-history": (messages.GetMetricHistory, history),
    }


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    known = answers(SqlAlchemyStore(f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, given: Any) -> None:
            path = urlsplit(self.path).path.removeprefix("/api/2.0/mlflow/")
            with (folder / "requests").open("a") as file:
                file.write(f"{path}\n")
            try:
                kind, call = known[path]
                asked = kind()
                parse_dict(given, asked)
                status, body = 200, message_to_json(call(asked))
            except KeyError:
                status, body = 404, json.dumps({"error_code": "ENDPOINT_NOT_FOUND", "message": path})
            except MlflowException as error:
                status, body = error.get_http_status_code(), error.serialize_as_json()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            self.answer(dict(parse_qsl(urlsplit(self.path).query)))

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
