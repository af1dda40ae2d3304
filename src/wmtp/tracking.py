"""MLflow, kept at arm's length: what it can't do never stops a training.

All of MLflow (its import included) lives in one thread of rank 0. The trainer only ever puts
values into a queue, so a slow or dead server costs it nothing; what failed is told once, counted,
and tried again until `finish`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

STATUSES = ("FINISHED", "FAILED", "KILLED")
POINTS_PER_BATCH = 1000  # MLflow's own limit of one log_batch
POINTS_KEPT = 50_000  # during an outage; the oldest go first
START_WAIT_S = 60.0  # the first database takes about 3 s
FINISH_WAIT_S = 30.0  # torchrun gives its workers about as much after SIGTERM
RETRY_WAIT_S = 5.0


def backend(tracking_uri: str, record: Path) -> tuple[str, str | None, Path | None]:
    """The URI that MLflow can use, where artifacts go (None: the server knows), the local folder.

    A folder (`file:///d` or a plain path) becomes `d/mlflow.db` with `d/artifacts`. MLflow can't
    track into `s3://`: such a record is kept under `record`, for the caller to upload.
    """
    scheme = urlsplit(tracking_uri).scheme
    if scheme in ("file", "", "s3"):
        folder = record
        if scheme == "file":
            folder = Path(unquote(tracking_uri.removeprefix("file://")))
        elif not scheme:
            folder = Path(tracking_uri)
        folder = folder.absolute()
        return f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri(), folder
    return tracking_uri, None, None


@dataclass(frozen=True)
class _Point:
    key: str
    value: float
    time_ms: int
    step: int


class Tracker:
    """One run's record. Does nothing on ranks other than 0 (environment variable `RANK`)."""

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        state_file: Path,
        resumed: str | None = None,
    ) -> None:
        """``resumed``: the run that the checkpoint names, where ``state_file`` is not here (another node)."""
        self.failures = 0
        """Calls to MLflow that failed, whether or not a later one made up for it."""
        self.lost = 0
        """Points and artifacts that are not in the record."""
        self._uri, self._artifacts, self.folder = backend(tracking_uri, state_file.parent / "mlruns")
        self._experiment, self._run_name = experiment, run_name
        self._tags, self._params = dict(tags), dict(params)
        self._state_file, self._resumed = state_file, resumed
        self._client: Any = None
        self._run_id: str | None = None
        self._recorded: dict[str, int] | None = None  # a continued run: last step by metric
        self._told = False
        self._begun = threading.Event()
        self._ending = threading.Event()
        self._status = "FINISHED"
        self._inbox: queue.SimpleQueue[list[_Point] | Path | None] = queue.SimpleQueue()
        self._points: list[_Point] = []
        self._files: list[Path] = []
        self._thread: threading.Thread | None = None
        if int(os.environ.get("RANK", "0")) == 0:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()

    # What the trainer calls: none of these raises or waits for a server, but `run_id` and `finish`,
    # which wait for a bounded time.

    @property
    def run_id(self) -> str | None:
        """The MLflow run; None where there is none (another rank, or no server so far)."""
        if self._thread is not None and self._thread.is_alive():
            self._begun.wait(START_WAIT_S)
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._thread is None:
            return
        now = time.time_ns() // 1_000_000
        self._inbox.put([_Point(k, float(v), now, step) for k, v in metrics.items()])

    def artifact(self, path: Path | str) -> None:
        if self._thread is not None:
            self._inbox.put(Path(path))

    def finish(self, status: str = "FINISHED", wait_s: float = FINISH_WAIT_S) -> None:
        """Send what is left and close the run; gives up after `wait_s`."""
        if status not in STATUSES:
            raise ValueError(f"status is one of {', '.join(STATUSES)}, not {status!r}")
        if self._thread is None or self._ending.is_set():
            return
        self._status = status
        self._ending.set()
        self._inbox.put(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._tell(f"no answer within {wait_s:.0f} s at the end: the run's record is not whole")
        elif self.lost:
            self._say(f"warn  {self.lost} values are not in the record ({self.failures} failures)")

    # The thread.

    def _work(self) -> None:
        retry_at = 0.0
        while True:
            ending = self._ending.is_set()
            self._take(block_s=0.0 if ending else 0.5)
            if time.monotonic() >= retry_at or ending:
                ok = self._try("start", self._start) and self._try("log", self._send)
                self._begun.set()
                retry_at = 0.0 if ok else time.monotonic() + RETRY_WAIT_S
            if ending and self._inbox.empty():
                break
        if self._run_id is not None:
            self._try("finish", self._close)
        self.lost += len(self._points) + len(self._files)

    def _take(self, block_s: float) -> None:
        """Move what the trainer put into the inbox to the points and files to send."""
        with contextlib.suppress(queue.Empty):
            item = self._inbox.get(timeout=block_s) if block_s else self._inbox.get_nowait()
            while True:
                if isinstance(item, Path):
                    self._files.append(item)
                elif item is not None:
                    self._points.extend(item)
                item = self._inbox.get_nowait()
        if (excess := len(self._points) - POINTS_KEPT) > 0:
            self.lost += excess
            del self._points[:excess]

    def _try(self, what: str, call: Any) -> bool:
        try:
            call()
        except Exception as error:  # an outage of the record is no reason to lose a training
            self.failures += 1
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._tell(f"{what}: {type(error).__name__}: {first}")
            return False
        return True

    def _start(self) -> None:
        if self._run_id is not None:
            return
        if self._client is None:
            self._client = self._connect()
        client = self._client
        run_id = self._kept_run_id()
        if run_id is not None and self._known(run_id):
            client.set_terminated(run_id, "RUNNING")
            self._recorded = {}
        else:
            found = client.get_experiment_by_name(self._experiment)
            experiment_id = (
                found.experiment_id
                if found is not None
                else client.create_experiment(self._experiment, artifact_location=self._artifacts)
            )
            run_id = client.create_run(experiment_id, tags=self._tags, run_name=self._run_name).info.run_id
            self._try("state file", lambda: self._keep(run_id))
            for key, value in self._params.items():
                self._try(f"parameter {key}", lambda k=key, v=value: client.log_param(run_id, k, v))
        self._run_id = run_id

    def _connect(self) -> Any:
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        }.items():
            os.environ.setdefault(name, value)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self._uri)

    def _known(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _kept_run_id(self) -> str | None:
        try:
            kept = json.loads(self._state_file.read_text())["run_id"]
        except (OSError, ValueError, KeyError, TypeError):
            return self._resumed
        return kept if isinstance(kept, str) else self._resumed

    def _keep(self, run_id: str) -> None:
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        half = self._state_file.with_name(self._state_file.name + ".tmp")
        half.write_text(json.dumps({"run_id": run_id}) + "\n")
        half.replace(self._state_file)

    def _last_step(self, key: str) -> int:
        """The last step that a continued run already has: repeated steps are not logged twice."""
        if self._recorded is None:
            return -1
        if key not in self._recorded:
            history = self._client.get_metric_history(self._run_id, key)
            self._recorded[key] = max((point.step for point in history), default=-1)
        return self._recorded[key]

    def _send(self) -> None:
        from mlflow.entities import Metric

        while self._points:
            batch = self._points[:POINTS_PER_BATCH]
            fresh = [Metric(p.key, p.value, p.time_ms, p.step) for p in batch if p.step > self._last_step(p.key)]
            if fresh:
                self._client.log_batch(self._run_id, metrics=fresh)
            del self._points[: len(batch)]
        while self._files:
            path = self._files[0]
            if path.exists():
                self._client.log_artifact(self._run_id, str(path))
                del self._files[0]
            else:
                del self._files[0]
                self.lost += 1
                raise FileNotFoundError(f"artifact {path.name} does not exist")

    def _close(self) -> None:
        self._client.set_terminated(self._run_id, self._status)

    def _tell(self, what: str) -> None:
        if self._told:
            return
        self._told = True
        self._say(
            f"warn  {_without_secrets(what)}\n"
            "          rule  training goes on without its record; failures are counted, retried\n"
            f"          next  see that {_without_secrets(self._uri)} answers (mlflow.tracking_uri)"
        )

    @staticmethod
    def _say(text: str) -> None:
        print(f"track     {text}", file=sys.stderr, flush=True)


def _without_secrets(text: str) -> str:
    return re.sub(r"//[^@/\s]+@", "//***@", text)
