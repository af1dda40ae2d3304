"""Five of the soak's kills of the sync, and that its watcher sees what it is there for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from soak_sync import Watcher, wrong

from wmtp.manifest import COMPLETE, MANIFEST, create, load_manifest

SOAK = Path(__file__).with_name("soak_sync.py")


@pytest.mark.long
def test_five_kills_of_the_sync_leave_nothing_half_done(prefix: str) -> None:
    # Of this seed each phase is aimed at, and no round begins with a publish, which takes as long as all else.
    command = [sys.executable, str(SOAK), "--kills", "5", "--kills-only", "--seed", "112"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7 passed, 0 failed\n"  # an undisturbed sync before them, and the watcher
    assert re.search(r"watched: [1-9]\d* looks, [1-9]\d* folders read, 0 wrong", done.stderr)


def stored(store: Path) -> Path:
    """A version in a store, as a sync leaves it."""
    (folder := store / "new").mkdir(parents=True)
    (folder / "weights").write_bytes(b"right")
    (folder / MANIFEST).write_text(json.dumps(create(folder, "m")))
    digest = load_manifest(folder / MANIFEST).digest
    (folder / COMPLETE).write_text(digest + "\n")
    return folder.rename(store / digest)


def test_the_soak_sees_a_version_that_is_not_whole(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    seen: set[tuple[int, int]] = set()
    assert not wrong(folder, seen)
    (folder / "weights").write_bytes(b"wrong")
    assert not wrong(folder, seen)  # read once: its size is right
    assert "blake3" in wrong(folder, set())
    (folder / "weights").write_bytes(b"half")
    assert "size" in wrong(folder, seen)
    (folder / COMPLETE).unlink()
    assert "No such file" in wrong(folder, seen)


def test_the_watcher_tells_of_links_and_versions_that_are_wrong(tmp_path: Path) -> None:
    folder = stored(tmp_path / "store")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").symlink_to(folder)
    assert Watcher(tmp_path / "store", tmp_path / "models").end()[-1].endswith(" 1 folders read")
    (folder / "weights").unlink()
    (tmp_path / "models" / "n").symlink_to(tmp_path / "nothing")
    told = "\n".join(Watcher(tmp_path / "store", tmp_path / "models").end())
    assert f"{folder}: weights is missing" in told and "models/m: weights is missing" in told
    assert "models/n: points nowhere" in told
