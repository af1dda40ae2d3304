"""How much arithmetic a training step is, and how much a card can do: what a share of the peak is reckoned from."""

from __future__ import annotations

import re

import torch

from wmtp.model import ModelSpec, decoder_layers


def flops_per_token(spec: ModelSpec, length: int) -> int:
    """Floating-point operations of training on one token of a row of ``length``: forward and backward.

    `6 * P + 12 * L * S * A`, as PaLM counts them (Chowdhery et al. 2022, appendix B): 2 for each parameter that
    multiplies in the forward and 4 in the backward, with ``P`` the matrices of all `L = trunk + heads` layers and the
    unembedding once per head; attention, ``A`` wide over all its heads, over the whole row, as if it were not causal.
    Embedding look-ups, norms, biases, the value head and the optimizer are left out, and so is recomputation: it is no
    progress.
    """
    with torch.device("meta"):
        layer = sum(p.numel() for p in decoder_layers(spec, [0]).parameters() if p.ndim == 2)
    layers = spec.trunk_layers + spec.heads
    multiplying = layers * layer + spec.heads * spec.hidden * spec.vocab_size
    return 6 * multiplying + 12 * layers * length * spec.n_heads * spec.head_width


_BF16_TFLOPS = (
    # Dense, by the words of the name that CUDA gives; the first line whose words are all there. From NVIDIA's data
    # sheets, which show most of them with sparsity, at twice these.
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIE", 756.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L4", 121.0),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """What a card does at most in a second, dense, of ``precision`` (as `devices.mixed_precision` has it).

    ``device_name`` is `torch.cuda.get_device_name()`. None where it is not known: other cards, slices of one (MIG), and
    float32, where the peak depends on whether TF32 is allowed.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if precision != "bf16" or "MIG" in words:
        return None
    return next((1e12 * tera for card, tera in _BF16_TFLOPS if words.issuperset(card.split())), None)
