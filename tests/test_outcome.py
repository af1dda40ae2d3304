"""Codes, causes and files of a run's end."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from wmtp.model import ModelError
from wmtp.outcome import BadInput, Progress, Stop, claim, failure, keep_traceback, write_whole
from wmtp.remote import CheckpointError, TransferError


def test_write_whole_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "x" / "f", "one")
    write_whole(tmp_path / "x" / "f", "two")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["f"]
    assert (tmp_path / "x" / "f").read_text() == "two"


def test_the_first_rank_that_fails_writes_the_exit_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "exit.json"
    assert claim(path, 20, Progress(3, "first"))
    assert not claim(path, 12, Progress(4, "second"))
    assert json.loads(path.read_text()) == {"code": 20, "step": 3, "cause": "first", "class": None}
    assert [p.name for p in path.parent.iterdir()] == ["exit.json"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("x"), 2),
        (OSError(errno.ENOSPC, "full"), 10),
        (TransferError("no"), 12),
        (CheckpointError("torn"), 20),
        (RuntimeError("nan"), 20),
    ],
)
def test_each_class_of_failure_has_its_code(error: Exception, code: int) -> None:
    assert failure(error, 0, None)[0] == code


def test_a_checkpoint_that_finds_no_room_is_a_matter_of_disk() -> None:
    error = CheckpointError("no room")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert failure(error, 1, None)[0] == 10


def test_a_failure_is_three_lines_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "traceback.log"
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        keep_traceback(log)
        text = failure(error, 0, log)[3]
    assert len(text.splitlines()) == 3 and str(log) in text and "boom" in text
    assert "Traceback" in log.read_text()


def test_a_synced_model_is_called_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a work" / ".store" / ("a1" * 32)
    folder.mkdir(parents=True)
    error = ModelError(f"model.heads: 6, but {folder} has 4", "a rule", "a command")
    assert str(folder) in failure(error, 0, None)[2]  # no name is known
    (folder / "manifest.json").write_text('{"name": "llama-7b-mtp"}')
    _, _, cause, told = failure(error, 0, None)
    assert cause.startswith("model.heads: 6, but llama-7b-mtp has 4") and "but llama-7b-mtp has 4" in told


def test_what_gloo_says_of_itself_is_left_out() -> None:
    said = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34988. "
    said += "This is typically caused by a remote worker crashing. Check the logs.\nGLHF!"
    assert (
        failure(RuntimeError(said), 1, None)[2] == "rank 1: RuntimeError: Connection closed by peer [127.0.0.1]:34988"
    )


def test_a_signal_or_the_end_of_the_hours_is_a_notice_to_stop() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = Stop()
        assert stop.cause is None
        stop.max_hours = 1e-12
        assert stop.cause == "max_hours"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.cause == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_name_that_is_no_text_ends_no_record_of_the_end(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.json")
    assert claim(tmp_path / "exit.json", 2, Progress(0, f"no such file: {name}"))
    assert json.loads((tmp_path / "exit.json").read_text())["cause"] == "no such file: caf\\udce9.json"
    try:
        raise FileNotFoundError(name)
    except FileNotFoundError:
        keep_traceback(tmp_path / "traceback.log")
    assert "caf\\udce9.json" in (tmp_path / "traceback.log").read_text()
