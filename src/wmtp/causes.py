"""Why a run ended: the class of its cause, the line that shows it, the command that goes on.

    python -m wmtp.causes FOLDER --code N [--said TEXT] [--status N] [--kills N] [--limit-gib X] [--hours]

FOLDER is the run's record on the node, N the code that it ends with. Leaves failure.json, failure.md and bundle.tar.gz
in the folder (the last of the log, settings, phases, memory, tracebacks, without secrets). Standard output: the
paragraph. It explains a failure and must not add one: what it can't do, it says. Exit codes: 0 done, 1 not all was.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import sys
import tarfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

OUT_OF_MEMORY, DATA, MODEL_FILES, VOCABULARY = "out of memory", "data", "model files", "vocabulary"
NETWORK, PREEMPTED, NUMERICS, HOURS, DISK = "network", "preempted", "numerics", "hours", "disk"
CONFIGURATION, CREDENTIALS, BUG, HANG = "configuration", "credentials", "bug", "hang"
KILLED, UNKNOWN = "killed", "unknown"  # by the system, and nothing says why; nothing says anything
CLASSES = (
    *(OUT_OF_MEMORY, DATA, MODEL_FILES, VOCABULARY, NETWORK, PREEMPTED, NUMERICS, HOURS, DISK),
    *(CONFIGURATION, CREDENTIALS, BUG, HANG, KILLED, UNKNOWN),
)
BAD_INPUT, RESUME_ME = 2, 75
BY_CODE = {
    **{2: CONFIGURATION, 3: CREDENTIALS, 10: DISK, 11: NETWORK, 12: NETWORK, 13: MODEL_FILES, 14: VOCABULARY},
    **{130: PREEMPTED, 143: PREEMPTED},
}
BY_NAME = {
    **dict.fromkeys(("OutOfMemoryError", "MemoryError"), OUT_OF_MEMORY),
    **dict.fromkeys(("ModelError", "ModelUnreadableError", "ManifestError"), MODEL_FILES),
    **dict.fromkeys(("TokenizerError", "SafetensorError"), MODEL_FILES),
    **dict.fromkeys(("TransferError", "DamagedError", "BucketError", "DistNetworkError", "DistStoreError"), NETWORK),
    **dict.fromkeys(("ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError"), NETWORK),
    **dict.fromkeys(("TimeoutError", "gaierror"), NETWORK),
    **dict.fromkeys(("NotFiniteError", "FloatingPointError"), NUMERICS),
    **dict.fromkeys(("ConfigError", "PathError", "BadInput"), CONFIGURATION),
    **{"DataError": DATA, "VocabError": VOCABULARY},
}
"""Classes of exceptions by their names, so that none is imported to be known."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR)
UNREACHED = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
KERNEL_KILLED = re.compile(r"out of memory: killed process|oom-kill|oom_reaper", re.IGNORECASE)
MEMORY_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc",
    re.IGNORECASE,
)
NETWORK_WORDS = re.compile(
    r"connection (closed|reset|refused|timed out)|gloo/transport|timed out waiting|watchdog caught collective"
    r"|NCCL (error|timeout)|NCCL communicator was aborted|broken pipe|no route to host|name resolution",
    re.IGNORECASE,
)
PHASES = ("imports", "ranks", "data", "models", "scores", "load", "pretrain", "held out", "first step", "train", "end")
"""Of the trainer, in order; the end: held-out loss, export, upload."""
LOG_LINES, LOG_BYTES, FILE_BYTES = 500, 1 << 18, 1 << 21
NODE_LINES = 360  # an hour
FULL = 0.95  # of the limit: what is killed here was killed for memory


# ---- of an exception -------------------------------------------------------------------------------------------------


def of_words(text: str) -> str | None:
    """The class that only words tell: torch and the system raise RuntimeError and OSError for everything."""
    return OUT_OF_MEMORY if MEMORY_WORDS.search(text) else NETWORK if NETWORK_WORDS.search(text) else None


def of_names(names: Iterable[str], text: str) -> str | None:
    """The class of an exception by the names of its class and of those above it, else by its words."""
    names = list(names)
    if known := next((BY_NAME[name] for name in names if name in BY_NAME), None):
        return known
    # AcceleratorError and DistBackendError are named apart: a traceback tells no class above.
    plain = {"RuntimeError", "OSError", "AcceleratorError", "DistBackendError", "DistError"}.intersection(names)
    if plain and (told := of_words(text)):
        return told
    return NETWORK if {"DistBackendError", "DistError"}.intersection(names) else None


def of_error(error: BaseException) -> str:
    """The class of what was raised, or of what it was raised from; a bug where neither is known."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        if (kind := getattr(one, "kind", None)) in CLASSES:
            return str(kind)
        if isinstance(one, OSError) and (found := _of_system(one)):
            return found
        if found := of_names([c.__name__ for c in type(one).__mro__], str(one)):
            return found
        one = one.__cause__
    return BUG


def _of_system(error: OSError) -> str | None:
    if error.errno in UNWRITABLE:
        return DISK
    if error.errno == errno.ENOMEM:
        return OUT_OF_MEMORY
    if error.errno in UNREACHED:
        return NETWORK
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str | os.PathLike):
        parts = Path(os.fspath(error.filename)).parts
        return MODEL_FILES if "models" in parts else DATA if "datasets" in parts else None
    return None


def of_end(code: int, cause: str | None) -> str | None:
    """The class of an end that no exception made; None for a good one, or where the code says too little."""
    if code == RESUME_ME:
        return HOURS if cause == "max_hours" else PREEMPTED
    return BY_CODE.get(code)


# ---- of a record -----------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without colour, and without what a line of the story begins with."""
    return re.sub(r"^\S{1,9}( \S+)?\s+FAIL\s+", "", re.sub(r"\x1b\[[0-9;]*m", "", text)).strip()


@dataclass(frozen=True)
class Line:
    """A line of a file of the record; ``number`` from 1, 0 where the file is one line."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        """Where it stands and what it says, without the head that a line of the story has."""
        where = f"{self.file}:{self.number}: " if self.number else f"{self.file}: " if self.file else ""
        return where + plain(self.text)


def raised(lines: Iterable[str]) -> tuple[int, str] | None:
    """Number (from 1) and text of the line that names a traceback's last exception; its message may go on after it."""
    found, inside = None, False
    for number, line in enumerate(lines, 1):
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line.strip() and not line[0].isspace():
            found, inside = (number, line.rstrip()), False
    return found


def number(value: object) -> float | None:
    """A figure of a record; None for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Record:
    """The folder of a run, read as far as it was written by the part of the run that ends now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        began = [at for part in self.rows("parts.jsonl") if (at := number(part.get("began"))) is not None]
        self.began = began[-1] if began else 0.0

    def text(self, name: str, most: int = FILE_BYTES) -> str:
        """The last bytes of a file, empty where it is not there."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - most, 0))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def object(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.text(name))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file that are JSON objects: a kill may have torn the last."""
        out = []
        for line in self.text(name).splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                out.append(row)
        return out

    def fresh(self, path: Path) -> bool:
        """Whether this part of the run wrote it; clocks of file systems are coarse."""
        try:
            return path.stat().st_mtime >= self.began - 1
        except OSError:
            return False

    def named(self, pattern: str) -> list[Path]:
        """The files of this part, the oldest first."""
        return sorted(filter(self.fresh, self.folder.glob(pattern)), key=lambda path: path.stat().st_mtime)

    @cached_property
    def log(self) -> list[Line]:
        """The last lines of the log that this part wrote: the startup script opens each with the run's name."""
        try:
            before = max((self.folder / "log.txt").stat().st_size - LOG_BYTES, 0)
            with (self.folder / "log.txt").open("rb") as file:
                skipped = sum(file.read(min(1 << 20, before - at)).count(b"\n") for at in range(0, before, 1 << 20))
        except OSError:
            return []
        text = self.text("log.txt", LOG_BYTES).split("\n")
        lines = [Line("log.txt", skipped + n, line) for n, line in enumerate(text, 1) if line.strip()]
        opening = re.compile(rf"^startup\s+{re.escape(self.folder.name)}: ")
        first = max((i for i, line in enumerate(lines) if opening.match(line.text)), default=0)
        return lines[first:]

    @cached_property
    def tracebacks(self) -> dict[int, Line]:
        """By rank, in the order of their writing: the line that names the exception."""
        out = {}
        for path in self.named("traceback-rank-*.log"):
            lines = self.text(path.name).splitlines()
            number, text = raised(lines) or (len(lines), lines[-1] if lines else "")
            if rank := re.search(r"rank-(\d+)\.log$", path.name):
                out[int(rank[1])] = Line(path.name, number, text)
        return out

    def logged(self, pattern: str) -> Line | None:
        """The last line of this part's log in which ``pattern`` is found."""
        return next((line for line in reversed(self.log) if re.search(pattern, line.text)), None)


def of_traceback(line: Line) -> str:
    """The class of the exception that the line names."""
    name, _, text = line.text.partition(": ")
    return of_names([name.rpartition(".")[2]], text) or BUG


@dataclass(frozen=True)
class End:
    """What the startup script knows of the end: ``code`` is the run's, ``said`` its own words, ``status`` the child's.

    ``kills`` counts those that the kernel made for memory since the start; ``hours``: they are used up.
    """

    code: int
    said: str = ""
    status: int | None = None
    kills: int = 0
    limit_gib: float | None = None
    hours: bool = False

    @property
    def of_training(self) -> bool:
        """Whether the trainer's exit file tells of this end, not of an earlier one."""
        return not self.said or re.search(r"(^|; )(training ended|the trainer) ", self.said) is not None


def exit_file(record: Record, end: End) -> dict[str, Any]:
    """What the trainer said of this end; nothing where it is not the one who ended."""
    there = end.of_training and record.fresh(record.folder / "exit.json")
    ended = record.object("exit.json") if there else {}
    return ended if ended.get("code") == end.code else {}


def diagnose(record: Record, end: End) -> tuple[str, Line]:
    """Class and evidence. Exception and code decide; words only where there is nothing else."""
    said = Line("", 0, end.said.partition("\n")[0] or f"ended with {end.code}")
    ended = exit_file(record, end)
    if end.hours and (end.code == RESUME_ME or not ended):
        return HOURS, said
    kind = (
        ended.get("class") if ended.get("class") in CLASSES else of_end(int(ended.get("code") or 0), ended.get("cause"))
    )
    # A rank that the system ended says nothing itself: the others see its connection close, and tell of that.
    if kind in (None, NETWORK) and end.code not in ({*BY_CODE, RESUME_ME}) and (found := _of_signal(record, end)):
        return found
    if kind or ended:
        # A line that ends with a colon says nothing yet: what it announces is on the next.
        cause = re.sub(r":\n\s*", ": ", str(ended.get("cause") or "")).partition("\n")[0]
        first = re.match(r"rank (\d+): ", cause)
        line = record.tracebacks.get(int(first[1])) if first else None
        told = Line("exit.json", 0, plain(cause) or said.text)
        return kind or (of_traceback(line) if line else of_words(cause) or BUG), line or told
    if kind := of_end(end.code, None):
        return kind, (record.logged(r"^(?!startup).*\bFAIL\b") if " ended with " in end.said else None) or said
    if record.tracebacks:
        line = next(iter(record.tracebacks.values()))
        return of_traceback(line), line
    if spoken := raised(line.text for line in record.log):
        line = record.log[spoken[0] - 1]
        return of_traceback(line), line
    told_last = next((line for line in reversed(record.log[-50:]) if of_words(line.text)), None)
    if told_last:
        return of_words(told_last.text) or UNKNOWN, told_last
    return UNKNOWN, record.logged(r"\bFAIL\b") or said


def _of_signal(record: Record, end: End) -> tuple[str, Line] | None:
    """Of a rank, or the trainer itself, that ended by a signal."""
    line = record.logged(r"^launch\s+rank \d+ ended by SIG")
    if line:
        name = line.text.partition(" ended by ")[2].split(":")[0].strip()
        told = plain(line.text).removeprefix("launch").partition(":")[0].strip()
        line = Line(line.file, line.number, told)
    elif end.status is not None and 128 < end.status < 160:
        name = {137: "SIGKILL", 143: "SIGTERM", 130: "SIGINT"}.get(end.status, f"signal {end.status - 128}")
        line = Line("", 0, f"the process ended by {name}")
    else:
        return None
    if name in ("SIGTERM", "SIGINT"):
        return PREEMPTED, line
    if name == "SIGKILL":
        if kernel := next((one for one in reversed(record.log) if KERNEL_KILLED.search(one.text)), None):
            return OUT_OF_MEMORY, kernel
        if end.kills:
            more = f"; the kernel killed {end.kills} process{'es' * (end.kills > 1)} for memory"
            return OUT_OF_MEMORY, Line(line.file, line.number, line.text + more)
        known = memory(record, end.limit_gib)
        rss, limit, free = (known.get(key) for key in ("rss_gib", "limit_gib", "free_gib"))
        if limit and ((rss or 0) >= FULL * limit or (free is not None and free <= (1 - FULL) * limit)):
            return OUT_OF_MEMORY, line
        return KILLED, line
    words = next((one for one in reversed(record.log) if of_words(one.text)), None)
    return (of_words(words.text) or BUG, words) if words else (BUG, line)


def memory(record: Record, limit_gib: float | None) -> dict[str, Any]:
    """What was last known of memory, in GiB: resident and free on the node, its limit, used and whole of each GPU."""
    out: dict[str, Any] = {}
    if rows := record.rows("node.jsonl"):
        last = rows[-1]
        out = {"at": last.get("at"), "rss_gib": number(last.get("rss_gib"))}
        out["free_gib"] = number(last.get("memory_free_gib"))
        gpus = last.get("gpus")
        for gpu in gpus if isinstance(gpus, list) else ():
            used, total = (number(gpu.get(f"memory_{what}_mib")) for what in ("used", "total"))
            if used is not None and total:
                known = {"used_gib": round(used / 1024, 1), "total_gib": round(total / 1024, 1)}
                out.setdefault("gpus", []).append({"index": gpu.get("index"), **known})
    elif steps := record.rows("steps.jsonl"):
        out = {"at": steps[-1].get("at"), "rank_0_gib": number(steps[-1].get("memory_gib"))}
    return out | ({"limit_gib": limit_gib} if limit_gib else {})


def memory_told(known: Mapping[str, Any]) -> str:
    """The fullest GPU, or the node's own."""
    if gpus := known.get("gpus"):
        full = max(gpus, key=lambda gpu: float(gpu["used_gib"] / gpu["total_gib"]))
        return f"GPU {full['index']}: {full['used_gib']:.1f} of {full['total_gib']:.1f} GiB"
    used = known.get("rss_gib") or known.get("rank_0_gib")
    limit = known.get("limit_gib")
    return f"{used:.1f} GiB{f' of {limit:.1f} GiB' if limit else ''}" if used else ""


def phase_of(record: Record, end: End) -> str:
    """Where the run was when it ended: a stage of the startup script, or what the trainer had begun."""
    if stage := re.match(r"(?:MAX_HOURS: .*; )?(sync|vocabularies) (?:ended with|can't be)", end.said):
        return stage[1]
    if not end.of_training:
        return "prepare"
    rows = [row for row in record.rows("phases.jsonl") if (number(row.get("ended")) or 0.0) >= record.began]
    done = [str(row.get("phase")) for row in rows if row.get("by") == "train" and row.get("phase") != "save"]  # within
    if not done:
        return PHASES[0] if end.said or not rows else str(rows[-1].get("phase"))
    if done[-1] not in PHASES:
        return f"after {done[-1]}"
    after = PHASES.index(done[-1]) + 1
    if done[-1] == "load" and "critic" not in _facts(record)["algo"]:
        after += 1  # stage 1 is the critic's alone
    return PHASES[after] if after < len(PHASES) else "end"


# ---- the next command ------------------------------------------------------------------------------------------------


def _facts(record: Record) -> dict[str, Any]:
    """facts.json, and what the environment says where the run ended before it was written."""
    said = {key.lower(): os.environ.get(key) or "" for key in ("ENV", "ALGO", "LAUNCHER")}
    return said | {key: value for key, value in record.object("facts.json").items() if value}


def setting(facts: Mapping[str, Any], key: str) -> Any:
    """A resolved setting by its dotted key, from `config` or `recipe` of the facts; None where it is not known."""
    both = facts.get("config") if isinstance(facts.get("config"), dict) else {}
    for base in (facts.get("recipe"), both, *((both or {}).get(half) for half in ("recipe", "config"))):
        at: Any = base
        for part in key.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if at is not None:
            return at
    return None


def launched(env: str, launcher: str) -> str:
    """The word that a command needs where this launcher is not the environment's own."""
    return f" LAUNCHER={launcher}" if launcher == "docker" or (launcher == "vessl" and env == "minitest") else ""


def again(run: str, facts: Mapping[str, Any], changed: Mapping[str, Any] | None = None, allow: str = "") -> str:
    """The command with which the run goes on under its name, with settings that are others than before."""
    env, algo, launcher = (str(facts.get(key) or "") for key in ("env", "algo", "launcher"))
    by = launched(env, launcher)
    which = f"ALGO={algo} RUN_NAME={run}"
    words = [os.environ.get("SET") or "", *(f"{key}={value}" for key, value in (changed or {}).items())]
    more = f' SET="{" ".join(filter(None, words))}"' if any(words) else ""
    more += f' ALLOW="{allow}"' if allow else ""
    if env == "test":
        return f"make train {which}{more}"
    if launcher == "local":
        return f"make minitest {which}{more}"
    if not changed or not env:
        return f"make resume RUN_ID={run}{by}"
    return f"make submit ENV={env}{by} {which} RESUME=1{more}"


def next_command(kind: str, record: Record, evidence: Line) -> str:
    """The one command that a person types next."""
    run, facts = record.folder.name, _facts(record)
    env, algo = facts["env"] or "production", facts["algo"]
    here = facts["launcher"] == "local" or env == "test"
    pair = f"ENV={env}{f' ALGO={algo}' if algo else ''}{launched(env, facts['launcher'])}"
    chosen = f' SET="{os.environ["SET"]}"' if os.environ.get("SET") else ""

    def read(pattern: str) -> str:
        files = [path.name for path in record.named(pattern)]
        shown = evidence.file if evidence.number and kind != HANG else next(iter(files), "log.txt")
        return f"less '{record.folder / shown}'" if here else f"make report RUN_ID={run}"

    if kind == OUT_OF_MEMORY:
        size, times = setting(facts, "data.train.batch_size"), setting(facts, "train.accumulation_steps") or 1
        if isinstance(size, int) and size > 1:  # as many rows a step as before
            smaller = size // 2 if size % 2 == 0 else 1
            keys = {"data.train.batch_size": smaller, "train.accumulation_steps": times * size // smaller}
            return again(run, facts, keys, " ".join(keys))
        if setting(facts, "devices.fsdp.activation_ckpt") is False:
            return again(run, facts, {"devices.fsdp.activation_ckpt": "true"})
        return f"make dryrun {pair}{chosen}"
    if kind == NUMERICS and isinstance(rate := setting(facts, "optim.lr"), int | float):
        return again(run, facts, {"optim.lr": f"{rate / 2:g}"}, "optim.lr")
    if kind == MODEL_FILES:
        models = setting(facts, "paths.models")
        known = models.items() if isinstance(models, dict) else ()
        names = {role: str(uri).rstrip("/").rpartition("/")[2] for role, uri in known}
        role = next((role for role, name in names.items() if name and name in evidence.text), None)
        if env == "test":
            return again(run, facts, {f"paths.models.{role}": "file://…"} if role else None)
        if here:  # its bucket ended with it
            return f"make dryrun {pair}{chosen}"
        return f"make verify-models NAME={names[role]}" if role else "make models"
    if kind == DISK:
        return "make cache EVICT=unused" if here else again(run, facts, {"paths.checkpoints.keep_last": 1})
    if kind == DATA:
        sets = setting(facts, "paths.datasets")
        synced = {str(row["dataset"]): str(row["dataset"]) for row in record.rows("sync.jsonl") if "dataset" in row}
        # The sync is told before the settings are: a run that reads no data gets no further.
        for name, uri in (sets if isinstance(sets, dict) else synced).items():
            # No dry run reads what is in the bucket; `name` is where the message begins.
            if not str(uri).startswith("file:") and re.match(rf"{re.escape(str(name))}[/:]", evidence.text):
                published = str(uri).rstrip("/").rpartition("/")[2]
                return f"make publish-models AS=datasets FROM=… NAMES={published} FORCE=1"
    if kind in (DATA, CONFIGURATION):
        return f"make dryrun {pair}{chosen}"
    if kind == VOCABULARY:
        return f"make check-vocab {pair}"
    if kind == CREDENTIALS:
        return "make models"  # asks the bucket with the credentials that are here
    if kind in (BUG, HANG, UNKNOWN):
        return read("flight-rank-*.log" if kind == HANG else "traceback-rank-*.log")
    return again(run, facts)


# ---- what is left ----------------------------------------------------------------------------------------------------


def without_secrets(text: str) -> str:
    """``text`` without the values of this environment's secrets, and without passwords in addresses."""
    for name, value in os.environ.items():
        if len(value) > 5 and re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY|CREDENTIALS", name, re.IGNORECASE):
            text = text.replace(value, "***")
    return re.sub(r"//[^@/\s]+@", "//***@", text)


def explain(folder: Path, end: End) -> dict[str, Any]:
    """failure.json: everything that is known of the end."""
    record = Record(folder)
    kind, evidence = diagnose(record, end)
    ended = exit_file(record, end)
    steps = [row["step"] for row in record.rows("steps.jsonl")[-1:] if "step" in row]
    # A rank that was killed is in no exit file: the one that saw it go is.
    of_rank = re.match(r"rank (\d+) ended by ", evidence.text) or re.match(r"rank (\d+): ", str(ended.get("cause")))
    first = of_rank[1] if of_rank else None
    return {
        "run": folder.name,
        "launcher": _facts(record)["launcher"],
        "class": kind,
        "evidence": str(evidence)[:500],
        "phase": phase_of(record, end),
        "step": ended.get("step") if ended else (steps[-1] if steps else None),
        "code": end.code,
        "cause": ended.get("cause") or end.said or None,
        "next": next_command(kind, record, evidence),
        "memory": memory(record, end.limit_gib),
        "ranks": {str(rank): line.text[:500] for rank, line in sorted(record.tracebacks.items())},
        "first_rank": first,
        "at": time.time(),
    }


def paragraph(failure: Mapping[str, Any]) -> str:
    """The failure in a few sentences, without the command."""
    step, evidence = failure["step"], failure["evidence"]
    where = f"in {failure['phase']}" + (f" after step {step}" if step else "")
    ended, kind = "failed", failure["class"]
    # Nobody takes a person's own machine away: it was Ctrl-C, or a kill.
    if failure["launcher"] == "local" and kind == PREEMPTED:
        ended, kind = "stopped", "told to end"
    if failure["code"] == RESUME_ME:
        return f"{failure['run']} stopped: {kind}, {where}, everything saved: {evidence}."
    evidence = evidence.partition("; next: ")[0]
    shown = evidence if len(evidence) <= 450 else evidence[:449] + "…"
    out = [f"{failure['run']} {ended}: {kind}, {where} (code {failure['code']}): {shown.rstrip('.')}."]
    if failure["code"] != BAD_INPUT and (told := memory_told(failure["memory"])):
        out.append(f"Memory when last looked at: {told}.")
    others = [rank for rank in failure["ranks"] if rank != failure["first_rank"]]
    if failure["first_rank"] is not None and others:
        after = f"{'rank' if len(others) == 1 else 'ranks'} {', '.join(others)}"
        out.append(f"Rank {failure['first_rank']} was the first; {after} ended after it.")
    return " ".join(out)


def following(failure: Mapping[str, Any]) -> str:
    """What to do: the cause's own advice, where it gives one, and the command."""
    said = re.search(r"(?:; |\n\s*)next: (.+)", str(failure["cause"]), re.DOTALL)
    own = " ".join(said[1].split()).rstrip(".") if said else ""
    return f"{own}; then: {failure['next']}" if own else str(failure["next"])


def page(kind: str) -> str:
    """What is known of the class, in the repository."""
    return f"docs/failures/{kind.replace(' ', '-')}.md"


def write(path: Path, data: bytes) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_bytes(data)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def packed(record: Record) -> Iterator[tuple[str, str]]:
    """Names and contents of the bundle."""
    yield "log.txt", "".join(record.text("log.txt").splitlines(keepends=True)[-LOG_LINES:])
    yield "node.jsonl", "".join(record.text("node.jsonl").splitlines(keepends=True)[-NODE_LINES:])
    whole = ["facts.json", "exit.json", "failure.json", "failure.md", "phases.jsonl", "parts.jsonl"]
    ranks = sorted(path.name for kind in ("traceback", "flight") for path in record.named(f"{kind}-rank-*.log"))
    for name in (*whole, *ranks):
        yield name, record.text(name)


def pack(folder: Path) -> None:
    """bundle.tar.gz: what a person needs who was not there."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as archive:
        for name, text in packed(Record(folder)):
            if not text:
                continue
            data = without_secrets(text).encode()
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size, entry.mtime = len(data), int(time.time())
            archive.addfile(entry, io.BytesIO(data))
    write(folder / "bundle.tar.gz", out.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.causes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the run's record: WMTP_APP_ROOT/logs/RUN")
    parser.add_argument("--code", type=int, required=True, help="the run's exit code")
    parser.add_argument("--said", default="", help="the startup script's own words")
    parser.add_argument("--status", type=int, help="that of the process that ended the run")
    parser.add_argument("--kills", type=int, default=0, help="made by the kernel for memory since the start")
    parser.add_argument("--limit-gib", type=float, help="memory that the node may use")
    parser.add_argument("--hours", action="store_true", help="MAX_HOURS are used up")
    args = parser.parse_args(argv)
    folder, code = args.folder.absolute(), 0
    try:
        end = End(args.code, args.said, args.status, args.kills, args.limit_gib, args.hours)
        failure = json.loads(without_secrets(json.dumps(explain(folder, end))))
        told = paragraph(failure)
        print(textwrap.fill(told, 69, break_long_words=False, break_on_hyphens=False))
        print(f"more: {page(failure['class'])}\nnext: {following(failure)}", flush=True)
    except Exception as error:  # whatever it is, the run's own end is what counts
        print(f"causes    warn  not explained: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    for name, make in (
        ("failure.json", lambda: write(folder / "failure.json", (json.dumps(failure, indent=2) + "\n").encode())),
        ("failure.md", lambda: write(folder / "failure.md", f"{told} Next: `{following(failure)}`\n".encode())),
        ("bundle.tar.gz", lambda: pack(folder)),
    ):
        try:
            make()
        except Exception as error:
            print(f"causes    warn  {folder / name}: {type(error).__name__}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
