"""Checkpoints on one rank: complete or invisible, pruned, refused when damaged."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp import checkpoint
from wmtp.checkpoint import MARKER, CheckpointError, Checkpoints, TransferError, quoted, s5cmd_binary


def make(folder: Path, remote: str | None = None, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, remote, keep_last=keep, retries=2, concurrency=2, part_mb=5)


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


def test_a_quoted_argument_survives_spaces_and_quotes() -> None:
    assert quoted('a "b" c') == '"a \\"b\\" c"'


def test_the_bucket_gets_the_marker_and_loses_what_is_old(tmp_path: Path, prefix: str) -> None:
    model, optimizer = parts()
    checkpoints = make(tmp_path, prefix, keep=1)
    saved(checkpoints, 1, model, optimizer, {})
    saved(checkpoints, 2, model, optimizer, {})
    checkpoints.close()
    assert make(tmp_path, prefix).remote_steps() == [2]
    assert make(tmp_path, prefix).steps() == [2]


def test_a_checkpoint_comes_back_from_the_bucket_on_another_machine(tmp_path: Path, prefix: str) -> None:
    model, optimizer = parts()
    checkpoints = make(tmp_path / "one", prefix)
    saved(checkpoints, 4, model, optimizer, {"waited": 1})
    checkpoints.close()
    other = make(tmp_path / "two", prefix)
    other.fetch_newest()
    assert other.steps() == [4]
    assert other.load(4, *parts())["waited"] == 1


def test_a_checkpoint_without_its_marker_in_the_bucket_is_not_one(tmp_path: Path, prefix: str) -> None:
    model, optimizer = parts()
    checkpoints = make(tmp_path / "one", prefix)
    saved(checkpoints, 4, model, optimizer, {})
    checkpoints.close()
    subprocess.run([s5cmd_binary(), "rm", f"{prefix}/step-4/{MARKER}"], check=True, capture_output=True)
    other = make(tmp_path / "two", prefix)
    other.fetch_newest()
    assert other.steps() == []


@pytest.mark.parametrize(("kills", "told"), [(2, None), (9, "ended with -15")])
def test_a_client_that_a_signal_to_all_ends_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, told: str | None
) -> None:
    """torchrun tells whole groups to end; the client may not have left its rank's yet."""
    client = tmp_path / "client"
    client.write_text(
        f'#!/bin/sh\ncd {tmp_path}; echo x >>tries; [ "$(wc -l <tries)" -gt {kills} ] || kill -TERM $$\necho listed\n'
    )
    client.chmod(0o755)
    monkeypatch.setattr(checkpoint, "s5cmd_binary", lambda: str(client))
    shelf = Checkpoints(tmp_path / "r", "s3://b/r", keep_last=2, retries=3, concurrency=1, part_mb=5)
    if told is None:
        assert shelf.s5cmd("ls") == "listed\n"
    else:
        with pytest.raises(TransferError, match=told):
            shelf.s5cmd("ls")


def test_an_upload_that_fails_is_told_at_the_end(tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = parts()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    checkpoints = make(tmp_path, prefix)
    saved(checkpoints, 1, model, optimizer, {})
    with pytest.raises(TransferError, match="s5cmd"):
        checkpoints.close()
    assert checkpoints.steps() == [1]  # the disk still has it
