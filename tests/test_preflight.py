from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmtp import preflight, registry
from wmtp.preflight import FAIL, NOT, OK, Finding

ALL = [f"configs/recipe.{algo}.yaml" for algo in ("baseline_mtp", "rho1_wmtp", "critic_wmtp")]
QUICK = "1,2,3,devices,reward"  # what imports no torch
CLUSTER = ["--env", "production", "--config", "configs/config.vessl.yaml"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)  # the suite's own bucket is no cluster's


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict, str]:
    quick = ["--only", QUICK] if "--only" not in arguments else []
    code = preflight.main([*arguments, *quick, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def verdicts(report: dict, heading: int) -> set[str]:
    return {f["verdict"] for f in report["findings"] if f["heading"] == heading}


def test_production_passes_for_all_three(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [word for recipe in ALL for word in ("--recipe", recipe)]
    code, report, told = run(capsys, *CLUSTER, *recipes)
    assert code == 0
    assert report["counts"][FAIL] == 0
    assert [verdicts(report, n) for n in (1, 2, 3, 4, 5)] == [{OK}] * 5
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
    ("part", "other", "told"),
    [
        ("", "", None),
        ("{models,datasets,checkpoints,mlruns,logs}", "models", "makes no /app/datasets"),
        ("WORKDIR /app", "WORKDIR /app\nWORKDIR /workspace", "WORKDIR is /workspace"),
        ("USER 10001:10001", "", "USER is not set"),
        ("USER 10001:10001", "USER root", "USER is root"),
        ("COPY src src", "", "copies no src"),
    ],
)
def test_dockerfile(tmp_path: Path, part: str, other: str, told: str | None) -> None:
    text = (
        "WORKDIR /app\nRUN mkdir -p /app/{models,datasets,checkpoints,mlruns,logs}\nCOPY src src\n"
        "COPY --chown=wmtp:wmtp scripts docker configs datasets ./\nUSER 10001:10001\n"
    )
    assert part in text
    file = tmp_path / "Dockerfile"
    file.write_text(text.replace(part, other) if part else text)
    failed = [f.detail for f in preflight.check_dockerfile(file) if f.verdict == FAIL]
    assert failed == [] if told is None else told in failed[0] and len(failed) == 1
    assert next(preflight.check_dockerfile(tmp_path / "none")).verdict == FAIL


def test_everything_of_a_run_is_in_one_bucket(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*CLUSTER, "--recipe", ALL[0]]
    code, report, _ = run(capsys, *arguments, "--set", "mlflow.tracking_uri=s3://other/mlruns")
    told = [f for f in report["findings"] if f["verdict"] == FAIL]
    assert (code, told[0]["subject"]) == (2, "bucket") and "mlflow.tracking_uri: other" in told[0]["detail"]
    monkeypatch.setenv("S3_BUCKET_NAME", "mine")  # all three follow it
    assert run(capsys, *arguments)[0] == 0
    code, report, _ = run(capsys, *arguments, "--set", "storage.bucket=literal")
    assert code == 2 and "S3_BUCKET_NAME: mine" in next(f["detail"] for f in report["findings"] if f["verdict"] == FAIL)


def test_stages_that_would_ask_another_place_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    code, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0])
    told = [f for f in report["findings"] if f["verdict"] == FAIL]
    assert (code, told[0]["subject"]) == (2, "storage.region") and "AWS_REGION=us-east-1" in told[0]["detail"]


def test_the_cache_is_where_the_volume_is_mounted(capsys: pytest.CaptureFixture[str]) -> None:
    volume = ["--set", "launcher.volume=volume://vessl-storage/wmtp-models-cache"]
    arguments = [*CLUSTER, "--recipe", ALL[0], *volume]
    assert run(capsys, *arguments)[0] == 0
    code, report, _ = run(capsys, *arguments, "--set", "storage.cache_dir=/elsewhere")
    told = [f for f in report["findings"] if f["verdict"] == FAIL]
    assert (code, told[0]["subject"]) == (2, "storage.cache_dir") and "/cache/models" in told[0]["detail"]


@pytest.mark.parametrize(
    ("only", "headings"), [("1", {1}), ("paths", {1, 2}), ("2,3", {1, 2, 3}), ("devices", {1, 4}), ("reward", {1, 5})]
)
def test_only_what_was_asked_for_is_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, only: str, headings: set[int]
) -> None:
    arguments = [*CLUSTER, "--recipe", ALL[2], "--only", only, "--receipt-dir", str(tmp_path)]
    _, report, told = run(capsys, *arguments)
    assert {f["heading"] for f in report["findings"]} == headings
    assert report["only"] and all((f"{n}/5" in told) == (n in headings) for n in range(1, 6))
    with pytest.raises(SystemExit) as ended:
        run(capsys, *CLUSTER, "--recipe", ALL[2], "--only", "1,modles")
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "FAIL  --only 1,modles: modles is no check" in told and "next  ONLY=1,models\n" in told


def test_what_is_wrong_is_said_again_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # which would fold the lines
    told = run(capsys, *CLUSTER, "--recipe", ALL[0], "--set", "launcher.resources.gpus=2")[2]
    *_, title, line, _ = told.splitlines()
    assert title == "what is wrong (1)"
    assert (
        line.strip() == "preset: gpu-a100-80g-large has 4 GPUs, launcher.resources.gpus is 2; next: make the two agree"
    )


def test_the_table_fits_its_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        _, _, told = run(capsys, *CLUSTER, "--recipe", ALL[2])
        assert max(map(len, told.splitlines()[:-1])) <= width
    monkeypatch.delenv("COLUMNS")
    _, _, told = run(capsys, *CLUSTER, "--recipe", ALL[2])
    assert "\033" not in told and max(map(len, told.splitlines())) > 120  # a pipe is not wrapped, and not coloured


def test_what_the_torch_checks_found_is_part_of_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stands in for the child: its findings, its death."""
    child = tmp_path / "python"
    finding = {"heading": 5, "verdict": NOT, "subject": "model m", "detail": "no credentials", "next": "", "rule": ""}
    child.write_text(f"#!/bin/sh\necho '{json.dumps(finding)}'\necho noise\n")
    child.chmod(0o755)
    monkeypatch.setattr(preflight.sys, "executable", str(child))
    code, report, told = run(capsys, *CLUSTER, "--recipe", ALL[0], "--only", "1,models")
    assert code == 0 and finding in report["findings"]
    assert told.index("what this dry run could not promise") < told.rindex("model m: no credentials")
    child.write_text("#!/bin/sh\necho 'ImportError: no torch' >&2\nexit 1\n")
    code, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--only", "1,models")
    assert code == 2 and "ImportError: no torch" in report["findings"][-1]["detail"]
    monkeypatch.setenv("TWIN", "0")
    _, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--only", "1,twin")
    assert [f["detail"] for f in report["findings"] if f["subject"] == "twin"] == ["TWIN=0 leaves it out"]


def test_the_run_file_is_rendered_for_the_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--set", "launcher.volume=wmtp-models-cache")
    told = [f for f in report["findings"] if f["verdict"] == FAIL]
    assert (code, [f["subject"] for f in told]) == (2, ["run file"])
    assert "launcher.volume" in told[0]["detail"] and "volume://" in told[0]["next"]
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert run(capsys, *CLUSTER, "--recipe", ALL[0])[0] == 2


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


def test_a_registered_name_must_stand_for_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = registry.Registry("trainer", {**registry.trainer_registry, "baseline-mtp": "wmtp.objective:nothing"})
    monkeypatch.setattr(registry, "trainer_registry", gone)
    found = [f for f in preflight.check_registry([]) if f.verdict == FAIL]
    assert [f.subject for f in found] == ["trainer baseline-mtp"]
    assert "wmtp.objective:nothing, which is not defined there" in found[0].detail


def test_an_algorithm_that_is_no_python_so_far_leaves_the_others_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_mine.py").write_text("def half(ce, mask, *, mix:\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = registry.Registry("trainer", {**registry.trainer_registry, "half-wmtp": "of_mine:half"})
    monkeypatch.setattr(registry, "trainer_registry", more)
    found = {f.subject: f for f in preflight.check_registry([])}
    assert [name for name, f in found.items() if f.verdict == FAIL] == ["trainer half-wmtp"]
    assert "of_mine:half, which is not defined there" in found["trainer half-wmtp"].detail


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"mix", "entropy"}, "asks for entropy; what there is: ref_aligned"),
        ({"ref_aligned", "delta_aligned"}, "one scorer"),
    ],
)
def test_an_algorithm_that_asks_for_what_there_is_not_is_found(
    keywords: set[str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "asked_by", lambda algo: keywords if algo == "baseline-mtp" else frozenset())
    found = [f for f in preflight.check_registry([]) if f.verdict == FAIL]
    assert [f.subject for f in found] == ["trainer baseline-mtp"] and word in found[0].detail
    assert "wmtp.objective:baseline_mtp" in found[0].next


def test_a_setting_that_no_recipe_has_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KEYS, "mix", "loss.lambada")
    found = [f for f in preflight.check_registry([]) if f.verdict == FAIL]
    assert {f.subject for f in found} >= {"trainer rho1-wmtp", "trainer critic-wmtp"}
    assert "the recipe's loss.lambada: no recipe has that key" in found[0].detail


def test_what_was_found_twice_is_said_once() -> None:
    finding = Finding(2, OK, "a", "b")
    assert preflight.unique([finding, finding]) == [finding]


@pytest.mark.parametrize("name", ["../../evil", "a b", "7", "latest", ""])
def test_a_run_name_that_submit_would_refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("RUN_NAME", name)
    arguments = [*CLUSTER, "--recipe", ALL[0], "--receipt-dir", str(tmp_path / "a" / "b" / "build")]
    code, report, _ = run(capsys, *arguments)
    if not name:
        assert code == 0
        return
    assert code == 2 and "RUN_NAME" in {f["subject"] for f in report["findings"] if f["verdict"] == FAIL}
    assert [str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("preflight.json")] == ["a/b/build"]


def test_what_submit_would_refuse_is_refused_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAX_HOURS", "abc")
    assert run(capsys, *CLUSTER, "--recipe", ALL[0])[0] == 2
    monkeypatch.setenv("MAX_HOURS", "3")
    assert run(capsys, *CLUSTER, "--recipe", ALL[0])[0] == 0
    elsewhere = tmp_path / "recipe.yaml"
    elsewhere.write_text((preflight.ROOT / ALL[0]).read_text())
    monkeypatch.setenv("RECIPE", str(elsewhere))
    code, report, _ = run(capsys, *CLUSTER, "--recipe", str(elsewhere))
    assert code == 2 and any("not in the image" in f["detail"] for f in report["findings"])


def test_a_dry_run_without_the_twin_is_no_whole_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWIN", "0")
    everything = ",".join((*preflight.QUICK_CHECKS, "twin"))
    monkeypatch.setattr(preflight, "TORCH_CHECKS", ("twin",))
    _, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], "--only", everything)
    assert report["only"] and "twin" not in report["only"]


def test_a_receipt_that_cannot_be_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "build").write_text("a file")
    code, report, told = run(capsys, *CLUSTER, "--recipe", ALL[0], "--receipt-dir", str(tmp_path / "build"))
    assert code == 10 and report["counts"][FAIL] == 0 and "next  make it writable" in told


def test_a_pretrained_model_bears_less_than_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["--set", "optim.lr=2e-2"]
    _, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[0], *rate)
    (found,) = [f for f in report["findings"] if f["verdict"] == "warn"]
    assert found["rule"] == "a rate is at most 0.001" and found["next"] == "--set optim.lr=2e-05"
    small = ["--env", "minitest", "--config", "configs/config.local_minitest.yaml"]
    report = run(capsys, *small, "--recipe", "tests/configs/recipe.baseline_mtp.yaml", *rate)[1]
    assert report["counts"]["warn"] == 0


def test_brief_leaves_the_values_to_the_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    code, report, told = run(capsys, *CLUSTER, "--recipe", ALL[0], "--brief")
    assert code == 0 and "optim.lr" not in told and "each value" not in told
    assert "recipe.optim.lr" in {row["key"] for row in report["resolved"][0]["keys"]}


@pytest.mark.parametrize("key", ["optim.lr", "pretrain.lr", "critic.value_lr"])
def test_a_rate_that_no_training_survives_is_a_warning(capsys: pytest.CaptureFixture[str], key: str) -> None:
    code, report, _ = run(capsys, *CLUSTER, "--recipe", ALL[2], "--set", f"{key}=30000")
    (found,) = [f for f in report["findings"] if f["verdict"] == "warn"]
    whose = " a pretrained model" if key == "optim.lr" else ""
    assert code == 0 and (found["subject"], found["detail"]) == (key, f"30000 is larger than what trains{whose}")
