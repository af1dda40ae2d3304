"""The multi-token-prediction model: a Llama trunk of transformers with heads beside it.

Head ``k`` is one decoder layer on the trunk's output, head 0 being the last layer of the plain model; final norm and
unembedding are shared (Gloeckle et al. 2024). Everything that depends on transformers' signatures is in the
section "adapters". Symbols and shapes: ``B`` rows, ``S`` positions, ``H`` heads, ``V`` vocabulary, ``D`` hidden size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from wmtp.objective import IGNORED, align_next, baseline_mtp, value_gain, weighted_loss

LOGIT_BUDGET = 1 << 25  # elements of logits alive at once: 128 MiB in float32
SHARD_BYTES = 4 << 30
META_WEIGHTS = "consolidated.pth"
EXTRA_HEADS = "mtp_heads.safetensors"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


class ModelError(ValueError):
    """A model folder that can't be used: what is wrong, the rule, the next step."""

    def __init__(self, what: str, rule: str, next_step: str) -> None:
        super().__init__(f"{what}; rule: {rule}; next: {next_step}")
        self.what, self.rule, self.next_step = what, rule, next_step


# ---- what a folder holds ----------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the shapes. ``trunk_layers`` counts the layers before head 0."""

    layout: str  # "meta" (params.json) or "hf" (config.json)
    heads: int
    hidden: int
    trunk_layers: int
    n_heads: int
    n_kv_heads: int
    intermediate: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096
    tied: bool = False


def read_spec(folder: Path, embedding_rows: Callable[[], int] | None = None) -> ModelSpec:
    """The spec of a model folder, from its JSON alone.

    A Meta ``vocab_size`` of -1 is read from the weights, or asked of ``embedding_rows`` where these are elsewhere.
    """
    folder = Path(folder)
    if (folder / "params.json").is_file():
        spec = _meta_spec(folder, embedding_rows)
    elif (folder / "config.json").is_file():
        spec = _hf_spec(folder)
    else:
        raise ModelError(
            f"{folder}: neither params.json nor config.json",
            "a model is a folder in Meta's layout or in Hugging Face's",
            "look at the folder, or at the path in paths.models",
        )
    _check_spec(folder, spec)
    return spec


def _check_spec(folder: Path, spec: ModelSpec) -> None:
    findings = [
        f"{name} = {value}"
        for name, value, least in (
            ("heads", spec.heads, 1),
            ("hidden", spec.hidden, 1),
            ("trunk layers", spec.trunk_layers, 0),
            ("attention heads", spec.n_heads, 1),
            ("key-value heads", spec.n_kv_heads, 1),
            ("intermediate", spec.intermediate, 1),
            ("vocab_size", spec.vocab_size, 1),
        )
        if value < least
    ]
    if not findings and spec.hidden % (2 * spec.n_heads):
        findings.append(f"hidden {spec.hidden} with {spec.n_heads} attention heads")
    if not findings and spec.n_heads % spec.n_kv_heads:
        findings.append(f"{spec.n_heads} attention heads with {spec.n_kv_heads} key-value heads")
    if findings:
        raise ModelError(
            f"{folder}: {', '.join(findings)}",
            "sizes are positive and divide each other; n_layers counts trunk and heads",
            "compare the folder's JSON with the model's source",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}", "it is one JSON object", "fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not an object", "it is one JSON object", "fetch the model again")
    return content


def _need(content: Mapping[str, Any], path: Path, *names: str) -> list[int]:
    missing = [n for n in names if not isinstance(content.get(n), int)]
    if missing:
        raise ModelError(
            f"{path}: no whole number under {', '.join(missing)}",
            "these fix the model's shapes",
            "fetch the model again",
        )
    return [content[n] for n in names]


def _meta_spec(folder: Path, embedding_rows: Callable[[], int] | None) -> ModelSpec:
    path = folder / "params.json"
    params = _read_json(path)
    dim, n_layers, n_heads = _need(params, path, "dim", "n_layers", "n_heads")
    heads = int(params.get("n_future_tokens", 1))
    vocab = int(params.get("vocab_size", -1))
    if vocab < 0:
        if embedding_rows is None:
            vocab = int(_torch_load(folder / META_WEIGHTS)["tok_embeddings.weight"].shape[0])
        else:
            vocab = embedding_rows()
    # Meta's rule for the feed-forward width, which their files leave implicit.
    width = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = int(params.get("multiple_of", 256))
    return ModelSpec(
        layout="meta",
        heads=heads,
        hidden=dim,
        trunk_layers=n_layers - heads,
        n_heads=n_heads,
        n_kv_heads=int(params.get("n_kv_heads") or n_heads),
        intermediate=multiple * -(-width // multiple),
        vocab_size=vocab,
        norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_theta=float(params.get("rope_theta", 10000.0)),
        max_positions=int(params.get("max_seq_len", 4096)),
    )


def _hf_spec(folder: Path) -> ModelSpec:
    path = folder / "config.json"
    config = _read_json(path)
    hidden, layers, n_heads, width, vocab = _need(
        config,
        path,
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head_dim = config.get("head_dim")
    refused = [
        name
        for name, bad in (
            (f"model_type {config.get('model_type')}", config.get("model_type") != "llama"),
            ("attention_bias", bool(config.get("attention_bias"))),
            ("mlp_bias", bool(config.get("mlp_bias"))),
            (f"hidden_act {config.get('hidden_act')}", config.get("hidden_act", "silu") != "silu"),
            (
                "scaled rotary positions",
                rope.get("rope_type", rope.get("type", "default")) != "default",
            ),
            (f"head_dim {head_dim}", head_dim is not None and head_dim * n_heads != hidden),
        )
        if bad
    ]
    if refused:
        raise ModelError(
            f"{path}: {', '.join(refused)}",
            "a Llama without biases and with plain rotary positions",
            "choose another base model",
        )
    return ModelSpec(
        layout="hf",
        heads=int(config.get("n_future_tokens", 1)),
        hidden=hidden,
        trunk_layers=layers - 1,
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        intermediate=width,
        vocab_size=vocab,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


# ---- adapters: the only lines that know transformers' signatures ---------------------------------


def _llama_config(spec: ModelSpec) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.trunk_layers + 1,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tied,
    )
    config._attn_implementation = "sdpa"
    return config


def _apply_layer(layer: nn.Module, hidden_bsd: Tensor, mask_b1ss: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    return layer(hidden_bsd, attention_mask=mask_b1ss, position_embeddings=rotary)


# ---- the model -------------------------------------------------------------------------------


def attention_layout(document_bs: Tensor) -> tuple[Tensor, Tensor]:
    """Position ids ``[B, S]`` that restart with each document, and the mask ``[B, 1, S, S]`` (True: may look).

    A document is a run of equal ids, so a position always sees itself: padding gives no empty softmax.
    """
    rows, length = document_bs.shape
    index = torch.arange(length, device=document_bs.device)
    starts = torch.ones(rows, length, dtype=torch.bool, device=document_bs.device)
    starts[:, 1:] = document_bs[:, 1:] != document_bs[:, :-1]
    segment = starts.cumsum(1)
    first = torch.where(starts, index, torch.zeros_like(index)).cummax(1).values
    same = segment[:, :, None] == segment[:, None, :]
    return index - first, (same & (index[:, None] >= index[None, :]))[:, None]


Rule = Callable[..., Tensor]
"""An algorithm of `wmtp.objective`: `rule(ce, mask, **aligned) -> w`, any leading dimensions."""


class Weighing:
    """How the loss of a forward is weighed.

    A plain class on purpose: FSDP's mixed precision looks in pytrees, dictionaries and dataclasses, and would round
    these tensors to bf16.
    """

    def __init__(
        self,
        rule: Rule = baseline_mtp,
        aligned: Mapping[str, Tensor] | None = None,
        discount_lambda: float | None = None,
    ) -> None:
        self.rule = rule
        self.aligned = dict(aligned or {})
        """Name to `[B, S, H]`; handed to the rule by name, chunk by chunk."""
        self.discount_lambda = discount_lambda
        """Set: the model adds `delta_aligned`, the value that each predicted token adds."""


class Output(NamedTuple):
    """What a forward gives; None where it was not asked for."""

    loss: Tensor | None
    """Scalar: `sum(w * ce over mask) / count`."""
    ce_bsh: Tensor | None
    """`[B, S, H]` float32 nats, detached, 0 outside the mask; so is `w_bsh`."""
    w_bsh: Tensor | None
    value_bs: Tensor | None
    """`[B, S]` float32, differentiable to the value head only."""


class _OnePassLoss(torch.autograd.Function):
    """Loss, weights and gradients of all heads, a chunk of positions at a time: no logits outlive their chunk.

    Exact because the weights of a position depend on that position alone and the count is known before. The gradients
    are made in forward and multiplied by the incoming scalar in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nhd: Tensor,
        weight_vd: Tensor,
        labels_nh: Tensor,
        count: Tensor | int,
        weighing: Weighing,
        size: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, dim = hidden_nhd.shape[1:]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_nhd.device)
        ce_nh = torch.zeros(labels_nh.shape, dtype=torch.float32, device=hidden_nhd.device)
        w_nh = torch.zeros_like(ce_nh)
        d_hidden = torch.empty_like(hidden_nhd) if learns else None
        d_weight = torch.zeros(weight_vd.shape, dtype=torch.float32, device=weight_vd.device) if learns else None
        aligned = {name: value.reshape(-1, heads) for name, value in weighing.aligned.items()}
        for at in range(0, len(labels_nh), size):
            part = slice(at, at + size)
            y_nh = labels_nh[part]
            mask_nh = y_nh != IGNORED
            h_md = hidden_nhd[part].reshape(-1, dim)
            logits_mv = F.linear(h_md, weight_vd).float()
            target_m1 = y_nh.reshape(-1, 1).clamp(min=0)
            top_m1 = logits_mv.amax(-1, keepdim=True)
            of_target_m1 = logits_mv.gather(1, target_m1) - top_m1
            powers_mv = logits_mv.sub_(top_m1).exp_()
            total_m1 = powers_mv.sum(-1, keepdim=True)
            ce = (total_m1.log() - of_target_m1).view(y_nh.shape).masked_fill(~mask_nh, 0)
            w = weighing.rule(ce, mask_nh, **{name: value[part] for name, value in aligned.items()})
            with torch.enable_grad():
                leaf = ce.requires_grad_(learns)
                part_loss = weighted_loss(leaf, w, mask_nh, count=count)
            loss += part_loss.detach()
            ce_nh[part], w_nh[part] = ce.detach(), w
            if d_hidden is None or d_weight is None:
                continue
            (d_ce,) = torch.autograd.grad(part_loss, leaf)
            # d ce / d logits = softmax - one-hot, in place of the logits.
            d_ce_m1 = d_ce.reshape(-1, 1)
            d_logits = powers_mv.mul_(d_ce_m1 / total_m1).scatter_add_(1, target_m1, -d_ce_m1).to(hidden_nhd.dtype)
            d_hidden[part] = (d_logits @ weight_vd.to(d_logits.dtype)).view(-1, heads, dim)
            if h_md.dtype == torch.float32:
                d_weight.addmm_(d_logits.t(), h_md)
            else:
                d_weight += d_logits.t() @ h_md
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight_vd.dtype))
        ctx.mark_non_differentiable(ce_nh, w_nh)
        return loss, ce_nh, w_nh

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        return (d_hidden * scale).to(d_hidden.dtype), (d_weight * scale).to(d_weight.dtype), *[None] * 5


class LMHead(nn.Module):
    """Unembedding and loss in one module, so that FSDP gathers the weight around both."""

    def __init__(self, hidden: int, vocab_size: int) -> None:
        super().__init__()
        self.positions: int | None = None
        """Positions of a chunk; None: as many as keep a chunk's logits within `LOGIT_BUDGET`."""
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, hidden_bshd: Tensor, labels_bsh: Tensor, mask_bsh: Tensor, count: Tensor | int, weighing: Weighing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(sum of w * ce over mask / count, ce, w)`, the last two `[B, S, H]` float32, detached, 0 outside mask."""
        heads, dim = hidden_bshd.shape[-2:]
        size = self.positions or max(1, LOGIT_BUDGET // (self.weight.shape[0] * heads))
        loss, ce, w = _OnePassLoss.apply(
            hidden_bshd.reshape(-1, heads, dim),
            self.weight,
            labels_bsh.masked_fill(~mask_bsh, IGNORED).reshape(-1, heads),
            count,
            weighing,
            size,
            torch.is_grad_enabled() and (hidden_bshd.requires_grad or self.weight.requires_grad),
        )
        return loss, ce.view(labels_bsh.shape), w.view(labels_bsh.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[…, D] -> […, V]``, for small inputs and unsharded models."""
        return F.linear(hidden, self.weight)


class ValueHead(nn.Module):
    """`V[j]`: one linear value per token, in float32 whatever comes in."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden, dtype=torch.float32))

    def forward(self, hidden_bsd: Tensor) -> Tensor:
        """`[B, S, D] -> [B, S]` float32."""
        with torch.autocast(hidden_bsd.device.type, enabled=False):
            return F.linear(hidden_bsd.float(), self.weight.float()).squeeze(-1).clone()  # FSDP warns of views


class MTPModel(nn.Module):
    """Trunk, ``H`` heads, shared norm and unembedding; a value head where asked. May be built on ``meta``."""

    def __init__(self, spec: ModelSpec, value_head: bool = False) -> None:
        super().__init__()
        config = _llama_config(spec)
        self.spec = spec
        self.checkpoint_layers = False
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(spec.trunk_layers))
        self.heads = nn.ModuleList(LlamaDecoderLayer(config, spec.trunk_layers + k) for k in range(spec.heads))
        self.norm = LlamaRMSNorm(spec.hidden, eps=spec.norm_eps)
        self.lm_head = LMHead(spec.hidden, spec.vocab_size)
        self.value_head = ValueHead(spec.hidden) if value_head else None
        self.rotary_emb = LlamaRotaryEmbedding(config)
        if spec.tied:
            _tie(self)

    def trunk(self, x_bs: Tensor, document_bs: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """`[B, S, D]` before the heads, with the attention mask and rotary tables that the heads use too."""
        positions, mask = attention_layout(document_bs)
        h = self.embed_tokens(x_bs)
        rotary = self.rotary_emb(h, position_ids=positions)
        for layer in self.layers:
            h = self._layer(layer, h, mask, rotary)
        return h, mask, rotary

    def hidden(self, x_bs: Tensor, document_bs: Tensor) -> Tensor:
        """The heads' outputs after the final norm, ``[B, S, H, D]``."""
        return self._heads(*self.trunk(x_bs, document_bs))

    def forward(
        self,
        x_bs: Tensor,
        document_bs: Tensor,
        labels_bsh: Tensor | None = None,
        mask_bsh: Tensor | None = None,
        count: Tensor | int | None = None,
        weighing: Weighing | None = None,
    ) -> Output:
        """Loss, cross-entropies, weights and values; without labels the values alone, and no gradient to the trunk.

        ``count`` is a whole number (int64 where it is a tensor): FSDP would round a float to its half type.
        """
        if labels_bsh is None or mask_bsh is None or count is None:
            with torch.no_grad():
                h, _, _ = self.trunk(x_bs, document_bs)
            return Output(None, None, None, self._value(h))
        h, mask, rotary = self.trunk(x_bs, document_bs)
        value_bs = self._value(h)
        weighing = weighing or Weighing()
        if weighing.discount_lambda is not None:
            assert value_bs is not None
            delta_bs = value_gain(value_bs.detach(), weighing.discount_lambda)
            aligned = {**weighing.aligned, "delta_aligned": align_next(delta_bs, self.spec.heads)}
            weighing = Weighing(weighing.rule, aligned)
        loss, ce, w = self.lm_head(self._heads(h, mask, rotary), labels_bsh, mask_bsh, count, weighing)
        return Output(loss, ce, w, value_bs)

    def _heads(self, h: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return self.norm(torch.stack([self._layer(head, h, mask, rotary) for head in self.heads], dim=2))

    def _value(self, h: Tensor) -> Tensor | None:
        if self.value_head is None:
            return None
        with torch.no_grad():
            normed = self.norm(h)
        return self.value_head(normed)

    def _layer(self, layer: nn.Module, h: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.checkpoint_layers and torch.is_grad_enabled():
            return checkpoint(_apply_layer, layer, h, mask, rotary, use_reentrant=False)
        return _apply_layer(layer, h, mask, rotary)


def _tie(model: MTPModel) -> None:
    weight = model.embed_tokens.weight
    assert isinstance(weight, nn.Parameter)
    model.lm_head.weight = weight


class RewardModel(nn.Module):
    """A Llama trunk with all layers of its folder, and a linear reward on the last token's state (as Starling's)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        config = _llama_config(spec)
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(spec.trunk_layers + spec.heads))
        self.norm = LlamaRMSNorm(spec.hidden, eps=spec.norm_eps)
        self.v_head = ValueHead(spec.hidden)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, x_bs: Tensor, document_bs: Tensor, last_b: Tensor) -> Tensor:
        """Reward `[B]` float32: the value at position ``last_b[b]`` of each row."""
        positions, mask = attention_layout(document_bs)
        h = self.embed_tokens(x_bs)
        rotary = self.rotary_emb(h, position_ids=positions)
        for layer in self.layers:
            h = _apply_layer(layer, h, mask, rotary)
        ends_bd = h[torch.arange(len(h), device=h.device), last_b]
        return self.v_head(self.norm(ends_bd))


def shard_units(model: nn.Module) -> list[nn.Module]:
    """What ``fully_shard`` wraps before the root. A tied unembedding stays with the root, which owns the embedding."""
    if isinstance(model, RewardModel):
        return [*model.layers, model.v_head]
    assert isinstance(model, MTPModel)
    value = [] if model.value_head is None else [model.value_head]
    return [*model.layers, *model.heads, *([] if model.spec.tied else [model.lm_head]), *value]


def value_head_state(spec: ModelSpec) -> dict[str, Tensor]:
    """A new value head: zeros, so that it adds no weight before it has learned anything, and draws from no stream."""
    return {"value_head.weight": torch.zeros(1, spec.hidden)}


def finish_meta(model: MTPModel | RewardModel, device: torch.device | str) -> None:
    """Give a model built on ``meta`` memory on ``device``; its weights are then undefined, its rotary buffers not."""
    model.to_empty(device=torch.device(device))
    if isinstance(model, MTPModel) and model.spec.tied and not hasattr(model, "unshard"):
        _tie(model)  # to_empty makes one each; FSDP keeps them one itself
    with torch.device(device):
        model.rotary_emb = LlamaRotaryEmbedding(_llama_config(model.spec))


# ---- weights in ------------------------------------------------------------------------------

_META_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_META_ROOT = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_HF_ROOT = {"lm_head.weight": "lm_head.weight"}


def load_state(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The whole state under ``MTPModel``'s names, mapped from the file where it can be, in the stored dtype.

    Raises ``ModelError`` with every missing, unexpected and misshapen tensor: nothing is made up.
    """
    folder = Path(folder)
    return model_state(
        folder, spec, _torch_load(folder / META_WEIGHTS) if spec.layout == "meta" else _read_weights(folder)
    )


def model_state(folder: Path | str, spec: ModelSpec, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`load_state` of tensors that were read; they may be without data. ``folder`` is for the messages."""
    if spec.layout == "meta":
        state, unexpected = _rename(raw, lambda key: _meta_name(key, spec))
        for key in state:
            if key.endswith("q_proj.weight") and state[key].dim() == 2:
                state[key] = _half_split(state[key], spec.n_heads)
            elif key.endswith("k_proj.weight") and state[key].dim() == 2:
                state[key] = _half_split(state[key], spec.n_kv_heads)
    else:
        state, unexpected = _rename(raw, lambda key: _hf_name(key, spec))
        if spec.tied and "embed_tokens.weight" in state:
            state.setdefault("lm_head.weight", state["embed_tokens.weight"])
    _check_state(folder, spec, state, unexpected)
    return state


def load_reward_state(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The whole state under ``RewardModel``'s names, from a Hugging Face folder.

    The reward is `v_head.weight` `[1, D]` (Starling) or `score.weight` `[1, D]` (sequence classification); an
    unembedding that came along is left out. Raises ``ModelError`` with every tensor that doesn't fit.
    """
    folder = Path(folder)
    _need_hf(folder, spec)
    return reward_state(folder, spec, _read_weights(folder))


def _need_hf(folder: Path | str, spec: ModelSpec) -> None:
    if spec.layout != "hf":
        raise ModelError(
            f"{folder}: params.json without config.json",
            "a reward model is a Hugging Face folder",
            "name another in paths.models.rm",
        )


def reward_state(folder: Path | str, spec: ModelSpec, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`load_reward_state` of tensors that were read; they may be without data. ``folder`` is for the messages."""
    _need_hf(folder, spec)
    state, unexpected = _rename(raw, _reward_name)
    state.pop("lm_head.weight", None)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in RewardModel(spec).state_dict().items()}
    _compare(folder, expected, state, unexpected)
    return state


def load_reward(folder: Path, device: torch.device | str) -> RewardModel:
    """One whole reward model on one device, in float32."""
    spec = read_spec(folder)
    with torch.device("meta"):
        model = RewardModel(spec)
    finish_meta(model, device)
    model.load_state_dict(load_reward_state(folder, spec))
    return model


def _reward_name(key: str) -> str | None:
    if key in ("v_head.weight", "score.weight"):
        return "v_head.weight"
    if key == "lm_head.weight":
        return key
    found = re.fullmatch(r"(?:model|transformer)\.(.+)", key)
    return found[1] if found else None


def load_model(folder: Path, device: torch.device | str) -> MTPModel:
    """One whole model on one device, in float32 (the registry's ``standardized-model-loader``)."""
    spec = read_spec(folder)
    with torch.device("meta"):
        model = MTPModel(spec)
    finish_meta(model, device)
    model.load_state_dict(load_state(folder, spec))
    return model


def _rename(raw: Mapping[str, Tensor], name_of: Callable[[str], str | None]) -> tuple[dict[str, Tensor], list[str]]:
    state: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in raw.items():
        if key.endswith(("rotary_emb.inv_freq", "rope.freqs")):
            continue  # computed, never learned
        name = name_of(key)
        if name is None or name in state:
            unexpected.append(key)
        else:
            state[name] = tensor
    return state, unexpected


def _meta_name(key: str, spec: ModelSpec) -> str | None:
    if key in _META_ROOT:
        return _META_ROOT[key]
    found = re.fullmatch(r"(layers|extra_heads)\.(\d+)\.(.+)", key)
    if not found or found[3] not in _META_NAMES:
        return None
    number = int(found[2])
    if found[1] == "extra_heads":
        place = f"heads.{number + 1}"
    elif number == spec.trunk_layers:
        place = "heads.0"
    else:
        place = f"layers.{number}"
    return f"{place}.{_META_NAMES[found[3]]}"


def _hf_name(key: str, spec: ModelSpec) -> str | None:
    if key in _HF_ROOT:
        return _HF_ROOT[key]
    if re.fullmatch(r"heads\.[1-9]\d*\..+", key):
        return key
    found = re.fullmatch(r"(?:model|transformer)\.(.+)", key)
    if not found:
        return None
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", found[1])
    if layer and int(layer[1]) == spec.trunk_layers:
        return f"heads.0.{layer[2]}"
    return found[1]


def _half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Query or key rows from Meta's rotary order (pairs side by side) to transformers' (halves)."""
    rows, columns = weight.shape
    if rows % (2 * n_heads):
        return weight  # misshapen: the check that follows names it
    return weight.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _torch_load(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: not there", "the folder holds its weights", "sync the model again") from None
    except Exception as error:  # torch raises half a dozen types for a torn or unsafe file
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: {first}",
            "a zip-format torch file with tensors only",
            "sync the model again; an old pickle must be saved anew",
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path}: not a flat dictionary of tensors", "a plain state dict", "save it as one")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder: safetensors before torch files, shards by their index."""
    raw: dict[str, Tensor] = {}
    for path in (folder / name for name in weight_files(folder)):
        raw.update(_safetensors_load(path) if path.suffix == ".safetensors" else _torch_load(path))
    return raw


def weight_files(folder: Path, there: Iterable[str] | None = None) -> list[str]:
    """The files of a Hugging Face folder that hold its weights, by name.

    ``there``: the names that exist where not all of them are in ``folder`` (its JSON files are). Raises ModelError.
    """
    names = {p.name for p in folder.iterdir() if p.is_file()} if there is None and folder.is_dir() else {*(there or ())}
    extra = [EXTRA_HEADS] if EXTRA_HEADS in names else []
    for name in ("model.safetensors", "pytorch_model.bin", "model.bin"):
        index = folder / f"{name}.index.json"
        if index.name in names:
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(s, str) and Path(s).name == s for s in shards.values()
            ):
                raise ModelError(
                    f"{index}: no weight_map of plain file names",
                    "an index names the file of each tensor",
                    "sync the model again",
                )
            return [*sorted(set(shards.values())), *extra]
        if name in names:
            return [name, *extra]
    found = sorted(name for name in names if name.endswith((".pt", ".pth")) and "/" not in name)
    if len(found) == 1:
        return found + extra
    raise ModelError(
        f"{folder}: no weights ({len(found)} .pt or .pth files)",
        "model.safetensors, pytorch_model.bin (or their .index.json), model.bin or one .pt file",
        "sync the model again",
    )


def _safetensors_load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {error}", "a whole safetensors file", "sync the model again") from None


def _check_state(folder: Path | str, spec: ModelSpec, state: Mapping[str, Tensor], unexpected: Iterable[str]) -> None:
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in MTPModel(spec).state_dict().items()}
    _compare(folder, expected, state, unexpected)


def _compare(
    folder: Path | str, expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], unexpected: Iterable[str]
) -> None:
    lines = [f"missing {k}" for k in sorted(expected.keys() - state.keys())]
    lines += [f"unexpected {k}" for k in sorted({*unexpected, *(state.keys() - expected.keys())})]
    lines += [
        f"misshapen {k} {list(state[k].shape)}, expected {list(shape)}"
        for k, shape in sorted(expected.items())
        if k in state and tuple(state[k].shape) != shape
    ]
    if lines:
        raise ModelError(
            f"{folder}: {len(lines)} tensors don't fit:\n  " + "\n  ".join(lines) + "\n",
            "names and shapes are those that the folder's JSON gives",
            "compare JSON and weights, or sync the model again",
        )


# ---- weights out -----------------------------------------------------------------------------


def export_hf(state: Mapping[str, Tensor], spec: ModelSpec, folder: Path, tokenizer_from: Path) -> None:
    """Write a Hugging Face folder: head 0 as the last layer, the other heads in ``mtp_heads.safetensors``.

    ``AutoModelForCausalLM`` loads it as a plain Llama; ``read_spec`` and ``load_state`` read all its heads.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if key.startswith("value_head."):
            continue  # no part of a language model
        if key.startswith("heads.0."):
            plain[f"model.layers.{spec.trunk_layers}.{key.removeprefix('heads.0.')}"] = tensor
        elif key.startswith("heads."):
            extra[key] = tensor
        elif key == "lm_head.weight":
            if not spec.tied:
                plain[key] = tensor
        else:
            plain[f"model.{key}"] = tensor
    shards = _shards(plain)
    for number, shard in enumerate(shards, 1):
        name = _shard_name(number, len(shards))
        save_file({k: plain[k] for k in shard}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in plain.values())},
            "weight_map": {
                k: _shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for k in shard
            },
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if extra:
        save_file(extra, folder / EXTRA_HEADS, metadata={"format": "pt"})
    config = _llama_config(spec).to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "n_future_tokens": spec.heads}
    config |= {"rms_norm_eps": spec.norm_eps, "tie_word_embeddings": spec.tied}
    config |= {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.trunk_layers + 1,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "intermediate_size": spec.intermediate,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rope_theta": spec.rope_theta,
        "dtype": str(next(iter(plain.values())).dtype).removeprefix("torch."),
    }
    source = Path(tokenizer_from)
    if (source / "config.json").is_file():
        had = _read_json(source / "config.json")
        config |= {k: had[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in had}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def _shard_name(number: int, of: int) -> str:
    return "model.safetensors" if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"
