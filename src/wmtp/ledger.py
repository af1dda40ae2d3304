"""Where a run's seconds went, over all its parts, and what share of them trained: read from its record.

Every moment from the start of a part to its end has one kind: of what was going on, the line that stands first in
`KINDS`. What a kill took back (steps that were trained again), and what came after the last step of a part that failed,
is lost. So the kinds add up to the seconds that were paid for.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp.record import Part, lines, parts_of, read_json

# Kind, what it is to a reader, the phases of `phases.jsonl` that are it. A moment has the first that covers it.
KINDS = (
    ("redone", "steps that a kill took back", ()),
    ("first step", "compilation, caches: the first step of a part", ("first step",)),
    ("training", "steps that count", ()),
    ("saving", "checkpoints, as far as steps wait for them", ("save",)),
    ("evaluation", "held-out loss", ("held out",)),
    ("pretraining", "stage 1 of the critic", ("pretrain",)),
    ("scoring", "reference or reward model over the data", ("scores",)),
    ("load", "model, optimizer, checkpoint into memory", ("load",)),
    ("end", "last evaluation, export, last upload", ("end",)),
    ("data", "read and tokenized", ("data",)),
    ("sync", "models from the bucket", ("sync",)),
    ("vocabularies", "one vocabulary in all models", ("vocabularies",)),
    ("start", "Python, torch, the process group", ("imports", "ranks")),
    ("lost", "after the last step of a part that failed or was killed", ()),
    ("other", "none of these: between phases, and until the last process has ended", ()),
)
ORDER = [kind for kind, _, _ in KINDS]
MEANING = {kind: meaning for kind, meaning, _ in KINDS}
_KIND_OF = {phase: kind for kind, _, phases in KINDS for phase in phases}


@dataclass(frozen=True)
class Stretch:
    """``kind`` from ``began`` to ``ended``, in seconds since the epoch."""

    kind: str
    began: float
    ended: float


@dataclass(frozen=True)
class Ledger:
    """The seconds of a run by kind, in the order of `KINDS`; those that are none are left out."""

    seconds: dict[str, float]
    stretches: list[Stretch]
    parts: list[Part]
    steps: int
    redone: int

    @property
    def total(self) -> float:
        """Seconds that were paid for: of all parts, from start to end."""
        return sum(part.ended - part.began for part in self.parts)

    @property
    def goodput(self) -> float | None:
        """The share of them in which steps that count were trained."""
        return self.seconds.get("training", 0.0) / self.total if self.total > 0 else None

    def cost(self, price_per_hour: float | None) -> float | None:
        return None if price_per_hour is None else self.total / 3600 * price_per_hour


def step_stretches(steps: Iterable[dict[str, Any]], kind: str) -> list[Stretch]:
    """The steps of a record; an older line, without its time, is none."""
    return [Stretch(kind, s["at"] - s["step_seconds"], s["at"]) for s in steps if "at" in s and s.get("step_seconds")]


def ledger_of(folder: Path) -> Ledger:
    """Read a record (logs/RUN of a node, or the bucket's copy)."""
    parts = parts_of(folder)
    steps, again = lines(folder / "steps.jsonl"), lines(folder / "redone.jsonl")
    training, redone = step_stretches(steps, "training"), step_stretches(again, "redone")
    told = [
        Stretch(_KIND_OF[p["phase"]], p["began"], p["ended"])
        for p in lines(folder / "phases.jsonl")
        if p.get("phase") in _KIND_OF
    ]
    told += [Stretch("evaluation", e["began"], e["at"]) for e in lines(folder / "evals.jsonl") if "began" in e]
    seconds = dict.fromkeys(ORDER, 0.0)
    stretches: list[Stretch] = []
    left = [*redone, *training, *told]
    for part in parts:
        mine = [s for s in left if s.ended > part.began and s.began < part.ended]
        left = [s for s in left if s.ended <= part.began or s.began >= part.ended]  # clocks of two nodes may differ
        failed = not part.alive and part.code not in (0, 75)
        last = max((s.ended for s in mine), default=part.began)
        if failed:
            mine.append(Stretch("lost", last, part.ended))
        for stretch in partition(part, mine):
            seconds[stretch.kind] += stretch.ended - stretch.began
            stretches.append(stretch)
    known = {kind: s for kind, s in seconds.items() if s > 0}
    return Ledger(known, stretches, parts, len(steps), len(again))


def partition(part: Part, found: list[Stretch]) -> list[Stretch]:
    """The part, cut where anything begins or ends: each piece with the kind that stands first, neighbours joined."""
    rank = {kind: n for n, kind in enumerate(ORDER)}
    ends = {t for s in found for t in (s.began, s.ended) if part.began < t < part.ended}
    cuts = sorted({part.began, part.ended} | ends)
    best = [rank["other"]] * (len(cuts) - 1)
    for stretch in found:
        first = bisect.bisect_left(cuts, max(stretch.began, part.began))
        last = bisect.bisect_left(cuts, min(stretch.ended, part.ended))
        for i in range(first, last):
            best[i] = min(best[i], rank[stretch.kind])
    out: list[Stretch] = []
    for i, kind in enumerate(best):
        name = ORDER[kind]
        if out and out[-1].kind == name and out[-1].ended == cuts[i]:
            out[-1] = Stretch(name, out[-1].began, cuts[i + 1])
        else:
            out.append(Stretch(name, cuts[i], cuts[i + 1]))
    return out


def bytes_from_bucket(folder: Path) -> int | None:
    """What the syncs of all parts fetched; None where none is recorded."""
    found = lines(folder / "sync.jsonl")
    return sum(line.get("downloaded_bytes", 0) for line in found) if found else None


def price_of(folder: Path) -> float | None:
    """Dollars an hour, as the configuration said when the run began."""
    found = read_json(folder / "facts.json").get("price_per_hour")
    return float(found) if isinstance(found, int | float) else None
