from __future__ import annotations

import json
from pathlib import Path

import pytest

from wmtp import manifest, published


def put(tmp_path: Path, objects: dict[str, int]) -> list[str]:
    lines = [{"key": f"s3://b/{key}", "size": size, "type": "file"} for key, size in objects.items()]
    (tmp_path / "objects").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / "objects"), str(tmp_path)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    for path, size in (("a", 5), ("b", 7), ("c", 1)):
        (tmp_path / "from" / path).write_bytes(bytes(size))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/m.json").write_bytes(manifest.written(manifest.create(tmp_path / "from", "m")))
    return tmp_path


WHOLE = {"models/m/manifest.json": 1, "models/m/a": 5, "models/m/b": 7, "models/m/c": 1}


def test_a_row_says_what_is_published_and_what_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = {"datasets/d/x\x1b": 3, "models/loose": 1, "models/d/.publishing": 9, "else/m/a": 1}
    assert published.main([*put(folder, WHOLE | strange), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["files"], row["bytes"], bool(row["digest"])) for row in rows] == [
        ("models/d", None, 0, False),
        ("models/m", 3, 13, True),
        ("datasets/d", None, 3, False),
    ]


def test_13_when_an_object_is_not_there_as_its_manifest_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main(put(folder, WHOLE | {"models/m/b": 6})) == 13
    assert "FAIL b is not there as it says (1 of such)" in capsys.readouterr().out


def test_13_when_a_manifest_is_of_another_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "models/n.json").write_bytes((folder / "models/m.json").read_bytes())
    assert published.main(put(folder, {"models/n/manifest.json": 1})) == 13
    assert "another name" in capsys.readouterr().out


@pytest.mark.parametrize(("free", "files"), [(13, 3), (12, 2), (11, 1), (7, 1), (6, 0)])
def test_as_many_files_at_once_as_the_disk_holds(
    folder: Path, free: int, files: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published.main([*put(folder, WHOLE | {"models/m/x": 1}), "--one", "models/m", "--free", str(free)]) == 0
    first, *beside = capsys.readouterr().out.splitlines()
    assert first.split()[1:] == ["13", "3", str(files)] and beside == ["x"]
