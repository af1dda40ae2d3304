"""Where texts come from: the files of a source, the layouts of their records, one record after another.

Imports no torch: the name of kept scores is made of the same files.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp.manifest import hash_file

PROMPT_KEYS = ("prompt", "text")
SOLUTION_KEYS = ("solution", "code")
PLAIN, CANONICAL = "prompt and solution", "prompt and canonical_solution"
CODE_CONTESTS, HUMAN_EVAL, TEXT = "CodeContests", "HumanEval", "text file"
PASSED = "without a solution in Python, passed over"
FIELDS = {*PROMPT_KEYS, *SOLUTION_KEYS, "canonical_solution", "description", "solutions", "task_id"}
LANGUAGES = (3, 1)  # CodeContests' numbers of Python 3 and 2, in the order in which they are wanted
RECORD_FILES = (".jsonl", ".parquet")
CODE = "bash c cc cpp cs cu go h hpp hs java jl js jsx kt lua php pl py pyi r rb rs scala sh sql swift ts tsx"
TEXT_FILES = frozenset("." + ending for ending in f"{CODE} md rst txt".split(" "))
BATCH = 64  # CodeContests has up to megabytes of tests a record


class DataError(ValueError):
    """Data that cannot be used; the message names the place, rule and next step."""


class TokenizerError(DataError):
    """A model folder whose tokenizer can't be used: what reads data fails, the model is to be mended."""


@dataclass(frozen=True)
class Record:
    """One entry of a data source."""

    prompt: str
    solution: str
    joint: str = "\n"
    """What stands between the two."""

    @property
    def text(self) -> str:
        """What a model is trained on."""
        return f"{self.prompt}{self.joint}{self.solution}"


@dataclass(frozen=True)
class Part:
    """Files that are read together: one of records, or all texts of a folder."""

    name: str
    kind: str
    """`jsonl`, `parquet` or `text`."""
    files: tuple[Path, ...]

    def digests(self) -> list[str]:
        """blake3 of each file; another kind reads the same bytes otherwise, and so has other digests."""
        return [kind_digest(self.kind, hash_file(file)) for file in self.files]


def kind_digest(kind: str, digest: str) -> str:
    """The digest of a file that is read as ``kind``."""
    return digest if kind == "jsonl" else f"{kind}:{digest}"


def parts_of(folder: Path) -> list[Part]:
    """What is read of a source: its `*.jsonl` and `*.parquet` by name, else every text file beneath it by path.

    Raises DataError for a folder that holds neither, or whose records lie deeper.
    """
    folder = Path(folder)
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in inside if file.suffix in RECORD_FILES and file.is_file()]
    if files:
        return [Part(file.name, file.suffix[1:], (file,)) for file in files]
    beneath = list(_beneath(folder))
    deeper = [file for file in beneath if file.suffix in RECORD_FILES]
    texts = sorted(
        (file for file in beneath if file.suffix.lower() in TEXT_FILES), key=lambda file: file.relative_to(folder)
    )
    if deeper or not texts:
        found = f"its records are deeper: {min(deeper).relative_to(folder)}" if deeper else "holds no data"
        raise DataError(
            f"{folder}: {found}\n"
            "  rule: a data source is a folder with *.jsonl or *.parquet files, or with text or code files alone\n"
            "  next: correct the path in the configuration's paths.datasets, or sync the data"
        )
    return [Part(folder.name, "text", tuple(texts))]


def _beneath(folder: Path) -> Iterator[Path]:
    """Files at any depth; nothing hidden, no link, no `__pycache__`."""
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            file = Path(at, name)
            if not name.startswith(".") and not file.is_symlink():
                yield file


def records_of(part: Part, counts: Counter[str]) -> Iterator[Record]:
    """The records of a part in order; ``counts`` gets how many there were of each layout, or were passed over.

    Raises DataError naming file and line, row or file of the first bad one.
    """
    if part.kind == "text":
        for file in part.files:
            text = _text_of(file)
            if text:
                counts[TEXT] += 1
                yield Record("", text, "")
        return
    for file in part.files:
        for fields, place in _rows(file) if part.kind == "parquet" else _lines(file):
            layout, record = _record_of(fields, place)
            counts[layout if record else PASSED] += 1
            if record:
                yield record


def read_records(folder: Path, counts: Counter[str] | None = None) -> list[Record]:
    """Every record of a source, in order; ``counts`` as for `records_of`.

    Raises DataError for a bad record, and where there is none.
    """
    counts = Counter() if counts is None else counts
    records = [record for part in parts_of(folder) for record in records_of(part, counts)]
    if not records:
        raise no_record(folder, counts)
    return records


def no_record(folder: Path, counts: Mapping[str, int]) -> DataError:
    """A source of which nothing is left."""
    told = f" ({described(counts)})" if counts else ""
    return DataError(
        f"{folder}: its files hold no record{told}\n"
        "  rule: a data source has at least one record\n"
        "  next: sync the data again, or name another source"
    )


def described(counts: Mapping[str, int]) -> str:
    """`73 CodeContests, 3 without a solution in Python, passed over`."""
    return ", ".join(f"{count} {layout}" for layout, count in counts.items())


def refuse_evaluation(name: str, counts: Mapping[str, int], allowed: bool) -> None:
    """HumanEval is what models are compared by: who trains on it measures memory. Raises DataError."""
    if counts.get(HUMAN_EVAL) and not allowed:
        raise DataError(
            f"data.train.sources: {name}: {counts[HUMAN_EVAL]} records are HumanEval's\n"
            "  rule: HumanEval is for evaluation; a model that was trained on it can't be compared by it\n"
            "  next: name it in data.eval.sources, or say data.train.allow_evaluation_data: true"
        )


# ---- files to fields -------------------------------------------------------------------------------------------------


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: is not UTF-8 (byte {error.start})\n"
            "  rule: text and code files are UTF-8\n"
            "  next: convert or remove that file"
        ) from error


def _lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            place = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise _bad(place, f"is not JSON ({error})", ONE_OBJECT) from error
            if not isinstance(fields, dict):
                raise _bad(place, f"is a {type(fields).__name__}, not an object", ONE_OBJECT)
            yield fields, place


def _rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows counted from 1, of the columns that some layout reads; a null is a field that is not there."""
    from arro3.io import read_parquet  # late: few sources are parquet

    with file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - 4))
        if size < 12 or handle.read() != b"PAR1":
            raise _unreadable(file, f"{size} bytes that do not end as parquet ends")
    number = 0
    try:
        for batch in read_parquet(file, batch_size=BATCH):
            columns = {name: batch.column(name).to_pylist() for name in batch.column_names if name in FIELDS}
            for i in range(batch.num_rows):
                number += 1
                fields = {name: values[i] for name, values in columns.items() if values[i] is not None}
                yield fields, f"{file}: row {number}"
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library's panics are no Exception
        raise _unreadable(file, f"after row {number}: {' '.join(str(error).split())[:200]}") from error


def _unreadable(file: Path, why: str) -> DataError:
    return DataError(
        f"{file}: cannot be read as parquet ({why})\n"
        "  rule: a data source's files are whole\n"
        "  next: sync the data again"
    )


# ---- fields to records -----------------------------------------------------------------------------------------------


def _record_of(fields: Mapping[str, Any], place: str) -> tuple[str, Record | None]:
    """Layout and record; None for a problem that nobody solved in Python."""
    theirs = str(fields.get("task_id")).startswith("HumanEval/")
    if "canonical_solution" in fields:
        prompt, solution = (_field(fields, (key,), place) for key in ("prompt", "canonical_solution"))
        return HUMAN_EVAL if theirs else CANONICAL, Record(prompt, solution, "")
    if "solutions" in fields and "description" in fields:
        solved = _python_of(fields["solutions"], place)
        description = _field(fields, ("description",), place)
        return CODE_CONTESTS, None if solved is None else Record(description, solved)
    plain = Record(_field(fields, PROMPT_KEYS, place), _field(fields, SOLUTION_KEYS, place))
    return HUMAN_EVAL if theirs else PLAIN, plain


def _python_of(solutions: Any, place: str) -> str | None:
    languages, texts = (
        [solutions.get(key) for key in ("language", "solution")] if isinstance(solutions, dict) else [None, None]
    )
    if not (isinstance(languages, list) and isinstance(texts, list) and len(languages) == len(texts)):
        raise _bad(place, "has 'solutions' that are not lists of as many 'language' as 'solution'")
    for language in LANGUAGES:
        if language in languages:
            return _field({"solution": texts[languages.index(language)]}, ("solution",), place)
    return None


def _field(fields: Mapping[str, Any], keys: Iterable[str], place: str) -> str:
    for key in keys:
        if key in fields:
            value = fields[key]
            if not isinstance(value, str):
                raise _bad(place, f"has a {type(value).__name__} as {key!r}, not a text")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _bad(place, f"has half of a character (a lone surrogate) in {key!r}") from None
            return value
    have = ", ".join(map(repr, list(fields)[:6])) or "nothing"
    raise _bad(place, f"has neither {' nor '.join(map(repr, keys))} (it has {have})")


ONE_OBJECT = "each line of a .jsonl is one JSON object"
A_LAYOUT = (
    "a record has texts under prompt (or text) and solution (or code), or is HumanEval's (prompt, canonical_solution) "
    "or CodeContests' (description, solutions)"
)


def _bad(place: str, what: str, rule: str = A_LAYOUT) -> DataError:
    return DataError(f"{place}: {what}\n  rule: {rule}\n  next: correct or remove it")
