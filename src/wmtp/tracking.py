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
import sqlite3
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from wmtp.config import Storage
from wmtp.mirror import lasted
from wmtp.mlstore import DATABASE, StoreMirror, add_points, restore, status_of
from wmtp.remote import DamagedError, TransferError

STATUSES = ("FINISHED", "FAILED", "KILLED")
POINTS_PER_BATCH, PARAMS_PER_BATCH, VALUE_LENGTH = 1000, 100, 6000  # MLflow's own limits
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
BATCH_S = 2.0  # what is logged within so long goes together
REPLAYED = 200  # steps at a time
POINTS_KEPT = 500_000  # during an outage; the oldest go first
START_WAIT_S = 60.0  # the first database takes about 3 s
FINISH_WAIT_S = 30.0  # torchrun gives its workers about as much after SIGTERM
RETRY_WAIT_S = 5.0


def backend(tracking_uri: str, record: Path) -> tuple[str, str | None, Path | None]:
    """The URI that MLflow can use, where artifacts go (None: the server knows), the local folder.

    A folder (`file:///d` or a plain path) becomes `d/mlflow.db` with `d/artifacts`. MLflow can't
    track into `s3://`: such a record is kept under `record`, and mirrored.
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


class _Point(NamedTuple):
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
        storage: Storage | None = None,
        replay: Sequence[tuple[int, Mapping[str, float | None]]] = (),
    ) -> None:
        """``resumed``: the run that the checkpoint names, where ``state_file`` is not here (another node).

        ``storage``: how bytes go to an `s3://` record. ``replay``: steps and figures that a continued run may lack,
        since a kill came between a step and its record; a figure "at" says when, in seconds since the epoch.
        """
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
        self._params_due = False
        self._recorded: dict[str, int] | None = None  # a continued run: last step by metric
        self._away_since: float | None = None
        self._begun = threading.Event()
        self._ending = threading.Event()
        self._status = "FINISHED"
        self._inbox: queue.SimpleQueue[tuple[int, int, Mapping[str, float]] | Path | None] = queue.SimpleQueue()
        self._replay = [
            (step, int((figures.get("at") or time.time()) * 1000), figures) for step, figures in replay
        ]  # on the disk too: none of it is lost where the store does not take it
        self._points: list[_Point] = []
        self._files: list[Path] = []
        self._thread: threading.Thread | None = None
        self._mirror: StoreMirror | None = None
        self._fetched = True
        if int(os.environ.get("RANK", "0")) != 0:
            return
        if urlsplit(tracking_uri).scheme == "s3" and self.folder is not None:
            prefix = f"{tracking_uri.rstrip('/')}/{run_name}"
            self._mirror = StoreMirror(self.folder, prefix, storage or Storage(), lambda: self._run_id)
            self._fetched = False
            self._mirror.start()
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
        if self._thread is not None:
            self._inbox.put((step, time.time_ns() // 1_000_000, dict(metrics)))

    def artifact(self, path: Path | str) -> None:
        if self._thread is not None:
            self._inbox.put(Path(path))

    def finish(self, status: str = "FINISHED", wait_s: float = FINISH_WAIT_S) -> None:
        """Send what is left, close the run and mirror it; gives up after `wait_s`."""
        if status not in STATUSES:
            raise ValueError(f"status is one of {', '.join(STATUSES)}, not {status!r}")
        if self._thread is None or self._ending.is_set():
            return
        until = time.monotonic() + wait_s
        self._status = status
        self._ending.set()
        self._inbox.put(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._say(f"warn  no answer within {wait_s:.0f} s at the end: the run's record is not whole")
        elif self.lost:
            self._say(f"warn  {self.lost} values are not in the record ({self.failures} failures)")
        if self._mirror is not None:
            self._mirror.close(max(until - time.monotonic(), 1.0))

    # The thread.

    def _work(self) -> None:
        retry_at = 0.0
        while True:
            ending = self._ending.is_set()
            self._take(block_s=0.0 if ending else BATCH_S)
            if time.monotonic() >= retry_at or ending:
                ok = self._try("start", self._start)
                self._begun.set()
                ok = ok and self._try("log", self._send)
                retry_at = 0.0 if ok else time.monotonic() + RETRY_WAIT_S
                if ok:
                    self._back()
            if ending and self._inbox.empty():
                break
        if self._run_id is not None:
            self._try("finish", self._close)
        self.lost += len(self._points) + len(self._files)

    def _take(self, block_s: float) -> None:
        """Move what the trainer put into the inbox to the points and files to send.

        Waits until the run ends or ``block_s`` have passed, so that what comes meanwhile is one batch: MLflow's work
        for a batch is Python's, which takes turns with the trainer's.
        """
        if block_s and self._begun.is_set():
            self._ending.wait(block_s)
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                if isinstance(item, Path):
                    self._files.append(item)
                elif item is not None:
                    step, now, figures = item
                    self._points.extend(_Point(k, float(v), now, step) for k, v in figures.items())
        if (excess := len(self._points) - POINTS_KEPT) > 0:
            self.lost += excess
            del self._points[:excess]

    def _try(self, what: str, call: Any) -> bool:
        try:
            call()
        except Exception as error:  # an outage of the record is no reason to lose a training
            self.failures += 1
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._tell(f"{what}: {type(error).__name__}: {first[:300]}")
            return False
        return True

    def _start(self) -> None:
        if self._run_id is not None:
            return
        if not self._fetched:
            self._fetch()
        if self._client is None:
            self._client = self._connect()
        client = self._client
        run_id = self._kept_run_id()
        found = None if run_id is None else self._known(run_id)
        if run_id is not None and found is not None:
            client.set_terminated(run_id, "RUNNING")
            # MLflow shows values alone; to ask for a metric's history takes a second for each of a long run's.
            self._recorded = {metric.key: metric.step for metric in found.data._metric_objs}
            given = bool(found.data.params)
        else:
            run_id, given = self._create(), False
        try:
            self._keep(run_id)
        except OSError as error:
            self._say(f"warn  {self._state_file}: {error.strerror}; the next start finds the run by its checkpoint")
        self._params_due = not given
        self._run_id = run_id

    def _create(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self._experiment, artifact_location=self._artifacts)
        )
        run = self._client.create_run(experiment_id, tags=self._tags, run_name=self._run_name)
        return str(run.info.run_id)

    def _log_batch(self, **what: list[Any]) -> None:
        """One request. What the server refuses for good would be refused again, and hold up all that follows."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, **what)
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            self.failures += 1
            for kind, items in what.items():
                self.lost += len(items)
                first = str(error).splitlines()[0]
                self._say(f"warn  {len(items)} {kind} are refused, and not in the record: {_without_secrets(first)}")

    def _fetch(self) -> None:
        """Bring the record that the bucket has of this run, where the store here is older or none.

        Without an answer there is no start, or the run would have two records; what is logged waits. At the end it is
        written here all the same.
        """
        assert self._mirror is not None and self.folder is not None
        remote = self._mirror.remote
        try:
            marked = restore(self.folder, remote.prefix, remote.storage.model_copy(update={"retries": 1}))
        except DamagedError as error:
            self._say(f"warn  {error}: the run gets another record beside it")
            marked = None
        except TransferError:
            if not self._ending.is_set():
                raise
            marked = None
        if marked and self._resumed is None and status_of(self.folder / DATABASE, marked) not in (None, "FINISHED"):
            self._resumed = marked  # killed before its first checkpoint
        self._fetched = True

    def _connect(self) -> Any:
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is the stage's own
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        }.items():
            os.environ.setdefault(name, value)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self._uri)

    def _known(self, run_id: str) -> Any:
        """The run, where the server has it and nobody deleted it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

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
        return -1 if self._recorded is None else self._recorded.get(key, -1)

    def _send(self) -> None:
        from mlflow.entities import Metric, Param

        if self._params_due:
            params = [Param(key, str(value)[:VALUE_LENGTH]) for key, value in self._params.items()]
            for at in range(0, len(params), PARAMS_PER_BATCH):
                self._log_batch(params=params[at : at + PARAMS_PER_BATCH])
            self._params_due = False

        def send(points: list[_Point]) -> None:
            fresh = [p for p in points if p.step > self._last_step(p.key)]
            if fresh and not self._added(fresh):
                self._log_batch(metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in fresh])

        while self._replay:
            some = self._replay[:REPLAYED]
            points = [
                _Point(k, v, at, step)
                for step, at, figures in some
                for k, v in figures.items()
                if v is not None and k not in ("step", "at")
            ]
            for first in range(0, len(points), POINTS_PER_BATCH):
                send(points[first : first + POINTS_PER_BATCH])
            del self._replay[:REPLAYED]
        while self._points:
            batch = self._points[:POINTS_PER_BATCH]
            send(batch)
            del self._points[: len(batch)]
        while self._files:
            path = self._files[0]
            if path.exists():
                self._client.log_artifact(self._run_id, str(path))
            else:
                self.lost += 1
                self._say(f"warn  the artifact {path} does not exist: it is not in the record")
            del self._files[0]

    def _added(self, points: list[_Point]) -> bool:
        """Whether a store on this disk took them straight; another version's may not, and MLflow itself is asked."""
        if self.folder is None or self._run_id is None:
            return False
        with contextlib.suppress(sqlite3.Error):
            add_points(self.folder / DATABASE, self._run_id, points)
            return True
        return False

    def _close(self) -> None:
        self._client.set_terminated(self._run_id, self._status)

    def _tell(self, what: str) -> None:
        if self._away_since is not None:
            return
        self._away_since = time.monotonic()
        self._say(
            f"warn  {_without_secrets(what)}\n"
            "          rule  training goes on without its record; failures are counted, retried\n"
            f"          next  see that {_without_secrets(self._uri)} answers (mlflow.tracking_uri)"
        )

    def _back(self) -> None:
        """The gap is over: how long it was, and what of it is missing."""
        if self._away_since is None:
            return
        away, self._away_since = time.monotonic() - self._away_since, None
        missing = f"{self.lost} values were too many to keep" if self.lost else "nothing of it is missing"
        self._say(f"{_without_secrets(self._uri)} takes the record again after {lasted(away)}; {missing}")

    @staticmethod
    def _say(text: str) -> None:
        print(f"track     {text}", file=sys.stderr, flush=True)


def _without_secrets(text: str) -> str:
    return re.sub(r"//[^@/\s]+@", "//***@", text)
