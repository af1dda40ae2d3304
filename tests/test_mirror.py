"""A folder and its copy in a real bucket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wmtp import mirror as module
from wmtp.config import Storage
from wmtp.mirror import RECORD, Mirror, interval, lasted
from wmtp.remote import DamagedError, Remote, TransferError

STORAGE = Storage(retries=1, retry_wait_s=0, stall_s=5)


def marker(prefix: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Remote(prefix, STORAGE).s5cmd("cat", f"{prefix}/{RECORD}"))
    return read


def objects(prefix: str) -> set[str]:
    return set(Remote(prefix, STORAGE).listed("*"))


def test_what_is_pushed_is_pulled(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "a folder"
    (folder / "plots").mkdir(parents=True)
    (folder / ".hidden").write_text("no")
    files = {"steps.jsonl": '{"step": 1}\n', "plots/a [1]*ü.svg": "<svg/>", "empty": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    assert Mirror(folder, prefix, STORAGE).push()

    assert objects(prefix) == {*files, RECORD}
    told = marker(prefix)
    assert told["files"] == {name: len(text.encode()) for name, text in files.items()}
    assert abs(told["at"] - time.time()) < 60
    assert Mirror(tmp_path / "there", prefix, STORAGE).pull()
    assert {name: (tmp_path / "there" / name).read_text() for name in files} == files
    assert not [*folder.glob(".mirror*"), *(tmp_path / "there").glob(".*")]


def test_only_what_changed_is_brought_and_what_went_goes(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "same").write_text("same")
    (tmp_path / "grows").write_text("1\n")
    (tmp_path / "goes").write_text("soon")
    ours = Mirror(tmp_path, prefix, STORAGE)
    assert ours.push() and ours.pushes == 1
    assert ours.push() and ours.pushes == 1

    calls: list[str] = []
    real = Remote.s5cmd

    def spy(self: Remote, *arguments: str, lines: Any = None) -> str:
        calls.extend([arguments[-1], *(lines or ())])
        return real(self, *arguments, lines=lines)

    monkeypatch.setattr(Remote, "s5cmd", spy)
    (tmp_path / "grows").write_text("1\n2\n")
    (tmp_path / "same").touch()
    (tmp_path / "goes").unlink()
    assert ours.push() and ours.pushes == 2
    assert [call.rpartition("/")[2].strip('"') for call in calls] == ["run", "grows", RECORD, "run", "goes"]
    assert objects(prefix) == {"same", "grows", RECORD}
    assert marker(prefix)["files"] == {"same": 4, "grows": 4}


def test_a_file_that_grows_while_it_is_copied_is_as_long_as_the_marker_says(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.txt"
    log.write_text("one\n")
    real = module._copy

    def grown(source: Path, target: Path) -> tuple[int, str]:
        done = real(source, target)
        with source.open("a") as file:
            file.write("two\n")
        return done

    ours = Mirror(tmp_path, prefix, STORAGE)
    monkeypatch.setattr(module, "_copy", grown)
    assert ours.push()
    assert marker(prefix)["files"] == {"log.txt": 4}
    assert Remote(prefix, STORAGE).s5cmd("cat", f"{prefix}/log.txt") == "one\n"
    monkeypatch.setattr(module, "_copy", real)
    assert ours.push()  # what came meanwhile is not forgotten
    assert Remote(prefix, STORAGE).s5cmd("cat", f"{prefix}/log.txt") == "one\ntwo\n"


def test_another_nodes_part_of_the_record_stays(tmp_path: Path, prefix: str) -> None:
    for node in ("first", "second"):
        (tmp_path / node).mkdir()
        (tmp_path / node / f"{node}.log").write_text(node)
        assert Mirror(tmp_path / node, prefix, STORAGE).push()
    assert marker(prefix)["files"] == {"first.log": 5, "second.log": 6}


def test_a_run_that_goes_on_keeps_what_is_ahead_of_its_mirror(tmp_path: Path, prefix: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("ahead", "behind", "gone"):
        (here / name).write_text("1\n2\n")
    assert Mirror(here, prefix, STORAGE).push()
    (here / "ahead").write_text("1\n2\n3\n")
    (here / "behind").write_text("1\n")
    (here / "gone").unlink()
    again = Mirror(here, prefix, STORAGE)
    assert again.pull(keep=True)
    assert [(here / name).read_text() for name in ("ahead", "behind", "gone")] == ["1\n2\n3\n", "1\n2\n", "1\n2\n"]
    assert again.pull()
    assert (here / "ahead").read_text() == "1\n2\n"
    (here / "gone").unlink()  # had here, and removed
    assert again.push()
    assert "gone" not in objects(prefix)


def test_a_record_whose_steps_lie_with_the_checkpoints_is_pulled(tmp_path: Path, prefix: str) -> None:
    here, checkpoints = tmp_path / "here", tmp_path / "checkpoints"
    here.mkdir()
    checkpoints.mkdir()
    (checkpoints / "steps.jsonl").write_text("1\n2\n")
    (here / "steps.jsonl").symlink_to(checkpoints / "steps.jsonl")
    assert Mirror(here, prefix, STORAGE).push()
    (checkpoints / "steps.jsonl").write_text("1\n2\n3\n")
    assert Mirror(here, prefix, STORAGE).pull(keep=True)
    assert (here / "steps.jsonl").read_text() == "1\n2\n3\n"
    (checkpoints / "steps.jsonl").write_text("1\n")
    assert Mirror(here, prefix, STORAGE).pull(keep=True)
    # What is fetched takes the link's place, and writes nothing through it.
    assert (here / "steps.jsonl").read_text() == "1\n2\n" and (checkpoints / "steps.jsonl").read_text() == "1\n"


def test_nothing_there_is_no_error_and_no_bucket_is(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Mirror(tmp_path, prefix, STORAGE).pull()
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TransferError):
        Mirror(tmp_path, prefix, STORAGE).pull()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/..", "/etc/x", "link/x"])
def test_a_marker_that_climbs_is_refused(tmp_path: Path, prefix: str, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({"files": {name: 1}}))
    Remote(prefix, STORAGE).s5cmd("cp", str(tmp_path / RECORD), f"{prefix}/{RECORD}")
    with pytest.raises(DamagedError, match="climbs out"):
        Mirror(tmp_path / "in", prefix, STORAGE).pull()


def test_a_gap_is_told_once_with_its_end_and_made_up_for(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = os.environ["S3_ENDPOINT_URL"]
    ours = Mirror(tmp_path, prefix, STORAGE)
    (tmp_path / "log.txt").write_text("1\n")
    assert ours.push()
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    for line in ("2\n", "3\n"):
        with (tmp_path / "log.txt").open("a") as file:
            file.write(line)
        assert not ours.push()
    told = capsys.readouterr().err
    assert told.count("warn") == 1 and prefix in told and "training goes on" in told
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    assert ours.push()
    assert "takes the record again after" in capsys.readouterr().err
    assert ours.seconds_away > 0
    assert Remote(prefix, STORAGE).s5cmd("cat", f"{prefix}/log.txt") == "1\n2\n3\n"


def test_a_thread_mirrors_at_intervals_and_at_the_end(tmp_path: Path, prefix: str) -> None:
    ours = Mirror(tmp_path, prefix, STORAGE)
    ours.start(0.1)
    (tmp_path / "log.txt").write_text("1\n")
    until = time.monotonic() + 20
    while not ours.pushes and time.monotonic() < until:
        time.sleep(0.05)
    assert marker(prefix)["files"] == {"log.txt": 2}
    (tmp_path / "last").write_text("x")
    assert ours.close()
    assert set(marker(prefix)["files"]) == {"log.txt", "last"}


def test_what_is_wanted_soon_does_not_wait_for_the_interval(tmp_path: Path, prefix: str) -> None:
    ours = Mirror(tmp_path, prefix, STORAGE)
    ours.start(600)
    for text in ("1\n", "1\n2\n"):  # not only once
        (tmp_path / "log.txt").write_text(text)
        pushed, until = ours.pushes, time.monotonic() + 20
        ours.soon()
        while ours.pushes == pushed and time.monotonic() < until:
            time.sleep(0.05)
        assert marker(prefix)["files"] == {"log.txt": len(text)}
    assert ours.close()


def test_the_end_is_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Mirror, "_push", lambda self: time.sleep(3))
    began = time.monotonic()
    assert not Mirror(tmp_path, "s3://b/p", STORAGE).close(0.2)
    assert time.monotonic() - began < 2
    assert "not all is in the bucket" in capsys.readouterr().err


def test_what_a_killed_process_left_behind_is_cleared(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "file").write_text("x")
    code = (
        "import sys, time; from pathlib import Path; from wmtp.mirror import Mirror; from wmtp.config import Storage\n"
        "import wmtp.mirror as m\n"
        "def hang(*a): print('in', flush=True); time.sleep(60)\n"
        "m._copy = hang; Mirror(Path(sys.argv[1]), sys.argv[2], Storage()).push()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), prefix], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len([*tmp_path.glob(".mirror.*")]) == 1
    assert Mirror(tmp_path, prefix, STORAGE).push()
    assert not [*tmp_path.glob(".mirror.*")]


@pytest.mark.parametrize(("given", "seconds", "warned"), [("", 30, 0), ("2.5", 2.5, 0), ("soon", 30, 1), ("0", 30, 1)])
def test_interval(
    given: str, seconds: float, warned: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WMTP_MIRROR_S", given)
    assert interval() == seconds
    assert capsys.readouterr().err.count("warn") == warned


def test_lasted() -> None:
    assert [lasted(s) for s in (0.4, 59.4, 200)] == ["0 s", "59 s", "3 min 20 s"]
