"""One page of a run: how it stands, its GPUs, the end of its log, its MLflow run; drawn once, or again and again.

    python -m wmtp.monitor --name RUN [--launcher vessl --number N] [--record DIR] [--look DIR] [--follow]

`--record` is the record's folder on this machine, `--look` the folder where a stage keeps what the launcher said.
Exit codes: 0 the run goes on or has completed, 1 it failed, 130 left by Ctrl-C, or the code in LOOK/end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import shlex
import signal
import sys
import termios
import time
import tty
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wmtp import vitals
from wmtp.ledger import Ledger, bytes_from_bucket, ledger_of
from wmtp.vitals import Line, Seen, Standing, number

LOG_LINES = 50
COUNT_EVERY_S, COUNT_SHARE = 30.0, 0.05  # the ledger reads all of a record: 4.5 s of 100 000 steps
SMALL = 2**16  # bytes
STYLES = {"plain": "", "head": "1", "good": "32", "warn": "33", "bad": "31"}
Row = tuple[str, str]
"""A style's name and the text."""


# ---- words -------------------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """`41 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def pace(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def rate(tokens: float) -> str:
    return f"{tokens / 1000:.1f}k tok/s" if tokens >= 10_000 else f"{tokens:.0f} tok/s"


def figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def cells(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int) -> str:
    """A text that fits, with a mark where it was cut."""
    if cells(text) <= width:
        return text
    out, used = [], 0
    for c in text:
        used += cells(c)
        if used > width - 1:
            break
        out.append(c)
    return "".join(out) + "…"


def wrapped(text: str, width: int | None) -> Iterator[str]:
    """A sentence over as many lines as it takes: of a warning nothing is cut."""
    line = ""
    for word in text.split(" "):
        if line and width and cells(line) + 1 + cells(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line


# ---- blocks ------------------------------------------------------------------------------------------------------


def head(seen: Seen, width: int | None = None) -> list[Row]:
    """Name and state, then a line a fact that is known, then the warnings."""
    state = vitals.standing(seen)
    rows: list[Row] = [(colour(state), f"{seen.name}  {state.word}{since(seen, state)}")]
    facts = seen.facts
    where = "on this machine" if seen.launcher == "local" else f"on {seen.launcher or 'another machine'}"
    what = [f"run {seen.number} {where}" if seen.number else where, facts.get("algo"), ranks(facts)]
    if len(seen.parts) > 1:
        what.append(f"part {len(seen.parts)}")
    named = [("run", ", ".join(str(w) for w in what if w)), ("step", progress(seen, state)), ("wmtp_loss", loss(seen))]
    named += [("spent", spent(seen)), ("goodput", goodput(seen)), ("checkpoint", checkpoint(seen))]
    named.append(("bucket", "" if not seen.moved else f"{seen.moved / 1e9:.2f} GB came from it"))
    rows += [("plain", f"  {name:<11} {text}") for name, text in named if text]
    told = [("why", "bad" if state.failed else "warn", state.why), ("note", "warn", seen.note)]
    told += [("warn", "warn", text) for text in vitals.warnings(seen)]
    for name, style, text in told:
        for index, line in enumerate(wrapped(text, width and width - 14) if text else ()):
            rows.append((style, f"  {'' if index else name:<11} {line}"))
    if not state.live and state.failed:
        rows.append(("plain", f"  {'next':<11} {following(seen)}"))
    return rows


def colour(state: Standing) -> str:
    return "bad" if state.failed else "good" if state.word in ("running", "completed") else "warn"


def since(seen: Seen, state: Standing) -> str:
    """How long the present part has been at it, or took."""
    if not seen.parts:
        return ""
    part = seen.parts[-1]
    if state.live:
        return f" for {span(max(seen.now - part.began, 0))}"
    return f" after {span(part.ended - part.began)}" if part.ended is not None else ""


def ranks(facts: Line) -> str:
    world = number(facts, "world")
    device = facts.get("gpu") or facts.get("device")
    return "" if world is None else f"{world:.0f} rank{'' if world == 1 else 's'}{f' ({device})' if device else ''}"


def progress(seen: Seen, state: Standing) -> str:
    """Step, tokens/s, seconds a step, and what is left of it."""
    total = f" of {seen.total}" if seen.total else ""
    if seen.step is None:
        done = ", ".join(str(line.get("phase")) for line in seen.phases)
        return f"none so far{total}{f'; done: {done}' if done else ''}" if seen.recorded else ""
    words = [f"{seen.step}/{seen.total} ({100 * seen.step / seen.total:.0f} %)" if seen.total else f"{seen.step}"]
    if (tokens := vitals.tokens_per_second(seen)) is not None:
        words.append(rate(tokens))
    if (each := vitals.seconds_a_step(seen)) is not None:
        words.append(f"{pace(each)} a step")
    left = vitals.seconds_left(seen)
    if state.live and left is not None:
        words.append(f"{span(left)} left" if seen.step != seen.total else "the last step is done")
    return ", ".join(words)


def loss(seen: Seen) -> str:
    if not seen.steps:
        return ""
    last = seen.steps[-1]
    words = [figure(number(last, "wmtp_loss"))]
    heads = sorted((k for k in last if re.fullmatch(r"ce_head_\d+", k)), key=lambda k: int(k.rpartition("_")[2]))
    if heads:
        words.append("heads " + " ".join("nan" if last[k] is None else f"{last[k]:.2f}" for k in heads))
    if "grad_norm" in last:
        norm = number(last, "grad_norm")
        words.append(f"gradient norm {'not finite' if norm is None else f'{norm:.2f}'}")
    return ", ".join(words)


def spent(seen: Seen) -> str:
    seconds, price = vitals.billed_seconds(seen), number(seen.facts, "price_per_hour")
    if seconds is None:
        return ""
    cost = "price not set (launcher.price_per_hour)" if price is None else f"about ${seconds / 3600 * price:.2f}"
    if not seen.facts:
        cost = "price not known so far"
    parts = f" in {len(seen.parts)} parts" if len(seen.parts) > 1 else ""
    return f"{span(seconds)}{parts}, {cost}"


def goodput(seen: Seen) -> str:
    """The share of the seconds that trained, and what most of the others went to."""
    if seen.ledger is None or seen.ledger.goodput is None:
        return ""
    others = sorted((s, kind) for kind, s in seen.ledger.seconds.items() if kind != "training")[:-4:-1]
    return f"{seen.ledger.goodput * 100:.0f} % trained; " + ", ".join(f"{kind} {span(s)}" for s, kind in others)


def checkpoint(seen: Seen) -> str:
    if seen.checkpoint is None:
        return "none so far" if seen.steps else ""
    step, at = seen.checkpoint
    base = seen.facts.get("checkpoints")
    return f"step {step}, {span(max(seen.now - at, 0))} ago" + (f", {base}" if base else "")


def following(seen: Seen) -> str:
    """What to type after a failure: what the run said of itself, and how it goes on."""
    target = "make train" if seen.facts.get("env") == "test" else "make minitest"
    go_on = f"{seen.whole_log}; {target} goes on with it" if seen.launcher == "local" else ""
    if seen.status:
        go_on = f"make logs RUN_ID={seen.number or seen.name}; to go on: make resume RUN_ID={seen.name}"
    said = vitals.object_of(seen.record / "failure.json") if seen.record else {}
    # Of this part; one that names the run goes on with it.
    if not (own := said.get("next")) or (seen.parts and (number(said, "at") or 0.0) < seen.parts[-1].began):
        return go_on
    return str(own) if seen.name in str(own) or not go_on else f"{own}; {go_on}"


def gpus(seen: Seen) -> list[Row]:
    """A line a GPU, or what the machine does without one."""
    node = seen.node
    rows: list[Row] = [("head", "[GPU Utilization]")]
    if not node:
        return [*rows, ("plain", "  not recorded" if seen.recorded else "  no record so far: the node begins it")]
    at = number(node, "at")
    if at is not None and seen.now - at > 6 * vitals.NODE_EVERY_S:
        rows = [("head", f"[GPU Utilization]  {span(seen.now - at)} ago")]
    cards = [card for card in node.get("gpus") or [] if isinstance(card, dict)]
    if not cards:
        rows.append(("plain", f"  no GPU on this machine: {machine(node)}"))
        return rows
    rows.append(("plain", "  index  utilization  memory used     total  name"))
    for card in cards:
        use, used, total = (number(card, k) for k in ("utilization_percent", "memory_used_mib", "memory_total_mib"))
        known = ["-" if use is None else f"{use:.0f} %"]
        known += ["-" if mib is None else f"{mib / 1024:.1f} GiB" for mib in (used, total)]
        text = f"  {card.get('index', '-')!s:>5}  {known[0]:>11}  {known[1]:>11}  {known[2]:>8}  {card.get('name', '')}"
        rows.append(("plain", text.rstrip()))
    return rows


def machine(node: Line) -> str:
    cpu, rss, memory, disk = (number(node, k) for k in ("cpu_percent", "rss_gib", "memory_free_gib", "disk_free_gb"))
    words = ["" if cpu is None else f"CPU {cpu:.0f} %", "" if rss is None else f"memory {rss:.1f} GiB"]
    words += ["" if memory is None else f"{memory:.1f} GiB free", "" if disk is None else f"disk {disk:.0f} GB free"]
    return ", ".join(word for word in words if word)


def logs(seen: Seen, room: int) -> list[Row]:
    """The last lines that fit."""
    lines = seen.log[-min(room, LOG_LINES) :]
    more = f"all: {seen.whole_log}" if seen.status or room >= LOG_LINES else "more: make monitor RUN_ID=…"
    count = f"{min(room, LOG_LINES)} line{'' if room == 1 else 's'}"
    rows: list[Row] = [("head", f"[Training Logs - Last {count}]  {more}")]
    return rows + ([("plain", f"  {line}") for line in lines] or [("plain", "  nothing so far")])


def mlflow(seen: Seen) -> list[Row]:
    """The run's id in the tracking store, its status there, its last wmtp_loss."""
    known = seen.facts.get("mlflow")
    known = known if isinstance(known, dict) else {}
    uri = re.sub(r"//[^@/\s]+@", "//***@", str(known.get("uri") or ""))
    rows: list[Row] = [("head", f"[MLflow Experiments]{f'  {uri}' if uri else ''}")]
    run_id = seen.facts.get("mlflow_run_id")
    if not run_id and not seen.steps:
        return [*rows, ("plain", "  no run so far")]
    state = vitals.standing(seen)
    status = "RUNNING" if state.live else "FAILED" if state.failed else "FINISHED"
    if not state.live and (seen.status == "terminated" or state.word == "stopped"):
        status = "KILLED"
    last = f"{figure(number(seen.steps[-1], 'wmtp_loss'))} (step {seen.step})" if seen.steps else "none so far"
    rows.append(("plain", f"  {'run_id':<32}  {'status':<8}  wmtp_loss"))
    return [*rows, ("plain", f"  {run_id or 'not known so far'!s:<32}  {status:<8}  {last}")]


def page(seen: Seen, width: int | None = None, height: int | None = None) -> list[Row]:
    """All blocks; where a size is given nothing goes beyond it: the log has what the others leave."""
    top, middle, bottom = head(seen, width), gpus(seen), mlflow(seen)
    room, gap = LOG_LINES, True
    if height is not None:
        room = height - len(top) - len(middle) - len(bottom) - 1
        gap = room - 3 >= 3
        room = max(room - 3 * gap, 1)
    rows: list[Row] = []
    for block in (top, middle, logs(seen, room), bottom):
        rows += [("plain", "")] * (gap and bool(rows)) + block
    if width is not None:
        rows = [(style, cut(text, width)) for style, text in rows]
    return rows if height is None else rows[:height]


def painted(rows: Sequence[Row], colours: bool) -> list[str]:
    return [f"\x1b[{code}m{text}\x1b[0m" if colours and (code := STYLES[style]) else text for style, text in rows]


# ---- the terminal ------------------------------------------------------------------------------------------------


class Screen:
    """The alternate screen of a terminal, left as it was found. A frame is one write."""

    def __init__(self) -> None:
        self.out = sys.stdout.fileno()
        self._keys: int | None = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] | None = None
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # it wakes the wait: a new size is a new frame
        signal.signal(signal.SIGTSTP, self._suspend)
        # Stopped from outside, the shell may have its terminal back first: no reason to stop half-way.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)

    def __enter__(self) -> Screen:
        if self._keys is not None:
            with contextlib.suppress(termios.error):
                self._before = termios.tcgetattr(self._keys)
                tty.setcbreak(self._keys, termios.TCSANOW)
                now = termios.tcgetattr(self._keys)
                now[6][termios.VSUSP] = b"\0"  # Ctrl-Z comes as a key: the screen is left before anyone is stopped
                termios.tcsetattr(self._keys, termios.TCSANOW, now)
        self._write("\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J")
        return self

    def __exit__(self, *_: object) -> None:
        self._write("\x1b[?7h\x1b[?25h\x1b[?1049l")
        if self._keys is not None and self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._keys, termios.TCSANOW, self._before)

    def size(self) -> os.terminal_size:
        size = os.get_terminal_size(self.out)
        return size if size.columns > 0 and size.lines > 0 else os.terminal_size((80, 24))

    def draw(self, lines: Sequence[str]) -> None:
        """Over what is there: nothing is cleared before it is drawn again."""
        self._write("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")

    def wait(self, seconds: float) -> bool:
        """Until then, a signal or a key; whether the key says that this is enough."""
        waited = [self._wake] + ([] if self._keys is None else [self._keys])
        ready = select.select(waited, [], [], seconds)[0]
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._keys is None or self._keys not in ready:
            return False
        keys = os.read(self._keys, 64)
        if not keys:
            self._keys = None  # nobody is at the other end
        if b"\x1a" in keys:
            self._suspend()
        return b"q" in keys

    def _write(self, text: str) -> None:
        raw = text.encode("utf-8", "replace")
        while raw:
            raw = raw[os.write(self.out, raw) :]

    def _suspend(self, *_: object) -> None:
        """Stop with all that was started together, the terminal given back first: their shell writes on it at once."""
        self.__exit__()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.killpg(os.getpgrp(), signal.SIGTSTP)
        while os.tcgetpgrp(self.out) != os.getpgrp():
            os.killpg(os.getpgrp(), signal.SIGSTOP)  # gone on with in the background: there is no screen for it
        signal.signal(signal.SIGTSTP, self._suspend)
        self.__enter__()


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Left(Exception):
    """A signal ends the monitor; the run goes on."""


def leave(number: int, _: object) -> None:
    for other in ENDING:  # once: the terminal is given back in peace
        signal.signal(other, signal.SIG_IGN)
    raise Left(128 + number)


# ---- the two ways of looking -------------------------------------------------------------------------------------


class Monitor:
    """Looks at one run as the arguments say, as often as it is asked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._count_at = float("-inf")
        self._ledger: Ledger | None = None
        self._moved: int | None = None

    def look(self) -> Seen:
        a = self.args
        seen = vitals.read(a.name, a.launcher, a.number, a.record, a.look, a.checkpoints)
        began = time.monotonic()
        if a.record and began > self._count_at:
            self._ledger, self._moved = ledger_of(a.record), bytes_from_bucket(a.record)
            ended = time.monotonic()
            self._count_at = ended + max(COUNT_EVERY_S, (ended - began) / COUNT_SHARE)
        seen.ledger, seen.moved = self._ledger, self._moved
        return seen

    def given_up(self) -> tuple[int, str] | None:
        """The code and the words with which the stage beside this gave up asking."""
        lines = vitals.tail(self.args.look / "end") if self.args.look else []
        return (int(lines[0]), "\n".join(lines[1:])) if lines and lines[0].isdigit() else None

    def show(self, seen: Seen) -> int:
        """The whole page; the exit code says how the run stands."""
        print("\n".join(painted(page(seen), self.colours)), flush=True)
        return int(vitals.standing(seen).failed)

    def draw(self) -> int:
        """Again and again in the same place, until the run ends."""
        seen = self.look()
        with Screen() as screen:
            before: list[str] = []
            size = screen.size()
            while vitals.standing(seen).live and not self.given_up():
                lines = painted(page(seen, size.columns, size.lines), self.colours)
                if lines != before:
                    screen.draw(lines)
                before = lines
                if screen.wait(self.args.every):
                    return 0
                if size != screen.size():
                    size, before = screen.size(), []
                seen = self.look()
        return self.end(seen, show=True)

    def tell(self) -> int:
        """A line for each change, a few seconds apart."""
        before, told = "", set[str]()
        while True:
            seen = self.look()
            state = vitals.standing(seen)
            at = time.strftime("%H:%M:%S", time.localtime(seen.now))
            said = [part for part in (state.word, progress_in_short(seen)) if part]
            if (line := "  ".join(said)) != before:
                print(f"{at}  {line}", flush=True)
            before = line
            fresh = vitals.warnings(seen) + ([seen.note] if seen.note else [])
            for text in fresh:
                if text.split(":")[0] not in told:
                    print(f"{at}  warn  {text}", flush=True)
            told = {text.split(":")[0] for text in fresh}
            if not state.live or self.given_up():
                return self.end(seen, show=False)
            time.sleep(max(self.args.every, 0.05))

    def end(self, seen: Seen, show: bool) -> int:
        state = vitals.standing(seen)
        if show:
            self.show(seen)
        if state.live and (gave_up := self.given_up()):
            print(gave_up[1], file=sys.stderr, flush=True)
            return gave_up[0]
        if state.failed and not show:
            print(f"{state.word}: {state.why}\nnext  {following(seen)}", flush=True)
        return int(state.failed)


def progress_in_short(seen: Seen) -> str:
    """Of a step: what a line that is told only at a change may hold."""
    if seen.step is None:
        return "; ".join(str(line.get("phase")) + " done" for line in seen.phases[-1:])
    words = [f"step {seen.step}/{seen.total}" if seen.total else f"step {seen.step}"]
    words.append(f"wmtp_loss {figure(number(seen.steps[-1], 'wmtp_loss'))}")
    if (tokens := vitals.tokens_per_second(seen)) is not None:
        words.append(rate(tokens))
    if seen.checkpoint:
        words.append(f"checkpoint {seen.checkpoint[0]}")
    return "  ".join(words)


def lacking(record: Path, listed: Line, source: str) -> list[str]:
    """Commands of s5cmd for the listed files that ``record`` has not, into its folder `.new`; what is not listed goes.

    ``listed``: name to bytes. A small file may change and keep its size: only a large one of that size is taken for
    the same.
    """
    known = {name: size for name, size in listed.items() if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)}
    commands = []
    for name, size in known.items():
        file = record / name
        if not file.is_file() or file.stat().st_size != size or size < SMALL:
            commands.append(f"cp {shlex.quote(f'{source}/{name}')} {shlex.quote(str(record / '.new' / name))}")
    for file in record.iterdir():
        if file.is_file() and file.name != "record.json" and file.name not in known:
            file.unlink()
    return commands


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.monitor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--name", default="", help="of the run")
    parser.add_argument("--number", default="", help="the launcher's")
    parser.add_argument("--launcher", default="", help="vessl, docker or local; none: the record alone speaks")
    parser.add_argument("--record", type=Path, help="folder of the record on this machine")
    parser.add_argument(
        "--look", type=Path, help="folder of what the launcher said: state, log, checkpoints, note, end"
    )
    parser.add_argument("--checkpoints", type=Path, help="folder of the run's checkpoints on this machine")
    parser.add_argument("--follow", action="store_true", help="until the run ends")
    parser.add_argument("--every", type=float, help="seconds between two frames (default 1) or lines (default 5)")
    parser.add_argument("--lacking", type=Path, metavar="DIR", help="only print how to bring what this mirror lacks")
    parser.add_argument("--from", dest="source", default="", help="of --lacking: its address in the bucket")
    args = parser.parse_args(argv)
    if args.lacking:
        listed = None
        with contextlib.suppress(ValueError, AttributeError):  # a marker that says nothing names nothing
            listed = json.load(sys.stdin).get("files")
        for command in lacking(args.lacking, listed if isinstance(listed, dict) else {}, args.source):
            print(command)
        return 0
    monitor = Monitor(args)
    terminal = sys.stdout.isatty() and os.environ.get("CI") != "true" and os.environ.get("TERM", "dumb") != "dumb"
    monitor.colours = monitor.colours and terminal
    args.every = args.every if args.every is not None else 1.0 if terminal else 5.0
    for ending in ENDING:
        signal.signal(ending, leave)
    try:
        if not args.follow:
            return monitor.show(monitor.look())
        return monitor.draw() if terminal else monitor.tell()
    except Left as left:
        return int(left.args[0])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough is no traceback
    sys.exit(main())
