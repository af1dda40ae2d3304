"""What the documents name exists: pages, commands, settings. Links and anchors are the linter's (make lint)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from wmtp import causes, config

ROOT = Path(__file__).parent.parent
FAILURES = ROOT / "docs/failures"
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    check=True,
).stdout.split()
OF_THE_PLAN = "docs/plan.md"  # its first column has names that are others here
PAGES = [ROOT / name for name in TRACKED if (ROOT / name).is_file() and name != OF_THE_PLAN]
MAKEFILE = (ROOT / "Makefile").read_text()
KEYS = {*config.all_keys(config.Config), *config.all_keys(config.Recipe)}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def unknown_commands(text: str) -> list[str]:
    """Targets, variables, scripts and modules that are named and do not exist."""
    sources = MAKEFILE + "".join(path.read_text() for path in (ROOT / "scripts").rglob("*.*sh"))
    wrong = []
    for call in re.findall(r"\bmake ([a-z][a-z-]*[^`\n|]*)", "\n".join(commands(text))):
        target, *words = call.split()
        wrong += [f"make {target}"] if f"\n{target}:" not in MAKEFILE else []
        variables = [found[1] for word in words if (found := re.match(r"\[?([A-Z][A-Z_]+)=", word))]
        wrong += [name for name in variables if not re.search(rf"\b{name}\b", sources)]
    files = re.findall(r"(?<![\w/])(?:scripts|docker|bats|configs|tests|src)/[\w/.-]*\w\.\w+", text)
    wrong += [name for name in files if gone(name) and f"> {name}" not in text]  # a page may write it itself
    modules = re.findall(r"python -m wmtp\.(\w+)", text)
    return wrong + [name for name in modules if gone(f"src/wmtp/{name}.py")]


def commands(text: str) -> list[str]:
    """What is set as code: spans of a line, and indented blocks."""
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)


def gone(name: str) -> bool:
    return not (ROOT / name).exists()


def unknown_keys(text: str) -> list[str]:
    """Dotted names, as code, that begin as a setting's do and are none."""
    sections = "|".join([*config.names_of(config.Config), *config.names_of(config.Recipe)])
    found = re.findall(rf"(?<![\w./-])((?:{sections})(?:\.[a-z_0-9]+)+)(?=[=:\s]|$)", "\n".join(commands(text)))
    known = {".".join(key.split(".")[:n]) for key in KEYS for n in range(1, 5)}
    other = re.compile(r"paths\.datasets\.|.*\.(bin|db|json|md|model|pt|py|safetensors|txt|yaml)$")
    return [key for key in found if key not in known and not other.match(key)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_exists(page: Path) -> None:
    assert unknown_commands(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_setting_exists(page: Path) -> None:
    assert unknown_keys(page.read_text()) == []


def test_what_is_wrong_is_found() -> None:
    text = "`make deploy ENV=x`, `make deplyo`, `make train NOVAR=1`, scripts/gone.sh, python -m wmtp.gone"
    assert unknown_commands(text) == ["make deplyo", "NOVAR", "scripts/gone.sh", "gone"]
    text = '`optim.lr`, `optim.rate`, `devices.fsdp`, `SET="train.stepps=1 paths.datasets.x=y"`, data.txt, `loss.py`'
    assert unknown_keys(text) == ["optim.rate", "train.stepps"]


def test_every_class_of_a_failure_has_a_page_and_every_page_a_class() -> None:
    pages = {f"docs/failures/{path.name}" for path in FAILURES.glob("*.md") if path.name != "README.md"}
    assert pages == {causes.page(kind) for kind in causes.CLASSES}
    index = re.findall(r"^\| \[([a-z ]+)\]\(([a-z-]+\.md)\) \|", (FAILURES / "README.md").read_text(), re.MULTILINE)
    assert {(k, f"docs/failures/{name}") for k, name in index} == {(k, causes.page(k)) for k in causes.CLASSES}


@pytest.mark.parametrize("kind", causes.CLASSES)
def test_a_page_of_a_failure_shows_the_paragraph_of_its_class_and_what_to_do(kind: str) -> None:
    text = (ROOT / causes.page(kind)).read_text()
    said = re.search(r"(?:^    .+\n)+", text, re.MULTILINE)
    assert said and re.match(rf"    \S+ (failed|stopped): {kind}, (in|after) ", said[0])
    assert f"\n    more: {causes.page(kind)}\n    next: " in said[0]
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles == ["Why it happens", "Which one it is", "What to do", "What is kept"]
    assert len(text.splitlines()) <= 60
