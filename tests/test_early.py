"""What the trainer does while the models come."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from wmtp import cache
from wmtp.early import first_look, then_whole
from wmtp.manifest import COMPLETE, MANIFEST, create, load_manifest
from wmtp.outcome import BadInput, Stop, Stopped

URI = "file:///app/models/m"
SPEC = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPEC |= {"intermediate_size": 128, "vocab_size": 512, "num_key_value_heads": 4}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WMTP_APP_ROOT", str(tmp_path / "app"))
    return tmp_path / "app"


def model(folder: Path, heads: int = 4) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SPEC | {"wmtp_heads": heads}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / MANIFEST).write_text(json.dumps(create(folder, "m")))
    return folder


def early(whole: Path, first: Path) -> Path:
    part = first / "m"
    part.mkdir(parents=True)
    for name in ("config.json", MANIFEST):
        (part / name).write_bytes((whole / name).read_bytes())
    return part


def test_what_came_first_is_looked_at_before_the_weights_are_here(app: Path, tmp_path: Path) -> None:
    part = early(model(tmp_path / "source"), tmp_path / "first")
    looked, spec = first_look(URI, tmp_path / "here", tmp_path / "first", Stop())
    assert looked == part and spec.hidden == 64
    model(app / "models/m")
    threading.Timer(0.2, (tmp_path / "here").touch).start()
    assert then_whole(URI, looked, tmp_path / "here", Stop()) == app / "models/m"


def test_models_that_are_here_are_looked_at_whole(app: Path, tmp_path: Path) -> None:
    early(model(tmp_path / "source"), tmp_path / "first")
    model(app / "models/m")
    (tmp_path / "here").touch()
    for after in (None, tmp_path / "here"):
        assert first_look(URI, after, tmp_path / "first", Stop())[0] == app / "models/m"


def test_another_version_than_was_looked_at_is_refused(app: Path, tmp_path: Path) -> None:
    part = early(model(tmp_path / "source"), tmp_path / "first")
    model(app / "models/m")
    (app / "models/m/config.json").write_text(json.dumps(SPEC | {"num_hidden_layers": 3}))
    (tmp_path / "here").touch()
    with pytest.raises(BadInput, match=r"config\.json is another"):
        then_whole(URI, part, tmp_path / "here", Stop())


def test_a_notice_to_stop_ends_the_wait(app: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop.signal = "SIGTERM"
    with pytest.raises(Stopped):
        first_look(URI, tmp_path / "here", None, stop)


def test_a_synced_model_is_read_at_its_version_and_held(app: Path, tmp_path: Path) -> None:
    version = model(tmp_path / "store" / ("a" * 64))
    (version / COMPLETE).write_text(load_manifest(version / MANIFEST).digest)
    (app / "models").mkdir(parents=True)
    (app / "models/m").symlink_to(version)
    assert not cache.held(version)
    assert first_look(URI, None, None, Stop())[0] == version
    assert cache.held(version)
