"""The trainer on real parts: tiny models, real gloo ranks, real kills."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wmtp.checkpoint import CheckpointError, TransferError
from wmtp.config import load_recipe
from wmtp.train import BadInput, claim, failure, flat, learning_rate, reopen, write_whole

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "tests/configs/recipe.baseline_mtp.yaml"
CONFIG = ROOT / "configs/config.local_minitest.yaml"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run(
        [sys.executable, ROOT / "tests/test_models/generate.py", "--out", folder],
        check=True,
        cwd=ROOT,
    )
    return folder


@pytest.fixture
def app(models: Path, tmp_path: Path) -> Path:
    """A folder that stands for /app."""
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    return tmp_path


def command(app: Path, *sets: str, ranks: int = 2, run: str = "r") -> list[str]:
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["wmtp.launch", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    arguments = [
        "--config",
        str(CONFIG),
        "--recipe",
        str(RECIPE),
        "--run-name",
        run,
        "--env",
        "minitest",
    ]
    arguments += ["--exit-file", str(app / "exit.json"), "--summary", str(app / "train.json")]
    sets = (
        "data.train.max_length=32",  # the vocabulary-wide work is what costs
        "data.eval.max_length=32",
        f"paths.checkpoints.base_path=file://{app}/checkpoints",
        "paths.checkpoints.keep_last=9",
        *sets,
    )
    if ranks == 1:
        sets = (
            "devices.distributed.enabled=false",
            "devices.fsdp.enabled=false",
            "launcher.resources.gpus=1",
            *sets,
        )
    return [*start, "wmtp.train", *arguments, *(a for s in sets for a in ("--set", s))]


def train(app: Path, *sets: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WMTP_APP_ROOT": str(app), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(app, *sets, **kwargs),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def losses(app: Path, run: str = "r") -> dict[int, str]:
    """Loss of each step as a hexadecimal float; a step that was trained twice counts the last time."""
    lines = (app / "checkpoints" / run / "steps.jsonl").read_text().splitlines()
    return {r["step"]: float(r["wmtp_loss"]).hex() for r in map(json.loads, lines)}


def test_killed_after_a_checkpoint_and_resumed_gives_the_same_losses(app: Path, tmp_path: Path) -> None:
    whole = train(app, "paths.checkpoints.save_interval=6", run="whole")
    assert whole.returncode == 0, whole.stderr
    summary = json.loads((app / "train.json").read_text())
    assert summary["steps"] == 12 and summary["ranks"] == 2
    assert summary["held_out_ce_after"] < summary["held_out_ce_before"]

    environment = {**os.environ, "WMTP_APP_ROOT": str(app), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        command(app, "paths.checkpoints.save_interval=6", run="cut"),
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    marker = app / "checkpoints/cut/step-6/.complete"
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)  # torchrun alone: its ranks must follow it
    killed.wait()
    assert not (app / "checkpoints/cut/step-12").exists()

    resumed = train(app, "paths.checkpoints.save_interval=6", run="cut")
    assert resumed.returncode == 0, resumed.stderr
    assert "goes on after step 6" in resumed.stderr
    assert {s: v for s, v in losses(app, "cut").items() if s > 6} == {
        s: v for s, v in losses(app, "whole").items() if s > 6
    }


def test_one_device_and_two_ranks_see_the_same_first_loss(app: Path) -> None:
    one = train(
        app,
        "train.max_steps=2",
        "paths.checkpoints.save_interval=2",
        "data.train.batch_size=4",
        "paths.checkpoints.save_final=false",
        ranks=1,
        run="one",
    )
    two = train(
        app,
        "train.max_steps=2",
        "paths.checkpoints.save_interval=2",
        "paths.checkpoints.save_final=false",
        run="two",
    )
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    for step in (1, 2):
        first, second = (float.fromhex(losses(app, r)[step]) for r in ("one", "two"))
        assert first == pytest.approx(second, rel=1e-5)


def test_sigterm_saves_and_ends_with_75(app: Path) -> None:
    environment = {**os.environ, "WMTP_APP_ROOT": str(app), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command(
            app,
            "train.max_steps=400",
            "train.num_epochs=1000",
            "paths.checkpoints.save_interval=399",
        ),
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr
    for line in running.stderr:
        if line.startswith("Step 5/"):
            break
    running.send_signal(signal.SIGTERM)
    running.stderr.read()
    running.wait(timeout=60)
    ended = json.loads((app / "exit.json").read_text())
    assert ended["code"] == 75 and ended["cause"] == "SIGTERM"
    assert (app / f"checkpoints/r/step-{ended['step']}/.complete").exists()


def test_missing_model_is_refused_before_anything_starts(app: Path) -> None:
    (app / "models").unlink()
    (app / "models").mkdir()
    done = train(app, ranks=1)
    assert done.returncode == 2
    assert "test-llama-mtp is not there" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((app / "exit.json").read_text())["code"] == 2


def test_an_algorithm_that_is_not_there_is_refused(app: Path) -> None:
    done = train(app, "train.algo=rho1-wmtp", ranks=1)
    assert done.returncode == 2 and "rho1-wmtp" in done.stderr


def test_the_rate_warms_up_and_falls_to_almost_nothing() -> None:
    recipe = load_recipe(RECIPE, ["optim.warmup_ratio=0.1", "optim.scheduler=cosine"])
    rates = [learning_rate(s, 100, recipe) for s in range(1, 101)]
    assert rates[9] == recipe.optim.lr == max(rates)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01 * recipe.optim.lr


def test_flat_names_nested_keys() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_write_whole_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "x" / "f", "one")
    write_whole(tmp_path / "x" / "f", "two")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["f"]
    assert (tmp_path / "x" / "f").read_text() == "two"


def test_the_first_rank_that_fails_writes_the_exit_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "exit.json"
    assert claim(path, "first")
    assert not claim(path, "second")
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["exit.json"]


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


def test_the_record_of_steps_loses_what_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with reopen(path, 2) as record:
        record.write('{"step": 3, "again": 1}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n'
