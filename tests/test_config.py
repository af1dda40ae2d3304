"""Settings: every shipped file loads, every class of mistake is refused by key and line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from pydantic import ValidationError

from wmtp.config import (
    Config,
    ConfigError,
    Finding,
    Recipe,
    digest,
    load_config,
    load_pair,
    load_recipe,
    main,
    needed_models,
    origins,
    plain,
    resolved,
)

ROOT = Path(__file__).resolve().parents[1]
VESSL = ROOT / "configs/config.vessl.yaml"
MINITEST = ROOT / "configs/config.vessl_minitest.yaml"
LOCAL = ROOT / "configs/config.local_minitest.yaml"
TEST = ROOT / "tests/configs/config.local_test.yaml"
CRITIC = ROOT / "configs/recipe.critic_wmtp.yaml"
RHO1 = ROOT / "configs/recipe.rho1_wmtp.yaml"
BASELINE = ROOT / "configs/recipe.baseline_mtp.yaml"
SMALL = ROOT / "tests/configs/recipe.critic_wmtp.yaml"
CONFIGS = sorted([*ROOT.glob("configs/config.*.yaml"), *ROOT.glob("tests/configs/config.*.yaml")])
RECIPES = sorted([*ROOT.glob("configs/recipe.*.yaml"), *ROOT.glob("tests/configs/recipe.*.yaml")])


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the shell that runs the tests, a bucket's for one, are not part of them."""
    for name in list(os.environ):
        if name.startswith(("S3_", "AWS_", "WMTP_")) or name in ("ENV", "ALGO"):
            monkeypatch.delenv(name)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Path, str, str], tuple[Path, int]]:
    """A copy of a shipped file with one piece of text replaced, and the line of the change."""

    def edit(path: Path, old: str, new: str) -> tuple[Path, int]:
        text = path.read_text("utf-8")
        assert text.count(old) >= 1, f"{old!r} is not in {path}"
        copy = tmp_path / path.name
        at = text.index(old)
        copy.write_text(text[:at] + new + text[at + len(old) :], "utf-8")
        lead = len(new) - len(new.lstrip("\n"))
        return copy, text.count("\n", 0, at) + 1 + lead

    return edit


def findings(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Finding]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.count("config    FAIL  ") == len(caught.value.findings)
    for finding in caught.value.findings:
        assert len(str(finding).splitlines()) == 3
        assert finding.rule and finding.next
    return caught.value.findings


def loader(path: Path) -> Callable[..., Any]:
    return load_config if path.name.startswith("config.") else load_recipe


# ---- what is shipped -----------------------------------------------------------------------------


def test_the_shipped_files_are_those_of_the_plan() -> None:
    assert {p.name for p in CONFIGS} == {
        "config.vessl.yaml",
        "config.vessl_minitest.yaml",
        "config.local_minitest.yaml",
        "config.local_test.yaml",
    }
    assert len(RECIPES) == 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configuration_loads_with_an_empty_environment(path: Path) -> None:
    config = load_config(path)
    assert config.paths.models.rm and config.paths.models.ref
    assert set(config.paths.datasets) == {"mbpp_tiny", "wmtp_code"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_shipped_recipe_loads_with_an_empty_environment(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert path.name == f"recipe.{recipe.train.algo.replace('-', '_')}.yaml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_every_shipped_pair_of_an_environment_loads(recipe: Path) -> None:
    if recipe.parent.name == "tests" or "tests" in recipe.parts:
        load_pair(MINITEST, recipe, env="minitest")
        load_pair(LOCAL, recipe, env="minitest")
        load_pair(TEST, recipe, env="test")
    else:
        load_pair(VESSL, recipe, env="production")


def test_values_of_the_plan() -> None:
    config = load_config(MINITEST)
    assert config.project == "wmtp_vessl_minitest"
    assert config.paths.checkpoints.base_path == "file:///app/test_checkpoints"
    assert (config.launcher.resources.gpus, config.launcher.resources.gpu_type) == (4, "A100")
    assert config.devices.distributed.timeout == 1800
    assert config.devices.fsdp.sharding == "full_shard"
    assert config.mlflow.tracking_uri == "file:///app/mlruns_test"
    recipe = load_recipe(CRITIC)
    assert recipe.loss.lambda_ == 0.3
    assert recipe.train.max_steps is None
    assert recipe.optim.lr == 2e-5


def test_defaults_fill_what_a_small_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "config.small.yaml"
    path.write_text(
        "project: p\n"
        "paths:\n  models:\n    base: file:///m\n  checkpoints:\n    base_path: file:///c\n"
        "mlflow:\n  experiment: e\n  tracking_uri: sqlite:///x.db\n"
        "launcher:\n  target: local\n"
    )
    config = load_config(path)
    assert config.seed == 42 and config.log_interval == 10
    assert config.paths.models.rm is None and config.paths.datasets == {}
    assert config.storage.model_dump() == {
        "bucket": "wmtp",
        "region": "eu-north-1",
        "endpoint": None,
        "workers": 16,
        "part_size_mb": 100,
        "accelerate": False,
        "retries": 3,
        "retry_wait_s": 10,
        "stall_s": 30,
        "cache_dir": "/cache/models",
    }
    assert config.mlflow.registry_uri == "sqlite:///x.db"
    assert config.launcher.resources.gpu_memory_gb == 80
    assert config.devices.distributed.backend is None
    recipe_path = tmp_path / "recipe.small.yaml"
    recipe_path.write_text("run:\n  name: r\ndata:\n  train:\n    sources: [a]\ntrain:\n  algo: rho1-wmtp\n")
    recipe = load_recipe(recipe_path)
    assert recipe.data.eval.sources == [] and recipe.data.train.max_length == 2048
    assert recipe.optim.betas == [0.9, 0.999] and recipe.loss.chunk_positions == "auto"
    assert recipe.rho1.center_decay == 0.99 and recipe.critic.value_lr == 5e-5
    assert recipe.eval.interval == 200 and recipe.pretrain.lr == 1e-3


def test_a_datasets_name_is_checked(edited: Callable[..., tuple[Path, int]]) -> None:
    config, line = edited(VESSL, "    mbpp_tiny:", '    "a b":')
    (finding,) = findings(load_config, config)
    assert (finding.key, finding.place) == ("paths.datasets.a b", f"{config}:{line}")


def test_settings_are_frozen() -> None:
    config = load_config(VESSL)
    with pytest.raises(ValidationError):
        config.seed = 1


# ---- mistakes, at least two of each class, in a shipped file -------------------------------------

MISTAKES = [
    # unknown key
    (VESSL, "mixed_precision:", "mixed_precison:", "devices.mixed_precison", "did you mean mixed_precision?"),
    (VESSL, "seed: 42", "sead: 42", "sead", "did you mean seed?"),
    (CRITIC, "num_epochs: 3", "lr: 3", "train.lr", "optim.lr"),
    (CRITIC, "lambda: 0.3", "lambda_: 0.3", "loss.lambda_", "did you mean lambda?"),
    (VESSL, "base: file", "bass: file", "paths.models.bass", "did you mean base?"),
    # type
    (VESSL, "seed: 42", 'seed: "42"', "seed", "without quotes"),
    (VESSL, "seed: 42", "seed: 42.0", "seed", "write 42"),
    (VESSL, "seed: 42", "seed: true", "seed", "int >= 0"),
    (VESSL, "seed: 42", "seed:", "seed", "int >= 0"),
    (VESSL, "seed: 42", "seed: [1]", "seed", "int >= 0"),
    (VESSL, "project: wmtp", "project: 12", "project", "quote it"),
    (VESSL, "project: wmtp", "project: true", "project", "quote it"),
    (VESSL, "project: wmtp", "project: ~", "project", "text"),
    (VESSL, "project: wmtp", 'project: "  "', "project", "text"),
    (VESSL, "save_final: true", "save_final: 1", "paths.checkpoints.save_final", "true or false"),
    (VESSL, "save_final: true", 'save_final: "true"', "paths.checkpoints.save_final", "without quotes"),
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: null", "launcher.resources.gpu_memory_gb", "number"),
    (VESSL, "rm: file:///app/models/starling-rm-7b", "rm: null", "paths.models.rm", "file://"),
    (CRITIC, "lr: 2e-5", 'lr: "2e-5"', "optim.lr", "without quotes"),
    (CRITIC, "    - 0.999", "    - x", "optim.betas.1", "number"),
    (CRITIC, "    sources:\n      - wmtp_code", "    sources: wmtp_code", "data.train.sources", "a list"),
    # range
    (VESSL, "workers: 16", "workers: 300", "storage.workers", ">= 1 and <= 256"),
    (VESSL, "part_size_mb: 100", "part_size_mb: 4", "storage.part_size_mb", ">= 5"),
    (VESSL, "timeout: 1800", "timeout: 0", "devices.distributed.timeout", ">= 1"),
    (VESSL, "seed: 42", "seed: -1", "seed", ">= 0"),
    (CRITIC, "heads: 4", "heads: 9", "model.heads", "<= 8"),
    (CRITIC, "max_length: 2048", "max_length: 7", "data.train.max_length", ">= 8"),
    (CRITIC, "lambda: 0.3", "lambda: 1.1", "loss.lambda", "<= 1"),
    (CRITIC, "max_weight: 3.0", "max_weight: 1", "loss.max_weight", "> 1"),
    (CRITIC, "epsilon: 0.05", "epsilon: 0", "loss.epsilon", "> 0"),
    (CRITIC, "weight_temperature: 0.7", "weight_temperature: 0", "loss.weight_temperature", "> 0"),
    (CRITIC, "    - 0.999", "    - 1.0", "optim.betas.1", "< 1"),
    (CRITIC, "    - 0.9\n    - 0.999", "    - 0.9", "optim.betas", "exactly 2"),
    (CRITIC, "warmup_ratio: 0.03", "warmup_ratio: 1.01", "optim.warmup_ratio", "<= 1"),
    (CRITIC, "grad_clip: 1.0", "grad_clip: .inf", "optim.grad_clip", "finite"),
    (CRITIC, "grad_clip: 1.0", "grad_clip: 1e999", "optim.grad_clip", "finite"),
    (CRITIC, "lr: 2e-5", "lr: .nan", "optim.lr", "finite"),
    (RHO1, "skip_threshold_percentile: 0.3", "skip_threshold_percentile: 1", "rho1.skip_threshold_percentile", "< 1"),
    (CRITIC, "    sources:\n      - wmtp_code", "    sources: []", "data.train.sources", "at least 1"),
    (CRITIC, "chunk_positions: auto", "chunk_positions: 0", "loss.chunk_positions", "auto"),
    # enumeration
    (VESSL, "sharding: full_shard", "sharding: hybrid", "devices.fsdp.sharding", "full_shard"),
    (VESSL, "mixed_precision: bf16", "mixed_precision: float16", "devices.mixed_precision", "scaler"),
    (VESSL, "target: vessl", "target: slurm", "launcher.target", "docker"),
    (CRITIC, "algo: critic-wmtp", "algo: critic_wmtp", "train.algo", "did you mean critic-wmtp?"),
    (CRITIC, "weight_norm: mean1.0_clip", "weight_norm: softmax", "loss.weight_norm", "mean1.0_clip"),
    (CRITIC, "full_finetune: true", "full_finetune: false", "train.full_finetune", "true"),
    (VESSL, "base: file:///", "base: gs://", "paths.models.base", "file://"),
    (VESSL, "tracking_uri: s3://", "tracking_uri: ftp://", "mlflow.tracking_uri", "sqlite:"),
    # impossible within one file
    (VESSL, "compute_backend: cuda", "compute_backend: cpu", "devices.distributed.backend", "nccl needs cuda"),
    (VESSL, "gpus: 4", "gpus: 0", "launcher.resources.gpus", "at least 1"),
    (VESSL, "gpus: 4", "gpus: 1", "devices.fsdp.enabled", "at least 2 ranks"),
    (CRITIC, "heads: 4", "heads: 0", "model.heads", ">= 1 and <= 8"),
    # outside of the work folder
    (VESSL, "base: file:///app/", "base: file:///workspace/", "paths.models.base", "under /app"),
    (VESSL, "wmtp_code: file:///app/", "wmtp_code: file:///app/../etc/", "paths.datasets.wmtp_code", "under /app"),
    (VESSL, "ref: file:///app/", "ref: file://", "paths.models.ref", "under /app"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: file:///application/", "mlflow.tracking_uri", "under /app"),
    # variables
    (VESSL, "project: wmtp", "project: ${NO_SUCH}", "project", "without a default"),
    (VESSL, "bucket: ${S3_BUCKET_NAME:-wmtp}", "bucket: x-${NO_SUCH}-y", "storage.bucket", "without a default"),
    (VESSL, "project: wmtp", "project: ${1X}", "project", "${VAR}"),
    (VESSL, "project: wmtp", "project: ${A:-${B}}", "project", "nested"),
    (VESSL, "project: wmtp", "project: ${A:-}", "project", "text"),
    # duplicates
    (VESSL, "seed: 42", "seed: 42\nproject: b", "project", "line 4"),
    (CRITIC, "heads: 4", "heads: 4\n  heads: 4", "model.heads", "a key stands once"),
    # YAML traps
    (VESSL, "save_final: true", "save_final: yes", "paths.checkpoints.save_final", "write true"),
    (VESSL, "save_final: true", "save_final: True", "paths.checkpoints.save_final", "write true"),
    (VESSL, "accelerate: false", "accelerate: off", "storage.accelerate", "write false"),
    (VESSL, "seed: 42", "seed: 1_000", "seed", "write 1000"),
    (VESSL, "retries: 3", "retries: 1e1", "storage.retries", "write 10"),
    (CRITIC, "pack_sequences: true", "pack_sequences: On", "data.train.pack_sequences", "write true"),
]


@pytest.mark.parametrize(
    ("path", "old", "new", "key", "says"), MISTAKES, ids=[f"{m[3]}={m[2][:30]!r}" for m in MISTAKES]
)
def test_a_mistake_is_refused_with_key_line_and_rule(
    path: Path, old: str, new: str, key: str, says: str, edited: Callable[..., tuple[Path, int]]
) -> None:
    copy, line = edited(path, old, new)
    found = findings(loader(path), copy)
    mine = [finding for finding in found if finding.key == key]
    assert len(mine) == 1, [str(f) for f in found]
    assert says in mine[0].rule, mine[0].rule
    # A key that a rule between two keys names may stand elsewhere than the change does.
    at = mine[0].place.rpartition(":")
    assert at[0] == str(copy)
    text = copy.read_text("utf-8").splitlines()
    word = next((p for p in reversed(key.split(".")) if not p.isdigit()), "")
    assert word in text[int(at[2]) - 1] or text[int(at[2]) - 1].strip().startswith("- ")
    if new.split(":")[0].strip() == word and "\n" not in new:
        assert int(at[2]) == line


@pytest.mark.parametrize(
    ("path", "old", "key"),
    [
        (VESSL, "project: wmtp\n", "project"),
        (VESSL, "    base: file:///app/models/llama-7b-mtp\n", "paths.models.base"),
        (VESSL, "  experiment: wmtp/prod\n", "mlflow.experiment"),
        (VESSL, "  target: vessl\n", "launcher.target"),
        (CRITIC, "  algo: critic-wmtp\n", "train.algo"),
        (CRITIC, "    sources:\n      - wmtp_code\n", "data.train.sources"),
    ],
)
def test_a_missing_key_is_named_with_the_line_of_its_section(
    path: Path, old: str, key: str, edited: Callable[..., tuple[Path, int]]
) -> None:
    copy, _ = edited(path, old, "")
    (finding,) = findings(loader(path), copy)
    assert (finding.key, finding.what) == (key, "missing")
    line = int(finding.place.rpartition(":")[2])
    section = key.split(".")[-2] + ":" if "." in key else "seed:"
    assert copy.read_text().splitlines()[line - 1].strip().startswith(section)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("project: x\npaths:\n\tmodels: 1\n", 3, "tab"),
        ("a: 1\n---\nb: 2\n", 2, "one YAML document"),
        ("%YAML 1.1\n---\na: yes\n", 2, "1.2"),
        ("a: &x 1\n", 1, "anchors"),
        ("a: 1\nb: *a\n", 2, "anchors"),
        ("<<: {a: 1}\n", 1, "merge"),
        ("seed: !!int '5'\n", 1, "tags"),
        ("seed: !!python/object/apply:os.system [id]\n", 1, "tags"),
        ("- a\n- b\n", 1, "mapping"),
        ("just words\n", 1, "mapping"),
        ("", 1, "mapping"),
        ("# only a comment\n", 1, "mapping"),
        ("? [a, b]\n: 1\n", 1, "a key is a word"),
        ("a: b: c\n", 1, "YAML"),
        ("a: 1\nb: {c: 1\n", 3, "YAML"),
        ("a: 1\nb: \x07\n", 2, "printable"),
        ("a: " + "[" * 5000 + "\n", 1, "levels"),
        ("a: 'open\n", 2, "YAML"),
    ],
)
def test_what_is_not_strict_yaml_is_refused_with_its_line(text: str, line: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.x.yaml"
    path.write_text(text)
    first = findings(load_config, path)[0]
    assert says in first.rule, str(first)
    assert first.place == f"{path}:{line}"


def test_invalid_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.x.yaml"
    path.write_bytes(b"a: 1\nb: \xff\xfe\n")
    (finding,) = findings(load_config, path)
    assert finding.place == f"{path}:2" and "0xff" in finding.what


def test_a_missing_file_is_one_clear_finding(tmp_path: Path) -> None:
    (finding,) = findings(load_config, tmp_path / "none.yaml")
    assert finding.what == "no such file" and str(tmp_path / "none.yaml") in finding.place
    (finding,) = findings(load_recipe, tmp_path)
    assert "can't be read" in finding.what
    (finding,) = findings(load_recipe, ROOT / "configs/recipe.nope.yaml")
    assert "recipe.rho1_wmtp.yaml" in finding.next


def test_all_findings_of_both_files_are_told(edited: Callable[..., tuple[Path, int]]) -> None:
    config, _ = edited(VESSL, "seed: 42\nlog_interval: 10", "seed: x\nlog_interval: 0")
    recipe, _ = edited(CRITIC, "heads: 4", "heads: 0")
    found = findings(load_pair, config, recipe, ["optim.lr=0", "nonsense.key=1"])
    assert {f.key for f in found} == {"seed", "log_interval", "model.heads", "optim.lr", "nonsense.key"}


# ---- numbers, variables, the environment, --set --------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-1.", -1.0), ("+12", 12), ("0o17", 15), ("0x1F", 31),
        ("true", True), ("false", False), ("True", "True"), ("yes", "yes"), ("NO", "NO"), ("on", "on"),
        ("1_0", "1_0"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("1e", "1e"), ("١", "١"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert plain(text) == value and type(plain(text)) is type(value)


def test_a_variable_is_substituted_and_typed_by_its_key(
    edited: Callable[..., tuple[Path, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("N", "12")
    monkeypatch.setenv("F", "1e-3")
    monkeypatch.setenv("B", "false")
    config, _ = edited(VESSL, "project: wmtp\nseed: 42", "project: ${N}\nseed: ${N}")
    loaded = load_config(config)
    assert (loaded.project, loaded.seed) == ("12", 12)
    recipe, _ = edited(CRITIC, "  lr: 2e-5", '  lr: "${F}"')
    assert load_recipe(recipe).optim.lr == 1e-3
    recipe, _ = edited(CRITIC, "pack_sequences: true", "pack_sequences: ${B}")
    assert load_recipe(recipe).data.train.pack_sequences is False
    recipe, _ = edited(CRITIC, "heads: 4", "heads: ${NONE:-8}")
    assert load_recipe(recipe).model.heads == 8
    monkeypatch.setenv("N", "twelve")
    config, _ = edited(VESSL, "seed: 42", "seed: ${N}")
    (finding,) = findings(load_config, config)
    assert finding.key == "seed" and "twelve" in finding.what


def test_a_value_from_a_variable_is_not_substituted_again(
    edited: Callable[..., tuple[Path, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A", "${B}")
    config, _ = edited(VESSL, "project: wmtp", "project: ${A}")
    assert load_config(config).project == "${B}"


def test_an_unset_variable_names_key_line_and_variable(edited: Callable[..., tuple[Path, int]]) -> None:
    config, line = edited(VESSL, "  cache_dir: ${WMTP_CACHE_DIR:-/cache/models}", "  cache_dir: ${NO_SUCH}")
    (finding,) = findings(load_config, config)
    assert finding.key == "storage.cache_dir" and finding.place == f"{config}:{line}"
    assert "NO_SUCH" in finding.what and "NO_SUCH" in finding.next


def test_the_environment_wins_over_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "S3_BUCKET_NAME": "other",
        "S3_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "WMTP_CACHE_DIR": "/c",
        "WMTP_STORAGE_RETRIES": "7",
    }.items():
        monkeypatch.setenv(name, value)
    for path in CONFIGS:
        storage = load_config(path).storage
        assert (storage.bucket, storage.endpoint) == ("other", "http://127.0.0.1:1")
        assert (storage.region, storage.cache_dir, storage.retries) == ("us-east-1", "/c", 7)
    assert load_config(VESSL, ["storage.retries=2"]).storage.retries == 2
    monkeypatch.setenv("WMTP_STORAGE_RETRIES", "many")
    (finding,) = findings(load_config, VESSL)
    assert finding.place == "environment WMTP_STORAGE_RETRIES" and finding.key == "storage.retries"


def test_set_goes_to_the_file_that_has_the_key() -> None:
    config, recipe = load_pair(
        LOCAL,
        SMALL,
        ["seed=7", "train.max_steps=20", "loss.lambda=0", "optim.betas=[0.8, 0.9]", "paths.datasets.new=file:///app/new",
         "run.name=1e-4 x", "run.tags=[]"],
        env="minitest",
    )  # fmt: skip
    assert config.seed == 7 and config.paths.datasets["new"] == "file:///app/new"
    assert recipe.train.max_steps == 20 and recipe.loss.lambda_ == 0
    assert recipe.optim.betas == [0.8, 0.9] and recipe.run.name == "1e-4 x" and recipe.run.tags == []


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("trian.max_steps=3", "trian.max_steps", "did you mean train.max_steps?"),
        ("train.max_step=3", "train.max_step", "did you mean max_steps?"),
        ("train.max_steps=0", "train.max_steps", ">= 1"),
        ("train.max_steps=", "train.max_steps", "int"),
        ("train=3", "train", "mapping"),
        ("train.max_steps.x=3", "train.max_steps", "int"),
        ("optim.betas=[0.9", "optim.betas", "YAML"),
        ("seed", "", "key=value"),
        ("=3", "", ""),
    ],
)
def test_a_wrong_set_is_refused_by_name(text: str, key: str, says: str) -> None:
    found = findings(load_pair, LOCAL, SMALL, [text], env="minitest")
    assert all(f.place.startswith("--set") for f in found), found
    assert any(key in f.key and says in f.rule for f in found), found


# ---- rules between the files ---------------------------------------------------------------------

PAIRS = [
    (VESSL, BASELINE, ["devices.compute_backend=cpu"], "devices.distributed.backend", "nccl"),
    (LOCAL, BASELINE, ["devices.distributed.backend=nccl"], "devices.distributed.backend", "nccl"),
    (LOCAL, BASELINE, ["devices.compute_backend=mps"], "devices.distributed.enabled", "ranks"),
    (VESSL, BASELINE, ["devices.distributed.enabled=false"], "launcher.resources.gpus", "more than one device"),
    (VESSL, BASELINE, ["devices.fsdp.enabled=false"], "devices.fsdp.enabled", "ranks"),
    (LOCAL, BASELINE, ["launcher.resources.gpus=0"], "launcher.resources.gpus", "at least 1"),
    (VESSL, BASELINE, ["data.eval.max_length=8", "model.heads=8"], "data.eval.max_length", "heads"),
    (VESSL, BASELINE, ["data.train.sources=[nope]"], "data.train.sources.0", "wmtp_code"),
    (VESSL, BASELINE, ["data.eval.sources=[mbpp_tiny, nope]"], "data.eval.sources.1", "mbpp_tiny"),
    (VESSL, BASELINE, ["train.max_steps=99"], "paths.checkpoints.save_interval", "max_steps"),
    (VESSL, BASELINE, ["devices.distributed.enabled=false"], "devices.fsdp.enabled", "both or neither"),
    (VESSL, BASELINE, ["data.eval.sources=[]", "train.early_stopping.enabled=true"], "train.early_stopping.enabled",
     "held-out"),
    (VESSL, CRITIC, ["data.eval.sources=[]", "pretrain.early_stopping.enabled=true"],
     "pretrain.early_stopping.enabled", "held-out"),
    (VESSL, CRITIC, ["critic.reward_template='{answer}'"], "critic.reward_template", "{solution}"),
    (VESSL, CRITIC, ["critic.reward_template='{prompt}'"], "critic.reward_template", "fields"),
    (VESSL, BASELINE, ["launcher.target=docker", "paths.models.base=file:///tmp/x"], "paths.models.base", "/app"),
    (VESSL, BASELINE, ["paths.models.base=file://tests/x"], "paths.models.base", "/app"),
    (LOCAL, BASELINE, ["paths.models.base=file://tests/x"], "paths.models.base", "ENV=test"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "recipe", "overrides", "key", "says"), PAIRS, ids=[f"{p[2]}" for p in PAIRS])
def test_an_impossible_pair_is_refused(config: Path, recipe: Path, overrides: list[str], key: str, says: str) -> None:
    found = findings(load_pair, config, recipe, overrides, env="minitest")
    assert [f.key for f in found if says in f.rule] == [key], [str(f) for f in found]


def test_the_models_that_an_algorithm_needs_are_there(edited: Callable[..., tuple[Path, int]]) -> None:
    without_rm, _ = edited(VESSL, "    rm: file:///app/models/starling-rm-7b\n", "")
    (finding,) = findings(load_pair, without_rm, CRITIC)
    assert finding.key == "paths.models.rm" and "critic-wmtp" in finding.rule
    assert "models:" in without_rm.read_text().splitlines()[int(finding.place.rpartition(":")[2]) - 1]
    load_pair(without_rm, CRITIC, ["critic.use_pseudo_rewards=true"])
    load_pair(without_rm, RHO1)
    without_ref, _ = edited(VESSL, "    ref: file:///app/models/sheared-llama-2.7b\n", "")
    (finding,) = findings(load_pair, without_ref, RHO1)
    assert finding.key == "paths.models.ref"
    load_pair(without_ref, BASELINE)


def test_a_relative_path_only_for_env_test(monkeypatch: pytest.MonkeyPatch) -> None:
    load_pair(TEST, SMALL, env="test")
    for env in ("minitest", "production", None):
        found = findings(load_pair, TEST, SMALL, env=env)
        assert {f.key for f in found} == {
            "paths.models.base", "paths.models.rm", "paths.models.ref",
            "paths.datasets.mbpp_tiny", "paths.datasets.wmtp_code",
        }  # fmt: skip
    monkeypatch.setenv("ENV", "test")
    load_pair(TEST, SMALL)
    found = findings(load_pair, TEST, SMALL, env="staging")
    assert "staging" in found[0].what


def test_rows_are_no_longer_than_a_models_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_APP_ROOT", str(tmp_path))
    folder = tmp_path / "models/test-rm-llama"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 64}')
    load_pair(LOCAL, ROOT / "tests/configs/recipe.rho1_wmtp.yaml", env="minitest")
    found = findings(load_pair, LOCAL, SMALL, env="minitest")
    assert [f.key for f in found] == ["data.train.max_length", "data.eval.max_length"]
    (folder / "config.json").write_text("not json")
    load_pair(LOCAL, SMALL, env="minitest")


# ---- what others ask -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "roles"),
    [
        (BASELINE, [], ["base"]),
        (RHO1, [], ["base", "ref"]),
        (CRITIC, [], ["base", "rm"]),
        (CRITIC, ["critic.use_pseudo_rewards=true"], ["base"]),
    ],
)
def test_needed_models_follow_the_algorithm(recipe: Path, overrides: list[str], roles: list[str]) -> None:
    models = needed_models(*load_pair(VESSL, recipe, overrides))
    assert list(models) == roles and models["base"] == "file:///app/models/llama-7b-mtp"


def test_resolved_is_json_with_the_files_own_keys() -> None:
    what = resolved(*load_pair(VESSL, CRITIC))
    assert json.loads(json.dumps(what)) == what
    assert what["recipe"]["loss"]["lambda"] == 0.3 and what["config"]["seed"] == 42


def test_resolved_gives_the_same_settings_again(tmp_path: Path) -> None:
    """JSON is YAML: the resolved result, nulls left out, loads to itself."""
    config, recipe = load_pair(VESSL, CRITIC)

    def dense(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: dense(v) for k, v in value.items() if v is not None}
        return value

    (tmp_path / "c.yaml").write_text(json.dumps(dense(resolved(config, recipe)["config"])))
    (tmp_path / "r.yaml").write_text(json.dumps(dense(resolved(config, recipe)["recipe"])))
    again = load_pair(tmp_path / "c.yaml", tmp_path / "r.yaml")
    assert (again[0].model_dump(), again[1].model_dump()) == (config.model_dump(), recipe.model_dump())
    assert digest(*again) == digest(config, recipe)


def test_digest_is_of_the_work_and_not_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair(VESSL, CRITIC)
    assert len(digest(*pair)) == 7 and int(digest(*pair), 16) >= 0
    assert digest(*load_pair(VESSL, CRITIC, ["optim.lr=3e-5"])) != digest(*pair)
    assert digest(*load_pair(VESSL, CRITIC, ["optim.grad_clip=1"])) == digest(*pair)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:4711")
    assert digest(*load_pair(VESSL, CRITIC)) == digest(*pair)
    monkeypatch.setenv("S3_BUCKET_NAME", "other")
    assert digest(*load_pair(VESSL, CRITIC)) != digest(*pair)


def test_origins_tell_where_a_value_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_BUCKET_NAME", "b")
    config = load_config(VESSL, ["seed=1"])
    told = origins(config)
    assert told["seed"] == "--set"
    assert told["storage.bucket"] == "environment S3_BUCKET_NAME"
    assert told["storage.endpoint"] == "default"
    assert told["project"] == f"{VESSL}:4"
    assert told["mlflow.tracking_uri"].endswith("(S3_BUCKET_NAME)")


# ---- the command ---------------------------------------------------------------------------------


def test_command_prints_values_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--config", str(LOCAL), "--recipe", str(SMALL), "--env", "minitest"]
    keys = ["launcher.resources.gpus", "train.algo", "storage.endpoint", "run.tags", "loss.lambda", "models"]
    assert main([*files, "--get", *keys]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2", "critic-wmtp", "", '["critic-wmtp", "small"]', "0.3",
        "base\ttest-llama-mtp\tfile:///app/models/test-llama-mtp",
        "rm\ttest-rm-llama\tfile:///app/models/test-rm-llama",
    ]  # fmt: skip
    assert main([*files, "--get", "digest"]) == 0
    assert len(capsys.readouterr().out.strip()) == 7
    assert main([*files, "--check"]) == 0 and capsys.readouterr().out == ""
    assert main(["--config", str(LOCAL), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"config"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "none.yaml"],
        ["--config", str(VESSL), "--get", "digest"],
        ["--config", str(VESSL), "--get", "devices.fsdpp"],
        ["--config", str(VESSL), "--recipe", str(CRITIC), "--set", "x.y=1"],
        ["--config", str(TEST), "--env", "production", "--recipe", str(SMALL)],
    ],
)
def test_command_exits_2_with_the_finding_on_standard_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("config    FAIL  ") and "Traceback" not in err


def test_reading_settings_imports_no_torch() -> None:
    code = "import sys, wmtp.config, wmtp.paths, wmtp.registry; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_types_are_the_declared_ones() -> None:
    config, recipe = load_pair(VESSL, CRITIC)
    assert isinstance(config, Config) and isinstance(recipe, Recipe)
    assert type(config.storage.bucket) is str and type(config.launcher.resources.gpu_memory_gb) is float


# ---- whatever is in a file, the answer is settings or findings ----------------------------------


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    at=st.integers(0, 1500),
    cut=st.integers(0, 30),
    piece=st.one_of(
        st.text(max_size=12),
        st.binary(max_size=6),
        st.sampled_from(
            [
                "\n",
                "\t",
                ": ",
                "- ",
                "{",
                "[",
                "&a ",
                "*a",
                "!!",
                "'",
                '"',
                "|\n",
                "? ",
                "${",
                "\n---\n",
                "#",
                "\\ud800",
            ]
        ),
    ),
    path=st.sampled_from([VESSL, CRITIC]),
)
def test_a_damaged_file_never_ends_in_a_traceback(
    at: int, cut: int, piece: str | bytes, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = path.read_bytes()
    inserted = piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
    copy = tmp_path_factory.getbasetemp() / path.name
    copy.write_bytes(content[:at] + inserted + content[at + cut :])
    try:
        loader(path)(copy)
    except ConfigError as error:
        assert error.findings and all(f.rule and f.next and str(f).count("\n") == 2 for f in error.findings)
        str(error).encode()


# ---- every bound of the reference, on both sides -------------------------------------------------

BOUNDS = {
    VESSL: {
        "seed": (["0"], ["-1", "1.0", "true"]),
        "log_interval": (["1"], ["0"]),
        "paths.checkpoints.save_interval": (["1"], ["0"]),
        "paths.checkpoints.keep_last": (["1"], ["0", "x"]),
        "paths.checkpoints.save_final": (["false"], ["no", "0"]),
        "storage.workers": (["1", "256"], ["0", "257"]),
        "storage.part_size_mb": (["5", "5000"], ["4", "5001"]),
        "storage.retries": (["1"], ["0", "-1"]),
        "storage.retry_wait_s": (["0"], ["-1", "0.5"]),
        "storage.stall_s": (["1"], ["0"]),
        "mlflow.tracking_uri": (
            ["sqlite:///x.db", "https://h/p", "s3://b/k", "file:///app/m"],
            ["/app/m", "sqlite:", "x"],
        ),
        "launcher.resources.gpu_memory_gb": (["0.5", "80"], ["0", "true"]),
        "launcher.max_hours": (["0.5"], ["0"]),
        "launcher.price_per_hour": (["0"], ["-1"]),
        "devices.num_proc": (["1"], ["0"]),
        "devices.compute_backend": (["cuda", "auto"], ["gpu", "tpu"]),
        "devices.mixed_precision": (["bf16", "fp32"], ["fp16", "float16", "bfloat16"]),
        "devices.distributed.init_method": (["env://"], ["tcp://h:1"]),
        "devices.distributed.timeout": (["1"], ["0", "-1"]),
        "devices.fsdp.sharding": (["full_shard", "shard_grad_op", "no_shard"], ["FULL_SHARD"]),
    },
    CRITIC: {
        "run.name": (["a b"], ["a/b", "..", ""]),
        "run.tags": (["[]", "[a, b]"], ["a", "[1]", "[null]"]),
        "data.train.max_length": (["8"], ["7"]),
        "data.eval.batch_size": (["1"], ["0"]),
        "model.heads": (["1", "8"], ["0", "9"]),
        "train.num_epochs": (["1"], ["0"]),
        "train.max_steps": (["1"], ["0", "null", "1e3"]),
        "train.accumulation_steps": (["1"], ["0"]),
        "train.early_stopping.patience": (["1"], ["0"]),
        "pretrain.lr": (["1e-9"], ["0", "-1e-3"]),
        "critic.gamma": (["0", "1"], ["-0.1", "1.1"]),
        "critic.gae_lambda": (["0", "1"], ["1.1"]),
        "critic.discount_lambda": (["0", "1"], ["1.1"]),
        "critic.auxiliary_loss_coef": (["0"], ["-0.1"]),
        "critic.value_lr": (["0"], ["-1e-9"]),
        "critic.target": (["rm_sequence"], ["rm_token"]),
        "rho1.selection_mode": (["weighted", "token_skip"], ["skip"]),
        "rho1.skip_threshold_percentile": (["0", "0.99"], ["1", "-0.1"]),
        "rho1.center": (["head", "none"], ["all", "null"]),
        "loss.lambda": (["0", "1"], ["-0.1", "1.1"]),
        "loss.weight_temperature": (["1e-3"], ["0"]),
        "loss.epsilon": (["0.01", "0.99"], ["0", "1"]),
        "loss.max_weight": (["1.01"], ["1", "0.5"]),
        "loss.chunk_positions": (["auto", "1"], ["0", "all", "1.5"]),
        "optim.optimizer": (["adamw"], ["sgd"]),
        "optim.lr": (["1e-9"], ["0", "true", ".nan", "1e999"]),
        "optim.weight_decay": (["0"], ["-0.1"]),
        "optim.betas": (["[0, 0.999]"], ["[0.9, 1]", "[0.9]", "[0.9, 0.9, 0.9]", "0.9", "[-0.1, 0.9]"]),
        "optim.grad_clip": (["0"], ["-1", "inf"]),
        "optim.warmup_ratio": (["0", "1"], ["-0.1", "1.1"]),
        "eval.interval": (["1"], ["0"]),
        "eval.max_batches": (["1"], ["0"]),
    },
}


@pytest.mark.parametrize(
    ("path", "key", "good", "bad"),
    [(path, key, *values) for path, keys in BOUNDS.items() for key, values in keys.items()],
    ids=[key for keys in BOUNDS.values() for key in keys],
)
def test_each_bound_holds_on_both_sides(path: Path, key: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        loader(path)(path, [f"{key}={value}"])
    for value in bad:
        found = findings(loader(path), path, [f"{key}={value}"])
        assert all(f.key == key or f.key.startswith(f"{key}.") for f in found), [str(f) for f in found]
        assert {f.place for f in found} == {"--set"}


def test_a_variable_that_is_set_but_empty(
    edited: Callable[..., tuple[Path, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    config, _ = edited(VESSL, "project: wmtp", "project: ${EMPTY:-other}")
    assert load_config(config).project == "other"
    config, _ = edited(VESSL, "project: wmtp", "project: ${EMPTY}")
    (finding,) = findings(load_config, config)
    assert (finding.key, finding.what) == ("project", '"" is empty')


def test_text_that_can_not_be_printed_is_refused_in_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_BUCKET_NAME", "a\udcff")
    found = findings(load_config, MINITEST)
    assert found[0].key == "storage.bucket" and "UTF-8" in found[0].what
    for finding in found:
        str(finding).encode()
