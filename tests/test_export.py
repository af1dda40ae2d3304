"""Models out: what transformers and we ourselves read of them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import SMALL, lively  # type: ignore[import-not-found]  # beside this file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wmtp import export as export_module
from wmtp.export import export_hf
from wmtp.model import MTPModel
from wmtp.weights import load_model, load_state, read_spec

# ---- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [4 << 30, 9_000_000])
def test_export_loads_as_a_plain_llama_and_with_all_heads(
    models: Path, base: MTPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", shard_bytes)
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
    assert all(torch.equal(again[k].whole(), v) for k, v in base.state_dict().items())


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
