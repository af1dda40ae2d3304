#!/usr/bin/env python3
"""Make the three small models of the tests, seeded, in seconds.

Usage: tests/test_models/generate.py [--out DIR]

  DIR/test-llama-mtp   Meta layout: params.json, consolidated.pth, tokenizer.model; four heads
  DIR/test-rm-llama    a reward model: config.json, model.bin with v_head.weight, tokenizer.model
  DIR/test-llama       a Hugging Face Llama: config.json, model.safetensors, tokenizer.model

Standard output: the three folders, one a line. Exit codes: 0 done or nothing to do, 2 bad usage or no tokenizer.
A model is made in a temporary folder and renamed, and is left alone while its stamp fits this script and its files.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

VOCAB, DIM, ATTENTION_HEADS, WIDTH, FUTURE = 32000, 64, 4, 192, 4
STD = 0.02


def tokenizer_file() -> Path:
    """The SentencePiece model of 32000 pieces that mistral-common ships."""
    spec = importlib.util.find_spec("mistral_common")
    found = (
        Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
        if spec and spec.submodule_search_locations
        else None
    )
    if found is None or not found.is_file():
        print(
            "generate: no tokenizer.model.v1 of mistral-common; rule: the test models use its 32000 pieces; "
            "next: make install",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return found


def drawn(generator: Generator, *shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, generator=generator) * STD


def meta_layer(g: Generator, prefix: str) -> dict[str, Tensor]:
    import torch

    return {
        f"{prefix}.attention.wq.weight": drawn(g, DIM, DIM),
        f"{prefix}.attention.wk.weight": drawn(g, DIM, DIM),
        f"{prefix}.attention.wv.weight": drawn(g, DIM, DIM),
        f"{prefix}.attention.wo.weight": drawn(g, DIM, DIM),
        f"{prefix}.feed_forward.w1.weight": drawn(g, WIDTH, DIM),
        f"{prefix}.feed_forward.w2.weight": drawn(g, DIM, WIDTH),
        f"{prefix}.feed_forward.w3.weight": drawn(g, WIDTH, DIM),
        f"{prefix}.attention_norm.weight": torch.ones(DIM),
        f"{prefix}.ffn_norm.weight": torch.ones(DIM),
    }


def make_base(folder: Path, g: Generator) -> None:
    """One trunk layer, head 0 as ``layers.1``, three extra heads."""
    import torch

    n_layers = 1 + FUTURE
    state = {"tok_embeddings.weight": drawn(g, VOCAB, DIM)}
    for i in range(n_layers - FUTURE + 1):
        state |= meta_layer(g, f"layers.{i}")
    for i in range(FUTURE - 1):
        state |= meta_layer(g, f"extra_heads.{i}")
    state |= {"norm.weight": torch.ones(DIM), "output.weight": drawn(g, VOCAB, DIM)}
    torch.save(state, folder / "consolidated.pth")
    params = {
        "dim": DIM,
        "n_layers": n_layers,
        "n_heads": ATTENTION_HEADS,
        "vocab_size": VOCAB,
        "n_future_tokens": FUTURE,
        "multiple_of": WIDTH,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    write_json(folder / "params.json", params)


def hf_trunk(g: Generator, layers: int) -> dict[str, Tensor]:
    import torch

    state = {"model.embed_tokens.weight": drawn(g, VOCAB, DIM)}
    for i in range(layers):
        p = f"model.layers.{i}"
        state |= {f"{p}.self_attn.{n}_proj.weight": drawn(g, DIM, DIM) for n in "qkvo"}
        state |= {
            f"{p}.mlp.gate_proj.weight": drawn(g, WIDTH, DIM),
            f"{p}.mlp.up_proj.weight": drawn(g, WIDTH, DIM),
            f"{p}.mlp.down_proj.weight": drawn(g, DIM, WIDTH),
            f"{p}.input_layernorm.weight": torch.ones(DIM),
            f"{p}.post_attention_layernorm.weight": torch.ones(DIM),
        }
    return state | {"model.norm.weight": torch.ones(DIM)}


def hf_config(layers: int, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": DIM,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": ATTENTION_HEADS,
        "num_key_value_heads": ATTENTION_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def make_reward(folder: Path, g: Generator) -> None:
    import torch

    torch.save(hf_trunk(g, 2) | {"v_head.weight": drawn(g, 1, DIM)}, folder / "model.bin")
    write_json(folder / "config.json", hf_config(2, "LlamaForCausalLM"))


def make_reference(folder: Path, g: Generator) -> None:
    from safetensors.torch import save_file

    state = hf_trunk(g, 2) | {"lm_head.weight": drawn(g, VOCAB, DIM)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", hf_config(2, "LlamaForCausalLM"))


MODELS: dict[str, tuple[int, Callable[[Path, Any], None]]] = {
    "test-llama-mtp": (1, make_base),
    "test-rm-llama": (2, make_reward),
    "test-llama": (3, make_reference),
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def content(folder: Path) -> str:
    """A digest of the files' names and bytes."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        data = file.read_bytes() if file.is_file() else b""  # a link may lead nowhere
        found.update(f"{file.name} {len(data)} ".encode() + data)
    return found.hexdigest()


def generate(out: Path) -> list[Path]:
    """The three folders under ``out``; those whose stamp fits are not touched."""
    tokenizer = tokenizer_file()
    wanted = hashlib.sha256(Path(__file__).read_bytes() + tokenizer.read_bytes()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    for name, (seed, make) in MODELS.items():
        final, stamp = out / name, out / f".{name}.stamp"
        if final.is_dir() and stamp.is_file():
            if stamp.read_text() == f"{wanted} {content(final)}\n":
                continue
            if stamp.read_text().startswith(wanted):
                print(f"generate: {final} is not as it was made; it is made again", file=sys.stderr)
        import torch  # seconds: not for a run that has nothing to do

        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out) as scratch:
            staging = Path(scratch) / name
            staging.mkdir()
            make(staging, torch.Generator().manual_seed(seed))
            shutil.copyfile(tokenizer, staging / "tokenizer.model")
            stamp.unlink(missing_ok=True)
            if final.exists():
                final.rename(Path(scratch) / "old")
            staging.rename(final)
        stamp.write_text(f"{wanted} {content(final)}\n")
    return [out / name for name in MODELS]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the small test models.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    for folder in generate(parser.parse_args().out):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
