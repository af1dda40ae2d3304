"""The dry run's checks that need torch: each broken once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wmtp import config as settings
from wmtp import memory, preflight_torch, twin
from wmtp.bucket import client_of
from wmtp.headers import Folder
from wmtp.manifest import create
from wmtp.memory import GIB, Peak
from wmtp.model import ModelSpec
from wmtp.optim import steps_told, total_steps
from wmtp.preflight import FAIL, NOT, OK, WARN, Finding
from wmtp.preflight_torch import Model, Models
from wmtp.weights import read_spec

ROOT = Path(__file__).parents[1]
VESSL = str(ROOT / "configs/config.vessl.yaml")
BASELINE, CRITIC = (str(ROOT / f"configs/recipe.{algo}.yaml") for algo in ("baseline_mtp", "critic_wmtp"))
SPEC = ModelSpec("hf", 4, 64, 1, 4, 4, 128, 512)
TEXTS = [f"def f{n}(x):\n    return x + {n}" for n in range(300)]


OFFLINE = Models(True, Path("/nowhere"))


def pair(recipe: str = BASELINE, *sets: str) -> tuple[settings.Config, settings.Recipe]:
    return settings.load_pair(VESSL, recipe, list(sets), env="production")


def model_of(folder: Path, texts: list[str], size: int | None = None) -> Model:
    vocab = twin.write_tokenizer(folder, texts)
    spec = dataclasses.replace(SPEC, vocab_size=size or vocab)
    return Model(folder.name, Folder(folder), spec, "here")


def test_one_vocabulary(tmp_path: Path) -> None:
    base = model_of(tmp_path / "base", TEXTS)
    shutil.copytree(tmp_path / "base", tmp_path / "rm")
    same = Model("rm", Folder(tmp_path / "rm"), base.spec, "here")
    assert base.spec
    size = base.spec.vocab_size
    finding, tokenizer = preflight_torch.check_tokenizers({"base": base, "rm": same}, TEXTS[:3], size)
    assert finding.verdict == OK and "the same ids for 13 texts" in finding.detail and tokenizer
    absent = Model("rm", None, None, "", "no answer")
    finding, _ = preflight_torch.check_tokenizers({"base": base, "rm": absent}, [], size)
    assert finding.verdict == NOT and "not of rm: no answer" in finding.detail
    finding, tokenizer = preflight_torch.check_tokenizers({"rm": absent}, [], size)
    assert (finding.verdict, tokenizer) == (NOT, None)
    finding, _ = preflight_torch.check_tokenizers({"base": base}, [], 32000)
    assert finding.verdict == FAIL and "expected 32000" in finding.detail


def test_another_vocabulary_of_the_same_size(tmp_path: Path) -> None:
    base, other = model_of(tmp_path / "base", TEXTS), model_of(tmp_path / "rm", [t[::-1] for t in TEXTS])
    assert base.spec and other.spec
    size = min(base.spec.vocab_size, other.spec.vocab_size)
    finding, _ = preflight_torch.check_tokenizers({"base": base, "rm": other}, [], base.spec.vocab_size)
    assert finding.verdict == FAIL and finding.rule and finding.next
    if base.spec.vocab_size == other.spec.vocab_size == size:
        assert "differ at piece" in finding.detail


def json_tokenizer(folder: Path, pieces: list[str], unk: str = "<unk>") -> Model:
    folder.mkdir()
    vocab = {piece: n for n, piece in enumerate(pieces)}
    content: dict[str, object] = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unk},
        "added_tokens": [],
    }
    content |= {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": unk}))
    return Model(folder.name, Folder(folder), dataclasses.replace(SPEC, vocab_size=len(pieces)), "here")


def test_an_added_token_is_explained(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "a", "b"]
    base, padded = json_tokenizer(tmp_path / "base", pieces), json_tokenizer(tmp_path / "rm", [*pieces, "<pad>"])
    for models in ({"base": base, "rm": padded}, {"base": padded, "rm": base}):
        size = len(pieces) + (models["base"] is padded)
        finding, _ = preflight_torch.check_tokenizers(models, [], size)
        assert finding.verdict == FAIL
        assert "rm has 1 added at the end ('<pad>'): usually padding" in finding.detail


def test_the_same_pieces_with_other_special_tokens(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "a", "b"]
    base, other = json_tokenizer(tmp_path / "base", pieces), json_tokenizer(tmp_path / "rm", pieces, unk="b")
    finding, _ = preflight_torch.check_tokenizers({"base": base, "rm": other}, [], len(pieces))
    assert finding.verdict == FAIL and "unk_id is 4 in rm, 0 in base" in finding.detail


def test_the_same_pieces_that_cut_text_otherwise(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "a", "b"]
    base, other = json_tokenizer(tmp_path / "base", pieces), json_tokenizer(tmp_path / "rm", pieces)
    file = tmp_path / "rm" / "tokenizer.json"
    file.write_text(file.read_text().replace('{"type": "Whitespace"}', "null"))
    finding, _ = preflight_torch.check_tokenizers({"base": base, "rm": other}, ["a b"], len(pieces))
    assert finding.verdict == FAIL and "other ids for" in finding.detail


def test_a_model_without_tokenizer_or_with_another_size_stated(tmp_path: Path) -> None:
    base = model_of(tmp_path / "base", TEXTS)
    (tmp_path / "rm").mkdir()
    finding, _ = preflight_torch.check_tokenizers(
        {"base": base, "rm": Model("rm", Folder(tmp_path / "rm"), SPEC, "")}, [], 32000
    )
    assert finding.verdict == FAIL and "holds no tokenizer" in finding.detail and finding.next
    padded = model_of(tmp_path / "padded", TEXTS, size=641)
    finding, _ = preflight_torch.check_tokenizers({"base": padded}, [], 641)
    assert finding.verdict == FAIL and "its vocab_size is 641" in finding.detail


# ---- models ---------------------------------------------------------------------------------------------------------


def test_heads_and_positions_are_what_the_trainer_wants() -> None:
    _, recipe = pair()
    fits = Model("m", None, SPEC, "", proved=True)
    assert list(preflight_torch.check_shapes(recipe, {"base": fits})) == []
    two = Model("m", None, dataclasses.replace(SPEC, heads=2), "", proved=True)
    (finding,) = preflight_torch.check_shapes(recipe, {"base": two})
    assert finding.verdict == FAIL and "model.heads: 4, but m has 2" in finding.detail
    short = Model("r", None, dataclasses.replace(SPEC, max_positions=1024), "", proved=True)
    (finding,) = preflight_torch.check_shapes(recipe, {"base": fits, "rm": short})
    assert finding.verdict == FAIL and "rows of 2048, but r has 1024 positions" in finding.detail
    assumed = dataclasses.replace(two, proved=False)
    assert list(preflight_torch.check_shapes(recipe, {"base": assumed})) == []


@pytest.mark.parametrize(
    ("variables", "verdict", "told"),
    [
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, NOT, "does not answer"),
        ({"AWS_PROFILE": "nope"}, FAIL, "nope"),
        ({"S3_ENDPOINT_URL": "localhost:9000"}, FAIL, "localhost:9000"),
    ],
)
def test_a_bucket_that_says_nothing_and_one_that_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], verdict: str, told: str
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", **variables}.items():
        monkeypatch.setenv(name, value)
    config, _ = pair()
    models = Models(False, tmp_path)
    _, found = models.of(config, "base", "file:///app/models/llama-7b-mtp")
    found += [models.no] if models.no else []
    assert verdict in {f.verdict for f in found} and any(told in f.detail for f in found)
    assert FAIL not in {f.verdict for f in found} or verdict == FAIL


def test_a_folder_here_does_not_prove_the_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_APP_ROOT", str(tmp_path))
    twin.write_tokenizer(tmp_path / "t", TEXTS)
    twin.write_model(tmp_path / "models" / "m", "base", SPEC, tmp_path / "t", 1)
    config, _ = pair()
    _, found = Models(True, tmp_path / "into").of(config, "base", "file:///app/models/m")
    assert [f.verdict for f in found] == [OK, NOT]
    assert found[1].subject == "model m in the bucket" and found[1].detail == "--offline"
    local = config.model_copy(update={"launcher": config.launcher.model_copy(update={"target": "local"})})
    _, found = Models(True, tmp_path / "into").of(local, "base", "file:///app/models/m")
    assert [f.verdict for f in found] == [OK]


# ---- data ------------------------------------------------------------------------------------------------------------


def source(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": t, "solution": "pass"}) + "\n" for t in texts))
    return f"file://{folder}"


def folder_of(model: Model) -> Path:
    assert model.source
    return model.source.small()


def with_data(config: settings.Config, uris: dict[str, str], target: str = "local") -> settings.Config:
    """The same with other sources, on this machine: the cluster has the image's alone."""
    paths = config.paths.model_copy(update={"datasets": uris})
    return config.model_copy(update={"paths": paths, "launcher": config.launcher.model_copy(update={"target": target})})


def data_of(tmp_path: Path, train: list[str], held: list[str], verbose: bool = False, *sets: str) -> dict[str, Finding]:
    tokenizer = preflight_torch.load_tokenizer(folder_of(model_of(tmp_path / "t", TEXTS)))
    config, recipe = pair(BASELINE, "data.train.max_length=64", *sets)
    uris = {"wmtp_code": source(tmp_path / "train", train), "mbpp_tiny": source(tmp_path / "held", held)}
    config = with_data(config, uris)
    return {f.subject: f for f in preflight_torch.check_data(config, recipe, tokenizer, verbose, OFFLINE)}


def test_data_is_counted(tmp_path: Path) -> None:
    found = data_of(tmp_path, [*TEXTS, "x " * 500], TEXTS[:10], True, "train.accumulation_steps=1")
    train = found["data.train"]
    assert train.verdict == OK
    assert "291 documents" in train.detail  # what is held out is not trained on
    assert "0.3% are longer than a row of 64 and are cut" in train.detail
    assert "steps an epoch" in train.detail and "tokens <=32" in train.detail
    assert "10 documents" in found["data.eval"].detail
    assert "def f" in found["data.train sample"].detail


def test_layouts_what_is_passed_over_and_the_split_are_told(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    problem = {"description": "Add.", "solutions": {"language": [2], "solution": ["int main() {}"]}}
    rows = [problem, *({"prompt": t, "solution": "pass"} for t in TEXTS)]
    (tmp_path / "train" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = preflight_torch.load_tokenizer(folder_of(model_of(tmp_path / "t", TEXTS)))
    config, recipe = pair(BASELINE, "data.eval.sources=[]", "data.eval.share=0.25")
    config = with_data(config, {"wmtp_code": f"file://{tmp_path}/train"})
    found = {f.subject: f for f in preflight_torch.check_data(config, recipe, tokenizer, False, OFFLINE)}
    told = found["data wmtp_code"].detail
    assert "300 prompt and solution" in told and "1 without a solution in Python, passed over" in told
    held = int(found["data split"].detail.split(" ")[0])
    assert 40 < held < 110 and f"{held} documents" in found["data.eval"].detail
    assert f"{300 - held} documents" in found["data.train"].detail
    _, recipe = pair(BASELINE, "data.eval.sources=[]", "data.eval.share=1e-9")
    failed = [f for f in preflight_torch.check_data(config, recipe, tokenizer, False, OFFLINE) if f.verdict == FAIL]
    assert [f.subject for f in failed] == ["data.train"] and "holds out none" in failed[0].detail and failed[0].next


def test_human_eval_to_train_on_is_refused_as_the_trainer_does(tmp_path: Path) -> None:
    uris = {}
    for name in ("wmtp_code", "mbpp_tiny"):
        (tmp_path / name).mkdir()
        task = {"task_id": "HumanEval/0", "prompt": f"def {name}():\n", "canonical_solution": "    pass\n"}
        (tmp_path / name / "a.jsonl").write_text(json.dumps(task))
        uris[name] = f"file://{tmp_path / name}"
    config, recipe = pair(BASELINE)
    findings = preflight_torch.check_data(with_data(config, uris), recipe, None, False, OFFLINE)
    found = [f for f in findings if f.verdict == FAIL]
    assert [f.subject for f in found] == ["data wmtp_code"]
    assert "data.train.sources: wmtp_code" in found[0].detail and found[0].rule
    assert "allow_evaluation_data" in found[0].next
    _, recipe = pair(BASELINE, "data.train.allow_evaluation_data=true")
    findings = preflight_torch.check_data(with_data(config, uris), recipe, None, False, OFFLINE)
    assert all(f.verdict != FAIL for f in findings)


def test_data_of_less_than_a_step_and_of_nothing(tmp_path: Path) -> None:
    found = data_of(tmp_path, TEXTS[:20], TEXTS[:2])
    assert found["data.train"].verdict == WARN and "0." in found["data.train"].detail
    (tmp_path / "again").mkdir()
    found = data_of(tmp_path / "again", TEXTS[:2], TEXTS[:2])
    assert found["data.train"].verdict == FAIL and "not held out" in found["data.train"].detail


@pytest.mark.parametrize(
    ("count", "packed", "verdict"), [(20, "true", WARN), (300, "true", NOT), (20, "false", NOT), (3, "false", WARN)]
)
def test_less_than_a_step_is_known_without_a_tokenizer(tmp_path: Path, count: int, packed: str, verdict: str) -> None:
    sets = ("data.train.max_length=64", "train.accumulation_steps=1", f"data.train.pack_sequences={packed}")
    config, recipe = pair(BASELINE, *sets)
    uris = {
        "wmtp_code": source(tmp_path / "train", TEXTS[5 : 5 + count]),
        "mbpp_tiny": source(tmp_path / "held", TEXTS[:5]),
    }
    findings = preflight_torch.check_data(with_data(config, uris), recipe, None, False, OFFLINE)
    found = {f.subject: f for f in findings}
    assert found["data.train"].verdict == verdict, found["data.train"]
    assert ("and a step has" in found["data.train"].detail) is (verdict == WARN) and found["data.eval"].verdict == NOT


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": 1}', "not a text"),
        ('{"prompt"', "is not JSON"),
        ("[]", "not an object"),
        ('{"prompt": "\\ud83d", "code": "x"}', "lone surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    tmp_path = tmp_path / "d"
    tmp_path.mkdir()
    config, recipe = pair()
    uris = {"wmtp_code": source(tmp_path / "train", TEXTS), "mbpp_tiny": source(tmp_path / "held", TEXTS)}
    with (tmp_path / "train" / "a.jsonl").open("a") as file:
        file.write(line + "\n")
    config = with_data(config, uris)
    found = [f for f in preflight_torch.check_data(config, recipe, None, False, OFFLINE) if f.verdict == FAIL]
    assert len(found) == 1 and "wmtp_code/a.jsonl:301" in found[0].detail and told in found[0].detail and found[0].next


@pytest.mark.parametrize("uri", ["file:///app/datasets/not_here", "file:///app/data/mine", "file:///elsewhere"])
def test_data_that_the_image_does_not_have(tmp_path: Path, uri: str) -> None:
    config, recipe = pair()
    config = with_data(config, {"wmtp_code": uri, "mbpp_tiny": "file:///app/datasets/mbpp_tiny"}, "vessl")
    found = {f.subject: f for f in preflight_torch.check_data(config, recipe, None, False, OFFLINE)}
    assert found["data wmtp_code"].verdict == FAIL and uri in found["data wmtp_code"].detail
    assert found["data mbpp_tiny"].verdict == OK


def test_data_in_the_bucket_are_published_or_refused(tmp_path: Path, prefix: str) -> None:
    bucket = os.environ["S3_BUCKET_NAME"]
    uri, client = f"{prefix}/data", client_of(os.environ["S3_ENDPOINT_URL"], "eu-north-1")
    config, recipe = pair()
    config = with_data(config, {"wmtp_code": uri, "mbpp_tiny": "file:///app/datasets/mbpp_tiny"}, "vessl")

    def found(models: Models) -> Any:
        findings = preflight_torch.check_data(config, recipe, None, False, models)
        return next(f for f in findings if f.subject == "data wmtp_code")

    assert (found(OFFLINE).verdict, "--offline" in found(OFFLINE).detail) == (NOT, True)
    absent = found(Models(False, tmp_path / "a"))
    assert absent.verdict == FAIL and uri in absent.detail and "publish" in absent.next
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jsonl").write_text('{"text": "x"}\n')
    manifest = json.dumps(create(tmp_path / "d", "data")).encode()
    client.put_object(Bucket=bucket, Key=f"{uri.split('/', 3)[3]}/manifest.json", Body=manifest)
    there = found(Models(False, tmp_path / "b"))
    assert there.verdict == NOT and "1 files" in there.detail and "published" in there.detail


def test_a_large_corpus_is_sampled_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data_of(tmp_path, TEXTS, TEXTS[:1])["data.train"].detail
    monkeypatch.setattr(preflight_torch, "CHARACTERS", 3000)
    (tmp_path / "b").mkdir()
    part = data_of(tmp_path / "b", TEXTS, TEXTS[:1])["data.train"].detail
    assert "estimated from one document in" in part and "estimated" not in whole
    tokens = [int(d.split(" tokens")[0].rsplit(" ", 1)[1]) for d in (whole, part)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.1)


# ---- memory and disk -------------------------------------------------------------------------------------------------


def memory_of(monkeypatch: pytest.MonkeyPatch, gib: int, most: float, *sets: str) -> Finding:
    """The verdict on a step of ``most`` GiB on GPUs of ``gib``; the walk itself is `test_memory`'s."""

    class Known:
        def __init__(self, value: object) -> None:
            self.value = value

        def result(self) -> object:
            return self.value

    lower = [("train.accumulation_steps=1", Peak("step", {"weights": int(20 * GIB)}))]
    monkeypatch.setattr(memory, "apart", lambda function, *_: Known(lower))
    config, recipe = pair(BASELINE, f"launcher.resources.gpu_memory_gb={gib}", *sets)
    models = {"base": Model("llama-7b-mtp", None, SPEC, "configs/shapes/llama-7b-mtp", "--offline")}
    asked = ({"base": SPEC}, Known([Peak("loading", {"weights": GIB}), Peak("step", {"weights": int(most * GIB)})]))
    (finding,) = preflight_torch.check_memory(config, recipe, models, asked)  # type: ignore[arg-type]  # Known is a future
    return finding


def test_memory_that_fits_and_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = memory_of(monkeypatch, 80, 47.2)
    assert fits.verdict == OK and "peak 47.2 GiB of 80 GiB at step" in fits.detail
    assert "shapes of llama-7b-mtp assumed" in fits.detail
    tight = memory_of(monkeypatch, 80, 75)
    assert tight.verdict == WARN and "margin 6%" in tight.detail
    over = memory_of(monkeypatch, 40, 47.2)
    assert over.verdict == FAIL and "does not fit" in over.detail
    assert over.next == "train.accumulation_steps=1 gives 20.0 GiB" and over.rule


def test_a_gpu_that_is_not_known_is_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_torch, "GPU_MEMORY_GIB", {})
    config, recipe = pair()
    resources = config.launcher.resources.model_copy(update={"gpu_type": "RTX4090", "gpu_memory_gb": None})
    config = config.model_copy(update={"launcher": config.launcher.model_copy(update={"resources": resources})})
    future: Future[list[Peak]] = Future()
    future.set_result([Peak("step", {"weights": GIB})])
    models = {"base": Model("m", None, SPEC, "")}
    (finding,) = preflight_torch.check_memory(config, recipe, models, ({"base": SPEC}, future))
    assert finding.verdict == NOT and "gpu_memory_gb" in finding.detail


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seven = read_spec(ROOT / "configs/shapes/llama-7b-mtp")
    config, recipe = pair()
    models = {"base": Model("llama-7b-mtp", None, seven, "")}
    finding = preflight_torch.check_disk(config, recipe, models)
    assert finding.verdict == NOT and "models 27.0 GB to sync, 4 checkpoints of 80.9 GB" in finding.detail
    monkeypatch.setenv("WMTP_APP_ROOT", str(tmp_path))
    local = config.model_copy(update={"launcher": config.launcher.model_copy(update={"target": "local"})})
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(preflight_torch.shutil, "disk_usage", lambda _: usage)
    finding = preflight_torch.check_disk(local, recipe, models)
    assert finding.verdict == FAIL and "1.0 GB free" in finding.detail
    usage.free = 10**12
    assert preflight_torch.check_disk(local, recipe, models).verdict == OK


def test_the_plans_models_have_their_shapes() -> None:
    """Parameters as the models' cards say: 6.7 and 2.7 billion."""
    sizes = {p.name: memory.whole_bytes(read_spec(p)) / 4e9 for p in (ROOT / "configs" / "shapes").iterdir()}
    assert sizes == pytest.approx({"llama-7b-mtp": 6.74, "starling-rm-7b": 6.74, "sheared-llama-2.7b": 2.70}, abs=0.02)


# ---- together --------------------------------------------------------------------------------------------------------


def test_a_checks_surprise_hides_no_other_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprised(_models: object, _texts: object, expected: int) -> None:
        raise KeyError(f"tok_embeddings.weight of {expected}")

    monkeypatch.setattr(preflight_torch, "check_tokenizers", surprised)
    arguments = ["--config", VESSL, "--env", "production", "--only", "tokenizers,data", "--offline"]
    arguments += ["--set", "model.vocab_size=50257"]
    preflight_torch.main([*arguments, "--recipe", BASELINE])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["subject"], f["verdict"]) for f in found][:2] == [("tokenizers", FAIL), ("data mbpp_tiny", OK)]
    assert "tok_embeddings.weight of 50257" in found[0]["detail"] and found[0]["next"]


def test_a_prediction_that_the_twin_contradicts_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for off, verdict in (("-0.1", OK), ("+4.9", OK), ("-5.6", WARN)):
        monkeypatch.setattr(twin, "lived", lambda *_, off=off: (True, f"live bytes 4 MiB, predicted 4 ({off}%)", 9.0))
        args = argparse.Namespace(config=VESSL, overrides=[], env="production")
        assert preflight_torch.twin_finding(args, BASELINE).verdict == verdict


def test_one_recipes_surprise_hides_no_other_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--config", VESSL, "--env", "production", "--only", "data,models", "--offline"]
    assert preflight_torch.main([*arguments, "--recipe", str(tmp_path / "none.yaml"), "--recipe", CRITIC]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0]["verdict"] == FAIL and "none.yaml" in found[0]["detail"]
    assert {f["subject"] for f in found if f["verdict"] == NOT} >= {"model llama-7b-mtp", "model starling-rm-7b"}
    assert all("shapes assumed" in f["detail"] for f in found if f["subject"].startswith("model "))


def test_what_ends_a_run_is_told_where_it_is_not_the_steps_that_were_asked_for() -> None:
    recipe = settings.load_recipe(
        ROOT / "configs/recipe.baseline_mtp.yaml", ["train.max_steps=100", "train.num_epochs=1"]
    )
    assert steps_told(total_steps(4000, 4, recipe), recipe) == "100 steps"
    told = "10 steps: train.num_epochs (1) of the data end before train.max_steps (100)"
    assert steps_told(total_steps(40, 4, recipe), recipe) == told
