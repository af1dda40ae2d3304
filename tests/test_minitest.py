"""The figures of a minitest come from what the stages left, or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from wmtp.minitest import main, rows, sync_figures


def test_rates_are_bytes_over_seconds_of_all_models() -> None:
    lines = ['{"downloaded_bytes": 30000000, "seconds": 1.0}', '{"downloaded_bytes": 10000000, "seconds": 1.0}', ""]
    assert sync_figures(lines) == {"models_synced_mb": 40.0, "sync_mb_per_second": 20.0}


def test_rows_merge_the_stages_and_the_callers_lines(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps({"steps": 12}))
    (tmp_path / "sync.jsonl").write_text('{"downloaded_bytes": 1000000, "seconds": 0.5}\n')
    figures = rows(tmp_path, ["seconds_startup\t9\n"], 20)
    assert figures["steps"] == 12 and figures["seconds_startup"] == "9" and figures["seconds"] == 20


def test_a_stage_that_left_nothing_is_an_error_and_not_a_zero(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        rows(tmp_path, [], 1)


@pytest.mark.parametrize(("after", "code"), [(9.5, 0), (10.0, 1), (float("nan"), 1), (None, 1)])
def test_a_loss_that_does_not_fall_is_no_success(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: float | None,
    code: int,
) -> None:
    figures = {"held_out_ce_before": 10.0, "held_out_ce_after": after, "weights": {"w_ess": 0.9}}
    (tmp_path / "train.json").write_text(json.dumps(figures))
    (tmp_path / "sync.jsonl").write_text("")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([str(tmp_path), "--seconds", "9"]) == code
    shown = capsys.readouterr()
    assert ("minitest: ok 9 s" in shown.out) == (code == 0) and ("FAIL" in shown.err) == (code == 1)
    assert "weights: w_ess 0.900" in shown.out
