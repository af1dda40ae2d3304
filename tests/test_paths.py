"""Addresses to places."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmtp.paths import PathError, PathResolver, split, under_app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_app_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WMTP_APP_ROOT", raising=False)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("file:///app/models/test", ("file", "/app/models/test")),
        ("file:///app/models/llama-7b-mtp/", ("file", "/app/models/llama-7b-mtp")),
        ("file:///app//models/./x", ("file", "/app/models/x")),
        ("file:////app/x", ("file", "/app/x")),
        ("file:///app/../etc", ("file", "/etc")),
        ("file:///a b/ü", ("file", "/a b/ü")),
        ("file://tests/x", ("file", str(ROOT / "tests/x"))),
        ("s3://b/k", ("s3", "s3://b/k")),
        ("s3://b", ("s3", "s3://b")),
    ],
)
def test_resolve(uri: str, place: tuple[str, str]) -> None:
    assert PathResolver().resolve(uri) == place


@pytest.mark.parametrize(
    "uri",
    ["", "/app/x", "gs://b/k", "file:/app", "file://", "s3://", "s3:///k", "s3://b/../c", "file:///a\nb", "FILE:///a"],
)
def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(PathError):
        PathResolver().resolve(uri)


def test_app_root_replaces_app_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WMTP_APP_ROOT", f"{tmp_path}/")
    resolve = PathResolver().resolve
    assert resolve("file:///app/models/x") == ("file", f"{tmp_path}/models/x")
    assert resolve("file:///app") == ("file", str(tmp_path))
    assert resolve("file:///application/x") == ("file", "/application/x")
    assert resolve("file:///app/../etc") == ("file", "/etc")
    assert resolve("file:///tmp/app/x") == ("file", "/tmp/app/x")
    assert resolve("s3://app/app") == ("s3", "s3://app/app")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WMTP_APP_ROOT", "here")
    assert resolve("file:///app/x") == ("file", f"{tmp_path}/here/x")


@pytest.mark.parametrize(
    ("uri", "moved"),
    [
        ("file:///app/mlruns", "file:///r/mlruns"),
        ("sqlite:////app/m.db", "sqlite:////r/m.db"),
        ("sqlite:///m.db", "sqlite:///m.db"),
        ("https://h/app", "https://h/app"),
        ("s3://b/mlruns", "s3://b/mlruns"),
    ],
)
def test_resolve_tracking(uri: str, moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_APP_ROOT", "/r")
    assert PathResolver().resolve_tracking(uri) == moved


def test_under_app() -> None:
    assert under_app("/app") and under_app("/app/x")
    assert not under_app("/apps") and not under_app("/") and not under_app("app/x")
    assert not under_app(split("file:///app/../x")[1])
