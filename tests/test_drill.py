"""The restore drill's last part: what is whole is read, what is not is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp import drill
from wmtp.checkpoint import Checkpoints
from wmtp.config import Storage
from wmtp.drill import main
from wmtp.remote import MARKER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return kept(tmp_path, torch.nn.Linear(30, 20))


def kept(place: Path, model: torch.nn.Module) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(place, None, keep_last=1, storage=Storage())
    folder = checkpoints.save(4, model, optimizer, {"waited": 1})
    checkpoints.close()
    return folder


def drilled(folder: Path, step: int = 4) -> int:
    return main([str(folder), "--run", "r", "--step", str(step)])


@pytest.mark.parametrize("batch", [1, 2**30])
def test_every_tensor_is_read_whatever_fits_at_once(
    folder: Path, batch: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drill, "BATCH", batch)
    assert drilled(folder) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != MARKER)
    told.pop("seconds")
    # weight and bias, of each Adam's step and two moments
    assert told == {"run": "r", "step": 4, "files": 3, "bytes": size, "tensors": 8, "not_finite": 0}


def test_what_is_not_finite_is_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(30, 20)
    with torch.no_grad():
        model.bias[3] = torch.inf
    assert drilled(kept(tmp_path, model)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["not_finite"] == 1 and "model.bias" in err


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("__0_0.distcp", lambda path: os.truncate(path, 100), "__0_0.distcp: not the"),
        (".metadata", lambda path: path.unlink(), ".metadata: not the"),
        ("trainer.json", lambda path: path.write_text('{"step": 5, "waited": 1}'), "trainer.json says step 5"),
        ("__0_0.distcp", lambda path: path.write_bytes(b"x" * path.stat().st_size), "torch says"),
        (MARKER, lambda path: path.write_text("{"), "JSONDecodeError"),
    ],
)
def test_what_can_not_be_read_is_named(
    folder: Path, name: str, how: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how(folder / name)
    assert drilled(folder) == 13
    out, err = capsys.readouterr()
    assert told in err and not out


def test_a_shard_shorter_than_its_metadata_says_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the marker was written over it: what torch wrote says where each piece ends."""
    shard = folder / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 100)
    listed = json.loads((folder / MARKER).read_text())
    for entry in listed["files"]:
        entry["bytes"] = (folder / entry["path"]).stat().st_size
    (folder / MARKER).write_text(json.dumps(listed))
    assert drilled(folder) == 13
    assert "__0_0.distcp ends before byte" in capsys.readouterr().err
