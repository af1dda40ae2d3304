"""The model against an independent Llama of transformers, its packing, its files in and out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import spread
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wmtp import model as model_module
from wmtp.model import (
    FAMILIES,
    LMHead,
    ModelError,
    ModelSpec,
    MTPModel,
    ValueHead,
    Weighing,
    attention_layout,
    finish_meta,
    shard_units,
)
from wmtp.objective import rho1_wmtp, weighted_loss
from wmtp.weights import half_split_rows, load_model, load_state, read_spec

SMALL = ModelSpec(
    layout="hf", heads=3, hidden=32, trunk_layers=2, n_heads=4, n_kv_heads=2, intermediate=48, vocab_size=50
)  # fmt: skip


def lively(spec: ModelSpec, seed: int = 0) -> MTPModel:
    """A model whose attention matters: weights far larger than a trained start."""
    torch.manual_seed(seed)
    model = MTPModel(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name or ".ln_" in name else p.normal_(0.0, 0.3)
    return model.eval()


# ---- families: tiny models that transformers made, and saved ------------------------------------------------------

ROPE = {"rope_theta": 5e4}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama3": {"head_dim": 16, "rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 16}},
    "linear": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}, "tie_word_embeddings": True},
    "yarn": {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": None, "rope_parameters": ROPE | {"rope_type": "default"}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 10, "tie_word_embeddings": False},
    "gpt2": {"n_inner": 40, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt2-scaled": {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
}


def family_of(kind: str) -> str:
    return kind.partition("-")[0] if kind.partition("-")[0] in FAMILIES else "llama"


def written(kind: str, folder: Path) -> Any:
    """A model of one of ``KINDS`` with lively weights, saved in ``folder`` by transformers itself."""
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 64}
    if family_of(kind) != "gpt2":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48}
    config = CONFIG_MAPPING[family_of(kind)](**sizes, **KINDS[kind])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name or "ln_" in name else p.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_head_0_of_each_family_has_the_logits_of_transformers_and_documents_do_not_meet(
    kind: str, tmp_path: Path
) -> None:
    theirs = written(kind, tmp_path)
    ours = load_model(tmp_path, "cpu").train()  # in training: dropout would show
    assert (ours.spec.family, ours.spec.tied) == (family_of(kind), theirs.config.tie_word_embeddings)
    x = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(1))
    ids = (torch.arange(40) // 15)[None]
    with torch.no_grad():
        alone = ours.lm_head.logits(ours.hidden(x, torch.zeros_like(x))[:, :, 0])
        torch.testing.assert_close(alone, theirs(x).logits, atol=2e-5, rtol=1e-5)
        packed = ours.lm_head.logits(ours.hidden(x, ids)[:, :, 0])
        for document in range(3):
            there = ids[0] == document
            torch.testing.assert_close(packed[:, there], theirs(x[:, there]).logits, atol=2e-5, rtol=1e-5)


def test_rows_longer_than_learned_positions_are_refused() -> None:
    gpt2 = dataclasses.replace(SMALL, family="gpt2", n_kv_heads=4, max_positions=16)
    MTPModel(gpt2).hidden(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16))
    with pytest.raises(
        ModelError, match=r"rows of 17, but the model has 16 positions; rule: .*; next: data.train.max_"
    ):
        MTPModel(gpt2).hidden(torch.zeros(1, 17, dtype=torch.long), torch.zeros(1, 17))


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


def meta_forward(raw: dict[str, Tensor], params: dict[str, Any], x: list[int]) -> list[Tensor]:
    """Logits `[S, V]` of each head by Meta's own layout, position by position: no mask, no batch, no permuted rows."""
    heads, dim, eps = params["n_heads"], params["dim"], params["norm_eps"]
    size = dim // heads
    turns = params["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)

    def norm(v: Tensor, weight: Tensor) -> Tensor:
        return v * torch.rsqrt(v.square().mean() + eps) * weight

    def rotated(v: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(v.double().reshape(heads, -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(size // 2).double(), position * turns)).flatten(1)

    def layer(name: str, hidden: list[Tensor]) -> list[Tensor]:
        def w(part: str) -> Tensor:
            return raw[f"{name}.{part}.weight"].double()

        keys, values, out = [], [], []
        for t, h in enumerate(hidden):
            n = norm(h, w("attention_norm"))
            q = rotated(w("attention.wq") @ n, t)
            keys.append(rotated(w("attention.wk") @ n, t))
            values.append((w("attention.wv") @ n).view(heads, size))
            mixed = []
            for head in range(heads):
                scores = torch.stack([q[head] @ key[head] for key in keys]) / size**0.5
                mixed.append(sum(p * v[head] for p, v in zip(scores.softmax(0), values, strict=True)))
            h = h + w("attention.wo") @ torch.cat(mixed)
            n = norm(h, w("ffn_norm"))
            gate = w("feed_forward.w1") @ n
            out.append(h + w("feed_forward.w2") @ (gate * gate.sigmoid() * (w("feed_forward.w3") @ n)))
        return out

    trunk = [raw["tok_embeddings.weight"][token].double() for token in x]
    for number in range(params["n_layers"] - params["n_future_tokens"]):
        trunk = layer(f"layers.{number}", trunk)
    last = [f"layers.{params['n_layers'] - params['n_future_tokens']}"]
    last += [f"extra_heads.{number}" for number in range(params["n_future_tokens"] - 1)]
    output, weight = raw["output.weight"].double(), raw["norm.weight"].double()
    return [torch.stack([output @ norm(h, weight) for h in layer(name, trunk)]) for name in last]


def test_all_heads_have_the_logits_of_a_plain_loop_over_metas_layout(models: Path, tmp_path: Path) -> None:
    source = models / "test-llama-mtp"
    params = json.loads((source / "params.json").read_text())
    generator = torch.Generator().manual_seed(5)
    raw = {  # livelier than a new model's: every part must matter
        name: 1 + 0.2 * torch.randn(t.shape, generator=generator) if t.dim() == 1 else 8 * t
        for name, t in torch.load(source / "consolidated.pth", weights_only=True).items()
    }
    torch.save(raw, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    model = load_model(tmp_path, "cpu").eval()
    x = torch.randint(0, 32000, (1, 9), generator=generator)
    with torch.no_grad():
        ours = model.lm_head.logits(model.hidden(x, torch.zeros_like(x)))[0]
    for head, theirs in enumerate(meta_forward(raw, params, x[0].tolist())):
        assert theirs.std() > 0.5
        torch.testing.assert_close(ours[:, head], theirs.float(), atol=2e-4, rtol=1e-4)


def test_model_rotary_rows_score_as_metas_complex_rotation() -> None:
    g = torch.Generator().manual_seed(3)
    x, wq, wk = (torch.randn(n, 32, generator=g) for n in (7, 32, 32))
    layer = MTPModel(dataclasses.replace(SMALL, n_kv_heads=4))
    assert layer.rotary_emb is not None
    cos, sin = layer.rotary_emb(x, position_ids=torch.arange(7)[None])

    def rotated(w: Tensor) -> Tensor:
        y = (x @ w[half_split_rows(len(w), 4)].T).view(7, 4, 8)
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
    model.ready_layers(layers_too)
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
    assert model.rotary_emb is not None
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
    whole.load_state_dict({name: stored.whole() for name, stored in load_state(folder, whole.spec).items()})
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
        model.ready_layers((False, True, "selective")[number % 3])
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
    gpt2 = dataclasses.replace(SMALL, family="gpt2", n_kv_heads=4, max_positions=16, tied=True)
    qwen3 = dataclasses.replace(SMALL, family="qwen3", head_dim=10)
    cases = [SMALL, SMALL, dataclasses.replace(SMALL, tied=True), gpt2, qwen3]
    spread(sharded_worker, str(tmp_path), cases)
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


def one_pass(
    case: dict[str, Tensor], dtype: torch.dtype, positions: int | None, count: int, fused: bool = False
) -> tuple[Any, ...]:
    """``fused``: with what torch.compile is given, as it stands."""
    head = LMHead(16, 37)
    head.fused = model_module._Compiled if fused else None
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
    st.sampled_from([0.0, 0.2, 0.8, 1.0]), st.one_of(st.none(), st.integers(1, 30)), st.booleans(),
    st.sampled_from([1, 1, 1, 100]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_one_pass_loss_is_the_naive_one(
    seed: int, rows: int, length: int, heads: int, share: float, positions: int | None, fused: bool, steep: int
) -> None:
    """``steep``: targets so unlikely that their probability is no float32."""
    case = loss_case(seed, rows, length, heads, share)
    case["hidden"] *= steep
    found, expected = one_pass(case, torch.float32, positions, 50, fused), all_at_once(case, torch.float32, 50)
    for name, a, b in zip(("loss", "ce", "w", "d_hidden", "d_weight"), found, expected, strict=True):
        assert torch.isfinite(a).all() and distance(a, b) <= 1e-5, name
    assert not found[1].requires_grad and not found[2].requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_one_pass_loss_in_bf16_is_as_near_as_the_naive_one_in_bf16(fused: bool) -> None:
    for seed in range(5):
        case = loss_case(seed, 3, 20, 4, 0.9)
        case |= {n: case[n].bfloat16().float() for n in ("hidden", "weight")}
        truth = all_at_once(case, torch.float32, 50)
        ours, naive = one_pass(case, torch.bfloat16, 7, 50, fused), all_at_once(case, torch.bfloat16, 50)
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
    spread(half_worker, str(tmp_path), ranks=1)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen.pop("whole"), "the reference's scores were rounded"
    assert set(seen.values()) == {torch.float32}, seen
