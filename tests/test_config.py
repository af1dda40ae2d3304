"""Settings: every shipped file loads, and says what it resolves to. What is refused: test_bad_settings.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from wmtp.config import (
    Config,
    ConfigError,
    Finding,
    OtherBase,
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
        assert finding.rule and finding.next and "see docs" not in finding.rule
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
    algorithms = {"baseline_mtp", "critic_wmtp", "rho1_wmtp"}  # and those that are added
    assert {p.parent.name for p in RECIPES} == {"configs"}
    for algorithm in algorithms:
        assert sum(p.name == f"recipe.{algorithm}.yaml" for p in RECIPES) == 2


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
        "cache_max_gb": None,
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
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-1.", -1.0), ("+12", 12),
        ("true", True), ("false", False), ("True", "True"), ("yes", "yes"), ("NO", "NO"), ("on", "on"),
        ("1_0", "1_0"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("1e", "1e"), ("١", "١"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert plain(text) == value and type(plain(text)) is type(value)


@pytest.mark.parametrize(("text", "value"), [("0o17", 15), ("0x1F", 31), ("010", 10), ("-07", -7), ("00", 0)])
def test_a_number_that_readers_of_yaml_disagree_on_is_marked(text: str, value: int) -> None:
    assert plain(text) == value and isinstance(plain(text), OtherBase)


def test_a_folded_text_has_no_trace_of_its_folding(edited: Callable[..., tuple[Path, int]]) -> None:
    old = '"<s>[INST] {prompt} </s> [/INST] {solution}</s>"'
    recipe, _ = edited(CRITIC, old, ">-\n    {prompt}\n    {solution}")
    assert load_recipe(recipe).critic.reward_template == "{prompt} {solution}"


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("\n", "\r"), ("# P", "\ufeff# P")], ids=["CRLF", "CR", "BOM"])
def test_line_ends_and_a_mark_at_the_start_change_nothing(change: tuple[str, str], tmp_path: Path) -> None:
    copy = tmp_path / VESSL.name
    copy.write_bytes(VESSL.read_text("utf-8").replace(*change).encode())
    one, other = load_config(copy), load_config(VESSL)
    assert one.model_dump() == other.model_dump()
    assert [place.removeprefix(str(copy)) for place in origins(one).values()] == [
        place.removeprefix(str(VESSL)) for place in origins(other).values()
    ]


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


# ---- rules between the files ---------------------------------------------------------------------


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


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_rows_are_no_longer_than_a_models_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("WMTP_APP_ROOT", str(tmp_path))
    folder = tmp_path / "models/test-rm-llama"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({key: 64}))
    load_pair(LOCAL, ROOT / "tests/configs/recipe.rho1_wmtp.yaml", env="minitest")
    found = findings(load_pair, LOCAL, SMALL, env="minitest")
    assert [f.key for f in found] == ["data.train.max_length", "data.eval.max_length"]
    nothing_held_out = ["data.eval.sources=[]", "data.train.max_length=64"]
    load_pair(LOCAL, SMALL, nothing_held_out, env="minitest")
    found = findings(load_pair, LOCAL, SMALL, [*nothing_held_out, "data.eval.share=0.1"], env="minitest")
    assert [f.key for f in found] == ["data.eval.max_length"]
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
    told = origins(load_config(VESSL, ["paths.datasets.new=file:///app/new"]))
    assert told["paths.datasets.new"] == "--set" and told["paths.datasets.wmtp_code"] == f"{VESSL}:15"


def test_settings_bounds_of_large_numbers() -> None:
    assert load_config(VESSL, [f"seed={2**63 - 1}"]).seed == 2**63 - 1
    assert load_config(VESSL, [f"log_interval={2**31 - 1}"]).log_interval == 2**31 - 1
    assert load_config(VESSL, ["launcher.max_hours=9007199254740992"]).launcher.max_hours == 2.0**53


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
        "data.eval.share": (["0", "0.5"], ["0.51", "-0.1", "half"]),
        "data.train.allow_evaluation_data": (["true"], ["yes", "1"]),
        "model.heads": (["1", "8"], ["0", "9"]),
        "model.vocab_size": (["1"], ["0"]),
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


@pytest.mark.parametrize("watcher", ["train.early_stopping.enabled=true", "pretrain.early_stopping.enabled=true"])
def test_early_stopping_watches_a_share_as_it_does_a_source(watcher: str) -> None:
    none = ["data.eval.sources=[]", watcher]
    assert len(findings(load_recipe, CRITIC, none)) == 1
    load_recipe(CRITIC, [*none, "data.eval.share=0.1"])
