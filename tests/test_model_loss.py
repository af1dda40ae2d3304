"""The weighted loss and the values of a sharded model against all logits at once in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import spread
from safetensors.torch import load_file
from test_model import SMALL, lively, oracle_labels
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wmtp.export import export_hf
from wmtp.model import ModelError, MTPModel, ValueHead, Weighing, shard_units
from wmtp.objective import critic_wmtp, rho1_wmtp
from wmtp.weights import load_reward_state

HEADS, ROWS, LENGTH = SMALL.heads, 8, 10
DISCOUNT = 0.8
SETTINGS = {"temperature": 0.7, "epsilon": 0.05, "max_weight": 3.0, "mix": 0.7}
FP32, BF16 = torch.float32, torch.bfloat16
# name: algorithm, accumulation steps, what the parameters are in forward
CASES = {
    "rho1 x1": ("rho1", 1, FP32),
    "rho1 x2": ("rho1", 2, FP32),
    "critic x1": ("critic", 1, FP32),
    "critic x2": ("critic", 2, FP32),
    "rho1 bf16": ("rho1", 2, BF16),
    "critic bf16": ("critic", 2, BF16),
}


def valued(spec: Any = SMALL) -> MTPModel:
    """A model with weights that matter and a value head that says something."""
    model = MTPModel(spec, value_head=True)
    model.load_state_dict(lively(spec).state_dict(), strict=False)
    assert model.value_head is not None
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(2))
    return model.train()


def batch() -> dict[str, Tensor]:
    """Packed rows of two documents, two rows without a label.

    A document of four would give the last head one position, which sees itself alone: no gradient to its queries.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, SMALL.vocab_size, (ROWS, LENGTH), generator=g)
    document = (torch.arange(LENGTH) // 7)[None].repeat(ROWS, 1)
    labels, mask = oracle_labels(x, document, HEADS)
    labels[2:4], mask[2:4] = -100, False
    target = torch.randn(ROWS, LENGTH, generator=g)
    ref = 6 * torch.rand(ROWS, LENGTH, HEADS, generator=g)
    return {"x": x, "document": document, "labels": labels, "mask": mask, "ref": ref, "target": target}


def rho1(ce: Tensor, mask: Tensor, *, ref_aligned: Tensor) -> Tensor:
    return rho1_wmtp(ce, mask, ref_aligned=ref_aligned, head_mean=None, min_ce_diff=0.0, **SETTINGS)


def critic(ce: Tensor, mask: Tensor, *, delta_aligned: Tensor) -> Tensor:
    return critic_wmtp(ce, mask, delta_aligned=delta_aligned, **SETTINGS)


def oracle(algorithm: str) -> dict[str, Any]:
    """All logits at once, the gains one by one: loss, value loss, ce, w and gradients of one process."""
    b, model = batch(), valued()
    h, mask, rotary = model.trunk(b["x"], b["document"])
    logits = F.linear(model._heads(h, mask, rotary), model.lm_head.weight)
    ce = F.cross_entropy(logits.flatten(0, -2), b["labels"].flatten(), reduction="none").view_as(b["labels"])
    assert model.value_head is not None
    value = model.norm(h).detach() @ model.value_head.weight[0]
    if algorithm == "rho1":
        w = rho1(ce.detach(), b["mask"], ref_aligned=b["ref"])
    else:
        delta = torch.zeros(b["labels"].shape)
        for row, t, k in b["mask"].nonzero().tolist():
            j = t + k + 1
            delta[row, t, k] = value[row, j].detach() - DISCOUNT * value[row, j - 1].detach()
        w = critic(ce.detach(), b["mask"], delta_aligned=delta)
    loss = (w * ce)[b["mask"]].sum() / b["mask"].sum()
    value_loss = (value - b["target"]).square().mean()
    (loss + 0.5 * value_loss).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach(), "ce": ce.detach(), "w": w, "value": value.detach(), "grads": grads}


def full(grad: Any) -> Tensor | None:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def sharded(dtype: torch.dtype) -> Any:
    """As the trainer shards: everything in ``dtype`` but the value head."""
    model: Any = valued()
    for unit in [*shard_units(model), model]:
        own = None if dtype == FP32 or isinstance(unit, ValueHead) else dtype
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(param_dtype=own, reduce_dtype=FP32))
    return model


def one_case(rank: int, algorithm: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """A step of this rank, then stage 1's backward; what rank 0 saw, and the gradients of both ranks."""
    b, model = batch(), sharded(dtype)
    model.lm_head.positions = 7
    given: list[Tensor] = []
    inside: list[torch.dtype] = []

    def rule(ce: Tensor, mask: Tensor, **aligned: Tensor) -> Tensor:
        given.extend(aligned.values())
        return (rho1 if algorithm == "rho1" else critic)(ce, mask, **aligned)

    def see(module: Any, *_: Any) -> None:
        inside.append(module.weight.dtype)

    model.value_head.register_forward_hook(see)
    outs = []
    parts = torch.arange(ROWS).chunk(2)[rank].chunk(steps)
    for i, rows in enumerate(parts):
        model.set_requires_gradient_sync(i == steps - 1)
        model.set_is_last_backward(i == steps - 1)
        m = {n: t[rows] for n, t in b.items()}
        weighing = Weighing(rule, {"ref_aligned": m["ref"]}) if algorithm == "rho1" else Weighing(rule, {}, DISCOUNT)
        out = model(m["x"], m["document"], m["labels"], m["mask"], b["mask"].sum(), weighing)
        error = (out.value_bs - m["target"]).square().sum() / b["target"].numel()
        ((out.loss + 0.5 * error) * 2).backward()  # FSDP averages over the ranks
        outs.append(out)
    found = {
        "loss": sum(o.loss.detach() for o in outs),
        "ce": torch.cat([o.ce_bsh for o in outs]),
        "w": torch.cat([o.w_bsh for o in outs]),
        "value": torch.cat([o.value_bs.detach() for o in outs]),
        "given": torch.cat(given),
        "inside": inside,
        "grads": {n: full(p.grad) for n, p in model.named_parameters()},
    }
    model.zero_grad()
    values = []
    for i, rows in enumerate(parts):
        model.set_requires_gradient_sync(i == steps - 1)
        model.set_is_last_backward(i == steps - 1)
        out = model(b["x"][rows], b["document"][rows])
        assert out.loss is None and out.ce_bsh is None and out.w_bsh is None
        error = (out.value_bs - b["target"][rows]).square().sum() / b["target"].numel()
        (0.5 * error * 2).backward()
        values.append(out.value_bs.detach())
    found["stage 1"] = {n: full(p.grad) for n, p in model.named_parameters()}
    found["stage 1 value"] = torch.cat(values)
    dist.all_reduce(found["loss"])
    return found


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = {name: one_case(rank, *case) for name, case in CASES.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    spread(rank_main, str(folder))
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {name: [found[name] for found in ranks] for name in CASES}


def near(found: Tensor, expected: Tensor, share: float) -> bool:
    return bool(expected.norm() > 0) and bool((found - expected).norm() <= share * expected.norm())


@pytest.mark.parametrize("name", [n for n in CASES if "bf16" not in n])
def test_sharded_loss_and_gradients_are_those_of_all_logits_at_once(name: str, two_ranks: Any) -> None:
    expected, ranks = oracle(CASES[name][0]), two_ranks[name]
    for key in ("ce", "w", "value"):
        assert near(torch.cat([r[key] for r in ranks]), expected[key], 1e-5), key
    assert expected["w"][batch()["mask"]].std() > 0.1, "the weights must matter"
    assert near(ranks[0]["loss"], expected["loss"], 1e-5)
    for n, grad in expected["grads"].items():
        assert near(ranks[0]["grads"][n], grad, 1e-5), n


@pytest.mark.parametrize("name", CASES)
def test_sharded_stage_one_reaches_the_value_head_only(name: str, two_ranks: Any) -> None:
    algorithm, _, dtype = CASES[name]
    expected = oracle(algorithm)["grads"]["value_head.weight"]
    for r in two_ranks[name]:
        assert [n for n, g in r["stage 1"].items() if g is not None and bool(g.any())] == ["value_head.weight"]
        assert near(r["stage 1"]["value_head.weight"], expected, 1e-5 if dtype == FP32 else 0.05)
        assert torch.equal(r["stage 1 value"], r["value"])


@pytest.mark.parametrize("name", [n for n in CASES if "bf16" in n])
def test_under_a_bf16_policy_values_weights_and_scores_stay_float32(name: str, two_ranks: Any) -> None:
    algorithm, steps, _ = CASES[name]
    expected = oracle(algorithm)
    for rank, r in enumerate(two_ranks[name]):
        assert r["inside"] == [FP32] * 2 * steps, "the value head is float32 in both stages"
        for key in ("ce", "w", "value", "given"):
            assert r[key].dtype == FP32, key
            assert not torch.equal(r[key], r[key].to(BF16).float()), f"{key} was rounded"
        if algorithm == "rho1":
            ref = batch()["ref"].chunk(2)[rank]
            assert torch.equal(r["given"], ref.reshape(-1, HEADS))
        assert r["grads"]["value_head.weight"].dtype == FP32
    # The layers round, so all is near the float32 model, and not equal to it.
    ours = two_ranks[name][0]["grads"]["lm_head.weight"]
    assert near(ours, expected["grads"]["lm_head.weight"], 0.1)
    assert not near(ours, expected["grads"]["lm_head.weight"], 1e-5)


def test_weights_carry_no_gradient_to_what_they_are_made_of() -> None:
    b, model = batch(), valued()
    ref = b["ref"].clone().requires_grad_()
    args = (b["x"], b["document"], b["labels"], b["mask"], b["mask"].sum())
    cases: list[tuple[Callable[..., Tensor], dict[str, Tensor], float | None]] = [
        (rho1, {"ref_aligned": ref}, None),
        (critic, {}, DISCOUNT),
    ]
    for rule, aligned, discount in cases:
        out = model(*args, Weighing(rule, aligned, discount))
        assert not out.w_bsh.requires_grad and not out.ce_bsh.requires_grad and out.value_bs.requires_grad
        out.loss.backward()
        assert ref.grad is None
        assert model.value_head is not None and model.value_head.weight.grad is None


def test_values_alone_run_the_trunk_without_a_graph_and_no_head() -> None:
    b, model = batch(), valued()
    ran: dict[str, bool] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.update({name: torch.is_grad_enabled()}))
    model(b["x"], b["document"])
    assert ran["value_head"]
    assert not any(ran[f"layers.{i}"] for i in range(SMALL.trunk_layers)), "a graph that nobody needs"
    assert not [name for name in ran if name.startswith(("heads.", "lm_head"))]


def test_a_given_weighing_is_left_as_it_was() -> None:
    b, model = batch(), valued()
    weighing = Weighing(critic, {}, DISCOUNT)
    args = (b["x"], b["document"], b["labels"], b["mask"], 5)
    first = model(*args, weighing)
    assert weighing.aligned == {} and weighing.discount_lambda == DISCOUNT
    assert torch.equal(model(*args, weighing).w_bsh, first.w_bsh)


def test_export_leaves_the_value_head_out(tmp_path: Path) -> None:
    model = valued()
    export_hf(model.state_dict(), model.spec, tmp_path, tmp_path)
    names = [n for file in tmp_path.glob("*.safetensors") for n in load_file(file)]
    assert names and not [n for n in names if "value" in n]


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, heads=1)
    state = {k: v for k, v in lively(spec).state_dict().items() if k != "lm_head.weight"}
    raw = {f"model.{k.replace('heads.0', f'layers.{spec.trunk_layers}')}": v for k, v in state.items()}
    torch.save(raw | {"score.weight": torch.zeros(1, SMALL.hidden)}, tmp_path / "model.bin")
    assert load_reward_state(tmp_path, spec)["v_head.weight"].shape == (1, SMALL.hidden)
    broken = {k: v for k, v in raw.items() if "layers.1.mlp.up_proj" not in k}
    torch.save(broken | {"score.weight": torch.zeros(3, SMALL.hidden)}, tmp_path / "model.bin")
    with pytest.raises(ModelError) as caught:
        load_reward_state(tmp_path, spec)
    text = str(caught.value)
    assert "2 tensors don't fit" in text and "missing layers.1.mlp.up_proj.weight" in text
    assert f"misshapen v_head.weight [3, {SMALL.hidden}], expected [1, {SMALL.hidden}]" in text
