"""Models out: any model that is read here as a Hugging Face folder, or back in Meta's layout.

    python -m wmtp.export --from FOLDER --to FOLDER --layout hf|meta

Tensors go from mapped files to the new file. Copied in memory are only rows of queries and keys whose order changes and
slices that are joined: those of one file of the new folder, 4 GiB at most in Hugging Face's layout, all of them in
Meta's. The new folder appears when it is whole, and an old one is never written over. Exit codes: 0 done, 2 a model or
a place that can't be used, 10 the disk is full or can't be written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import Tensor

from wmtp.model import FAMILIES, ModelError, ModelSpec, family_settings
from wmtp.paths import open_to_all
from wmtp.weights import (
    EXTRA_HEADS,
    META_NAMES,
    META_ROOT,
    META_WEIGHTS,
    Stored,
    feed_forward_width,
    half_split_rows,
    load_state,
    read_json,
    read_spec,
)

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
LICENCES = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*", "COPYING*")
CARD = "README.md"


# ---- Hugging Face's layout ------------------------------------------------------------------------


def export_hf(
    state: Mapping[str, Tensor | Stored], spec: ModelSpec, folder: Path, source: Path, told: Sequence[str] = ()
) -> None:
    """Write a Hugging Face folder: head 0 as the last layer, the other heads in ``mtp_heads.safetensors``.

    ``AutoModelForCausalLM`` loads it as a plain model of its family; ``read_spec`` and ``load_state`` read all its
    heads. Tokenizer, licences and generation settings come from ``source``; ``told``: sentences of the card about how
    it was made.
    """
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[spec.family]
    theirs = {ours: f"{family.base}.{root}" for root, ours in family.roots.items()}
    plain: dict[str, Tensor | Stored] = {}
    extra: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("value_head."):
            continue  # no part of a language model
        if key.startswith("heads.0."):
            plain[f"{theirs['layers']}.{spec.trunk_layers}.{key.removeprefix('heads.0.')}"] = value
        elif key.startswith("heads."):
            extra[key] = _whole(value)
        elif key == "lm_head.weight":
            if not spec.tied:
                plain[key] = value
        else:
            root, _, rest = key.partition(".")
            plain[f"{theirs[root]}.{rest}"] = value
    shards = _shards(plain)
    for number, shard in enumerate(shards, 1):
        _save({key: _whole(plain[key]) for key in shard}, folder / _shard_name(number, len(shards)))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in plain.values())},
            "weight_map": {
                k: _shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for k in shard
            },
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if extra:
        _save(extra, folder / EXTRA_HEADS)
    config = family_settings(spec) | {
        "model_type": spec.family,
        "architectures": [family.prefix + family.causal],
        "n_future_tokens": spec.heads,
        "dtype": str(next(iter(plain.values())).dtype).removeprefix("torch."),
    }
    if family.rotary:  # the words of before transformers 5, which others still read
        rope = config["rope_parameters"]
        config |= {"rope_theta": spec.rope_theta} | ({"rope_scaling": rope} if rope["rope_type"] != "default" else {})
    if (source / "config.json").is_file():
        had = read_json(source / "config.json")
        config |= {k: had[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in had}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _copy(source, folder, (*TOKENIZER_FILES, "generation_config.json"))
    write_card(source, folder, spec, told)


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    """What the libraries say of a disk that is full or can't be written, as an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        said = str(error).partition("\n")[0]
        raise OSError(int(number[1]) if number else errno.ENOSPC, f"not written whole ({said})", str(file)) from error


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    with _disk(file):
        save_file(dict(tensors), file, metadata={"format": "pt"})
    open_to_all(file)


def _whole(value: Tensor | Stored) -> Tensor:
    return value.whole() if isinstance(value, Stored) else value.detach().cpu().contiguous()


def _copy(source: Path, folder: Path, patterns: Iterable[str]) -> list[str]:
    """The names of the files of ``source`` that are like one of ``patterns``, in any case, now also in ``folder``."""
    names = sorted(
        path.name
        for path in source.iterdir()
        if path.is_file() and any(fnmatchcase(path.name.lower(), pattern.lower()) for pattern in patterns)
    )
    for name in names:
        if source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    return names


def _licence(card: Path) -> dict[str, Any]:
    """What the front matter of a model card says under keys that begin with ``license``."""
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"\ufeff?---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", text, re.DOTALL)
    try:
        said = YAML(typ="safe").load(front[1]) if front else None
    except (YAMLError, ValueError):  # theirs, and no reason to end an export
        said = None
    return {k: v for k, v in said.items() if str(k).startswith("license")} if isinstance(said, dict) else {}


def write_card(source: Path, folder: Path, spec: ModelSpec, told: Sequence[str] = ()) -> None:
    """A model card that says what the folder is, and the source's licences, copied beside it."""
    licence = _licence(source / CARD)
    named = licence.get("license_name") or licence.get("license")
    files = _copy(source, folder, LICENCES)
    base = source.resolve().name
    lines = [
        *(
            [
                "---",
                *(f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in licence.items()),
                "---",
                "",
            ]
            if licence
            else []
        ),
        f"# {base}, with {spec.heads} heads",
        "",
        f"A {FAMILIES[spec.family].prefix} of {spec.trunk_layers} layers and {spec.heads} heads. Head `k` is one layer",
        "on these, and predicts the token after the next `k`; head 0 is the last layer of the plain model. In Hugging",
        f"Face's layout the others are in `{EXTRA_HEADS}`, and what does not know them loads the plain model.",
        "",
        f"Made of `{base}` with WMTP.",
        *told,
        "",
        "## Licence",
        "",
        f"{f'`{named}`, as the source says' if named else 'See the source'}"
        f"{'; its own words: ' + ', '.join(f'`{name}`' for name in files) if files else ''}.",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n")


def _shards(tensors: Mapping[str, Tensor | Stored]) -> list[list[str]]:
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


# ---- Meta's layout ---------------------------------------------------------------------------------


def export_meta(state: Mapping[str, Stored], spec: ModelSpec, folder: Path, source: Path) -> None:
    """Write ``params.json`` and ``consolidated.pth``; tensors that were read from Meta's files keep their bytes.

    Raises ModelError for a model that the layout has no words for.
    """
    params = _meta_params(spec, source)
    theirs = {ours: name for name, ours in (META_NAMES | META_ROOT).items()}
    named: dict[str, Tensor] = {}
    for key, stored in state.items():
        kind, _, rest = key.partition(".")
        number, _, rest = rest.partition(".")
        if kind == "layers" or (kind == "heads" and number == "0"):
            place = f"layers.{number if kind == 'layers' else spec.trunk_layers}."
        else:
            place = f"extra_heads.{int(number) - 1}." if kind == "heads" else ""
        named[place + theirs[rest if place else key]] = _meta_order(key, stored, spec)
    folder.mkdir(parents=True, exist_ok=True)
    with _disk(folder / META_WEIGHTS):
        torch.save(named, folder / META_WEIGHTS)
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    _copy(source, folder, TOKENIZER_FILES)
    write_card(source, folder, spec)


def _meta_order(key: str, stored: Stored, spec: ModelSpec) -> Tensor:
    if stored.n_heads:  # it is in Meta's order where it lies
        return dataclasses.replace(stored, n_heads=0).whole()
    whole = stored.whole()
    n_heads = {"q_proj.weight": spec.n_heads, "k_proj.weight": spec.n_kv_heads}.get(key.rpartition("self_attn.")[2])
    return whole if n_heads is None else whole[half_split_rows(len(whole), n_heads).argsort()]


def _meta_params(spec: ModelSpec, source: Path) -> dict[str, Any]:
    if spec.layout == "meta":
        return read_json(source / "params.json")
    refused = [
        what
        for what, bad in (
            (f"model_type {spec.family}", spec.family != "llama"),
            (spec.own, spec.own != "{}"),
            (f"head_dim {spec.head_dim}", spec.head_dim is not None),
            ("tied unembedding", spec.tied),
            (
                f"intermediate_size {spec.intermediate}",
                feed_forward_width(spec.hidden, spec.intermediate) != spec.intermediate,
            ),
        )
        if bad
    ]
    if refused:
        raise ModelError(
            f"{source}: {', '.join(refused)}",
            "Meta's layout is a Llama without biases and with plain rotary positions, an unembedding of its own, and a"
            " feed-forward width of at least 8/3 of the hidden size",
            "--layout hf",
        )
    return {
        "dim": spec.hidden,
        "n_layers": spec.trunk_layers + spec.heads,
        "n_heads": spec.n_heads,
        "n_kv_heads": spec.n_kv_heads,
        "n_future_tokens": spec.heads,
        "vocab_size": spec.vocab_size,
        "multiple_of": spec.intermediate,
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "max_seq_len": spec.max_positions,
    }


# ---- the entry point -------------------------------------------------------------------------------


def convert(source: Path, target: Path, layout: str) -> None:
    """``source`` in another layout as ``target``, which appears when it is whole. Raises ModelError, OSError."""
    if target.exists():
        raise ModelError(f"{target}: is there", "a model is not written over", "name a folder that is not there")
    spec = read_spec(source)
    state = load_state(source, spec)
    staging = target.with_name(f".{target.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (export_hf if layout == "hf" else export_meta)(state, spec, staging, source)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--layout", choices=("hf", "meta"), required=True)
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.target, args.layout)
    except ModelError as error:
        print(
            f"export    FAIL  {error.what}\n          rule  {error.rule}\n          next  {error.next_step}",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(
            f"export    FAIL  {error}\n          rule  the target's disk has room for the model and can be written"
            "\n          next  free some, or --to elsewhere",
            file=sys.stderr,
        )
        return 10
    print(args.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
