from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from wmtp.ledger import ledger_of


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(number: int, at: float, seconds: float = 10.0) -> dict[str, Any]:
    return {"step": number, "at": at, "step_seconds": seconds}


def phase(name: str, began: float, ended: float) -> dict[str, Any]:
    return {"phase": name, "began": began, "ended": ended}


@pytest.fixture
def killed_and_resumed(tmp_path: Path) -> Path:
    """Part 1: 1000 to 1100, killed, two steps of which the second is trained again; part 2: 2000 to 2050."""
    write(
        tmp_path,
        "parts",
        {"began": 1000.0},
        {"ended": 1100.0, "code": None},
        {"began": 2000.0},
        {"ended": 2050.0, "code": 0},
    )
    write(
        tmp_path,
        "phases",
        phase("imports", 1003, 1008),
        phase("sync", 1002, 1040),
        phase("models", 1020, 1041),
        phase("load", 1041, 1060),
        phase("save", 1071, 1074),
        phase("sync", 2001, 2002),
        phase("load", 2005, 2020),
        phase("end", 2042, 2050),
    )
    write(tmp_path, "steps", step(1, 1071), step(2, 2031))
    write(tmp_path, "redone", step(2, 1085))
    write(tmp_path, "evals", {"step": 2, "began": 2033.0, "at": 2040.0, "ce": [1.0]})
    return tmp_path


def test_all_seconds_have_one_kind(killed_and_resumed: Path) -> None:
    ledger = ledger_of(killed_and_resumed)
    assert ledger.total == 150 and sum(ledger.seconds.values()) == pytest.approx(150)
    assert ledger.seconds == pytest.approx(
        {
            "training": 20,
            "redone": 10,
            "saving": 3,
            "evaluation": 7,
            "load": 34,
            "sync": 39,
            "end": 8,
            "lost": 15,  # from the last step to the kill
            "other": 14,
        }
    )
    assert ledger.goodput == pytest.approx(20 / 150) and (ledger.steps, ledger.redone) == (2, 1)


def test_stretches_follow_one_another_without_a_gap(killed_and_resumed: Path) -> None:
    ledger = ledger_of(killed_and_resumed)
    for part in ledger.parts:
        mine = [s for s in ledger.stretches if part.began <= s.began < part.ended]
        assert mine[0].began == part.began and mine[-1].ended == part.ended
        assert all(a.ended == b.began and a.kind != b.kind for a, b in itertools.pairwise(mine))


def test_money_is_of_all_parts(killed_and_resumed: Path) -> None:
    ledger = ledger_of(killed_and_resumed)
    assert ledger.cost(24.0) == pytest.approx(1.0) and ledger.cost(None) is None


def test_a_run_that_trained_nothing_has_no_goodput(tmp_path: Path) -> None:
    assert ledger_of(tmp_path).goodput is None
    write(tmp_path, "parts", {"began": 5.0}, {"ended": 9.0, "code": 13})
    ledger = ledger_of(tmp_path)
    assert ledger.goodput == 0 and ledger.seconds == {"lost": 4.0}


def test_of_two_nodes_whose_clocks_differ_no_step_is_counted_twice(tmp_path: Path) -> None:
    write(tmp_path, "parts", {"began": 1000.0}, {"ended": 1100.0, "code": 75})
    (tmp_path / "parts.jsonl").open("a").write('{"began": 1060.0}\n{"ended": 1160.0, "code": 0}\n')
    write(tmp_path, "steps", *(step(n, 1010.0 + 10 * n) for n in range(1, 16)))
    ledger = ledger_of(tmp_path)
    assert ledger.total == 200 and ledger.seconds == pytest.approx({"training": 150, "other": 50})


def test_a_clock_that_was_set_back_makes_no_part_shorter_than_nothing(tmp_path: Path) -> None:
    write(tmp_path, "parts", {"began": 1000.0}, {"ended": 900.0, "code": 75}, {"began": 950.0}, {"ended": 970.0})
    ledger = ledger_of(tmp_path)
    assert ledger.total == 20 and sum(ledger.seconds.values()) == 20
