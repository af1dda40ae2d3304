"""What the store holds, what uses it, what may go."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wmtp import cache
from wmtp.manifest import COMPLETE, MANIFEST, ManifestError, create, load_manifest


def version(store: Path, name: str, text: str) -> Path:
    folder = store / "made"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    (folder / MANIFEST).write_text(json.dumps(create(folder, name)))
    digest = load_manifest(folder / MANIFEST).digest
    (folder / COMPLETE).write_text(digest + "\n")
    return folder.rename(store / digest)


def spare(store: Path, links: Path) -> list[str]:
    return [one.digest for one in cache.look(store, links) if not one.users]


def test_a_link_uses_a_version_and_its_age_is_that_of_the_last_link(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "app/models"
    old, new = version(store, "m", "1"), version(store, "m", "2")
    links.mkdir(parents=True)
    (links / "m").symlink_to(new)
    os.utime(old / COMPLETE, (1, 1))
    found = cache.look(store, links)
    assert [one.digest for one in found] == [old.name, new.name]
    assert found[1].users == (str(links / "m"),) and spare(store, links) == [old.name]
    assert "nobody" in cache.table(found) and " d ago" in cache.table(found)


def test_a_record_of_another_machine_counts_for_a_day(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "none"
    one = version(store, "m", "1")
    record = store / cache.USED / one.name / "1"
    record.parent.mkdir(parents=True)
    record.write_text("elsewhere\t/app/models/m\n")
    assert spare(store, links) == []
    os.utime(record, (time.time() - cache.ELSEWHERE_S - 9,) * 2)
    assert spare(store, links) == [one.name]
    record.write_text(f"{socket.gethostname()}\t{tmp_path}/gone/m\n")
    assert spare(store, links) == [one.name]


def test_a_version_that_a_reader_holds_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_held", [])
    one = version(tmp_path / "store", "m", "1")
    cache.hold(one)
    assert cache.look(tmp_path / "store", tmp_path)[0].users == ("a reader",)
    cache._held.clear()
    assert spare(tmp_path / "store", tmp_path) == [one.name]
    cache.hold(tmp_path)  # no marker: nothing to hold


def test_survey_knows_what_is_here_staged_or_in_another_version(tmp_path: Path) -> None:
    store = tmp_path / "store"
    one = version(store, "m", "1")
    items = [("m", one / MANIFEST)]
    assert [line[4:] for line in cache.survey(store, items)] == [("hit", "1")]
    (one / "config.json").write_text("2")
    os.utime(one / "config.json", (time.time() + 9,) * 2)
    assert [line[4:] for line in cache.survey(store, items)] == [("touched", "1")]
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("1")
    (tmp_path / "m/more.json").write_text("22")
    (tmp_path / "new.json").write_text(json.dumps(create(tmp_path / "m", "m")))
    assert [line[3:] for line in cache.survey(store, [("m", tmp_path / "new.json")])] == [("3", "new", "1")]
    with pytest.raises(ManifestError, match="that of m"):
        list(cache.survey(store, [("other", one / MANIFEST)]))


def test_a_version_that_is_evicted_while_one_looks_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, links = tmp_path / "store", tmp_path / "none"
    gone, stays = version(store, "m", "1"), version(store, "n", "2")
    manifest = tmp_path / "m.json"
    manifest.write_bytes((gone / MANIFEST).read_bytes())
    found = list(cache.versions(store))

    def vanish(*_: object, **__: object) -> Iterator[str]:
        (gone / COMPLETE).unlink(missing_ok=True)
        (gone / COMPLETE).stat()
        yield ""

    monkeypatch.setattr(cache, "versions", lambda _: found)
    monkeypatch.setattr(cache, "differences", vanish)
    assert [line[4] for line in cache.survey(store, [("m", manifest)])] == ["touched"]
    shutil.rmtree(gone)
    assert [one.digest for one in cache.look(store, links)] == [stays.name]
