"""Arithmetic of a step, against what torch's own counter sees; peaks by the names that CUDA gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wmtp.meter import flops_per_token, peak_flops
from wmtp.model import ModelSpec, MTPModel
from wmtp.objective import make_labels

SPEC = ModelSpec("hf", 4, 64, 2, 4, 4, 96, 200)


def counted(spec: ModelSpec, rows: int, length: int, recompute: bool = False) -> int:
    """Operations of a forward and backward, by torch's counter; it does not know `addmm_`, which the loss uses."""
    x = torch.zeros(rows, length, dtype=torch.int64)
    labels, mask = make_labels(x, spec.heads)
    model = MTPModel(spec)
    model.ready_layers(recompute)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        out = model(x, x, labels, mask, mask.sum())
        assert out.loss is not None
        out.loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, heads=1),
        replace(SPEC, n_kv_heads=2),
        replace(SPEC, tied=True),
        replace(SPEC, family="qwen3", n_kv_heads=2, head_dim=32),
        replace(SPEC, family="gpt2", tied=True),
    ],
)
@pytest.mark.parametrize("length", [16, 64])
def test_operations_are_those_that_torchs_counter_sees(spec: ModelSpec, length: int) -> None:
    assert counted(spec, 2, length) == flops_per_token(spec, length) * 2 * length


def test_recomputed_layers_are_no_progress() -> None:
    """The counter sees them; the formula does not."""
    assert counted(SPEC, 1, 16, recompute=True) > flops_per_token(SPEC, 16) * 16


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
    ],
)
def test_a_cards_peak_is_found_by_its_name(name: str, tera: float) -> None:
    assert peak_flops(name, "bf16") == pytest.approx(1e12 * tera)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bf16"),  # another card than the A10
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16"),
        ("NVIDIA GeForce RTX 2080", "bf16"),
        ("cpu", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp32"),
    ],
)
def test_what_is_not_known_is_not_guessed(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None
