"""The shrunken twin: what it keeps of the model, what it finds, and that it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from test_model import written

from wmtp import config as settings
from wmtp import twin
from wmtp.memory import Peak
from wmtp.model import ModelSpec
from wmtp.weights import load_model, read_spec

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs/config.vessl.yaml")
CRITIC = str(ROOT / "configs/recipe.critic_wmtp.yaml")
BASELINE = str(ROOT / "configs/recipe.baseline_mtp.yaml")
SEVEN = ModelSpec("meta", 4, 4096, 28, 32, 32, 11008, 32000)


def lived(*arguments: str) -> tuple[int, list[dict]]:
    command = [sys.executable, "-m", "wmtp.twin", "--config", CONFIG, "--env", "production", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "WMTP_APP_ROOT"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_architecture_stays_the_sizes_go() -> None:
    small = twin.shrunken(SEVEN, 300)
    assert (small.heads, small.n_heads, small.n_kv_heads, small.layout, small.tied) == (4, 4, 4, "meta", False)
    assert (small.vocab_size, small.trunk_layers) == (300, 2)
    grouped = twin.shrunken(ModelSpec("hf", 2, 4096, 31, 32, 8, 14336, 32000, tied=True), 300)
    assert grouped.n_kv_heads < grouped.n_heads and grouped.tied and grouped.heads == 2
    qwen3 = ModelSpec("hf", 1, 2560, 35, 32, 8, 9728, 151936, head_dim=128, family="qwen3", own='{"a": 1}')
    small = twin.shrunken(qwen3, 300)
    assert (small.family, small.own, small.head_dim, small.head_width * small.n_heads) == ("qwen3", '{"a": 1}', 32, 128)


def test_every_model_of_the_recipe_is_made(tmp_path: Path) -> None:
    config, recipe = settings.load_pair(CONFIG, CRITIC, [], env="production")
    twin.make_world(tmp_path, config, recipe)
    assert read_spec(tmp_path / "models" / "base").heads == recipe.model.heads
    assert (tmp_path / "models" / "rm" / "model.bin").is_file()
    assert not (tmp_path / "models" / "ref").exists()
    lines = (tmp_path / "datasets" / "wmtp_code" / "some.jsonl").read_text().splitlines()
    assert len(lines) == twin.RECORDS


@pytest.mark.long
def test_a_recipe_whose_loss_bursts_is_found() -> None:
    code, told = lived("--recipe", BASELINE, "--set", "optim.lr=1e30", "--set", "optim.warmup_ratio=0")
    assert (code, told[0]["ok"]) == (20, False)
    assert "not finite" in told[0]["detail"]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "yarn"])
def test_a_model_of_another_family_is_drawn_small(tmp_path: Path, kind: str) -> None:
    written(kind, tmp_path / "in")
    spec = dataclasses.replace(twin.shrunken(read_spec(tmp_path / "in"), 60), heads=2)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    twin.write_model(tmp_path / "out", "base", spec, tokenizer, 0)
    assert read_spec(tmp_path / "out") == spec
    model = load_model(tmp_path / "out", "cpu")
    assert all(bool(p.any()) != name.endswith("bias") for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("again", "found"),
    [({1: 3.0, 2: 2.0, 3: 1.0}, None), ({1: 3.0, 2: 2.0, 3: 1.5}, "third step after the resume gave 1.5")],
)
def test_a_resume_that_goes_another_way_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: dict[int, float], found: str | None
) -> None:
    runs = iter([{1: 3.0, 2: 2.0, 3: 1.0}, again])
    folder = tmp_path / "checkpoints" / "twin"
    for step in (2, 3):
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / ".complete").touch()
    known: Future[Peak] = Future()
    known.set_result(Peak("step", {"weights": 104}))
    (tmp_path / "live.json").write_text('{"weights": 60, "Adam": 40}')
    monkeypatch.setattr(twin, "predict", lambda *_: known)
    monkeypatch.setattr(twin, "import_early", lambda: None)
    monkeypatch.setattr(twin, "make_world", lambda *_: 512)
    monkeypatch.setattr(twin, "start", lambda *_: [0, 0])
    monkeypatch.setattr(twin, "losses", lambda _: next(runs))
    if found is None:
        told = twin.live(CONFIG, BASELINE, [], "production", tmp_path)
        assert "third step equal" in told and "(+4.0%)" in told
    else:
        with pytest.raises(twin.TwinError, match=found):
            twin.live(CONFIG, BASELINE, [], "production", tmp_path)
