"""The multi-token-prediction model: a trunk of transformers, Llama's or a like family's, with heads beside it.

Head ``k`` is one decoder layer on the trunk's output, head 0 being the last layer of the plain model; final norm and
unembedding are shared (Gloeckle et al. 2024). Everything that depends on transformers' signatures is in the
section "adapters". Symbols and shapes: ``B`` rows, ``S`` positions, ``H`` heads, ``V`` vocabulary, ``D`` hidden size.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import CONFIG_MAPPING, PreTrainedConfig

from wmtp.objective import IGNORED, align_next, baseline_mtp, value_gain, weighted_loss

LOGIT_BUDGET = 1 << 25  # elements of logits alive at once: 128 MiB in float32
CUDA_LOGIT_BUDGET = 1 << 28  # a GPU has the room, and is slow at small pieces (benchmarks/README.md)


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
    family: str = "llama"
    """A key of `FAMILIES`."""
    head_dim: int | None = None
    """Width of an attention head; None: `hidden / n_heads`."""
    own: str = "{}"
    """JSON: what else the family's configuration says of the arithmetic, where that is not the family's default."""

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.n_heads


# ---- adapters: the only lines that know transformers' signatures ---------------------------------


@dataclass(frozen=True)
class Family:
    """How transformers names the parts of one of its causal models, for those whose layers can be called alike."""

    prefix: str
    """What the names of its classes begin with; ``layer`` and ``causal`` are what two of them end with."""
    own: tuple[str, ...]
    """Keys of its configuration that change the arithmetic and that no field of `ModelSpec` stands for."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are always set so."""
    layer: str = "DecoderLayer"
    causal: str = "ForCausalLM"
    rotary: bool = True
    """False: positions are learned, and added to the embedding."""
    layers: str = "num_hidden_layers"
    names: Mapping[str, str] = field(
        default_factory=lambda: {
            "hidden": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "intermediate": "intermediate_size",
            "vocab_size": "vocab_size",
            "norm_eps": "rms_norm_eps",
            "max_positions": "max_position_embeddings",
            "tied": "tie_word_embeddings",
        }
    )
    """Field of `ModelSpec` to key of the configuration."""
    base: str = "model"
    roots: Mapping[str, str] = field(
        default_factory=lambda: {"embed_tokens": "embed_tokens", "layers": "layers", "norm": "norm"}
    )
    """What its files call the modules under ``base``, and what they are called here."""


FAMILIES = {
    "llama": Family("Llama", ("hidden_act", "attention_bias", "mlp_bias")),
    "mistral": Family("Mistral", ("hidden_act",), {"sliding_window": None}),
    "qwen2": Family("Qwen2", ("hidden_act",)),
    "qwen3": Family("Qwen3", ("hidden_act", "attention_bias")),
    "gpt2": Family(
        "GPT2",
        ("activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        # Dropout draws from a stream that a resumed run does not have.
        {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        layer="Block",
        causal="LMHeadModel",
        rotary=False,
        layers="n_layer",
        names={
            "hidden": "n_embd",
            "n_heads": "n_head",
            "intermediate": "n_inner",
            "vocab_size": "vocab_size",
            "norm_eps": "layer_norm_epsilon",
            "max_positions": "n_positions",
            "tied": "tie_word_embeddings",
        },
        base="transformer",
        roots={"wte": "embed_tokens", "wpe": "embed_positions", "h": "layers", "ln_f": "norm"},
    ),
}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
"""The special tokens are the tokenizer's; those that a family assumes may lie outside of a small vocabulary."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary tables that depend on the configuration alone; those of the others change with a batch's longest row."""


def family_settings(spec: ModelSpec) -> dict[str, Any]:
    """``spec`` in the words of its family's ``config.json``: a plain model whose last layer is head 0."""
    family, own = FAMILIES[spec.family], json.loads(spec.own)
    said = {key: getattr(spec, name) for name, key in family.names.items()} | {family.layers: spec.trunk_layers + 1}
    if family.rotary:
        rope = {"rope_type": "default"} | own.pop("rope_parameters", {}) | {"rope_theta": spec.rope_theta}
        said |= {"head_dim": spec.head_width, "rope_parameters": rope}
    return said | own | family.fixed


def family_config(spec: ModelSpec) -> PreTrainedConfig:
    config = CONFIG_MAPPING[spec.family](**family_settings(spec), **NO_TOKENS)
    config._attn_implementation = "sdpa"
    return config


def need(content: Mapping[str, Any], name: str, *keys: str) -> list[int]:
    """The whole numbers under ``keys``; ``name`` is for the message. Raises ModelError where one is not there."""
    missing = [key for key in keys if not isinstance(content.get(key), int)]
    if missing:
        raise ModelError(
            f"{name}: no whole number under {', '.join(missing)}",
            "these fix the model's shapes",
            "fetch the model again",
        )
    return [content[key] for key in keys]


def family_spec(content: Mapping[str, Any], name: str) -> ModelSpec:
    """The spec of what a ``config.json`` says; ``name`` is for the messages. Raises ModelError."""
    kind = str(content.get("model_type"))
    family = FAMILIES.get(kind)
    other = "choose another base model"
    if family is None:
        raise ModelError(f"{name}: model_type {kind}", f"a model is one of {', '.join(FAMILIES)}", other)
    sizes = [family.layers, *(family.names[field] for field in ("hidden", "n_heads", "vocab_size"))]
    if family.rotary:  # GPT-2 may leave it out: four times the hidden size
        sizes.append(family.names["intermediate"])
    need(content, name, *sizes)
    try:
        config = CONFIG_MAPPING[kind].from_dict({**content, **NO_TOKENS})
    except Exception as error:  # transformers raises half a dozen types
        raise ModelError(
            f"{name}: {' '.join(str(error).split())}",
            f"a configuration of transformers' {kind}",
            "fetch the model again",
        ) from None
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope_type = rope.get("rope_type", "default")
    refused = [
        what
        for what, bad in (
            (f"rope_type {rope_type}", rope_type not in ROPE_TYPES),
            (f"sliding_window {getattr(config, 'sliding_window', None)}", getattr(config, "sliding_window", None)),
            ("layer_types with sliding_attention", "sliding_attention" in (getattr(config, "layer_types", None) or ())),
            ("add_cross_attention", getattr(config, "add_cross_attention", False)),
        )
        if bad
    ]
    if refused:
        raise ModelError(
            f"{name}: {', '.join(refused)}",
            f"every layer looks at the whole row, its rotary positions are one of {', '.join(ROPE_TYPES)}",
            other,
        )
    plain = CONFIG_MAPPING[kind]()
    own = {key: getattr(config, key) for key in family.own if getattr(config, key) != getattr(plain, key)}
    theta = float(rope.pop("rope_theta", 10000.0))
    if rope_type != "default":
        own["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
    said = {field: getattr(config, key) for field, key in family.names.items()}
    said = {"n_kv_heads": said["n_heads"]} | said | {"intermediate": said["intermediate"] or 4 * said["hidden"]}
    head_dim = getattr(config, "head_dim", None)
    return ModelSpec(
        **said,
        layout="hf",
        heads=need(content, name, "n_future_tokens")[0] if "n_future_tokens" in content else 1,
        trunk_layers=getattr(config, family.layers) - 1,
        rope_theta=theta,
        family=kind,
        head_dim=None if head_dim is None or head_dim * said["n_heads"] == said["hidden"] else head_dim,
        own=json.dumps(own, sort_keys=True),
    )


def _class(spec: ModelSpec, ending: str) -> Any:
    module = importlib.import_module(f"transformers.models.{spec.family}.modeling_{spec.family}")
    return getattr(module, FAMILIES[spec.family].prefix + ending)


def decoder_layers(spec: ModelSpec, numbers: Iterable[int]) -> nn.ModuleList:
    """The family's decoder layers, each with its number in a plain model."""
    layer, config = _class(spec, FAMILIES[spec.family].layer), family_config(spec)
    return nn.ModuleList(layer(config, layer_idx=number) for number in numbers)


def _final_norm(spec: ModelSpec) -> nn.Module:
    norm = _class(spec, "RMSNorm") if FAMILIES[spec.family].rotary else nn.LayerNorm
    return norm(spec.hidden, eps=spec.norm_eps)


def _rotary(spec: ModelSpec) -> nn.Module | None:
    return _class(spec, "RotaryEmbedding")(family_config(spec)) if FAMILIES[spec.family].rotary else None


_aten = torch.ops.aten
_DEAR = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective recomputation keeps the outputs of: products and attention. The rest is cheap to make again."""

Rotary = tuple[Tensor, Tensor] | None
"""Cosines and sines of each position; None where positions are in the embedding."""


def _recomputed(layer: nn.Module, how: bool | str, *args: Any, **kwargs: Any) -> Any:
    """Within the layer's own call, so that sharding gathers once for it and the compiler sees all of it."""
    inner = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    if how == "selective":
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _DEAR)
    return checkpoint(inner, *args, use_reentrant=False, **kwargs)


def _apply_layer(layer: nn.Module, hidden_bsd: Tensor, mask_b1ss: Tensor, rotary: Rotary) -> Tensor:
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


class _Eager:
    """Cross-entropies of logits `[M, V]` in float32, and the logits' gradient from the cross-entropies'."""

    def __init__(self, logits_mv: Tensor, target_m1: Tensor) -> None:
        logits_mv = logits_mv.float()
        top_m1 = logits_mv.amax(-1, keepdim=True)
        of_target_m1 = logits_mv.gather(1, target_m1) - top_m1
        self.target_m1, self.shares_mv = target_m1, torch.softmax(logits_mv, -1, out=logits_mv)
        # The largest share is 1 / sum of exp(logit - top), so no target is too unlikely for this.
        self.ce_m1 = -self.shares_mv.amax(-1, keepdim=True).log() - of_target_m1

    def slope(self, d_ce_m1: Tensor, dtype: torch.dtype) -> Tensor:
        """`(softmax - one-hot) * d_ce`; once, since it takes the memory of the shares."""
        return self.shares_mv.mul_(d_ce_m1).scatter_add_(1, self.target_m1, -d_ce_m1).to(dtype)


def _read(logits_mv: Tensor, target_m1: Tensor) -> tuple[Tensor, Tensor]:
    logits_mv = logits_mv.float()
    top_m1 = logits_mv.amax(-1, keepdim=True)
    whole_m1 = top_m1 + (logits_mv - top_m1).exp().sum(-1, keepdim=True).log()
    return whole_m1, whole_m1 - logits_mv.gather(1, target_m1)


def _slope(logits_mv: Tensor, whole_m1: Tensor, target_m1: Tensor, d_ce_m1: Tensor, dtype: torch.dtype) -> Tensor:
    shares_mv = (logits_mv.float() - whole_m1).exp()
    target_mv = torch.arange(logits_mv.shape[1], device=logits_mv.device) == target_m1
    return (torch.where(target_mv, shares_mv - 1, shares_mv) * d_ce_m1).to(dtype)


class _Compiled(_Eager):
    """The same in two kernels, which read each logit twice and write it once."""

    read, write = staticmethod(_read), staticmethod(_slope)

    def __init__(self, logits_mv: Tensor, target_m1: Tensor) -> None:
        self.logits_mv, self.target_m1 = logits_mv, target_m1
        self.whole_m1, self.ce_m1 = self.read(logits_mv, target_m1)

    def slope(self, d_ce_m1: Tensor, dtype: torch.dtype) -> Tensor:
        return self.write(self.logits_mv, self.whole_m1, self.target_m1, d_ce_m1, dtype)

    @classmethod
    def make(cls) -> type[_Compiled]:
        """With kernels of torch.compile."""
        read, write = (staticmethod(torch.compile(f, dynamic=False)) for f in (_read, _slope))
        return type(cls.__name__, (cls,), {"read": read, "write": write})


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, which is float32 whatever they are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


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
        fused: Callable[[Tensor, Tensor], _Eager] | None,
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
            logits_mv = F.linear(h_md, weight_vd)
            target_m1 = y_nh.reshape(-1, 1).clamp(min=0)
            part_of = (fused or _Eager)(logits_mv, target_m1)
            del logits_mv
            ce = part_of.ce_m1.view(y_nh.shape).masked_fill(~mask_nh, 0)
            w = weighing.rule(ce, mask_nh, **{name: value[part] for name, value in aligned.items()})
            with torch.enable_grad():
                leaf = ce.requires_grad_(learns)
                part_loss = weighted_loss(leaf, w, mask_nh, count=count)
            loss += part_loss.detach()
            ce_nh[part], w_nh[part] = ce.detach(), w
            if d_hidden is None or d_weight is None:
                continue
            (d_ce,) = torch.autograd.grad(part_loss, leaf)
            d_logits = part_of.slope(d_ce.reshape(-1, 1), hidden_nhd.dtype)
            d_hidden[part] = (d_logits @ weight_vd.to(d_logits.dtype)).view(-1, heads, dim)
            _add_product(d_weight, d_logits.t(), h_md.to(d_logits.dtype))
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight_vd.dtype))
        ctx.mark_non_differentiable(ce_nh, w_nh)
        return loss, ce_nh, w_nh

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        return (d_hidden * scale).to(d_hidden.dtype), (d_weight * scale).to(d_weight.dtype), *[None] * 6


class LMHead(nn.Module):
    """Unembedding and loss in one module, so that FSDP gathers the weight around both."""

    def __init__(self, hidden: int, vocab_size: int) -> None:
        super().__init__()
        self.positions: int | None = None
        """Positions of a chunk; None: as many as keep a chunk's logits within the device's `LOGIT_BUDGET`."""
        self.fused: type[_Compiled] | None = None
        """Set: the kernels that `MTPModel.ready_layers` compiled."""
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, hidden_bshd: Tensor, labels_bsh: Tensor, mask_bsh: Tensor, count: Tensor | int, weighing: Weighing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(sum of w * ce over mask / count, ce, w)`, the last two `[B, S, H]` float32, detached, 0 outside mask."""
        heads, dim = hidden_bshd.shape[-2:]
        flat = hidden_bshd.reshape(-1, heads, dim)
        size = self.positions or self.auto_positions(heads, hidden_bshd.device.type)
        size = -(-len(flat) // -(-len(flat) // size))  # pieces of one size
        loss, ce, w = _OnePassLoss.apply(
            flat,
            self.weight,
            labels_bsh.masked_fill(~mask_bsh, IGNORED).reshape(-1, heads),
            count,
            weighing,
            size,
            torch.is_grad_enabled() and (hidden_bshd.requires_grad or self.weight.requires_grad),
            self.fused,
        )
        return loss, ce.view(labels_bsh.shape), w.view(labels_bsh.shape)

    def auto_positions(self, heads: int, device_type: str) -> int:
        budget = CUDA_LOGIT_BUDGET if device_type == "cuda" else LOGIT_BUDGET
        return max(1, budget // (self.weight.shape[0] * heads))

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


class Trunk(nn.Module):
    """Embedding, decoder layers and final norm, of the family's own modules."""

    def __init__(self, spec: ModelSpec, layers: int) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden)
        self.rotary_emb = _rotary(spec)
        self.embed_positions = None if self.rotary_emb else nn.Embedding(spec.max_positions, spec.hidden)
        self.layers = decoder_layers(spec, range(layers))
        self.norm = _final_norm(spec)

    def embed(self, x_bs: Tensor, document_bs: Tensor) -> tuple[Tensor, Tensor, Rotary]:
        """`[B, S, D]` before the first layer, with the attention mask and the rotary tables that all layers use."""
        positions, mask = attention_layout(document_bs)
        h = self.embed_tokens(x_bs)
        if self.embed_positions is not None:
            if x_bs.shape[1] > self.spec.max_positions:  # a GPU would only say that it was asked for what is not there
                raise ModelError(
                    f"rows of {x_bs.shape[1]}, but the model has {self.spec.max_positions} positions",
                    "a row is at most as long as the model's positions",
                    f"data.train.max_length and data.eval.max_length: at most {self.spec.max_positions}",
                )
            return h + self.embed_positions(positions), mask, None
        assert self.rotary_emb is not None
        return h, mask, self.rotary_emb(h, position_ids=positions)


class MTPModel(Trunk):
    """Trunk, ``H`` heads, shared norm and unembedding; a value head where asked. May be built on ``meta``."""

    def __init__(self, spec: ModelSpec, value_head: bool = False) -> None:
        super().__init__(spec, spec.trunk_layers)
        # Each head is the last layer, by its number too: a configuration may say things of a layer by its number.
        self.heads = decoder_layers(spec, [spec.trunk_layers] * spec.heads)
        self.lm_head = LMHead(spec.hidden, spec.vocab_size)
        self.value_head = ValueHead(spec.hidden) if value_head else None
        if spec.tied:
            _tie(self)

    def ready_layers(self, recompute: bool | Literal["selective"] = False, compiled: bool = False) -> None:
        """Before the model is sharded: what its layers keep for the backward, and whether they and the loss compile.

        ``recompute``: True keeps a layer's input alone and makes the rest again; `selective` keeps `_DEAR`'s too.
        """
        for layer in [*self.layers, *self.heads]:
            if recompute:
                layer.forward = partial(_recomputed, layer, recompute)
            if compiled:
                layer.compile()
        if compiled:
            self.lm_head.fused = _Compiled.make()

    def trunk(self, x_bs: Tensor, document_bs: Tensor) -> tuple[Tensor, Tensor, Rotary]:
        """`[B, S, D]` before the heads, with the attention mask and rotary tables that the heads use too."""
        h, mask, rotary = self.embed(x_bs, document_bs)
        for layer in self.layers:
            h = _apply_layer(layer, h, mask, rotary)
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

    def _heads(self, h: Tensor, mask: Tensor, rotary: Rotary) -> Tensor:
        return self.norm(torch.stack([_apply_layer(head, h, mask, rotary) for head in self.heads], dim=2))

    def _value(self, h: Tensor) -> Tensor | None:
        if self.value_head is None:
            return None
        with torch.no_grad():
            normed = self.norm(h)
        return self.value_head(normed)


def no_compiler(device_type: str) -> str | None:
    """What `MTPModel.ready_layers` would lack on this machine to compile; None where nothing."""
    names = ("g++", "clang++") if device_type == "cpu" else ("gcc", "cc", "clang")
    if not (os.environ.get("CXX" if device_type == "cpu" else "CC") or any(map(shutil.which, names))):
        return f"no {', '.join(names)} on this machine"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"no {header} on this machine"


def _tie(model: MTPModel) -> None:
    weight = model.embed_tokens.weight
    assert isinstance(weight, nn.Parameter)
    model.lm_head.weight = weight


class RewardModel(Trunk):
    """A trunk with all layers of its folder, and a linear reward on the last token's state (as Starling's)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, spec.trunk_layers + spec.heads)
        self.v_head = ValueHead(spec.hidden)

    def forward(self, x_bs: Tensor, document_bs: Tensor, last_b: Tensor) -> Tensor:
        """Reward `[B]` float32: the value at position ``last_b[b]`` of each row."""
        h, mask, rotary = self.embed(x_bs, document_bs)
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
        model.rotary_emb = _rotary(model.spec)
