"""Texts to rows of tokens: tokenizers, tokens that are kept, packing, and a sampler without hidden state.

Shape letters as in `wmtp.objective`: N rows in all, B rows of a batch, S positions of a row. D documents, P of them
after those that are longer than a row were cut, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from wmtp import config as settings
from wmtp.paths import open_to_all
from wmtp.sources import (
    DataError,
    Part,
    Record,
    TokenizerError,
    described,
    no_record,
    parts_of,
    read_records,
    records_of,
    refuse_evaluation,
)

FORMAT = 2
"""Of kept tokens; another number when the same file would give other tokens, or another count."""
CHUNK = 4_000_000
"""Characters that are tokenized together."""

Tell = Callable[[str], None]


def _nobody(line: str) -> None:
    """Where nobody listens."""


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def unk_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without a beginning or end token."""

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """`encode` of each text, by the library's own ``threads``."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[str]:
        """Every piece, in the order of its id."""

    def digest(self) -> str:
        """SHA-256 (hex) of the tokenizer's file and the special ids: all that ids of a text depend on."""


class SentencePieceTokenizer:
    """`tokenizer.model`, as Llama ships it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece  # late: half of the callers need only the packing

        try:
            # Read here, not by the library: its own reader misreads some paths and logs to stderr.
            proto = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (OSError, RuntimeError) as error:
            raise TokenizerError(_unreadable(path, "a SentencePiece model", error)) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self._file = proto

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, add_bos=False, add_eos=False)

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        return self._processor.encode(texts, add_bos=False, add_eos=False, num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    def digest(self) -> str:
        return _digest(self._file, self)


class TokenizersTokenizer:
    """`tokenizer.json`, with the special tokens that `tokenizer_config.json` names (or Llama's)."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._file = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(self._file.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception on a bad file
            raise TokenizerError(_unreadable(path, "a tokenizer.json", error)) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # `</s>` in a text is text
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        named = _special_tokens(path.parent / "tokenizer_config.json")
        self.bos_id: int = self._special(path, named.get("bos_token", "<s>"))
        self.eos_id: int = self._special(path, named.get("eos_token", "</s>"))
        unk = self._tokenizer.token_to_id(named.get("unk_token", "<unk>"))
        self.unk_id: int = -1 if unk is None else unk

    def _special(self, path: Path, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"{path}: has no token {token!r}\n"
                "  rule: documents start with the bos token and end with the eos token\n"
                "  next: name both in tokenizer_config.json beside it (bos_token, eos_token)"
            )
        return found

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read once, when the library starts its threads
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self) -> list[str]:
        by_id = {i: p for p, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        return [by_id.get(i, "") for i in range(max(by_id, default=-1) + 1)]

    def digest(self) -> str:
        return _digest(self._file, self)


def sentencepiece_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder/tokenizer.model`. Raises TokenizerError where it cannot be read."""
    return SentencePieceTokenizer(Path(folder) / "tokenizer.model")


def transformers_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder/tokenizer.json`. Raises TokenizerError where it cannot be read."""
    return TokenizersTokenizer(Path(folder) / "tokenizer.json")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.model` where there is one, else the json."""
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return sentencepiece_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        return transformers_tokenizer(folder)
    raise TokenizerError(
        f"{folder}: holds no tokenizer\n"
        "  rule: a model folder has a tokenizer.model or a tokenizer.json\n"
        "  next: publish or sync the model again, with its tokenizer"
    )


def tokenize(texts: Iterable[str], tokenizer: Tokenizer, threads: int = 1) -> list[list[int]]:
    """Each text as a document of ids: bos, the text, eos."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return [[bos, *ids, eos] for ids in tokenizer.encode_batch(list(texts), threads)]


# ---- tokens, kept by what they are made of ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Documents of ids, one after another."""

    ids: np.ndarray
    """`[T]` uint16, or int32 for a vocabulary that is larger than that."""
    lengths: np.ndarray
    """`[D]` int64."""
    digests: np.ndarray
    """`[D]` uint64; see `text_digest`."""
    keys: np.ndarray
    """`[D]` uint64; see `text_key`."""
    counts: Counter[str]
    """How many records of each layout there were, or were passed over."""

    def only(self, chosen: np.ndarray) -> Tokens:
        """The documents for which ``chosen`` `[D]` is true."""
        if chosen.all():
            return self
        ids = self.ids[np.repeat(chosen, self.lengths)]
        return Tokens(ids, self.lengths[chosen], self.digests[chosen], self.keys[chosen], self.counts)


ARRAYS = ("ids", "lengths", "digests", "keys")
"""The fields of `Tokens` that are arrays, in order."""


def joined(parts: Sequence[Tokens]) -> Tokens:
    """All documents of at least one ``parts``."""
    if len(parts) == 1:
        return parts[0]
    ids, lengths, digests, keys = (np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS)
    return Tokens(ids, lengths, digests, keys, sum((part.counts for part in parts), Counter()))


def text_digest(text: str) -> int:
    """The first 64 bits of a text's SHA-256: its identity, and, over `2**64`, which side of a split it falls on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def text_key(text: str) -> int:
    """`text_digest` of what is not whitespace: one text in two layouts, whose parts are joined otherwise, has one."""
    return text_digest("".join(text.split()))


def tokens_of(
    part: Part, tokenizer: Tokenizer, shelf: Path | None = None, threads: int = 1, tell: Tell = _nobody
) -> Tokens:
    """The documents of a part, as they are kept in the folder ``shelf``, or made now and kept there.

    The name of what is kept is a digest of the files' content, the tokenizer and `FORMAT`.
    """
    made_of = json.dumps([FORMAT, part.digests(), tokenizer.digest()])
    file = shelf / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors" if shelf else None
    if file and file.is_file():
        try:
            tokens = _kept(file, made_of, tokenizer)
            tell(f"data      {part.name}: {described(tokens.counts)}; {len(tokens.ids)} tokens, kept from before")
            return tokens
        except (OSError, SafetensorError, ValueError) as error:
            tell(f"data      warn  {file} can't be used ({error}): tokenized again")
    began = time.monotonic()
    tokens = _tokenized(part, tokenizer, threads)
    if file:
        try:
            _keep(file, tokens, made_of)
        except (OSError, SafetensorError) as error:
            tell(f"data      warn  {file} can't be written ({error}): tokens are made again by the next run")
    seconds = time.monotonic() - began
    tell(f"data      {part.name}: {described(tokens.counts)}; {len(tokens.ids)} tokens, made in {seconds:.1f} s")
    return tokens


def _keep(file: Path, tokens: Tokens, made_of: str) -> None:
    """Raises OSError or SafetensorError; nothing is left then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.stem}.", dir=file.parent)
    staging = Path(name)
    try:
        os.close(descriptor)
        about = {"made_of": made_of, "counts": json.dumps(tokens.counts)}
        save_file({name: getattr(tokens, name) for name in ARRAYS}, staging, about)
        open_to_all(staging)
        with staging.open("rb") as handle:
            os.fsync(handle.fileno())
        staging.replace(file)
    except FileNotFoundError:  # another's clean-up took it
        if not file.is_file():
            raise
    finally:
        staging.unlink(missing_ok=True)


def _kept(file: Path, made_of: str, tokenizer: Tokenizer) -> Tokens:
    """Raises OSError, SafetensorError or ValueError for what is torn, or is not what its name says."""
    with safe_open(file, framework="numpy") as found:
        about = found.metadata() or {}
        if about.get("made_of") != made_of or {*found.keys()} != {*ARRAYS}:
            raise ValueError("not made of this file by this tokenizer")
        ids, lengths, digests, keys = (found.get_tensor(name) for name in ARRAYS)
    whole = lengths.sum() == len(ids) and len(lengths) == len(digests) == len(keys)
    if not whole or ids.max(initial=0) >= len(tokenizer.pieces()):
        raise ValueError("its parts do not fit each other")
    return Tokens(ids, lengths, digests, keys, Counter(json.loads(about["counts"])))


def _tokenized(part: Part, tokenizer: Tokenizer, threads: int) -> Tokens:
    counts: Counter[str] = Counter()
    kind = np.dtype(np.uint16 if len(tokenizer.pieces()) <= 2**16 else np.int32)
    ids, lengths = [np.empty(0, kind)], [np.empty(0, np.int64)]
    digests, keys = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for texts in _chunks(record.text for record in records_of(part, counts)):
        documents = tokenize(texts, tokenizer, threads)
        lengths.append(np.array([len(document) for document in documents]))
        ids.append(np.fromiter(chain.from_iterable(documents), kind, lengths[-1].sum()))
        digests.append(np.array([text_digest(text) for text in texts], np.uint64))
        keys.append(np.array([text_key(text) for text in texts], np.uint64))
    return Tokens(np.concatenate(ids), np.concatenate(lengths), np.concatenate(digests), np.concatenate(keys), counts)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about `CHUNK` characters."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= CHUNK:
            yield some
            some, size = [], 0
    if some:
        yield some


# ---- rows ------------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A packed document: all of document ``source`` of the input, or, where that was too long, a part of it."""

    row: int
    at: int
    """Position of its first token in the row."""
    source: int
    ids: np.ndarray
    whole: bool
    """Not cut: it is the source document itself."""


@dataclass(frozen=True)
class Rows:
    """Packed tokens; see `pack`. A row is a stretch of the documents: it is laid out when it is taken."""

    ids: np.ndarray
    """`[T]`, every token of every row, without padding."""
    source: np.ndarray
    """`[P]` int64: which document of the input a packed one is of."""
    begin: np.ndarray
    """`[P + 1]` int64: where each packed document begins in ``ids``, and the end."""
    first: np.ndarray
    """`[N + 1]` int64: the first packed document of each row, and P."""
    max_length: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, S)`."""
        return len(self), self.max_length

    @property
    def tokens(self) -> int:
        """How many positions are not padding."""
        return len(self.ids)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(x_bs, document_bs, pad_bs)` of these rows, in this order.

        int64 tokens, `pad_id` on padding; int64 numbers of the documents within their row, -1 on padding; bool.
        """
        x = np.full((len(indices), self.max_length), self.pad_id, dtype=np.int64)
        document = np.full_like(x, -1)
        for i, n in enumerate(indices.tolist()):
            begin = self.begin[self.first[n] : self.first[n + 1] + 1]
            size = begin[-1] - begin[0]
            x[i, :size] = self.ids[begin[0] : begin[-1]]
            document[i, :size] = np.repeat(np.arange(len(begin) - 1), np.diff(begin))
        document_bs = torch.from_numpy(document)
        return torch.from_numpy(x), document_bs, document_bs < 0

    def pieces(self) -> Iterator[Piece]:
        """The packed documents in order."""
        parts = np.bincount(self.source)
        for row in range(len(self)):
            for p in range(self.first[row], self.first[row + 1]):
                at, source = int(self.begin[p] - self.begin[self.first[row]]), int(self.source[p])
                ids = self.ids[self.begin[p] : self.begin[p + 1]]
                yield Piece(row, at, source, ids, bool(parts[source] == 1))

    def last_tokens(self, longer_than: int = 0) -> Tensor:
        """`[N, S]` bool: where a document of more tokens than that ends."""
        ends = torch.zeros(self.shape, dtype=torch.bool)
        row = np.repeat(np.arange(len(self)), np.diff(self.first))
        at = self.begin[1:] - self.begin[self.first[row]] - 1
        chosen = np.diff(self.begin) > longer_than
        ends[torch.from_numpy(row[chosen]), torch.from_numpy(at[chosen])] = True
        return ends

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokens and their layout."""
        found = hashlib.sha256(f"{self.max_length} {self.pad_id} {self.ids.dtype}".encode())
        for part in (self.first, self.begin, self.ids):
            found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()


def pack(documents: Iterable[Sequence[int]], max_length: int, pad_id: int, pack_sequences: bool) -> Rows:
    """`pack_flat` of documents that are lists."""
    listed = list(documents)
    lengths = np.array([len(document) for document in listed], dtype=np.int64)
    ids = np.fromiter(chain.from_iterable(listed), np.int32, lengths.sum())
    return pack_flat(ids, lengths, max_length, pad_id, pack_sequences)


def pack_flat(ids: np.ndarray, lengths: np.ndarray, max_length: int, pad_id: int, pack_sequences: bool) -> Rows:
    """Documents laid into rows of `max_length`; with `pack_sequences` False one to a row.

    A document longer than a row is cut into documents of at most `max_length`. Packing takes the
    documents in order and starts a new row when the next does not fit whole, so that no document
    is cut for the sake of packing. Empty documents are left out. ``ids`` `[T]`, ``lengths`` `[D]`.
    """
    if max_length < 1:
        raise DataError(
            f"max_length is {max_length}\n"
            "  rule: a row holds at least one token\n"
            "  next: raise data.max_length in the recipe"
        )
    parts = -(-lengths // max_length)
    source = np.repeat(np.arange(len(lengths)), parts)
    number = np.arange(len(source)) - np.repeat(np.cumsum(parts) - parts, parts)
    sizes = np.minimum(lengths[source] - number * max_length, max_length)
    begin = np.concatenate(([0], np.cumsum(sizes)))
    first = np.arange(len(source) + 1)
    if pack_sequences:
        # Of each packed document, the first that is no longer in a row that begins with it.
        following = np.searchsorted(begin, begin[:-1] + max_length, side="right") - 1
        starts = [0]
        while starts[-1] < len(source):
            starts.append(int(following[starts[-1]]))
        first = np.array(starts)
    return Rows(ids, source, begin, first, max_length, pad_id)


@dataclass(frozen=True)
class Corpus:
    """One side of a run's data: its rows, and the records that they were made of."""

    records: Callable[[], Sequence[Record]]
    """Reads them again, in the order of the rows' sources: only a reward model wants more than their tokens."""
    rows: Rows

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokens and how they lie in rows: another one is other data."""
        return self.rows.digest


def read_sets(
    data: settings.Data,
    folders: Mapping[str, Path],
    tokenizer: Tokenizer,
    shelf: Path | None = None,
    threads: int = 1,
    tell: Tell = _nobody,
) -> dict[str, Corpus]:
    """`train` and, where something is held out, `eval`, of the sources in ``folders``.

    Raises DataError for bad data, for HumanEval to train on, and for a side without a document.
    """

    def told_of(name: str) -> Tell:
        return lambda text: tell(re.sub(r"^(data +)(?!warn)", rf"\g<1>{name}/", text))

    def tokens(names: Sequence[str], allowed: bool) -> list[Tokens]:
        found = []
        for name in names:
            folder = folders[name]
            try:
                parts = parts_of(folder)
                found.append(joined([tokens_of(part, tokenizer, shelf, threads, told_of(name)) for part in parts]))
                if not len(found[-1].lengths):
                    raise no_record(folder, found[-1].counts)
            except DataError as error:
                if folder.name == name:
                    raise
                # A synced source is read under its digest, which nobody knows it by.
                raise DataError(str(error).replace(str(folder), name)) from error
            refuse_evaluation(name, found[-1].counts, allowed)
        return found

    def corpus(found: Tokens, names: Sequence[str], chosen: np.ndarray, layout: settings.SourceData) -> Corpus:
        def records() -> list[Record]:
            every = (record for name in names for record in read_records(folders[name]))
            return [record for record, wanted in zip(every, chosen, strict=True) if wanted]

        some = found.only(chosen)
        return Corpus(
            records, pack_flat(some.ids, some.lengths, layout.max_length, tokenizer.eos_id, layout.pack_sequences)
        )

    held = tokens(data.eval.sources, allowed=True)
    train = tokens(data.train.sources, allowed=data.train.allow_evaluation_data)
    together, own = joined([*held, *train]), joined(train)
    named = len(together.lengths) - len(own.lengths)
    trained, split = sides(own.digests, own.keys, together.keys[:named], data.eval.share)
    if known := int((~trained & ~split).sum()):
        tell(f"data      {known} of {len(trained)} documents are not trained on: what is held out has the same text")
    sets = {"train": corpus(own, data.train.sources, trained, data.train)}
    if data.eval.held_out:
        chosen = np.concatenate((np.ones(named, dtype=bool), split))
        sets["eval"] = corpus(together, [*data.eval.sources, *data.train.sources], chosen, data.eval)
    return sets


def sides(digests: np.ndarray, keys: np.ndarray, held: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Which documents of the training sources are trained on, and which the split holds out: `[D]` bool each.

    ``digests`` `[D]` are `text_digest`s, ``keys`` `[D]` and ``held`` `text_key`s. What an evaluation source has is not
    trained on, whatever its whitespace; of the others those whose digest, as a fraction of 1, lies below ``share`` are
    held out: by the text alone, whatever is beside it.
    """
    known, below = np.isin(keys, held), digests < np.uint64(share * 2**64)
    split = ~known & below
    trained = ~known & ~below & ~np.isin(keys, keys[split])
    if not trained.any():
        raise DataError(
            f"data.train.sources: of {len(digests)} documents there is no text that is not held out\n"
            "  rule: at least one document to train on\n"
            "  next: look at the folders, at data.eval.sources and data.eval.share"
        )
    if share and not split.any():
        raise DataError(
            f"data.eval.share: {share} holds out none of {len(digests)} documents\n"
            "  rule: a split has documents on both sides\n"
            "  next: a larger share, or data.eval.sources and data.eval.share: 0"
        )
    return trained, split


class Batches:
    """Global batches as a function of `(seed, n)` alone, so that a resumed run needs no state.

    The epochs' orders, each shuffled from `(seed, epoch)`, are read as one endless list, and batch
    `n` is its entries `n * rows_per_step` onwards. A batch at the end of an epoch is thus filled
    from the beginning of the next: every row is seen once per epoch, and every batch is full.
    """

    def __init__(self, rows: Rows, rows_per_step: int, seed: int) -> None:
        if len(rows) == 0 or rows_per_step < 1:
            raise DataError(
                f"{len(rows)} rows in steps of {rows_per_step}\n"
                "  rule: both are at least 1\n"
                "  next: give a data source with records and a batch size of at least 1"
            )
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was seen once (the last of them may reach into the next epoch)."""
        return -(-len(self.rows) // self.rows_per_step)

    def global_batch(self, n: int) -> Tensor:
        """Row indices `[rows_per_step]` int64 of global batch `n >= 0`, over all ranks."""
        if n < 0:
            raise ValueError(f"batch number is {n}, must be at least 0")
        size = len(self.rows)
        at, end = n * self.rows_per_step, (n + 1) * self.rows_per_step
        parts: list[np.ndarray] = []
        while at < end:
            epoch, offset = divmod(at, size)
            part = self._order(epoch)[offset : offset + end - at]
            parts.append(part)
            at += len(part)
        return torch.from_numpy(np.concatenate(parts))

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`Rows.take`."""
        return self.rows.take(indices)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # neighbours are enough, old ones are rebuilt when asked
                del self._orders[next(iter(self._orders))]
            # Two 64-bit words, so that a negative seed works and no two seeds share an epoch.
            words = [self.seed & (2**64 - 1), epoch]
            order = np.random.Generator(np.random.PCG64(words)).permutation(len(self.rows))
            self._orders[epoch] = order.astype(np.int64)
        return self._orders[epoch]


def _unreadable(path: Path, kind: str, error: Exception) -> str:
    return (
        f"{path}: cannot be read as {kind} ({error})\n"
        "  rule: a model folder holds its tokenizer, whole\n"
        "  next: publish or sync the model again"
    )


def _special_tokens(path: Path) -> dict[str, str]:
    """The named special tokens; each is a text, or an object with the text as `content`."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(_unreadable(path, "JSON", error)) from error
    named: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token"):
        value = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            named[key] = value
    if "bos_token" not in named and isinstance(settings, dict) and "bos_token" in settings and "eos_token" in named:
        named["bos_token"] = named["eos_token"]  # null, as Qwen's: what ends a document begins the next
    return named


def _digest(file: bytes, tokenizer: Tokenizer) -> str:
    special = f"{tokenizer.bos_id} {tokenizer.eos_id} {tokenizer.unk_id} "
    return hashlib.sha256(special.encode() + file).hexdigest()
