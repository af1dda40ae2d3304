"""The figures of a step add up, and a log gets lines where a terminal gets a bar."""

from __future__ import annotations

import io
import math
import statistics
import time

import pytest
import torch

from wmtp.model import ModelSpec
from wmtp.pace import Pace
from wmtp.ranks import Place

SPEC = ModelSpec("hf", 2, 8, 1, 2, 2, 16, 32)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pace(total: int = 4) -> Pace:
    return Pace(SPEC, 16, "bf16", Place(torch.device("cpu")), 0, total)


def test_the_parts_of_a_step_are_told_apart() -> None:
    p = pace()
    p.begin()
    time.sleep(0.02)
    p.mark("data")
    time.sleep(0.05)
    p.mark("model")
    p.mark("save")
    figures = p.end(700)
    assert 0.02 <= figures["data_wait_s"] < 0.05 and figures["checkpoint_stall_s"] < 0.01
    assert figures["step_seconds"] >= 0.07 and figures["tokens_per_second"] == 700 / figures["step_seconds"]
    assert 0.01 < figures["memory_gib"] < 100 and "mfu" not in figures  # a CPU has no peak that is known


def test_the_speed_of_a_run_is_that_of_a_typical_step_without_the_first() -> None:
    p = pace()
    assert p.typical() is None
    rates = []
    for seconds in (0.05, 0.01, 0.02, 0.01):
        p.begin()
        time.sleep(seconds)
        rates.append(p.end(100)["tokens_per_second"])
    assert p.typical() == statistics.median(rates[1:]) > rates[0]


def test_a_log_gets_the_lines_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    p = pace()
    for step in (1, 2):
        p.show(step, {"wmtp_loss": 2.5, "grad_norm": 0.5, "tokens_per_second": 70.0, "mfu": 0.413}, step == 2)
    p.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Step 2/4  wmtp_loss 2.500  70 tok/s  MFU 41 %  gradient norm 0.50  ")


def test_a_terminal_gets_a_bar_that_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    p = pace()
    for step in (1, 2, 3, 4):
        time.sleep(0.12)
        p.show(step, {"wmtp_loss": 2.5, "grad_norm": 0.5, "tokens_per_second": 70.0}, True)
    p.close()
    text = terminal.getvalue()
    assert "wmtp_loss 2.500  70 tok/s" in text and "/4 [" in text and "Step 2/4" not in text


def test_a_loss_that_has_risen_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    p = pace()
    for step, loss in enumerate([10.4] * 6 + [30.0] * 9):
        p.show(step, {"wmtp_loss": loss, "grad_norm": 0.5, "tokens_per_second": 70.0}, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train     warn  the loss has risen: 30.000 over the last 5 steps, 10.400 at its lowest")
    p = pace()
    for step, loss in enumerate([10.4] * 6 + [30.0, math.nan, 10.4, 10.4, 30.0, 10.4] * 3):
        p.show(step, {"wmtp_loss": loss, "grad_norm": 0.5, "tokens_per_second": 70.0}, False)
    assert not capsys.readouterr().err
