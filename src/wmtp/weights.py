"""A model's folder and the model: shapes from its JSON, and weights from its files, tensor by tensor.

The files are mapped, never read whole: every rank looks at their headers, refuses what does not fit, and then copies
its own part of each tensor into its shard. Layouts: Meta's (``params.json``; one file, or several that hold slices of
each matrix) and Hugging Face's (``config.json``; safetensors or torch files, in shards or not; reward models too).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from wmtp.config import Recipe
from wmtp.model import FAMILIES, ModelError, ModelSpec, MTPModel, RewardModel, family_spec, finish_meta, need
from wmtp.vocab import shape_file

AnyModel = TypeVar("AnyModel", MTPModel, RewardModel)
META_WEIGHTS = "consolidated.pth"
EXTRA_HEADS = "mtp_heads.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# ---- shapes, from the JSON alone ----------------------------------------------------------------


def read_spec(
    folder: Path, embedding_rows: Callable[[], int] | None = None, there: Iterable[str] | None = None
) -> ModelSpec:
    """The spec of a model folder, from its JSON alone; the weights' names say which, where it has both layouts'.

    ``there``: the names of all files, where they are elsewhere. A Meta ``vocab_size`` of -1 is read from the weights,
    or asked of ``embedding_rows``. Raises ModelError.
    """
    folder = Path(folder)
    shapes = shape_file(_names(folder) if there is None else there)
    if shapes == "params.json":
        spec = _meta_spec(folder, embedding_rows)
    elif shapes == "config.json":
        path = folder / shapes
        spec = family_spec(read_json(path), str(path))
    else:
        raise ModelError(
            f"{folder}: neither params.json nor config.json",
            "a model is a folder in Meta's layout or in Hugging Face's",
            "look at the folder, or at the path in paths.models",
        )
    _check_spec(folder, spec)
    return spec


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _check_spec(folder: Path, spec: ModelSpec) -> None:
    findings = [
        f"{name} = {value}"
        for name, value, least in (
            ("heads", spec.heads, 1),
            ("hidden", spec.hidden, 1),
            ("trunk layers", spec.trunk_layers, 0),
            ("attention heads", spec.n_heads, 1),
            ("key-value heads", spec.n_kv_heads, 1),
            ("intermediate", spec.intermediate, 1),
            ("vocab_size", spec.vocab_size, 1),
        )
        if value < least
    ]
    if not findings and (spec.head_width % 2 or (spec.head_dim is None and spec.hidden % spec.n_heads)):
        findings.append(f"hidden {spec.hidden} with {spec.n_heads} attention heads, head_dim {spec.head_dim}")
    if not findings and spec.n_heads % spec.n_kv_heads:
        findings.append(f"{spec.n_heads} attention heads with {spec.n_kv_heads} key-value heads")
    if findings:
        raise ModelError(
            f"{folder}: {', '.join(findings)}",
            "sizes are positive and divide each other; n_layers counts trunk and heads",
            "compare the folder's JSON with the model's source",
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}", "it is one JSON object", "fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not an object", "it is one JSON object", "fetch the model again")
    return content


PARAMS: dict[str, type] = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "n_future_tokens": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "norm_eps": float,
    "rope_theta": float,
    "use_scaled_rope": bool,
    "max_seq_len": int,
    "max_batch_size": int,
}
"""What a params.json may say; another key may stand for other arithmetic. A null says nothing."""


def _meta_spec(folder: Path, embedding_rows: Callable[[], int] | None) -> ModelSpec:
    path = folder / "params.json"
    params = {key: value for key, value in read_json(path).items() if value is not None}
    refused = [
        f"{key} {json.dumps(value)}"
        for key, value in params.items()
        if type(value) is not PARAMS.get(key) and not (type(value) is int and PARAMS.get(key) is float)
    ]
    if not refused:
        refused = [f"{key} {params[key]}" for key in ("multiple_of", "ffn_dim_multiplier") if params.get(key, 1) <= 0]
    if params.get("use_scaled_rope") is True:
        refused.append("use_scaled_rope true")
    if refused:
        raise ModelError(
            f"{path}: {', '.join(refused)}",
            f"Meta's layout is read where it says {', '.join(PARAMS)} (numbers, and use_scaled_rope false) and no more",
            "take the model in Hugging Face's layout, whose config.json says its rotary scaling and the like",
        )
    dim, n_layers, n_heads = need(params, str(path), "dim", "n_layers", "n_heads")
    heads = params.get("n_future_tokens", 1)
    vocab = params.get("vocab_size", -1)
    if vocab < 0:
        vocab = embedding_rows() if embedding_rows else rows_of_embedding(str(folder), mapped_tensors(folder))
    return ModelSpec(
        layout="meta",
        heads=heads,
        hidden=dim,
        trunk_layers=n_layers - heads,
        n_heads=n_heads,
        n_kv_heads=params.get("n_kv_heads", n_heads),
        intermediate=feed_forward_width(dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
        vocab_size=vocab,
        norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_theta=float(params.get("rope_theta", 10000.0)),
        max_positions=params.get("max_seq_len", 4096),
    )


def rows_of_embedding(name: str, raw: Mapping[str, Stored]) -> int:
    """The vocabulary of a Meta model whose JSON leaves it open. Raises ModelError where no embedding is there."""
    key = "tok_embeddings.weight"
    if key not in raw or len(raw[key].shape) != 2:
        raise ModelError(
            f"{name}: vocab_size is -1, and no matrix {key} is there",
            "a vocabulary that params.json leaves open is the embedding's",
            "publish or sync the model again",
        )
    return raw[key].shape[0]


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Meta's rule, which their files leave implicit."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


# ---- tensors in files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor where its files have it; a part of it is read when it is copied."""

    pieces: tuple[Tensor, ...]
    """Mapped, or without data where only headers were read."""
    dim: int = 0
    """Along which the pieces follow each other."""
    n_heads: int = 0
    """Set: the rows are in Meta's rotary order (pairs side by side), and wanted in transformers' (halves)."""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        if len(self.pieces) > 1:
            shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def copy_to(self, target: Tensor, offset: tuple[int, ...]) -> None:
        """Fill ``target`` with the part of its shape that begins at ``offset``, in its dtype and on its device."""
        at = 0
        for piece in self.pieces:
            size = piece.shape[self.dim] if piece.ndim else 1
            if self.n_heads:
                rows = half_split_rows(self.shape[0], self.n_heads)[offset[0] : offset[0] + len(target)]
                here = (rows >= at) & (rows < at + size)
                target[here.to(target.device)] = piece[rows[here] - at].to(target.device, target.dtype)
            elif piece.ndim:
                there = [slice(first, first + n) for first, n in zip(offset, target.shape, strict=True)]
                first, last = max(there[self.dim].start, at), min(there[self.dim].stop, at + size)
                if first < last:
                    into = target.narrow(self.dim, first - offset[self.dim], last - first)
                    there[self.dim] = slice(first - at, last - at)
                    into.copy_(piece[tuple(there)])
            at += size

    def whole(self) -> Tensor:
        """All of it, contiguous: as it is mapped where it is one piece as it should be, else a copy."""
        if len(self.pieces) == 1 and not self.n_heads:
            return self.pieces[0].contiguous()
        target = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(target, (0,) * target.ndim)
        return target


def half_split_rows(rows: int, n_heads: int) -> Tensor:
    """Which of Meta's query or key rows is transformers' row ``i``: ``[rows]``."""
    return torch.arange(rows).view(n_heads, rows // n_heads // 2, 2).transpose(1, 2).reshape(rows)


@torch.no_grad()
def stream(model: torch.nn.Module, state: Mapping[str, Stored]) -> None:
    """Fill a model that has memory, sharded or not, from ``state``: no rank reads or holds more than its own part."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            target = parameter.to_local()
        else:
            target, offset = parameter.data, (0,) * parameter.ndim
        if target.numel():
            state[name].copy_to(target, tuple(offset))


def read_tensors(
    folder: Path, name: str, there: Iterable[str], read: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, Stored]:
    """Every tensor of a model under its name in the files.

    ``folder`` has the JSON files, ``there`` the names of all files, ``read`` gives the tensors of one; ``name`` is for
    the messages. Raises ModelError with every file or tensor that is not where it should be.
    """
    names = set(there)
    if shape_file(names) == "params.json":
        files = meta_files(name, names)
        return _joined(name, {file: read(file) for file in files}, read_json(folder / "params.json").get("dim"))
    files, index = weight_files(folder, name, names)
    _refuse(name, [f"{file}: not there" for file in files if file not in names])
    found: dict[str, Stored] = {}
    where: dict[str, str] = {}
    wrong: list[str] = []
    for file in files:
        for key, tensor in read(file).items():
            if key in where:
                wrong.append(f"{key}: in {where[key]} and in {file}")
            found[key], where[key] = Stored((tensor,)), file
    wrong += [f"{key}: not in {file}, where the index has it" for key, file in index.items() if where.get(key) != file]
    _refuse(name, wrong)
    return found


def _refuse(name: str, wrong: list[str]) -> None:
    if wrong:
        raise ModelError(
            f"{name}: {len(wrong)} findings in its files:\n  " + "\n  ".join(wrong) + "\n",
            "every file and every tensor is there once, where the index says",
            "publish or sync the model again",
        )


def meta_files(name: str, there: Iterable[str]) -> list[str]:
    """The files of Meta's layout: one, or those of its model-parallel ranks in their order."""
    names = set(there)
    found = sorted(file for file in names if re.fullmatch(r"consolidated\.\d\d\.pth", file))
    if META_WEIGHTS in names:
        _refuse(name, [f"{file}: beside {META_WEIGHTS}" for file in found])
        return [META_WEIGHTS]
    count = int(found[-1].split(".")[1]) + 1 if found else 1
    wanted = [f"consolidated.{n:02d}.pth" for n in range(count)] if found else [META_WEIGHTS]
    _refuse(name, [f"{file}: not there" for file in wanted if file not in names])
    return wanted


def _joined(name: str, files: Mapping[str, Mapping[str, Tensor]], hidden: int | None) -> dict[str, Stored]:
    """Tensors of Meta's files: matrices in slices, side by side or one below the other; vectors repeated in each."""
    found: dict[str, Stored] = {}
    wrong: list[str] = []
    for key in dict.fromkeys(key for tensors in files.values() for key in tensors):
        lacking = [file for file, tensors in files.items() if key not in tensors]
        if lacking:
            wrong.append(f"{key}: not in {', '.join(lacking)}")
            continue
        first, *others = pieces = tuple(tensors[key] for tensors in files.values())
        dim = int(key.endswith(("wo.weight", "w2.weight")))
        if key == "tok_embeddings.weight":  # Llama 3 cuts the vocabulary, those before it the hidden size
            dim = int(first.ndim == 2 and first.shape[1] != hidden)
        if any(p.dtype != first.dtype or p.ndim != first.ndim for p in others) or (
            first.ndim == 2 and any(p.shape[1 - dim] != first.shape[1 - dim] for p in others)
        ):
            wrong.append(f"{key}: {' and '.join(str(list(p.shape)) for p in pieces)} are not slices of one matrix")
        elif first.ndim == 2:
            found[key] = Stored(pieces, dim)
        elif any(p.shape != first.shape or (p.device.type != "meta" and not torch.equal(p, first)) for p in others):
            wrong.append(f"{key}: not the same in every file")
        else:
            found[key] = Stored((first,))
    _refuse(name, wrong)
    return found


def weight_files(folder: Path, name: str, there: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The files of a Hugging Face folder that hold its weights, and its index: the file of each tensor.

    ``there``: the names of all files; the JSON files are in ``folder``. Raises ModelError.
    """
    names = set(there)
    extra = [EXTRA_HEADS] if EXTRA_HEADS in names else []
    for file in ("model.safetensors", "pytorch_model.bin", "model.bin"):
        index = f"{file}.index.json"
        if index in names:
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(s, str) and Path(s).name == s for s in shards.values()
            ):
                raise ModelError(
                    f"{name}/{index}: no weight_map of plain file names",
                    "an index names the file of each tensor",
                    "sync the model again",
                )
            stem, _, suffix = file.rpartition(".")
            shard = re.compile(rf"{stem}-\d+-of-\d+\.{suffix}")
            unnamed = sorted(n for n in names - set(shards.values()) if shard.fullmatch(n))
            _refuse(name, [f"{n}: a shard that {index} does not name" for n in unnamed])
            return [*sorted(set(shards.values())), *extra], shards
        if file in names:
            return [file, *extra], {}
    found = sorted(n for n in names if n.endswith((".pt", ".pth")) and "/" not in n)
    if len(found) == 1:
        return found + extra, {}
    raise ModelError(
        f"{name}: no weights ({len(found)} .pt or .pth files)",
        "model.safetensors, pytorch_model.bin (or their .index.json), model.bin or one .pt file",
        "sync the model again",
    )


def mapped_tensors(folder: Path) -> dict[str, Stored]:
    """`read_tensors` of a folder on this machine, mapped from its files."""
    return read_tensors(folder, str(folder), _names(folder), lambda file: _mapped(folder / file))


def _mapped(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)  # maps the file
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {error}", "a whole file of weights", "sync the model again") from None
    except Exception as error:  # torch raises half a dozen types for a torn or unsafe file
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: {first}",
            "a zip-format torch file with tensors only",
            "sync the model again; an old pickle must be saved anew",
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path}: not a flat dictionary of tensors", "a plain state dict", "save it as one")
    return content


# ---- from the files' names to the model's ----------------------------------------------------------

META_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
META_ROOT = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}


def load_state(folder: Path, spec: ModelSpec) -> dict[str, Stored]:
    """The whole state under ``MTPModel``'s names, in its files.

    Raises ``ModelError`` with every tensor that is missing, unexpected, misshapen or of another dtype.
    """
    return model_state(folder, spec, mapped_tensors(Path(folder)))


def model_state(folder: Path | str, spec: ModelSpec, raw: Mapping[str, Stored]) -> dict[str, Stored]:
    """`load_state` of tensors that were found; they may be without data. ``folder`` is for the messages."""
    if spec.layout == "meta":
        state, unexpected = _rename(raw, lambda key: _meta_name(key, spec))
        for part, n_heads in (("q_proj.weight", spec.n_heads), ("k_proj.weight", spec.n_kv_heads)):
            for key in (key for key in state if key.endswith(part)):
                state[key] = Stored(state[key].pieces, state[key].dim, n_heads)
    else:
        state, unexpected = _rename(raw, lambda key: _hf_name(key, spec))
        if spec.tied and "embed_tokens.weight" in state:
            state.setdefault("lm_head.weight", state["embed_tokens.weight"])
    with torch.device("meta"):
        _compare(folder, MTPModel(spec), state, unexpected)
    return state


def heads_refused(name: str, has: int, wanted: int, new_heads: bool) -> tuple[str, str, str] | None:
    """What is wrong, the rule, the next step, where ``wanted`` heads can't be had of a checkpoint with ``has``."""
    if has == wanted or (has < wanted and new_heads):
        return None
    return (
        f"model.heads: {wanted}, but {name} has {has}",
        "heads are what the checkpoint has; model.new_heads makes those that it lacks of its last layer",
        f"--set model.heads={has}" + (", or --set model.new_heads=true" if has < wanted else ""),
    )


def positions_refused(name: str, spec: ModelSpec, longest: int) -> tuple[str, str, str] | None:
    """`heads_refused`, of rows that have more positions than the model."""
    # Meta's files do not say how many positions they were made for.
    if spec.layout == "meta" or longest <= spec.max_positions:
        return None
    return (
        f"rows of {longest}, but {name} has {spec.max_positions} positions",
        "a row is at most as long as the model's positions",
        f"data.train.max_length and data.eval.max_length: at most {spec.max_positions}",
    )


def vocabulary_refused(name: str, spec: ModelSpec, recipe: Recipe, pieces: int) -> tuple[str, str, str] | None:
    """`heads_refused`, of the vocabulary; ``pieces``: those of the tokenizer."""
    if spec.vocab_size != recipe.model.vocab_size or pieces > spec.vocab_size:
        return (
            f"{name}: vocab_size {spec.vocab_size}, its tokenizer has {pieces} pieces, "
            f"model.vocab_size is {recipe.model.vocab_size}",
            "a run's models have the vocabulary that model.vocab_size says, and a row of it for each piece",
            "name its size in model.vocab_size, or another model in paths.models",
        )
    return None


def base_refused(name: str, spec: ModelSpec, recipe: Recipe, pieces: int) -> tuple[str, str, str] | None:
    """`heads_refused`, of everything that a recipe wants of its base model; ``pieces``: those of its tokenizer."""
    return (
        vocabulary_refused(name, spec, recipe, pieces)
        or heads_refused(name, spec.heads, recipe.model.heads, recipe.model.new_heads)
        or positions_refused(name, spec, recipe.data.longest)
    )


def add_heads(state: Mapping[str, Stored], heads: int) -> dict[str, Stored]:
    """``state`` with ``heads`` heads: those that it lacks are the model's last layer, head 0, once more."""
    last = {key.removeprefix("heads.0."): stored for key, stored in state.items() if key.startswith("heads.0.")}
    return {f"heads.{k}.{part}": stored for k in range(heads) for part, stored in last.items()} | {**state}


def value_head_state(spec: ModelSpec) -> dict[str, Stored]:
    """A new value head: zeros, so that it adds no weight before it has learned anything, and draws from no stream."""
    return {"value_head.weight": Stored((torch.zeros(1, spec.hidden),))}


def load_reward_state(folder: Path, spec: ModelSpec) -> dict[str, Stored]:
    """The whole state under ``RewardModel``'s names, from a Hugging Face folder.

    The reward is `v_head.weight` `[1, D]` (Starling) or `score.weight` `[1, D]` (sequence classification); an
    unembedding that came along is left out. Raises ``ModelError`` with every tensor that doesn't fit.
    """
    _need_hf(folder, spec)
    return reward_state(folder, spec, mapped_tensors(Path(folder)))


def _need_hf(folder: Path | str, spec: ModelSpec) -> None:
    plain = spec.layout == "hf"
    if not plain or not FAMILIES[spec.family].rotary:
        raise ModelError(
            f"{folder}: {f'model_type {spec.family}' if plain else 'params.json without config.json'}",
            f"a reward model is a Hugging Face folder of {', '.join(k for k, f in FAMILIES.items() if f.rotary)}",
            "name another in paths.models.rm",
        )


def reward_state(folder: Path | str, spec: ModelSpec, raw: Mapping[str, Stored]) -> dict[str, Stored]:
    """`load_reward_state` of tensors that were found; they may be without data. ``folder`` is for the messages."""
    _need_hf(folder, spec)
    state, unexpected = _rename(raw, lambda key: _reward_name(key, spec))
    state.pop("lm_head.weight", None)
    with torch.device("meta"):
        _compare(folder, RewardModel(spec), state, unexpected)
    return state


def load_reward(folder: Path, device: torch.device | str) -> RewardModel:
    """One whole reward model on one device, in float32."""
    spec = read_spec(folder)
    return _whole_model(RewardModel, spec, load_reward_state(folder, spec), device)


def load_model(folder: Path, device: torch.device | str) -> MTPModel:
    """One whole model on one device, in float32 (the registry's ``standardized-model-loader``)."""
    spec = read_spec(folder)
    return _whole_model(MTPModel, spec, load_state(folder, spec), device)


def _whole_model(
    kind: type[AnyModel], spec: ModelSpec, state: Mapping[str, Stored], device: torch.device | str
) -> AnyModel:
    with torch.device("meta"):
        model = kind(spec)
    finish_meta(model, device)
    stream(model, state)
    return model


def _rename(raw: Mapping[str, Stored], name_of: Callable[[str], str | None]) -> tuple[dict[str, Stored], list[str]]:
    state: dict[str, Stored] = {}
    unexpected = []
    for key, stored in raw.items():
        if key.endswith(("rotary_emb.inv_freq", "rope.freqs", ".attn.bias", ".attn.masked_bias")):
            continue  # computed, never learned
        name = name_of(key)
        if name is None or name in state:
            unexpected.append(key)
        else:
            state[name] = stored
    return state, unexpected


def _reward_name(key: str, spec: ModelSpec) -> str | None:
    if key in ("v_head.weight", "score.weight"):
        return "v_head.weight"
    return key if key == "lm_head.weight" else _plain_name(key, spec)


def _meta_name(key: str, spec: ModelSpec) -> str | None:
    if key in META_ROOT:
        return META_ROOT[key]
    found = re.fullmatch(r"(layers|extra_heads)\.(\d+)\.(.+)", key)
    if not found or found[3] not in META_NAMES:
        return None
    number = int(found[2])
    if found[1] == "extra_heads":
        place = f"heads.{number + 1}"
    elif number == spec.trunk_layers:
        place = "heads.0"
    else:
        place = f"layers.{number}"
    return f"{place}.{META_NAMES[found[3]]}"


def _hf_name(key: str, spec: ModelSpec) -> str | None:
    if key == "lm_head.weight" or re.fullmatch(r"heads\.[1-9]\d*\..+", key):
        return key
    name, last = _plain_name(key, spec), f"layers.{spec.trunk_layers}."
    return f"heads.0.{name.removeprefix(last)}" if name and name.startswith(last) else name


def _plain_name(key: str, spec: ModelSpec) -> str | None:
    root, _, rest = re.sub(r"^(model|transformer)\.", "", key).partition(".")
    ours = FAMILIES[spec.family].roots.get(root)
    return ours and f"{ours}.{rest}"


def _compare(
    folder: Path | str, model: torch.nn.Module, state: Mapping[str, Stored], unexpected: Iterable[str]
) -> None:
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    both = {k: state[k] for k in sorted(expected.keys() & state.keys())}
    lines = [f"missing {k}" for k in sorted(expected.keys() - state.keys())]
    lines += [f"unexpected {k}" for k in sorted({*unexpected, *(state.keys() - expected.keys())})]
    lines += [
        f"misshapen {k} {list(stored.shape)}, expected {list(expected[k])}"
        for k, stored in both.items()
        if stored.shape != expected[k]
    ]
    kinds = Counter(v.dtype for k, v in both.items() if v.dtype in FLOATS and len(v.shape) > 1 and k != "v_head.weight")
    usual = kinds.most_common(1)[0][0] if kinds else torch.float32
    for k, stored in both.items():
        if stored.dtype not in FLOATS:
            lines.append(f"{stored.dtype} {k}, expected float32, bfloat16 or float16".replace("torch.", ""))
        elif stored.dtype != usual and len(stored.shape) > 1 and k != "v_head.weight":
            lines.append(f"{stored.dtype} {k}, but most matrices are {usual}".replace("torch.", ""))
    if lines:
        raise ModelError(
            f"{folder}: {len(lines)} tensors don't fit:\n  " + "\n  ".join(lines) + "\n",
            "names and shapes are those that the folder's JSON gives, and the matrices of a model have one dtype",
            "compare JSON and weights, or sync the model again",
        )
