"""Models judged by their headers: each fault is found, and no weights are read."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import written

from wmtp import headers, twin
from wmtp.bucket import BucketError, client_of
from wmtp.export import export_hf
from wmtp.headers import Bucket, Folder
from wmtp.manifest import MANIFEST, create
from wmtp.model import ModelError, ModelSpec, MTPModel
from wmtp.weights import model_state, read_spec

SPEC = ModelSpec("hf", 4, 128, 2, 4, 4, 512, 2000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    twin.write_tokenizer(folder, [f"def f{n}(x): return x + {n}" for n in range(200)])
    return folder


@pytest.fixture
def model(tmp_path: Path, tokenizer: Path) -> Path:
    """Two shards and the heads beside them, as `export_hf` and the hub lay them out."""
    torch.manual_seed(1)
    folder = tmp_path / "m"
    state = {k: torch.randn(v.shape) for k, v in MTPModel(SPEC).state_dict().items()}
    export_hf(state, SPEC, folder, tokenizer)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, some in shards.items():
        save_file({k: whole[k] for k in some}, folder / file)
    index = {"weight_map": {k: file for file, some in shards.items() for k in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SHARD = "model-00002-of-00002.safetensors"


def changed(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file)


def truncated(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def renamed(folder: Path) -> None:
    changed(folder, SHARD, lambda s: s.__setitem__("model.layers.0.odd", s.pop(sorted(s)[0])))


def retyped(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    changed(folder, file, lambda s: s.__setitem__(name, s[name].half()))


def whole_numbers(folder: Path) -> None:
    changed(folder, SHARD, lambda s: s.__setitem__(sorted(s)[0], s[sorted(s)[0]].to(torch.int8)))


def enlarged(folder: Path) -> None:
    """A vocabulary with one more, as a padding token brings it, in the weights alone."""

    def more(state: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in state:
                state[name] = torch.cat([state[name], state[name][:1]])

    for file in (SHARD, SHARD.replace("00002-", "00001-")):
        changed(folder, file, more)


def reheaded(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """The same bytes under a header that says something else of them."""

    def spoil(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change({k: v for k, v in header.items() if k != "__metadata__"})
        text = json.dumps(header).encode()
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def overlapping(header: dict) -> None:
    first, second = sorted(header)[:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]


def old_format(folder: Path) -> None:
    state = {k: v for file in folder.glob("model-*.safetensors") for k, v in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(state, folder / "model.bin", _use_new_zipfile_serialization=False)


FAULTS = {
    "overlapping": (reheaded(overlapping), "its shape wants"),
    "other dtype in the header": (
        reheaded(lambda h: h[sorted(h)[0]].__setitem__("dtype", "F16")),
        "its shape wants",
    ),
    "reversed": (reheaded(lambda h: h[sorted(h)[0]]["data_offsets"].reverse()), "its shape wants"),
    "old format": (old_format, "no zip file"),
    "truncated shard": (truncated, "its header says"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}: not there"),
    "renamed tensor": (renamed, "where the index has it"),
    "wrong dtype": (retyped, "float16"),
    "no float": (whole_numbers, "int8"),
    "2001 rows": (enlarged, "misshapen embed_tokens.weight [2001, 128], expected [2000, 128]"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "no weights"),
    "no header": (lambda f: (f / SHARD).write_bytes(b"\0" * 100), "no safetensors header"),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_folder_is_found(model: Path, fault: str) -> None:
    size = sum(p.stat().st_size for p in model.iterdir())
    sound = Folder(model)
    assert "GB of float32; 2 + 4 layers of 128" in next(headers.check(sound, "base"))
    assert sound.bytes_read < size / 50
    spoil, told = FAULTS[fault]
    spoil(model)
    with pytest.raises(ModelError) as found:
        next(headers.check(Folder(model), "base"))
    assert told in str(found.value)
    assert found.value.rule and found.value.next_step


def test_the_headers_say_what_the_weights_are(model: Path) -> None:
    found = headers.tensors(Folder(model))
    whole = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (v.dtype, v.shape) for k, v in whole.items()}
    assert all(piece.device.type == "meta" for v in found.values() for piece in v.pieces)


def meta_model(folder: Path, spec: ModelSpec, vocab_size: int) -> None:
    """Meta's layout: one zip file, a vocabulary that may be -1."""
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "norm": "norm"}
    parts = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {}
    for key, value in MTPModel(spec).state_dict().items():
        kind, *rest = key.removesuffix(".weight").split(".", 2)
        if not rest:
            name = names[kind]
        elif kind == "layers":
            name = f"layers.{rest[0]}.{parts[rest[1]]}"
        else:
            place = f"layers.{spec.trunk_layers}" if rest[0] == "0" else f"extra_heads.{int(rest[0]) - 1}"
            name = f"{place}.{parts[rest[1]]}"
        state[f"{name}.weight"] = value
    folder.mkdir()
    torch.save(state, folder / "consolidated.pth")
    params = {"dim": spec.hidden, "n_layers": spec.trunk_layers + spec.heads, "n_heads": spec.n_heads}
    params |= {"n_future_tokens": spec.heads, "multiple_of": 128, "vocab_size": vocab_size}
    (folder / "params.json").write_text(json.dumps(params))


def test_metas_layout_is_read_by_its_zip_directory(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, layout="meta", intermediate=384)
    meta_model(tmp_path / "m", spec, -1)
    source = Folder(tmp_path / "m")
    assert "2 + 4 layers" in next(headers.check(source, "base"))
    assert source.bytes_read < sum(source.sizes.values()) / 10
    assert headers.spec_of(source).vocab_size == 2000 == read_spec(tmp_path / "m").vocab_size
    file = tmp_path / "m" / "consolidated.pth"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"consolidated\.pth"):
        next(headers.check(Folder(tmp_path / "m"), "base"))


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_another_family_is_read_by_its_headers_and_an_unknown_one_is_named(tmp_path: Path, kind: str) -> None:
    written(kind, tmp_path)
    assert "2 + 1 layers of 32" in next(headers.check(Folder(tmp_path), "base"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    with pytest.raises(
        ModelError, match="model_type gemma3; rule: a model is one of llama, mistral, qwen2, qwen3, gpt2"
    ):
        next(headers.check(Folder(tmp_path), "base"))


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    spec = dataclasses.replace(SPEC, layout="meta", intermediate=384)
    meta_model(tmp_path / "m", spec, 2000)
    torch.save({"a": Evil()}, tmp_path / "m" / "consolidated.pth")
    with pytest.raises(ModelError):
        next(headers.check(Folder(tmp_path / "m"), "base"))
    assert not (tmp_path / "ran").exists()


# ---- in the bucket ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(prefix: str) -> Any:
    return client_of(os.environ["S3_ENDPOINT_URL"], "eu-north-1")


def published(client: Any, folder: Path, name: str, manifest: bool = True) -> None:
    if manifest:
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / MANIFEST).write_text(json.dumps(create(folder, name)))
    for file in folder.iterdir():
        key = f"models/{name}/{file.name}"
        client.put_object(Bucket=os.environ["S3_BUCKET_NAME"], Key=key, Body=file.read_bytes())


def in_bucket(client: Any, name: str, into: Path) -> Bucket:
    return Bucket(client, os.environ["S3_BUCKET_NAME"], name, into / uuid.uuid4().hex)


@pytest.mark.parametrize("again", [True, False], ids=["published so", "spoilt later"])
@pytest.mark.parametrize("fault", ["truncated shard", "missing shard", "renamed tensor", "wrong dtype", "2001 rows"])
def test_a_fault_in_the_bucket_is_found(client: Any, model: Path, tmp_path: Path, fault: str, again: bool) -> None:
    name = f"hdr-{uuid.uuid4().hex}"
    published(client, model, name)
    size = sum(p.stat().st_size for p in model.iterdir())
    sound = in_bucket(client, name, tmp_path)
    assert next(headers.check(sound, "base"))
    assert 0 < sound.bytes_read < size / 20
    before = {p.name for p in model.iterdir()}
    FAULTS[fault][0](model)
    for gone in before - {p.name for p in model.iterdir()}:
        key = f"models/{name}/{gone}"
        client.delete_object(Bucket=os.environ["S3_BUCKET_NAME"], Key=key)
    published(client, model, name, manifest=again)
    with pytest.raises(ModelError) as found:
        next(headers.check(in_bucket(client, name, tmp_path), "base"))
    if again:
        assert FAULTS[fault][1] in str(found.value)
    else:
        told = str(found.value)
        assert "not as published" in told or FAULTS[fault][1] in told


def test_what_is_not_published_or_does_not_answer(client: Any, tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        next(headers.check(in_bucket(client, f"never-{uuid.uuid4().hex}", tmp_path), "base"))
    dead = client_of("http://127.0.0.1:9", "eu-north-1")
    with pytest.raises(BucketError, match="does not answer"):
        in_bucket(dead, "x", tmp_path)
    with pytest.raises(BucketError, match="NoSuchBucket"):
        Bucket(client, "no-such-bucket", "x", tmp_path)


def test_a_swapped_tokenizer_is_not_what_was_published(client: Any, model: Path, tmp_path: Path) -> None:
    name = f"hdr-{uuid.uuid4().hex}"
    published(client, model, name)
    file = model / "tokenizer.model"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    published(client, model, name, manifest=False)
    with pytest.raises(ModelError, match=r"tokenizer\.model: not the content that was published"):
        next(headers.check(in_bucket(client, name, tmp_path), "base"))


def test_no_credentials_is_a_word_not_a_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(BucketError, match="AWS_ACCESS_KEY_ID"):
        client_of(None, "eu-north-1")


def test_the_loader_and_the_headers_ask_the_same(model: Path) -> None:
    """One function maps and compares names and shapes for both."""
    raw = headers.tensors(Folder(model))
    state = model_state(str(model), SPEC, raw)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in MTPModel(SPEC).state_dict().items()}
