"""A rank without a sign of life is noticed, recorded and told; one that lives or rests is not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from wmtp.watch import Watch


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_HANG_S", "0.2")


def watch(tmp_path: Path) -> tuple[Watch, list[str], threading.Event]:
    told: list[str] = []
    hung = threading.Event()

    def on_hang(what: str) -> None:
        told.append(what)
        hung.set()

    return Watch(tmp_path / "logs/flight.log", on_hang, patience=0.2), told, hung


def test_a_hang_is_told_with_its_place_and_the_stacks_of_all_threads(tmp_path: Path) -> None:
    w, told, hung = watch(tmp_path)
    w.beat("in step 7")
    assert hung.wait(10)
    w.close()
    assert told[0].endswith("in step 7") and told[0].startswith("no sign of life for")
    record = (tmp_path / "logs/flight.log").read_text()
    assert "test_a_hang_is_told" in record and record.count("Thread 0x") >= 2


def test_beats_and_rest_keep_it_quiet_and_leave_no_file(tmp_path: Path) -> None:
    w, told, hung = watch(tmp_path)
    for step in range(8):
        w.beat(f"in step {step}")
        time.sleep(0.05)
    w.rest()
    assert not hung.wait(0.5)
    w.close()
    assert not told and not list((tmp_path / "logs").iterdir())


def test_slow_steps_and_the_first_one_get_their_time(tmp_path: Path) -> None:
    w = Watch(None, lambda what: None, patience=1800)
    assert w.limit == 1800
    w.beat("in step 1")
    time.sleep(0.4)
    w.beat("in step 2")  # the first step is none to reckon with
    assert w.limit == 1800
    time.sleep(0.05)
    w.beat("in step 3")
    assert 0.5 <= w.limit < 3
    w.rest()
    time.sleep(0.5)
    w.beat("in step 4")  # the rest was no gap between steps
    assert w.limit < 3
    w.close()


def test_a_process_that_stood_still_as_a_whole_is_no_hang(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        w = Watch(None, lambda what: os._exit(20), patience=0.6)
        w.least = 0.6
        for step in range(40):
            w.beat(f"in step {step}")
            time.sleep(0.05)
        os._exit(0)
    time.sleep(0.5)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
