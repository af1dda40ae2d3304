"""The run file: one golden file per ENV x ALGO, its quoting, what the schema refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from wmtp import config as settings
from wmtp import runfile

ROOT = Path(__file__).parents[1]
DIGEST = "ghcr.io/wooshikwon/wmtp@sha256:" + "a" * 64
CONFIGS = {"production": "configs/config.vessl.yaml", "minitest": "configs/config.vessl_minitest.yaml"}
RECIPES = {"production": "configs/recipe.{}.yaml", "minitest": "tests/configs/recipe.{}.yaml"}
ALGOS = ["baseline-mtp", "rho1-wmtp", "critic-wmtp"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("S3_BUCKET_NAME", "S3_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MAX_HOURS", "WMTP_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def pair(env: str, algo: str, overrides: list[str] | None = None) -> tuple[settings.Config, settings.Recipe]:
    recipe = RECIPES[env].format(algo.replace("-", "_"))
    return settings.load_pair(str(ROOT / CONFIGS[env]), str(ROOT / recipe), overrides or [], env=env)


def rendered(env: str = "minitest", algo: str = "critic-wmtp", *overrides: str, **more: str) -> str:
    config, recipe = pair(env, algo, list(overrides))
    name = f"{env}-{algo}-3f9c2e1-a81d0c4"
    return runfile.render(
        config,
        recipe,
        env=env,
        run_name=name,
        image=more.pop("image", DIGEST),
        revision="3f9c2e1",
        overrides=overrides,
        endpoint=runfile.endpoint_of(config, reached_from_here=False),
        **more,
    )


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("env", CONFIGS)
def test_golden(env: str, algo: str) -> None:
    """After a change that is meant: write `rendered(env, algo)` to the file, and read the difference."""
    assert rendered(env, algo) == (ROOT / f"tests/golden/run.{env}.{algo}.yaml").read_text()


HARD = [
    "yes",
    "1e5",
    "0123",
    "null",
    "a: b",
    "#x",
    'it\'s "so"',
    "{x}",
    "~",
    "1_000",
    "0x1f",
    " lead",
    "é",
    "- x",
    "2026-11-25",
]


@pytest.mark.parametrize("value", HARD)
def test_a_value_stays_the_text_that_it_is(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", value)
    env = YAML(typ="safe").load(rendered())["env"]
    assert env["AWS_DEFAULT_REGION"] == value
    assert all(isinstance(v, str) or v["source"] == "secret" for v in env.values())
    # VESSL's client reads by YAML 1.1, in which more words are no text.
    assert 'AWS_DEFAULT_REGION: "' in rendered()


def test_secrets_are_references_only() -> None:
    run = YAML(typ="safe").load(rendered())
    assert run["env"]["AWS_SECRET_ACCESS_KEY"] == {"source": "secret", "secret": "wmtp-aws-secret-access-key"}
    with pytest.raises(runfile.Refused, match="AWS_SECRET_ACCESS_KEY"):
        runfile.check(rendered().replace("    source: secret\n    secret: wmtp-aws-secret-access-key", "    plain"))


def test_volume_is_mounted_where_it_is_named() -> None:
    text = rendered("minitest", "critic-wmtp", "launcher.volume=volume://cluster-nfs/wmtp-models-cache")
    assert YAML(typ="safe").load(text)["mount"] == {"/cache/models": "volume://cluster-nfs/wmtp-models-cache"}
    assert "mount" not in YAML(typ="safe").load(rendered())
    with pytest.raises(runfile.Refused, match=r"launcher\.volume"):
        rendered("minitest", "critic-wmtp", "launcher.volume=wmtp-models-cache")


@pytest.mark.parametrize("image", ["ghcr.io/wooshikwon/wmtp:latest", "wmtp", DIGEST[:-1]])
def test_an_image_without_its_digest_is_refused(image: str) -> None:
    with pytest.raises(runfile.Refused, match="image"):
        rendered(image=image)


def test_an_unknown_name_in_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "vessl.yaml"
    template.write_text(runfile.TEMPLATE.read_text().replace("${CLUSTER}", "${CLUTSER}"))
    monkeypatch.setattr(runfile, "TEMPLATE", template)
    with pytest.raises(runfile.Refused, match="CLUTSER"):
        rendered()


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:9000", "[::1]:9000", "0.0.0.0:9000"])
def test_an_endpoint_of_this_machine_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}")
    with pytest.raises(runfile.Refused, match="own address"):
        rendered()
    assert runfile.endpoint_of(pair("minitest", "critic-wmtp")[0], reached_from_here=True) == f"http://{host}"


@pytest.mark.parametrize("value", ["127.0.0.1:9000", "ftp://x", "http://[bad", "http://", "http://u:canary@minio.lab"])
def test_what_is_no_address_is_refused_without_its_secret(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", value)
    with pytest.raises(runfile.Refused) as refused:
        rendered()
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize("hours", ["10000", "1e-9"])
def test_hours_that_the_node_would_refuse_are_refused(hours: str) -> None:
    with pytest.raises(runfile.Refused, match="MAX_HOURS"):
        rendered("minitest", "critic-wmtp", f"launcher.max_hours={hours}")


def test_the_nearer_value_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "https://minio.lab:9000")
    monkeypatch.setenv("S3_BUCKET_NAME", "mine")
    env = YAML(typ="safe").load(rendered(max_hours="2.5"))["env"]
    assert (env["S3_ENDPOINT_URL"], env["S3_BUCKET_NAME"], env["MAX_HOURS"]) == (
        "https://minio.lab:9000",
        "mine",
        "2.5",
    )


def test_summary_counts_hours_and_egress() -> None:
    config, recipe = pair("production", "critic-wmtp", ["launcher.price_per_hour=6.2"])
    what, where, models, cost = runfile.summary(config, recipe, DIGEST, None)
    assert what == DIGEST and "4 x A100" in where and "53.0 GB" in models and "$4.77" in models
    assert cost == "at most 24 h, about $148.80"
    assert runfile.summary(config, recipe, DIGEST, "2")[3] == "at most 2 h, about $12.40"
    with pytest.raises(runfile.Refused, match="MAX_HOURS=-1"):
        runfile.summary(config, recipe, DIGEST, "-1")


def test_the_engines_file_names_secrets_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    lines = runfile.for_engine(rendered(), pair("minitest", "critic-wmtp")[0]).splitlines()
    assert lines[:2] == [f"# image {DIGEST}", "# gpus 4"]
    assert "AWS_SECRET_ACCESS_KEY" in lines and "LAUNCHER=docker" in lines


def test_a_file_outside_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(runfile.Refused, match="not in the image"):
        runfile.of_image("CONFIG", str(tmp_path / "c.yaml"), True)
    assert runfile.of_image("CONFIG", str(ROOT / "configs/config.vessl.yaml"), True) == "configs/config.vessl.yaml"
    assert runfile.of_image("CONFIG", str(tmp_path), False) is None


def receipt(folder: Path, **changed: object) -> Path:
    file = folder / "preflight.json"
    whole = {"env": "production", "revision": "3f9c2e1", "digest": "a81d0c4", "counts": {"ok": 20, "FAIL": 0}}
    file.write_text(json.dumps(whole | changed))
    return file


def test_a_receipt_of_exactly_this_is_wanted(tmp_path: Path) -> None:
    mine = ("production", "3f9c2e1", "a81d0c4")
    runfile.check_receipt(receipt(tmp_path), *mine)
    for changed, said in (
        ({"revision": "1234567"}, "revision 1234567"),
        ({"digest": None}, "settings None"),
        ({"env": "minitest"}, "environment minitest"),
        ({"counts": {"FAIL": 2}}, "2 FAIL"),
        ({"counts": None}, "not a receipt"),
    ):
        with pytest.raises(runfile.Refused, match=said):
            runfile.check_receipt(receipt(tmp_path, **changed), *mine)
    (tmp_path / "preflight.json").write_text("{")
    with pytest.raises(runfile.Refused, match="not a receipt"):
        runfile.check_receipt(tmp_path / "preflight.json", *mine)
    with pytest.raises(runfile.Refused, match=r"no dry run.*\n.*\n.*make dryrun"):
        runfile.check_receipt(tmp_path / "none.json", *mine)
