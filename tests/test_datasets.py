from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DATASETS = Path(__file__).resolve().parents[1] / "datasets"
CORPUS = DATASETS / "wmtp_code" / "problems.jsonl"
TINY = DATASETS / "mbpp_tiny" / "problems.jsonl"
FIELDS = ["task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list"]
BATCH = 20
BATCH_SECONDS = 60

# Runs in the child: a batch of records on stdin, a list of [task_id, assert, error] on stdout,
# so that a solution which loops or exits cannot take the suite with it.
CHILD = """
import json, sys
failures = []
ran = 0
for record in json.load(sys.stdin):
    for test in record["test_list"]:
        names = {"__name__": "solution"}
        try:
            exec(record["test_setup_code"], names)
            exec(record["code"], names)
            exec(test, names)
        except BaseException as error:
            failures.append([record["task_id"], test, repr(error)])
        ran += 1
print(json.dumps({"ran": ran, "failures": failures}))
"""


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def functions(record: dict[str, Any]) -> list[str]:
    body = ast.parse(record["code"]).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]


def run_batch(batch: list[dict[str, Any]], seconds: float = BATCH_SECONDS) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(batch),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=True,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return load(CORPUS)


def test_the_corpus_is_large_enough(records: list[dict[str, Any]]) -> None:
    assert len(records) >= 64


def test_each_record_has_the_fields(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert list(record) == FIELDS
        assert type(record["task_id"]) is int
        assert isinstance(record["text"], str) and record["text"].strip()
        assert isinstance(record["code"], str) and record["code"].strip()
        assert len(record["test_list"]) >= 3, record["task_id"]
        assert all(test.startswith("assert ") for test in record["test_list"])
        assert record["test_setup_code"] == ""
        assert record["challenge_test_list"] == []


def test_task_ids_and_texts_are_unique(records: list[dict[str, Any]]) -> None:
    assert len({record["task_id"] for record in records}) == len(records)
    assert len({record["text"] for record in records}) == len(records)


def test_each_record_compiles(records: list[dict[str, Any]]) -> None:
    for record in records:
        for source in [record["code"], *record["test_list"]]:
            compile(source, f"<task {record['task_id']}>", "exec")


def test_solutions_import_the_standard_library_only(records: list[dict[str, Any]]) -> None:
    for record in records:
        for node in ast.walk(ast.parse(record["code"])):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names, record["task_id"]


def test_no_function_name_occurs_twice(records: list[dict[str, Any]]) -> None:
    names = [name for record in records for name in functions(record)]
    assert len(names) >= len(records)
    assert sorted(set(names)) == sorted(names)


def test_each_assert_calls_its_records_function(records: list[dict[str, Any]]) -> None:
    for record in records:
        for test in record["test_list"]:
            assert any(f"{name}(" in test for name in functions(record)), test


def test_every_assert_passes(records: list[dict[str, Any]]) -> None:
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        report = run_batch(batch)
        assert report["failures"] == []
        assert report["ran"] == sum(len(record["test_list"]) for record in batch)


def test_a_wrong_solution_is_caught() -> None:
    wrong = {"task_id": 1, "code": "x = 1", "test_list": ["assert x == 2"], "test_setup_code": ""}
    assert run_batch([wrong])["failures"] == [[1, "assert x == 2", "AssertionError()"]]


def test_a_loop_is_cut_off() -> None:
    loop = {"task_id": 1, "code": "while True: pass", "test_list": ["1"], "test_setup_code": ""}
    with pytest.raises(subprocess.TimeoutExpired):
        run_batch([loop], seconds=1.0)


def test_the_tiny_set_is_the_first_ten_lines() -> None:
    lines = CORPUS.read_bytes().splitlines(keepends=True)
    assert TINY.read_bytes() == b"".join(lines[:10])
    assert len(load(TINY)) == 10


def test_the_lines_are_as_json_dumps_writes_them(records: list[dict[str, Any]]) -> None:
    written = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    assert CORPUS.read_bytes() == written.encode("utf-8")
