"""Bytes before there is a GPU: what is counted, and that sharding, precision and checkpointing show in it."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp import config as settings
from wmtp import memory
from wmtp.memory import ACTIVATIONS, ADAM, GATHERED, GRADIENTS, OTHER, WEIGHTS, LiveBytes, Peak
from wmtp.model import ModelSpec

ROOT = Path(__file__).parents[1]
SPEC = ModelSpec("hf", 4, 512, 2, 8, 8, 1376, 4000)
SMALL = ["data.train.max_length=256", "data.eval.max_length=256"]


def peak(algo: str, *sets: str, spec: ModelSpec = SPEC) -> Peak:
    files = (ROOT / "configs/config.vessl.yaml", ROOT / f"configs/recipe.{algo}.yaml")
    config, recipe = settings.load_pair(*files, [*SMALL, *sets], env="production")
    found: Peak = memory.apart(memory.step_peak, config, recipe, spec).result()
    return found


def test_what_lives_is_counted_and_what_died_is_not() -> None:
    live = LiveBytes()
    with live:
        live.kind = WEIGHTS
        kept = torch.zeros(1000)
        view = kept[10:]
        live.kind = ACTIVATIONS
        gone = kept + 1
        assert dict(live.now) == {WEIGHTS: 4000, ACTIVATIONS: 4000}
        del gone
        gc.collect()
        live.begin()
        assert dict(+live.now) == {WEIGHTS: 4000} == dict(+live.peak)
        (kept * 2 + 3).sum()  # the product lives while the sum of both is made
        assert live.peak[ACTIVATIONS] == 8000
        kept.untyped_storage().resize_(0)
        assert dict(+live.now) == {}
        del view
    torch.zeros(1000)
    assert dict(+live.now) == {}


def test_weights_and_moments_are_shared_among_the_ranks() -> None:
    whole = memory.whole_bytes(SPEC)
    four, two = (peak("baseline_mtp", f"launcher.resources.gpus={n}", "train.accumulation_steps=1") for n in (4, 2))
    for ranks, found in ((4, four), (2, two)):
        assert found.parts[WEIGHTS] == pytest.approx(whole / ranks, rel=0.01)
        assert found.parts[ADAM] == pytest.approx(2 * whole / ranks, rel=0.01)


def test_accumulation_keeps_whole_gradients_on_each_rank() -> None:
    """FSDP reduces with the last micro-batch: until then each rank has them all, in float32."""
    whole = memory.whole_bytes(SPEC)
    once = peak("baseline_mtp", "train.accumulation_steps=1")
    often = [peak("baseline_mtp", f"train.accumulation_steps={n}") for n in (2, 4)]
    assert often[0] == often[1]
    assert often[0].parts[GRADIENTS] > 0.9 * whole
    assert often[0].bytes - once.bytes > 0.5 * whole


@pytest.mark.parametrize(
    ("heavier", "kind"),
    [
        ("devices.fsdp.activation_ckpt=false", ACTIVATIONS),
        ("data.train.batch_size=8", ACTIVATIONS),
        ("data.train.max_length=1024", ACTIVATIONS),
        ("loss.chunk_positions=256", ACTIVATIONS),
        ("devices.fsdp.sharding=shard_grad_op", GATHERED),
        ("devices.fsdp.sharding=no_shard", WEIGHTS),
        ("devices.mixed_precision=fp32", ACTIVATIONS),
    ],
)
def test_what_a_setting_costs_is_seen(heavier: str, kind: str) -> None:
    # Long enough that activations outweigh a whole set of gradients, or the peak would be elsewhere.
    base = ["train.accumulation_steps=1", "data.train.batch_size=4", "loss.chunk_positions=32"]
    key = heavier.partition("=")[0]
    light, heavy = (peak("baseline_mtp", *[b for b in base if not b.startswith(key)], *more) for more in (
        [b for b in base if b.startswith(key)], [heavier]))  # fmt: skip
    assert heavy.parts[kind] > 1.2 * light.parts.get(kind, 0)
    assert heavy.bytes > light.bytes


def test_held_out_rows_of_their_own_size_are_counted() -> None:
    files = (ROOT / "configs/config.vessl.yaml", ROOT / "configs/recipe.baseline_mtp.yaml")
    config, _ = settings.load_pair(*files, SMALL, env="production")
    few, many = (memory.apart(memory.reading_peak, config, SPEC, rows, 256).result() for rows in (2, 32))
    assert many.parts[ACTIVATIONS] > 4 * few.parts[ACTIVATIONS]


def test_the_optimizer_of_a_gpu_copies_nothing() -> None:
    """torch's default there, which takes all tensors at once, would copy all moments; a CPU's takes one at a time."""
    base = ["train.accumulation_steps=1", "data.train.max_length=64", "data.train.batch_size=1"]
    cpu = ["devices.compute_backend=cpu", "devices.distributed.backend=gloo"]
    deep = ModelSpec("hf", 4, 512, 8, 8, 8, 1376, 1000)
    for sets in (base, [*base, *cpu]):
        parts = peak("baseline_mtp", *sets, spec=deep).parts
        assert parts.get(OTHER, 0) < 0.1 * parts[WEIGHTS]


def test_selective_recomputation_lies_between_all_and_none() -> None:
    base = ["train.accumulation_steps=1", "data.train.batch_size=4", "loss.chunk_positions=32"]
    whole, some, none = (
        peak("baseline_mtp", *base, f"devices.fsdp.activation_ckpt={how}").parts[ACTIVATIONS]
        for how in ("false", "selective", "true")
    )
    assert none * 1.2 < some < whole / 1.2


def test_a_gpu_takes_more_positions_at_once() -> None:
    """The walk is on a CPU's tensors, but the loss is of the device that will be."""
    cpu = ["devices.compute_backend=cpu", "devices.distributed.backend=gloo"]
    base = ["train.accumulation_steps=1", "data.train.batch_size=4", "data.train.max_length=1024"]
    wide = dataclasses.replace(SPEC, vocab_size=32000)
    gpu, other = peak("baseline_mtp", *base, spec=wide), peak("baseline_mtp", *base, *cpu, spec=wide)
    assert gpu.bytes - other.bytes > 2**30


@pytest.mark.parametrize("family", [{}, {"family": "gpt2", "tied": True}, {"family": "qwen3", "head_dim": 96}])
def test_one_device_without_sharding(family: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, **family)
    alone = ["devices.distributed.enabled=false", "devices.fsdp.enabled=false", "launcher.resources.gpus=1"]
    alone += ["launcher.preset=gpu-a100-80g-small"]
    found = peak("baseline_mtp", *alone, "train.accumulation_steps=1", spec=spec)
    assert found.parts[WEIGHTS] == pytest.approx(memory.whole_bytes(spec), rel=0.01)


@pytest.mark.parametrize("algo", ["baseline_mtp", "rho1_wmtp", "critic_wmtp"])
def test_the_phases_of_a_run(algo: str) -> None:
    files = (ROOT / "configs/config.vessl.yaml", ROOT / f"configs/recipe.{algo}.yaml")
    config, recipe = settings.load_pair(*files, SMALL, env="production")
    roles = settings.needed_models(config, recipe)
    found = memory.apart(memory.peaks, config, recipe, dict.fromkeys(roles, SPEC)).result()
    scoring = ["scoring"] if algo != "baseline_mtp" else []
    assert [p.phase for p in found] == [*scoring, "loading", "step", "held-out reading", "saving"]
    by = {p.phase: p for p in found}
    largest = memory.largest_tensor(SPEC)
    assert by["loading"].bytes == by["step"].parts[WEIGHTS] + largest
    assert by["saving"].bytes == by["step"].parts[WEIGHTS] + by["step"].parts[ADAM] + largest
    assert by["held-out reading"].parts[ADAM] == by["step"].parts[ADAM]
    assert by["step"].bytes > by["saving"].bytes > by["loading"].parts[WEIGHTS]
    if scoring:
        assert ADAM not in by["scoring"].parts and by["scoring"].parts[WEIGHTS] > 0


def test_held_out_rows_that_are_a_share_of_the_training_data_are_read_too() -> None:
    files = (ROOT / "configs/config.vessl.yaml", ROOT / "configs/recipe.baseline_mtp.yaml")
    phases = []
    for share in ("0.1", "0"):
        sets = [*SMALL, "data.eval.sources=[]", f"data.eval.share={share}"]
        config, recipe = settings.load_pair(*files, sets, env="production")
        phases.append([p.phase for p in memory.apart(memory.peaks, config, recipe, {"base": SPEC}).result()])
    assert phases == [["loading", "step", "held-out reading", "saving"], ["loading", "step", "saving"]]


def test_advice_names_what_lowers_the_peak_up_to_the_first_that_fits() -> None:
    files = (ROOT / "configs/config.vessl.yaml", ROOT / "configs/recipe.baseline_mtp.yaml")
    sets = [*SMALL, "devices.fsdp.activation_ckpt=false", "data.train.batch_size=16"]
    config, recipe = settings.load_pair(*files, sets, env="production")
    now = memory.apart(memory.step_peak, config, recipe, SPEC).result()
    told = memory.apart(memory.advice, config, recipe, SPEC, 1).result()
    assert [what for what, _ in told] == [
        "devices.fsdp.activation_ckpt=selective",
        "devices.fsdp.activation_ckpt=true",
        "train.accumulation_steps=1",
        "data.train.batch_size=8",
    ]
    assert all(p.bytes < now.bytes for _, p in told)
    enough = memory.apart(memory.advice, config, recipe, SPEC, told[0][1].bytes).result()
    assert enough == told[:1]
