from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmtp import preflight
from wmtp.preflight import FAIL, NOT, OK, Finding

ALL = [f"configs/recipe.{algo}.yaml" for algo in ("baseline_mtp", "rho1_wmtp", "critic_wmtp")]
CLUSTER = ["--env", "production", "--config", "configs/config.vessl.yaml"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)  # the suite's own bucket is no cluster's
    monkeypatch.setenv("TWIN", "0")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict, str]:
    code = preflight.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def verdicts(report: dict, heading: int) -> set[str]:
    return {f["verdict"] for f in report["findings"] if f["heading"] == heading}


def test_production_passes_for_all_three(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [word for recipe in ALL for word in ("--recipe", recipe)]
    code, report, told = run(capsys, *CLUSTER, *recipes)
    assert code == 0
    assert report["counts"][FAIL] == 0
    assert [verdicts(report, n) >= {OK} for n in (1, 2, 3, 4)] == [True] * 4
    assert NOT in verdicts(report, 4) and NOT in verdicts(report, 5)
    assert told.count("devices.fsdp.sharding") == 0  # values are shown for one algorithm only
    assert len({json.dumps(f) for f in report["findings"]}) == len(report["findings"])


def test_each_value_has_its_source(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_BUCKET_NAME", "other")
    _, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--set", "seed=7")
    rows = {preflight.bare(r["key"]): r for r in report["resolved"][0]["keys"]}
    assert rows["seed"]["value"] == 7
    assert rows["seed"]["from"].startswith("--set")
    assert rows["storage.bucket"]["value"] == "other"
    assert "S3_BUCKET_NAME" in rows["storage.bucket"]["from"]
    assert rows["train.algo"]["from"].startswith("configs/recipe.baseline_mtp.yaml:")
    assert rows["eval.max_batches"]["key"].endswith("eval.max_batches")


def test_findings_of_a_broken_configuration_are_all_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipes = [word for recipe in ALL for word in ("--recipe", recipe)]
    code, report, _ = run(capsys, *CLUSTER, *recipes, "--set", "sead=7", "--set", "log_interval=0")
    assert code == 2
    told = [f["subject"] for f in report["findings"] if f["verdict"] == FAIL]
    assert [sum(key in subject for subject in told) for key in ("sead", "log_interval")] == [1, 1]
    assert verdicts(report, 3) == {NOT}


def test_the_receipt_is_kept_under_the_runs_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--revision", "abcdef01", "--receipt-dir", str(tmp_path))
    assert report["run"].startswith("production-baseline-mtp-abcdef0-")
    assert json.loads((tmp_path / report["run"] / "preflight.json").read_text()) == report


def test_torch_is_not_imported() -> None:
    code = "import sys, wmtp.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("WORKDIR /app\nRUN mkdir -p /app/{models,datasets,checkpoints,mlruns,logs}\n", {OK}),
        ("WORKDIR /app\nRUN mkdir -p /app/models\n", {OK, FAIL}),
        ("WORKDIR /app\nWORKDIR /workspace\n", {FAIL}),
        (None, {FAIL}),
    ],
)
def test_dockerfile(tmp_path: Path, text: str | None, verdict: set[str]) -> None:
    file = tmp_path / "Dockerfile"
    if text is not None:
        file.write_text(text)
    assert {f.verdict for f in preflight.check_dockerfile(file)} == verdict


def test_the_run_file_is_rendered_for_the_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--set", "launcher.volume=wmtp-models-cache")
    told = [f for f in report["findings"] if f["verdict"] == FAIL]
    assert (code, [f["subject"] for f in told]) == (2, ["run file"])
    assert "launcher.volume" in told[0]["detail"] and "volume://" in told[0]["next"]
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert run(capsys, *CLUSTER, "--recipe", ALL[0])[0] == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "solution": "b"}', None),
        ('{"text": "a", "code": "b"}', None),
        ('{"prompt": "a"}', "no solution or code"),
        ('{"prompt": "", "code": "b"}', "no prompt or text"),
        ("[]", "not an object"),
        ('{"prompt"', "not JSON"),
    ],
)
def test_record(line: str, problem: str | None) -> None:
    told = preflight.bad_record(line)
    assert told is None if problem is None else problem in (told or "")


def test_a_bad_data_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "code": "b"}\n\n{"prompt": 1}\n')
    finding = preflight.check_data("mine", f"file://{tmp_path}")
    assert finding.verdict == FAIL
    assert "mine/a.jsonl:3" in finding.detail


def pair(**changed: object) -> preflight.Pair:
    values = {
        "enabled": True, "backend": "nccl", "device": "cuda", "fsdp": True, "precision": "bf16",
        "gpus": 4, "gpu_type": "A100", "preset": "gpu-a100-80g-large", **changed,
    }  # fmt: skip
    config = SimpleNamespace(
        devices=SimpleNamespace(
            compute_backend=values["device"],
            mixed_precision=values["precision"],
            distributed=SimpleNamespace(enabled=values["enabled"], backend=values["backend"]),
            fsdp=SimpleNamespace(enabled=values["fsdp"], sharding="full_shard"),
        ),
        launcher=SimpleNamespace(
            target="vessl",
            preset=values["preset"],
            resources=SimpleNamespace(gpus=values["gpus"], gpu_type=values["gpu_type"], gpu_memory_gb=None),
        ),
    )
    recipe = SimpleNamespace(
        data=SimpleNamespace(train=SimpleNamespace(batch_size=2, max_length=2048)),
        train=SimpleNamespace(accumulation_steps=1, algo="baseline-mtp"),
    )
    return preflight.Pair("c", "r", config, recipe)


@pytest.mark.parametrize(
    ("changed", "subject"),
    [
        ({}, None),
        ({"backend": "gloo"}, "backend"),
        ({"device": "mps"}, "backend"),
        ({"fsdp": False}, "sharding"),
        ({"gpu_type": "V100"}, "precision"),
        ({"gpus": 8}, "preset"),
    ],
)
def test_distributed(changed: dict[str, object], subject: str | None) -> None:
    findings = list(preflight.check_distributed(pair(**changed)))
    assert [f.subject for f in findings if f.verdict == FAIL] == ([subject] if subject else [])
    assert "16384 tokens" in next(f.detail for f in findings if f.subject.startswith("batch")) or changed


def test_a_registered_name_must_stand_for_a_function() -> None:
    assert preflight.defined("wmtp.preflight:main")
    assert not preflight.defined("wmtp.preflight:nothing")
    assert not preflight.defined("wmtp.nowhere:main")


def test_what_was_found_twice_is_said_once() -> None:
    finding = Finding(2, OK, "a", "b")
    assert preflight.unique([finding, finding]) == [finding]
