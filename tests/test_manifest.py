from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp import manifest
from wmtp.manifest import ManifestError

ZERO = "0" * 64


def document(*paths: str, **changes: Any) -> dict[str, Any]:
    files = [{"path": path, "bytes": 1, "blake3": ZERO} for path in paths]
    made: dict[str, Any] = {"format": 1, "name": "m", "files": files, "total_bytes": len(files)}
    return made | {"created": "2026-01-01T00:00:00+00:00", "tool": "t"} | changes


def load(tmp_path: Path, made: Any) -> manifest.Manifest:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(made))
    return manifest.load_manifest(path)


HOSTILE = [
    "/etc/x",
    "..",
    "../x",
    "a/../../x",
    "a//b",
    "./a",
    "a/",
    "",
    "a\nb",
    "a\\b",
    "a\x00",
    ".complete",
    "manifest.json",
]


@pytest.mark.parametrize("path", [*HOSTILE, "\ud800", "x" * 300, ".complete/x"])
def test_hostile_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError):
        load(tmp_path, document(path))


@pytest.mark.parametrize("path", ["a b", "ü/ä*.bin", "...", "a/.b", "-rf", "$(x)", "a'b"])
def test_odd_but_legal_path_is_taken(tmp_path: Path, path: str) -> None:
    assert load(tmp_path, document(path)).files[0].path == path


def test_a_model_may_be_called_listing(tmp_path: Path) -> None:
    (tmp_path / "listing").mkdir()
    assert load(tmp_path / "listing", document("a", name="listing")).name == "listing"
    assert not manifest.NAME.fullmatch(manifest.LISTING)


@pytest.mark.parametrize(
    "made",
    [
        document("a", "a"),
        document("a", "a/b"),
        document(),
        document("a", format=2),
        document("a", format=True),
        document("a", total_bytes=2),
        document("a", name="../m"),
        document("a", created="yesterday"),
        document("a", created="2026-01-01T00:00:00+02:00"),
        document("a", extra=1),
        document("a", files=[{"path": "a", "bytes": -1, "blake3": ZERO}], total_bytes=-1),
        document("a", files=[{"path": "a", "bytes": 1, "blake3": "F" * 64}]),
        [],
        None,
    ],
)
def test_malformed_manifest_is_refused(tmp_path: Path, made: Any) -> None:
    with pytest.raises(ManifestError):
        load(tmp_path, made)


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_no_accepted_path_leaves_its_folder(path: str) -> None:
    try:
        manifest._check_path(path)
    except ManifestError:
        return
    root = Path("/root/of/it")
    assert (root / path).is_relative_to(root) and ".." not in path.split("/")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused_without_another_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest._checked(data)


def model(tmp_path: Path) -> tuple[Path, manifest.Manifest, Path]:
    folder = tmp_path / "m"
    (folder / "s p").mkdir(parents=True)
    (folder / "a").write_bytes(b"content")
    (folder / "s p" / "ü").write_bytes(b"")
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest.create(folder, "m")))
    return folder, manifest.load_manifest(path), path


def test_created_manifest_verifies_its_folder(tmp_path: Path) -> None:
    folder, made, _ = model(tmp_path)
    assert not list(manifest.differences(made, folder))
    (folder / "a").write_bytes(b"Content")
    assert "blake3" in next(manifest.differences(made, folder))


def test_link_in_a_finished_folder_differs(tmp_path: Path) -> None:
    folder, made, _ = model(tmp_path)
    (folder / "a").rename(tmp_path / "else")
    (folder / "a").symlink_to(tmp_path / "else")
    assert list(manifest.differences(made, folder)) == ["a is missing"]


def test_command_line_refuses_with_13(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(document("../x")))
    assert manifest.main(["check", str(path)]) == 13
    assert "'../x'" in capsys.readouterr().err


def test_all_that_cannot_be_published_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_bytes(b"")
    (tmp_path / manifest.CLAIM).write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "manifest.json").write_bytes(b"its own")
    with pytest.raises(ManifestError) as refused:
        manifest.walk(tmp_path)
    assert [line.split(":")[0] for line in str(refused.value).split("\n")] == [
        "path '.publishing'",
        "path 'a\\nb'",
        "'link'",
    ]
