"""One vocabulary in all models of a run: the size that each says, and the same pieces in the same order.

Exit codes: 0 one vocabulary, 2 bad arguments, 13 a model can't be read, 14 vocabularies differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

EXPECTED = 32000
"""Llama's, unless a recipe says otherwise; it has all its pieces."""
PADDING, MULTIPLE = 512, 64
"""Another embedding may have rows that no piece has, fewer than the first: padded to a multiple of the second."""
SIZE_FILES = ("config.json", "params.json")


class VocabError(ValueError):
    """Vocabularies differ; str() names both models and the first difference."""


class ModelUnreadableError(ValueError):
    """A model's folder does not say its vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    name: str
    size: int
    pieces: Sequence[str]


def shape_file(there: Iterable[str]) -> str | None:
    """Which of a model's files, by their names ``there``, says its shapes; None where none does.

    Where there are both, the weights say whose layout it is: a ``consolidated*.pth`` is Meta's.
    """
    names = set(there)
    said = [name for name in SIZE_FILES if name in names]
    metas = any(re.fullmatch(r"consolidated(\.\d\d)?\.pth", name) for name in names)
    return "params.json" if metas and "params.json" in said else next(iter(said), None)


def stated_size(folder: Path) -> int | None:
    """``vocab_size`` of config.json or params.json; None where a Meta file leaves it to the tokenizer (-1)."""
    name = shape_file(path.name for path in folder.iterdir())
    if name is None:
        raise ModelUnreadableError(f"{folder}: neither {' nor '.join(SIZE_FILES)}")
    path = folder / name
    try:
        size = json.loads(path.read_text(encoding="utf-8"))["vocab_size"]
    except (ValueError, KeyError, TypeError):
        raise ModelUnreadableError(f"{path}: no vocab_size in it") from None
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise ModelUnreadableError(f"{path}: vocab_size {size!r} is not a whole number above 0")
    return None if size == -1 else size


def read_vocabulary(name: str, folder: Path) -> Vocabulary:
    """Size and pieces of one model's folder."""
    if not folder.is_dir():
        raise ModelUnreadableError(f"{name}: {folder} is not a folder")
    size = stated_size(folder)
    from wmtp.data import load_tokenizer

    try:
        pieces = load_tokenizer(folder).pieces()
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelUnreadableError(f"{name}: {error}") from None
    return Vocabulary(name, len(pieces) if size is None else size, pieces)


def compare(vocabularies: Sequence[Vocabulary], expected: int) -> None:
    """VocabError for a size that is not `expected` or the first piece in which two models differ."""
    for one in vocabularies:
        if one.size != expected:
            raise VocabError(f"{one.name}: vocab_size {one.size}, expected {expected}")
        beyond = one.size - len(one.pieces)
        if beyond and (one.size == EXPECTED or one.size % MULTIPLE or not 0 < beyond < PADDING):
            raise VocabError(f"{one.name}: its tokenizer has {len(one.pieces)} pieces, its vocab_size is {one.size}")
    first = vocabularies[0]
    for other in vocabularies[1:]:
        for number, (mine, theirs) in enumerate(zip_longest(first.pieces, other.pieces)):
            if mine != theirs:
                raise VocabError(f"{first.name} and {other.name} differ at piece {number}: {mine!r} and {theirs!r}")


def content_digest(pieces: Sequence[str]) -> str:
    """12 hexadecimal digits of the pieces in order, whatever file they came from."""
    return hashlib.sha256("\n".join(pieces).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _refuse(what: str, rule: str, then: str, code: int) -> int:
    print(f"vocab     FAIL  {what}\n          rule  {rule}\n          next  {then}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.vocab", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--expected", type=int, default=EXPECTED, help="vocab_size that every model has (32000)")
    arguments = parser.parse_args(argv)
    try:
        found = []
        for word in arguments.models:
            name, _, folder = word.partition("=")
            found.append(read_vocabulary(name, Path(folder)))
        compare(found, arguments.expected)
    except ModelUnreadableError as error:
        return _refuse(
            str(error),
            "each model has its vocab_size and a tokenizer",
            "name its folder in paths.models; scripts/sync_models.sh brings it; if the bucket has it so, publish again",
            13,
        )
    except VocabError as error:
        rule = "all models of a run share one vocabulary, in size, order and content"
        return _refuse(
            str(error), rule, "name models of one family in paths.models, or their size in model.vocab_size", 14
        )
    names = ", ".join(one.name for one in found)
    print(f"vocab     ok    one vocabulary of {found[0].size} pieces in {names}", file=sys.stderr)
    digest = content_digest(found[0].pieces)
    print(json.dumps({"vocab_size": found[0].size, "pieces": digest, "models": [one.name for one in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
