"""The reference of all settings, made of the schema and the shipped files: docs/settings.md.

Usage: python -m wmtp.reference > docs/settings.md     from the repository's root
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wmtp import config as settings

HEAD = """\
# Settings

Made by `python -m wmtp.reference > docs/settings.md`; change the descriptions in `src/wmtp/config.py`.

A *configuration* says where a run happens, a *recipe* what it does. Both are checked strictly: `make dryrun` tells
every unknown key, wrong type and impossible pair, with file and line. What wins: the default, the file, the variable of
the environment, `SET="key=value …"` (`--set key=value`), each over the one before. `${VAR}` and `${VAR:-default}` are
substituted in the files. Numbers are finite, text is not empty, and an optional key is left out, never null.

*Shipped* says what the files of the repository set, with the files' names where they differ: `vessl` is
`configs/config.vessl.yaml`, `rho1_wmtp` is `configs/recipe.rho1_wmtp.yaml`, `test` the recipes in `tests/configs/`,
which the mini-test runs, and `production` those in `configs/`. A key that no file sets has its default.
"""


@dataclass(frozen=True)
class Entry:
    """A key with what the schema says of it; a section has no rule."""

    key: str
    text: str
    rule: str = ""
    default: str = ""


def described() -> dict[tuple[str, str], str]:
    """What stands under each field of the schema, by class and field; pydantic's own way to it slows every import."""
    found = {}
    for node in ast.parse(inspect.getsource(settings)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                said = ast.get_docstring(ast.Module([text], []))
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and said:
                    found[node.name, field.target.id] = " ".join(said.split())
    return found


def rule_of(annotation: Any, metadata: Any = ()) -> str:
    """The rule of the first kind that is found in it, with what holds it."""
    if kind := next((one for one in metadata if isinstance(one, settings.Kind)), None):
        return str(kind.rule)
    inner = next(filter(None, (rule_of(*part) for part in _parts(annotation))), "")
    if getattr(annotation, "__origin__", None) is list:
        return f"list: {inner}"
    return f"mapping: {inner}" if getattr(annotation, "__origin__", None) is dict else inner


def _parts(annotation: Any) -> Iterator[tuple[Any, Any]]:
    if hasattr(annotation, "__metadata__"):
        yield annotation.__origin__, annotation.__metadata__
    else:  # of a mapping, its values
        for one in reversed(get_args(annotation)):
            yield one, ()


def default_of(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default_factory_takes_validated_data:
        return "derived"
    value = info.get_default(call_default_factory=True)
    return "none" if value is None or value is PydanticUndefined or value == {} else f"`{written(value)}`"


def written(value: Any) -> str:
    """As in a file, but a list on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list | tuple) else str(value)


def entries(model: type[BaseModel], at: str = "") -> Iterator[Entry]:
    """Every key, each section before its keys. Raises KeyError for one without a description."""
    texts = described()
    for name, info in model.model_fields.items():
        owner = next((one.__name__ for one in model.__mro__ if (one.__name__, name) in texts), model.__name__)
        key, text = f"{at}{info.alias or name}", texts[owner, name]
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield Entry(key, text)
            yield from entries(info.annotation, f"{key}.")
        else:
            yield Entry(key, text, rule_of(info.annotation, info.metadata), default_of(info))


def shipped(folder: Path, kind: str) -> dict[str, settings.Tree]:
    """The files of a kind by their paths."""
    files = [*sorted(folder.glob(f"configs/{kind}.*.yaml")), *sorted(folder.glob(f"tests/configs/{kind}.*.yaml"))]
    return {path.relative_to(folder).as_posix(): settings.read_file(path) for path in files}


def as_set(key: str, files: dict[str, settings.Tree]) -> str:
    """Each value as it is written, with the files that set it where they differ."""
    path = tuple(key.split("."))
    by_value: dict[str, list[str]] = {}
    for file, tree in files.items():
        inside = [(at, mark.raw) for at, mark in tree.marks.items() if at[: len(path)] == path and mark.raw is not None]
        if inside:
            parts = (raw if isinstance(at[-1], int) or at == path else f"{at[-1]}: {raw}" for at, raw in inside)
            by_value.setdefault(", ".join(parts), []).append(file)
    setters = [file for names in by_value.values() for file in names]
    one = len(by_value) == 1
    return "; ".join(f"`{value}`{'' if one else ' ' + told(names, setters)}" for value, names in by_value.items())


def told(files: list[str], setters: list[str]) -> str:
    """The files' short names, or one word for all recipes of a folder that set the key."""
    for folder, word in (("configs/recipe.", "production"), ("tests/configs/recipe.", "test")):
        if files == [file for file in setters if file.startswith(folder)]:
            return word
    return ", ".join(dict.fromkeys(file.rpartition("/")[2].split(".")[1] for file in files))


def table(model: type[BaseModel], files: dict[str, settings.Tree]) -> Iterator[str]:
    variables = {".".join(key): name for name, key in settings.ENVIRONMENT.items()}
    found = list(entries(model))
    sections = ["", *(entry.key for entry in found if not entry.rule)]
    for section in sections:
        rows = [entry for entry in found if entry.rule and entry.key.rpartition(".")[0] == section]
        if not rows:
            continue
        if section:
            text = next(entry.text for entry in found if entry.key == section)
            yield f"\n### {section}\n\n{text}"
        yield "\n| key | value | default | meaning | shipped |\n| --- | --- | --- | --- | --- |"
        for row in rows:
            wins = f" `{variables[row.key]}` wins." if row.key in variables else ""
            cells = (f"`{row.key}`", row.rule, row.default, row.text + wins, as_set(row.key, files))
            yield f"| {' | '.join(cells)} |"


def page(folder: Path) -> str:
    """docs/settings.md of the repository in ``folder``."""
    configuration = "\n".join(table(settings.Config, shipped(folder, "config")))
    recipe = "\n".join(table(settings.Recipe, shipped(folder, "recipe")))
    return f"{HEAD}\n## Configuration\n{configuration}\n\n## Recipe\n{recipe}\n"


if __name__ == "__main__":
    sys.stdout.write(page(Path.cwd()))
