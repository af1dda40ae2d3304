"""Frozen scorers: a reference model's cross-entropies and a reward model's verdicts, made once, kept and reused.

Work is cut into blocks that are always computed together, whoever does it, so that a run that was killed and goes on
has the same bits; a finished block is a file. Nothing here shards a model or starts ranks: `wmtp.train` hands over a
model that is ready. Shape letters as in `wmtp.objective`: N rows of a set, S positions.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wmtp.checkpoint import Checkpoints
from wmtp.config import Config, Recipe
from wmtp.data import Corpus, Piece, Rows, Tokenizer
from wmtp.model import MTPModel, RewardModel
from wmtp.objective import make_labels
from wmtp.outcome import NotFiniteError, Stop, Stopped, local_path, say
from wmtp.paths import PathResolver, open_to_all
from wmtp.ranks import Place
from wmtp.registry import weighs_by_value
from wmtp.remote import MARKER, CheckpointError, DamagedError
from wmtp.scorekey import REFERENCE, kept_name, scorer_of
from wmtp.sources import Record
from wmtp.weights import Stored, load_reward_state, load_state, read_spec

FORWARDS = 8  # of a block: what a kill costs each rank at most
TOLD_EVERY_S = 5.0

Fill = Callable[[MTPModel | RewardModel, Mapping[str, Stored]], None]
Block = tuple[str, int, Sequence[int]]
"""Set, number, and the rows or documents in it."""


class Kept:
    """Scores under their name: on disk in `<checkpoints>/.scores/NAME`, and in the bucket."""

    def __init__(self, shelf: Checkpoints, name: str, owner: str = "") -> None:
        """``shelf`` stands for the folder `.scores`, here and in the bucket.

        What is unfinished belongs to ``owner``, a run's name: two runs that want the same scores at once do the work
        twice, and neither takes the other's away.
        """
        self.shelf, self.name = shelf, name
        own = f".{name}.{owner}" if owner else f".{name}"
        self.folder, self.parts = shelf.folder / name, shelf.folder / f"{own}.parts"
        self.staging = shelf.folder / f"{own}.staging"

    def load(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor] | None:
        """`[N, S]` float32 of each set, from disk, else from the bucket; None where they are not kept whole."""
        marker = self.folder / MARKER
        for _ in range(2):
            if not marker.is_file():
                self._fetch()
            if not marker.is_file():
                return None
            try:
                found = load_file(self.folder / "scores.safetensors")
                fits = shapes is None or {k: tuple(v.shape) for k, v in found.items()} == dict(shapes)
                problem = None if fits else "of other rows"
            except (OSError, SafetensorError) as error:
                problem = str(error)
            if problem is None:
                return found
            say(f"score     warn  {self.folder} can't be used ({problem}): fetched or scored again")
            # Without its marker the sync brings the scorer again.
            marker.unlink(missing_ok=True)
        return None

    def bring(self) -> None:
        """Upload what a kill kept from the bucket. Rank 0 only; a bucket that doesn't answer is told, not a failure."""
        try:
            if self.shelf.remote and not self.shelf.remote.has(self.name):
                self.shelf.upload(self.folder)
        except CheckpointError as error:
            say(f"score     warn  whether the bucket has the scores can't be asked: {error}")

    def _fetch(self) -> None:
        """From the bucket to the disk, proved, where the bucket has them; damaged ones are told, and scored again."""
        remote, name = self.shelf.remote, self.name
        if remote is None or not remote.tried(f"whether {remote.prefix} has {name}", lambda: remote.has(name)):
            return
        try:
            remote.get(name, self.staging)
        except DamagedError as error:
            say(f"score     warn  {error}: scored again")
            remote.disown(name)
        else:
            self.shelf.finish(self.staging, self.folder)

    def part(self, block: Block) -> Path:
        # Named by what is in it: another start may cut blocks of another size.
        return self.parts / f"{block[0]}-{block[2][0]}-{block[2][-1] + 1}.safetensors"

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks that no earlier start has finished."""
        there = {path.name for path in self.parts.glob("*.safetensors")}
        return [block for block in blocks if self.part(block).name not in there]

    def put(self, block: Block, values: Tensor) -> None:
        """Keep a block; a file under its name is whole."""
        staging = self.part(block).with_suffix(f".{os.getpid()}")
        save_file({"values": values.contiguous()}, staging)
        with staging.open("rb") as handle:
            os.fsync(handle.fileno())
        staging.replace(self.part(block))

    def finish(self, scores: Mapping[str, Tensor], what: Mapping[str, Any]) -> None:
        """Keep the joined scores, bring them to the bucket, forget the parts. Rank 0 only.

        Raises NotFiniteError for a score that is not finite: kept, it would spoil every run that reads it.
        """
        for name, values in scores.items():
            bad = (~torch.isfinite(values)).nonzero()
            if len(bad):
                shutil.rmtree(self.parts)
                raise NotFiniteError(
                    f"{self.name}: {len(bad)} scores of {name} are not finite, the first in row {int(bad[0][0])} "
                    f"at token {int(bad[0][1])}; rule: nothing is trained by such scores; next: look at the scorer's "
                    "weights (scripts/sync_models.sh proves them)"
                )
        staging = self.staging
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file({name: values.contiguous() for name, values in scores.items()}, staging / "scores.safetensors")
        open_to_all(staging / "scores.safetensors")
        (staging / "made-of.json").write_text(json.dumps(what, indent=1))
        if (self.folder / MARKER).is_file():
            shutil.rmtree(staging)  # another run was faster, and may be reading its own
        else:
            self.shelf.finish(staging, self.folder)
        shutil.rmtree(self.parts)
        self.shelf.upload(self.folder)


def run_blocks(
    blocks: Sequence[Block],
    compute: Callable[[Block | None], Tensor],
    kept: Kept,
    what: str,
    place: Place,
    stop: Stop,
) -> None:
    """Compute every block that is missing, dealt to the ranks. Collective: ``compute(None)`` keeps a rank in step.

    Raises Stopped, the finished blocks kept, when a notice to stop came.
    """
    if place.rank == 0:
        kept.parts.mkdir(parents=True, exist_ok=True)
    place.wait()
    missing = kept.missing(blocks)
    place.wait()  # nobody writes before everybody has looked
    rounds = -(-len(missing) // place.world)
    if len(missing) < len(blocks):
        say(f"score     {what}: {len(blocks) - len(missing)} of {len(blocks)} blocks were done before")
    began = told = time.monotonic()
    for turn in range(rounds):
        number = turn * place.world + place.rank
        block = missing[number] if number < len(missing) else None
        stop.beat(f"while scoring ({what}, block {number})")
        values = compute(block)
        if block:
            kept.put(block, values)
        if place.any(stop.cause):
            raise Stopped("while scoring")
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            left = (told - began) / (turn + 1) * (rounds - turn - 1)
            say(f"score     {what}: {100 * (turn + 1) // rounds} %, {left:.0f} s left")
    stop.rest(over=True)
    place.wait()


def blocks_of(sets: Mapping[str, int], size: int) -> Iterator[Block]:
    """Every set's indices in blocks of ``size``."""
    for name, count in sets.items():
        for number, start in enumerate(range(0, count, size)):
            yield name, number, range(start, min(start + size, count))


def score_reference(
    model: MTPModel,
    sets: Mapping[str, Rows],
    kept: Kept,
    rows: int,
    what: Mapping[str, Any],
    place: Place,
    stop: Stop,
) -> None:
    """`ref_ce` `[N, S]` float32 of each set: nats of token `j` given its document before it; else 0. Collective.

    ``model`` is an `MTPModel` with any number of heads, of which head 0 speaks; ``rows`` go through it at once.
    """
    heads = model.spec.heads

    @torch.no_grad()
    def compute(block: Block | None) -> Tensor:
        part = sets[block[0]] if block else next(iter(sets.values()))
        indices = list(block[2]) if block else [0]
        # Every block has the same number of forwards of the same size: sharded forwards are collective.
        filled = indices + [indices[0]] * (rows * FORWARDS - len(indices))
        found = []
        for at in range(0, len(filled), rows):
            take = torch.tensor(filled[at : at + rows])
            x, document, pad = part.take(take)
            labels, mask = make_labels(x, heads, document, pad)
            mask[:, :, 1:] = False
            with place.autocast():
                out = model(*(t.to(place.device) for t in (x, document, labels, mask)), 1)
            ce_bs = out.ce_bsh[:, :, 0].cpu()
            found.append(torch.nn.functional.pad(ce_bs[:, :-1], (1, 0)))  # head 0 at j-1 speaks of token j
        return torch.cat(found)[: len(indices)]

    blocks = list(blocks_of({name: len(part) for name, part in sets.items()}, rows * FORWARDS))
    model.eval()
    run_blocks(blocks, compute, kept, "reference", place, stop)
    if place.rank == 0:
        joined: dict[str, list[Tensor]] = {name: [] for name in sets}
        for block in blocks:
            joined[block[0]].append(load_file(kept.part(block))["values"])
        kept.finish({name: torch.cat(parts) for name, parts in joined.items()}, what)
    place.wait()


@dataclass(frozen=True)
class Judged:
    """A document as the reward model reads it, and where its verdict belongs."""

    ids: list[int]
    row: int
    last: int
    """Position of the document's last token in its row."""


def judged_documents(corpus: Corpus, tokenizer: Tokenizer, template: str, most: int) -> list[Judged]:
    """Every packed document of a corpus, rendered for a reward model of ``most`` positions."""
    records, found, cut = corpus.records(), [], 0
    for piece in corpus.rows.pieces():
        part = None if piece.whole else _decoded(piece, tokenizer)
        ids = rendered(template, records[piece.source], part, tokenizer)
        if len(ids) > most:
            cut += 1
            ids = [ids[0], *ids[len(ids) - most + 1 :]]  # its end carries the verdict
        found.append(Judged(ids, piece.row, piece.at + len(piece.ids) - 1))
    if cut:
        say(f"score     warn  {cut} of {len(found)} documents are longer than the reward model's {most} positions: cut")
    return found


def _decoded(piece: Piece, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i in piece.ids.tolist() if i not in (tokenizer.bos_id, tokenizer.eos_id)])


def rendered(template: str, record: Record, part: str | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of `critic.reward_template` for a record, or for ``part`` of its text.

    `<s>` and `</s>` are the template's special tokens; what a field brings in is text, whatever it looks like. A
    beginning is added where the template has none.
    """
    fields = {"prompt": record.prompt, "solution": record.solution, "text": record.text}
    if part is not None:
        fields |= {"text": part, "solution": part.removeprefix(record.prompt).removeprefix(record.joint)}
    ids: list[int] = []
    text = ""

    def flush() -> None:
        nonlocal text
        ids.extend(tokenizer.encode(text) if text else [])
        text = ""

    for word in re.split(r"(<s>|</s>|\{(?:prompt|solution|text)\})", template):
        if word in ("<s>", "</s>"):
            flush()
            ids.append(tokenizer.bos_id if word == "<s>" else tokenizer.eos_id)
        elif word[:1] == "{" and word[1:-1] in fields:
            text += fields[word[1:-1]]
        else:
            text += word
    flush()
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def score_rewards(
    model: RewardModel,
    sets: Mapping[str, Corpus],
    tokenizer: Tokenizer,
    template: str,
    kept: Kept,
    rows: int,
    what: Mapping[str, Any],
    place: Place,
    stop: Stop,
) -> None:
    """The raw reward at each document's last token, 0 elsewhere, `[N, S]` float32 of each set. Collective."""
    most = model.spec.max_positions
    documents = {name: judged_documents(corpus, tokenizer, template, most) for name, corpus in sets.items()}
    # Like lengths together: less padding. The order is a function of the documents alone.
    orders = {
        name: sorted(range(len(some)), key=[len(one.ids) for one in some].__getitem__)
        for name, some in documents.items()
    }

    @torch.no_grad()
    def compute(block: Block | None) -> Tensor:
        ids = [documents[block[0]][orders[block[0]][i]].ids for i in block[2]] if block else [[tokenizer.bos_id]]
        filled = ids + [ids[0]] * (rows * FORWARDS - len(ids))
        found = []
        for at in range(0, len(filled), rows):
            some = filled[at : at + rows]
            x = torch.full((rows, max(map(len, some))), tokenizer.eos_id)
            document = torch.full_like(x, -1)
            for i, one in enumerate(some):
                x[i, : len(one)] = torch.tensor(one)
                document[i, : len(one)] = 0
            last = torch.tensor([len(one) - 1 for one in some])
            with place.autocast():
                found.append(model(*(t.to(place.device) for t in (x, document, last))).float().cpu())
        return torch.cat(found)[: len(ids)]

    blocks = list(blocks_of({name: len(some) for name, some in documents.items()}, rows * FORWARDS))
    model.eval()
    run_blocks(blocks, compute, kept, "rewards", place, stop)
    if place.rank == 0:
        scores = {name: torch.zeros(corpus.rows.shape) for name, corpus in sets.items()}
        for block in blocks:
            for i, value in zip(block[2], load_file(kept.part(block))["values"], strict=True):
                document = documents[block[0]][orders[block[0]][i]]
                scores[block[0]][document.row, document.last] = value
        kept.finish(scores, what)
    place.wait()


def pseudo_rewards(ref_ce: Tensor, rows: Rows) -> Tensor:
    """`R = -mean_j ref_ce[j]` of each document at its last token, `[N, S]`; a document of one token gets 0.

    The first token of a document is predicted by nobody and is not in the mean.
    """
    reward = torch.zeros_like(ref_ce)
    for piece in rows.pieces():
        end = piece.at + len(piece.ids)
        if len(piece.ids) > 1:
            reward[piece.row, end - 1] = -ref_ce[piece.row, piece.at + 1 : end].mean()
    return reward


def zscored(rewards: Mapping[str, Tensor], sets: Mapping[str, Rows], longer_than: int = 0) -> dict[str, Tensor]:
    """Rewards less the training set's mean, over its (population) deviation, at each document's last token.

    Only documents of more than ``longer_than`` tokens have one: of one token alone nothing was predicted.
    A deviation of 0 gives 0 everywhere and a warning: such rewards tell nothing.
    """
    ends = {name: rows.last_tokens(longer_than) for name, rows in sets.items()}
    known = rewards["train"][ends["train"]].double()
    mean, deviation = known.mean(), known.std(correction=0)
    if not torch.isfinite(known).all():
        raise NotFiniteError("rewards that are not finite; rule: a reward is a number; next: look at the reward model")
    if not deviation > 1e-12 * known.abs().max().clamp(min=1):
        say(f"score     warn  all {len(known)} rewards are {float(mean):.4g}: they tell nothing, so every weight is 1")
        return {name: torch.zeros_like(values) for name, values in rewards.items()}
    say(f"score     rewards of {len(known)} documents: mean {float(mean):.4g}, deviation {float(deviation):.4g}")
    return {
        name: torch.where(ends[name], (values.double() - mean) / deviation, 0).float()
        for name, values in rewards.items()
    }


def load_scores(
    config: Config,
    recipe: Recipe,
    tokenizer: Tokenizer,
    sets: dict[str, Corpus],
    shelf: Checkpoints,
    fill: Fill,
    place: Place,
    stop: Stop,
    owner: str = "",
) -> tuple[dict[str, Tensor], str | None]:
    """What the scorer of the algorithm says of each token, `[N, S]` of each set: kept from before, or made now.

    A reference gives `ref_ce`; a reward model gives z-scored rewards at the documents' last tokens. The scorer's memory
    is free again afterwards. ``fill`` gives a model that was built on ``meta`` its weights, sharded as the run is. With
    the name that the scores are kept by; empty and None for an algorithm without a scorer. Collective.
    """
    scorer = scorer_of(recipe)
    if scorer is None:
        return {}, None
    uri, what = getattr(config.paths.models, scorer[1]), f"paths.models.{scorer[1]}"
    rows = {name: corpus.rows for name, corpus in sets.items()}
    shapes = {name: part.shape for name, part in rows.items()}
    named: list[Any] = [None, None]
    found: list[Any] = [None]
    if place.rank == 0:
        manifests = Path(PathResolver().resolve("file:///app/models/.manifests")[1])
        if not (manifests / f"{Path(uri).name}.json").is_file():
            local_path(uri, what)
        named = list(kept_name(config, recipe, manifests))
        kept = Kept(shelf, named[0], owner)
        found = [kept.load(shapes)]
        if found[0] is not None:
            kept.bring()
    if dist.is_initialized():
        dist.broadcast_object_list(named, src=0)
    kept, made = Kept(shelf, named[0], owner), place.any(place.rank == 0 and found[0] is None)
    reference: MTPModel | None = None
    judge: RewardModel | None = None
    if made:
        folder = local_path(uri, what)
        say(f"score     {named[0]} is not kept: {Path(uri).name} reads {sum(len(r) for r in rows.values())} rows")
        spec, size = read_spec(folder), recipe.data.train.batch_size
        if scorer[0] == REFERENCE:
            with torch.device("meta"):
                reference = MTPModel(spec)
            fill(reference, load_state(folder, spec))
            score_reference(reference, rows, kept, size, named[1], place, stop)
        else:
            with torch.device("meta"):
                judge = RewardModel(spec)
            fill(judge, load_reward_state(folder, spec))
            score_rewards(judge, sets, tokenizer, recipe.critic.reward_template, kept, size, named[1], place, stop)
    reference = judge = None  # sharded modules refer to each other: only the collector frees them
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    scores = kept.load(shapes)
    if scores is None:
        raise CheckpointError(f"{kept.folder}: the scores that were just kept can't be read")
    say(f"score     {named[0]} {'kept' if made else 'was kept: the scorer is not needed'}")
    if not weighs_by_value(recipe.train.algo):
        return scores, named[0]
    if scorer[0] == REFERENCE:
        scores = {name: pseudo_rewards(scores[name], rows[name]) for name in scores}
        return zscored(scores, rows, longer_than=1), named[0]
    return zscored(scores, rows), named[0]
