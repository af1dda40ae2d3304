"""MLflow's store as a file: mirrored to the bucket while it grows, and many of them merged into one.

    python -m wmtp.mlstore s3://BUCKET/PREFIX|FOLDER… --into build/mlflow [--name RUN]… [--config C --env E]

A store is a folder with `mlflow.db` (sqlite) and `artifacts/`. In the bucket a run has, under PREFIX/RUN/, its database
as `db/<first 16 of its sha256>.db`, artifacts under the names that they have here, and the marker `record.json`:
run_id, db, sha256, bytes, artifacts, step, at. Standard output: a line a run. Exit codes: 0 done, 2 bad input, 11 the
bucket does not answer, 13 a record can't be used. Imports neither torch nor MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from wmtp.config import Storage
from wmtp.mirror import RECORD, Mirror
from wmtp.remote import CheckpointError, DamagedError, Remote, TransferError

DATABASE, ARTIFACTS, SNAPSHOTS = "mlflow.db", "artifacts", "db"
# What a run has, parents first, and what it is known by.
TABLES = ("runs", "metrics", "latest_metrics", "params", "tags")


class StoreError(ValueError):
    """A store that can't be merged: str() says why, the rule, and what to do."""


def address_of(database: Path) -> str:
    """For sqlite: never made where it is not. To be written, though only read: a kill in a commit is mended so."""
    return f"{database.absolute().as_uri()}?mode=rw"


@contextlib.contextmanager
def opened(database: Path) -> Iterator[sqlite3.Connection]:
    """A database in one transaction: all of it, or nothing where the body raises."""
    connection = sqlite3.connect(address_of(database), uri=True, timeout=20)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def snapshot(database: Path, target: Path) -> None:
    """A copy as of one moment, whoever writes meanwhile. Raises sqlite3.Error."""
    target.unlink(missing_ok=True)
    with opened(database) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        copy.execute("pragma synchronous = off")  # what a crash leaves of it is made anew
        source.backup(copy)


def last_step(database: Path, run_id: str) -> int:
    """The last step that a run has; -1: none, or no such run or store."""
    if not database.is_file():
        return -1
    with contextlib.suppress(sqlite3.Error), opened(database) as store:
        found = store.execute("select max(step) from latest_metrics where run_uuid = ?", [run_id]).fetchone()[0]
        return -1 if found is None else int(found)
    return -1


def add_points(database: Path, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
    """Key, value, milliseconds since the epoch and step of each, as MLflow keeps them. Raises sqlite3.Error.

    MLflow's own way in takes a tenth of a millisecond of Python for a value, which a short step would notice.
    """
    most = sys.float_info.max
    rows = [
        {
            "key": key,
            "value": 0.0 if math.isnan(value) else min(max(value, -most), most),
            "nan": math.isnan(value),
            "time": time_ms,
            "step": step,
            "run": run_id,
        }
        for key, value, time_ms, step in points
    ]
    listed = "(key, value, timestamp, step, is_nan, run_uuid) values (:key, :value, :time, :step, :nan, :run)"
    with opened(database) as store:
        store.executemany(f"insert or ignore into metrics {listed}", rows)
        store.executemany(
            f"insert into latest_metrics {listed} on conflict (key, run_uuid) do update set value = excluded.value, "
            "timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan "
            "where (excluded.step, excluded.timestamp) >= (latest_metrics.step, latest_metrics.timestamp)",
            rows,
        )


def rehome(database: Path, artifacts: Path) -> None:
    """Have runs and experiments of a store that was brought from elsewhere find their artifacts here."""
    with opened(database) as store:
        store.execute("update experiments set artifact_location = ?", [artifacts.absolute().as_uri()])
        for (run_id,) in store.execute("select run_uuid from runs").fetchall():
            store.execute("update runs set artifact_uri = ? where run_uuid = ?", [home(artifacts, run_id), run_id])


def home(artifacts: Path, run_id: str) -> str:
    return (artifacts.absolute() / run_id / "artifacts").as_uri()


class StoreMirror(Mirror):
    """The store in ``folder``, once ``run_id()`` says which run it is."""

    def __init__(self, folder: Path, prefix: str, storage: Storage, run_id: Callable[[], str | None]) -> None:
        super().__init__(folder, prefix, storage)
        self._run_id = run_id
        self._snapped: tuple[tuple[int, int, int], Path] | None = None  # what stat said of the database then
        self._before: str | None = None  # the database that the bucket had before the present one

    def files(self) -> dict[str, Path]:
        found, database = {}, self.folder / DATABASE
        if self._run_id() is None or not database.is_file():
            return {}
        stat = database.stat()
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._snapped is None or self._snapped[0] != seen:
            self._snapped = seen, self._snap(database)
        found[f"{SNAPSHOTS}/{self._snapped[1].name}"] = self._snapped[1]
        for path in sorted((self.folder / ARTIFACTS).rglob("*")):
            if path.is_file() and "\n" not in path.name:
                found[path.relative_to(self.folder).as_posix()] = path
        return found

    def _snap(self, database: Path) -> Path:
        """The database now, under its content's name; the one before goes."""
        shelf = self.folder / ".snapshot"
        shelf.mkdir(exist_ok=True)
        half = shelf / "half"
        snapshot(database, half)
        with half.open("rb") as file:
            named = shelf / f"{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.db"
        half.replace(named)
        for path in shelf.iterdir():
            if path != named:
                path.unlink()
        return named

    def facts(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        assert self._snapped is not None
        snapped, run_id = self._snapped[1], self._run_id() or ""
        with snapped.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "run_id": run_id,
            "db": f"{SNAPSHOTS}/{snapped.name}",
            "sha256": digest,
            "bytes": snapped.stat().st_size,
            "artifacts": {name: size for name, size in sizes.items() if name.startswith(f"{ARTIFACTS}/")},
            "step": max(last_step(snapped, run_id), 0),
        }

    def unwanted(self, names: set[str], files: dict[str, Path]) -> set[str]:
        """Databases but the present one and the one before it, which somebody may be fetching; artifacts as ever."""
        present = {name for name in files if name.startswith(f"{SNAPSHOTS}/")}
        if not present:
            return set()
        marked = self._marker.get("db")
        if marked and marked not in present:
            self._before = marked
        databases = {name for name in names if name.startswith(f"{SNAPSHOTS}/")}
        return (databases - present - {self._before}) | super().unwanted(names - databases, files)

    def wants(self, name: str) -> bool:
        return not name.startswith(f"{SNAPSHOTS}/") or name == self._marker.get("db")

    def _pull(self, keep: bool) -> bool:
        if not super()._pull(keep):
            return False
        try:
            database = self.folder / str(self._marker["db"])
            run_id, digest = str(self._marker["run_id"]), self._marker["sha256"]
        except KeyError as error:
            raise DamagedError(f"{self.remote.prefix}/{RECORD} has no {error}: it marks no store") from None
        if not database.is_file():
            raise DamagedError(f"{self.remote.prefix}: {database.name} is gone")
        with database.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DamagedError(f"{self.remote.prefix}: {database.name} has another content than its marker says")
        for old in database.parent.glob("*.db"):
            if old != database:
                old.unlink()
        self.pulled = database, run_id
        return True

    pulled: tuple[Path, str]
    """After a `pull` that brought something: the database, and the run that it is of."""


def restore(folder: Path, prefix: str, storage: Storage) -> str | None:
    """Have the store in ``folder`` be no older than its mirror; the mirrored run, None where there is no mirror.

    Raises TransferError.
    """
    fetched = folder / ".pulled"
    mirror = StoreMirror(fetched, prefix, storage, lambda: None)
    try:
        if not mirror.pull():
            return None
        database, run_id = mirror.pulled
        if last_step(folder / DATABASE, run_id) < max(last_step(database, run_id), 0):
            place_artifacts(fetched, folder)
            rehome(database, folder / ARTIFACTS)
            for part in ("-journal", "-wal", "-shm"):  # of the older one: sqlite would write it into this
                (folder / f"{DATABASE}{part}").unlink(missing_ok=True)
            database.replace(folder / DATABASE)
        return run_id
    finally:
        shutil.rmtree(fetched, ignore_errors=True)


def status_of(database: Path, run_id: str) -> str | None:
    """RUNNING, FINISHED, FAILED or KILLED; None where the store has no such run."""
    if not database.is_file():
        return None
    with opened(database) as store:
        found = store.execute("select status from runs where run_uuid = ?", [run_id]).fetchone()
    return str(found[0]) if found else None


def place_artifacts(source: Path, target: Path) -> None:
    """Artifacts of one store into another's folder; no byte is copied where both are on one disk."""
    for path in (source / ARTIFACTS).rglob("*"):
        if not path.is_file():
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        half = copy.with_name(f".{copy.name}.{os.getpid()}")
        half.unlink(missing_ok=True)
        try:
            half.hardlink_to(path)
        except OSError:
            shutil.copy2(path, half)
        half.replace(copy)
        half.unlink(missing_ok=True)  # where both were one file already


def merge(source: Path, target: Path, artifacts: Path | None = None) -> list[str]:
    """Bring all runs of the database ``source`` into ``target``, under their ids; again does no harm.

    ``artifacts``: where the runs' artifacts are now; None: where the source says. Returns the ids. Raises StoreError.
    """
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        empty = target.with_name(f".{target.name}.{os.getpid()}")
        snapshot(source, empty)
        with opened(empty) as store:
            for table in TABLES[::-1]:
                store.execute(f"delete from {table}")
        with contextlib.closing(sqlite3.connect(empty)) as store:
            store.execute("vacuum")
        empty.replace(target)
    with opened(target) as store:
        store.execute("attach database ? as other", [address_of(source)])
        ours, theirs = (
            store.execute(f"select version_num from {place}.alembic_version").fetchone()[0]
            for place in ("main", "other")
        )
        if ours != theirs:
            raise StoreError(
                f"{source} has the schema {theirs}, {target} {ours}; rule: one MLflow version wrote all; "
                f"next: mlflow db upgrade sqlite:///{source if ours > theirs else target}, or remove {target}"
            )
        experiments = {}
        for number, name in store.execute("select experiment_id, name from other.experiments").fetchall():
            experiments[number] = _experiment(store, number, name, artifacts)
        ids = []
        for run_id, number in store.execute("select run_uuid, experiment_id from other.runs").fetchall():
            for table in TABLES:
                columns = [row[1] for row in store.execute(f"pragma other.table_info({table})")]
                listed = ", ".join(f'"{column}"' for column in columns)
                store.execute(
                    f"insert or replace into main.{table} ({listed}) "
                    f"select {listed} from other.{table} where run_uuid = ?",
                    [run_id],
                )
            store.execute("update runs set experiment_id = ? where run_uuid = ?", [experiments[number], run_id])
            if artifacts is not None:
                store.execute("update runs set artifact_uri = ? where run_uuid = ?", [home(artifacts, run_id), run_id])
            ids.append(str(run_id))
        return ids


def _experiment(store: sqlite3.Connection, number: int, name: str, artifacts: Path | None) -> int:
    """The target's number of an experiment of the source, made where it is not there."""
    found = store.execute("select experiment_id from main.experiments where name = ?", [name]).fetchone()
    if found is None:
        columns = [row[1] for row in store.execute("pragma other.table_info(experiments)") if row[1] != "experiment_id"]
        listed = ", ".join(f'"{column}"' for column in columns)
        added = store.execute(
            f"insert into main.experiments ({listed}) select {listed} from other.experiments where experiment_id = ?",
            [number],
        )
        found = (added.lastrowid,)
    if artifacts is not None:
        location = artifacts.absolute().as_uri()
        store.execute("update main.experiments set artifact_location = ? where experiment_id = ?", [location, found[0]])
    return int(found[0])


def runs_under(prefix: str, storage: Storage) -> list[str]:
    """Names of the runs that have a record under a prefix. Raises TransferError."""
    found = Remote(prefix.rstrip("/"), storage).listed(f"*/{RECORD}")
    return sorted(name for key in found if "/" not in (name := key.removesuffix(f"/{RECORD}")))


def gather(source: str, into: Path, storage: Storage, names: Sequence[str] = ()) -> list[str]:
    """Merge what ``source`` (a bucket's prefix, a store's folder or file) holds into the store ``into``; the ids."""
    target, ids = into / DATABASE, []
    if not source.startswith("s3://"):
        database = Path(source.removeprefix("sqlite:///")) if source.startswith("sqlite:") else Path(source) / DATABASE
        if not database.is_file():
            raise StoreError(f"{database} is not there; rule: a store is made by the first run; next: make minitest")
        return merge(database, target)
    found = runs_under(source, storage)
    if lacking := sorted(set(names) - set(found)):
        raise StoreError(
            f"{source} has no record of {', '.join(lacking)}; rule: NAME is a run's name; "
            f"next: one of {', '.join(found[:10]) or 'none: there are none yet'}"
        )
    for name in names or found:
        fetched = into / ".fetched" / name
        mirror = StoreMirror(fetched, f"{source.rstrip('/')}/{name}", storage, lambda: None)
        if mirror.pull():  # else it was removed since the listing
            place_artifacts(fetched, into)
            ids += merge(mirror.pulled[0], target, into / ARTIFACTS)
    return ids


def table(database: Path, ids: Sequence[str]) -> list[str]:
    """A line a run: id, name, status, last step, wmtp_loss, artifacts; the newest first."""
    lines = []
    with opened(database) as store:
        query = "select run_uuid, name, status, artifact_uri from runs order by start_time desc"
        for run_id, name, status, address in store.execute(query):
            if run_id in ids:
                loss = store.execute(
                    "select step, value from latest_metrics where run_uuid = ? and key = 'wmtp_loss'", [run_id]
                ).fetchone()
                folder = Path(unquote(str(address).removeprefix("file://")))
                count = sum(path.is_file() for path in folder.rglob("*"))
                step, value = (loss[0], f"{loss[1]:.3f}") if loss else ("-", "-")
                lines.append(f"{run_id}\t{name}\t{status}\t{step}\t{value}\t{count}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="s3://bucket/prefix, a store's folder, or sqlite:///FILE")
    parser.add_argument("--into", type=Path, required=True, help="the folder of the merged store")
    parser.add_argument("--name", action="append", default=[], help="only this run; again for more")
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--retry-wait-s", type=int, default=10)
    parser.add_argument("--stall-s", type=int, default=30)
    args = parser.parse_args(argv)
    storage = Storage(retries=args.retries, retry_wait_s=args.retry_wait_s, stall_s=args.stall_s)
    ids: list[str] = []
    code = 0
    try:
        for source in args.source:
            ids += gather(source, args.into, storage, args.name)
    except (StoreError, DamagedError, sqlite3.Error) as error:
        code = 2 if isinstance(error, StoreError) else 13
        print("mlflow    FAIL  " + "\n                ".join(str(error).split("; ")), file=sys.stderr)
    except (TransferError, CheckpointError) as error:
        code = 11
        print(f"mlflow    FAIL  {error}", file=sys.stderr)
    if ids and not code:
        print(*table(args.into / DATABASE, ids), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
