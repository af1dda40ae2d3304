"""The queue of what goes to the bucket, with a bucket that does as it is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from wmtp import uploads
from wmtp.config import Storage
from wmtp.remote import Remote, TransferError
from wmtp.uploads import Uploads

ALL = {"final", "step-1", "step-2", "step-3"}


class Bucket(Remote):
    """Takes folders but those that it is ``away`` for; ``held`` keeps a transfer going until it is set."""

    def __init__(self, retries: int = 3) -> None:
        super().__init__("s3://b/r", Storage(retries=retries, retry_wait_s=0))
        self.away: set[str] = set()
        self.held, self.began = threading.Event(), threading.Event()
        self.held.set()
        self.tries: list[str] = []
        self.have: list[str] = []

    def put(self, folder: Path) -> None:
        self.tries.append(folder.name)
        self.began.set()
        assert self.held.wait(20)
        if folder.name in self.away:
            raise TransferError("away")
        self.have.append(folder.name)


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"step-{n}" for n in range(4)]
    for folder in folders:
        folder.mkdir()
    return folders


def queue(bucket: Bucket) -> tuple[Uploads, list[tuple[str, bool]]]:
    """And what it told of each folder's end."""
    ended: list[tuple[str, bool]] = []
    return Uploads(bucket, lambda folder, arrived: ended.append((folder.name, arrived))), ended


def failed(step: Path) -> tuple[Bucket, Uploads]:
    """A bucket that is back, and a queue whose step has used its tries while it was away."""
    bucket = Bucket(retries=1)
    bucket.away = ALL
    waiting, _ = queue(bucket)
    waiting.add(step)
    until(waiting, step)
    bucket.away = set()
    return bucket, waiting


def until(uploads: Uploads, folder: Path) -> None:
    """Wait until a folder has used its tries."""
    with uploads.changed:
        assert uploads.changed.wait_for(lambda: folder in uploads.failed, 20)


def test_an_outage_that_ends_costs_tries_and_nothing_else(
    steps: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = Bucket()
    bucket.away = ALL
    waiting, _ = queue(bucket)
    waiting.add(steps[1])
    until(waiting, steps[1])
    assert "step-1, try 1 of 3: away" in (told := capsys.readouterr().err) and "step-1, try 3 of 3: away" in told
    bucket.away = set()
    waiting.close()
    assert bucket.have == ["step-1"] and bucket.tries == ["step-1"] * 4


def test_an_outage_that_does_not_end_is_the_last_word(steps: list[Path]) -> None:
    bucket = Bucket()
    bucket.away = ALL
    waiting, ended = queue(bucket)
    waiting.add(steps[1])
    until(waiting, steps[1])
    with pytest.raises(TransferError, match="away"):
        waiting.close()
    assert bucket.tries == ["step-1"] * 6  # its tries in the run, and once more at the end: a bounded number
    assert ended == [("step-1", False)] * 2


def test_what_was_on_its_way_when_the_run_ended_has_a_round_of_its_own(steps: list[Path]) -> None:
    bucket = Bucket(retries=1)
    bucket.away = ALL
    bucket.held.clear()
    waiting, _ = queue(bucket)
    waiting.add(steps[1])
    assert bucket.began.wait(20)
    threading.Timer(0.1, bucket.held.set).start()
    with pytest.raises(TransferError, match="away"):
        waiting.close()
    assert bucket.tries == ["step-1"] * 2


def test_what_failed_is_tried_again_while_the_run_goes_on(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "AGAIN_S", 0.05)
    bucket, waiting = failed(steps[1])
    with waiting.changed:
        assert waiting.changed.wait_for(lambda: waiting.newest == 1, 20)
    waiting.close()
    assert bucket.have == ["step-1"]


def test_a_newer_step_ends_the_tries_of_the_one_before(steps: list[Path]) -> None:
    bucket = Bucket(retries=9)
    bucket.away = {"step-1"}
    bucket.held.clear()
    waiting, ended = queue(bucket)
    waiting.add(steps[1])
    assert bucket.began.wait(20)
    waiting.add(steps[2])  # while the first try of the one before is on its way
    bucket.held.set()
    waiting.close()
    assert bucket.tries.count("step-1") == 1 and bucket.have == ["step-2"]
    assert ended == [("step-1", False), ("step-2", True)]


def test_a_failed_step_is_forgotten_once_a_newer_one_is_there(steps: list[Path]) -> None:
    bucket, waiting = failed(steps[1])
    waiting.add(steps[2])
    waiting.close()
    assert bucket.have == ["step-2"]


def test_a_folder_that_is_no_step_is_overtaken_by_none(steps: list[Path], tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    bucket = Bucket(retries=1)
    bucket.away = ALL
    waiting, _ = queue(bucket)
    waiting.add(final)
    until(waiting, final)
    bucket.away = set()
    waiting.add(steps[2])
    waiting.close()
    assert sorted(bucket.have) == ["final", "step-2"]


@pytest.mark.parametrize(("hurry", "brought"), [(False, [1, 2, 3]), (True, [1, 3])])
def test_a_stop_brings_the_newest_of_those_that_wait(steps: list[Path], hurry: bool, brought: list[int]) -> None:
    bucket = Bucket()
    bucket.held.clear()
    waiting, _ = queue(bucket)
    for folder in steps[1:]:
        waiting.add(folder)
        assert bucket.began.wait(20)
    threading.Timer(0.1, bucket.held.set).start()
    waiting.close(hurry)
    assert bucket.have == [f"step-{n}" for n in brought]


def test_a_bounded_wait_ends_before_a_transfer_that_does_not(steps: list[Path]) -> None:
    bucket = Bucket()
    bucket.held.clear()
    waiting, _ = queue(bucket)
    waiting.add(steps[1])
    with pytest.raises(TransferError, match="not all is in the bucket"):
        waiting.close(seconds=0.1)
    bucket.held.set()


def test_what_was_pruned_while_it_waited_is_left_out(steps: list[Path]) -> None:
    bucket = Bucket()
    waiting, _ = queue(bucket)
    steps[1].rmdir()
    waiting.add(steps[1])
    waiting.close()
    assert bucket.tries == []


def test_an_error_of_another_kind_is_told_at_the_end_too(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket()

    def torn(folder: Path) -> None:
        raise OSError(5, "the disk can't be read")

    monkeypatch.setattr(bucket, "put", torn)
    waiting, _ = queue(bucket)
    waiting.add(steps[1])
    with pytest.raises(OSError, match="can't be read"):
        waiting.close()
