"""MLflow's stores in a real bucket: mirrored by trackers, pulled, and merged."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from wmtp import mlstore
from wmtp.config import Storage
from wmtp.mirror import RECORD
from wmtp.mlstore import StoreError, StoreMirror, gather, last_step, main, merge, restore
from wmtp.remote import DamagedError, Remote
from wmtp.tracking import Tracker

STORAGE = Storage(retries=1, retry_wait_s=0, stall_s=5)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_MIRROR_S", "0.2")


EMPTY: list[bytes] = []  # a store without runs: MLflow takes seconds for its tables


@pytest.fixture(scope="module", autouse=True)
def empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("empty")
    Tracker(f"file://{folder}", "wmtp/test", "run", {}, {}, folder / "mlflow.json").finish()
    with sqlite3.connect(folder / "mlflow.db") as store:
        for table in ("runs", "metrics", "latest_metrics", "params", "tags"):
            store.execute(f"delete from {table}")
        store.execute("delete from experiments where name = 'wmtp/test'")
    EMPTY[:] = [(folder / "mlflow.db").read_bytes()]


def tracker(prefix: str, node: Path, name: str = "run-a", **changed: Any) -> Tracker:
    database = node / name / "mlruns" / "mlflow.db"
    if not database.exists():
        database.parent.mkdir(parents=True)
        database.write_bytes(EMPTY[0])
    settings: dict[str, Any] = {
        "experiment": "wmtp/test",
        "tags": {},
        "params": {"p": 1},
        "storage": STORAGE,
        **changed,
    }
    return Tracker(prefix, run_name=name, state_file=node / name / "mlflow.json", **settings)


def log(record: Tracker, steps: range) -> None:
    for step in steps:
        record.log(step, {"wmtp_loss": 1.0 / step, "lr": 0.1})


def asked(database: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as store:
        return store.execute(query, values).fetchall()


def steps_of(database: Path, run_id: str | None) -> list[int]:
    query = "select step from metrics where run_uuid = ? and key = 'wmtp_loss' order by step"
    return [row[0] for row in asked(database, query, run_id)]


def pulled(prefix: str, at: Path, name: str = "run-a") -> tuple[Path, str]:
    mirror = StoreMirror(at, f"{prefix}/{name}", STORAGE, lambda: None)
    assert mirror.pull()
    return mirror.pulled


def marker(prefix: str, name: str = "run-a") -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Remote(prefix, STORAGE).s5cmd("cat", f"{prefix}/{name}/{RECORD}"))
    return read


def wait_for(what: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def test_a_run_is_in_the_bucket_under_its_marker(tmp_path: Path, prefix: str) -> None:
    record = tracker(prefix, tmp_path)
    (tmp_path / "plot.svg").write_text("<svg/>")
    record.artifact(tmp_path / "plot.svg")
    log(record, range(1, 5))
    record.finish("KILLED")

    told = marker(prefix)
    assert (told["run_id"], told["step"]) == (record.run_id, 4)
    plot = f"artifacts/{record.run_id}/artifacts/plot.svg"
    assert told["artifacts"] == {plot: 6}
    database, run_id = pulled(prefix, tmp_path / "there")
    content = database.read_bytes()
    assert told["db"] == f"db/{hashlib.sha256(content).hexdigest()[:16]}.db"
    assert (told["sha256"], told["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert steps_of(database, run_id) == [1, 2, 3, 4]
    assert asked(database, "select status from runs") == [("KILLED",)]
    assert (tmp_path / "there" / plot).read_text() == "<svg/>"


def test_of_older_databases_only_one_stays(tmp_path: Path, prefix: str) -> None:
    record = tracker(prefix, tmp_path)
    seen: list[str] = []
    for step in (1, 2, 3, 4):
        log(record, range(step, step + 1))
        wait_for(lambda step=step: Remote(prefix, STORAGE).listed(f"run-a/{RECORD}") and marker(prefix)["step"] == step)
        seen.append(marker(prefix)["db"])
    record.finish()
    seen.append(marker(prefix)["db"])
    there = {key.removeprefix("run-a/") for key in Remote(prefix, STORAGE).listed("run-a/db/*")}
    assert seen[-1] in there and len(there) == 2 and not there & set(seen[:3])


def test_another_node_goes_on_with_the_run(tmp_path: Path, prefix: str) -> None:
    first = tracker(prefix, tmp_path / "one")
    (tmp_path / "plot.svg").write_text("<svg/>")
    first.artifact(tmp_path / "plot.svg")
    log(first, range(1, 5))
    first.finish("KILLED")
    second = tracker(prefix, tmp_path / "two", resumed=first.run_id)
    log(second, range(3, 8))
    assert second.run_id == first.run_id
    second.finish()
    assert second.failures == 0
    database, run_id = pulled(prefix, tmp_path / "there")
    assert steps_of(database, run_id) == [1, 2, 3, 4, 5, 6, 7]
    (address,) = asked(tmp_path / "two" / "run-a" / "mlruns" / "mlflow.db", "select artifact_uri from runs")[0]
    assert str(tmp_path / "two") in address
    assert (Path(urlsplit(address).path) / "plot.svg").read_text() == "<svg/>"


def test_a_run_killed_before_its_first_checkpoint_is_found_by_the_marker_but_a_finished_one_is_done(
    tmp_path: Path, prefix: str
) -> None:
    first = tracker(prefix, tmp_path / "one")
    log(first, range(1, 3))
    first.finish("KILLED")
    second = tracker(prefix, tmp_path / "two")
    log(second, range(1, 4))
    second.finish()
    assert second.run_id == first.run_id
    third = tracker(prefix, tmp_path / "three")
    log(third, range(1, 3))
    third.finish()
    assert third.run_id not in (None, first.run_id)
    database, run_id = pulled(prefix, tmp_path / "there")
    assert run_id == third.run_id
    assert (steps_of(database, first.run_id), steps_of(database, third.run_id)) == ([1, 2, 3], [1, 2])


def test_points_that_a_kill_kept_from_the_record_are_replayed(tmp_path: Path, prefix: str) -> None:
    first = tracker(prefix, tmp_path / "one")
    log(first, range(1, 4))
    first.finish("KILLED")
    told = [(step, {"wmtp_loss": 1.0 / step, "at": 1e9 + step, "mfu": None}) for step in range(1, 7)]
    second = tracker(prefix, tmp_path / "two", resumed=first.run_id, replay=told)
    log(second, range(7, 9))
    second.finish()
    database = pulled(prefix, tmp_path / "there")[0]
    assert steps_of(database, first.run_id) == [*range(1, 9)]
    assert asked(database, "select timestamp from metrics where step = 5") == [(1_000_000_005_000,)]
    assert {key for (key,) in asked(database, "select distinct key from metrics")} == {"wmtp_loss", "lr"}


def test_a_node_that_is_ahead_of_the_mirror_keeps_its_own(tmp_path: Path, prefix: str) -> None:
    record = tracker(prefix, tmp_path)
    log(record, range(1, 4))
    record.finish("KILLED")
    folder = tmp_path / "run-a" / "mlruns"
    again = Tracker(f"file://{folder}", "wmtp/test", "run-a", {}, {}, tmp_path / "run-a" / "mlflow.json")
    log(again, range(4, 7))
    again.finish("KILLED")
    assert restore(folder, f"{prefix}/run-a", STORAGE) == record.run_id
    assert last_step(folder / "mlflow.db", str(record.run_id)) == 6
    # An older one takes the mirror's, and nothing of its own journal.
    with sqlite3.connect(folder / "mlflow.db") as store:
        store.execute("update latest_metrics set step = 1")
    (folder / "mlflow.db-journal").write_text("")
    assert restore(folder, f"{prefix}/run-a", STORAGE)
    assert steps_of(folder / "mlflow.db", record.run_id) == [1, 2, 3]


@pytest.mark.parametrize("how", ["content", "gone"])
def test_a_damaged_store_is_refused(how: str, tmp_path: Path, prefix: str) -> None:
    record = tracker(prefix, tmp_path)
    log(record, range(1, 3))
    record.finish()
    name = f"{prefix}/run-a/{marker(prefix)['db']}"
    if how == "gone":
        Remote(prefix, STORAGE).s5cmd("rm", name)
    else:
        (tmp_path / "other").write_text("not a database")
        Remote(prefix, STORAGE).s5cmd("cp", str(tmp_path / "other"), name)
    with pytest.raises(DamagedError, match="is gone" if how == "gone" else "another content"):
        pulled(prefix, tmp_path / "there")
    assert main([prefix, "--into", str(tmp_path / "merged"), "--retries", "1", "--retry-wait-s", "0"]) == 13


def test_a_bucket_away_at_the_start_delays_the_record_and_loses_none_of_it(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wmtp.tracking.RETRY_WAIT_S", 0.2)
    monkeypatch.setattr("wmtp.tracking.BATCH_S", 0.1)
    endpoint = os.environ["S3_ENDPOINT_URL"]
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    record = tracker(prefix, tmp_path)
    log(record, range(1, 4))
    wait_for(lambda: record.failures)
    assert record.run_id is None
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    wait_for(lambda: record.run_id)
    log(record, range(4, 6))
    record.finish()
    assert record.lost == 0
    database, run_id = pulled(prefix, tmp_path / "there")
    assert steps_of(database, run_id) == [1, 2, 3, 4, 5]
    assert "takes the record again after" in capsys.readouterr().err


def test_a_bucket_away_in_the_middle_is_made_up_for(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All requests are answered with 503 in the middle third; the trainer's calls take no longer for it."""
    faults = tmp_path / "faults.json"
    faults.write_text("[]")
    proxy = subprocess.Popen(
        [sys.executable, HERE / "fault_proxy.py", "--to", os.environ["S3_ENDPOINT_URL"], "--faults", faults],
        stdout=subprocess.PIPE,
        text=True,
    )
    direct = os.environ["S3_ENDPOINT_URL"]
    try:
        assert proxy.stdout
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.stdout.readline().strip())
        monkeypatch.setattr("wmtp.tracking.BATCH_S", 0.1)
        record = tracker(prefix, tmp_path)
        slowest = 0.0
        for step in range(1, 91):
            if step == 30:
                wait_for(lambda: record._mirror and record._mirror.pushes)
                faults.write_text('[{"fault": "503"}]')
            if step == 60:
                wait_for(lambda: record._mirror and record._mirror._away_since is not None)
                faults.write_text("[]")
            began = time.monotonic()
            log(record, range(step, step + 1))
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.02)
        record.finish()
        assert slowest < 0.1
    finally:
        proxy.kill()
        proxy.wait()
    monkeypatch.setenv("S3_ENDPOINT_URL", direct)
    database, run_id = pulled(prefix, tmp_path / "there")
    assert steps_of(database, run_id) == [*range(1, 91)]
    told = capsys.readouterr().err
    assert told.count("mirror    warn") == 1 and "takes the record again after" in told


def test_three_runs_one_of_them_resumed_are_three_after_merging_twice(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {}
    for name in ("run-a", "run-b", "run-c"):
        record = tracker(prefix, tmp_path / "one", name, experiment="other" if name == "run-c" else "wmtp/test")
        (tmp_path / f"{name}.svg").write_text(name)
        record.artifact(tmp_path / f"{name}.svg")
        log(record, range(1, 6))
        record.finish("KILLED" if name == "run-b" else "FINISHED")
        ids[name] = str(record.run_id)
    record = tracker(prefix, tmp_path / "two", "run-b", resumed=ids["run-b"])
    log(record, range(4, 10))
    record.finish()

    into = tmp_path / "merged here"
    for _ in range(2):
        assert main([prefix, "--into", str(into)]) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        expected = {"run-a": ("5", "0.200"), "run-b": ("9", "0.111"), "run-c": ("5", "0.200")}
        assert {r[1]: (r[0], r[2], r[3], r[4], r[5]) for r in rows} == {
            name: (ids[name], "FINISHED", *expected[name], "1") for name in ids
        }
    database = into / "mlflow.db"
    assert asked(database, "select count(*) from runs") == [(3,)]
    assert steps_of(database, ids["run-b"]) == [*range(1, 10)]
    assert asked(database, "select count(*) from params") == [(3,)]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("wmtp/test")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in found} == {"run-a", "run-b"}
    for name, run_id in ids.items():
        assert Path(client.download_artifacts(run_id, f"{name}.svg")).read_text() == name
        assert str(into).replace(" ", "%20") in client.get_run(run_id).info.artifact_uri


def test_one_run_by_its_name_and_none_of_an_unknown_one(tmp_path: Path, prefix: str) -> None:
    for name in ("run-a", "run-b"):
        record = tracker(prefix, tmp_path, name)
        record.finish()
    assert len(gather(prefix, tmp_path / "one", STORAGE, ["run-b"])) == 1
    with pytest.raises(StoreError, match=r"no record of run-x; .*run-a, run-b"):
        gather(prefix, tmp_path / "one", STORAGE, ["run-x"])


def test_what_has_not_changed_is_not_fetched_again(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tracker(prefix, tmp_path)
    log(record, range(1, 3))
    record.finish()
    gather(prefix, tmp_path / "merged", STORAGE)
    verbs: list[str] = []
    real = Remote.s5cmd

    def spy(self: Remote, *arguments: str, lines: Any = None) -> str:
        verbs.append(arguments[0])
        return real(self, *arguments, lines=lines)

    monkeypatch.setattr(Remote, "s5cmd", spy)
    gather(prefix, tmp_path / "merged", STORAGE)
    assert "cat" in verbs and not {"run", "cp"} & {*verbs}


def test_a_folder_is_merged_with_its_artifacts_where_they_are(tmp_path: Path) -> None:
    uri = f"file://{tmp_path / 'ml runs'}"
    record = Tracker(uri, "wmtp/test", "run", {}, {}, tmp_path / "mlflow.json")
    (tmp_path / "a.txt").write_text("a")
    record.artifact(tmp_path / "a.txt")
    record.finish()
    assert gather(str(tmp_path / "ml runs"), tmp_path / "merged", STORAGE) == [record.run_id]
    assert gather(f"sqlite:///{tmp_path / 'ml runs'}/mlflow.db", tmp_path / "merged", STORAGE) == [record.run_id]
    (address,) = asked(tmp_path / "merged" / "mlflow.db", "select artifact_uri from runs")[0]
    assert str(tmp_path / "ml runs").replace(" ", "%20") in address
    with pytest.raises(StoreError, match="is not there"):
        gather(str(tmp_path / "nothing"), tmp_path / "merged", STORAGE)


def test_points_are_kept_as_mlflow_keeps_them(tmp_path: Path) -> None:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    (tmp_path / "mlflow.db").write_bytes(EMPTY[0])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    ours, theirs = (client.create_run("0").info.run_id for _ in range(2))
    points = [
        ("a", 1.5, 1000, 1),
        ("a", 2.5, 2000, 2),
        ("b", math.nan, 1000, 1),
        ("c", math.inf, 1000, 3),
        ("c", -math.inf, 900, 2),
        ("d", 1.0, 1000, 1),
        ("d", 2.0, 1000, 1),
    ]
    for batch in (points, points[:2]):  # the second is a repetition
        mlstore.add_points(tmp_path / "mlflow.db", ours, batch)
        client.log_batch(theirs, metrics=[Metric(*point) for point in batch])
    for table in ("metrics", "latest_metrics"):
        query = f"select key, value, timestamp, step, is_nan from {table} where run_uuid = ? order by 1, 4, 2"
        mine = asked(tmp_path / "mlflow.db", query, ours)
        assert mine and mine == asked(tmp_path / "mlflow.db", query, theirs)
    assert client.get_run(ours).data.metrics["a"] == 2.5


def test_a_store_of_another_schema_gets_its_points_through_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: Any) -> None:
        raise sqlite3.OperationalError("no such column")

    monkeypatch.setattr("wmtp.tracking.add_points", refuse)
    record = Tracker(f"file://{tmp_path}", "wmtp/test", "run", {}, {}, tmp_path / "mlflow.json")
    record.log(1, {"wmtp_loss": 1.0})
    record.finish()
    assert (record.failures, record.lost) == (0, 0)
    assert steps_of(tmp_path / "mlflow.db", record.run_id) == [1]


def test_stores_of_two_mlflow_versions_are_not_mixed(tmp_path: Path) -> None:
    for name in ("old", "new"):
        record = Tracker(f"file://{tmp_path / name}", "e", "run", {}, {}, tmp_path / name / "mlflow.json")
        record.finish()
    merge(tmp_path / "new" / "mlflow.db", tmp_path / "merged.db")
    with sqlite3.connect(tmp_path / "old" / "mlflow.db") as store:
        store.execute("update alembic_version set version_num = '0'")
    with pytest.raises(StoreError, match=r"mlflow db upgrade sqlite:///.*old/mlflow.db"):
        merge(tmp_path / "old" / "mlflow.db", tmp_path / "merged.db")
    assert len(asked(tmp_path / "merged.db", "select * from runs")) == 1


def test_a_bucket_that_does_not_answer_is_11(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    assert main([prefix, "--into", str(tmp_path), "--retries", "1", "--retry-wait-s", "0"]) == 11
    assert "FAIL" in capsys.readouterr().err


@pytest.mark.long
def test_kills_at_random_moments_leave_a_readable_record(prefix: str) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "kill_tracker.py", "--kills", "3", "--prefix", prefix],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill 3 of 3" in done.stdout


def test_looking_imports_neither_torch_nor_mlflow() -> None:
    code = "import sys, wmtp.mlstore; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
