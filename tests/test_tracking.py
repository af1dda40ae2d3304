from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wmtp import tracking
from wmtp.tracking import Tracker, backend

ONE = {"tags": {"algo": "baseline-mtp"}, "params": {"train.max_steps": 12}}


def tracker(folder: Path, **changed: Any) -> Tracker:
    settings: dict[str, Any] = {
        "tracking_uri": f"file://{folder / 'ml runs'}",
        "experiment": "wmtp/test",
        "run_name": "test-run",
        "state_file": folder / "state" / "mlflow.json",
        **ONE,
        **changed,
    }
    return Tracker(**settings)


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "ml runs" / "mlflow.db") as database:
        return database.execute(query).fetchall()


def test_a_folder_holds_database_and_artifacts(tmp_path: Path) -> None:
    artifact = tmp_path / "summary.json"
    artifact.write_text("{}")
    record = tracker(tmp_path)
    record.log(1, {"wmtp_loss": 10.5, "lr": 1e-3})
    record.log(2, {"wmtp_loss": 10.25, "lr": math.nan})
    record.artifact(artifact)
    run_id = record.run_id
    record.finish()

    assert run_id is not None
    assert (record.failures, record.lost) == (0, 0)
    assert rows(tmp_path, "select run_uuid, name, status from runs") == [(run_id, "test-run", "FINISHED")]
    losses = "select step, value from metrics where key = 'wmtp_loss' order by step"
    assert rows(tmp_path, losses) == [(1, 10.5), (2, 10.25)]
    assert rows(tmp_path, "select key, value from params") == [("train.max_steps", "12")]
    assert ("algo", "baseline-mtp") in rows(tmp_path, "select key, value from tags")
    kept = tmp_path / "ml runs" / "artifacts" / run_id / "artifacts" / "summary.json"
    assert kept.read_text() == "{}"


def test_a_second_start_continues_the_run_and_repeats_no_step(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"wmtp_loss": float(step)})
    first.finish("KILLED")
    assert rows(tmp_path, "select status from runs") == [("KILLED",)]

    second = tracker(tmp_path, params={"train.max_steps": 13})
    for step in (3, 4):
        second.log(step, {"wmtp_loss": float(step)})
    assert second.run_id == first.run_id
    second.finish()

    assert second.failures == 0
    steps = rows(tmp_path, "select step from metrics where key = 'wmtp_loss' order by step")
    assert steps == [(1,), (2,), (3,), (4,)]
    assert rows(tmp_path, "select status from runs") == [("FINISHED",)]


def test_on_another_node_the_run_that_the_checkpoint_names_goes_on(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.log(1, {"wmtp_loss": 1.0})
    first.finish("KILLED")
    second = tracker(tmp_path, state_file=tmp_path / "another node" / "mlflow.json", resumed=first.run_id)
    second.log(2, {"wmtp_loss": 2.0})
    assert second.run_id == first.run_id
    second.finish()
    assert rows(tmp_path, "select count(*) from runs") == [(1,)]


def test_a_kept_run_that_the_database_lacks_is_made_anew(tmp_path: Path) -> None:
    state = tmp_path / "state" / "mlflow.json"
    state.parent.mkdir()
    state.write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
    record = tracker(tmp_path)
    record.finish()
    assert record.failures == 0
    assert json.loads(state.read_text())["run_id"] == record.run_id


def test_an_outage_is_told_once_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "RETRY_WAIT_S", 0.0)
    (tmp_path / "file").write_text("not a folder")
    record = tracker(tmp_path, tracking_uri=f"file://{tmp_path / 'file' / 'runs'}")
    for step in range(5):
        record.log(step, {"wmtp_loss": 1.0})
        time.sleep(0.02)
    record.finish("FAILED")
    assert record.run_id is None
    assert record.failures >= 2
    assert record.lost == 5
    told = capsys.readouterr().err
    assert told.count("rule  training goes on") == 1
    assert "5 values are not in the record" in told


def test_what_was_logged_during_an_outage_arrives_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_WAIT_S", 0.05)
    wall = tmp_path / "ml runs"
    wall.write_text("in the way")
    record = tracker(tmp_path)
    record.log(1, {"wmtp_loss": 3.0})
    assert record.run_id is None
    wall.unlink()
    record.log(2, {"wmtp_loss": 2.0})
    record.finish()
    assert record.failures >= 1
    assert record.lost == 0
    assert rows(tmp_path, "select step from metrics order by step") == [(1,), (2,)]


def test_a_hanging_server_does_not_hold_the_end_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Tracker, "_connect", lambda self: time.sleep(5))
    begun = time.monotonic()
    record = tracker(tmp_path)
    record.log(1, {"wmtp_loss": 1.0})
    record.finish(wait_s=0.2)
    assert time.monotonic() - begun < 2
    assert "no answer within" in capsys.readouterr().err


class Server:
    """MLflow's store behind HTTP, in a process of its own that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, "0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("mlflow_server.py")), str(self.folder), self.port]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.uri = self.process.stdout.readline().strip()
        self.port = self.uri.rpartition(":")[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def requests(self) -> list[str]:
        return (self.folder / "requests").read_text().splitlines()


def wait_for(what: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def test_a_server_that_was_killed_and_came_back_has_every_step_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "RETRY_WAIT_S", 0.2)
    monkeypatch.setattr(tracking, "BATCH_S", 0.1)
    server = Server(tmp_path / "ml runs")
    try:
        record = tracker(tmp_path, tracking_uri=server.uri, params={f"p{n}": n for n in range(150)})
        slowest, run_id = 0.0, record.run_id
        assert run_id is not None
        artifact = tmp_path / "plot.svg"
        artifact.write_text("<svg/>")
        for step in range(1, 91):
            if step == 30:
                server.kill()
                record.artifact(artifact)
            if step == 60:
                wait_for(lambda: record.failures)
                server.start()
            began = time.monotonic()
            record.log(step, {"wmtp_loss": 1.0 / step, "lr": 0.1})
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.01)
        record.finish()
        assert slowest < 0.1
    finally:
        server.kill()
    assert record.lost == 0
    for key in ("wmtp_loss", "lr"):
        query = f"select step from metrics where key = '{key}' order by timestamp, step"
        assert rows(tmp_path, query) == [(step,) for step in range(1, 91)]
    assert rows(tmp_path, "select run_uuid, status from runs") == [(run_id, "FINISHED")]
    assert rows(tmp_path, "select count(*) from params") == [(150,)]
    assert (tmp_path / "ml runs" / "artifacts" / "1" / run_id / "artifacts" / "plot.svg").exists()
    told = capsys.readouterr().err
    assert told.count(f"next  see that {server.uri} answers") == 1
    assert f"{server.uri} takes the record again after" in told and "nothing of it is missing" in told


def test_parameters_go_in_one_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path / "ml runs")
    try:
        record = tracker(tmp_path, tracking_uri=server.uri, params={f"p{n}": "x" * 7000 for n in range(40)})
        record.finish()
        assert (record.failures, record.lost) == (0, 0)
        assert server.requests().count("runs/log-batch") == 1
    finally:
        server.kill()
    assert rows(tmp_path, "select count(*), max(length(value)) from params") == [(40, 6000)]
    assert capsys.readouterr().out == ""


def test_what_is_refused_for_good_does_not_hold_up_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tracker(tmp_path, params={"a\x07b": 1})
    record.log(1, {"wmtp_loss": 1.0})
    record.finish()
    assert (record.failures, record.lost) == (1, 1)
    assert rows(tmp_path, "select step from metrics") == [(1,)]
    assert "1 params are refused" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_parameters_gets_them(tmp_path: Path) -> None:
    first = tracker(tmp_path, params={})
    first.finish("KILLED")
    tracker(tmp_path).finish()
    assert rows(tmp_path, "select key, value from params") == [("train.max_steps", "12")]


def test_steps_that_never_reached_the_record_are_replayed(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in (1, 2):
        first.log(step, {"wmtp_loss": float(step)})
    first.finish("KILLED")
    second = tracker(tmp_path, replay=[(step, {"wmtp_loss": float(step), "step": step}) for step in range(1, 5)])
    second.log(5, {"wmtp_loss": 5.0})
    second.finish()
    told = rows(tmp_path, "select key, step, value from metrics order by step")
    assert told == [("wmtp_loss", step, float(step)) for step in range(1, 6)]


def test_a_long_runs_replay_is_no_outage_and_none_of_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "POINTS_KEPT", 10)
    before = [(step, {"wmtp_loss": float(step), "lr": 1.0}) for step in range(1, 101)]
    for last in (101, 102):  # a store that lacks all of it, then one that lacks nothing
        again = tracker(tmp_path, replay=before)
        again.log(last, {"wmtp_loss": float(last)})
        again.finish()
        assert (again.failures, again.lost) == (0, 0)
    told = rows(tmp_path, "select step, value from metrics where key = 'wmtp_loss' order by rowid")
    assert told == [(step, float(step)) for step in range(1, 103)] and capsys.readouterr().err == ""


def test_an_artifact_that_is_not_there_is_told_and_holds_up_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tracker(tmp_path)
    record.artifact(tmp_path / "nothing.svg")
    record.artifact(Path(__file__))
    record.finish()
    assert (record.failures, record.lost) == (0, 1)
    assert "nothing.svg does not exist" in capsys.readouterr().err
    kept = tmp_path / "ml runs" / "artifacts" / str(record.run_id) / "artifacts" / Path(__file__).name
    assert kept.exists()


def test_other_ranks_record_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    record = tracker(tmp_path)
    record.log(1, {"wmtp_loss": 1.0})
    record.finish()
    assert record.run_id is None
    assert not (tmp_path / "ml runs").exists()


def test_an_unknown_status_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        tracker(tmp_path).finish("DONE")


@pytest.mark.parametrize(
    ("uri", "used"),
    [
        ("file:///d/runs", "sqlite:////d/runs/mlflow.db"),
        ("/d/runs", "sqlite:////d/runs/mlflow.db"),
        ("s3://wmtp/mlruns", "sqlite:////r/mlruns/mlflow.db"),
        ("https://user:pw@host/x", "https://user:pw@host/x"),
        ("sqlite:////d/x.db", "sqlite:////d/x.db"),
    ],
)
def test_backend(uri: str, used: str) -> None:
    assert backend(uri, Path("/r/mlruns"))[0] == used


def test_no_secret_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tracker(tmp_path, tracking_uri="postgresql://me:hunter2@127.0.0.1:9/x")
    record.finish()
    told = capsys.readouterr().err
    assert "warn" in told
    assert "hunter2" not in told
