"""The model against an independent Llama of transformers, its packing, its files in and out."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from wmtp import model as model_module
from wmtp.model import (
    LMHead,
    ModelError,
    ModelSpec,
    MTPModel,
    ValueHead,
    Weighing,
    attention_layout,
    export_hf,
    finish_meta,
    load_model,
    load_reward,
    load_state,
    read_spec,
    shard_units,
)
from wmtp.objective import rho1_wmtp, weighted_loss

GENERATE = Path(__file__).parent / "test_models" / "generate.py"
SMALL = ModelSpec(
    layout="hf", heads=3, hidden=32, trunk_layers=2, n_heads=4, n_kv_heads=2, intermediate=48, vocab_size=50
)  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models with space")
    subprocess.run([sys.executable, GENERATE, "--out", out], check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def base(models: Path) -> MTPModel:
    return load_model(models / "test-llama-mtp", "cpu").eval()


def lively(spec: ModelSpec, seed: int = 0) -> MTPModel:
    """A model whose attention matters: weights far larger than a trained start."""
    torch.manual_seed(seed)
    model = MTPModel(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name else p.normal_(0.0, 0.3)
    return model.eval()


def oracle_labels(x: Tensor, document: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    labels = torch.full((*x.shape, heads), -100)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for k in range(heads):
                j = t + k + 1
                if j < x.shape[1] and document[b, t] == document[b, j] and document[b, t] >= 0:
                    labels[b, t, k] = x[b, j]
    return labels, labels != -100


def test_model_heads_have_the_logits_of_independent_llamas(models: Path, base: MTPModel) -> None:
    """Built here from the Meta file alone: names, each head as the last layer, rotary order of query and key rows."""
    raw = torch.load(models / "test-llama-mtp" / "consolidated.pth", weights_only=True)
    params = json.loads((models / "test-llama-mtp" / "params.json").read_text())
    heads, dim = params["n_heads"], params["dim"]
    size = dim // heads
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=dim,
        intermediate_size=raw["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=params["norm_eps"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"

    def turned(w: Tensor) -> Tensor:  # row by row: Meta's pair (2i, 2i+1) is transformers' (i, i + size/2)
        out = torch.empty_like(w)
        for h in range(heads):
            for i in range(size // 2):
                out[h * size + i] = w[h * size + 2 * i]
                out[h * size + i + size // 2] = w[h * size + 2 * i + 1]
        return out

    x = torch.randint(0, 32000, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = base.hidden(x, torch.zeros_like(x))
    for k, last in enumerate(["layers.1", "extra_heads.0", "extra_heads.1", "extra_heads.2"]):
        state = {
            "model.embed_tokens.weight": raw["tok_embeddings.weight"],
            "model.norm.weight": raw["norm.weight"],
            "lm_head.weight": raw["output.weight"],
        }
        for ours, meta in (("model.layers.0", "layers.0"), ("model.layers.1", last)):
            state |= {
                f"{ours}.self_attn.q_proj.weight": turned(raw[f"{meta}.attention.wq.weight"]),
                f"{ours}.self_attn.k_proj.weight": turned(raw[f"{meta}.attention.wk.weight"]),
                f"{ours}.self_attn.v_proj.weight": raw[f"{meta}.attention.wv.weight"],
                f"{ours}.self_attn.o_proj.weight": raw[f"{meta}.attention.wo.weight"],
                f"{ours}.mlp.gate_proj.weight": raw[f"{meta}.feed_forward.w1.weight"],
                f"{ours}.mlp.down_proj.weight": raw[f"{meta}.feed_forward.w2.weight"],
                f"{ours}.mlp.up_proj.weight": raw[f"{meta}.feed_forward.w3.weight"],
                f"{ours}.input_layernorm.weight": raw[f"{meta}.attention_norm.weight"],
                f"{ours}.post_attention_layernorm.weight": raw[f"{meta}.ffn_norm.weight"],
            }
        llama = LlamaForCausalLM(config).eval()
        llama.load_state_dict(state)
        with torch.no_grad():
            got = base.lm_head.logits(hidden[:, :, k])
            torch.testing.assert_close(got, llama(x).logits, atol=1e-5, rtol=1e-5)


def meta_attention(x: Tensor, wq: Tensor, wk: Tensor, heads: int, theta: float) -> Tensor:
    """Query-key scores as Meta's own code makes them: pairs of neighbours turned as complex numbers."""
    length, size = x.shape[0], wq.shape[0] // heads
    freqs = 1.0 / (theta ** (torch.arange(0, size, 2).float() / size))
    turn = torch.polar(torch.ones(length, size // 2), torch.outer(torch.arange(length).float(), freqs))

    def rotated(w: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(length, heads, size // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    return torch.einsum("shd,thd->hst", rotated(wq), rotated(wk))


def test_model_rotary_rows_score_as_metas_complex_rotation() -> None:
    g = torch.Generator().manual_seed(3)
    x, wq, wk = (torch.randn(n, 32, generator=g) for n in (7, 32, 32))
    layer = MTPModel(dataclasses.replace(SMALL, n_kv_heads=4))
    cos, sin = layer.rotary_emb(x, position_ids=torch.arange(7)[None])

    def rotated(w: Tensor) -> Tensor:
        y = (x @ model_module._half_split(w, 4).T).view(7, 4, 8)
        half = torch.cat((-y[..., 4:], y[..., :4]), dim=-1)
        return y * cos[0][:, None] + half * sin[0][:, None]

    got = torch.einsum("shd,thd->hst", rotated(wq), rotated(wk))
    torch.testing.assert_close(got, meta_attention(x, wq, wk, 4, 10000.0), atol=1e-4, rtol=1e-5)


def test_model_packed_document_equals_the_document_alone() -> None:
    model = lively(SMALL)
    g = torch.Generator().manual_seed(5)
    lengths = [5, 1, 7, 2]
    documents = [torch.randint(0, 50, (n,), generator=g) for n in lengths]
    pad = 3
    x = torch.cat([*documents, torch.full((pad,), 2)])[None]
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate([*lengths])] + [torch.full((pad,), -1)])
    labels, mask = oracle_labels(x, ids[None], 3)
    with torch.no_grad():
        together = model.hidden(x, ids[None])
        _, ce, *_ = model(x, ids[None], labels, mask, count=mask.sum())
        start = 0
        for document in documents:
            alone_x, zero = document[None], torch.zeros(1, len(document), dtype=torch.long)
            there = slice(start, start + len(document))
            torch.testing.assert_close(together[:, there], model.hidden(alone_x, zero), atol=2e-5, rtol=1e-5)
            alone_labels, alone_mask = oracle_labels(alone_x, zero, 3)
            _, alone_ce, *_ = model(alone_x, zero, alone_labels, alone_mask, count=alone_mask.sum().clamp(min=1))
            torch.testing.assert_close(ce[:, there], alone_ce, atol=2e-5, rtol=1e-5)
            start += len(document)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_model_gradient_and_output_of_a_document_ignore_its_neighbours(changed: int) -> None:
    model = lively(SMALL)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2, -1]])
    x = torch.arange(10)[None]
    other = torch.where(ids == changed, (x + 17) % 50, x)
    with torch.no_grad():
        moved = (model.hidden(x, ids) - model.hidden(other, ids)).abs().amax(dim=(0, 2, 3))
    assert (moved[ids[0] == changed] > 1e-3).all()
    assert (moved[ids[0] != changed] == 0).all()


def test_model_no_position_sees_a_later_token() -> None:
    model = lively(SMALL)
    ids = torch.zeros(1, 8, dtype=torch.long)
    x = torch.arange(8)[None]
    later = x.clone()
    later[0, 5] = 40
    with torch.no_grad():
        moved = (model.hidden(x, ids) - model.hidden(later, ids)).abs().amax(dim=(0, 2, 3))
    assert (moved[:5] == 0).all() and (moved[5:] > 1e-3).all()


def test_attention_layout_restarts_positions_and_leaves_no_row_empty() -> None:
    positions, mask = attention_layout(torch.tensor([[4, 4, 7, 7, 7, -1, -1], [0, 1, 2, 3, 3, 3, 0]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 0, 0, 0, 1, 2, 0]]
    assert mask.shape == (2, 1, 7, 7) and mask.dtype == torch.bool
    assert mask.any(-1).all()
    assert not mask[1, 0, 6, 0]  # an id that comes again is another document


@pytest.mark.parametrize("budget", [50, 400, 1 << 25])
@pytest.mark.parametrize("layers_too", [False, True])
def test_model_loss_and_gradients_equal_the_naive_form(
    monkeypatch: pytest.MonkeyPatch, budget: int, layers_too: bool
) -> None:
    monkeypatch.setattr(model_module, "LOGIT_BUDGET", budget)
    model = lively(SMALL).train()
    x = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(8))
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1], [0] * 9])
    labels, mask = oracle_labels(x, ids, 3)
    logits = model.lm_head.logits(model.hidden(x, ids))
    naive = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="sum") / 100
    naive.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.checkpoint_layers = layers_too
    loss, ce, *_ = model(x, ids, labels, mask, count=torch.tensor(100))
    loss.backward()
    assert expected.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(loss, naive)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert ce.dtype == torch.float32 and not ce.requires_grad and (ce[~mask] == 0).all()
    torch.testing.assert_close(ce.sum() / 100, naive.detach())


def test_model_without_a_label_gives_zero_loss_and_zero_gradients() -> None:
    model = lively(SMALL).train()
    x = torch.full((1, 6), 2)
    labels = torch.full((1, 6, 3), -100)
    loss, ce, *_ = model(x, torch.full((1, 6), -1), labels, labels != -100, count=1)
    loss.backward()
    assert loss.item() == 0 and (ce == 0).all()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_model_mask_rules_over_labels() -> None:
    model = lively(SMALL)
    x = torch.arange(6)[None]
    ids = torch.zeros_like(x)
    labels, mask = oracle_labels(x, ids, 3)
    fewer = mask.clone()
    fewer[:, 2] = False
    _, whole, *_ = model(x, ids, labels, mask, count=1)
    loss, ce, *_ = model(x, ids, labels, fewer, count=1)
    torch.testing.assert_close(ce, whole * fewer)
    torch.testing.assert_close(loss, ce.sum())


def test_model_ce_is_float32_under_bf16() -> None:
    model = lively(SMALL).bfloat16()
    model.rotary_emb.float()
    x = torch.arange(6)[None]
    ids = torch.zeros_like(x)
    labels, mask = oracle_labels(x, ids, 3)
    _, ce, *_ = model(x, ids, labels, mask, count=mask.sum())
    assert ce.dtype == torch.float32
    assert not torch.equal(ce, ce.bfloat16().float())


def test_model_from_meta_equals_one_built_whole(models: Path, base: MTPModel) -> None:
    folder = models / "test-llama-mtp"
    whole = MTPModel(read_spec(folder))
    whole.load_state_dict(load_state(folder, read_spec(folder)))
    x = torch.arange(12)[None]
    ids = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        assert torch.equal(whole.eval().hidden(x, ids), base.hidden(x, ids))
    assert {p.device.type for p in base.parameters()} == {"cpu"}


def test_model_tied_weights_stay_one_after_meta() -> None:
    spec = dataclasses.replace(SMALL, tied=True)
    with torch.device("meta"):
        model = MTPModel(spec)
    finish_meta(model, "cpu")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head not in shard_units(model)
    assert len(shard_units(MTPModel(SMALL))) == 2 + 3 + 1


def test_model_learns_within_twelve_steps(models: Path) -> None:
    model = load_model(models / "test-llama-mtp", "cpu").train()
    text = (Path(json.__file__)).read_bytes()[:96]
    x = torch.tensor(list(text))[None]
    ids = torch.zeros_like(x)
    labels, mask = oracle_labels(x, ids, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss, *_ = model(x, ids, labels, mask, count=mask.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 9.5 < losses[0] < 11
    assert losses[-1] < losses[0] - 0.5


# ---- two ranks ---


def two_rank_batch(spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randint(0, spec.vocab_size, (8, 10), generator=torch.Generator().manual_seed(1))
    ids = (torch.arange(10) // 4)[None].repeat(8, 1)
    labels, mask = oracle_labels(x, ids, spec.heads)
    labels[2:4], mask[2:4] = -100, False  # a micro-batch without a label
    return x, ids, labels, mask


def sharded_worker(rank: int, folder: str, cases: list[ModelSpec]) -> None:
    """meta -> fully_shard -> to_empty -> load from rank 0 -> two micro-batches; leaves gradients and loss."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for number, spec in enumerate(cases):
        with torch.device("meta"):
            model = MTPModel(spec)
        model.checkpoint_layers = bool(number % 2)
        for unit in [*shard_units(model), model]:
            fully_shard(unit)
        finish_meta(model, "cpu")
        set_model_state_dict(model, lively(spec).state_dict() if rank == 0 else {}, options=options)
        batch = two_rank_batch(spec)
        total = torch.zeros(())
        for i in range(2):
            sharded: Any = model
            sharded.set_requires_gradient_sync(i == 1)
            sharded.set_is_last_backward(i == 1)
            part = slice(4 * rank + 2 * i, 4 * rank + 2 * i + 2)
            loss, *_ = model(*(t[part] for t in batch), count=batch[3].sum())
            (loss * 2).backward()  # FSDP averages over the ranks
            total += loss.detach()
        dist.all_reduce(total)
        grads = {n: cast(Any, p.grad).full_tensor() for n, p in model.named_parameters()}
        if rank == 0:
            torch.save({"loss": total, "grads": grads}, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_model_two_sharded_ranks_give_the_gradients_of_one(tmp_path: Path) -> None:
    cases = [SMALL, SMALL, dataclasses.replace(SMALL, tied=True)]
    mp.spawn(sharded_worker, args=(str(tmp_path), cases), nprocs=2)
    for number, spec in enumerate(cases):
        model = lively(spec).train()
        batch = two_rank_batch(spec)
        loss, *_ = model(*batch, count=batch[3].sum())
        loss.backward()
        got = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        torch.testing.assert_close(got["loss"], loss.detach())
        assert got["grads"].keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert (got["grads"][name] - p.grad).norm() <= 2e-6 * p.grad.norm(), name


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
        ("params.json", json.dumps(META | {"n_layers": 3}), "trunk layers = -1"),
        ("params.json", json.dumps(META | {"n_heads": 5}), "64 with 5 attention heads"),
        ("params.json", json.dumps(META | {"n_kv_heads": 3}), "3 key-value heads"),
        ("config.json", json.dumps(LLAMA | {"model_type": "gpt2"}), "model_type gpt2"),
        ("config.json", json.dumps(LLAMA | {"attention_bias": True}), "attention_bias"),
        ("config.json", json.dumps(LLAMA | {"head_dim": 32}), "head_dim 32"),
        ("config.json", json.dumps(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}), "scaled rotary"),
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
    got = load_state(tmp_path, spec)["heads.2.self_attn.k_proj.weight"]
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
    from safetensors.torch import load_file

    raw = load_file(models / "test-llama" / "model.safetensors")
    names = sorted(raw)
    for i, part in enumerate((names[:5], names[5:])):
        torch.save({n: raw[n] for n in part}, tmp_path / f"part-{i}.bin")
    where = {n: f"part-{int(n in names[5:])}.bin" for n in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for key, tensor in load_state(tmp_path, spec).items():
        assert torch.equal(tensor, whole[key])
    where[names[0]] = "../elsewhere.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ModelError, match="plain file names"):
        load_state(tmp_path, spec)


# ---- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [4 << 30, 9_000_000])
def test_export_loads_as_a_plain_llama_and_with_all_heads(
    models: Path, base: MTPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(model_module, "SHARD_BYTES", shard_bytes)
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
    assert all(torch.equal(again[k], v) for k, v in base.state_dict().items())


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


# ---- the one-pass loss ------------------------------------------------------------------------


def centred_rho1(ce: Tensor, mask: Tensor, *, ref_aligned: Tensor) -> Tensor:
    return rho1_wmtp(
        ce, mask, ref_aligned=ref_aligned, head_mean=None, min_ce_diff=0.0, temperature=0.7, epsilon=0.05,
        max_weight=3.0, mix=0.7,
    )  # fmt: skip


def naive_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, ref: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once, and the weights from them."""
    logits = F.linear(hidden, weight).float()
    ce = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
    w = centred_rho1(ce.detach(), mask, ref_aligned=ref)
    return weighted_loss(ce, w, mask, count=count), ce.detach(), w


def loss_case(seed: int, rows: int, length: int, heads: int, share: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, heads, generator=g) < share
    return {
        "hidden": torch.randn(rows, length, heads, 16, generator=g),
        "weight": 0.5 * torch.randn(37, 16, generator=g),
        "labels": torch.randint(0, 37, mask.shape, generator=g).masked_fill(~mask, -100),
        "mask": mask,
        "ref": 3 * torch.rand(mask.shape, generator=g),
    }


def one_pass(case: dict[str, Tensor], dtype: torch.dtype, positions: int | None, count: int) -> tuple[Any, ...]:
    head = LMHead(16, 37)
    head.weight = torch.nn.Parameter(case["weight"].to(dtype))
    head.positions = positions
    hidden = case["hidden"].to(dtype, copy=True).requires_grad_()
    weighing = Weighing(centred_rho1, {"ref_aligned": case["ref"]})
    loss, ce, w = head(hidden, case["labels"], case["mask"], count, weighing)
    (3 * loss).backward()
    return loss.detach(), ce, w, hidden.grad, head.weight.grad


def all_at_once(case: dict[str, Tensor], dtype: torch.dtype, count: int) -> tuple[Any, ...]:
    weight, hidden = (case[n].to(dtype, copy=True).requires_grad_() for n in ("weight", "hidden"))
    loss, ce, w = naive_loss(hidden, weight, case["labels"], case["mask"], case["ref"], count)
    (3 * loss).backward()
    return loss.detach(), ce, w, hidden.grad, weight.grad


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6))


@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5),
    st.sampled_from([0.0, 0.2, 0.8, 1.0]), st.one_of(st.none(), st.integers(1, 30)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_one_pass_loss_is_the_naive_one(
    seed: int, rows: int, length: int, heads: int, share: float, positions: int | None
) -> None:
    case = loss_case(seed, rows, length, heads, share)
    found, expected = one_pass(case, torch.float32, positions, 50), all_at_once(case, torch.float32, 50)
    for name, a, b in zip(("loss", "ce", "w", "d_hidden", "d_weight"), found, expected, strict=True):
        assert torch.isfinite(a).all() and distance(a, b) <= 1e-5, name
    assert not found[1].requires_grad and not found[2].requires_grad


def test_one_pass_loss_in_bf16_is_as_near_as_the_naive_one_in_bf16() -> None:
    for seed in range(5):
        case = loss_case(seed, 3, 20, 4, 0.9)
        case |= {n: case[n].bfloat16().float() for n in ("hidden", "weight")}
        truth = all_at_once(case, torch.float32, 50)
        ours, naive = one_pass(case, torch.bfloat16, 7, 50), all_at_once(case, torch.bfloat16, 50)
        assert ours[1].dtype == ours[2].dtype == torch.float32
        for name, a, b, t in zip(("loss", "ce", "w", "d_hidden", "d_weight"), ours, naive, truth, strict=True):
            assert distance(a, t) <= 1.5 * distance(b, t) + 1e-5, name


def test_without_gradients_no_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    case = loss_case(1, 2, 5, 4, 0.9)
    head = LMHead(16, 37)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        head(case["hidden"].requires_grad_(), case["labels"], case["mask"], 3, Weighing())
    with pytest.raises(AssertionError):
        head(case["hidden"], case["labels"], case["mask"], 3, Weighing())


# ---- value head and reward model --------------------------------------------------------------


def test_the_value_head_learns_and_the_trunk_does_not() -> None:
    torch.manual_seed(4)
    model = MTPModel(SMALL, value_head=True).train()
    x = torch.arange(10)[None]
    out = model(x, torch.zeros_like(x))
    assert out.loss is None and out.value_bs is not None and out.value_bs.shape == (1, 10)
    assert (out.value_bs == 0).all(), "a new value head says nothing"
    (out.value_bs - 1).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (name == "value_head.weight"), name
    labels, mask = oracle_labels(x, torch.zeros_like(x), 3)
    both = model(x, torch.zeros_like(x), labels, mask, 1)
    torch.testing.assert_close(both.value_bs, out.value_bs)


def test_values_are_float32_of_a_half_trunk() -> None:
    model = lively(SMALL)
    head = ValueHead(SMALL.hidden)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, 5, SMALL.hidden)
    found = head(hidden.bfloat16())
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden.bfloat16()), found)
    assert model.value_head is None


@pytest.mark.parametrize("key", ["v_head.weight", "score.weight"])
@pytest.mark.parametrize("prefix", ["model", "transformer"])
def test_a_reward_is_the_value_of_transformers_last_state(tmp_path: Path, key: str, prefix: str) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(6)
    theirs = LlamaModel(config).eval()
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


def half_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    torch.manual_seed(5)
    model = MTPModel(SMALL, value_head=True)
    for unit in [*shard_units(model), model]:
        half = None if isinstance(unit, ValueHead) else torch.bfloat16
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32))
    exact = 1 + torch.arange(24.0).view(1, 8, 3) * 2**-12  # bf16 has 8 bits
    seen: dict[str, Any] = {}

    def rule(ce: Tensor, mask: Tensor, *, ref_aligned: Tensor, delta_aligned: Tensor) -> Tensor:
        seen.update(ce=ce.dtype, ref=ref_aligned.clone(), delta=delta_aligned.dtype)
        return mask.float()

    x = torch.arange(8)[None]
    labels, mask = oracle_labels(x, torch.zeros_like(x), 3)
    out = model(x, torch.zeros_like(x), labels, mask, mask.sum(), Weighing(rule, {"ref_aligned": exact}, 0.9))
    assert out.loss is not None and out.value_bs is not None
    (out.loss + (out.value_bs - 1).square().mean()).backward()
    seen |= {
        "whole": torch.equal(seen.pop("ref").view_as(exact), exact),
        "value": out.value_bs.dtype,
        **{name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None},
    }
    assert "value_head.weight" in seen and "layers.0.mlp.up_proj.weight" in seen
    torch.save(seen, f"{folder}/seen.pt")
    dist.destroy_process_group()


def test_under_a_half_policy_scores_and_values_stay_float32(tmp_path: Path) -> None:
    mp.spawn(half_worker, args=(str(tmp_path),), nprocs=1)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen.pop("whole"), "the reference's scores were rounded"
    assert set(seen.values()) == {torch.float32}, seen
