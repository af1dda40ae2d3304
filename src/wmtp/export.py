"""Models out: a trained or read model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wmtp.model import ModelSpec, _llama_config
from wmtp.weights import EXTRA_HEADS, read_json

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


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
        had = read_json(source / "config.json")
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
