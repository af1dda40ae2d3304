"""Configuration and recipe: frozen settings, read strictly.

Usage: python -m wmtp.config --config FILE [--recipe FILE] [--set a.b=c]… [--env ENV]
           [--get KEY… | --json | --check]

`--get` prints one value a line: a key of either file, `digest`, or `models` (lines of role, name
and path, by tabs). Every finding is told with its file, line and key, not just the first.
Exit codes: 0 done, 2 the settings or the call are wrong.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import posixpath
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, cast
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError, core_schema
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.reader import ReaderError

from wmtp.paths import APP, PathError, PathResolver, split, under_app
from wmtp.registry import trainer_registry, weighs_by_reference, weighs_by_value

Key = tuple[str | int, ...]

# ---- findings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, which key, what; the rule; what to do next."""

    place: str
    key: str
    what: str
    rule: str
    next: str

    def __str__(self) -> str:
        where = f"{self.place} {self.key}" if self.key else self.place
        lines = (
            f"config    FAIL  {where}: {self.what}",
            f"          rule  {self.rule}",
            f"          next  {self.next}",
        )
        return "\n".join(map(printable, lines))


class ConfigError(ValueError):
    """The settings are wrong; `findings` has all that is, and `str` tells it."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("\n\n".join(str(finding) for finding in self.findings))


def printable(text: str) -> str:
    """The text with an escape for each character that would break its line or not be seen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…" + text[-1]


def dotted(key: Key) -> str:
    return ".".join(short(printable(str(part))) or '""' for part in key)


def shown(value: object) -> str:
    """A value as a finding quotes it: short, and on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or value is NULL:
        return "null"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return short(printable(text))


# ---- YAML 1.2, the strict part of it -------------------------------------------------------------

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_OTHER_BASE = re.compile(r"[-+]?0[0-9ox].*")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}$]*))?\}")
_LOOSE_VARIABLE = re.compile(r"\$[A-Za-z_(]")
_ODD_BREAK = re.compile("[\x85\u2028\u2029]")
_DEEPEST = 16


class _Null:
    """A null of a file. It is not None, so that no optional key takes it for absent."""


NULL = _Null()


class OtherBase(int):
    """`0x10`, `0o17`, `010`: another reader of YAML takes it for another number, so no key takes it."""


class Substituted(str):
    """Text that came out of `${VAR}`: where the key wants a number it is read as one."""


def plain(text: str) -> object:
    """A plain scalar by the core schema of YAML 1.2, but only `true` and `false` are booleans."""
    if text in ("", "~", "null", "Null", "NULL"):
        return NULL
    if text in ("true", "false"):
        return text == "true"
    if len(text) <= 400 and _INT.fullmatch(text):
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return OtherBase(number) if _OTHER_BASE.fullmatch(text) else number
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)


@dataclass
class Mark:
    """Where a value stands in its file, how it was written there, and what it came from."""

    place: str
    raw: str | None = None
    variables: list[str] = field(default_factory=list)


@dataclass
class Tree:
    """A file's values, with the mark of each key."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[Key, Mark] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """The line of this key, or of the nearest one above it that is in the file."""
        while key and key not in self.marks:
            key = key[:-1]
        return self.marks[key].place if key in self.marks else f"{self.name}:1"

    def add(self, key: Key, what: str, rule: str, next: str | None = None, place: str | None = None) -> None:
        place = place or self.place(key)
        self.findings.append(Finding(place, dotted(key), what, rule, next or self.go_on(place)))

    def go_on(self, place: str) -> str:
        if place.startswith("--set"):
            return "correct this --set"
        if place.startswith("environment"):
            return f"set or unset {place.removeprefix('environment ')}"
        # As it was called: without its launcher, the same command is about another file.
        names = ("ENV", "ALGO", "LAUNCHER", "CONFIG", "RECIPE")
        call = "".join(f" {name}={shlex.quote(os.environ[name])}" for name in names if os.environ.get(name))
        return f"edit the file, then: make dryrun{call}"

    def scalar(self, text: str, key: Key, mark: Mark, *, quoted: bool) -> object:
        """Substitute `${VAR}` and type what is left."""
        self.marks[key] = mark
        mark.raw = text
        if "${" not in text:
            return text if quoted else plain(text)

        def value(match: re.Match[str]) -> str:
            name, default = match[1], match[2]
            found = os.environ.get(name)
            if found or (found is not None and default is None):
                mark.variables.append(name)
                return found
            if default is None:
                self.add(
                    key,
                    f"${{{name}}}: the variable {name} is not set",
                    "a variable without a default must be set",
                    f"export {name}=…, or write ${{{name}:-default}}",
                    mark.place,
                )
                return f"${{{name}}}"
            return default

        if "${" in _VARIABLE.sub("", text):
            self.add(
                key,
                f"{shown(text)} has a ${{ that is no variable",
                "${VAR} and ${VAR:-default} are substituted, nothing else and not nested",
                place=mark.place,
            )
            return text
        return Substituted(_VARIABLE.sub(value, text))


class _Refused(Exception):
    """The document can't be read past this place."""

    def __init__(self, line: int, what: str, rule: str) -> None:
        super().__init__(what)
        self.line, self.what, self.rule = line, what, rule


def _events(text: str) -> Iterator[Any]:
    """The parser's events. What it breaks on without an error of its own is refused at the last event's line."""
    line = 1
    try:
        for event in YAML(typ="rt", pure=True).parse(text):
            line = event.start_mark.line + 1
            yield event
    except (ValueError, IndexError, OverflowError, AssertionError) as error:
        raise _Refused(line, f"not YAML: {error}", "a file is one YAML 1.2 mapping") from None


def _compose(tree: Tree, text: str, place: Callable[[int], str], root: Key = ()) -> object:
    """Build values from the parser's events: lines are known, and nothing is typed behind our back."""
    stack: list[tuple[dict[str, Any] | list[Any], Key]] = []
    pending: list[str | None] = []
    result: object = None
    documents = 0

    def put(value: object, key: Key) -> None:
        nonlocal result
        if not stack:
            result = value
        elif isinstance(stack[-1][0], dict):
            stack[-1][0][str(key[-1])] = value
            pending[-1] = None
        else:
            stack[-1][0].append(value)

    if odd := _ODD_BREAK.search(text):
        what = f"a character U+{ord(odd[0]):04X}"
        raise _Refused(
            text.count("\n", 0, odd.start()) + 1, what, "a line ends in a line feed: the parser takes this for one"
        )
    for event in _events(text):
        kind = type(event).__name__
        line = event.start_mark.line + 1
        if kind == "DocumentStartEvent":
            documents += 1
            if documents > 1:
                raise _Refused(line, "a second document begins", "a file is one YAML document")
            if event.version not in (None, (1, 2)) or event.tags:
                raise _Refused(line, "a directive is here", "files are YAML 1.2, without directives")
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            raise _Refused(
                line, "an anchor or alias is here", "anchors, aliases and merge keys are not read: write the value out"
            )
        if kind in ("MappingEndEvent", "SequenceEndEvent"):
            stack.pop()
            pending.pop()
            continue
        if kind not in ("ScalarEvent", "MappingStartEvent", "SequenceStartEvent"):
            continue
        if event.tag is not None:
            raise _Refused(line, f"the tag {event.tag} is here", "tags are not read: the key decides what its value is")
        if stack and isinstance(stack[-1][0], dict) and pending[-1] is None:
            if kind != "ScalarEvent":
                raise _Refused(line, "a key is a list or a mapping", "a key is a word")
            if event.value == "<<":
                raise _Refused(
                    line,
                    "a merge key (<<) is here",
                    "anchors, aliases and merge keys are not read: write the value out",
                )
            name = event.value
            if not_utf8(name):
                raise _Refused(line, f"the key {shown(name)} is not UTF-8", "a key is a word")
            key = (*stack[-1][1], name)
            if name in stack[-1][0]:
                first = tree.place(key).rpartition(":")[2]
                also = f"; it is also on line {first}" if first.isdigit() else ""
                tree.add(key, "duplicate key", f"a key stands once{also}", place=place(line))
            pending[-1] = name
            tree.marks[key] = Mark(place(line))
            continue
        if not stack:
            key = root
        elif isinstance(stack[-1][0], dict):
            key = (*stack[-1][1], cast(str, pending[-1]))
        else:
            key = (*stack[-1][1], len(stack[-1][0]))
        if kind == "ScalarEvent":
            where = tree.marks[key].place if key and key in tree.marks else place(line)
            # The parser marks where it folded a line by a bell, which no folded text can have of its own.
            said = event.value.replace("\a", "") if event.style == ">" else event.value
            put(tree.scalar(said, key, Mark(where), quoted=event.style is not None), key)
            continue
        if len(stack) >= _DEEPEST:
            raise _Refused(line, "nested too deeply", f"at most {_DEEPEST} levels")
        if key not in tree.marks:
            tree.marks[key] = Mark(place(line))
        value: dict[str, Any] | list[Any] = {} if kind == "MappingStartEvent" else []
        put(value, key)
        stack.append((value, key))
        pending.append(None)
    return result


def _parsed(tree: Tree, text: str, place: Callable[[int], str], root: Key = ()) -> object:
    """`_compose`, with what the parser refuses turned into a finding."""
    try:
        return _compose(tree, text, place, root)
    except _Refused as refused:
        line, what, rule = refused.line, refused.what, refused.rule
    except ReaderError as error:
        line = text.count("\n", 0, cast(int, error.position)) + 1
        what, rule = f"a character U+{ord(text[error.position]):04X}", "a file has printable text only"
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else 1
        what = f"not YAML: {getattr(error, 'problem', None) or error}"
        rule = "spaces indent, a tab never does" if "\\t" in what else "a file is one YAML 1.2 mapping"
    except RecursionError:
        line, what, rule = 1, "nested too deeply", f"at most {_DEEPEST} levels"
    tree.add(root, what, rule, place=place(line))
    return None


def read_file(path: str | os.PathLike[str]) -> Tree:
    """The file as a tree; what can't be read is among the tree's findings."""
    name = os.fspath(path)
    tree = Tree(name)

    def bad(what: str, rule: str, next: str) -> Tree:
        tree.findings.append(Finding(name, "", what, rule, next))
        return tree

    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes().count(b"\n", 0, error.start) + 1
        tree.add(
            (), f"byte 0x{error.object[error.start]:02x} is not UTF-8", "a file is UTF-8 text", place=f"{name}:{line}"
        )
        return tree
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
        return bad(
            "no such file",
            "the file must exist",
            f"there are: {', '.join(near)}" if near else "name a file that exists",
        )
    except (OSError, ValueError) as error:
        return bad(
            f"can't be read: {getattr(error, 'strerror', None) or error}",
            "a readable file is needed",
            "name another file, or make this one readable",
        )
    before = len(tree.findings)
    values = _parsed(tree, text, lambda line: f"{name}:{line}")
    if isinstance(values, dict):
        tree.values = values
    elif len(tree.findings) == before:
        what = "empty" if values is None or values is NULL else f"{shown(values)} is not a mapping of keys"
        tree.add((), what, "a file is one mapping of keys to values", place=f"{name}:1")
    return tree


# ---- the kinds of value --------------------------------------------------------------------------

_WORDS_FOR_TRUE = {"yes", "on", "y", "true"}
_WORDS_FOR_FALSE = {"no", "off", "n", "false"}


def wrong(what: str, rule: str, hint: str = "") -> PydanticCustomError:
    return PydanticCustomError("wmtp", "{what}", {"what": what, "rule": rule, "hint": hint})


def not_utf8(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


class Kind:
    """A rule for one value; pydantic calls `check` in place of its own reading of the type."""

    rule: str

    def check(self, value: Any) -> Any:
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def mistyped(self, hint: str = "") -> PydanticCustomError:
        return wrong("{value} is a wrong type", self.rule, hint)

    def requoted(self, value: object, pattern: re.Pattern[str]) -> PydanticCustomError:
        """A wrong type, with the number that was meant where it is one."""
        if isinstance(value, OtherBase):
            return self.mistyped(f"write {int(value)}, if that is the number")
        text = value.replace("_", "") if isinstance(value, str) else ""
        return self.mistyped(f"write {text}, without quotes" if len(text) <= 40 and pattern.fullmatch(text) else "")

    def out_of_range(self) -> PydanticCustomError:
        return wrong("{value} is out of range", self.rule)


class _Bounded(Kind):
    noun = "number"

    def __init__(
        self,
        ge: float | None = None,
        le: float | None = None,
        gt: float | None = None,
        lt: float | None = None,
    ) -> None:
        self.ge, self.le, self.gt, self.lt = ge, le, gt, lt
        signs = {">=": ge, ">": gt, "<=": le, "<": lt}
        bounds = [f"{sign} {bound}" for sign, bound in signs.items() if bound is not None]
        self.rule = " ".join([self.noun, " and ".join(bounds)]).strip()

    def bounded(self, value: Any) -> Any:
        if (
            (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        ):
            raise self.out_of_range()
        return value


class Whole(_Bounded):
    """Below 2^31, so that no count overflows where it is used: in a time-out, a shell, a tensor."""

    noun = "int"
    bits = 31

    def check(self, value: Any) -> int:
        if isinstance(value, Substituted):
            value = plain(value)
        if isinstance(value, float):
            whole = math.isfinite(value) and value == int(value) and abs(value) < 1e15
            raise self.mistyped(f"write {int(value)}" if whole else "")
        if isinstance(value, bool | OtherBase) or not isinstance(value, int):
            raise self.requoted(value, _INT)
        if self.bounded(value) >= 2**self.bits:
            raise wrong("{value} is too large", f"{self.rule}, below 2^{self.bits}")
        return value


class Seed(Whole):
    bits = 63


class Number(_Bounded):
    def check(self, value: Any) -> float:
        if isinstance(value, Substituted):
            value = plain(value)
        if isinstance(value, bool | OtherBase) or not isinstance(value, int | float):
            raise self.requoted(value, _FLOAT)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise wrong("{value} is not finite", f"{self.rule}, finite")
        if number != value:
            raise wrong("{value} has more digits than are kept", f"{self.rule}; a large one as 1e30")
        return self.bounded(number)


class Flag(Kind):
    rule = "true or false"

    def check(self, value: Any) -> bool:
        if isinstance(value, Substituted):
            value = plain(value)
        if isinstance(value, bool):
            return value
        word = value.lower() if isinstance(value, str) else ""
        if word in _WORDS_FOR_TRUE | _WORDS_FOR_FALSE:
            meant = "true" if word in _WORDS_FOR_TRUE else "false"
            raise self.mistyped(f"write {meant}, lower case and without quotes")
        raise self.mistyped()


class FlagOrSelective(Flag):
    rule = "true, false or selective"

    def check(self, value: Any) -> Any:
        return "selective" if value == "selective" else super().check(value)


class Text(Kind):
    rule = "text, not empty"
    longest = 4096  # a path on Linux

    def __init__(self, *, lines: bool = False) -> None:
        self.lines = lines

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.mistyped("" if isinstance(value, _Null | dict | list) else "quote it if it is meant as text")
        if not self.lines and not isinstance(value, Substituted) and _LOOSE_VARIABLE.search(value):
            raise wrong(
                "{value} has a $ that is no variable", "${VAR} and ${VAR:-default} are substituted, nothing else"
            )
        value = str(value)
        if not value.strip():
            raise wrong("{value} is empty", self.rule)
        if not_utf8(value):
            raise wrong("{value} is not UTF-8", self.rule)
        if any(not c.isprintable() and not (self.lines and c in "\n\t") for c in value):
            rule = "text that prints" if self.lines else "text that prints, on one line"
            raise wrong("{value} has a control character or one that is not seen", rule)
        if len(value.encode()) > self.longest:
            raise wrong(f"{{value}} has {len(value.encode())} bytes", f"{self.rule}, at most {self.longest} bytes")
        return value


class RunName(Text):
    longest = 200  # a folder's name is at most 255, and the run's own files add to it

    def check(self, value: Any) -> str:
        value = super().check(value)
        if "/" in value or value.startswith("."):
            raise wrong("{value} can't name a folder", "a run's name has no / and begins with no dot")
        return value


class DatasetName(Text):
    def check(self, value: Any) -> str:
        value = super().check(value)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise wrong("{value} can't name a dataset", "a dataset's name is letters, digits, - _ .")
        return value


class BucketName(Text):
    def check(self, value: Any) -> str:
        value = super().check(value)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise wrong(
                "{value} can't name a bucket", "a bucket's name alone: letters, digits, - _ ., no s3:// and no /"
            )
        return value


class Address(Text):
    rule = "a folder as file:// or s3://"

    def check(self, value: Any) -> str:
        value = super().check(value)
        try:
            split(value)
        except PathError as error:
            raise wrong(str(error), self.rule) from None
        return value


class TrackingAddress(Address):
    rule = "file://, sqlite:///, http://, https:// or s3://"

    def check(self, value: Any) -> str:
        if isinstance(value, str) and re.match(r"sqlite:///[^?]|https?://[^\s/]+(/\S*)?$", value):
            return Text.check(self, value)
        return super().check(value)


class Word(Kind):
    """One of a few fixed words; `refused` says why a known other word is none of them."""

    def __init__(self, *words: str, refused: Mapping[str, str] | None = None) -> None:
        self.words = words
        self.refused = refused or {}
        self.rule = words[0] if len(words) == 1 else "one of " + ", ".join(words)

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.mistyped()
        value = str(value)
        if value not in self.words:
            near = difflib.get_close_matches(value, self.words, 1)
            why = self.refused.get(value, f"did you mean {near[0]}?" if near else "")
            raise wrong("{value} is not a known word", self.rule, why)
        return value


class OnlyTrue(Flag):
    rule = "true; false is refused until something else exists"

    def check(self, value: Any) -> bool:
        if super().check(value) is not True:
            raise self.out_of_range()
        return True


class WholeOrAuto(Whole):
    def __init__(self) -> None:
        super().__init__(ge=1)
        self.rule += ", or auto"

    def check(self, value: Any) -> Any:
        return "auto" if value == "auto" else super().check(value)


Name = Annotated[str, Text()]
Yes = Annotated[bool, Flag()]
Count = Annotated[int, Whole(ge=1)]
Folder = Annotated[str, Address()]
Share = Annotated[float, Number(ge=0, le=1)]
Positive = Annotated[float, Number(gt=0)]
NotNegative = Annotated[float, Number(ge=0)]


class Section(BaseModel):
    """A mapping with fixed keys; what stands under a key is what `docs/settings.md` says of it (wmtp.reference)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# ---- the configuration: where --------------------------------------------------------------------


class Models(Section):
    base: Folder
    """The model that is trained."""
    rm: Folder | None = None
    """The reward model that `critic-wmtp` scores documents with."""
    ref: Folder | None = None
    """The reference model whose losses `rho1-wmtp` compares with."""


class CheckpointPaths(Section):
    base_path: Folder
    """Where checkpoints go, a folder for each run; with `s3://` they are written on the disk first, then uploaded."""
    save_interval: Count = 100
    """Optimizer steps from one checkpoint to the next; at most `train.max_steps`."""
    keep_last: Count = 3
    """Checkpoints that are kept, the newest; the one being written and the one being uploaded come on top."""
    save_final: Yes = True
    """Whether the end of a run leaves the trained model as a Hugging Face folder, `final`."""


class Paths(Section):
    models: Models
    """Folders of models, as `file://` or `s3://`."""
    datasets: dict[Annotated[str, DatasetName()], Folder] = Field(default_factory=dict)
    """Folders of data by the names that `data.*.sources` of a recipe use; what is `s3://` is synced to the node."""
    checkpoints: CheckpointPaths
    """How often a run saves, and what it keeps."""


class Storage(Section):
    bucket: Annotated[str, BucketName()] = "wmtp"
    """The bucket of models, data, checkpoints and records: its name alone."""
    region: Name = "eu-north-1"
    """The bucket's region."""
    endpoint: Name | None = None
    """Address of an S3 server that is not AWS's."""
    workers: Annotated[int, Whole(ge=1, le=256)] = 16
    """Parts of one object that are on their way at once."""
    part_size_mb: Annotated[int, Whole(ge=5, le=5000)] = 100
    """Size of such a part in MB. `WMTP_STORAGE_PART_MB` wins where models are published."""
    accelerate: Yes = False
    """Whether the sync takes AWS's Transfer Acceleration, where the bucket has it."""
    retries: Count = 3
    """Tries of a transfer before it ends with 12."""
    retry_wait_s: Annotated[int, Whole(ge=0)] = 10
    """Seconds between two tries. `WMTP_STORAGE_RETRY_WAIT_S` wins in a sync."""
    stall_s: Count = 30
    """Seconds without a byte after which a transfer is stopped. `WMTP_STORAGE_STALL_S` wins in a sync."""
    cache_dir: Name = "/cache/models"
    """The store of synced models where this folder exists; else it is `models/.store`."""
    cache_max_gb: Positive | None = None
    """GB that the store may hold; a sync makes room for more. `WMTP_CACHE_MAX_GB` wins."""


class Mlflow(Section):
    experiment: Name
    """The experiment's name."""
    tracking_uri: Annotated[str, TrackingAddress()]
    """Where runs are logged; `file://` is a folder with `mlflow.db`, `s3://` a copy of such a folder."""
    registry_uri: Annotated[str, TrackingAddress()] = Field(default_factory=lambda data: data.get("tracking_uri", ""))
    """MLflow's model registry; by default the same as `mlflow.tracking_uri`. Nothing is registered yet."""


# GiB of one GPU, for the memory plan.
GPU_MEMORY_GB = {"A100": 80.0, "H100": 80.0, "H200": 141.0, "L40S": 48.0, "A10": 24.0, "L4": 24.0}


class Resources(Section):
    gpus: Annotated[int, Whole(ge=0)] = 4
    """GPUs of the run, one rank each; without GPUs, the number of ranks."""
    gpu_type: Name = "A100"
    """Name of the GPU: what memory it has, and whether it can do bf16."""
    gpu_memory_gb: Positive | None = Field(default_factory=lambda data: GPU_MEMORY_GB.get(data.get("gpu_type", "")))
    """GiB of one GPU, for the memory plan; known for A100, H100, H200, L40S, A10, L4."""


class Launcher(Section):
    target: Annotated[Literal["local", "docker", "vessl"], Word("local", "docker", "vessl")]
    """What starts the run: this machine, its container engine, or VESSL."""
    resources: Resources = Field(default_factory=Resources)
    """The devices that a run asks for."""
    cluster: Name | None = None
    """VESSL's name of the cluster."""
    preset: Name | None = None
    """VESSL's name of the machine."""
    image: Name | None = None
    """The image that is built, pushed and run."""
    volume: Name | None = None
    """`volume://STORAGE/NAME`: VESSL's volume in which models stay from run to run."""
    max_hours: Positive | None = None
    """Hours after which a run saves and ends with 75. `MAX_HOURS` wins."""
    price_per_hour: NotNegative | None = None
    """US dollars for an hour of the whole machine; gives what a run cost."""


class Distributed(Section):
    enabled: Yes = True
    """Whether there are ranks, one process a device."""
    backend: Annotated[Literal["nccl", "gloo"], Word("nccl", "gloo")] | None = None
    """How ranks talk; by default nccl with `cuda`, else gloo."""
    init_method: Annotated[str, Word("env://")] = "env://"
    """How ranks find each other: by the launcher's environment."""
    timeout: Count = 1800
    """Seconds that a rank waits for the others."""


class Fsdp(Section):
    enabled: Yes = True
    """Whether ranks share one model (FSDP2); more than one rank needs it."""
    auto_wrap: Yes = True
    """Whether each layer is gathered alone; false gathers the whole model at once and needs its memory."""
    activation_ckpt: Annotated[bool | Literal["selective"], FlagOrSelective()] = True
    """Recomputing activations: true needs least memory, false is fastest, selective keeps products and attention."""
    sharding: Annotated[str, Word("full_shard", "shard_grad_op", "no_shard")] = "full_shard"
    """What is shared out: all; gradients and optimizer only; or nothing, each rank with a whole model."""


_NO_SCALER = "float16 is refused: there is no loss scaler here; bf16 needs none"
_PRECISION = Word("bf16", "fp32", refused={"fp16": _NO_SCALER, "float16": _NO_SCALER})


class Devices(Section):
    compute_backend: Annotated[str, Word("cuda", "mps", "cpu", "auto")] = "auto"
    """The device; auto takes cuda, then mps, then cpu."""
    mixed_precision: Annotated[str, _PRECISION] = "bf16"
    """Precision of the computation; parameters and optimizer are kept in fp32."""
    compile: Yes = False
    """Whether layers and loss are compiled: some seconds before the first step, more tokens a second after it."""
    num_proc: Count = 8
    """Threads that tokenize."""
    distributed: Distributed = Field(default_factory=Distributed)
    """The ranks of a run."""
    fsdp: Fsdp = Field(default_factory=Fsdp)
    """How ranks share the model."""


class Settings(Section):
    """A whole file. `_origins`: where each value came from, by key."""

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)


class Config(Settings):
    """Where a run happens: paths, storage, tracking, devices."""

    project: Name
    """A name for your own use, kept in the record of a run."""
    seed: Annotated[int, Seed(ge=0)] = 42
    """Seed of data order and new weights."""
    log_interval: Count = 10
    """Optimizer steps from one line of the log, and point of MLflow, to the next."""
    paths: Paths
    """Where models, data and checkpoints are."""
    storage: Storage = Field(default_factory=Storage)
    """The bucket, and how bytes move."""
    mlflow: Mlflow
    """Where runs are tracked."""
    launcher: Launcher
    """What starts a run, and on what."""
    devices: Devices = Field(default_factory=Devices)
    """What computes, and how."""


# ---- the recipe: what ----------------------------------------------------------------------------


class Run(Section):
    name: Annotated[str, RunName()]
    """Name of the run where the command names none: scripts always do."""
    tags: list[Name] = Field(default_factory=list)
    """Words for your own use; MLflow gets those of `--tags`."""


class SourceData(Section):
    sources: list[Name] = Field(default_factory=list)
    """Names of `paths.datasets`."""
    max_length: Annotated[int, Whole(ge=8)] = 2048
    """Tokens of a row; a longer document is cut into more."""
    batch_size: Count = 2
    """Rows per rank and micro-batch."""
    pack_sequences: Yes = True
    """Whether a row holds several documents; attention stays inside each."""


class TrainData(SourceData):
    sources: list[Name] = Field(min_length=1)
    # Models are compared by HumanEval: one that was trained on it must not happen by a slip.
    allow_evaluation_data: Yes = False
    """Whether HumanEval may be trained on."""


class EvalData(SourceData):
    # Of the training sources' documents, chosen by their texts' digests. More than a half would be a slip.
    share: Annotated[float, Number(ge=0, le=0.5)] = 0.0
    """Share of the training documents that is held out, chosen by their digests."""

    @property
    def held_out(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.sources) or self.share > 0


class Data(Section):
    train: TrainData
    """What is trained on."""
    eval: EvalData = Field(default_factory=EvalData)
    """What is held out: nothing of it is trained on."""

    @property
    def longest(self) -> int:
        """Positions of the longest row that a model reads."""
        return max(self.train.max_length, self.eval.max_length if self.eval.held_out else 0)


class Model(Section):
    heads: Annotated[int, Whole(ge=1, le=8)] = 4
    """Tokens that are predicted at each position; the checkpoint has as many heads, or `model.new_heads` is true."""
    new_heads: Yes = False
    """Whether missing heads are made of the last layer."""
    vocab_size: Count = 32000
    """Pieces of the vocabulary, the same in all models of the run."""


class EarlyStopping(Section):
    enabled: Yes = False
    """Whether it ends when the held-out loss no longer falls."""
    patience: Count = 3
    """Evaluations without a lower loss until it ends."""
    metric: Annotated[str, Word("held_out_ce")] = "held_out_ce"
    """What is watched."""


class PretrainEarlyStopping(EarlyStopping):
    metric: Annotated[str, Word("value_loss")] = "value_loss"
    """What is watched."""


class Train(Section):
    algo: Annotated[str, Word(*trainer_registry)]
    """How tokens are weighed: all alike, by excess over a reference, or by the value they add."""
    full_finetune: Annotated[bool, OnlyTrue()] = True
    """Whether all weights are trained."""
    num_epochs: Count = 3
    """Passes over the data, unless `train.max_steps` ends the run before."""
    max_steps: Count | None = None
    """Optimizer steps at most."""
    accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    early_stopping: EarlyStopping = Field(default_factory=EarlyStopping)
    """Ending before the last step."""


class Pretrain(Section):
    enabled: Yes = True
    """Whether stage 1 runs: the value head learns the reward while the trunk is frozen."""
    num_epochs: Count = 1
    """Passes over the data, unless `pretrain.max_steps` ends it before."""
    max_steps: Count | None = None
    """Steps of stage 1 at most."""
    lr: Positive = 1e-3
    """Learning rate of the value head in stage 1."""
    save_value_head: Yes = True
    """Whether the trained value head is left beside the checkpoints."""
    early_stopping: PretrainEarlyStopping = Field(default_factory=PretrainEarlyStopping)
    """Ending stage 1 before its last step."""


class Critic(Section):
    target: Annotated[str, Word("rm_sequence")] = "rm_sequence"
    """What the value head learns: the reward model's score of a whole document."""
    token_spread: Annotated[str, Word("gae")] = "gae"
    """How that score reaches the tokens: generalized advantage estimation."""
    delta_mode: Annotated[str, Word("td")] = "td"
    """What a token adds: the difference to the value before it."""
    normalize: Annotated[str, Word("zscore")] = "zscore"
    """How scores are made comparable: mean 0 and deviation 1 over the training set."""
    gamma: Share = 1.0
    """Discount of later rewards. At 2048 tokens less than 1 leaves the first tokens nothing to learn."""
    gae_lambda: Share = 0.95
    """Share of later errors in a token's target: 0 only the next, 1 all."""
    discount_lambda: Share = 0.95
    """Share of the value before a token that is taken off its own; the rest is the token's."""
    auxiliary_loss_coef: NotNegative = 0.1
    """Weight of the value head's own loss in stage 2; it does not reach the trunk."""
    value_lr: NotNegative = 5e-5
    """Learning rate of the value head in stage 2."""
    use_pseudo_rewards: Yes = False
    """Whether the untrained base model's mean loss stands in for a reward model."""
    reward_template: Annotated[str, Text(lines=True)] = "{text}"
    """How the reward model reads a document: fields {prompt}, {solution}, {text}."""


class Rho1(Section):
    selection_mode: Annotated[str, Word("weighted", "token_skip")] = "weighted"
    """weighted: every token by its score; token_skip: the best count, the others not at all."""
    skip_threshold_percentile: Annotated[float, Number(ge=0, lt=1)] = 0.3
    """Share of tokens that token_skip leaves out."""
    min_ce_diff: NotNegative = 0.01
    """Scores that are smaller than this, in nats, count as 0."""
    center: Annotated[str, Word("head", "none")] = "head"
    """head: each head's running mean is taken off its excess; none: far heads weigh more whatever they can learn."""
    center_decay: Annotated[float, Number(ge=0, lt=1)] = 0.99
    """How slowly that mean follows: share of the old one kept in each step."""


class Loss(Section):
    weight_norm: Annotated[str, Word("mean1.0_clip")] = "mean1.0_clip"
    """How scores become weights: softmax over heads, clipped, mean 1 at each position."""
    lambda_: Share = Field(0.3, alias="lambda")
    """Share of the algorithm in a weight; 0 is `baseline-mtp`, bit for bit."""
    weight_temperature: Positive = 0.7
    """Temperature of the softmax: lower tells heads apart more."""
    epsilon: Annotated[float, Number(gt=0, lt=1)] = 0.05
    """Least weight before the last normalisation."""
    max_weight: Annotated[float, Number(gt=1)] = 3.0
    """Largest weight before the last normalisation."""
    chunk_positions: Annotated[int | Literal["auto"], WholeOrAuto()] = "auto"
    """Positions whose logits are in memory at once; auto chooses."""


Beta = Annotated[float, Number(ge=0, lt=1)]


class Optim(Section):
    optimizer: Annotated[str, Word("adamw")] = "adamw"
    """The optimizer."""
    lr: Positive = 2e-5
    """Peak learning rate."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two."""
    grad_clip: NotNegative = 1.0
    """Largest norm of the gradient; 0 clips nothing."""
    scheduler: Annotated[str, Word("cosine", "linear", "constant")] = "cosine"
    """How the learning rate falls after the warm-up: to 0 by a cosine or a line, or not."""
    warmup_ratio: Share = 0.03
    """Share of the steps in which it rises."""


class Eval(Section):
    interval: Count = 200
    """Optimizer steps from one held-out evaluation to the next."""
    max_batches: Count = 20
    """Batches of `data.eval.batch_size` rows that an evaluation reads, all ranks together."""


class Recipe(Settings):
    """What a run does: data, algorithm, optimisation."""

    run: Run
    """How a run is called."""
    data: Data
    """What is read."""
    model: Model = Field(default_factory=Model)
    """What the trained model has."""
    train: Train
    """The algorithm, and how long."""
    pretrain: Pretrain = Field(default_factory=Pretrain)
    """Stage 1 of `critic-wmtp`."""
    critic: Critic = Field(default_factory=Critic)
    """`critic-wmtp`."""
    rho1: Rho1 = Field(default_factory=Rho1)
    """`rho1-wmtp`."""
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({}))
    """From scores to weights."""
    optim: Optim = Field(default_factory=Optim)
    """Optimizer and learning rate."""
    eval: Eval = Field(default_factory=Eval)
    """Held-out evaluation."""


# ---- from a tree to settings ---------------------------------------------------------------------

T = TypeVar("T", bound=Settings)

# These win over the file: the bucket is where the stage that started us says.
ENVIRONMENT = {
    "S3_BUCKET_NAME": ("storage", "bucket"),
    "S3_ENDPOINT_URL": ("storage", "endpoint"),
    "AWS_DEFAULT_REGION": ("storage", "region"),
    "WMTP_CACHE_DIR": ("storage", "cache_dir"),
    "WMTP_STORAGE_RETRIES": ("storage", "retries"),
}


@dataclass
class Loaded(Generic[T]):
    """What became of one file: its tree, and its settings where they are valid."""

    tree: Tree
    value: T | None = None


def names_of(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _models_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """The section at this key, if it is one."""
    found: type[BaseModel] | None = model
    for part in key:
        info = found.model_fields.get(str(part)) if found else None
        found = _models_in(info.annotation) if info else None
    return found


def all_keys(model: type[BaseModel], at: Key = ()) -> list[str]:
    """Every dotted key that a file of this kind may have."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        here = (*at, info.alias or name)
        inner = _models_in(info.annotation)
        keys += all_keys(inner, here) if inner else [dotted(here)]
    return keys


def _unknown_key_rule(model: type[BaseModel], key: Key) -> str:
    section = _model_at(model, key[:-1])
    known = names_of(section) if section else []
    near = difflib.get_close_matches(str(key[-1]), known, 1, 0.6)
    if near:
        return f"keys are checked strictly; did you mean {near[0]}?"
    elsewhere = [k for k in all_keys(Config) + all_keys(Recipe) if k.split(".")[-1] == key[-1]]
    if elsewhere:
        return f"keys are checked strictly; did you mean {' or '.join(elsewhere[:3])}?"
    return f"keys are checked strictly; here are known: {', '.join(known)}"


def _put(tree: Tree, key: Key, value: object, mark: Mark) -> None:
    """Lay a value over the tree; what is no mapping on the way is refused."""
    here: Any = tree.values
    for depth, part in enumerate(key[:-1], 1):
        if not isinstance(here.get(str(part)), dict):
            if str(part) in here:
                what = f"{dotted(key[:depth])} is {shown(here[str(part)])}"
                tree.add(key, what, "only a mapping has keys", place=mark.place)
            here[str(part)] = {}
            tree.marks[key[:depth]] = mark
        here = here[str(part)]
    here[str(key[-1])] = value
    tree.marks[key] = mark


def _lay_environment(tree: Tree) -> None:
    if not isinstance(tree.values.get("storage", {}), dict):
        return
    for name, key in ENVIRONMENT.items():
        if value := os.environ.get(name):
            _put(tree, key, Substituted(value), Mark(f"environment {name}", value, [name]))


def _lay_override(tree: Tree, text: str) -> None:
    """One `a.b=c`: a scalar as in the file, or a list or quoted text in flow style."""
    name, _, raw = text.partition("=")
    key: Key = tuple(name.strip().split("."))
    place = "--set"
    if not_utf8(name):
        tree.add(key, "not UTF-8", "a key is a word", place=place)
        return
    for old in [k for k in tree.marks if k[: len(key)] == key]:
        del tree.marks[old]
    mark = Mark(place)
    raw = raw.strip()
    value: object
    if raw[:1] in ("[", "{", '"', "'"):
        value = _parsed(tree, raw, lambda line: place, key)
    else:
        value = tree.scalar(raw, key, mark, quoted=False)
    _put(tree, key, value, tree.marks.get(key, mark))


def _finding(tree: Tree, model: type[BaseModel], error: Mapping[str, Any]) -> None:
    loc: Key = tuple(part for part in error["loc"] if part != "[key]")
    kind, value = error["type"], error["input"]
    mark = tree.marks.get(loc)
    written = value
    if isinstance(value, int | float) and mark and mark.raw and not mark.variables:
        written = mark.raw
    quoted = shown(value) if written is value else str(written)[:80]
    context = error.get("ctx", {})
    if kind == "default_factory_not_called":
        return  # the key that this default is made from is told itself
    if kind == "wmtp":
        what = context["what"].replace("{value}", quoted)
        rule = context["rule"]
        if context["hint"]:
            rule = f"{rule}; {context['hint']}"
    elif kind == "extra_forbidden":
        what, rule = "unknown key", _unknown_key_rule(model, loc)
    elif kind == "missing":
        what, rule = "missing", "this key is required"
    elif kind in ("too_short", "too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        what = f"a list of {context['actual_length']}"
        rule = "exactly 2 entries" if loc[-1:] == ("betas",) else f"at least {least or most} entry"
    elif kind == "list_type":
        what, rule = f"{quoted} is a wrong type", "a list, as [a, b]"
    elif kind in ("model_type", "dict_type", "model_attributes_type"):
        section = _model_at(model, loc)
        known = f" of {', '.join(names_of(section))}" if section else ""
        what, rule = f"{quoted} is a wrong type", f"a mapping{known}"
    else:
        what, rule = f"{quoted}: {error['msg']}", "docs/settings.md says what this key takes"
    tree.add(loc, what, rule)


def _origins(model: BaseModel, tree: Tree, at: Key = ()) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, info in type(model).model_fields.items():
        value, key = getattr(model, name), (*at, info.alias or name)
        if isinstance(value, BaseModel):
            found.update(_origins(value, tree, key))
        elif key in tree.marks:
            # An entry of a mapping may have come from elsewhere than the mapping did.
            for known in (key, *((*key, entry) for entry in (value if isinstance(value, dict) else ()))):
                mark = tree.marks[known]
                by = f" ({', '.join(mark.variables)})" if mark.variables and ":" in mark.place else ""
                found[dotted(known)] = mark.place + by
        else:
            found[dotted(key)] = "default"
    return found


def _load(
    model: type[T],
    path: str | os.PathLike[str],
    overrides: Sequence[str],
    rules: Callable[[T, Tree], None],
) -> Loaded[T]:
    tree = read_file(path)
    loaded: Loaded[T] = Loaded(tree)
    unread = bool(tree.findings) and not tree.values
    for text in overrides:
        if "=" not in text or not text.partition("=")[0].strip():
            tree.add(
                (), f"{shown(text)} is no override", "an override is key=value", "--set train.max_steps=100", "--set"
            )
        else:
            _lay_override(tree, text)
    if unread:
        return loaded
    if model is Config:
        _lay_environment_unless_set(tree)
    try:
        value = model.model_validate(tree.values)
    except ValidationError as error:
        told = {finding.key for finding in tree.findings}
        for detail in error.errors(include_url=False):
            if dotted(detail["loc"]) not in told:
                _finding(tree, model, detail)
        return loaded
    rules(value, tree)
    value._origins.update(_origins(value, tree))
    loaded.value = value
    return loaded


def _lay_environment_unless_set(tree: Tree) -> None:
    """The environment wins over the file, an explicit --set over both."""
    kept = {k: m for k, m in tree.marks.items() if m.place.startswith("--set")}
    before = {k: tree.values.get("storage", {}).get(k[1]) for k in kept if k in ENVIRONMENT.values()}
    _lay_environment(tree)
    for key, value in before.items():
        _put(tree, key, value, kept[key])


def _done(findings: list[Finding]) -> None:
    if findings:
        raise ConfigError(findings)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration at `path`, strictly. Raises ConfigError with every finding."""
    loaded = _load(Config, path, overrides, _config_rules)
    _done(loaded.tree.findings)
    return cast(Config, loaded.value)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, strictly. Raises ConfigError with every finding."""
    loaded = _load(Recipe, path, overrides, _recipe_rules)
    _done(loaded.tree.findings)
    return cast(Recipe, loaded.value)


def load_pair(
    config_path: str | os.PathLike[str],
    recipe_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    env: str | None = None,
) -> tuple[Config, Recipe]:
    """Both files, each override to the one that has its key, and the rules between them.

    `env` is `test`, `minitest` or `production`; without it, the variable ENV.
    Raises ConfigError with every finding of both.
    """
    for_config, for_recipe, findings = _routed(overrides)
    config = _load(Config, config_path, for_config, _config_rules)
    recipe = _load(Recipe, recipe_path, for_recipe, _recipe_rules)
    if config.value:
        _environment_rules(config.value, config.tree, env or os.environ.get("ENV"))
    if config.value and recipe.value:
        _pair_rules(config.value, recipe.value, config.tree, recipe.tree)
    _done(findings + config.tree.findings + recipe.tree.findings)
    return cast(Config, config.value), cast(Recipe, recipe.value)


def _routed(overrides: Sequence[str]) -> tuple[list[str], list[str], list[Finding]]:
    """Overrides of the configuration, of the recipe, and findings for those of neither."""
    for_config: list[str] = []
    for_recipe: list[str] = []
    findings: list[Finding] = []
    for text in overrides:
        name = text.partition("=")[0].strip()
        first = name.split(".")[0]
        if first in Config.model_fields or not name or "=" not in text:  # what is no override is told there
            for_config.append(text)
        elif first in Recipe.model_fields:
            for_recipe.append(text)
        else:
            keys = all_keys(Config) + all_keys(Recipe)
            near = difflib.get_close_matches(name, keys, 1) or [
                k for k in keys if k.split(".")[-1] == name.split(".")[-1]
            ]
            hint = f"; did you mean {near[0]}?" if near else ""
            rule = f"an override names a key of the configuration or of the recipe{hint}"
            key = dotted(tuple(name.split(".")))
            findings.append(Finding("--set", key, "unknown key", rule, "correct this --set"))
    return for_config, for_recipe, findings


# ---- rules between keys --------------------------------------------------------------------------


def _config_rules(config: Config, tree: Tree) -> None:
    devices, gpus = config.devices, config.launcher.resources.gpus
    device, ranks = devices.compute_backend, devices.distributed
    gpu_key: Key = ("launcher", "resources", "gpus")
    if ranks.backend == "nccl" and device in ("cpu", "mps"):
        tree.add(
            ("devices", "distributed", "backend"),
            f"nccl with devices.compute_backend {device}",
            "nccl needs cuda; gloo is for cpu",
        )
    if device == "mps" and config.launcher.target != "local":
        tree.add(
            ("devices", "compute_backend"),
            f"mps with launcher.target {config.launcher.target}",
            "mps is a Mac's own device: cuda or cpu in an image",
        )
    if device == "mps" and ranks.enabled:
        tree.add(
            ("devices", "distributed", "enabled"),
            "true with devices.compute_backend mps",
            "mps is one device without ranks: false",
        )
    if device == "cuda" and gpus < 1:
        tree.add(gpu_key, f"{gpus} with devices.compute_backend cuda", "cuda needs at least 1 GPU")
    elif ranks.enabled and gpus < 1:
        tree.add(
            gpu_key,
            f"{gpus} with devices.distributed.enabled true",
            "there are as many ranks as launcher.resources.gpus: at least 1",
        )
    if not ranks.enabled and gpus > 1:
        tree.add(
            gpu_key,
            f"{gpus} with devices.distributed.enabled false",
            "more than one device needs ranks",
        )
    if devices.fsdp.enabled and not ranks.enabled:
        tree.add(
            ("devices", "fsdp", "enabled"),
            "true with devices.distributed.enabled false",
            "sharding needs ranks: enable both or neither",
        )
    elif devices.fsdp.enabled and gpus == 1:
        tree.add(
            ("devices", "fsdp", "enabled"),
            "true with launcher.resources.gpus 1",
            "sharding needs at least 2 ranks",
        )
    if ranks.enabled and gpus > 1 and not devices.fsdp.enabled:
        tree.add(
            ("devices", "fsdp", "enabled"),
            f"false with {gpus} ranks",
            "ranks share one model through fsdp; sharding no_shard is the replicated form",
        )
    if config.launcher.target in ("docker", "vessl"):
        for key, uri in _addresses(config):
            if any(not under_app(path) for path in _paths_of(uri)):
                tree.add(
                    key,
                    f"{shown(uri)} is outside {APP}",
                    f"launcher.target {config.launcher.target}: every file:// and sqlite: lies under {APP}, "
                    "the image's work folder",
                )


def _paths_of(uri: str) -> list[str]:
    """What an address can mean as a file, from the image's work folder; MLflow's client undoes %2e."""
    if uri.startswith("file://"):
        path = split(uri)[1]
        return [path, posixpath.normpath(unquote(path))]
    if uri.startswith("sqlite:///"):
        return [posixpath.normpath(posixpath.join(APP, uri.removeprefix("sqlite:///").partition("?")[0]))]
    return []


def _addresses(config: Config) -> list[tuple[Key, str]]:
    models, mlflow = config.paths.models, config.mlflow
    found: list[tuple[Key, str | None]] = [
        (("paths", "models", "base"), models.base),
        (("paths", "models", "rm"), models.rm),
        (("paths", "models", "ref"), models.ref),
        *((("paths", "datasets", name), uri) for name, uri in config.paths.datasets.items()),
        (("paths", "checkpoints", "base_path"), config.paths.checkpoints.base_path),
        (("mlflow", "tracking_uri"), mlflow.tracking_uri),
    ]
    if mlflow.registry_uri != mlflow.tracking_uri:
        found.append((("mlflow", "registry_uri"), mlflow.registry_uri))
    return [(key, uri) for key, uri in found if uri]


def _environment_rules(config: Config, tree: Tree, env: str | None) -> None:
    if env is not None and env not in ("test", "minitest", "production"):
        tree.add((), f"ENV is {env}", "ENV is one of test, minitest, production", "ENV=test …", "environment ENV")
    if env == "test" or config.launcher.target != "local":
        return
    for key, uri in _addresses(config):
        if uri.startswith("file://") and not split(uri)[1].startswith("/"):
            tree.add(
                key,
                f"{shown(uri)} is relative, and ENV is {env or 'not set'}",
                "only ENV=test reads paths of the repository; elsewhere file:///app/…",
                "ENV=test, or write file:///app/…",
            )


def _recipe_rules(recipe: Recipe, tree: Tree) -> None:
    for part, data in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if recipe.model.heads >= data.max_length:
            tree.add(
                ("data", part, "max_length"),
                f"{data.max_length} with model.heads {recipe.model.heads}",
                "a row is longer than the number of heads",
            )
    if recipe.train.early_stopping.enabled and not recipe.data.eval.held_out:
        tree.add(
            ("train", "early_stopping", "enabled"),
            "true without data.eval.sources and data.eval.share",
            "early stopping watches the held-out cross-entropy",
        )
    fields = re.findall(r"\{(\w*)\}", recipe.critic.reward_template)
    unknown = [name for name in fields if name not in ("prompt", "solution", "text")]
    if unknown or not {"solution", "text"} & {*fields}:
        tree.add(
            ("critic", "reward_template"),
            f"{{{unknown[0]}}} is not a field" if unknown else "neither {solution} nor {text} in it",
            "the reward model reads the document through it: {prompt}, {solution} and {text} are its fields",
        )
    stage1 = recipe.pretrain
    watched = weighs_by_value(recipe.train.algo) and stage1.enabled and stage1.early_stopping.enabled
    if watched and not recipe.data.eval.held_out:
        tree.add(
            ("pretrain", "early_stopping", "enabled"),
            "true without data.eval.sources and data.eval.share",
            "early stopping watches the held-out value loss",
        )


def _pair_rules(config: Config, recipe: Recipe, config_tree: Tree, recipe_tree: Tree) -> None:
    models, algo = config.paths.models, recipe.train.algo
    for role in _roles(recipe):
        if getattr(models, role) is None:
            other = ", or critic.use_pseudo_rewards: true" if role == "rm" else ""
            config_tree.add(("paths", "models", role), "missing", f"{algo} needs the {role} model{other}")
    for part, data in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, name in enumerate(data.sources):
            if name not in config.paths.datasets:
                known = ", ".join(config.paths.datasets) or "none"
                recipe_tree.add(
                    ("data", part, "sources", index),
                    f"{shown(name)} is not in paths.datasets of {config_tree.name}",
                    f"sources are names of paths.datasets; there are: {known}",
                )
    steps, interval = recipe.train.max_steps, config.paths.checkpoints.save_interval
    if steps is not None and interval > steps:
        config_tree.add(
            ("paths", "checkpoints", "save_interval"),
            f"{interval} with train.max_steps {steps}",
            "a run saves at least once on its way: save_interval is at most train.max_steps",
            f"--set paths.checkpoints.save_interval={steps}, or more steps",
        )
    for role in _roles(recipe):
        uri = getattr(models, role)
        positions = _positions(uri) if uri else None
        for part, data in (("train", recipe.data.train), ("eval", recipe.data.eval)):
            read = part == "train" or recipe.data.eval.held_out
            if positions is not None and read and data.max_length > positions:
                recipe_tree.add(
                    ("data", part, "max_length"),
                    f"{data.max_length}, but {role} ({uri}) has {positions} positions",
                    "a row is at most as long as the model's positions",
                )


def _positions(uri: str) -> int | None:
    """How long a row of a model that is here may be (GPT-2 says `n_positions`); None where that isn't known."""
    kind, path = PathResolver().resolve(uri)
    if kind != "file":
        return None
    try:
        known = json.loads((Path(path) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    found = known.get("max_position_embeddings", known.get("n_positions")) if isinstance(known, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


# ---- what others ask -----------------------------------------------------------------------------


def _roles(recipe: Recipe) -> list[str]:
    roles = ["base"]
    if weighs_by_reference(recipe.train.algo):
        roles.append("ref")
    if weighs_by_value(recipe.train.algo) and not recipe.critic.use_pseudo_rewards:
        roles.append("rm")
    return roles


def needed_models(config: Config, recipe: Recipe) -> dict[str, str]:
    """Role to model path as the configuration has it, in load order, for the recipe's algorithm."""
    return {role: getattr(config.paths.models, role) for role in _roles(recipe)}


def bucket_datasets(config: Config, recipe: Recipe) -> dict[str, str]:
    """Name to address of the recipe's sources that are in a bucket: the sync brings them."""
    names = dict.fromkeys([*recipe.data.train.sources, *recipe.data.eval.sources])
    uris = {name: config.paths.datasets.get(name, "") for name in names}
    return {name: uri for name, uri in uris.items() if uri.startswith("s3://")}


def resolved(config: Config, recipe: Recipe) -> dict[str, Any]:
    """Every key of both with its value, ready for JSON."""
    return {"config": _dump(config), "recipe": _dump(recipe)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; an empty mapping is a value."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _dump(model: BaseModel) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        out[info.alias or name] = _dump(value) if isinstance(value, BaseModel) else value
    return out


def origins(settings: Settings) -> dict[str, str]:
    """Where each value came from: `FILE:LINE`, `--set`, `environment NAME` or `default`."""
    return dict(settings._origins)


def digest(config: Config, recipe: Recipe) -> str:
    """Seven hexadecimal digits of the resolved result: the same work has the same digest.

    How the bucket is reached from this machine is not part of the work: `storage.endpoint` (an
    embedded bucket has another port each time), `storage.cache_dir` and `storage.retries` are left out.
    """
    what = resolved(config, recipe)
    for key in ("endpoint", "cache_dir", "retries"):
        del what["config"]["storage"][key]
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:7]


# ---- the command ---------------------------------------------------------------------------------


def _printed(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _get(name: str, config: Config | None, recipe: Recipe | None) -> str:
    def bad(what: str, rule: str) -> ConfigError:
        return ConfigError([Finding("--get", name, what, rule, "python -m wmtp.config --help")])

    if name in ("models", "digest", "datasets"):
        if config is None or recipe is None:
            raise bad("needs both files", "models, datasets and digest come from --config and --recipe")
        if name == "digest":
            return digest(config, recipe)
        if name == "datasets":
            return "\n".join(f"dataset\t{source}\t{uri}" for source, uri in bucket_datasets(config, recipe).items())
        return "\n".join(
            f"{role}\t{uri.rstrip('/').rpartition('/')[2]}\t{uri}"
            for role, uri in needed_models(config, recipe).items()
        )
    here: Any = {**(_dump(config) if config else {}), **(_dump(recipe) if recipe else {})}
    for part in name.split("."):
        if not isinstance(here, dict) or part not in here:
            keys = all_keys(Config) + all_keys(Recipe)
            near = difflib.get_close_matches(name, keys, 1)
            raise bad("unknown key", f"a key of the given files{f'; did you mean {near[0]}?' if near else ''}")
        here = here[part]
    return _printed(here)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wmtp.config", description="Check settings, and print what they resolve to."
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration: where")
    parser.add_argument("--recipe", metavar="FILE", help="the recipe: what")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    parser.add_argument("--env", help="test, minitest or production (default: the variable ENV)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--get", metavar="KEY", nargs="+", help="print these values, one a line")
    what.add_argument("--json", action="store_true", help="print everything, resolved, as JSON")
    what.add_argument("--check", action="store_true", help="print nothing (default)")
    args = parser.parse_args(argv)
    if not args.config and not args.recipe:
        parser.error("--config or --recipe is needed")
    config: Config | None = None
    recipe: Recipe | None = None
    try:
        if args.config and args.recipe:
            config, recipe = load_pair(args.config, args.recipe, args.overrides, env=args.env)
        elif args.config:
            config = load_config(args.config, args.overrides)
        else:
            recipe = load_recipe(args.recipe, args.overrides)
        for name in args.get or ():
            if line := _get(name, config, recipe):
                print(line)
            else:
                print()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        both = {"config": config, "recipe": recipe}
        print(json.dumps({k: _dump(v) for k, v in both.items() if v}, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that was killed is no traceback
    sys.exit(main())
