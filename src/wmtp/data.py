"""Texts to rows of tokens: tokenizers, sources, packing, and a sampler without hidden state.

Shape letters as in `wmtp.objective`: N rows in all, B rows of a batch, S positions of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

PROMPT_KEYS = ("prompt", "text")
SOLUTION_KEYS = ("solution", "code")


class DataError(ValueError):
    """Data or a tokenizer that cannot be used; the message names the place, rule and next step."""


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

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[str]:
        """Every piece, in the order of its id."""

    def digest(self) -> str:
        """SHA-256 (hex) of the pieces in order and the special ids, whatever the file format."""


class SentencePieceTokenizer:
    """`tokenizer.model`, as Llama ships it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece  # late: half of the callers need only the packing

        try:
            # Read here, not by the library: its own reader misreads some paths and logs to stderr.
            proto = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (OSError, RuntimeError) as error:
            raise DataError(_unreadable(path, "a SentencePiece model", error)) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    def digest(self) -> str:
        return _pieces_digest(self)


class TokenizersTokenizer:
    """`tokenizer.json`, with the special tokens that `tokenizer_config.json` names (or Llama's)."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception on a bad file
            raise DataError(_unreadable(path, "a tokenizer.json", error)) from error
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
            raise DataError(
                f"{path}: has no token {token!r}\n"
                "  rule: documents start with the bos token and end with the eos token\n"
                "  next: name both in tokenizer_config.json beside it (bos_token, eos_token)"
            )
        return found

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self) -> list[str]:
        by_id = {i: p for p, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        return [by_id.get(i, "") for i in range(max(by_id, default=-1) + 1)]

    def digest(self) -> str:
        return _pieces_digest(self)


def sentencepiece_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder/tokenizer.model`. Raises DataError where it cannot be read."""
    return SentencePieceTokenizer(Path(folder) / "tokenizer.model")


def transformers_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder/tokenizer.json`. Raises DataError where it cannot be read."""
    return TokenizersTokenizer(Path(folder) / "tokenizer.json")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.model` where there is one, else the json."""
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return sentencepiece_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        return transformers_tokenizer(folder)
    raise DataError(
        f"{folder}: holds no tokenizer\n"
        "  rule: a model folder has a tokenizer.model or a tokenizer.json\n"
        "  next: publish or sync the model again, with its tokenizer"
    )


@dataclass(frozen=True)
class Record:
    """One entry of a data source."""

    prompt: str
    solution: str

    @property
    def text(self) -> str:
        """What a model is trained on."""
        return f"{self.prompt}\n{self.solution}"


def read_records(folder: Path) -> list[Record]:
    """Every record of every `*.jsonl` in `folder`, files by name.

    A record is an object with a text under `prompt` or `text`, and under `solution` or `code`.
    Blank lines are passed over. Raises DataError naming file and line of the first bad one.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(
            f"{folder}: no *.jsonl file there\n"
            "  rule: a data source is a folder of JSON Lines files\n"
            "  next: correct the path in the configuration's paths.datasets, or sync the data"
        )
    records: list[Record] = []
    for file in files:
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if line.strip():
                records.append(_record_of(line, f"{file}:{number}"))
    if not records:
        raise DataError(
            f"{folder}: its *.jsonl files hold no record\n"
            "  rule: a data source has at least one record\n"
            "  next: sync the data again"
        )
    return records


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each text as a document of ids: bos, the text, eos."""
    return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]


class Piece(NamedTuple):
    """Where a packed document comes from: tokens `start` to `start + length` of document `source` of the input."""

    source: int
    start: int
    length: int
    whole: bool
    """Not cut: it is the source document itself."""


@dataclass(frozen=True)
class Rows:
    """Packed tokens; see `pack`."""

    x: Tensor
    """`[N, S]` int64 tokens, `pad_id` on padding."""
    document: Tensor
    """`[N, S]` int64, the document's number within its row, -1 on padding."""
    pad: Tensor
    """`[N, S]` bool, True on padding."""
    pieces: tuple[tuple[Piece, ...], ...] = ()
    """The documents of each row, in the order of their numbers."""

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def tokens(self) -> int:
        """How many positions are not padding."""
        return int((~self.pad).sum())


def pack(documents: Iterable[Sequence[int]], max_length: int, pad_id: int, pack_sequences: bool) -> Rows:
    """Documents laid into rows of `max_length`; with `pack_sequences` False one to a row.

    A document longer than a row is cut into documents of at most `max_length`. Packing takes the
    documents in order and starts a new row when the next does not fit whole, so that no document
    is cut for the sake of packing. Empty documents are left out.
    """
    if max_length < 1:
        raise DataError(
            f"max_length is {max_length}\n"
            "  rule: a row holds at least one token\n"
            "  next: raise data.max_length in the recipe"
        )
    rows: list[list[Sequence[int]]] = []
    pieces: list[list[Piece]] = []
    used = max_length
    for source, document in enumerate(documents):
        for start in range(0, len(document), max_length):
            piece = document[start : start + max_length]
            if not pack_sequences or used + len(piece) > max_length:
                rows.append([])
                pieces.append([])
                used = 0
            rows[-1].append(piece)
            pieces[-1].append(Piece(source, start, len(piece), len(piece) == len(document)))
            used += len(piece)
    x = np.full((len(rows), max_length), pad_id, dtype=np.int64)
    ids = np.full((len(rows), max_length), -1, dtype=np.int64)
    for n, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            x[n, at : at + len(piece)] = piece
            ids[n, at : at + len(piece)] = number
            at += len(piece)
    document_ns = torch.from_numpy(ids)
    return Rows(torch.from_numpy(x), document_ns, document_ns < 0, tuple(map(tuple, pieces)))


@dataclass(frozen=True)
class Corpus:
    """Records, and the rows that they were packed into."""

    records: list[Record]
    rows: Rows

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the packed rows."""
        parts = hashlib.sha256(self.rows.x.numpy().tobytes())
        parts.update(self.rows.document.numpy().tobytes())
        return parts.hexdigest()


def read_corpus(folders: Sequence[Path], without: Iterable[str], tokenizer: Tokenizer, layout: Layout) -> Corpus:
    """The records of ``folders`` in order, less those whose text is in ``without``, tokenized and packed."""
    held = set(without)
    records = [record for folder in folders for record in read_records(folder) if record.text not in held]
    documents = tokenize([record.text for record in records], tokenizer)
    return Corpus(records, pack(documents, layout.max_length, tokenizer.eos_id, layout.pack_sequences))


class Layout(Protocol):
    """`data.train` or `data.eval` of a recipe."""

    @property
    def max_length(self) -> int: ...
    @property
    def pack_sequences(self) -> bool: ...


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
        """`(x_bs, document_bs, pad_bs)` of these rows, in this order."""
        return self.rows.x[indices], self.rows.document[indices], self.rows.pad[indices]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # neighbours are enough, old ones are rebuilt when asked
                del self._orders[next(iter(self._orders))]
            # Two 64-bit words, so that a negative seed works and no two seeds share an epoch.
            words = [self.seed & (2**64 - 1), epoch]
            order = np.random.Generator(np.random.PCG64(words)).permutation(len(self.rows))
            self._orders[epoch] = order.astype(np.int64)
        return self._orders[epoch]


def _record_of(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(_bad_line(place, f"is not JSON ({error})")) from error
    if not isinstance(record, dict):
        raise DataError(_bad_line(place, f"is a {type(record).__name__}, not an object"))
    return Record(_field(record, PROMPT_KEYS, place), _field(record, SOLUTION_KEYS, place))


def _field(record: dict[str, Any], keys: tuple[str, ...], place: str) -> str:
    for key in keys:
        if key in record:
            value = record[key]
            if not isinstance(value, str):
                kind = type(value).__name__
                raise DataError(_bad_line(place, f"has a {kind} as {key!r}, not a text"))
            try:
                value.encode()
            except UnicodeEncodeError:
                raise DataError(_bad_line(place, f"has half of a character (a lone surrogate) in {key!r}")) from None
            return value
    raise DataError(_bad_line(place, f"has neither {keys[0]!r} nor {keys[1]!r}"))


def _bad_line(place: str, what: str) -> str:
    return (
        f"{place}: {what}\n"
        "  rule: each line is an object with texts under prompt (or text) and solution (or code)\n"
        "  next: correct or remove that line"
    )


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
    return named


def _pieces_digest(tokenizer: Tokenizer) -> str:
    content = [tokenizer.pieces(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
