"""The multi-token-prediction model: a Llama trunk of transformers with heads beside it.

Head ``k`` is one decoder layer on the trunk's output, head 0 being the last layer of the plain model; final norm and
unembedding are shared (Gloeckle et al. 2024). Everything that depends on transformers' signatures is in the
section "adapters". Symbols and shapes: ``B`` rows, ``S`` positions, ``H`` heads, ``V`` vocabulary, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


class ModelError(ValueError):
    """A model folder that can't be used: what is wrong, the rule, the next step."""

    def __init__(self, what: str, rule: str, next_step: str) -> None:
        super().__init__(f"{what}; rule: {rule}; next: {next_step}")
        self.what, self.rule, self.next_step = what, rule, next_step


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


def finish_meta(model: MTPModel | RewardModel, device: torch.device | str) -> None:
    """Give a model built on ``meta`` memory on ``device``; its weights are then undefined, its rotary buffers not."""
    model.to_empty(device=torch.device(device))
    if isinstance(model, MTPModel) and model.spec.tied and not hasattr(model, "unshard"):
        _tie(model)  # to_empty makes one each; FSDP keeps them one itself
    with torch.device(device):
        model.rotary_emb = LlamaRotaryEmbedding(_llama_config(model.spec))
