"""The table of the plan's criteria is whole, can be red, and docs/plan.md names what is there."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import acceptance
import pytest
from break_acceptance import BREAKAGES, Breakage, broken

from wmtp import config

ROOT = Path(__file__).parent.parent
# The plan's own counts of criteria, heading by heading.
LEAST = {"P1": 4, "P2": 5, "P3": 5, "MT": 7, "PR": 5, "P4": 3, "S1": 3, "S2": 3, "S3": 5, "S4": 5, "R": 6}


def test_each_row_has_an_id_of_its_own_and_a_section() -> None:
    ids = [row.id for row in acceptance.ROWS]
    assert len(set(ids)) == len(ids)
    assert {name.partition(".")[0] for name in ids} == set(acceptance.SECTIONS)


def test_no_section_of_the_plan_has_fewer_rows_than_criteria() -> None:
    rows = Counter(row.id.partition(".")[0] for row in acceptance.ROWS)
    assert {key: rows[key] for key, least in LEAST.items() if rows[key] < least} == {}


def test_evidence_that_rows_want_is_collected_in_an_order() -> None:
    script = (ROOT / "scripts/lib/evidence.bash").read_text()
    assert set(re.findall(r"^evidence_(\w+)\(\)", script, re.M)) == set(acceptance.ORDER)
    assert {name for row in acceptance.ROWS for name in row.needs} == set(acceptance.ORDER)


@pytest.mark.parametrize("row", [row for row in acceptance.ROWS if row.needs], ids=lambda row: row.id)
def test_without_evidence_no_row_is_ok(row: acceptance.Row, tmp_path: Path) -> None:
    assert acceptance.judge(row, acceptance.Evidence(tmp_path)).state == "FAIL"


def test_what_was_not_looked_at_is_neither_ok_nor_fail(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/why").write_text("not root\n")
    row = next(row for row in acceptance.ROWS if row.needs == ("engine",))
    assert acceptance.judge(row, acceptance.Evidence(tmp_path)) == acceptance.Verdict("not checked", "not root")


def test_a_test_of_the_image_that_failed_is_red(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/rc").write_text("0\n")
    (tmp_path / "engine/out").write_text("not ok 1 image: /app with its folders is 755\n")
    row = next(row for row in acceptance.ROWS if row.id == "P1.3")
    assert acceptance.judge(row, acceptance.Evidence(tmp_path)).state == "FAIL"


def test_rows_that_the_image_suite_shows_name_tests_that_are_there() -> None:
    files = (ROOT / "bats/cluster").glob("*.bats")
    names = [name for file in files for name in re.findall(r'^@test "(.*)" \{$', file.read_text(), re.M)]
    asked = re.search(r"test_image.sh -f '(.*)'", (ROOT / "scripts/lib/evidence.bash").read_text())
    assert asked
    run = [name for name in names if re.search(asked[1], name)]
    for name in (acceptance.IMAGE, acceptance.CHECK, acceptance.PULL, acceptance.DEPLOYED, acceptance.CONTAINER):
        assert sum(name in one for one in run) == 1, name


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.what)
def test_a_breakage_changes_the_file_that_it_names(breakage: Breakage) -> None:
    text = (ROOT / breakage.file).read_text("utf-8")
    if breakage.pattern:
        assert broken(text, breakage) != text
    assert set(breakage.rows) <= {row.id for row in acceptance.ROWS}


def ours() -> list[str]:
    """What stands in code marks in the second column of docs/plan.md."""
    rows = [line.split(" | ") for line in (ROOT / "docs/plan.md").read_text().splitlines() if line.startswith("| ")]
    return sorted({name for row in rows if len(row) >= 3 for name in re.findall(r"`([^`]+)`", row[1])})


def known_key(key: str) -> bool:
    kind: object = config.Config
    for part in key.split("."):
        fields = getattr(kind, "model_fields", {})
        if part not in fields:
            return False
        kind = fields[part].annotation
    return True


@pytest.mark.parametrize("name", ours())
def test_a_name_of_ours_in_the_map_of_the_plan_is_there(name: str) -> None:
    if name.startswith("make "):
        assert re.search(rf"^{name.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif name.startswith("wmtp."):
        assert importlib.util.find_spec(name)
    elif re.fullmatch(r"[A-Z][A-Z0-9_]+", name):
        assert re.search(
            rf"\b{name}\b", (ROOT / "docker/vessl_startup.sh").read_text() + (ROOT / "docker/vessl.yaml").read_text()
        )
    elif "/" in name or name == "Dockerfile":
        assert (ROOT / name).exists()
    else:
        assert known_key(name)


def test_the_map_of_the_plan_leads_to_decisions_that_are_there() -> None:
    links = set(re.findall(r"\]\((adr/[^)]+)\)", (ROOT / "docs/plan.md").read_text()))
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []
