"""The page of a run: what it says, how it fits, how it is drawn again."""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from wmtp import monitor, record
from wmtp.ledger import Ledger
from wmtp.vitals import Part, Seen

NOW = 1_800_000_000.0
NAME = "minitest-critic-wmtp-abcdef0-28bb78a"
GPU = {
    "index": 0,
    "name": "NVIDIA A100",
    "utilization_percent": 97,
    "memory_used_mib": 62772,
    "memory_total_mib": 81920,
}


def step(number: int, at: float) -> dict[str, Any]:
    heads = {f"ce_head_{k}": 2.8 + 0.1 * k for k in range(4)}
    figures = {"wmtp_loss": 2.914, "grad_norm": 1.2, "tokens_per_second": 14_800.0, "step_seconds": 1.1}
    return {"step": number, "at": at, **heads, **figures}


def a_run(**known: Any) -> Seen:
    facts: dict[str, Any] = {
        "algo": "critic-wmtp",
        "total_steps": 3000,
        "world": 4,
        "device": "cuda",
        "gpu": "A100",
        "price_per_hour": 6.2,
        "mlflow": {"uri": "https://me:secret@tracking.example/", "experiment": "wmtp/prod"},
        "mlflow_run_id": "f" * 32,
        "checkpoints": f"s3://wmtp/checkpoints/{NAME}",
    }
    held: dict[str, Any] = {
        "launcher": "vessl",
        "number": "4711",
        "status": "running",
        "facts": facts,
        "parts": [Part(NOW - 3720, "vessl", "4711")],
        "steps": [step(i + 1, NOW - 120 + i) for i in range(120)],
        "node": {"at": NOW - 4, "gpus": [GPU, GPU | {"index": 1, "utilization_percent": None}]},
        "log": [f"Step {i}/3000" for i in range(1, 121)],
        "checkpoint": (100, NOW - 130),
        "sign": NOW - 12,
        "now": NOW,
    }
    return Seen(NAME, **held | known)


def text_of(seen: Seen, *size: int) -> str:
    return "\n".join(text for _, text in monitor.page(seen, *size))


def test_the_page_holds_the_three_blocks_under_the_facts() -> None:
    page = text_of(a_run())
    for said in (
        f"{NAME}  running for 1 h 2 min\n",
        "run 4711 on vessl, critic-wmtp, 4 ranks (A100)\n",
        "120/3000 (4 %), 14.8k tok/s, 1.0 s a step, 47 min 59 s left\n",
        "wmtp_loss   2.914, heads 2.80 2.90 3.00 3.10, gradient norm 1.20\n",
        "spent       1 h 2 min, about $6.41\n",
        f"step 100, 2 min 10 s ago, s3://wmtp/checkpoints/{NAME}\n",
        "0         97 %     61.3 GiB  80.0 GiB  NVIDIA A100\n",
        "1            -     61.3 GiB",
        "[Training Logs - Last 50 lines]  all: make logs RUN_ID=4711\n  Step 71/3000\n",
        f"{'f' * 32}  RUNNING   2.914 (step 120)",
    ):
        assert said in page
    blocks = [page.index(f"[{name}") for name in ("GPU Utilization]", "Training Logs", "MLflow Experiments]")]
    assert blocks == sorted(blocks)
    assert "secret" not in page


def test_where_the_seconds_went_and_what_came_from_the_bucket_are_said() -> None:
    seconds = {"training": 1800.0, "saving": 9.0, "sync": 231.0, "redone": 60.0, "start": 1500.0}
    ledger = Ledger(seconds, [], [record.Part(NOW - 3600, NOW, 0)], 100, 5)
    text = text_of(a_run(ledger=ledger, moved=53_000_000_000))
    assert "goodput     50 % trained; start 25 min 0 s, sync 3 min 51 s, redone 1 min 0 s\n" in text
    assert "bucket      53.00 GB came from it\n" in text
    assert "goodput" not in text_of(a_run())


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"files": 3}'])
def test_a_marker_that_says_nothing_brings_nothing(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(marker))
    assert monitor.main(["--lacking", str(tmp_path), "--from", "s3://b/r/record"]) == 0
    assert capsys.readouterr().out == ""


def test_the_ledger_is_read_from_the_record(tmp_path: Path) -> None:
    (tmp_path / "parts.jsonl").write_text('{"began": 100.0}\n{"ended": 110.0, "code": 0}\n')
    (tmp_path / "steps.jsonl").write_text(json.dumps({"step": 1, "at": 110.0, "step_seconds": 4.0}) + "\n")
    args = argparse.Namespace(name="r", launcher="local", number="", record=tmp_path, look=None, checkpoints=None)
    assert "goodput     40 % trained" in "\n".join(text for _, text in monitor.page(monitor.Monitor(args).look()))


def test_without_a_gpu_or_a_price_it_says_so() -> None:
    seen = a_run(node={"at": NOW, "cpu_percent": 183.2, "rss_gib": 2.4, "memory_free_gib": 10.1, "gpus": []})
    seen.facts["price_per_hour"] = None
    assert "no GPU on this machine: CPU 183 %, memory 2.4 GiB, 10.1 GiB free" in text_of(seen)
    assert "price not set (launcher.price_per_hour)" in text_of(seen)
    seen.facts = {}
    assert "price not known so far" in text_of(seen) and "price not set" not in text_of(seen)


def test_old_figures_of_a_gpu_have_their_age() -> None:
    assert "[GPU Utilization]\n" in text_of(a_run())
    assert "[GPU Utilization]  5 min 0 s ago" in text_of(a_run(node={"at": NOW - 300, "gpus": [GPU]}))


def test_a_run_without_a_record_shows_what_its_launcher_says() -> None:
    page = text_of(Seen(NAME, "vessl", "7", "initializing", "pulling the image", now=NOW))
    for said in (
        f"{NAME}  initializing\n",
        "run 7 on vessl",
        "pulling the image",
        "no record so far",
        "nothing so far",
        "no run so far",
    ):
        assert said in page


def test_a_failed_run_says_why_and_what_to_type() -> None:
    seen = a_run(status="failed", reason="", exit={"code": 20, "step": 118, "class": "numerics", "cause": "loss\nnan"})
    page = text_of(seen)
    assert "code 20, numerics at step 118: loss nan\n" in page
    assert "next        make logs RUN_ID=4711; to go on: make resume RUN_ID=" in page
    assert "FAILED    2.914" in page and "left" not in page


def test_the_command_after_a_failure_is_the_one_that_the_run_named(tmp_path: Path) -> None:
    seen = a_run(status="failed", exit={"code": 2, "step": 0, "class": "data", "cause": "x"})
    seen.record = tmp_path

    def told(failure: dict[str, object]) -> str:
        (tmp_path / "failure.json").write_text(json.dumps(failure))
        return monitor.following(seen)

    go_on = f"make logs RUN_ID=4711; to go on: make resume RUN_ID={NAME}"
    assert told({"at": NOW, "next": "make models"}) == f"make models; {go_on}"
    assert told({"at": NOW, "next": f"make resume RUN_ID={NAME}"}) == f"make resume RUN_ID={NAME}"
    # That of a part before is no news, and what is torn is none.
    assert told({"at": 1.0, "next": "make models"}) == told({}) == go_on


def test_a_warning_is_told_whole_over_as_many_lines_as_it_takes() -> None:
    seen = a_run(note="the bucket refuses the record: " + "word " * 40)
    rows = monitor.page(seen, 80, 24)
    assert sum(text.count("word") for style, text in rows if style == "warn") == 40
    assert all(monitor.cells(text) <= 80 for _, text in rows)


@pytest.mark.parametrize("gpus", [0, 1, 4, 8])
def test_the_page_fits_80_by_24_with_its_log(gpus: int) -> None:
    seen = a_run(log=["가나다 " * 40] * 60)
    seen.node["gpus"] = [GPU | {"index": i} for i in range(gpus)]
    rows = [text for _, text in monitor.page(seen, 80, 24)]
    assert len(rows) <= 24 and max(map(monitor.cells, rows)) <= 80
    assert sum("가나다" in row for row in rows) >= 2
    assert any("RUNNING" in row for row in rows)


@pytest.mark.parametrize(("columns", "lines"), [(20, 5), (1, 1), (200, 80)])
def test_the_page_fits_any_terminal(columns: int, lines: int) -> None:
    rows = monitor.page(a_run(), columns, lines)
    assert len(rows) <= lines and all(monitor.cells(text) <= columns for _, text in rows)


def test_words_for_amounts() -> None:
    assert [monitor.span(s) for s in (41.9, 200, 3900)] == ["41 s", "3 min 20 s", "1 h 5 min"]
    assert [monitor.rate(r) for r in (2140, 14_800)] == ["2140 tok/s", "14.8k tok/s"]


# ---- the mirror --------------------------------------------------------------------------------------------------


def test_only_what_may_have_changed_is_brought_and_what_is_gone_goes(tmp_path: Path) -> None:
    for name, size in {"same.jsonl": 70_000, "grown.jsonl": 70_000, "exit.json": 40, "gone.json": 9}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "record.json").write_text("{}")
    listed = {"same.jsonl": 70_000, "grown.jsonl": 80_000, "exit.json": 40, "new.txt": 1, "../evil": 5, "a b": 5}
    commands = monitor.lacking(tmp_path, listed, "s3://b/checkpoints/r/record")
    assert [re.findall(r"/record/(\S+)", command) for command in commands] == [
        ["grown.jsonl"],
        ["exit.json"],
        ["new.txt"],
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exit.json", "grown.jsonl", "record.json", "same.jsonl"]


# ---- drawn again and again ---------------------------------------------------------------------------------------


def a_record(folder: Path, done: int = 3) -> Path:
    """Of a run on this machine that goes on."""
    folder.mkdir()
    now = time.time()
    (folder / "facts.json").write_text(json.dumps({"algo": "baseline-mtp", "env": "minitest", "total_steps": 9}))
    (folder / "parts.jsonl").write_text(json.dumps({"began": now - 30, "launcher": "local"}) + "\n")
    (folder / "steps.jsonl").write_text("".join(json.dumps(step(i + 1, now - done + i)) + "\n" for i in range(done)))
    (folder / "log.txt").write_text("".join(f"Step {i}/9 \x1b[2J\x1b[31m{'x' * 200}\n" for i in range(1, 60)))
    return folder


def end(folder: Path, code: int) -> None:
    if code:
        said = {"code": code, "step": 3, "cause": "SIGTERM", "class": "preempted"}
        (folder / "exit.json").write_text(json.dumps(said))
    with (folder / "parts.jsonl").open("a") as file:
        file.write(json.dumps({"ended": time.time(), "code": code}) + "\n")


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "wmtp.monitor", "--name", "run", "--launcher", "local", "--record", str(folder)]


class Terminal:
    """A pseudo terminal of 80x24 with the monitor in it."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self.far, near = pty.openpty()
        fcntl.ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(near)
        keep = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")} | {"TERM": "xterm-256color"}
        self.child = subprocess.Popen(
            arguments, stdin=near, stdout=near, stderr=near, env=keep | environment, start_new_session=True
        )
        self.near, self.said = near, ""

    def until(self, words: str, seconds: float = 20.0) -> str:
        """All that was said since, to these words; or to the end of the time."""
        limit, since = time.monotonic() + seconds, len(self.said)
        while words not in self.said[since:] and time.monotonic() < limit:
            if select.select([self.far], [], [], 0.1)[0]:
                self.said += os.read(self.far, 65_536).decode("utf-8", "replace")
        assert words in self.said[since:], self.said[since:]
        return self.said[since:]


@contextmanager
def terminal(arguments: list[str], **environment: str) -> Iterator[Terminal]:
    held = Terminal(arguments, **environment)
    try:
        yield held
    finally:
        held.child.kill()
        held.child.wait()
        os.close(held.far)
        os.close(held.near)


def test_it_is_drawn_in_place_and_the_terminal_given_back(tmp_path: Path) -> None:
    record = a_record(tmp_path / "record")
    with terminal([*command(record), "--follow", "--every", "0.1"]) as at:
        at.until("3/9 (33 %)")
        with (record / "steps.jsonl").open("a") as file:
            file.write(json.dumps(step(4, time.time())) + "\n")
        at.until("4/9 (44 %)")
        drawn = at.said
        end(record, 0)
        last = at.until("\x1b[?1049l") + at.until("FINISHED")
        assert at.child.wait(10) == 0
        assert termios.tcgetattr(at.near) == at.before
    frames = drawn.split("\x1b[H")
    assert frames[0].count("\x1b[2J") == 1 and len(frames) >= 3  # cleared once, before the first frame
    assert not any("\x1b[2J" in frame or frame.count("\r\n") > 23 for frame in frames[1:])
    assert last.index("\x1b[?25h") < last.index("\x1b[?1049l") < last.rindex("completed")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (b"q", 0)])
def test_leaving_gives_the_terminal_back(tmp_path: Path, sent: signal.Signals | bytes, code: int) -> None:
    with terminal([*command(a_record(tmp_path / "record")), "--follow"]) as at:
        at.until("[MLflow Experiments]")
        if isinstance(sent, bytes):
            os.write(at.far, sent)
        else:
            at.child.send_signal(sent)
        at.until("\x1b[?1049l")
        assert at.child.wait(10) == code
        assert termios.tcgetattr(at.near) == at.before


def test_another_size_is_another_frame_at_once(tmp_path: Path) -> None:
    with terminal([*command(a_record(tmp_path / "record")), "--follow", "--every", "60"]) as at:
        at.until("[MLflow Experiments]")
        fcntl.ioctl(at.near, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 0, 0))
        at.child.send_signal(signal.SIGWINCH)
        frame = at.until("\x1b[J").rpartition("\x1b[H")[2]
        assert frame.count("\r\n") == 11


def test_no_color_is_no_color_in_place(tmp_path: Path) -> None:
    record = a_record(tmp_path / "record")
    with terminal([*command(record), "--follow"], NO_COLOR="1") as at:
        assert "\x1b[32m" not in at.until("[MLflow Experiments]")
    with terminal([*command(record), "--follow"]) as at:
        assert "\x1b[32m" in at.until("[MLflow Experiments]")


def test_piped_it_tells_changes_a_line_each(tmp_path: Path) -> None:
    record = a_record(tmp_path / "record")
    with subprocess.Popen([*command(record), "--follow", "--every", "0.1"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        first = child.stdout.readline()
        with (record / "steps.jsonl").open("a") as file:
            file.write(json.dumps(step(4, time.time()) | {"wmtp_loss": None}) + "\n")
        second, third = child.stdout.readline(), child.stdout.readline()
        end(record, 75)
        rest = child.stdout.read()
    assert "running  step 3/9  wmtp_loss 2.914" in first
    assert "step 4/9  wmtp_loss not finite" in second and "warn  not finite at step 4" in third
    assert "stopped: code 75, preempted at step 3, everything saved: SIGTERM" in rest
    assert child.returncode == 1 and "\x1b" not in first + second + third + rest


def test_what_the_stage_beside_it_could_not_ask_ends_it_with_its_words(tmp_path: Path) -> None:
    look = tmp_path / "look"
    look.mkdir()
    (look / "state").write_text("running\t\n")
    (look / "end").write_text("11\nmonitor   FAIL  VESSL did not answer 5 times in a row\n")
    arguments = [*command(tmp_path / "none"), "--look", str(look), "--follow", "--launcher", "vessl"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 11 and "did not answer" in done.stderr
