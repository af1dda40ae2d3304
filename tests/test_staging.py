from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from test_manifest import model

from wmtp import manifest, staging
from wmtp.manifest import LISTING, ManifestError


def arrive(at: Path, contents: dict[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for number, data in contents.items():
        (at / "part" / str(number)).write_bytes(data)
        lines.append(json.dumps({"success": True, "destination": f"part/{number}"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))


def test_only_right_content_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made, source = model(tmp_path)
    at = tmp_path / "staging"
    assert len(staging.plan(made, at)) == 2
    arrive(at, {0: b"CONTENT", 1: b""}, monkeypatch)
    assert staging.accept(made, at) == 13
    assert not (at / "files" / "a").exists()
    assert [entry.path for _, entry in staging.plan(made, at)] == ["a"]
    with pytest.raises(ManifestError):
        staging.finish(made, source, at, tmp_path / "target")
    arrive(at, {0: b"content"}, monkeypatch)
    assert staging.accept(made, at) == 0
    staging.finish(made, source, at, tmp_path / "target")
    assert not list(manifest.differences(made, tmp_path / "target", quick=True))
    assert not at.exists()


def test_plan_takes_away_a_file_of_the_right_size_and_other_content(tmp_path: Path) -> None:
    _, made, _ = model(tmp_path)
    at = tmp_path / "staging"
    staging.plan(made, at)
    (at / "files" / "a").write_bytes(b"CONTENT")
    assert "a" in [entry.path for _, entry in staging.plan(made, at)]
    assert not (at / "files" / "a").exists()


def test_a_part_that_arrived_whole_before_a_kill_is_kept(tmp_path: Path) -> None:
    _, made, _ = model(tmp_path)
    at = tmp_path / "staging"
    staging.plan(made, at)
    (at / "part/0").write_bytes(b"content")
    (at / "part/0123").write_bytes(b"conte")
    assert [entry.path for _, entry in staging.plan(made, at)] == ["s p/ü"]
    assert (at / "files/a").read_bytes() == b"content" and not list((at / "part").iterdir())


def test_a_file_of_another_version_is_used_again_if_it_still_is_what_it_was(tmp_path: Path) -> None:
    _, made, source = model(tmp_path)
    store = tmp_path / "store"
    at = tmp_path / "first"
    staging.plan(made, at)
    (at / "files/a").write_bytes(b"content")
    (at / "files/s p").mkdir()
    (at / "files/s p/ü").write_bytes(b"")
    store.mkdir()
    staging.finish(made, source, at, store / made.digest)
    assert not staging.plan(made, tmp_path / "second", store)
    assert (tmp_path / "second/files/a").samefile(store / made.digest / "a")
    (store / made.digest / "a").write_bytes(b"Content")
    assert [entry.path for _, entry in staging.plan(made, tmp_path / "third", store)] == ["a"]


def test_what_another_version_has_in_staging_is_used_again_if_it_is_the_same(tmp_path: Path) -> None:
    _, made, _ = model(tmp_path)
    at = tmp_path / f"m-{made.digest}"
    for path, data in (("a", b"content"), ("s p/ü", b"x")):
        other = tmp_path / f"m-{'0' * 64}" / "files" / path
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(data)
    assert [entry.path for _, entry in staging.plan(made, at)] == ["s p/ü"]
    assert (at / "files/a").read_bytes() == b"content"


def test_discarded_files_are_proved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made, _ = model(tmp_path)
    at = tmp_path / "staging"
    staging.plan(made, at)
    arrive(at, {0: b"content"}, monkeypatch)
    assert staging.accept(made, at, discard=True) == 12
    assert not list((at / "files").rglob("*")) and not list((at / "part").iterdir())
    assert [entry.path for _, entry in staging.plan(made, at)] == ["s p/ü"]
    arrive(at, {1: b""}, monkeypatch)
    assert staging.accept(made, at, discard=True) == 0


def test_first_files_are_settings_and_tokenizer_and_are_proved(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model", "weights.bin"):
        (folder / name).write_text(name)
    source = tmp_path / "manifest.json"
    source.write_text(json.dumps(manifest.create(folder, "m")))
    made, at = manifest.load_manifest(source), tmp_path / "early/m"
    told = staging.plan_first(made, at, "s3://b/models/m", "")
    assert "config.json" in told and "tokenizer.model" in told and "weights" not in told
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "early/.m.part" / name).write_text(name)
    (tmp_path / "early/.m.part/config.json").write_text("CONFIG.json")
    with pytest.raises(ManifestError, match=r"config\.json"):
        staging.accept_first(made, source, at)
    assert not at.exists()
    (tmp_path / "early/.m.part/config.json").write_text("config.json")
    staging.accept_first(made, source, at)
    assert sorted(path.name for path in at.iterdir()) == ["config.json", "manifest.json", "tokenizer.model"]


def test_a_listing_is_proved_by_sizes_and_the_buckets_checksums(tmp_path: Path) -> None:
    (tmp_path / LISTING).mkdir()
    path = tmp_path / LISTING / "m.json"
    (tmp_path / "a").write_bytes(b"123456789")
    files = [{"path": "a", "bytes": 9, "etag": "e", "crc64nvme": "rosUhgp5mIg="}]  # the check value of CRC-64/NVME
    path.write_text(json.dumps({"name": "m", "files": files}))
    entry = manifest.load_manifest(path).files[0]
    assert not entry.differs(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"123456780")
    assert "crc64nvme" in entry.differs(tmp_path / "a")
    files[0]["path"] = "../a"
    path.write_text(json.dumps({"name": "m", "files": files}))
    with pytest.raises(ManifestError):
        manifest.load_manifest(path)


def test_the_line_of_a_transfer_says_how_far_how_fast_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    bar = staging.Bar("llama-7b-mtp", 27_000_000_000)
    now = bar.past[0][0]
    bar.past.append((now + 10, 0))
    line = bar.text(13_500_000_000)
    assert line == "Download  llama-7b-mtp  [####----]  50 %  13.5 of 27.0 GB  1350 MB/s  10 s left"
    bar.EVERY_S = 0
    bar.at(27_000_000_001)
    assert "100 %  27.0 of 27.0 GB" in capsys.readouterr().err  # a line of its own where it is no terminal
