"""Rules of the house that no single module can keep."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

HERE = Path(__file__)
ROOT = HERE.parent.parent


@pytest.mark.parametrize(
    "module",
    [
        "causes",
        "config",
        "paths",
        "ledger",
        "minitest",
        "record",
        "reference",
        "registry",
        "manifest",
        "monitor",
        "publish",
        "published",
        "preflight",
        "report",
        "runfile",
        "scorekey",
        "vocab",
    ],
)
def test_looking_does_not_import_torch(module: str) -> None:
    code = f"import sys, wmtp.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch brings nvidia-* packages")
def test_an_environment_without_a_gpu_holds_no_nvidia_package() -> None:
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert not [n for n in names if n.startswith("nvidia-")]


def test_locks_record_hashes_and_no_addresses() -> None:
    for lock in ("run.txt", "dev.txt", "uv.txt", "vessl.txt"):
        text = (ROOT / "requirements" / lock).read_text()
        assert "://" not in text and "--hash=sha256:" in text
        assert not [line for line in text.splitlines() if line.startswith("torch==")]


def test_the_lock_of_torch_is_of_the_version_that_is_named_and_agrees_with_the_others() -> None:
    lines = (ROOT / "requirements/cuda.txt").read_text().splitlines()
    assert (ROOT / "requirements/torch.txt").read_text().split() == [
        line.split()[0] for line in lines if line.startswith("torch==")
    ]
    run = {line.split()[0] for line in (ROOT / "requirements/run.txt").read_text().splitlines() if "==" in line}
    names = {pin.split("==")[0] for pin in run}
    both = [line.split()[0] for line in lines if line[:1].isalpha() and line.split("==")[0] in names]
    assert len(both) > 5 and set(both) <= run
    assert not [line for line in lines if "://" in line] and sum("--hash=sha256:" in line for line in lines) > 100


def test_what_a_run_needs_is_locked_alike_on_a_laptop() -> None:
    """install.sh reads dev.txt alone: a package that only run.txt has is missing on every fresh clone."""

    def pins(lock: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / lock).read_text().splitlines()
        return dict(line.split(";")[0].rstrip(" \\").split("==") for line in lines if "==" in line.split(";")[0])

    def asked(file: str) -> set[str]:
        lines = (ROOT / "requirements" / file).read_text().splitlines()
        return {line.split("==")[0].strip().replace(".", "-") for line in lines if line.strip() and line[0] not in "#-"}

    laptop, run = pins("dev.txt"), pins("run.txt")
    assert run.items() <= laptop.items()
    assert asked("run.in") <= run.keys() and asked("dev.in") <= laptop.keys()


def test_make_hands_on_what_the_caller_set_and_nothing_else() -> None:
    def shown(*given: str) -> list[str]:
        text = "include Makefile\nshown:\n\t@env\n"
        bare = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        make = subprocess.run(
            ["make", "-f", "-", "shown", *given],
            cwd=ROOT,
            env=bare,
            input=text,
            text=True,
            capture_output=True,
            check=True,
        )
        return [line for line in make.stdout.splitlines() if line.startswith(("ENV=", "ALGO=", "RUN_ID="))]

    assert shown() == []
    assert shown("ENV=test", "RUN_ID=a b") == ["ENV=test", "RUN_ID=a b"]


def test_makes_own_variables_are_no_callers() -> None:
    """`AS` is an assembler to make."""

    def recipe(*given: str) -> str:
        return subprocess.run(
            ["make", "-n", "publish-models", "FROM=x", *given], cwd=ROOT, text=True, capture_output=True, check=True
        ).stdout

    assert "--as" not in recipe() and '--as "datasets"' in recipe("AS=datasets")


def test_a_script_stays_within_150_lines() -> None:
    scripts = [*(ROOT / "scripts").rglob("*.*sh"), *(ROOT / "docker").glob("*.sh")]
    assert scripts
    assert {s.name: n for s in scripts if (n := len(s.read_text().splitlines())) > 150} == {}


SUPPRESSION = re.compile(
    r"# (noqa(: ?[A-Z0-9, ]+)?|type: ignore(\[[a-z, -]+\])?|shellcheck .*disable=[\w,]+|hadolint ignore=[\w,]+"
    r"|zizmor: ignore\[.+?\]|yamllint disable.*|pragma: no cover)"
)


def without_reason(lines: list[str]) -> list[str]:
    """Lines that silence a linter and do not say why, behind it or in a comment right above."""
    found = []
    for above, line in zip(["", *lines], lines, strict=False):
        if silenced := SUPPRESSION.search(line):
            behind = SUPPRESSION.sub("", line[silenced.end() :]).strip(" #-:")
            said = above.lstrip().startswith("# ") and not SUPPRESSION.search(above)
            if not behind and not said:
                found.append(line.strip())
    return found


def test_what_silences_a_linter_says_why() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout.split()
    kinds = (".py", ".sh", ".bash", ".bats", ".yaml", ".yml", ".toml", "Dockerfile")
    paths = [path for name in names if name.endswith(kinds) and (path := ROOT / name).is_file() and path != HERE]
    found = {path.relative_to(ROOT).as_posix(): without_reason(path.read_text().splitlines()) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["import x  # noqa: F401"], 1),
        (["import x  # noqa: F401 - it registers itself"], 0),
        (["x = 1  # type: ignore[misc]  # noqa: E501"], 1),
        (["x = 1  # type: ignore[misc]  # put back below"], 0),
        (["", "# shellcheck disable=SC2016"], 1),
        (["# shellcheck shell=bash disable=SC2034,SC2153  # read by who sources it"], 0),
        (["# The argument has the tag.", "# hadolint ignore=DL3006", "FROM ${X}"], 0),
        (["# hadolint ignore=DL3006", "# hadolint ignore=DL3007"], 2),
    ],
)
def test_a_reason_is_known_when_it_is_there(lines: list[str], found: int) -> None:
    assert len(without_reason(lines)) == found


def test_ci_shows_and_keeps_what_its_commands_leave(tmp_path: Path) -> None:
    """Each `after` finds its files where `keep` names them, and prints Markdown."""
    job = YAML(typ="safe").load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check"]
    rows = [row for row in job["strategy"]["matrix"]["include"] if "after" in row]
    assert {row["what"] for row in rows} == {"dry run", "mini-test"}
    for row in rows:
        folder = tmp_path / row["what"]
        for number, pattern in enumerate(row["keep"].split()):
            file = folder / pattern.replace("*", "x")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"line {number}\n")
        ended = subprocess.run(["bash", "-c", row["after"]], cwd=folder, capture_output=True, text=True, check=True)
        assert ended.stdout in ("~~~\nline 0\n~~~\n", "line 1\n")
    # The names of the mini-test's files are those that its script and the report write.
    written = (ROOT / "scripts/minitest.sh").read_text() + (ROOT / "src/wmtp/report.py").read_text()
    for name in ("report.html", "report.md", "summary.json"):
        assert name in written and f"minitest-*/{name}" in next(r["keep"] for r in rows if r["what"] == "mini-test")
