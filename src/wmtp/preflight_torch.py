"""The checks of the dry run that need torch: memory, models without their weights, tokenizers, data, the twin.

    python -m wmtp.preflight_torch --config F --recipe F [--recipe F …] [--set A.B=C …] --env E
                                   [--only memory,models,…] [--offline] [--verbose]

`wmtp.preflight` starts it beside its own checks. Standard output: one JSON line a finding, as it is found; whatever
goes wrong with one recipe is a finding too. Exit code: 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmtp import config as settings
from wmtp import headers, memory, twin
from wmtp.bucket import BucketError, client_of
from wmtp.data import Tokenizer, load_tokenizer, pack, sides, text_digest, text_key, tokenize
from wmtp.headers import Bucket, Folder, Source
from wmtp.memory import GIB, MARGIN, Peak
from wmtp.model import ModelError, ModelSpec
from wmtp.optim import rows_per_step, steps_told, total_steps
from wmtp.paths import PathResolver
from wmtp.preflight import FAIL, GPU_MEMORY_GIB, NOT, OK, ROOT, TORCH_CHECKS, WARN, Finding, here, ranks_of
from wmtp.runfile import MODEL_GB
from wmtp.sources import DataError, described, read_records, refuse_evaluation
from wmtp.train import die_with_parent
from wmtp.vocab import VocabError, Vocabulary, compare
from wmtp.weights import heads_refused, positions_refused, read_spec

AWKWARD = (
    "",
    " ",
    "  two  spaces  ",
    "\tdef f(x):\n\t\treturn x  # tab\n",
    "    if a != b and c[0] ** 2 >= 1e-5:\n        pass\r\n",
    "naïve café — “quotes” … Ω≈ç√ 한국어 日本語 العربية",
    "👩‍💻🏳️‍🌈 e\u0301 \u200b \ufeff \u00a0",
    "0123456789 0x1F 1_000 3.14159 1e-9",
    "<s> </s> <unk> [INST] <|endoftext|>",
    "\x00\x07\x1b[31m\x7f",
)
ROWS_COMPARED = 20
CHARACTERS = 20_000_000
"""Of a larger corpus an even sample is tokenized; what is said of it is then an estimate, and says so."""


@dataclass
class Model:
    """What is known here of a model that the recipe needs."""

    name: str
    source: Source | None
    """None: neither here nor in a bucket that answers."""
    spec: ModelSpec | None
    place: str
    why: str = ""
    """Why there is no source."""
    proved: bool = False
    """Its shapes are its own; else they are those of the plan's model of that name."""


class Models:
    """Each model that a recipe needs, looked at once for all recipes."""

    def __init__(self, offline: bool, into: Path) -> None:
        self.into, self.why = into, "--offline" if offline else ""
        """``why`` the bucket is not asked: once it did not answer, it is not waited for again."""
        self.no: Finding | None = None
        """What the bucket refused."""
        self.known: dict[tuple[str, str], tuple[Model, list[Finding]]] = {}

    def of(self, config: settings.Config, role: str, uri: str) -> tuple[Model, list[Finding]]:
        key = ("rm" if role == "rm" else "lm", uri)
        if key not in self.known:
            self.known[key] = self._look(config, uri, role)
        return self.known[key]

    def _look(self, config: settings.Config, uri: str, role: str) -> tuple[Model, list[Finding]]:
        model = self._find(config, uri)
        subject = f"model {model.name}"
        if model.source is None:
            told = f"; shapes assumed ({model.place})" if model.spec else "; its shapes are not known here"
            return model, [Finding(5, NOT, subject, model.why + told)]
        try:
            remarks = list(headers.check(model.source, role))
            model.spec, model.proved = headers.spec_of(model.source), True
        except ModelError as error:
            return model, [Finding(5, FAIL, subject, error.what, error.next_step, error.rule)]
        except BucketError as error:
            model.why = str(error)
            return model, [self.refusal(error) or Finding(5, NOT, subject, str(error))]
        read = model.source.bytes_read
        size = sum(model.source.sizes.values())
        detail = f"{'; '.join(remarks)}; {read / 1e3:.0f} kB of {size / 1e6:.0f} MB read, {model.place}"
        found = [Finding(5, OK, subject, detail)]
        if config.launcher.target != "local" and isinstance(model.source, Folder):
            found.append(Finding(5, NOT, f"{subject} in the bucket", self.why))
        return model, found

    def refusal(self, error: BucketError) -> Finding | None:
        """A bucket that says no; None for one that says nothing, or that this login alone may not read."""
        if not error.refused:
            return None
        following = "mend S3_BUCKET_NAME, S3_ENDPOINT_URL, AWS_*; or scripts/test_vessl_config.sh --offline"
        verdict = WARN if "AccessDenied" in str(error) else FAIL
        return Finding(5, verdict, "bucket", str(error), following, "the run reads its models there")

    def _find(self, config: settings.Config, uri: str) -> Model:
        """The cluster gets its models from the bucket; a folder here is looked at where that does not answer."""
        name = Path(uri).name
        shapes = ROOT / "configs" / "shapes" / name
        spec = read_spec(shapes) if shapes.is_dir() else None
        folder = here(uri)
        if folder is None and (ROOT / "tests" / "test_models" / name).is_dir():
            folder = ROOT / "tests" / "test_models" / name  # what the mini-test publishes
        local = Model(name, Folder(folder), spec, f"in {folder}") if folder and any(folder.iterdir()) else None
        if local and config.launcher.target == "local":
            return local
        if not self.why:
            try:
                return Model(name, self._bucket(config, uri), spec, "in the bucket")
            except BucketError as error:
                self.why, self.no = str(error), self.refusal(error)
        return local or Model(name, None, spec, f"configs/shapes/{name}", self.why)

    def _bucket(self, config: settings.Config, uri: str) -> Bucket:
        endpoint = os.environ.get("S3_ENDPOINT_URL") or config.storage.endpoint
        client, name = client_of(endpoint, config.storage.region), Path(uri).name
        if not uri.startswith("s3://"):
            return Bucket(client, config.storage.bucket, name, self.into / name)
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        return Bucket(client, bucket, name, self.into / f"s3-{name}", prefix)

    def dataset(self, config: settings.Config, uri: str, subject: str) -> Finding:
        """Of data that the sync brings: whether they are published; their records are read on the node."""
        if not self.why:
            try:
                manifest = self._bucket(config, uri).manifest()
                assert manifest
                told = f"{len(manifest.files)} files, {manifest.total_bytes / 1e6:.1f} MB, published; read on the node"
                return Finding(5, NOT, subject, f"{uri}: {told}")
            except ModelError as error:
                cure = "make publish-models FROM=dir AS=datasets"
                return Finding(5, FAIL, subject, error.what, cure, "data in a bucket have a manifest, as models have")
            except BucketError as error:
                self.why, self.no = str(error), self.refusal(error)
        return Finding(5, NOT, subject, f"{uri}: {self.why}")


def check_shapes(recipe: settings.Recipe, models: dict[str, Model]) -> Iterator[Finding]:
    """What the trainer would refuse once the models are there."""
    base = models["base"]
    if base.proved and base.spec:
        told = heads_refused(base.name, base.spec.heads, recipe.model.heads, recipe.model.new_heads)
        if told:
            what, rule, following = told
            yield Finding(5, FAIL, "heads", what, following, rule)
    for model in models.values():
        if model.proved and model.spec and (told := positions_refused(model.name, model.spec, recipe.data.longest)):
            what, rule, following = told
            yield Finding(5, FAIL, "positions", what, following, rule)


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def check_tokenizers(models: dict[str, Model], texts: Sequence[str], expected: int) -> tuple[Finding, Tokenizer | None]:
    """One vocabulary, of the size that the node wants, in all models of a recipe; the same ids for the same text."""
    found: dict[str, Tokenizer] = {}
    absent: list[Model] = []
    for model in models.values():
        if model.source is None:
            absent.append(model)
            continue
        try:
            found[model.name] = load_tokenizer(model.source.small())
        except (DataError, BucketError, ModelError) as error:
            what, *rest = str(error).replace("; ", "\n").splitlines()
            rule, following = ([line.strip().partition(": ")[2] for line in rest] + ["", ""])[:2]
            return Finding(5, FAIL, "tokenizers", what, following, rule), None
    subject = "tokenizers"
    base = next(iter(found.values()), None)
    if base is None:
        return Finding(5, NOT, subject, f"of none of the models: {absent[0].why}"), None
    rule = "all models of a run share one vocabulary, in size, order and content"
    sizes = {name: _stated(models, name, tokenizer) for name, tokenizer in found.items()}
    vocabularies = [Vocabulary(name, sizes[name], tokenizer.pieces()) for name, tokenizer in found.items()]
    try:
        compare(vocabularies, expected)
    except VocabError as error:
        return Finding(
            5,
            FAIL,
            subject,
            f"{error}{_added(vocabularies)}",
            "name models of one family in paths.models, or their size in model.vocab_size",
            rule,
        ), base
    for name, tokenizer in found.items():
        for special in ("bos_id", "eos_id", "unk_id"):
            mine, its = getattr(base, special), getattr(tokenizer, special)
            if mine != its:
                what = f"{special} is {its} in {name}, {mine} in {vocabularies[0].name}"
                return Finding(5, FAIL, subject, what, "give it the tokenizer files of its family", rule), base
        for text in (*AWKWARD, *texts[:ROWS_COMPARED]):
            if base.encode(text) != tokenizer.encode(text):
                what = f"{name} and {vocabularies[0].name} give other ids for {text[:60]!r}"
                return Finding(5, FAIL, subject, what, "give it the tokenizer files of its family", rule), base
    compared = len(AWKWARD) + len(texts[:ROWS_COMPARED])
    what = f"one vocabulary of {vocabularies[0].size} pieces, the same ids for {compared} texts"
    if absent:
        missing = ", ".join(model.name for model in absent)
        return Finding(5, NOT, subject, f"{what}; not of {missing}: {absent[0].why}"), base
    return Finding(5, OK, subject, what), base


def _stated(models: dict[str, Model], name: str, tokenizer: Tokenizer) -> int:
    spec = next((m.spec for m in models.values() if m.name == name), None)
    return spec.vocab_size if spec else len(tokenizer.pieces())


def _added(vocabularies: list[Vocabulary]) -> str:
    """Where one vocabulary is the beginning of another, what was added to it."""
    shorter, *_, longer = sorted([*vocabularies, vocabularies[-1]], key=lambda v: len(v.pieces))
    more = list(longer.pieces[len(shorter.pieces) :])
    if more and list(longer.pieces[: len(shorter.pieces)]) == list(shorter.pieces):
        some = ", ".join(map(repr, more[:3]))
        return (
            f"; {longer.name} has {len(more)} added at the end ({some}): usually padding, which masks nothing here: "
            "cut these rows from its embedding and its vocab_size, and publish it again"
        )
    return ""


# ---- data ------------------------------------------------------------------------------------------------------------


def check_data(
    config: settings.Config, recipe: settings.Recipe, tokenizer: Tokenizer | None, verbose: bool, models: Models
) -> Iterator[Finding]:
    """What the recipe's sources give: layouts, records, the split, lengths, rows, steps."""
    texts: dict[str, list[str]] = {}
    whole = True
    for part, layout in (("eval", recipe.data.eval), ("train", recipe.data.train)):
        texts[part] = []
        for name in layout.sources:
            if (uri := config.paths.datasets.get(name, "")).startswith("s3://"):
                yield models.dataset(config, uri, f"data {name}")
                whole = False
                continue
            found = yield from _source(config, name, part == "eval" or recipe.data.train.allow_evaluation_data)
            whole = whole and found is not None
            texts[part] += found or []
    if not whole:
        return
    digests = np.array([text_digest(text) for text in texts["train"]], np.uint64)
    keys = {part: np.array([text_key(text) for text in some], np.uint64) for part, some in texts.items()}
    try:
        trained, split = sides(digests, keys["train"], keys["eval"], recipe.data.eval.share)
    except DataError as error:
        yield _failed("data.train", error)
        return
    held = [text for text, out in zip(texts["train"], split, strict=True) if out]
    if recipe.data.eval.share:
        left = f"{len(held)} of {len(split)} documents held out by digest, {trained.sum()} to train on"
        yield Finding(5, OK, "data split", left)
    texts = {
        "eval": [*texts["eval"], *held],
        "train": [text for text, kept in zip(texts["train"], trained, strict=True) if kept],
    }
    for part, layout in (("eval", recipe.data.eval), ("train", recipe.data.train)):
        subject, some = f"data.{part}", texts[part]
        if not some:
            continue
        if tokenizer is None:
            yield _uncounted(subject, some, config, recipe)
            continue
        yield _counted(subject, some, layout, tokenizer, config, recipe)
        if verbose:
            ids = tokenizer.encode(some[0])[:60]
            yield Finding(5, OK, f"{subject} sample", f"{len(ids)} tokens decode to {tokenizer.decode(ids)!r}")


def _failed(subject: str, error: DataError, folder: Path | None = None) -> Finding:
    """The finding of an error, its folder named as the source is."""
    what, *rest = str(error).splitlines()
    told = {k.strip(): v for k, _, v in (line.partition(": ") for line in rest)}
    what = what.replace(str(folder), subject.partition(" ")[2]) if folder else what
    return Finding(5, FAIL, subject, what, told.get("next", ""), told.get("rule", ""))


def _source(config: settings.Config, name: str, evaluation: bool) -> Generator[Finding, None, list[str] | None]:
    """Findings of one source; returns its texts, None where it can't be read, or not be trained on."""
    uri = config.paths.datasets.get(name)
    subject = f"data {name}"
    if uri is None:
        yield Finding(
            5, FAIL, subject, "is not in paths.datasets", f"paths.datasets.{name}: file://…", "a source is a dataset"
        )
        return None
    folder = _folder_of(config, uri)
    rule = "the image has the checkout's datasets/, and the trainer reads folders"
    if config.launcher.target != "local" and folder is None:
        following = f"cp -r … datasets/, file:///app/datasets/{name}"
        yield Finding(5, FAIL, subject, f"{uri} is not in the image", following, rule)
        return None
    if folder is None:
        yield Finding(5, NOT, subject, f"{uri} is not on this machine")
        return None
    try:
        texts, counts = _texts(folder)
        refuse_evaluation(name, counts, evaluation)
    except DataError as error:
        yield _failed(subject, error, folder)
        return None
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    yield Finding(5, OK, subject, f"{len(texts)} records in {place}: {described(counts)}")
    return texts


def _folder_of(config: settings.Config, uri: str) -> Path | None:
    """Where the run's own data is on this machine: the image has the checkout's datasets/ alone."""
    if config.launcher.target == "local":
        return here(uri)
    inside = uri.removeprefix("file:///app/datasets/")
    folder = ROOT / "datasets" / inside
    return folder if inside != uri and folder.is_dir() else None


@functools.cache
def _texts(folder: Path) -> tuple[list[str], Counter[str]]:
    """The texts of a source and how many of which layout; read once for all checks and recipes."""
    counts: Counter[str] = Counter()
    return [record.text for record in read_records(folder, counts)], counts


def _uncounted(subject: str, texts: list[str], config: settings.Config, recipe: settings.Recipe) -> Finding:
    """What can be said without a tokenizer: a piece has two bytes or more, nearly always."""
    size = sum(len(text.encode()) for text in texts)
    detail = f"{len(texts)} texts, {size / 1e3:.0f} kB; tokens: no tokenizer here"
    per_step = rows_per_step(recipe, ranks_of(config))
    train = recipe.data.train
    rows = math.ceil(min(len(texts), size / 2 / train.max_length)) if train.pack_sequences else len(texts)
    if subject == "data.train" and rows < per_step:
        detail += f"; at most about {rows} rows of {train.max_length}, and a step has {per_step}"
        return _not_a_step(subject, detail)
    return Finding(5, NOT, subject, detail)


def _not_a_step(subject: str, detail: str) -> Finding:
    following = "more data; or lower train.accumulation_steps or data.train.batch_size"
    return Finding(5, WARN, subject, detail, following, "a step is at most an epoch")


def _counted(
    subject: str, texts: list[str], layout: Any, tokenizer: Tokenizer, config: settings.Config, recipe: settings.Recipe
) -> Finding:
    every = max(1, math.ceil(sum(map(len, texts)) / CHARACTERS))
    documents = tokenize(texts[::every], tokenizer, config.devices.num_proc)
    rows = pack(documents, layout.max_length, tokenizer.eos_id, layout.pack_sequences)
    lengths = sorted(map(len, documents))
    long, middle, most = sum(n > layout.max_length for n in lengths), len(lengths) // 2, int(len(lengths) * 0.95)
    detail = (
        f"{len(texts)} documents, {sum(lengths) * every} tokens; half have up to {lengths[middle]}, "
        f"95 % up to {lengths[most]}, the longest {lengths[-1]}\n{_histogram(lengths)}\n"
        f"{long / len(lengths):.1%} are longer than a row of {layout.max_length} and are cut; "
        f"{len(rows) * every} rows, {rows.tokens / math.prod(rows.shape):.0%} full"
    )
    if every > 1:
        detail += f"; estimated from one document in {every}"
    if subject == "data.train":
        per_step = rows_per_step(recipe, ranks_of(config))
        total = total_steps(len(rows) * every, per_step, recipe)
        detail += f"; {len(rows) * every / per_step:.1f} steps an epoch, in all {steps_told(total, recipe)}"
        if len(rows) * every < per_step:
            return _not_a_step(subject, detail)
    return Finding(5, OK, subject, detail)


def _histogram(lengths: list[int]) -> str:
    """Shares of the documents by powers of two of their tokens."""
    top = max(6, math.ceil(math.log2(lengths[-1])))
    counts = [sum(2 ** (k - 1) < n <= 2**k or (k == 5 and n <= 16) for n in lengths) for k in range(5, top + 1)]
    return "tokens " + " ".join(
        f"<={2**k} {count / len(lengths):.0%}" for k, count in zip(range(5, top + 1), counts, strict=True)
    )


# ---- memory and disk -------------------------------------------------------------------------------------------------


Asked = tuple[dict[str, ModelSpec], Future[list[Peak]] | None]


def ask_memory(config: settings.Config, recipe: settings.Recipe, models: dict[str, Model]) -> Asked:
    """Begin to walk through the step, apart; `check_memory` waits for it."""
    specs = {role: model.spec for role, model in models.items() if model.spec is not None}
    if "base" not in specs:
        return specs, None
    specs["base"] = dataclasses.replace(specs["base"], heads=recipe.model.heads)
    return specs, memory.apart(memory.peaks, config, recipe, specs)


def check_memory(
    config: settings.Config, recipe: settings.Recipe, models: dict[str, Model], asked: Asked
) -> Iterator[Finding]:
    subject = f"memory {recipe.train.algo}"
    specs, future = asked
    unknown = [model.name for model in models.values() if model.spec is None]
    if future is None:
        yield Finding(4, NOT, subject, f"the shapes of {', '.join(unknown)} are not known here")
        return
    assumed = sorted(m.name for m in models.values() if not m.proved and m.spec is not None)
    peaks = future.result()
    most = max(peaks, key=lambda p: p.bytes)
    resources = config.launcher.resources
    gib = resources.gpu_memory_gb or GPU_MEMORY_GIB.get(resources.gpu_type)
    lines = [_phase(peak) for peak in peaks]
    staged = 3 * memory.whole_bytes(specs["base"])
    lines.append(f"the node's own memory: {shown(staged)} for a checkpoint that is written while training goes on")
    if assumed:
        lines.append(f"shapes of {', '.join(assumed)} assumed")
    if unknown:
        lines.append(f"without {', '.join(unknown)}: shapes not known here")
    if config.devices.compute_backend == "cpu" or not gib:
        cpu = config.devices.compute_backend == "cpu"
        where = "on the CPU" if cpu else f"{resources.gpu_type}: name launcher.resources.gpu_memory_gb to compare with"
        first = f"peak {shown(most.bytes)} a rank at {most.phase}; {where}"
        yield Finding(4, OK if cpu else NOT, subject, "\n".join([first, *lines]))
        return
    room = int(gib * GIB)
    first = f"peak {shown(most.bytes)} of {gib:g} GiB at {most.phase}"
    rule = f"{MARGIN:.0%} of a GPU stay free: for CUDA, NCCL, kernels' own buffers, fragmentation"
    if most.bytes <= room * (1 - MARGIN):
        yield Finding(4, OK, subject, "\n".join([first, *lines]), rule=rule)
        return
    verdict = FAIL if most.bytes > room else WARN
    left = 1 - most.bytes / room
    first += f": {'does not fit' if verdict == FAIL else f'margin {left:.0%}'}"
    told, enough = [], False
    if most.phase == "step":
        for what, peak in memory.apart(memory.advice, config, recipe, specs["base"], int(room * (1 - MARGIN))).result():
            told.append(f"{what} gives {shown(peak.bytes)}")
            enough = peak.bytes <= room * (1 - MARGIN)
        if told and not enough:
            told.append("each alone is not enough: together, or more GPUs")
    yield Finding(
        4, verdict, subject, "\n".join([first, *lines]), "; ".join(told) or "more GPUs, or GPUs with more memory", rule
    )


def _phase(peak: Peak) -> str:
    """A phase and its categories, the largest first; what is under half a percent is left out."""
    parts = sorted(peak.parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{kind} {shown(size)}" for kind, size in parts if size >= peak.bytes / 200)
    return f"{peak.phase} {shown(peak.bytes)}: {told}"


def check_disk(config: settings.Config, recipe: settings.Recipe, models: dict[str, Model]) -> Finding:
    """Models and checkpoints against the disk that they go to."""
    subject = f"disk {recipe.train.algo}"
    sizes = [_size(model) for model in models.values()]
    spec = models["base"].spec
    if spec is None or None in sizes:
        return Finding(4, NOT, subject, "sizes of the models are not known here")
    checkpoints = config.paths.checkpoints
    one = 3 * memory.whole_bytes(dataclasses.replace(spec, heads=recipe.model.heads))
    kept = checkpoints.keep_last + 1
    need = sum(size or 0 for size in sizes) + kept * one + (one // 3 if checkpoints.save_final else 0)
    detail = (
        f"{need / 1e9:.1f} GB: models {sum(size or 0 for size in sizes) / 1e9:.1f} GB to sync, {kept} checkpoints of "
        f"{one / 1e9:.1f} GB{' and the export' if checkpoints.save_final else ''}"
    )
    if config.launcher.target != "local":
        return Finding(4, NOT, subject, f"{detail}; the node's disk is not known here")
    folder = Path(PathResolver().resolve("file:///app")[1])
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        return Finding(
            4,
            FAIL,
            subject,
            f"{detail}; {folder} has {free / 1e9:.1f} GB free",
            "free some, or WMTP_APP_ROOT elsewhere",
            "models and checkpoints fit",
        )
    return Finding(4, OK, subject, f"{detail}; {folder} has {free / 1e9:.1f} GB free")


def _size(model: Model) -> int | None:
    if model.source is not None:
        return sum(model.source.sizes.values())
    return int(MODEL_GB[model.name] * 1e9) if model.name in MODEL_GB else None


def shown(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


# ---- all of them -----------------------------------------------------------------------------------------------------


def findings_of(args: argparse.Namespace, recipe_file: str, models: Models, only: set[str]) -> Iterator[Finding]:
    """Every check of one recipe; a surprise in one hides none of the others."""
    config, recipe = settings.load_pair(args.config, recipe_file, args.overrides, env=args.env)
    needed: dict[str, Model] = {}

    def guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        try:
            yield from check()
        except Exception as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            following = f"ONLY={what} make dryrun, with the same ENV, ALGO and SET"
            yield Finding(
                4 if what == "memory" else 5, FAIL, what, told, following, "a check that can't be done has failed"
            )
            if args.verbose:
                traceback.print_exc()

    def look() -> Iterator[Finding]:
        for role, uri in settings.needed_models(config, recipe).items():
            needed[role], found = models.of(config, role, uri)
            yield from found
        if models.no:
            yield models.no
        yield from check_shapes(recipe, needed)

    if only & {"models", "tokenizers", "data", "memory"}:
        seen = list(guarded("models", look))
        yield from (f for f in seen if "models" in only or f.verdict == FAIL)
    whole = len(needed) == len(settings.needed_models(config, recipe))
    asked = ask_memory(config, recipe, needed) if "memory" in only and whole else None
    tokenizer: list[Tokenizer | None] = [None]

    def tokenizers() -> Iterator[Finding]:
        finding, tokenizer[0] = check_tokenizers(needed, _first_texts(config, recipe), recipe.model.vocab_size)
        if "tokenizers" in only:
            yield finding

    if only & {"tokenizers", "data"} and whole:
        yield from guarded("tokenizers", tokenizers)
    if "data" in only:
        yield from guarded("data", lambda: check_data(config, recipe, tokenizer[0], args.verbose, models))
    if "twin" in only:
        yield from guarded("twin", lambda: iter([twin_finding(args, recipe_file)]))
    if asked:
        yield from guarded("memory", lambda: iter([check_disk(config, recipe, needed)]))
        yield from guarded("memory", lambda: check_memory(config, recipe, needed, asked))
        if config.devices.compile:
            kernels = (
                f"kernels are made for {config.devices.compute_backend} in the first step; the twin runs without them"
            )
            yield Finding(4, NOT, "compile", kernels)


def _first_texts(config: settings.Config, recipe: settings.Recipe) -> list[str]:
    for name in recipe.data.train.sources:
        folder = _folder_of(config, config.paths.datasets.get(name, "file:///nowhere"))
        try:
            return _texts(folder)[0][:ROWS_COMPARED] if folder else []
        except DataError:
            return []
    return []


def twin_finding(args: argparse.Namespace, recipe_file: str) -> Finding:
    subject = f"twin {Path(recipe_file).stem.removeprefix('recipe.')}"
    ok, detail, seconds = twin.lived(args.config, recipe_file, args.overrides, args.env)
    following = "" if ok else f"the same alone: python -m wmtp.twin --config … --recipe {recipe_file}"
    verdict = OK if ok else FAIL
    off = re.search(r"\(([+-][\d.]+)%\)", detail)
    if ok and off and abs(float(off[1])) > 5:
        verdict, following = WARN, "take the memory's figures with this error"
    return Finding(
        5, verdict, subject, f"{detail}, {seconds} s", following, "prediction and live bytes agree within 5 %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wmtp.preflight_torch", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--recipe", required=True, action="append")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--env", required=True)
    parser.add_argument("--only", default=",".join(TORCH_CHECKS))
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(argv)
    only = set(args.only.split(","))
    die_with_parent()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="wmtp-dryrun-") as into:
        models = Models(args.offline, Path(into))
        for recipe_file in args.recipe:
            try:
                for finding in findings_of(args, recipe_file, models, only):
                    print(json.dumps(dataclasses.asdict(finding)), flush=True)
            except Exception as error:  # one recipe's surprise hides none of the others' findings
                what = f"{recipe_file}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(json.dumps(dataclasses.asdict(Finding(5, FAIL, "dry run", what))), flush=True)
                if args.verbose:
                    raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
