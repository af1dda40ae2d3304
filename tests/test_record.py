from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from wmtp import config as settings
from wmtp import record
from wmtp.config import Storage
from wmtp.record import Part, Recorder, StepRecord, lines, parts_of

PAIR = ("--config", "tests/configs/config.local_test.yaml", "--recipe", "tests/configs/recipe.baseline_mtp.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "logs" / "run"
    made.mkdir(parents=True)
    return made


def test_steps_that_are_trained_again_leave_the_record_and_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "at": 5}\n{"ste')
    StepRecord(path, 2).add(3, {"again": 1, "worse": float("nan")})
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert lines(path)[-1].keys() == {"step", "at", "again", "worse"} and lines(path)[-1]["worse"] is None
    assert lines(tmp_path / "redone.jsonl") == [{"step": 3, "at": 5}]


def test_another_nodes_steps_go_on_where_the_checkpoints_are(folder: Path, tmp_path: Path) -> None:
    (folder / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    recorder = Recorder(folder, None, Storage())
    recorder.steps(tmp_path / "checkpoints", 1).add(2, {"loss": 1.0})
    recorder.close()
    assert [line["step"] for line in lines(tmp_path / "checkpoints/steps.jsonl")] == [1, 2]
    assert lines(folder / "steps.jsonl") == lines(tmp_path / "checkpoints/steps.jsonl")
    assert lines(folder / "redone.jsonl") == [{"step": 2}]


def test_steps_that_another_node_made_meanwhile_take_the_place_of_fewer(folder: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "steps.jsonl").write_text('{"step": 1}\n')
    (folder / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    recorder = Recorder(folder, None, Storage())
    recorder.steps(checkpoints, 2)
    recorder.close()
    assert [line["step"] for line in lines(checkpoints / "steps.jsonl")] == [1, 2]
    assert (folder / "steps.jsonl").is_symlink()


def test_what_the_node_does_is_sampled(folder: Path) -> None:
    sample = record.Node().sample(folder)
    assert sample["gpus"] == [] or sample["gpus"][0].keys() >= {"index", "utilization_percent"}
    assert sample["rss_gib"] > 0 and sample["memory_free_gib"] > 0 and sample["disk_free_gb"] > 0
    assert abs(sample["at"] - time.time()) < 5


def test_gpus_are_read_from_nvidia_smi(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU here: the client's own words for one that works and one that tells nothing of its load.
    client = tmp_path / "bin" / "nvidia-smi"
    client.parent.mkdir()
    client.write_text('#!/bin/sh\necho "0, NVIDIA A100-SXM4-80GB, 97, 60123, 81920"\necho "1, X, [N/A], 5, 10"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    first, second = record.Node().sample(folder)["gpus"]
    assert first == {
        "index": 0,
        "name": "NVIDIA A100-SXM4-80GB",
        "utilization_percent": 97.0,
        "memory_used_mib": 60123.0,
        "memory_total_mib": 81920.0,
    }
    assert second["utilization_percent"] is None and second["memory_used_mib"] == 5.0


def begin(folder: Path, *more: str) -> int:
    return record.main(["begin", str(folder), *PAIR, "--env", "test", *more])


def test_a_part_that_was_killed_ends_where_it_was_last_seen(folder: Path) -> None:
    assert begin(folder, "--began", "1000") == 0
    (folder / record.ALIVE).touch()
    os.utime(folder / record.ALIVE, (1060, 1060))
    (folder / "steps.jsonl").write_text('{"step": 1, "at": 1055.0}\n')
    assert parts_of(folder) == [Part(1000, 1060, None, alive=True)]
    assert begin(folder, "--began", "2000") == 0
    assert record.main(["end", str(folder), *PAIR, "--env", "test", "--code", "75"]) == 0
    killed, ended = parts_of(folder)
    assert killed == Part(1000, 1060, None) and ended.began == 2000 and ended.code == 75 and not ended.alive


def test_a_bucket_that_is_away_ends_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    away = ("--set", "paths.checkpoints.base_path=s3://nowhere/checkpoints", "--set", "storage.retries=1")
    assert begin(folder, "--began", "1000", *away) == 0
    assert record.main(["end", str(folder), *PAIR, *away, "--env", "test", "--code", "20"]) == 0
    assert lines(folder / "parts.jsonl")[-1]["code"] == 20


def test_the_record_is_in_the_bucket_and_comes_to_the_next_node(folder: Path, prefix: str, tmp_path: Path) -> None:
    there = ("--set", f"paths.checkpoints.base_path={prefix}/checkpoints")
    assert begin(folder, "--began", "1000", *there) == 0
    (folder / "steps.jsonl").write_text('{"step": 1, "at": 1010.0}\n')
    (folder / "log.txt").write_text("a word\n")
    assert record.main(["end", str(folder), *PAIR, *there, "--env", "test", "--code", "20"]) == 0
    other = tmp_path / "other" / "run"
    assert begin(other, "--began", "2000", *there) == 0
    assert (other / "log.txt").read_text() == "a word\n"
    assert [part.began for part in parts_of(other)] == [1000, 2000]
    assert record.main(["end", str(other), *PAIR, *there, "--env", "test", "--code", "75"]) == 0
    assert begin(folder, "--began", "3000", *there) == 0  # and back
    assert [part.began for part in parts_of(folder)] == [1000, 2000, 3000]


def test_how_an_earlier_part_ended_leaves_the_bucket_with_the_next(folder: Path, prefix: str) -> None:
    there = ("--set", f"paths.checkpoints.base_path={prefix}/checkpoints")
    assert begin(folder, "--began", "1000", *there) == 0
    (folder / "exit.json").write_text('{"code": 20}')
    assert record.main(["end", str(folder), *PAIR, *there, "--env", "test", "--code", "20"]) == 0
    (folder / "exit.json").unlink()
    mirror = record.RecordMirror(folder, f"{prefix}/checkpoints/run/{record.NAME}", Storage())
    (folder / "log.txt").write_text("on")
    assert mirror.push() and set(mirror.remote.listed("*")) == {"log.txt", "parts.jsonl", "record.json"}


def test_facts_say_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_REVISION", "abc")
    config, recipe = settings.load_pair(Path(PAIR[1]), Path(PAIR[3]), [], env="test")
    facts: dict[str, Any] = record.facts_of("r", config, recipe, env="test", world=2)
    json.dumps(facts)
    assert (facts["run"], facts["revision"], facts["world"], facts["algo"]) == ("r", "abc", 2, "baseline-mtp")
    assert facts["config"]["seed"] == config.seed and facts["versions"]["torch"]
    assert record.tags_of(facts)["mlflow.source.git.commit"] == "abc"


def test_the_revision_says_whether_a_commit_has_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    monkeypatch.delenv("WMTP_REVISION", raising=False)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "src" / "wmtp" / "record.py"))
    config, recipe = settings.load_pair(Path(PAIR[1]), Path(PAIR[3]), [], env="test")
    assert record.facts_of("r", config, recipe, env="test")["revision"] is None
    git("init", "-q")
    assert record.facts_of("r", config, recipe, env="test")["revision"] is None
    git("commit", "-q", "--allow-empty", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert record.facts_of("r", config, recipe, env="test")["revision"] == commit
    (tmp_path / "new.py").write_text("")
    assert record.facts_of("r", config, recipe, env="test")["revision"] == f"{commit}-dirty"


def test_facts_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESSL_ACCESS_TOKEN", "t0ps3cret")
    monkeypatch.setenv("SET", "optim.lr=0.1")
    keys = ["mlflow.tracking_uri=http://ann:pass1234@ml:5000", "mlflow.experiment=t0ps3cret"]
    config, recipe = settings.load_pair(Path(PAIR[1]), Path(PAIR[3]), keys, env="test")
    facts = record.facts_of("r", config, recipe, env="test")
    assert not re.search("pass1234|t0ps3cret", json.dumps(facts)) and facts["set"] == "optim.lr=0.1"
    assert facts["config"]["mlflow"]["tracking_uri"] == "http://***@ml:5000"


def test_a_living_part_was_last_seen_by_its_own_nodes_clock(folder: Path) -> None:
    ahead = time.time() + 3600
    (folder / "parts.jsonl").write_text(json.dumps({"began": time.time() - 600}) + "\n")
    (folder / "steps.jsonl").write_text(json.dumps({"step": 1, "at": ahead}) + "\n")
    assert parts_of(folder)[-1].ended == ahead


def test_a_line_after_one_that_a_kill_tore_is_a_line_of_its_own(folder: Path) -> None:
    (folder / "parts.jsonl").write_text('{"began": 1.0}\n{"end')
    record.add_line(folder / "parts.jsonl", {"began": 5.0})
    assert lines(folder / "parts.jsonl") == [{"began": 1.0}, {"began": 5.0}]


def test_a_full_disk_ends_no_training_and_takes_no_step_from_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = StepRecord(tmp_path / "steps.jsonl", 0)
    steps.add(1, {})
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "steps.jsonl").stat().st_size + 5, was[1]))
        steps.add(2, {})
        steps.add(3, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, before)
    steps.add(4, {})
    assert [line["step"] for line in lines(tmp_path / "steps.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("warn") == 1


def test_the_record_goes_to_the_bucket_with_each_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop calls `facts` before it saves: a node that is lost leaves the steps that its checkpoint has."""
    pushed: list[str] = []

    def push(mirror: record.RecordMirror) -> bool:
        pushed.append((mirror.folder / "facts.json").read_text())
        return True

    monkeypatch.setenv("WMTP_MIRROR_S", "600")
    monkeypatch.setattr(record.RecordMirror, "push", push)
    recorder = record.Recorder(tmp_path, "s3://b/run", Storage())
    recorder.facts({"step": 5})
    until = time.monotonic() + 10
    while not pushed and time.monotonic() < until:
        time.sleep(0.01)
    recorder.close()
    assert pushed and '"step": 5' in pushed[0]
