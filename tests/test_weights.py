"""Models' folders: specs, weights in every layout, what is refused; the generator of the tests' models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_model import SMALL, lively, written
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModel

from wmtp import export as export_module
from wmtp import headers
from wmtp.config import load_recipe
from wmtp.export import export_hf
from wmtp.memory import LiveBytes
from wmtp.model import ModelError, ModelSpec, MTPModel, RewardModel, finish_meta, shard_units
from wmtp.vocab import stated_size
from wmtp.weights import (
    META_NAMES,
    META_ROOT,
    add_heads,
    base_refused,
    heads_refused,
    load_model,
    load_reward,
    load_reward_state,
    load_state,
    read_spec,
    stream,
    value_head_state,
)

ROOT = Path(__file__).parent.parent
GENERATE = ROOT / "tests" / "test_models" / "generate.py"


# ---- specs ------------------------------------------------------------------------------------


def test_read_spec_of_the_three_generated_models(models: Path) -> None:
    spec = read_spec(models / "test-llama-mtp")
    assert spec == ModelSpec("meta", 4, 64, 1, 4, 4, 192, 32000)
    reference = read_spec(models / "test-llama")
    assert (reference.layout, reference.heads, reference.trunk_layers) == ("hf", 1, 1)
    assert read_spec(models / "test-rm-llama").hidden == 64


def test_read_spec_reads_an_unknown_vocabulary_from_the_weights(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models / "test-llama-mtp", folder)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert read_spec(folder).vocab_size == 32000
    torch.save({"norm.weight": torch.ones(64)}, folder / "consolidated.pth")
    for ask in (lambda: read_spec(folder), lambda: headers.spec_of(headers.Folder(folder))):
        with pytest.raises(ModelError, match="vocab_size is -1, and no matrix tok_embeddings"):
            ask()


def test_read_spec_reads_over_what_metas_params_say_of_no_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(META))
    spec = read_spec(tmp_path)
    more = {"use_scaled_rope": False, "max_batch_size": 32, "n_kv_heads": None, "ffn_dim_multiplier": None}
    (tmp_path / "params.json").write_text(json.dumps(META | more | {"rope_theta": 10000}))
    assert read_spec(tmp_path) == spec


def test_of_two_layouts_json_the_weights_say_which_is_read(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(META))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 10}))

    def layouts() -> tuple[str, str, int | None]:
        here, bucket = read_spec(tmp_path), headers.spec_of(headers.Folder(tmp_path))
        return here.layout, bucket.layout, stated_size(tmp_path)

    assert layouts() == ("hf", "hf", 10)  # as weights in safetensors have it, or a folder of shapes alone
    elsewhere = ["params.json", "config.json", "consolidated.pth"]  # only the JSON files were fetched
    assert read_spec(tmp_path, there=elsewhere).layout == "meta"
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").touch()
    assert layouts() == ("hf", "hf", 10)
    (tmp_path / "consolidated.00.pth").touch()
    assert layouts() == ("meta", "meta", 9)
    with pytest.raises(ModelError, match=r"consolidated\.00\.pth"):
        load_state(tmp_path, read_spec(tmp_path))


@pytest.mark.parametrize(
    ("params", "width"),
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    ],
)  # fmt: skip
def test_read_spec_feed_forward_width_is_metas(tmp_path: Path, params: dict, width: int) -> None:
    content = params | {"vocab_size": 32000, "n_future_tokens": 4}
    (tmp_path / "params.json").write_text(json.dumps(content))
    assert read_spec(tmp_path).intermediate == width
    assert read_spec(tmp_path).trunk_layers == 28


META = {"dim": 64, "n_layers": 8, "n_heads": 4, "n_future_tokens": 4, "vocab_size": 9}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 8,
    "vocab_size": 9,
}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("params.json", "{", "params.json"),
        ("params.json", "[]", "not an object"),
        ("params.json", json.dumps({"dim": 64}), "n_layers, n_heads"),
        ("params.json", json.dumps(META | {"use_scaled_rope": True}), "use_scaled_rope true.*Hugging Face's layout"),
        ("params.json", json.dumps(META | {"lora_args": {"rank": 8}}), "lora_args"),
        ("params.json", json.dumps(META | {"n_future_tokens": "4", "norm_eps": "x"}), 'n_future_tokens "4", norm_eps'),
        ("params.json", json.dumps(META | {"n_kv_heads": True, "dim": 64.5}), "dim 64.5, n_kv_heads true"),
        ("params.json", json.dumps(META | {"multiple_of": 0}), "multiple_of 0"),
        ("params.json", json.dumps(META | {"multiple_of": "8"}), 'multiple_of "8"'),
        ("params.json", json.dumps(META | {"n_layers": 3}), "trunk layers = -1"),
        ("params.json", json.dumps(META | {"n_heads": 5}), "64 with 5 attention heads"),
        ("params.json", json.dumps(META | {"n_kv_heads": 3}), "3 key-value heads"),
        (
            "config.json",
            json.dumps(LLAMA | {"model_type": "gemma"}),
            "gemma.*one of llama, mistral, qwen2, qwen3, gpt2",
        ),
        ("config.json", json.dumps({k: v for k, v in LLAMA.items() if k != "model_type"}), "model_type None"),
        ("config.json", json.dumps(LLAMA | {"model_type": "gpt2"}), "n_layer, n_embd, n_head"),
        ("config.json", json.dumps(LLAMA | {"n_future_tokens": "4"}), "no whole number under n_future_tokens"),
        ("config.json", json.dumps(LLAMA | {"head_dim": 3}), "head_dim 3"),
        ("config.json", json.dumps(LLAMA | {"rms_norm_eps": "small"}), "rms_norm_eps"),
        ("config.json", json.dumps(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}}), "rope_type dynamic"),
        ("config.json", json.dumps(LLAMA | {"rope_scaling": {"rope_type": "llama3"}}), "low_freq_factor"),
        ("config.json", json.dumps(LLAMA | {"model_type": "mistral"}), "sliding_window 4096"),
        ("config.json", json.dumps(LLAMA | {"model_type": "qwen3", "use_sliding_window": True}), "sliding_window 4096"),
        (
            "config.json",
            json.dumps(LLAMA | {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}),
            "layer_t",
        ),
        ("other.json", "{}", "neither params.json nor config.json"),
    ],
)
def test_read_spec_says_what_is_wrong(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=words) as caught:
        read_spec(tmp_path)
    assert "rule:" in str(caught.value) and "next:" in str(caught.value)


def test_load_state_turns_grouped_keys_by_their_own_heads(models: Path, tmp_path: Path) -> None:
    raw = torch.load(models / "test-llama-mtp" / "consolidated.pth", weights_only=True)
    for key in raw:
        if key.endswith(("wk.weight", "wv.weight")):
            raw[key] = raw[key][:32].clone()  # two key-value heads of 16 rows
    torch.save(raw, tmp_path / "consolidated.pth")
    spec = dataclasses.replace(read_spec(models / "test-llama-mtp"), n_kv_heads=2)
    got = load_state(tmp_path, spec)["heads.2.self_attn.k_proj.weight"].whole()
    order = [h * 16 + 2 * i + odd for h in range(2) for odd in range(2) for i in range(8)]
    assert torch.equal(got, raw["extra_heads.1.attention.wk.weight"][order])


def test_load_model_takes_weights_stored_in_bf16(models: Path, base: MTPModel, tmp_path: Path) -> None:
    raw = torch.load(models / "test-llama-mtp" / "consolidated.pth", weights_only=True)
    torch.save({k: v.bfloat16() for k, v in raw.items()}, tmp_path / "consolidated.pth")
    shutil.copy(models / "test-llama-mtp" / "params.json", tmp_path)
    model = load_model(tmp_path, "cpu")
    for (name, p), q in zip(model.named_parameters(), base.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.bfloat16().float()), name


# ---- strictness ---------------------------------------------------------------------------------


def test_load_state_lists_every_missing_unexpected_and_misshapen_tensor(models: Path, tmp_path: Path) -> None:
    raw = torch.load(models / "test-llama-mtp" / "consolidated.pth", weights_only=True)
    del raw["extra_heads.2.ffn_norm.weight"], raw["layers.1.attention.wq.weight"]
    raw["norm.weight"] = torch.ones(63)
    raw["layers.0.attention.wk.weight"] = torch.ones(30, 64)
    raw["surprise.weight"] = raw["layers.7.attention_norm.weight"] = torch.ones(64)
    raw["rope.freqs"] = torch.ones(8)  # computed: read over
    torch.save(raw, tmp_path / "consolidated.pth")
    with pytest.raises(ModelError) as caught:
        load_state(tmp_path, read_spec(models / "test-llama-mtp"))
    text = str(caught.value)
    assert "6 tensors don't fit" in text
    for line in (
        "missing heads.3.post_attention_layernorm.weight",
        "missing heads.0.self_attn.q_proj.weight",
        "unexpected surprise.weight",
        "unexpected layers.7.input_layernorm.weight",
        "misshapen norm.weight [63], expected [64]",
        "misshapen layers.0.self_attn.k_proj.weight [30, 64], expected [64, 64]",
    ):
        assert line in text


def test_load_state_refuses_a_reward_models_value_head(models: Path) -> None:
    folder = models / "test-rm-llama"
    with pytest.raises(ModelError, match=r"unexpected v_head\.weight") as caught:
        load_state(folder, read_spec(folder))
    assert "missing lm_head.weight" in str(caught.value)


def test_load_state_refuses_a_pickle_that_runs_code(models: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"norm.weight": Bomb()}, tmp_path / "consolidated.pth")
    with pytest.raises(ModelError, match="tensors only"):
        load_state(tmp_path, read_spec(models / "test-llama-mtp"))
    assert not (tmp_path / "boom").exists()


def test_load_state_refuses_a_torn_file_and_an_empty_folder(models: Path, tmp_path: Path) -> None:
    whole = (models / "test-llama-mtp" / "consolidated.pth").read_bytes()
    (tmp_path / "consolidated.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"consolidated\.pth"):
        load_state(tmp_path, read_spec(models / "test-llama-mtp"))
    with pytest.raises(ModelError, match="no weights"):
        load_state(tmp_path / "none", read_spec(models / "test-llama"))


def test_load_state_reads_shards_by_index_and_torch_files(models: Path, tmp_path: Path) -> None:
    spec = read_spec(models / "test-llama")
    whole = load_state(models / "test-llama", spec)
    raw = load_file(models / "test-llama" / "model.safetensors")
    names = sorted(raw)
    for i, part in enumerate((names[:5], names[5:])):
        torch.save({n: raw[n] for n in part}, tmp_path / f"part-{i}.bin")
    where = {n: f"part-{int(n in names[5:])}.bin" for n in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for key, stored in load_state(tmp_path, spec).items():
        assert torch.equal(stored.whole(), whole[key].whole())
    where[names[0]] = "../elsewhere.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ModelError, match="plain file names"):
        load_state(tmp_path, spec)


# ---- the generator ----------------------------------------------------------------------------------


def test_generator_is_idempotent_and_repeats_bit_for_bit(models: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", GENERATE)
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    weights = models / "test-llama" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    generate.generate(models)
    assert weights.stat().st_mtime_ns == before
    generate.generate(tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) == 9 + 3  # three files a model, three stamps
    for name in files:
        assert (tmp_path / name).read_bytes() == (models / name).read_bytes(), name
    (tmp_path / ".test-llama.stamp").write_text("another script")
    (tmp_path / "test-llama" / "model.safetensors").write_bytes(b"old")
    generate.generate(tmp_path)
    assert (tmp_path / "test-llama" / "model.safetensors").read_bytes() == weights.read_bytes()
    os.truncate(tmp_path / "test-llama" / "model.safetensors", 1000)  # a person tries what happens
    (tmp_path / "test-llama" / "link").symlink_to(tmp_path / "nowhere")
    generate.generate(tmp_path)
    assert not (tmp_path / "test-llama" / "link").is_symlink()
    assert (tmp_path / "test-llama" / "model.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(
    ("family", "key", "prefix"),
    [
        ("llama", "v_head.weight", "model"),
        ("llama", "score.weight", "transformer"),
        ("mistral", "score.weight", "model"),
        ("qwen3", "score.weight", "model"),
    ],
)
def test_a_reward_is_the_value_of_transformers_last_state(tmp_path: Path, family: str, key: str, prefix: str) -> None:
    kind: Any = CONFIG_MAPPING[family]
    config = kind(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(6)
    theirs = AutoModel.from_config(config).eval()
    reward = torch.randn(1, 16)
    state = {f"{prefix}.{name}": p for name, p in theirs.state_dict().items()} | {key: reward}
    torch.save(state | {"lm_head.weight": torch.randn(50, 16)}, tmp_path / "starling.pt")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = load_reward(tmp_path, "cpu")
    x = torch.randint(0, 50, (2, 9))
    document = torch.tensor([[0] * 9, [0] * 6 + [-1] * 3])
    with torch.no_grad():
        found = model(x, document, torch.tensor([8, 5]))
        expected = torch.stack(
            [theirs(x[:1]).last_hidden_state[0, -1] @ reward[0], theirs(x[1:, :6]).last_hidden_state[0, -1] @ reward[0]]
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v_head.weight": None}, "missing v_head.weight"),
        ({"v_head.weight": torch.zeros(2, 64)}, "misshapen v_head.weight"),
        ({"score.weight": torch.zeros(1, 64)}, "unexpected score.weight"),
        ({"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "missing layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_reward_model_that_does_not_fit_is_refused(
    models: Path, tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    state = torch.load(models / "test-rm-llama/model.bin", weights_only=True) | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "model.bin")
    (tmp_path / "config.json").write_text((models / "test-rm-llama/config.json").read_text())
    with pytest.raises(ModelError, match=re.escape(says)):
        load_reward(tmp_path, "cpu")


def test_a_base_is_no_reward_model(models: Path) -> None:
    with pytest.raises(ModelError, match="Hugging Face folder"):
        load_reward(models / "test-llama-mtp", "cpu")


def test_a_gpt2_is_no_reward_model(tmp_path: Path) -> None:
    written("gpt2", tmp_path)
    with pytest.raises(ModelError, match=r"model_type gpt2; rule: .* of llama, mistral, qwen2, qwen3;"):
        load_reward(tmp_path, "cpu")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_old_files_of_gpt2_have_masks_and_no_prefix(tmp_path: Path, prefix: str) -> None:
    theirs = written("gpt2", tmp_path).transformer
    state = {f"{prefix}{name}": p for name, p in theirs.state_dict().items()}
    for layer in range(3):
        state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = load_model(tmp_path, "cpu").state_dict()
    assert torch.equal(found["heads.0.attn.c_attn.bias"], theirs.h[2].attn.c_attn.bias)
    assert torch.equal(found["layers.1.mlp.c_fc.weight"], theirs.h[1].mlp.c_fc.weight)
    assert torch.equal(found["embed_positions.weight"], theirs.wpe.weight)
    torch.save(
        state | {f"{prefix}h.3.ln_1.weight": torch.ones(32), "h.0.extra": torch.ones(1)}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(
        ModelError, match=r"2 tensors don't fit:\n  unexpected layers.0.extra\n  unexpected layers.3.ln_1"
    ):
        load_model(tmp_path, "cpu")


# ---- every rank its part ----------------------------------------------------------------------------


def metas_names(state: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """A state under the names and in the rotary order of Meta's files, row by row."""
    named = {}
    for key, value in state.items():
        for part, n_heads in (("q_proj", spec.n_heads), ("k_proj", spec.n_kv_heads)):
            if part in key:
                size = len(value) // n_heads
                order = [
                    h * size + i + half * size // 2 for h in range(n_heads) for i in range(size // 2) for half in (0, 1)
                ]
                value = value[order]
        kind, *rest = key.split(".", 2)
        place = f"layers.{rest[0]}." if rest and kind == "layers" else ""
        if kind == "heads":
            place = f"layers.{spec.trunk_layers}." if rest[0] == "0" else f"extra_heads.{int(rest[0]) - 1}."
        ours = {**META_NAMES, **META_ROOT}
        named[place + {v: k for k, v in ours.items()}[rest[1] if place else key]] = value.contiguous()
    return named


SMALL_META = {
    "dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "n_future_tokens": 3, "vocab_size": 50, "multiple_of": 8,
}  # fmt: skip


def write_meta(folder: Path, files: int = 1, cut_vocabulary: bool = False) -> MTPModel:
    """A model of Meta's layout, in slices where there are several files; the same model."""
    (folder / "params.json").write_text(json.dumps(SMALL_META))
    spec = read_spec(folder, lambda: 50)
    model = lively(spec)
    whole = metas_names(model.state_dict(), spec)
    for n in range(files):
        part = {}
        for key, value in whole.items():
            dim = int(key.endswith(("wo.weight", "w2.weight")) or (key.startswith("tok") and not cut_vocabulary))
            part[key] = value if value.ndim < 2 else value.chunk(files, dim)[n].clone()
        torch.save(part, folder / ("consolidated.pth" if files == 1 else f"consolidated.{n:02d}.pth"))
    return model


def write_hf(folder: Path, **changes: Any) -> MTPModel:
    model = lively(dataclasses.replace(SMALL, **changes))
    export_hf(model.state_dict(), model.spec, folder, folder)
    return model


def parts_worker(rank: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for shape in ((2,), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for case in cases:
            found = copied_parts(folder / case, mesh, case == "reward")
            if rank == 0:
                torch.save(found, folder / f"{case}-{len(shape)}.pt")
    dist.destroy_process_group()


def copied_parts(folder: Path, mesh: DeviceMesh, reward: bool) -> dict[str, Tensor]:
    """A sharded model, filled from ``folder``; what lives meanwhile is counted."""
    spec = read_spec(folder)
    with torch.device("meta"):
        model = RewardModel(spec) if reward else MTPModel(spec, value_head=True)
    for unit in [*shard_units(model), model]:
        fully_shard(unit, mesh=mesh)
    finish_meta(model, "cpu")
    shards = [cast(DTensor, p).to_local().detach() for p in model.parameters()]
    for shard in shards:
        shard.fill_(float("nan"))
    state = load_reward_state(folder, spec) if reward else load_state(folder, spec) | value_head_state(spec)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    mapped = [[int(address, 16) for address in line.split()[0].split("-")] for line in maps]
    with LiveBytes() as live:
        for shard in shards:
            live._note(shard)
        for name, stored in state.items():
            for piece in stored.pieces:
                live._note(piece)
                inside = any(first <= piece.data_ptr() < last for first, last in mapped)
                assert inside or name == "value_head.weight", f"{name} was read before it was wanted"
        live.begin()
        before = sum(live.now.values())
        stream(model, state)
        grown = sum(live.peak.values()) - before
    most = max(shard.nbytes for shard in shards)
    assert grown <= 2 * most, f"{grown} bytes lived while parts of at most {most} were copied"
    return {n: cast(DTensor, p).full_tensor().detach() for n, p in model.named_parameters()}


def test_two_ranks_copy_their_parts_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    cases = ["meta", "slices", "slices of the vocabulary", "shards", "tied", "reward"]
    for case in cases:
        (tmp_path / case).mkdir()
    reward = RewardModel(dataclasses.replace(SMALL, heads=1, trunk_layers=1))
    torch.nn.init.normal_(reward.v_head.weight)
    made: dict[str, MTPModel | RewardModel] = {
        "meta": write_meta(tmp_path / "meta"),
        "slices": write_meta(tmp_path / "slices", 2),
        "slices of the vocabulary": write_meta(tmp_path / "slices of the vocabulary", 2, cut_vocabulary=True),
        "shards": write_hf(tmp_path / "shards"),
        "tied": write_hf(tmp_path / "tied", tied=True),
        "reward": reward,
    }
    write_hf(tmp_path / "reward", heads=1, trunk_layers=1)
    for file in (tmp_path / "reward").glob("model*"):
        file.unlink()
    named = {k if k.startswith("v_head") else f"model.{k}": v for k, v in reward.state_dict().items()}
    torch.save(named, tmp_path / "reward" / "model.bin")
    assert all(len(list((tmp_path / case).glob("model-*.safetensors"))) > 1 for case in ("shards", "tied"))
    mp.start_processes(parts_worker, args=(tmp_path, cases), nprocs=2, start_method="fork")
    for case in cases:
        for dimensions in (1, 2):
            found = torch.load(tmp_path / f"{case}-{dimensions}.pt", weights_only=True)
            if case != "reward":
                assert not found.pop("value_head.weight").any()
            assert found.keys() == dict(made[case].named_parameters()).keys()
            for name, p in made[case].named_parameters():
                assert torch.equal(found[name], p), f"{case}: {name}"


# ---- new heads --------------------------------------------------------------------------------------


def test_new_heads_are_the_last_layer_once_more_and_those_there_stay(tmp_path: Path) -> None:
    model = write_hf(tmp_path, heads=2)
    state = add_heads(load_state(tmp_path, read_spec(tmp_path)), 4)
    wider = MTPModel(dataclasses.replace(SMALL, heads=4))
    stream(wider, state)
    own, found = model.state_dict(), wider.state_dict()
    assert state.keys() == found.keys()
    for name, value in found.items():
        kind, number, *rest = name.split(".")
        source = f"heads.0.{'.'.join(rest)}" if kind == "heads" and int(number) > 1 else name
        assert torch.equal(value, own[source]), name


@pytest.mark.parametrize(
    ("has", "wanted", "new", "following"),
    [
        (4, 4, False, None),
        (1, 4, True, None),
        (4, 4, True, None),
        (1, 4, False, "--set model.heads=1, or --set model.new_heads=true"),
        (4, 2, True, "--set model.heads=4"),
        (4, 2, False, "--set model.heads=4"),
    ],
)
def test_heads_that_a_checkpoint_lacks_are_made_on_request_only(
    has: int, wanted: int, new: bool, following: str | None
) -> None:
    told = heads_refused("a-base", has, wanted, new)
    assert (told and told[2]) == following
    assert told is None or (f"{wanted}, but a-base has {has}" in told[0] and "model.new_heads" in told[1])


@pytest.mark.parametrize(
    ("change", "pieces", "sets", "told"),
    [
        ({}, 32000, [], None),
        ({"vocab_size": 32064}, 32000, ["model.vocab_size=32064"], None),
        (
            {"vocab_size": 32064},
            32000,
            [],
            "vocab_size 32064, its tokenizer has 32000 pieces, model.vocab_size is 32000",
        ),
        ({}, 32001, [], "vocab_size 32000, its tokenizer has 32001 pieces"),
        ({"heads": 2}, 32000, [], "model.heads: 4, but a-base has 2"),
        ({"max_positions": 127}, 32000, [], "rows of 128, but a-base has 127 positions"),
        ({"max_positions": 127, "layout": "meta"}, 32000, [], None),
        ({"max_positions": 128}, 32000, ["data.eval.max_length=256"], "rows of 256"),
        ({"max_positions": 128}, 32000, ["data.eval.max_length=256", "data.eval.sources=[]"], None),
    ],
)
def test_a_base_that_a_recipe_does_not_fit_is_refused(
    change: dict[str, Any], pieces: int, sets: list[str], told: str | None
) -> None:
    spec = dataclasses.replace(SMALL, heads=4, vocab_size=32000, layout="hf")
    recipe = load_recipe(ROOT / "tests/configs/recipe.baseline_mtp.yaml", sets)
    found = base_refused("a-base", dataclasses.replace(spec, **{"max_positions": 4096} | change), recipe, pieces)
    assert found is None if told is None else found and told in found[0]


# ---- files that contradict each other ---------------------------------------------------------------------


def spoilt_slice(folder: Path, number: int, change: dict[str, Tensor | None]) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(file, weights_only=True) | change
    torch.save({k: v for k, v in state.items() if v is not None}, file)


@pytest.mark.parametrize(
    ("number", "change", "says"),
    [
        (1, {"norm.weight": torch.zeros(32)}, "norm.weight: not the same in every file"),
        (0, {"norm.weight": None}, "norm.weight: not in consolidated.00.pth"),
        (1, {"layers.0.attention.wo.weight": torch.zeros(31, 16)}, "wo.weight: [32, 16] and [31, 16] are not slices"),
        (1, {"layers.0.attention.wq.weight": torch.zeros(16, 32).half()}, "wq.weight: [16, 32] and [16, 32] are not"),
        (
            1,
            {"layers.0.attention.wq.weight": torch.zeros(8, 32)},
            "layers.0.self_attn.q_proj.weight [24, 32], expected",
        ),
        (0, {"odd.weight": torch.zeros(3)}, "odd.weight: not in consolidated.01.pth"),
    ],
)
def test_metas_slices_that_do_not_fit_are_refused_alike_by_loader_and_headers(
    tmp_path: Path, number: int, change: dict[str, Tensor | None], says: str
) -> None:
    write_meta(tmp_path, 2)
    spec = read_spec(tmp_path)
    assert next(headers.check(headers.Folder(tmp_path), "base"))
    spoilt_slice(tmp_path, number, change)
    with pytest.raises(ModelError, match=re.escape(says)):
        load_state(tmp_path, spec)
    if "same in every" not in says:  # which needs the bytes
        with pytest.raises(ModelError, match=re.escape(says)):
            next(headers.check(headers.Folder(tmp_path), "base"))


def test_a_slice_that_is_not_there_or_one_too_many_is_named(tmp_path: Path) -> None:
    write_meta(tmp_path, 4)
    spec = read_spec(tmp_path)
    (tmp_path / "consolidated.02.pth").rename(tmp_path / "away")
    with pytest.raises(ModelError, match=r"consolidated\.02\.pth: not there"):
        load_state(tmp_path, spec)
    (tmp_path / "away").rename(tmp_path / "consolidated.pth")
    with pytest.raises(ModelError, match=r"consolidated\.00\.pth: beside consolidated\.pth"):
        load_state(tmp_path, spec)


def indexed(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def lacking(folder: Path) -> str:
    key, file = next(iter(indexed(folder).items()))
    save_file({k: v for k, v in load_file(folder / file).items() if k != key}, folder / file)
    return f"{key}: not in {file}, where the index has it"


def twice(folder: Path) -> str:
    (key, file), *_ = indexed(folder).items()
    other = max(indexed(folder).values())
    save_file(load_file(folder / other) | {key: load_file(folder / file)[key]}, folder / other)
    return f"{key}: in {file} and in {other}"


def unnamed(folder: Path) -> str:
    save_file({"a": torch.zeros(1)}, folder / "model-00099-of-00099.safetensors")
    return "model-00099-of-00099.safetensors: a shard that model.safetensors.index.json does not name"


def no_floats(folder: Path) -> str:
    key = "model.layers.0.mlp.up_proj.weight"
    file = indexed(folder)[key]
    state = load_file(folder / file)
    save_file(state | {key: state[key].to(torch.float8_e4m3fn)}, folder / file)
    return "float8_e4m3fn layers.0.mlp.up_proj.weight, expected float32, bfloat16 or float16"


@pytest.mark.parametrize("spoil", [lacking, twice, unnamed, no_floats])
def test_shards_that_contradict_are_refused_alike_by_loader_and_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], str]
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    write_hf(tmp_path)
    assert next(headers.check(headers.Folder(tmp_path), "base"))
    says = spoil(tmp_path)
    for look in (
        lambda: load_state(tmp_path, read_spec(tmp_path)),
        lambda: next(headers.check(headers.Folder(tmp_path), "base")),
    ):
        with pytest.raises(ModelError, match=re.escape(says)):
            look()
