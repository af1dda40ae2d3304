"""What is read from a record, and what is thought of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wmtp import vitals
from wmtp.vitals import Part, Seen

NOW = 1_800_000_000.0


def steps(count: int, each: float = 1.0, **figures: Any) -> list[dict[str, Any]]:
    """Steps that end a while before NOW, alike but for a little noise in the loss."""
    known: dict[str, Any] = {
        "tokens_per_second": 2000.0,
        "step_seconds": each,
        "data_wait_s": 0.0,
        "w_ess": 0.7,
        "w_zeros": 0.1,
    }
    return [
        {"step": i + 1, "at": NOW - (count - i) * each, "wmtp_loss": 3 + 0.01 * (i % 3), **known, **figures}
        for i in range(count)
    ]


def seen(lines: list[dict[str, Any]], **known: Any) -> Seen:
    began = lines[0]["at"] - 10 if lines else NOW - 10
    held: dict[str, Any] = {"parts": [Part(began, "local")], "facts": {"total_steps": 3000}, "sign": NOW, "now": NOW}
    return Seen("run", "local", steps=lines, **held | known)


def write(folder: Path, **files: list[dict[str, Any]] | dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, held in files.items():
        stem, _, kind = name.rpartition("_")
        lines = "".join(json.dumps(line) + "\n" for line in held) if isinstance(held, list) else held
        (folder / f"{stem}.{kind}").write_text(lines if isinstance(lines, str) else json.dumps(lines))
    return folder


# ---- reading -----------------------------------------------------------------------------------------------------


def test_a_torn_line_and_a_line_of_another_kind_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text('{"step": 1}\n[1]\n{"step": null}\n\n{"step": 2}\n{"step": 3, "at"')
    assert [line["step"] for line in vitals.lines_of(file, "step")] == [1, 2]
    assert vitals.lines_of(tmp_path / "absent.jsonl") == []


def test_of_a_large_file_only_whole_lines_of_its_end_are_read(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text("".join(f"line {i} ü\n" for i in range(10_000)))
    lines = vitals.tail(file, 1000)
    assert lines[-1] == "line 9999 ü" and 10 < len(lines) < 100
    assert all(line.startswith("line ") for line in lines)


def test_parts_are_paired_also_after_a_kill() -> None:
    lines: list[dict[str, Any]] = [
        {"began": 1, "launcher": "vessl", "number": 7},
        {"began": 5},
        {"ended": 9, "code": 75},
        {"ended": 10},
    ]
    assert vitals.parts_of(lines) == [Part(1, "vessl", "7"), Part(5, ended=9, code=75)]


def test_a_line_of_a_log_is_harmless_to_a_terminal() -> None:
    assert vitals.plain("10 %\r20 %\r\x1b[31mhalf\x1b[0m\x1b]0;title\x07 \x1b(Bway\x08\n") == "half way "
    assert vitals.plain("2027-01-15T08:00:01.123456789Z Step 1/2") == "08:00:01 Step 1/2"


def test_the_newest_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    for step, whole in ((5, True), (10, True), (15, False)):
        (tmp_path / f"step-{step}").mkdir()
        if whole:
            (tmp_path / f"step-{step}" / ".complete").write_text("{}")
    os.utime(tmp_path / "step-10" / ".complete", (NOW, NOW))
    assert vitals.newest_checkpoint(tmp_path, None) == (10, NOW)
    listing = tmp_path / "listing"
    listing.write_text(
        "2027/01/15 08:00:00               312  step-20/.complete\n2027/01/15 07:00:00  31  step-9/.complete\n"
    )
    assert vitals.newest_checkpoint(tmp_path, listing) == (20, NOW)


def test_the_exit_of_the_part_before_says_nothing_of_this_one(tmp_path: Path) -> None:
    record = write(tmp_path, parts_jsonl=[{"began": time.time() - 30}], exit_json={"code": 20, "step": 3, "cause": "x"})
    assert vitals.read("run", "local", record=record).exit["code"] == 20
    os.utime(record / "exit.json", (1, 1))
    assert vitals.read("run", "local", record=record).exit == {}
    write(record, record_json={"at": time.time(), "files": {}})  # of a mirror, whose times are those of its fetch
    assert vitals.read("run", record=record).exit["code"] == 20


# ---- where it stands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "word", "failed"),
    [(0, "completed", False), (20, "failed", True), (75, "stopped", True), (143, "stopped", True)],
)
def test_an_ended_part_says_how(code: int, word: str, failed: bool) -> None:
    at = seen(steps(3), parts=[Part(NOW - 100, ended=NOW, code=code)])
    at.exit = {"code": code, "step": 3, "cause": "SIGTERM", "class": "preempted"}
    state = vitals.standing(at)
    assert (state.word, state.live, state.failed) == (word, False, failed)
    if code == 75:
        assert state.why == "code 75, preempted at step 3, everything saved: SIGTERM"


def test_a_run_here_that_nobody_writes_any_more_has_ended() -> None:
    at = seen(steps(3), sign=NOW - 61)
    assert vitals.standing(at).word == "ended without a word" and vitals.standing(at).failed
    at.alive = True
    assert vitals.standing(at).word == "running"
    at.launcher, at.alive = "", False
    assert vitals.standing(at).live  # of another machine nothing is known but its mirror


def test_a_process_of_the_run_is_found_by_its_name() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "--run-name", "name-of-a-test", "--tags", "x"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        for _ in range(100):  # until it is what it was started as
            if vitals.at_work("name-of-a-test"):
                break
            time.sleep(0.05)
        assert vitals.at_work("name-of-a-test") and not vitals.at_work("name-of")
        assert child.stdin
        child.stdin.close()
    assert not vitals.at_work("name-of-a-test")


def test_what_the_launcher_says_counts_also_under_a_new_word() -> None:
    at = seen([], status="migrating", parts=[Part(NOW - 10, ended=NOW, code=20)])
    assert vitals.standing(at) == vitals.Standing("migrating", live=True)
    at.status, at.reason = "failed", "Preempted"
    assert vitals.standing(at).why.startswith("Preempted")


# ---- figures -----------------------------------------------------------------------------------------------------


def test_billed_are_all_parts_a_killed_one_to_its_last_sign() -> None:
    killed = {"step": 1, "at": NOW - 900.0, "wmtp_loss": 3.0}
    parts = [Part(NOW - 1000), Part(NOW - 500, ended=NOW - 400, code=75), Part(NOW - 60)]
    at = seen([killed, {"step": 2, "at": NOW - 450.0}], parts=parts)
    assert vitals.billed_seconds(at) == pytest.approx(100 + 100 + 60)
    assert vitals.billed_seconds(Seen("run")) is None


def test_time_left_is_of_this_part_alone() -> None:
    before = [{**line, "at": line["at"] - 7200} for line in steps(20)]
    now = [{**line, "step": line["step"] + 20} for line in steps(20, each=2.0)]
    at = seen(before + now, parts=[Part(before[0]["at"] - 5), Part(now[0]["at"] - 5)], facts={"total_steps": 140})
    assert vitals.seconds_a_step(at) == pytest.approx(2.0)
    assert vitals.seconds_left(at) == pytest.approx(100 * 2.0 - 2.0)


# ---- warnings ----------------------------------------------------------------------------------------------------


def test_a_good_run_is_not_warned_of() -> None:
    for count in (0, 1, 3, 300):
        assert vitals.warnings(seen(steps(count))) == []


def test_a_falling_loss_is_no_spike() -> None:
    lines = [{**line, "wmtp_loss": 10 * 0.98 ** line["step"]} for line in steps(200)]
    assert vitals.warnings(seen(lines)) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"wmtp_loss": None}, "not finite at step 100: wmtp_loss"),
        ({"ce_head_1": None}, "not finite at step 100: ce_head_1"),
        ({"wmtp_loss": 4.5}, "loss spiking: 4.500 at step 100"),
        ({"grad_norm": 0.0}, "no gradient in the last 5 steps"),
        ({"w_ess": 0.05}, "weights collapsed: their effective sample size is 5 %"),
        ({"w_zeros": 0.95, "w_ess": 0.2}, "weights collapsed: 95 % of them are zero"),
        ({"value_loss": 7.1e10}, "the value head has diverged: value_loss 7.1e+10"),
        ({"tokens_per_second": 900.0}, "throughput is down: 900 tok/s, 2000 before"),
        ({"data_wait_s": 0.15}, "data-bound: 15 % of the last 20 steps"),
    ],
)
def test_what_is_wrong_is_said(figures: dict[str, Any], said: str) -> None:
    """Of one step where one is enough, else of the last twenty."""
    count = 1 if "wmtp_loss" in figures or "ce_head_1" in figures else 20
    lines = steps(100)
    for line in lines[-count:]:
        line |= figures
    assert [text[: len(said)] for text in vitals.warnings(seen(lines))] == [said]


def test_a_loss_that_rises_for_good_is_told_whatever_its_pace() -> None:
    lines = steps(100)
    for index, line in enumerate(lines[20:]):
        line["wmtp_loss"] = 2.9 + index * 0.05
    (said,) = vitals.warnings(seen(lines))
    assert said.startswith("the loss has risen: 6.750 over the last 5 steps, 3.0") and "optim.lr" in said


def test_a_single_odd_step_is_no_warning() -> None:
    lines = steps(100)
    lines[-2] |= {"w_ess": 0.01, "w_zeros": 0.99, "tokens_per_second": 10.0, "data_wait_s": 0.9, "wmtp_loss": 3.3}
    assert vitals.warnings(seen(lines)) == []


@pytest.mark.parametrize(
    ("each", "ago", "told"), [(1.0, 290, False), (1.0, 310, True), (60.0, 590, False), (60.0, 610, True)]
)
def test_no_progress_is_ten_steps_or_five_minutes(each: float, ago: float, told: bool) -> None:
    lines = [{**line, "at": line["at"] - ago + each} for line in steps(30, each)]
    said = vitals.warnings(seen(lines))
    assert bool(said) is told
    if told:
        assert said[0].startswith(f"no progress for {ago / 60:.0f} min after step 30")


def test_loading_and_uploading_may_take_longer() -> None:
    last = [{**line, "at": line["at"] - 600} for line in steps(30)]
    assert vitals.warnings(seen(last, facts={"total_steps": 30})) == []
    assert vitals.warnings(seen([], parts=[Part(NOW - 1700)])) == []
    assert "before the first step" in vitals.warnings(seen([], parts=[Part(NOW - 1900)]))[0]


def test_an_evaluation_is_progress_and_an_ended_run_needs_none() -> None:
    lines = [{**line, "at": line["at"] - 600} for line in steps(30)]
    assert vitals.warnings(seen(lines, evals=[{"step": 30, "at": NOW - 20}])) == []
    assert vitals.warnings(seen(lines, parts=[Part(NOW - 900, ended=NOW - 500, code=0)])) == []


def test_a_silent_mirror_is_told() -> None:
    at = seen(steps(30), node={"at": NOW - 400}, sign=NOW - 240)
    at.launcher, at.status = "vessl", "running"
    assert vitals.warnings(at) == ["no sign of life: the record has not changed for 4 min"]
    at.sign = NOW - 170
    assert vitals.warnings(at) == []


def test_a_mirror_that_is_looked_at_seldom_is_judged_as_of_the_last_look(tmp_path: Path) -> None:
    """The steps of a long run are large: they are fetched every quarter of an hour, and the run is not silent then."""
    at = time.time() - 900
    record = write(
        tmp_path,
        parts_jsonl=[{"began": at - 1000}],
        steps_jsonl=[{"step": n, "at": at - 30 + n, "step_seconds": 1.0} for n in range(30)],
        node_jsonl=[{"at": at}],
        record_json={"at": at, "files": {}},
    )
    os.utime(record / "record.json", (at + 20, at + 20))
    looked = vitals.read("run", record=record)
    assert vitals.standing(looked).word == "running" and vitals.warnings(looked) == []
    os.utime(record / "record.json")
    assert vitals.standing(vitals.read("run", record=record)).word == "silent"
