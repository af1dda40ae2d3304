"""Bytes per GPU, before there is one: the run's own step, sharded as it will be, on tensors without data.

torch's fake tensors have shapes and storages but no memory, and a fake process group answers every collective, so one
process on a laptop walks through the step of a 7B model over four ranks and counts what lives. What it can't count is
outside of tensors: the CUDA context, kernels' own workspaces, NCCL's buffers, fragmentation. `MARGIN` stands for these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wmtp.config import Config, Recipe
from wmtp.model import ModelSpec, MTPModel, RewardModel
from wmtp.objective import make_labels
from wmtp.optim import adamw
from wmtp.ranks import Place
from wmtp.step import Micro, Share, Weighting, accumulate, first_pass
from wmtp.train import allocate, die_with_parent, mesh_of, planned_model

T = TypeVar("T")
GIB = 2**30
MARGIN = 0.10
"""Share of a GPU's memory that is left to what no tensor shows."""
WEIGHTS, GATHERED, ACTIVATIONS, GRADIENTS, ADAM, OTHER = (
    "weights",
    "gathered weights",
    "activations",
    "gradients",
    "Adam",
    "other",
)


@dataclass(frozen=True)
class Peak:
    """The most that lives at once in a phase of the run, on one rank."""

    phase: str
    parts: dict[str, int]
    """Bytes by category at that moment."""

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that were made under it and live, by the category of their making."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = OTHER
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, list[Any]] = {}
        self._total = self._most = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> LiveBytes:
        mode = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = mode._resize(storage, size)
            if entry := mode._known.get(storage._cdata):
                mode._add(entry[0], -entry[1])
                # FSDP alone resizes: it frees and fills the gathered parameters of a unit.
                entry[:] = [GATHERED, size]
                mode._add(*entry)
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]  # put back below
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]  # as it was
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if func.namespace == "fsdp" and "split_with_sizes_copy" in func.name():  # where FSDP fills gathered parameters
            self.name((leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)), GATHERED)
        return out

    def begin(self) -> None:
        """The peak is looked for from here on."""
        self._most, self.peak = self._total, Counter(self.now)

    def name(self, tensors: Iterator[Tensor], kind: str) -> None:
        """Put what these hold under a category of their own."""
        for tensor in tensors:
            if entry := self._known.get(_local(tensor).untyped_storage()._cdata):
                self._add(entry[0], -entry[1])
                entry[0] = kind
                self._add(*entry)

    def _note(self, leaf: Tensor) -> None:
        local = _local(leaf)
        if local.device.type == "meta":
            return
        storage = local.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if entry := self._known.get(key):
            if entry[1] != size:
                self._add(entry[0], size - entry[1])
                entry[1] = size
            return
        self._known[key] = [self.kind, size]
        self._add(self.kind, size)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, Counter(self.now)


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


_worker: list[ProcessPoolExecutor] = []


def _settle() -> None:
    """Begin a forked process: the parent's pool of threads is made anew before threads of autograd's race to do it."""
    die_with_parent()
    torch.set_num_threads(torch.get_num_threads())


def apart(function: Callable[..., T], *args: Any) -> Future[T]:
    """``function(*args)`` in a process of its own, which stays for the next ones.

    A fake group leaves its ranks in torch's caches, where real ranks that are forked later would find them.
    """
    if not _worker:
        _worker.append(ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _settle))
    return _worker[0].submit(function, *args)


@contextlib.contextmanager
def ranks(world: int) -> Iterator[Place]:
    """A place among ``world`` ranks that need not exist: collectives give at once, and change nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield Place(torch.device("cpu"), world, 0)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def place_of(config: Config) -> Iterator[Place]:
    """Rank 0 of the run that ``config`` describes, as `train.start_ranks` would have it."""
    half = config.devices.mixed_precision == "bf16"
    if not config.devices.distributed.enabled:
        yield Place(torch.device("cpu"), half=half)
        return
    with ranks(max(1, config.launcher.resources.gpus)) as place:
        yield dataclasses.replace(place, half=half and not config.devices.fsdp.enabled)


def _as_there(model: MTPModel | RewardModel, config: Config) -> None:
    """What a model would choose by its device, which is not the one of these tensors."""
    if isinstance(model, MTPModel) and model.lm_head.positions is None:
        model.lm_head.positions = model.lm_head.auto_positions(model.spec.heads, config.devices.compute_backend)


def _share(recipe: Recipe, rows: int, length: int, scored: bool) -> Share:
    heads = recipe.model.heads
    x = torch.zeros(rows, length, dtype=torch.int64)
    pad = torch.zeros(rows, length, dtype=torch.bool)
    labels, mask = make_labels(x, heads, x, pad)
    score = torch.zeros(rows, length) if scored else None
    # A third micro-batch adds nothing to what lives.
    micro = [Micro(x, x, pad, labels, mask, score) for _ in range(min(recipe.train.accumulation_steps, 2))]
    return Share(micro, torch.ones((), dtype=torch.int64), rows * length)


_known: dict[str, Peak] = {}


def step_peak(config: Config, recipe: Recipe, spec: ModelSpec) -> Peak:
    """A training step once Adam's moments exist: forward, backward, the optimizer."""
    weighting = Weighting(recipe)
    train = recipe.data.train
    sizes = [train.batch_size, train.max_length, min(recipe.train.accumulation_steps, 2), recipe.loss.chunk_positions]
    key = json.dumps(
        [
            config.devices.model_dump(),
            config.launcher.resources.gpus,
            sizes,
            str(spec),
            weighting.needs_value,
            weighting.skips,
        ],
        default=str,
    )
    if key not in _known:
        _known[key] = _step_peak(config, recipe, spec, weighting)
    return _known[key]


def _step_peak(config: Config, recipe: Recipe, spec: ModelSpec, weighting: Weighting) -> Peak:
    config = _with(config, ["devices", "compile"], False)  # what is compiled keeps as much, or a little less
    weighting.centred = False  # a few numbers a head, but a fake tensor can't be asked for its value
    scored = weighting.needs_reference or weighting.needs_value
    live = LiveBytes()
    with place_of(config) as place:
        mesh = mesh_of(config, place)
        model = planned_model(config, recipe, spec, weighting)
        _as_there(model, config)
        with FakeTensorMode(allow_non_fake_inputs=True), live:
            live.kind = WEIGHTS
            allocate(model, config, mesh, place)
            model.train()
            optimizer = adamw(model, recipe)
            if config.devices.compute_backend == "cuda":  # as `adamw` has it there
                for group in optimizer.param_groups:
                    group["fused"] = True
            live.kind = OTHER
            share = _share(recipe, recipe.data.train.batch_size, recipe.data.train.max_length, scored)
            live.kind = ADAM
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            live.begin()
            live.kind = ACTIVATIONS
            fixed: list[Tensor | None] = [None] * len(share.micro)
            if weighting.skips:
                fixed = [*first_pass(model, share, place)]
            with _marked_backward(live):
                accumulate(model, share, weighting, place, fixed)
            live.kind = OTHER
            optimizer.step()
    return Peak("step", dict(+live.peak))


@contextlib.contextmanager
def _marked_backward(live: LiveBytes) -> Iterator[None]:
    """What is made while gradients flow is theirs."""
    whole = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        before, live.kind = live.kind, GRADIENTS
        try:
            whole(self, *args, **kwargs)
        finally:
            live.kind = before

    Tensor.backward = backward  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        Tensor.backward = whole  # type: ignore[method-assign]  # as it was


def reading_peak(config: Config, spec: ModelSpec, rows: int, length: int, reward: bool = False) -> Peak:
    """A model reading ``rows`` of ``length`` without gradients, as scorers and held-out data are read."""
    live = LiveBytes()
    with place_of(config) as place:
        mesh = mesh_of(config, place)
        with torch.device("meta"):
            model = RewardModel(spec) if reward else MTPModel(spec)
        _as_there(model, config)
        with FakeTensorMode(allow_non_fake_inputs=True), live, torch.no_grad(), place.autocast():
            live.kind = WEIGHTS
            allocate(model, config, mesh, place)
            model.eval()
            live.kind = ACTIVATIONS
            x = torch.zeros(rows, length, dtype=torch.int64)
            if reward:
                model(x, x, torch.zeros(rows, dtype=torch.int64))
            else:
                labels, mask = make_labels(x, spec.heads, x, torch.zeros(rows, length, dtype=torch.bool))
                model(x, x, labels, mask, 1)
    return Peak("scoring", dict(+live.peak))


def largest_tensor(spec: ModelSpec) -> int:
    """Bytes of the largest parameter in float32: what is whole on a GPU while a model is exported."""
    with torch.device("meta"):
        return max(p.nbytes for p in MTPModel(spec).parameters())


def whole_bytes(spec: ModelSpec) -> int:
    """Bytes of all parameters in float32."""
    with torch.device("meta"):
        return sum(p.nbytes for p in MTPModel(spec).parameters())


def peaks(config: Config, recipe: Recipe, specs: Mapping[str, ModelSpec]) -> list[Peak]:
    """Every phase of the run in its order. ``specs``: the needed models by their role."""
    base, train, held = specs["base"], recipe.data.train, recipe.data.eval
    step = step_peak(config, recipe, base)
    weights, moments = step.parts.get(WEIGHTS, 0), step.parts.get(ADAM, 0)
    largest = largest_tensor(base)
    found = []
    if "rm" in specs:  # the template may say a prompt once more than the row that it came from
        length = min(2 * train.max_length, specs["rm"].max_positions)
        found.append(reading_peak(config, specs["rm"], train.batch_size, length, reward=True))
    if "ref" in specs:
        found.append(reading_peak(config, specs["ref"], train.batch_size, train.max_length))
    found.append(Peak("loading", {WEIGHTS: weights, "a tensor at most": largest}))
    found.append(step)
    if held.held_out:
        reading = reading_peak(config, base, held.batch_size, held.max_length)
        found.append(Peak("held-out reading", {**reading.parts, ADAM: moments}))
    found.append(Peak("saving", {WEIGHTS: weights, ADAM: moments, "a whole tensor": largest}))
    return found


def advice(config: Config, recipe: Recipe, spec: ModelSpec, room: int) -> list[tuple[str, Peak]]:
    """Settings that lower the step's peak, gentlest first, each with what it gives, up to the first within ``room``."""
    train, fsdp = recipe.data.train, config.devices.fsdp
    tries: list[tuple[str, Any, Any]] = []
    if fsdp.activation_ckpt is False:
        tries.append(("devices.fsdp.activation_ckpt", "selective", config))
    if fsdp.activation_ckpt is not True:
        tries.append(("devices.fsdp.activation_ckpt", True, config))
    if fsdp.sharding != "full_shard":
        tries.append(("devices.fsdp.sharding", "full_shard", config))
    if recipe.train.accumulation_steps > 1:  # between its micro-batches the gradients are whole on each rank
        tries.append(("train.accumulation_steps", 1, recipe))
    if train.batch_size > 1:
        tries.append(("data.train.batch_size", train.batch_size // 2, recipe))
    if train.max_length > 512:
        tries.append(("data.train.max_length", train.max_length // 2, recipe))
    found = []
    for key, value, whose in tries:
        other = _with(whose, key.split("."), value)
        peak = step_peak(other, recipe, spec) if whose is config else step_peak(config, other, spec)
        found.append((f"{key}={str(value).lower() if value is True else value}", peak))
        if peak.bytes <= room:
            break
    return found


def _with(settings: Any, path: list[str], value: Any) -> Any:
    """A copy of validated settings with one key changed."""
    name, *rest = path
    return settings.model_copy(update={name: _with(getattr(settings, name), rest, value) if rest else value})
