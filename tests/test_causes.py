"""The class of a failure: six that are planted in real runs, and a table of the rest."""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plants
import pytest
import torch
from runs import ROOT, Run

from wmtp import causes
from wmtp.bucket import BucketError
from wmtp.causes import End, explain
from wmtp.config import ConfigError
from wmtp.manifest import ManifestError
from wmtp.model import ModelError
from wmtp.outcome import BadInput, NotFiniteError, Progress, claim, failure
from wmtp.remote import CheckpointError, DamagedError, TransferError
from wmtp.sources import DataError, TokenizerError
from wmtp.vocab import VocabError


@pytest.fixture(scope="module")
def app_of_all(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    app = tmp_path_factory.mktemp("app")
    (app / "models").symlink_to(models)
    (app / "mlruns_test").mkdir()  # a new store takes seconds
    return app


@pytest.fixture
def app(app_of_all: Path, tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    for model in (app_of_all / "models").iterdir():
        (tmp_path / "models" / model.name).symlink_to(model)
    (tmp_path / "mlruns_test").symlink_to(app_of_all / "mlruns_test")
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    return tmp_path


# ---- planted in real runs --------------------------------------------------------------------------------------------


def ended(
    app: Path, code: int, *sets: str, world: int = 1, plant: Callable[[int], None] | None = None, term: bool = False
) -> dict[str, Any]:
    """What is found of a run that ends with ``code``; ``term``: it gets a SIGTERM in its second step."""
    folder = app / "logs/r"
    folder.mkdir(parents=True)  # the startup script's
    short = ("train.max_steps=20", "paths.checkpoints.save_interval=20", "paths.checkpoints.save_final=false")
    arguments = ("--exit-file", str(folder / "exit.json"))
    run = Run(app, "baseline-mtp", "r", *short, *sets, world=world, arguments=arguments, plant=plant).start()
    if term:
        run.until("Step 2/")
        for rank in run.ranks:
            assert rank.pid
            os.kill(rank.pid, signal.SIGTERM)
    assert run.wait() == code, run.log()
    shutil.copyfile(app / "r-0.log", folder / "log.txt")
    found = explain(folder, End(code))
    assert json.loads((folder / "exit.json").read_text())["class"] == found["class"], found
    return found


def test_planted_out_of_memory(app: Path) -> None:
    found = ended(app, 20, plant=plants.no_more_memory_in_step_3)
    assert found["class"] == "out of memory" and found["step"] == 2 and found["phase"] == "train"
    assert re.match(r"traceback-rank-0\.log:\d+: \w*(Error|Exception)", found["evidence"]), found


def test_planted_nan(app: Path) -> None:
    found = ended(app, 20, plant=plants.never_finite)
    assert found["class"] == "numerics" and found["step"] == 9
    assert "NotFiniteError: 10 steps in a row" in found["evidence"]


def test_planted_missing_model(app: Path) -> None:
    (app / "models/test-llama-mtp").unlink()
    found = ended(app, 2)
    assert found["class"] == "model files" and "test-llama-mtp is not there" in found["evidence"]
    assert found["phase"] == "data" and found["next"] == "make models"


def test_planted_missing_file_of_a_model(app: Path) -> None:
    whole = (app / "models/test-llama-mtp").resolve()
    (app / "models/test-llama-mtp").unlink()
    part = shutil.copytree(
        whole, app / "models/test-llama-mtp", ignore=shutil.ignore_patterns("*.safetensors", "*.pth")
    )
    assert len(list(Path(part).iterdir())) < len(list(whole.iterdir()))
    assert ended(app, 2)["class"] == "model files"


def test_planted_vocabulary(app: Path) -> None:
    found = ended(app, 2, "model.vocab_size=64")
    assert found["class"] == "vocabulary" and "model.vocab_size is 64" in found["evidence"]
    assert found["next"].startswith("make check-vocab")


def test_planted_sigterm(app: Path) -> None:
    found = ended(app, 75, world=2, term=True)
    assert found["class"] == "preempted" and found["cause"] == "SIGTERM" and found["evidence"] == "exit.json: SIGTERM"


def test_planted_exception_on_rank_1_only(app: Path) -> None:
    found = ended(app, 20, world=2, plant=plants.rank_1_raises_in_step_3)
    assert found["class"] == "bug" and found["first_rank"] == "1" and found["step"] == 2
    assert re.fullmatch(r"traceback-rank-1\.log:\d+: ArithmeticError: planted in rank 1", found["evidence"])
    # Rank 0 saw its connection close: that is no network that failed.
    assert found["ranks"]["1"] == "ArithmeticError: planted in rank 1" and "Error" in found["ranks"]["0"]
    assert "Rank 1 was the first; rank 0 ended after it." in causes.paragraph(found)


# ---- exceptions ------------------------------------------------------------------------------------------------------


def from_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out of memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "bug"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (DataError("line 3: out of memory"), "data"),
        (TokenizerError("holds no tokenizer"), "model files"),
        (ModelError("a", "b", "c"), "model files"),
        (ManifestError("refused"), "model files"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/app/models/x/params.json"), "model files"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/app/datasets/x.jsonl"), "data"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/app/x"), "bug"),
        (VocabError("differ"), "vocabulary"),
        (TransferError("no answer"), "network"),
        (DamagedError("its marker is gone"), "network"),
        (BucketError("no answer"), "network"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "network"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "network"),
        (torch.distributed.DistNetworkError("connect"), "network"),
        (torch.distributed.DistStoreError("wait timeout after 300000ms"), "network"),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"), "network"),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), "out of memory"),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "network"),
        (RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms"), "network"),
        (NotFiniteError("10 steps in a row"), "numerics"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (from_cause(CheckpointError("save"), OSError(errno.ENOSPC, "full")), "disk"),
        (from_cause(CheckpointError("save"), RuntimeError("can't allocate memory")), "out of memory"),
        (ConfigError([]), "configuration"),
        (BadInput("x"), "configuration"),
        (BadInput("x", "data"), "data"),
        (ArithmeticError("connection reset by peer"), "bug"),
        (RuntimeError("boom"), "bug"),
        (AssertionError(), "bug"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_class_of_an_exception(error: Exception, kind: str) -> None:
    assert causes.of_error(error) == failure(error, 0, None)[1] == kind and kind in causes.CLASSES


def test_names_of_exceptions_are_those_of_classes_that_exist() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src/wmtp").glob("*.py"))
    outside = {"OutOfMemoryError", "SafetensorError", "DistNetworkError", "DistStoreError", "gaierror"}
    known = {*outside, *dir(builtins)}
    assert {n for n in causes.BY_NAME if n not in known and f"class {n}(" not in source} == set()


def test_the_phases_are_those_of_the_trainer_in_its_order() -> None:
    said = re.findall(r'phases\.done\("([a-z ]+)"\)', (ROOT / "src/wmtp/train.py").read_text())
    assert ("imports", *said) == causes.PHASES


def test_the_exit_file_has_the_class(tmp_path: Path) -> None:
    for code, cause, kind, told in (
        (20, "x", "bug", "bug"),
        (75, "max_hours", None, "hours"),
        (75, "SIGTERM", None, "preempted"),
        (0, None, None, None),
    ):
        (tmp_path / "exit.json").unlink(missing_ok=True)
        claim(tmp_path / "exit.json", code, Progress(3, cause, kind))
        assert json.loads((tmp_path / "exit.json").read_text())["class"] == told


# ---- records ---------------------------------------------------------------------------------------------------------


def record(folder: Path, **files: Any) -> Path:
    """A folder of a run; names with `_` for `.`, values as text or JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", "-").replace("_", ".")).write_text(text)
    return folder


TRAINED = "training ended with 20 after 9 s: "
LOST = {"code": 20, "step": 4, "cause": "rank 0: RuntimeError: Connection closed by peer", "class": "network"}
KILLED_RANK = (
    "startup   r: minitest\nStep 4\nlaunch    rank 1 ended by SIGKILL: killed by the system, dmesg says more\n"
)


@pytest.mark.parametrize(
    ("end", "files", "kind", "evidence"),
    [
        (End(3, "AWS_ACCESS_KEY_ID is not set"), {}, "credentials", "AWS_ACCESS_KEY_ID is not set"),
        (End(10, "/app: can't be written"), {}, "disk", "/app: can't be written"),
        (
            End(2, "pretraining.yaml can't be used"),
            {"exit_json": {"code": 2, "class": "data"}},
            "configuration",
            "pretraining.yaml",
        ),
        (End(11, "sync ended with 11 after 3 s"), {}, "network", "sync ended with 11"),
        (
            End(13, "sync ended with 13 after 3 s"),
            {"log_txt": "sync      FAIL  a: old\nstartup   r: minitest\nsync      FAIL  b: other content\n"},
            "model files",
            "log.txt:3: b: other content",
        ),
        (End(14, "vocabularies ended with 14 after 1 s"), {}, "vocabulary", "vocabularies ended"),
        (End(143, ""), {}, "preempted", "ended with 143"),
        (End(130, ""), {}, "preempted", "ended with 130"),
        (End(75, "x", hours=True), {"exit_json": {"code": 75, "cause": "SIGTERM", "class": "preempted"}}, "hours", "x"),
        (End(20, "MAX_HOURS: 1 h are used up; it did not save", 137, hours=True), {}, "hours", "MAX_HOURS"),
        (
            End(12, "MAX_HOURS: 1 h; training ended with 12 after 9 s", hours=True),
            {"exit_json": {"code": 12, "cause": "rank 0: s5cmd", "class": "network"}},
            "network",
            "exit.json: rank 0: s5cmd",
        ),
        (
            End(2, "training ended with 2"),
            {
                "exit_json": {
                    "code": 2,
                    "cause": "made otherwise:\n  optim.lr: 1 -> 2\n; rule: x",
                    "class": "configuration",
                }
            },
            "configuration",
            "exit.json: made otherwise: optim.lr: 1 -> 2",
        ),
        # The others see the connection of a killed rank close.
        (
            End(20, TRAINED, 1, 1),
            {"exit_json": LOST, "log_txt": KILLED_RANK},
            "out of memory",
            "log.txt:3: rank 1 ended",
        ),
        (End(20, TRAINED, 1, 0), {"exit_json": LOST, "log_txt": KILLED_RANK}, "killed", "log.txt:3: rank 1 ended"),
        (
            End(20, TRAINED, 1, 0, 8.0),
            {"exit_json": LOST, "log_txt": KILLED_RANK, "node_jsonl": {"rss_gib": 7.8, "memory_free_gib": 0.2}},
            "out of memory",
            "log.txt:3",
        ),
        (
            End(20, TRAINED, 1),
            {"exit_json": LOST, "log_txt": KILLED_RANK + "kernel: Memory cgroup out of memory: Killed process 7\n"},
            "out of memory",
            "log.txt:4: kernel",
        ),
        (
            End(20, TRAINED, 1),
            {"exit_json": LOST, "log_txt": "launch    rank 1 ended by SIGSEGV\n"},
            "bug",
            "log.txt:1",
        ),
        (End(20, TRAINED, 1), {"exit_json": LOST}, "network", "exit.json: rank 0: RuntimeError"),
        (End(20, "training ended with 137 and left no exit.json", 137, 1), {}, "out of memory", "the process ended by"),
        (End(20, "training ended with 137 and left no exit.json", 137), {}, "killed", "the process ended by SIGKILL"),
        (
            End(20, "the trainer wrote 0, but its launcher ended", 1),
            {"exit_json": {"code": 0}},
            "unknown",
            "the trainer",
        ),
        (
            End(20, "training ended with 1 and left no exit.json", 1),
            {"log_txt": "x\nTraceback (most recent call last):\n  File\nKeyError: 'a'\n"},
            "bug",
            "log.txt:4: KeyError: 'a'",
        ),
        (
            End(20, "training ended with 1 and left no exit.json", 1),
            {"traceback__rank__2_log": "Traceback (most recent call last):\n  x\nwmtp.model.ModelError: a\nmore\n"},
            "model files",
            "traceback-rank-2.log:3: wmtp.model.ModelError: a",
        ),
        (
            End(1, "sync ended with 1 after 3 s", 1),
            {"log_txt": "a: connection refused\n"},
            "network",
            "log.txt:1: a: connection refused",
        ),
        (End(1, "sync ended with 1 after 3 s", 1), {}, "unknown", "sync ended with 1"),
    ],
)
def test_the_class_of_a_record(tmp_path: Path, end: End, files: dict[str, Any], kind: str, evidence: str) -> None:
    found = explain(record(tmp_path / "r", **files), end)
    assert found["class"] == kind and found["evidence"].startswith(evidence), found


def test_the_first_rank_is_the_one_that_was_killed(tmp_path: Path) -> None:
    lost = "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n"
    folder = record(tmp_path / "r", exit_json=LOST, log_txt=KILLED_RANK, traceback__rank__0_log=lost)
    found = explain(folder, End(20, TRAINED, 1))
    assert found["first_rank"] == "1" and found["evidence"] == "log.txt:3: rank 1 ended by SIGKILL"
    assert causes.paragraph(found).endswith("Rank 1 was the first; rank 0 ended after it.")


def test_what_an_earlier_part_left_does_not_count(tmp_path: Path) -> None:
    old = {"code": 20, "step": 4, "cause": "rank 0: ValueError: x", "class": "bug"}
    folder = record(tmp_path / "r", exit_json=old, traceback__rank__0_log="Traceback (most recent call last):\nE: x\n")
    for path in folder.iterdir():
        os.utime(path, (1000, 1000))
    record(folder, parts_jsonl=json.dumps({"began": time.time() - 5}) + "\n")
    found = explain(folder, End(20, "training ended with 137 and left no exit.json", 137))
    assert found["class"] == "killed" and found["ranks"] == {} and found["step"] is None


def test_the_phase_is_the_one_that_had_begun(tmp_path: Path) -> None:
    def after(*phases: str, algo: str = "critic-wmtp") -> str:
        rows = "".join(json.dumps({"phase": p, "began": 1, "ended": 2, "by": "train"}) + "\n" for p in phases)
        return str(
            explain(record(tmp_path / "r", phases_jsonl=rows, facts_json={"algo": algo}), End(20, TRAINED))["phase"]
        )

    assert after() == "imports" and after("imports", "ranks") == "data"
    assert after("load") == "pretrain" and after("load", algo="rho1-wmtp") == "held out"
    assert after("first step") == "train" and after("train") == "end" and after("else") == "after else"
    assert after("first step", "save") == "train"  # a save is within it
    assert explain(tmp_path / "r", End(12, "sync ended with 12 after 3 s"))["phase"] == "sync"
    assert explain(tmp_path / "r", End(10, "can't be written"))["phase"] == "prepare"


def test_the_last_that_was_known_of_memory(tmp_path: Path) -> None:
    gpus = [{"index": i, "memory_used_mib": 1024 * used, "memory_total_mib": 81920} for i, used in ((0, 70), (1, 79.5))]
    lines = (
        json.dumps({"at": 1, "rss_gib": 1.0}) + "\n" + json.dumps({"at": 2, "rss_gib": 3.5, "gpus": gpus}) + '\n{"at'
    )
    found = explain(record(tmp_path / "r", node_jsonl=lines), End(20, TRAINED, limit_gib=64.0))
    assert found["memory"]["rss_gib"] == 3.5 and found["memory"]["limit_gib"] == 64.0 and found["memory"]["at"] == 2
    assert "GPU 1: 79.5 of 80.0 GiB" in causes.paragraph(found)
    found = explain(record(tmp_path / "s", node_jsonl='{"at": 1, "rss_gib": 3.5}'), End(20, TRAINED, limit_gib=64.0))
    assert "3.5 GiB of 64.0 GiB" in causes.paragraph(found)


@pytest.mark.parametrize(
    ("end", "kind", "local", "cluster"),
    [
        (
            20,
            "out of memory",
            'make minitest ALGO=rho1-wmtp RUN_NAME=r SET="data.train.batch_size=2 train.accumulation_steps=6"'
            ' ALLOW="data.train.batch_size train.accumulation_steps"',
            "make submit ENV=production ALGO=rho1-wmtp RUN_NAME=r RESUME=1"
            ' SET="data.train.batch_size=2 train.accumulation_steps=6"'
            ' ALLOW="data.train.batch_size train.accumulation_steps"',
        ),
        (
            20,
            "numerics",
            'make minitest ALGO=rho1-wmtp RUN_NAME=r SET="optim.lr=1e-05" ALLOW="optim.lr"',
            'make submit ENV=production ALGO=rho1-wmtp RUN_NAME=r RESUME=1 SET="optim.lr=1e-05" ALLOW="optim.lr"',
        ),
        (2, "data", "make dryrun ENV=minitest ALGO=rho1-wmtp", "make dryrun ENV=production ALGO=rho1-wmtp"),
        (2, "model files", "make dryrun ENV=minitest ALGO=rho1-wmtp", "make verify-models NAME=a-base"),
        (20, "network", "make minitest ALGO=rho1-wmtp RUN_NAME=r", "make resume RUN_ID=r"),
        (75, "preempted", "make minitest ALGO=rho1-wmtp RUN_NAME=r", "make resume RUN_ID=r"),
        (3, "credentials", "make models", "make models"),
        (20, "bug", "less '{folder}/traceback-rank-1.log'", "make report RUN_ID=r"),
        (20, "hang", "less '{folder}/flight-rank-0.log'", "make report RUN_ID=r"),
        (
            10,
            "disk",
            "make cache EVICT=unused",
            'make submit ENV=production ALGO=rho1-wmtp RUN_NAME=r RESUME=1 SET="paths.checkpoints.keep_last=1"',
        ),
    ],
)
def test_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int, kind: str, local: str, cluster: str
) -> None:
    monkeypatch.delenv("SET", raising=False)
    facts = {
        "run": "r",
        "algo": "rho1-wmtp",
        "config": {"paths": {"models": {"base": "s3://b/models/a-base"}}},
        "recipe": {"data": {"train": {"batch_size": 4}}, "train": {"accumulation_steps": 3}, "optim": {"lr": 2e-5}},
    }
    ended = {"code": end, "step": 1, "cause": "rank 1: /app/models/a-base: x", "class": kind}
    for launcher, env, command in (("local", "minitest", local), ("vessl", "production", cluster)):
        folder = record(
            tmp_path / launcher / "r",
            exit_json=ended,
            facts_json=facts | {"launcher": launcher, "env": env},
            **({"traceback__rank__1_log": "Traceback (most recent call last):\nE: x\n"} if kind == "bug" else {}),
            **({"flight__rank__0_log": "stacks"} if kind == "hang" else {}),
        )
        found = explain(folder, End(end, "training ended with it"))
        assert found["class"] == kind and found["next"] == command.format(folder=folder)
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text() or command.split()[1] == "report"


@pytest.mark.parametrize(("code", "kind"), [(2, "data"), (2, "configuration"), (14, "vocabulary")])
def test_the_next_command_is_about_the_configuration_of_the_run(tmp_path: Path, code: int, kind: str) -> None:
    """Without the launcher a mini-test's command reads the local configuration, which has no fault."""
    ended = {"code": code, "step": 1, "cause": "x", "class": kind}
    facts = {"env": "minitest", "algo": "rho1-wmtp", "launcher": "vessl"}
    found = explain(record(tmp_path / "r", exit_json=ended, facts_json=facts), End(code, TRAINED))
    assert found["next"].endswith(" ENV=minitest ALGO=rho1-wmtp LAUNCHER=vessl")


def test_the_advice_of_the_cause_comes_before_the_command(tmp_path: Path) -> None:
    cause = (
        "the checkpoint of step 3 was made otherwise:\n  optim.lr: 1 -> 2\n; rule: as it began; next: set it\n back."
    )
    folder = record(
        tmp_path / "r", exit_json=json.dumps({"code": 2, "step": 0, "class": "configuration", "cause": cause})
    )
    failure = causes.explain(folder, causes.End(2, "training ended with 2 after 9 s: step 0 the checkpoint"))
    assert causes.following(failure) == f"set it back; then: {failure['next']}"
    assert "next: " not in causes.paragraph(failure) and "optim.lr: 1 -> 2" in causes.paragraph(failure)


def test_a_model_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"env": "test", "algo": "baseline-mtp", "launcher": "local"}
    facts |= {"config": {"paths": {"models": {"base": "file:///app/models/lama", "rm": "file:///app/models/rm"}}}}
    log = "vocab     FAIL  /app/models/lama: no such folder\n"
    folder = record(tmp_path / "r", facts_json=json.dumps(facts), log_txt=log)
    failure = causes.explain(folder, causes.End(13, "vocabularies ended with 13 after 1 s"))
    assert failure["next"].endswith('SET="paths.models.base=file://…"'), failure


def test_the_dry_run_that_is_next_has_the_settings_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "data.max_length=0 seed=2")
    ended = {"code": 2, "step": 1, "cause": "x", "class": "configuration"}
    found = explain(record(tmp_path / "r", exit_json=ended, facts_json={"env": "minitest"}), End(2, TRAINED))
    assert found["next"] == 'make dryrun ENV=minitest SET="data.max_length=0 seed=2"'


@pytest.mark.parametrize(("launcher", "told"), [("local", "told to end"), ("vessl", "preempted")])
def test_a_persons_own_machine_is_not_preempted(tmp_path: Path, launcher: str, told: str) -> None:
    ended = {"code": 75, "step": 5, "cause": "SIGTERM", "class": "preempted"}
    folder = record(tmp_path / "r", exit_json=ended, facts_json={"env": "minitest", "launcher": launcher})
    assert causes.paragraph(explain(folder, End(75, TRAINED))).startswith(f"r stopped: {told}, in ")
    word = "stopped" if launcher == "local" else "failed"
    assert causes.paragraph(explain(folder, End(143, "ended with 143"))).startswith(f"r {word}: {told}, in prepare")


@pytest.mark.parametrize(
    ("evidence", "command"),
    [
        ("code/problems.jsonl:40: is not JSON", "make publish-models AS=datasets FROM=… NAMES=code-v2 FORCE=1"),
        ("/app/datasets/mine/problems.jsonl:40: is not JSON", "make dryrun ENV=production ALGO=rho1-wmtp"),
    ],
)
def test_bad_data_is_mended_where_it_is(tmp_path: Path, evidence: str, command: str) -> None:
    """The dry run reads no data in the bucket: there it would find nothing."""
    datasets = {"code": "s3://b/datasets/code-v2/", "mine": "file:///app/datasets/mine"}
    facts = {"env": "production", "algo": "rho1-wmtp", "launcher": "vessl", "config": {"paths": {"datasets": datasets}}}
    ended = {"code": 2, "step": 0, "cause": evidence, "class": "data"}
    found = explain(record(tmp_path / "r", exit_json=ended, facts_json=facts), End(2, TRAINED))
    assert found["next"] == command


def test_bad_data_of_the_bucket_is_known_before_the_settings_are_recorded(tmp_path: Path) -> None:
    ended = {"code": 2, "step": 0, "cause": "code/problems.jsonl:40: is not JSON", "class": "data"}
    folder = record(tmp_path / "r", exit_json=ended, sync_jsonl='{"model": "m"}\n{"dataset": "code"}\n')
    assert explain(folder, End(2, TRAINED))["next"] == "make publish-models AS=datasets FROM=… NAMES=code FORCE=1"


def test_the_bundle_holds_the_record_without_secrets(tmp_path: Path) -> None:
    folder = record(
        tmp_path / "r",
        exit_json={"code": 20, "step": 1, "cause": "rank 0: key hunter2-4711", "class": "bug"},
        log_txt="".join(f"line {n}\n" for n in range(900)) + "key hunter2-4711 https://me:word@host/\n",
        facts_json={"algo": "x"},
        node_jsonl='{"at": 1}\n',
        flight__rank__1_log="stacks",
        other_bin="x",
    )
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "hunter2-4711", "COLUMNS": "80"}
    command = [sys.executable, "-m", "wmtp.causes", str(folder), "--code", "20", f"--said={TRAINED}hunter2-4711"]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5  # 0.1 s; not torch's import, which a test of its own refuses
    more, last = done.stdout.splitlines()[-2:]
    assert more == "more: docs/failures/bug.md" and last.startswith("next: ") and not done.stderr
    with tarfile.open(folder / "bundle.tar.gz") as archive:
        files = {name.removeprefix("r/"): archive.extractfile(name) for name in archive.getnames()}
        held = {name: file.read().decode() for name, file in files.items() if file}
    assert set(held) == {
        *("log.txt", "node.jsonl", "facts.json", "exit.json", "failure.json", "failure.md", "flight-rank-1.log")
    }
    assert held["log.txt"].count("\n") == 500 and held["log.txt"].endswith("key *** https://***@host/\n")
    everything = done.stdout + "".join(held.values()) + (folder / "failure.md").read_text()
    assert "hunter2" not in everything
    told = (folder / "failure.md").read_text()
    assert told.count("\n") == 1 and "r failed: bug" in told and "`make report RUN_ID=r`" in told


def test_what_can_not_be_written_or_read_is_said_and_the_paragraph_stands(tmp_path: Path) -> None:
    folder = record(
        tmp_path / "r", exit_json="torn {", parts_jsonl="[1]\n{", phases_jsonl='{"ended": "x"}', node_jsonl="["
    )
    (folder / "failure.json").mkdir()
    (folder / "log.txt").write_bytes(b"\xff\x00 not text\n")
    done = subprocess.run(
        [sys.executable, "-m", "wmtp.causes", folder, "--code", "20"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith("r failed: unknown") and "failure.json: IsADirectoryError" in done.stderr
