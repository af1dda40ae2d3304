"""The name of kept scores: another for everything that matters, the same for everything that doesn't."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp.config import Config, Recipe, load_pair
from wmtp.manifest import create
from wmtp.scorekey import kept_name, main, scorer_of

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/config.local_minitest.yaml"


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small stand-ins for models and data: nothing is loaded here."""
    root = tmp_path / "app"
    for name in ("test-llama-mtp", "test-rm-llama", "test-llama"):
        (root / "models" / name).mkdir(parents=True)
        (root / "models" / name / "tokenizer.model").write_text("pieces")
        (root / "models" / name / "weights.bin").write_text(name)
    for name in ("wmtp_code", "mbpp_tiny"):
        (root / "datasets" / name).mkdir(parents=True)
        (root / "datasets" / name / "a.jsonl").write_text(name)
    monkeypatch.setenv("WMTP_APP_ROOT", str(root))
    return root


def pair(algorithm: str, *sets: str) -> tuple[Config, Recipe]:
    return load_pair(CONFIG, ROOT / f"tests/configs/recipe.{algorithm}.yaml", sets, env="minitest")


def name_of(algorithm: str, *sets: str, manifests: Path | None = None) -> str:
    return kept_name(*pair(algorithm, *sets), manifests)[0]


def test_what_the_scores_depend_on_is_in_the_name(app: Path) -> None:
    first = name_of("critic_wmtp")
    assert first.startswith("reward-") and name_of("critic_wmtp") == first
    names = {first, name_of("rho1_wmtp")}
    for change in (
        "critic.reward_template=x {text}",
        "data.train.max_length=64",
        "data.train.pack_sequences=false",
        "data.eval.max_length=64",
        "data.eval.sources=[]",
        "data.eval.share=0.1",
        "data.eval.share=0.2",
        "data.train.sources=[wmtp_code, mbpp_tiny]",
        "devices.mixed_precision=bf16",
        "critic.use_pseudo_rewards=true",
    ):
        names.add(name_of("critic_wmtp", change))
    assert len(names) == 12
    for file in (
        "models/test-rm-llama/weights.bin",
        "models/test-llama-mtp/tokenizer.model",
        "datasets/wmtp_code/a.jsonl",
    ):
        kept = (app / file).read_text()
        (app / file).write_text(kept[::-1])  # of the same size
        names.add(name_of("critic_wmtp"))
        (app / file).write_text(kept)
    assert len(names) == 15 and name_of("critic_wmtp") == first


def test_what_they_do_not_depend_on_is_not(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = name_of("critic_wmtp")
    (app / "models/test-llama-mtp/weights.bin").write_text("another base")
    for change in (
        "critic.gamma=0.9",
        "seed=7",
        "optim.lr=1e-2",
        "loss.lambda=0.9",
        "data.eval.share=0",
        "data.train.batch_size=4",
    ):
        assert name_of("critic_wmtp", change) == first, change
    shutil.move(app, app.with_name("elsewhere"))
    monkeypatch.setenv("WMTP_APP_ROOT", str(app.with_name("elsewhere")))
    assert name_of("critic_wmtp") == first


def test_a_name_from_before_there_was_a_split_still_holds(app: Path) -> None:
    """Kept scores are a night's work: what they are named by changes only with what they depend on."""
    assert name_of("rho1_wmtp") == "reference-dc90bf6be5fb77adad8a6e86eefad98a"
    assert name_of("critic_wmtp") == "reward-43d8c982d671fa2e1b697c803d7c1ea5"


def test_every_file_that_is_read_is_in_the_name(app: Path) -> None:
    folder = app / "datasets" / "wmtp_code"
    names = {name_of("critic_wmtp")}
    (folder / "b.parquet").write_text("more")
    names.add(name_of("critic_wmtp"))
    for file in folder.iterdir():
        file.unlink()
    for name, text in (("a.py", "pass"), ("b.py", "more"), ("a.py", "other")):
        (folder / name).write_text(text)
        names.add(name_of("critic_wmtp"))
    assert len(names) == 5


def test_a_manifest_stands_for_a_model_that_is_not_here(app: Path, tmp_path: Path) -> None:
    first = name_of("critic_wmtp")
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for name in ("test-rm-llama", "test-llama-mtp"):
        (manifests / f"{name}.json").write_text(json.dumps(create(app / "models" / name, name)))
        shutil.rmtree(app / "models" / name)
    assert name_of("critic_wmtp", manifests=manifests) == first
    with pytest.raises(FileNotFoundError):
        name_of("critic_wmtp")


def test_a_manifest_that_the_folder_no_longer_fits_is_not_believed(app: Path, tmp_path: Path) -> None:
    folder = app / "models" / "test-rm-llama"
    first = name_of("critic_wmtp")
    (folder / "manifest.json").write_text(json.dumps(create(folder, "test-rm-llama")))
    (folder / ".complete").touch()
    assert name_of("critic_wmtp") == first
    (folder / "weights.bin").write_text("test-rm-other")  # of the same size, later than the marker
    later = (folder / ".complete").stat().st_mtime_ns + 10**9
    os.utime(folder / "weights.bin", ns=(later, later))
    assert name_of("critic_wmtp") != first


def test_a_kept_manifest_speaks_of_no_other_folder_of_that_name(app: Path, tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    content = json.dumps(create(app / "models" / "test-rm-llama", "test-rm-llama"))
    (manifests / "test-rm-llama.json").write_text(content)
    mine = app / "mine" / "test-rm-llama"
    shutil.copytree(app / "models" / "test-rm-llama", mine)
    (mine / "weights.bin").write_text("quite another")
    elsewhere = f"paths.models.rm=file://{mine}"
    assert name_of("critic_wmtp", elsewhere, manifests=manifests) != name_of("critic_wmtp", manifests=manifests)


def test_the_sync_names_what_is_coming(app: Path, tmp_path: Path) -> None:
    folder, manifests = app / "models" / "test-rm-llama", tmp_path / "manifests"
    manifests.mkdir()
    first = name_of("critic_wmtp")
    (folder / "manifest.json").write_text(json.dumps(create(folder, "test-rm-llama")))
    (folder / ".complete").touch()
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    (newer / "weights.bin").write_text("published anew")
    (manifests / "test-rm-llama.json").write_text(json.dumps(create(newer, "test-rm-llama")))
    assert kept_name(*pair("critic_wmtp"), manifests, coming=True)[0] != first
    assert kept_name(*pair("critic_wmtp"), manifests)[0] == first


def test_what_begins_and_ends_a_text_is_in_the_name(app: Path) -> None:
    folder = app / "models" / "test-llama-mtp"
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    names = set()
    for bos in ("<s>", "<bos>"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
        names.add(name_of("critic_wmtp"))
    assert len(names) == 2


def test_baseline_has_no_scorer_and_pseudo_rewards_are_the_bases() -> None:
    assert scorer_of(pair("baseline_mtp")[1]) is None
    assert scorer_of(pair("rho1_wmtp")[1]) == ("reference", "ref")
    assert scorer_of(pair("critic_wmtp")[1]) == ("reward", "rm")
    assert scorer_of(pair("critic_wmtp", "critic.use_pseudo_rewards=true")[1]) == ("reference", "base")


def test_the_command_has_a_line_a_model(app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "tests/configs/recipe.critic_wmtp.yaml")
    common = ["--config", str(CONFIG), "--recipe", recipe, "--env", "minitest", "--manifests", str(tmp_path)]
    assert main(common) == 0
    base, rm = capsys.readouterr().out.splitlines()
    assert base == "base\ttest-llama-mtp\t-" and rm == f"rm\ttest-rm-llama\t{name_of('critic_wmtp')}"
    shutil.rmtree(app / "datasets")
    assert main(common) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1] == "rm\ttest-rm-llama\t-" and "warn" in shown.err
    assert main([*common, "--set", "nope=1"]) == 2


def test_asking_imports_no_torch() -> None:
    code = "import sys, wmtp.scorekey; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
