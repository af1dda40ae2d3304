"""How a run does, from its record: where it stands, how fast it goes, what is wrong with it.

The record is a folder (`facts.json`, `parts.jsonl`, `phases.jsonl`, `steps.jsonl`, `node.jsonl`, `log.txt`,
`exit.json`): the node's own, or its mirror that came from the bucket. A launcher, where there is one, adds the run's
state. Any file may be absent, and the last line of a growing one may be torn.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from wmtp.ledger import Ledger

TAIL_BYTES = 2**20  # of a growing file, at most: some thousand steps, or a day's figures of a node
NODE_EVERY_S = 10.0
SILENT_HERE_S, SILENT_MIRROR_S = 60.0, 180.0  # a node writes every 10 s; its mirror is renewed every 30
QUIET_S = 1800.0  # before the first step and after the last: loading, scoring, uploading
VALUE_LOSS_MOST = 1e4
RECENT = 5  # steps that a figure or a warning speaks of
EARLIER = 50  # steps before these, which it is compared with
ENDED = ("completed", "failed", "terminated")

Line = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One life of the run: a start of its startup script, to its end. None: it has not ended, or was killed."""

    began: float
    launcher: str = ""
    number: str = ""
    ended: float | None = None
    code: int | None = None


@dataclass
class Seen:
    """All that is known of a run at one moment."""

    name: str
    launcher: str = ""
    """vessl or docker: `status` is what it said. local: the record is this machine's own. Empty: another machine's."""
    number: str = ""
    status: str = ""
    reason: str = ""
    note: str = ""
    """Why the record, or the launcher, could not be asked."""
    facts: Line = field(default_factory=dict)
    exit: Line = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    phases: list[Line] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    evals: list[Line] = field(default_factory=list)
    node: Line = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    checkpoint: tuple[int, float] | None = None
    """Step of the newest whole one, and when it became whole."""
    sign: float | None = None
    """When the record last changed."""
    looked: float = math.inf
    """When the bucket was last asked for a mirror: what came later is not known."""
    record: Path | None = None
    alive: bool = False
    """A process of this run is at work on this machine."""
    ledger: Ledger | None = None
    """Where the seconds went; counted less often than the rest."""
    moved: int | None = None
    """Bytes that came from the bucket."""
    now: float = field(default_factory=time.time)

    @property
    def until(self) -> float:
        """The moment that the record speaks of."""
        return min(self.now, self.looked)

    @property
    def recorded(self) -> bool:
        """Whether there is any record so far."""
        return bool(self.facts or self.parts or self.phases or self.steps or self.exit)

    @property
    def whole_log(self) -> str:
        """What shows all of the log."""
        if self.status:
            return f"make logs RUN_ID={self.number or self.name}"
        if self.record is None:
            return ""
        file, here = self.record / "log.txt", Path.cwd()
        return str(file.relative_to(here) if file.is_relative_to(here) else file)

    @property
    def total(self) -> int | None:
        total = self.facts.get("total_steps")
        return int(total) if isinstance(total, int | float) else None

    @property
    def step(self) -> int | None:
        return int(self.steps[-1]["step"]) if self.steps else None


@dataclass(frozen=True)
class Standing:
    """Where a run stands: a word for it, whether it goes on, whether it failed, and why."""

    word: str
    live: bool
    failed: bool = False
    why: str = ""


# ---- reading -----------------------------------------------------------------------------------------------------


def tail(path: Path, most: int = TAIL_BYTES) -> list[str]:
    """The whole lines among the last ``most`` bytes; none where there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - most, 0))
            raw = file.read()
    except OSError:
        return []
    text = raw.decode("utf-8", "replace")
    if size > most:
        text = text.partition("\n")[2]
    return text.splitlines()


def lines_of(path: Path, *needed: str, most: int = TAIL_BYTES) -> list[Line]:
    """The lines of a .jsonl that are whole and have numbers by the ``needed`` names."""

    def parsed() -> Iterator[Line]:
        for line in tail(path, most):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and all(number(found, key) is not None for key in needed):
                yield found

    return list(parsed())


def object_of(path: Path) -> Line:
    """A small JSON file; empty where it is absent or can't be understood."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def number(line: Line, key: str) -> float | None:
    """A figure of a line; None where it is absent or null."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def parts_of(lines: list[Line]) -> list[Part]:
    """A line with `began` begins a part, one with `ended` ends it."""
    parts: list[Part] = []
    for line in lines:
        if (began := number(line, "began")) is not None:
            parts.append(Part(began, str(line.get("launcher") or ""), str(line.get("number") or "")))
        elif parts and parts[-1].ended is None and (ended := number(line, "ended")) is not None:
            code = number(line, "code")
            last = parts[-1]
            parts[-1] = Part(last.began, last.launcher, last.number, ended, None if code is None else int(code))
    return parts


def newest_checkpoint(folder: Path | None, listing: Path | None) -> tuple[int, float] | None:
    """Of the run's folder on this machine, and of s5cmd's listing of the markers in the bucket (its times are UTC)."""
    found: list[tuple[int, float]] = []
    for marker in folder.glob("step-*/.complete") if folder else ():
        if step := re.fullmatch(r"step-(\d+)", marker.parent.name):
            found.append((int(step[1]), marker.stat().st_mtime))
    for line in tail(listing) if listing else ():
        if entry := re.match(r"(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) .*\bstep-(\d+)/\.complete$", line.strip()):
            found.append((int(entry[2]), float(calendar.timegm(time.strptime(entry[1], "%Y/%m/%d %H:%M:%S")))))
    return max(found, default=None)


def plain(line: str) -> str:
    """A line of a log as a terminal may show it: what a bar drew last, no escapes, its time in seconds, no date."""
    line = line.rstrip("\r\n").rpartition("\r")[2]
    line = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()].|\x1b.", "", line)
    line = "".join(c if c.isprintable() else " " for c in line.expandtabs())
    return re.sub(r"^\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)(?:\.\d+)?Z ", r"\1 ", line)


def at_work(name: str) -> bool:
    """Whether a process of this machine trains a run of that name (Linux; elsewhere the record alone says)."""
    wanted = f"\0--run-name\0{name}\0".encode()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in file.read_bytes():
                return True
        except OSError:
            continue
    return False


def read(
    name: str,
    launcher: str = "",
    number: str = "",
    record: Path | None = None,
    look: Path | None = None,
    checkpoints: Path | None = None,
) -> Seen:
    """What ``record`` holds; ``look`` is what a stage found: `state` (status, reason), `log`, `checkpoints`, `note`."""
    seen = Seen(name, launcher, number, record=record)
    if record is not None:
        seen.facts, seen.exit = object_of(record / "facts.json"), object_of(record / "exit.json")
        seen.parts = parts_of(lines_of(record / "parts.jsonl"))
        seen.phases = lines_of(record / "phases.jsonl", "began", "ended")
        seen.steps = lines_of(record / "steps.jsonl", "step")
        seen.evals = lines_of(record / "evals.jsonl", "step")
        seen.node = next(iter(lines_of(record / "node.jsonl", "at", most=2**14)[-1:]), {})
        seen.log = tail(record / "log.txt", 2**16)
        seen.sign = sign_of(record, launcher == "local")
        if launcher != "local":
            with contextlib.suppress(OSError):
                seen.looked = (record / "record.json").stat().st_mtime
        if not seen.number and seen.parts and launcher != "local":
            seen.number = seen.parts[-1].number
        if seen.parts and written(record / "exit.json") < seen.parts[-1].began:
            seen.exit = {}  # of the part before
    if look is not None:
        state = ((tail(look / "state") or [""])[0] + "\t\t").split("\t")
        seen.status, seen.reason = state[0], state[1]
        seen.log = tail(look / "log", 2**18) or seen.log
        seen.note = " ".join(tail(look / "note"))
    seen.log = [line for text in seen.log if (line := plain(text)).strip()]
    seen.checkpoint = newest_checkpoint(checkpoints, look / "checkpoints" if look else None)
    if launcher == "local" and seen.sign is not None and seen.now - seen.sign > 2 * NODE_EVERY_S:
        seen.alive = at_work(name)
    return seen


def written(path: Path) -> float:
    """When a file was written; the end of time where it is not there, or is a mirror's, whose times are the fetch's."""
    try:
        return float("inf") if (path.parent / "record.json").exists() else path.stat().st_mtime
    except OSError:
        return float("inf")


def sign_of(record: Path, here: bool) -> float | None:
    """When the record changed last: on this machine by its files' times, of a mirror by what it says itself."""
    if not here:
        return number(object_of(record / "record.json"), "at")
    times = []
    for file in record.glob("[!.]*"):
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


# ---- judging -----------------------------------------------------------------------------------------------------


def standing(seen: Seen) -> Standing:
    """What the launcher says; where there is none, what the record says, and whether anyone still writes it."""
    if seen.status:
        if seen.status not in ENDED:  # whatever has not ended lives, also under a word that is new to us
            return Standing(seen.status, live=True, why=seen.reason)
        why = "; ".join(text for text in (seen.reason, ended_why(seen)) if text)
        return Standing(seen.status, live=False, failed=seen.status != "completed", why=why)
    if not seen.recorded:
        return Standing("not known", live=True)
    part = seen.parts[-1] if seen.parts else None
    code = number(seen.exit, "code")
    if part and part.code is not None:
        code = part.code
    if part and part.ended is None:  # the trainer may have ended; its startup script has not, if it lives
        silent = seen.until - seen.sign if seen.sign is not None else 0.0
        if seen.launcher != "local":
            return Standing("silent" if silent > SILENT_MIRROR_S else "running", live=True)
        if silent <= SILENT_HERE_S or seen.alive:
            return Standing("running", live=True)
    if code == 0:
        return Standing("completed", live=False)
    if code is None:
        why = "it was killed, or its machine went down: no process of it is left"
        return Standing("ended without a word", live=False, failed=True, why=why)
    word = "stopped" if code in (75, 130, 143) else "failed"
    return Standing(word, live=False, failed=True, why=ended_why(seen) or f"code {code:.0f}")


def ended_why(seen: Seen) -> str:
    """Code, class, step and cause from the trainer's exit file; empty where it is absent or says 0."""
    code = number(seen.exit, "code")
    if not code:
        part = seen.parts[-1] if seen.parts else None
        if part is None or not part.code:
            return ""
        return f"code {part.code}" if of_this_part(seen) else f"code {part.code}, before training"
    kind = f", {seen.exit['class']}" if seen.exit.get("class") else ""
    cause = " ".join(plain(text).strip() for text in str(seen.exit.get("cause") or "").splitlines())
    saved = ", everything saved" if code == 75 else ""
    return f"code {code:.0f}{kind} at step {seen.exit.get('step', '?')}{saved}{': ' if cause else ''}{cause}"


def billed_seconds(seen: Seen) -> float | None:
    """Seconds of all parts. One that was killed is counted to the last sign of life that it gave."""
    signs = [t for line in seen.phases if (t := number(line, "ended")) is not None]
    signs += [t for line in [*seen.steps, *seen.evals, seen.node] if (t := number(line, "at")) is not None]
    if seen.sign is not None:
        signs.append(seen.sign)
    live = standing(seen).live
    seconds = 0.0
    for index, part in enumerate(seen.parts):
        until = part.ended
        if until is None:
            following = seen.parts[index + 1].began if index + 1 < len(seen.parts) else None
            if following is None and live:
                until = seen.now
            else:
                until = max((t for t in signs if t >= part.began and (following is None or t < following)), default=0.0)
        seconds += max(until - part.began, 0.0)
    return seconds if seen.parts else None


def of_this_part(seen: Seen) -> list[Line]:
    """The steps of the run's present part: a pause between two parts is no slow step."""
    began = seen.parts[-1].began if seen.parts else 0.0
    return [line for line in seen.steps if (number(line, "at") or 0.0) >= began]


def seconds_a_step(seen: Seen) -> float | None:
    """From the end of one step to the end of the next, saves and evaluations included; the mean of the last 50."""
    ends = [t for line in of_this_part(seen)[-EARLIER - 1 :] if (t := number(line, "at")) is not None]
    if len(ends) > 1 and ends[-1] > ends[0]:
        return (ends[-1] - ends[0]) / (len(ends) - 1)
    return number(seen.steps[-1], "step_seconds") if seen.steps else None


def seconds_left(seen: Seen) -> float | None:
    """Until the last step, at the present pace."""
    if seen.total is None or seen.step is None or (pace := seconds_a_step(seen)) is None:
        return None
    since = seen.now - (number(seen.steps[-1], "at") or seen.now)
    return max((seen.total - seen.step) * pace - max(min(since, pace), 0.0), 0.0)


def tokens_per_second(seen: Seen) -> float | None:
    """The median of the last steps."""
    rates = figures(seen.steps[-2 * RECENT :], "tokens_per_second")
    return median(rates) if rates else None


def figures(lines: list[Line], key: str) -> list[float]:
    return [value for line in lines if (value := number(line, key)) is not None]


def warnings(seen: Seen) -> list[str]:
    """What a person would want to be told, a line each."""
    told = [
        loss_not_finite(seen),
        loss_rising(seen) or loss_spiking(seen),
        no_gradient(seen),
        value_head(seen),
        slow(seen),
    ]
    told += [data_bound(seen), collapsed(seen)]
    if standing(seen).live:
        told += [no_life(seen) or no_progress(seen)]
    return [text for text in told if text]


def loss_not_finite(seen: Seen) -> str | None:
    """What is not finite is null in the record."""
    for line in reversed(seen.steps[-2 * RECENT :]):
        names = [k for k, v in line.items() if v is None and (k in ("wmtp_loss", "grad_norm") or k.startswith("ce_"))]
        if names:
            return f"not finite at step {line['step']:.0f}: {', '.join(names)}; the step was left out"
    return None


def loss_spiking(seen: Seen) -> str | None:
    """Far above the median of the steps before: by a quarter of it, and by six times their usual distance from it."""
    for index in range(len(seen.steps) - 1, max(len(seen.steps) - 1 - RECENT, 0), -1):
        loss, before = (
            number(seen.steps[index], "wmtp_loss"),
            figures(seen.steps[max(index - EARLIER, 0) : index], "wmtp_loss"),
        )
        if loss is None or len(before) < 2 * RECENT:
            continue
        middle = median(before)
        usual = 1.4826 * median(abs(value - middle) for value in before)
        if loss - middle > max(0.25 * abs(middle), 6 * usual):
            step = seen.steps[index]["step"]
            return f"loss spiking: {loss:.3f} at step {step:.0f}, the median before it is {middle:.3f}"
    return None


def loss_rising(seen: Seen) -> str | None:
    """`risen` of what the record has."""
    losses = figures(seen.steps, "wmtp_loss")
    medians = [median(losses[end - RECENT : end]) for end in range(RECENT, len(losses) + 1)]
    return risen(medians[-1], min(losses[0], *medians)) if medians else None


def risen(now: float, lowest: float) -> str | None:
    """What is told of a loss with the median ``now`` over the last `RECENT` steps, where it unlearns.

    ``lowest``: such a median so far, or the first step's loss. It is above that by a nat, and by a quarter of it.
    """
    if now < max(lowest + 1, 1.25 * lowest):
        return None
    return (
        f"the loss has risen: {now:.3f} over the last {RECENT} steps, {lowest:.3f} at its lowest "
        "(was optim.lr too high?)"
    )


def no_gradient(seen: Seen) -> str | None:
    """None in the last steps: whatever the loss says, nothing is learned any more."""
    norms = figures(seen.steps[-RECENT:], "grad_norm")
    if len(norms) < RECENT or max(norms) > 1e-8:
        return None
    return f"no gradient in the last {RECENT} steps: nothing is learned any more (was optim.lr too high?)"


def value_head(seen: Seen) -> str | None:
    """Its squared error is far beyond any reward's square: the weights, which come from it, mean nothing."""
    errors = figures(seen.steps[-RECENT:], "value_loss")
    if not errors or median(errors) <= VALUE_LOSS_MOST:
        return None
    return (
        f"the value head has diverged: value_loss {median(errors):.3g} (was pretrain.lr or critic.value_lr too high?)"
    )


def slow(seen: Seen) -> str | None:
    """Half of what the steps before did, or less."""
    rates = figures(of_this_part(seen), "tokens_per_second")
    before, now = rates[: -2 * RECENT][-4 * EARLIER :], rates[-2 * RECENT :]
    if len(before) < 2 * RECENT or median(now) > 0.5 * median(before):
        return None
    return f"throughput is down: {median(now):.0f} tok/s, {median(before):.0f} before"


def data_bound(seen: Seen) -> str | None:
    """Over a tenth of the time of the last steps was spent waiting for data."""
    recent = [line for line in of_this_part(seen)[-4 * RECENT :] if number(line, "data_wait_s") is not None]
    seconds, waited = sum(figures(recent, "step_seconds")), sum(figures(recent, "data_wait_s"))
    if len(recent) < RECENT or not seconds or waited <= 0.1 * seconds:
        return None
    return f"data-bound: {100 * waited / seconds:.0f} % of the last {len(recent)} steps waited for data"


def collapsed(seen: Seen) -> str | None:
    """A few tokens carry all the weight."""
    ess, zeros = (figures(seen.steps[-RECENT:], key) for key in ("w_ess", "w_zeros"))
    if ess and median(ess) < 0.1:
        return f"weights collapsed: their effective sample size is {100 * median(ess):.0f} % of the tokens"
    if zeros and median(zeros) > 0.9:
        return f"weights collapsed: {100 * median(zeros):.0f} % of them are zero"
    return None


def no_progress(seen: Seen) -> str | None:
    """Nothing for longer than five minutes or ten steps; before the first step and after the last, half an hour."""
    moved = [t for line in seen.phases[-1:] if (t := number(line, "ended")) is not None]
    moved += [t for line in [*seen.steps[-1:], *seen.evals[-1:]] if (t := number(line, "at")) is not None]
    if seen.parts:
        moved.append(seen.parts[-1].began)
    if not moved:
        return None
    taken = figures(of_this_part(seen)[-EARLIER:], "step_seconds")
    training = taken and seen.step != seen.total
    limit = max(300.0, 10 * median(taken)) if training else QUIET_S
    since = seen.until - max(moved)
    if since <= limit:
        return None
    where = f"after step {seen.step}" if seen.steps else "before the first step"
    return f"no progress for {since / 60:.0f} min {where}: {seen.whole_log}"


def no_life(seen: Seen) -> str | None:
    """Nobody has written the record for long."""
    if seen.sign is None:
        return None
    silent = seen.until - seen.sign
    limit = SILENT_HERE_S if seen.launcher == "local" else SILENT_MIRROR_S
    if silent <= (limit if seen.node else QUIET_S):
        return None
    return f"no sign of life: the record has not changed for {silent / 60:.0f} min"
