"""The files of a source and the layouts of their records."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from arro3.core import RecordBatch
from arro3.io import write_parquet

from wmtp.sources import PASSED, DataError, Part, parts_of, read_records, records_of, refuse_evaluation

CODE_CONTESTS = Path(__file__).parent / "sources" / "code_contests.parquet"  # written by pyarrow
SOLVED = ["Add two numbers.\nprint(sum(map(int, input().split())))", "Subtract.\nprint 9"]


def lines(folder: Path, *records: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def texts(folder: Path) -> list[str]:
    return [record.text for record in read_records(folder)]


def test_texts_of_both_spellings_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "solution": "s\u2028t"}\n\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "q", "code": "c"}')
    assert [r.text for r in read_records(tmp_path)] == ["q\nc", "p\ns\u2028t"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is a list"),
        (b'{"text": "x"}', "has neither 'solution' nor 'code'"),
        (b'{"text": 1, "code": ""}', "has a int as 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "q", "code": "c"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read_records(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:2: {what}")
    rule = "each line of a .jsonl is one JSON object" if what.startswith("is ") else "a record has texts under prompt"
    assert f"\n  rule: {rule}" in str(error.value)


def test_a_source_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="hold no record"):
        read_records(tmp_path)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_code_contests_gives_the_first_solution_in_python_3_else_in_2() -> None:
    counts: Counter[str] = Counter()
    part = Part("x", "parquet", (CODE_CONTESTS,))
    assert [record.text for record in records_of(part, counts)] == SOLVED
    assert counts == {"CodeContests": 2, PASSED: 1}


def test_code_contests_reads_alike_as_lines(tmp_path: Path) -> None:
    problem = {"description": "Add.", "solutions": {"language": [2, 1, 3, 3], "solution": ["a", "b", "c", "d"]}}
    older = {"description": "Take.", "solutions": {"language": [4, 1], "solution": ["a", "b"]}}
    nobody = {"description": "No.", "solutions": {"language": [], "solution": []}}
    assert texts(lines(tmp_path, problem, nobody, older)) == ["Add.\nc", "Take.\nb"]


@pytest.mark.parametrize(
    ("solutions", "what"),
    [
        ([], "has 'solutions' that are not lists"),
        ({"language": [3], "solution": []}, "has 'solutions' that are not lists"),
        ({"language": 3, "solution": "x"}, "has 'solutions' that are not lists"),
        ({"language": [[3], 3], "solution": ["x", 4]}, "has a int as 'solution'"),
    ],
)
def test_solutions_of_another_shape_are_named(tmp_path: Path, solutions: Any, what: str) -> None:
    with pytest.raises(DataError) as error:
        read_records(lines(tmp_path, {"description": "d", "solutions": solutions}))
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:1: {what}")


def test_problems_that_nobody_solved_alone_are_no_source(tmp_path: Path) -> None:
    nobody = {"description": "No.", "solutions": {"language": [2], "solution": ["x"]}}
    with pytest.raises(DataError, match="hold no record \\(1 without a solution in Python"):
        read_records(lines(tmp_path, nobody))


def test_human_evals_solution_goes_on_where_its_prompt_ends(tmp_path: Path) -> None:
    task = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "    return 1\n",
    }
    (record,) = read_records(lines(tmp_path, task))
    assert record.text == "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("fields", "layout", "text"),
    [
        ({"task_id": "HumanEval/3", "prompt": "p", "canonical_solution": "s"}, "HumanEval", "ps"),
        ({"task_id": "HumanEval/3", "prompt": "p", "solution": "s"}, "HumanEval", "p\ns"),
        ({"task_id": "HumanEval/3", "text": "p", "code": "s"}, "HumanEval", "p\ns"),
        ({"task_id": "mine/3", "prompt": "p", "canonical_solution": "s"}, "prompt and canonical_solution", "ps"),
        ({"task_id": 3, "prompt": "p", "solution": "s"}, "prompt and solution", "p\ns"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_human_eval_is_known_by_its_task_ids(
    tmp_path: Path, fields: dict[str, Any], layout: str, text: str, kind: str
) -> None:
    if kind == "parquet":
        table(tmp_path / "a.parquet", **{key: [value] for key, value in fields.items()})
    else:
        lines(tmp_path, fields)
    counts: Counter[str] = Counter()
    assert [record.text for record in read_records(tmp_path, counts)] == [text] and counts == {layout: 1}


def test_training_on_human_eval_is_refused_unless_the_recipe_says_so() -> None:
    with pytest.raises(DataError, match=r"data\.train\.sources: he: 164 records") as error:
        refuse_evaluation("he", {"HumanEval": 164}, False)
    assert "rule" in str(error.value) and "allow_evaluation_data: true" in str(error.value)
    refuse_evaluation("he", {"HumanEval": 164}, True)
    refuse_evaluation("other", {"CodeContests": 2}, False)


# ---- parquet ---------------------------------------------------------------------------------------------------------


def table(file: Path, **columns: list[Any]) -> None:
    write_parquet(RecordBatch.from_pydict({k: _array(v) for k, v in columns.items()}), file)


def _array(values: list[Any]) -> Any:
    from arro3.core import Array, DataType

    return Array(values, DataType.string() if isinstance(next(filter(None, values), ""), str) else DataType.int64())


def test_both_kinds_of_files_by_name_and_more_rows_than_a_batch(tmp_path: Path) -> None:
    table(tmp_path / "b.parquet", prompt=[f"p{i}" for i in range(150)], solution=["s"] * 150, ignored=["x"] * 150)
    (tmp_path / "a.jsonl").write_text('{"prompt": "first", "solution": ""}')
    (tmp_path / "c.jsonl").write_text('{"prompt": "last", "solution": ""}')
    assert texts(tmp_path) == ["first\n", *(f"p{i}\ns" for i in range(150)), "last\n"]


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", prompt=["p"] * 70, solution=["s"] * 69 + [None])
    with pytest.raises(DataError, match=r"a\.parquet: row 70: has neither 'solution' nor 'code'"):
        read_records(tmp_path)
    table(tmp_path / "a.parquet", prompt=["p"], solution=[4])
    with pytest.raises(DataError, match=r"row 1: has a int as 'solution'"):
        read_records(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "footer", "middle"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = CODE_CONTESTS.read_bytes()
    content = {
        "empty": b"",
        "text": b"nonsense that is long enough",
        "cut": whole[:-40],
        "footer": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        "middle": whole[:300] + b"x" * 600 + whole[900:],
    }[damage]
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read_records(tmp_path)
    if damage in ("empty", "text", "cut"):  # not handed to the library, which tells its panics to stderr
        assert capfd.readouterr().err == ""


# ---- text and code ---------------------------------------------------------------------------------------------------


def test_a_folder_of_code_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/y/x.TXT", ".git/c.py", "a/.hidden.py", "a/__pycache__/m.py", "a/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "link.py").symlink_to(tmp_path / "b.py")
    (tmp_path / "round").symlink_to(tmp_path)
    assert texts(tmp_path) == ["# a/y/x.TXT\n", "# a/z.py\n", "# b.py\n"]
    assert [(r.prompt, r.solution) for r in read_records(tmp_path)][2] == ("", "# b.py\n")


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"name = '\xe9'")
    with pytest.raises(DataError, match=r"a\.py: is not UTF-8 \(byte 8\)"):
        read_records(tmp_path)


def test_a_readme_above_the_records_is_not_taken_for_the_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    lines(tmp_path / "data", {"text": "q", "code": "c"})
    with pytest.raises(DataError, match=r"its records are deeper: data/a\.jsonl"):
        read_records(tmp_path)


def test_the_same_bytes_read_otherwise_have_another_digest(tmp_path: Path) -> None:
    lines(tmp_path / "lines", {"text": "q", "code": "c"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes((tmp_path / "lines" / "a.jsonl").read_bytes())
    one, other = (parts_of(tmp_path / name)[0].digests() for name in ("lines", "text"))
    assert len(one) == len(other) == 1 and one != other and other[0].endswith(one[0])
