"""Models out: what transformers and we ourselves read of them again."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import server
from test_model import KINDS, SMALL, lively, written
from test_weights import write_hf, write_meta
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wmtp import export as export_module
from wmtp.export import export_hf, main
from wmtp.model import MTPModel
from wmtp.outcome import failure
from wmtp.weights import add_heads, load_model, load_state, read_spec, stream, value_head_state

# ---- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [4 << 30, 9_000_000])
def test_export_loads_as_a_plain_llama_and_with_all_heads(
    models: Path, base: MTPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", shard_bytes)
    spec, out = base.spec, tmp_path / "out"
    export_hf(base.state_dict(), spec, out, models / "test-llama-mtp")
    assert len(list(out.glob("model*.safetensors"))) == (1 if shard_bytes > 1 << 30 else 2)
    tokenizer = (models / "test-llama-mtp" / "tokenizer.model").read_bytes()
    assert (out / "tokenizer.model").read_bytes() == tokenizer
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    llama, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert isinstance(llama, LlamaForCausalLM)
    x = torch.arange(20)[None]
    ids = torch.zeros_like(x)
    with torch.no_grad():
        expected = base.lm_head.logits(base.hidden(x, ids)[:, :, 0])
        torch.testing.assert_close(llama.eval()(x).logits, expected, atol=1e-5, rtol=1e-5)
    assert dataclasses.replace(read_spec(out), layout="meta") == spec
    again = load_state(out, read_spec(out))
    assert again.keys() == base.state_dict().keys()
    assert all(torch.equal(again[k].whole(), v) for k, v in base.state_dict().items())


def test_export_of_a_tied_model_with_grouped_keys(tmp_path: Path) -> None:
    model = lively(dataclasses.replace(SMALL, tied=True, rope_theta=5e5, norm_eps=1e-4))
    export_hf(model.state_dict(), model.spec, tmp_path, tmp_path)
    assert read_spec(tmp_path) == model.spec
    llama = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.lm_head.logits(model.hidden(x, torch.zeros_like(x))[:, :, 0])
        torch.testing.assert_close(llama(x).logits, expected, atol=1e-5, rtol=1e-4)
    load_model(tmp_path, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_comes_out_as_it_came_in(kind: str, tmp_path: Path) -> None:
    first = written(kind, tmp_path / "in")
    spec = read_spec(tmp_path / "in")
    model = MTPModel(dataclasses.replace(spec, heads=3), value_head=True)
    stream(model, add_heads(load_state(tmp_path / "in", spec), 3) | value_head_state(spec))
    export_hf(model.state_dict(), model.spec, tmp_path / "out", tmp_path / "in")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    again, info = loaded
    assert type(again) is type(first)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert again.config.vocab_size == 50 and again.config.max_position_embeddings == 64
    x = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again.eval()(x).logits, first(x).logits)
    assert read_spec(tmp_path / "out") == model.spec
    heads = load_model(tmp_path / "out", "cpu").hidden(x, torch.zeros_like(x))
    assert torch.equal(heads[:, :, 1], heads[:, :, 0]) and torch.equal(heads[:, :, 2], heads[:, :, 0])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gpt2", "model_type gpt2, tied unembedding"),
        ("qwen3", "model_type qwen3, head_dim 10"),
        ("llama", '"attention_bias": true'),
        ("yarn", '"rope_type": "yarn"'),
    ],
)
def test_metas_layout_has_no_words_for_other_families(
    kind: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(kind, tmp_path / "in")
    assert main(["--from", str(tmp_path / "in"), "--to", str(tmp_path / "out"), "--layout", "meta"]) == 2
    told = capsys.readouterr().err
    assert words in told and "a Llama without biases" in told and "next  --layout hf" in told
    assert not (tmp_path / "out").exists()


# ---- there and back ---------------------------------------------------------------------------------


def converted(source: Path, target: Path, layout: str) -> Path:
    assert main(["--from", str(source), "--to", str(target), "--layout", layout]) == 0
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_to_hugging_face_and_back_returns_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    first = tmp_path / "meta"
    first.mkdir()
    write_meta(first)
    given = {k: v.to(dtype) for k, v in torch.load(first / "consolidated.pth", weights_only=True).items()}
    torch.save(given, first / "consolidated.pth")
    between = converted(first, tmp_path / "hf", "hf")
    assert len(list(between.glob("model-*.safetensors"))) > 1
    for other in (converted(between, tmp_path / "back", "meta"), converted(first, tmp_path / "same", "meta")):
        found = torch.load(other / "consolidated.pth", weights_only=True)
        assert found.keys() == given.keys()
        for name, value in given.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
        assert dataclasses.replace(read_spec(other), max_positions=0) == dataclasses.replace(
            read_spec(first), max_positions=0
        )


def test_slices_are_joined_on_the_way_out(tmp_path: Path) -> None:
    source = tmp_path / "slices"
    source.mkdir()
    model = write_meta(source, 2)
    found = load_state(converted(source, tmp_path / "hf", "hf"), read_spec(tmp_path / "hf"))
    assert all(torch.equal(found[name].whole(), p) for name, p in model.named_parameters())


def test_a_card_names_base_heads_and_licences_and_brings_them(tmp_path: Path) -> None:
    source, target = tmp_path / "a-base", tmp_path / "out"
    source.mkdir()
    write_meta(source)
    (source / "LICENSE.txt").write_text("theirs")
    (source / "USE_POLICY.md").write_text("no harm")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: llama2\n---\n# A base\n")
    (source / "generation_config.json").write_text('{"max_length": 7}')
    card = (converted(source, target, "hf") / "README.md").read_text()
    assert card.startswith('---\nlicense: "llama2"\n---\n\n# a-base, with 3 heads\n')
    assert "2 layers and 3 heads" in card and "Made of `a-base`" in card and "`LICENSE.txt`, `USE_POLICY.md`" in card
    assert (target / "LICENSE.txt").read_text() == "theirs" and (target / "USE_POLICY.md").exists()
    assert (target / "generation_config.json").read_text() == '{"max_length": 7}'
    (source / "README.md").write_text("# no front\nlicense: none\n")
    export_hf(load_state(source, read_spec(source)), read_spec(source), target, source, ["Trained for 3 steps with x."])
    card = (target / "README.md").read_text()
    assert card.startswith("# a-base") and "See the source" in card and "Trained for 3 steps with x." in card


def test_a_card_says_every_word_of_a_licence_as_the_source_does(tmp_path: Path) -> None:
    source, target = tmp_path / "a-base", tmp_path / "out"
    source.mkdir()
    write_meta(source)
    for name in ("License", "copying.txt", "Use_Policy.md"):
        (source / name).write_text(name)
    front = (
        b'---\nlicense: "other"  # theirs\nlicense_name: llama3\nlicense_link: LICENSE\ntags:\n- caf\xe9\n---\n# A\n'
    )
    (source / "README.md").write_bytes(front)
    card = (converted(source, target, "hf") / "README.md").read_text()
    assert card.startswith('---\nlicense: "other"\nlicense_name: "llama3"\nlicense_link: "LICENSE"\n---\n\n# a-base')
    assert "`llama3`, as the source says" in card and "`License`, `Use_Policy.md`, `copying.txt`" in card
    assert (target / "copying.txt").exists()
    (source / "README.md").write_text("---\nlicense: [\n---\n# A\n")
    assert (converted(source, tmp_path / "torn", "hf") / "README.md").read_text().startswith("# a-base")


def test_a_matrix_that_its_file_has_turned_is_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_meta(source)
    state = torch.load(source / "consolidated.pth", weights_only=True)
    torch.save({k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state.items()}, source / "consolidated.pth")
    target = converted(source, tmp_path / "hf", "hf")
    found, given = (load_state(folder, read_spec(folder)) for folder in (target, source))
    assert all(torch.equal(found[name].whole(), value.whole()) for name, value in given.items())


def exported_with_little_room(source: str, target: str, layout: str, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = main(["--from", source, "--to", target, "--layout", layout])
        spec = read_spec(Path(source))
        try:
            export_hf(load_state(Path(source), spec), spec, Path(target), Path(source))
            ended = 0
        except Exception as error:
            ended = failure(error, 0, None)[0]
    queue.put((code, told.getvalue(), ended))


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_disk_that_is_full_is_told_from_a_bad_model(tmp_path: Path, layout: str) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_meta(source)
    queue = server().Queue()
    child = server().Process(target=exported_with_little_room, args=(str(source), str(target), layout, queue))
    child.start()
    code, told, ended = queue.get(timeout=60)
    child.join()
    assert code == 10 and "export    FAIL" in told and "rule  the target's disk has room" in told, told
    assert ended == 10


def test_what_is_written_has_the_mode_of_new_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_meta(source)
    target = converted(source, tmp_path / "out", "hf")
    (tmp_path / "usual").touch()
    assert {file.stat().st_mode for file in target.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_what_can_not_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "tied", tmp_path / "out"
    source.mkdir()
    write_hf(source, tied=True)

    def refused(*words: str) -> None:
        assert main(["--from", str(source), "--to", str(target), "--layout", "meta"]) == 2
        told = capsys.readouterr().err
        assert all(word in told for word in ("export    FAIL", "rule  ", "next  ", *words))

    refused("tied unembedding", "--layout hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tied"]
    target.mkdir()
    refused("out: is there")
    target.rmdir()
    (source / "model.safetensors").unlink()
    refused("no weights")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tied"]
